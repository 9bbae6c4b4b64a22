"""Test the NER metric against cases computed by hand, and across processes."""

import json

import pytest

from recipes.ner.scoring import StrictSeqeval, invalid_tags
from tests.faults import CONTEXT

GOLD = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O", "B-ORG"]]
# sentence 1: PER is right, LOC has the wrong type. Sentence 2: LOC is right, I-ORG is stray and no entity
PREDICTED = [["B-PER", "I-PER", "O", "B-ORG"], ["B-LOC", "O", "I-ORG"]]


def compute(predictions, references):
    return StrictSeqeval(keep_in_memory=True).compute(predictions=predictions, references=references)


def test_scores_by_hand():
    scores = compute(PREDICTED, GOLD)
    assert scores["precision"] == pytest.approx(2 / 3)  # PER, ORG, LOC predicted; two are right
    assert scores["recall"] == pytest.approx(2 / 4)
    assert scores["f1"] == pytest.approx(4 / 7)
    assert scores["accuracy"] == pytest.approx(5 / 7)
    assert scores["invalid_predicted_tags"] == 1
    assert (scores["PER_f1"], scores["ORG_f1"], scores["LOC_f1"]) == pytest.approx((1.0, 0.0, 2 / 3))
    assert (scores["PER_support"], scores["ORG_support"], scores["LOC_support"]) == (1, 1, 2)
    assert scores["macro_f1"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert json.loads(json.dumps(scores)) == scores  # plain numbers


def test_a_boundary_off_by_one_is_no_match():
    assert compute([["B-PER", "O"]], [["B-PER", "I-PER"]])["f1"] == 0.0


def test_nothing_predicted_is_zero_without_a_warning(recwarn):
    assert compute([["O", "O"]], [["B-PER", "O"]])["f1"] == 0.0
    assert not recwarn.list


def test_no_entity_anywhere_is_zero_and_plain_json(recwarn):
    scores = compute([["O"]], [["O"]])
    assert (scores["f1"], scores["macro_f1"], scores["accuracy"]) == (0.0, 0.0, 1.0)
    assert "NaN" not in json.dumps(scores)
    assert not recwarn.list


def test_invalid_tags():
    assert invalid_tags(["I-A", "B-A", "I-A", "I-B", "O", "I-B", "I-B"]) == [0, 3, 5]


def _score_half(rank: int, folder: str, queue) -> None:
    metric = StrictSeqeval(cache_dir=folder, num_process=2, process_id=rank, experiment_id="two")
    metric.add_batch(predictions=PREDICTED[rank : rank + 1], references=GOLD[rank : rank + 1])
    queue.put((rank, metric.compute()))


def test_two_processes_get_the_scores_of_one(tmp_path):
    queue = CONTEXT.Queue()
    workers = [CONTEXT.Process(target=_score_half, args=(rank, str(tmp_path), queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = dict(queue.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    assert results == {0: compute(PREDICTED, GOLD), 1: None}  # rank 0 scores the rows of both
