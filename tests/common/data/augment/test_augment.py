"""Test augmentation of texts with spans: over random texts, spans keep their text or get a mention, in order."""

import re

import numpy as np
import pytest

from common.data.augment import Pieces, SpanText, augment_text, eda, mentions_of, replace_mentions, synonym
from common.data.augment.synonyms import _table, synonyms_of
from common.data.augment.words import EDA

WORDS = ["film", "big", "quickly", "the", "of", "北京", "don't", "U.S.", "café", "#tag", "www.a.b/c", ",", "—", "buys"]


def random_row(rng: np.random.Generator, overlap: bool = False) -> SpanText:
    """Return a random text with random spans, which may cut words; without `overlap` none overlap."""
    parts = [
        WORDS[i] + (" ", "", "  ", "\n")[rng.choice(4, p=[0.8, 0.1, 0.05, 0.05])]
        for i in rng.integers(len(WORDS), size=12)
    ]
    text = "".join(parts)
    edges = sorted(rng.choice(len(text) + 1, 6, replace=False).tolist())
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    if overlap:
        spans = [tuple(sorted(rng.choice(len(text) + 1, 2, replace=False).tolist())) for _ in range(3)]
    return SpanText(text, tuple(spans), tuple(f"L{i % 2}" for i in range(3)))


def outside(row: SpanText) -> list[str]:
    """Return the text before, between and after the spans of a row."""
    edges = [0, *(edge for span in row.spans for edge in span), len(row.text)]
    return [row.text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("change", [synonym, eda])
def test_spans_keep_their_text_and_order(change, overlap):
    changed = 0
    for seed in range(300):
        row = random_row(np.random.default_rng(seed), overlap)
        new = change(row, 0.3, np.random.default_rng([seed, 1]))
        assert [new.text[a:b] for a, b in new.spans] == [row.text[a:b] for a, b in row.spans]
        assert np.argsort([a for a, _ in new.spans]).tolist() == np.argsort([a for a, _ in row.spans]).tolist()
        assert new.labels == row.labels
        assert new == change(row, 0.3, np.random.default_rng([seed, 1]))
        changed += new.text != row.text
    assert changed > 150


@pytest.mark.parametrize("overlap", [False, True])
def test_pieces_without_a_change_are_the_text(overlap):
    for seed in range(200):
        row = random_row(np.random.default_rng(seed), overlap)
        assert Pieces(row).joined() == row


def test_mentions_are_replaced_by_mentions_with_their_label():
    rows = [random_row(np.random.default_rng(seed)) for seed in range(200)]
    mentions = mentions_of(rows)
    changed = 0
    for seed, row in enumerate(rows):
        new = replace_mentions(row, mentions, 0.5, np.random.default_rng(seed))
        assert new.labels == row.labels
        assert outside(row) == outside(new)
        for label, (start, end) in zip(new.labels, new.spans, strict=True):
            assert new.text[start:end] in mentions[label]
        changed += new.text != row.text
    assert changed == 200
    nested = SpanText("the University of Oslo", ((4, 22), (18, 22)), ("ORG", "LOC"))
    assert replace_mentions(nested, {"ORG": ["x"], "LOC": ["y"]}, 1.0, np.random.default_rng(0)) == nested


def test_the_operations_of_eda():
    row = SpanText("The film was big and bold, we buy it.", ((4, 8),))
    of = dict(zip(("replace", "insert", "swap", "delete"), EDA, strict=True))

    def texts(name: str, share: float = 0.2) -> set[str]:
        found = set()
        for seed in range(20):
            pieces = Pieces(row)
            of[name](pieces, share, np.random.default_rng(seed))
            found.add(pieces.joined().text)
        return found

    assert "The film was large and bold, we purchase it." in texts("replace")
    assert all("film" in text and "movie" not in text for text in texts("replace", 1.0))
    assert all(len(text.split()) == 11 for text in texts("insert"))
    assert all(sorted(re.findall(r"\w+", text)) == sorted(re.findall(r"\w+", row.text)) for text in texts("swap"))
    assert all(len(text.split()) == 7 and "  " not in text for text in texts("delete"))
    assert texts("delete", 1.0) == {"film,."}
    assert augment_text("alone", "eda", np.random.default_rng(3)) != ""


def test_deleting_keeps_one_word():
    row = SpanText("one two")
    for seed in range(10):
        pieces = Pieces(row)
        EDA[3](pieces, 1.0, np.random.default_rng(seed))
        assert pieces.joined().text in ("one", "two")


def test_synonyms_keep_case_and_regular_inflection():
    assert synonyms_of("film") == ["movie"]
    assert synonyms_of("Films") == ["Movies"]
    assert synonyms_of("QUICKLY")[0] == "RAPIDLY"
    assert synonyms_of("buys") == ["purchases"]
    assert "began" not in synonyms_of("starts")  # its third person is regular only by rule
    assert [synonyms_of(word) for word in ("the", "xyzzy", "12", "Straße", "news", "was")] == [[]] * 6
    assert len(_table()) > 10_000


def test_wrong_spans_are_errors():
    for span in ((0, 0), (3, 9), (-1, 2)):
        with pytest.raises(ValueError, match="not in a text"):
            SpanText("a text", (span,))
