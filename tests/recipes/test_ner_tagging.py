"""Test windows, labels, stitching, entities and words exactly."""

import random

import numpy as np
import pytest
from seqeval.scheme import IOB2, Entities

from common.errors import InputError
from recipes.ner.reading import check_row, repair_tags
from recipes.ner.scoring import Gazetteer, compare, gold_tags, predicted_tags
from recipes.ner.tagging import cut_windows, entity_spans, stitch
from recipes.ner.train import encode
from tests.conftest import SAMPLE, read_jsonl

LABELS = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
LABEL2ID = {label: i for i, label in enumerate(LABELS)}


def words_of(windows: dict, tokenizer) -> list[list[str]]:
    """Return the first tokens of words at the windows' positions, sentence by sentence."""
    found: dict[int, list[str]] = {}
    for sentence, ids, positions in zip(windows["sentence"], windows["input_ids"], windows["positions"], strict=True):
        found.setdefault(sentence, []).extend(tokenizer.convert_ids_to_tokens([ids[p] for p in positions]))
    return [found[s] for s in sorted(found)]


def test_encode_labels_the_first_token_of_each_word_and_nothing_else(tokenizer):
    rows = {"tokens": [["Guadalajara", "greets", "Quillfeather"]], "ner_tags": [["B-LOC", "O", "B-PER"]]}
    windows = encode(rows, [7], tokenizer, LABEL2ID, max_seq_length=64, doc_stride=16)
    pieces = tokenizer.convert_ids_to_tokens(windows["input_ids"][0])
    labels = [None if label == -100 else LABELS[label] for label in windows["labels"][0]]
    assert windows["sentence"] == [7]
    assert [p for p in pieces if p.startswith("##")], "the test needs words of several tokens"
    expected = iter(["B-LOC", "O", "B-PER"])
    for piece, label in zip(pieces, labels, strict=True):
        if piece in ("[CLS]", "[SEP]") or piece.startswith("##"):
            assert label is None
        else:
            assert label == next(expected)
    assert next(expected, "none left") == "none left"


@pytest.mark.parametrize(("length", "stride"), [(8, 0), (8, 1), (9, 2), (12, 5), (16, 13), (64, 16)])
def test_every_word_belongs_to_exactly_one_window(tokenizer, length, stride):
    sentences = [row["tokens"] for row in read_jsonl(SAMPLE / "train.jsonl")[:120]]
    windows = cut_windows(sentences, tokenizer, length, stride)
    assert max(map(len, windows["input_ids"])) <= length
    first = [[tokenizer(word, add_special_tokens=False).tokens()[0] for word in sentence] for sentence in sentences]
    assert words_of(windows, tokenizer) == first


def test_a_word_in_an_overlap_is_taken_where_it_has_more_context(tokenizer):
    words = ["a"] * 30  # one token each
    windows = cut_windows([words], tokenizer, max_seq_length=12, doc_stride=4)  # 10 words per window, 6 of them new
    inner = [(p[0], p[-1]) for p in windows["positions"]]
    assert inner[0] == (1, 8)  # leaves its last two words to the next window
    assert all(low == 3 for low, _ in inner[1:])  # two words of the overlap stay in the previous window
    assert sum(len(p) for p in windows["positions"]) == 30


def test_windows_are_stitched_to_the_gold_tags(tokenizer):
    rows = read_jsonl(SAMPLE / "train.jsonl")[:200]
    labels = sorted({tag for row in rows for tag in row["ner_tags"]})
    label2id = {label: i for i, label in enumerate(labels)}
    batch = {key: [row[key] for row in rows] for key in ("tokens", "ner_tags")}
    windows = encode(batch, list(range(200)), tokenizer, label2id, max_seq_length=10, doc_stride=3)
    assert len(windows["sentence"]) > 400
    stitched = stitch(windows, [np.array(row) for row in windows["labels"]])
    assert [[labels[i] for i in ids] for ids in stitched] == batch["ner_tags"]
    assert gold_tags(windows, labels) == batch["ner_tags"]


