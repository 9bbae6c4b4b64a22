"""Test that the statistics of test rows which each recipe gives `make transfer` add up to the recipe's own score."""

import random

import numpy as np
import pytest

from common.errors import InputError
from recipes.matching import transfer as matching
from recipes.ner import transfer as ner
from recipes.ner.scoring import StrictSeqeval
from recipes.qa import transfer as qa
from recipes.relation import transfer as relation
from recipes.relation.scoring import scores as relation_scores
from recipes.sentiment import transfer as sentiment
from recipes.summarization import transfer as summarization
from recipes.summarization.scoring import Rouge, means
from recipes.translation import transfer as translation
from recipes.translation.scoring import bleu_of, scores


def test_entities():
    draw = random.Random(0)
    tags = ["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    both = [[draw.choice(tags) for _ in range(12)] for _ in range(80)]
    gold, predicted = both[:40], [draw.choice([one, other]) for one, other in zip(both[:40], both[40:], strict=True)]
    gold = [[tag.replace("I-", "B-") for tag in row] for row in gold]  # valid IOB2; the predictions need not be
    rows = [{"ner_tags": a, "predicted_tags": b} for a, b in zip(gold, predicted, strict=True)]
    expected = StrictSeqeval(keep_in_memory=True).compute(predictions=predicted, references=gold)
    for name in ("precision", "recall", "f1"):
        assert ner.row_statistics(rows, name).of_all() == pytest.approx(expected[name])
    words = [{"ner_tags": ["NOUN", "O"], "predicted_tags": ["NOUN", "VERB"]}]
    assert ner.row_statistics(words, "f1").of_all() == pytest.approx(2 / 3)


def test_classes():
    rows = [{"label": "a", "predicted": "a"}, {"label": "b", "predicted": "a"}, {"label": "b", "predicted": "b"}]
    assert sentiment.row_statistics(rows, "accuracy").of_all() == pytest.approx(2 / 3)
    assert sentiment.row_statistics(rows, "macro_f1").of_all() == pytest.approx((2 / 3 + 2 / 3) / 2)
    rows = [{"label": ["a", "b"], "predicted": ["a"]}, {"label": [], "predicted": []}]
    assert sentiment.row_statistics(rows, "micro_f1").of_all() == pytest.approx(2 / 3)


def test_relations_leave_out_the_pairs_without_one():
    names = ["founded", "no_relation", "owns"]
    gold, decided = np.array([0, 1, 2, 0, 1, 1]), np.array([0, 0, 2, 1, 1, 2])
    rows = [{"label": names[a], "predicted": names[b]} for a, b in zip(gold, decided, strict=True)]
    expected = relation_scores(gold, decided, names, "no_relation")
    for name in ("accuracy", "micro_f1", "macro_f1"):
        assert relation.row_statistics(rows, name).of_all() == pytest.approx(expected[name])


def test_answers():
    rows = [{"f1": 0.5, "exact_match": 0.0}, {"f1": 1.0, "exact_match": 1.0}]
    assert qa.row_statistics(rows, "f1").of_all() == 0.75
    assert qa.row_statistics(rows, "exact_match").of_all() == 0.5
    with pytest.raises(
        InputError, match="score HasAns_f1: no statistics of rows for it; choose one of f1, exact_match"
    ):
        qa.row_statistics(rows, "HasAns_f1")


def test_summaries():
    summaries = ["A red house stands there.", "Two men talk of rain."]
    predicted = ["A red house.", "Three men sing of rain and snow."]
    rows = [
        {"summary": text, "references": [text, "Something else."], "predicted": ours}
        for text, ours in zip(summaries, predicted, strict=True)
    ]
    expected = means(Rouge("english", [])(predicted, [row["references"] for row in rows]))
    for name in ("rouge_mean", "rouge1", "rougeLsum"):
        assert summarization.row_statistics(rows, name).of_all() == pytest.approx(expected[name])
    with pytest.raises(InputError, match="score bleu: no statistics"):
        summarization.row_statistics(rows, "bleu")


def test_queries_and_translations():
    rows = [{"query": query, "mrr@10": 1 / rank, "ndcg@10": 0.5} for query, rank in (("a", 1), ("b", 2), ("a", 1))]
    assert matching.row_statistics(rows, "mrr@10").of_all() == 0.75  # a query of two rows counts once
    assert matching.row_statistics(rows, "ndcg@10").of_all() == 0.5
    assert (
        matching.row_statistics([{"forward": 1, "backward": 0}, {"forward": 1, "backward": 1}], "accuracy").of_all()
        == 0.75
    )


@pytest.mark.parametrize("module", [matching, ner, qa, relation, sentiment, summarization, translation])
def test_a_score_without_statistics_is_refused_without_rows(module):
    known = {
        matching: "ndcg@10",
        ner: "f1",
        qa: "f1",
        relation: "micro_f1",
        sentiment: "macro_f1",
        summarization: "rouge_mean",
        translation: "bleu",
    }
    assert len(module.row_statistics([], known[module]).values) == 0
    with pytest.raises(InputError, match="score loss: no statistics of rows for it; choose one of"):
        module.row_statistics([], "loss")


def test_translations_of_two_pairs():
    gold = ["ein rotes Haus steht dort am Fluss", "zwei Männer reden heute vom Regen", "een rood huis staat daar nu"]
    predicted = ["ein rotes Haus steht am Fluss", "zwei Männer reden vom Schnee heute", "een rood huis staat hier nu"]
    pairs = ["en-de", "en-de", "en-nl"]
    rows = [{"target": a, "predicted": b, "pair": c} for a, b, c in zip(gold, predicted, pairs, strict=True)]
    de, nl = bleu_of("de", "auto"), bleu_of("nl", "auto")
    each = [scores(de, predicted[:2], gold[:2]), scores(nl, predicted[2:], gold[2:])]
    statistics = translation.row_statistics(rows, "bleu")
    assert statistics.of_all() == pytest.approx(np.mean([one["bleu"] for one in each]))
    assert statistics.score(np.stack([statistics.values.sum(0)] * 3)).shape == (3,)
    assert translation.row_statistics(rows, "exact").of_all() == 0