def test_scores_do_not_follow_from_labels_of_an_edited_encode(tokenizer):
    """A copier may label every token of a word, or only the last one: scores are of words all the same."""
    tokens = [["Guadalajara", "greets", "Quillfeather"], ["Oslo"] * 20]
    rows = {"tokens": tokens, "ner_tags": [["B-LOC", "O", "B-PER"], ["O"] * 20]}
    windows = encode(rows, [0, 1], tokenizer, LABEL2ID, max_seq_length=12, doc_stride=4)
    assert any(len(ids) - 2 > len(at) for ids, at in zip(windows["input_ids"], windows["positions"], strict=True))
    windows["labels"] = [[LABEL2ID["O"]] * len(ids) for ids in windows["input_ids"]]
    outputs = [np.full(len(ids), LABEL2ID["B-LOC"]) for ids in windows["input_ids"]]
    predicted = predicted_tags(windows, outputs, LABELS)
    assert gold_tags(windows, LABELS) == rows["ner_tags"]
    assert [len(tags) for tags in predicted] == [3, 20]
    data = [{"id": str(i)} | {name: values[i] for name, values in rows.items()} for i in range(2)]
    assert [row["differ_at"] for row in compare(data, predicted)] == [[1, 2], list(range(20))]


def test_a_stride_without_room_is_an_error(tokenizer):
    with pytest.raises(InputError, match="--doc_stride 2: a window of --max_seq_length 4 has 2"):
        cut_windows([["a"]], tokenizer, max_seq_length=4, doc_stride=2)


def test_words_that_the_tokenizer_drops_still_get_a_tag(tokenizer):
    words = ["New", "\u200b", "York", "\ufe0f"]
    windows = cut_windows([["a"], words], tokenizer, 64, 16)
    found = words_of(windows, tokenizer)
    assert found[0] == ["a"]
    assert len(found[1]) == 4
    assert found[1][1] == "[UNK]"


def test_entity_spans_are_those_of_seqeval_strict():
    random.seed(0)
    sequences = [[random.choice(LABELS) for _ in range(random.randint(1, 12))] for _ in range(500)]
    expected = [
        [(entity.tag, entity.start, entity.end) for entity in found]
        for found in Entities(sequences, scheme=IOB2).entities
    ]
    assert [entity_spans(tags) for tags in sequences] == expected


def test_check_row_accepts_the_good_and_names_what_is_wrong():
    good = {"tokens": ["Oslo", "fell"], "ner_tags": ["B-LOC", "O"]}
    assert list(check_row(good)) == []
    wrong = {
        "empty sentence": {"tokens": [], "ner_tags": []},
        "2 tokens but 1 tags": good | {"ner_tags": ["O"]},
        "tag 2 is 'LOC'": good | {"ner_tags": ["O", "LOC"]},
        "tag 2 is 'S-LOC'": good | {"ner_tags": ["O", "S-LOC"]},
        "tag 2 is None": good | {"ner_tags": ["O", None]},
        "tag 2 is the number 3": good | {"ner_tags": ["O", 3]},
        "does not follow B-LOC or I-LOC": good | {"ner_tags": ["B-PER", "I-LOC"]},
        "token 1 is ' '": good | {"tokens": [" ", "fell"]},
        "tokens is not a list but str": good | {"tokens": "Oslo fell"},
    }
    for message, row in wrong.items():
        (found,) = check_row(row)
        assert message in found


def test_repair_turns_iob1_into_iob2_and_counts():
    row = {"tokens": list("abcdef"), "ner_tags": ["I-LOC", "I-LOC", "B-LOC", "O", "I-PER", "I-LOC"]}
    assert list(check_row(row)) != []
    assert list(check_row(row, repair_bio=True)) == []
    repaired = repair_tags(row)
    assert repaired == {"ner_tags": ["B-LOC", "I-LOC", "B-LOC", "O", "B-PER", "B-LOC"], "repaired": 3}


def test_gazetteer_takes_the_longest_match_and_the_commonest_type():
    sentences = [["New", "York"], ["York"], ["Paris"], ["Paris"], ["Paris"]]
    tags = [["B-LOC", "I-LOC"], ["B-LOC"], ["B-PER"], ["B-LOC"], ["B-LOC"]]
    gazetteer = Gazetteer(sentences, tags)
    words = ["from", "New", "York", "and", "York", "to", "Paris"]
    assert gazetteer.tag(words) == ["O", "B-LOC", "I-LOC", "O", "B-LOC", "O", "B-LOC"]
