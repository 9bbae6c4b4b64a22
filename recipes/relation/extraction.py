"""Find the mentions in raw texts with a token classifier, and pair the mentions of a sentence."""

from collections.abc import Iterator
from itertools import permutations
from typing import Any

from transformers import AutoModelForTokenClassification

from common.data.sentences import sentences
from common.data.source import Row
from common.data.tokens import Ends, encode_parts
from common.data.words import split_words
from common.inference.predictor import Predictor

from .mentions import Mention, overlap, words_between


class MentionFinder(Predictor):
    """Find entities with a saved model of tags (BIO, or one tag a word), such as one of `make ner`.

    The tag of a word is that of its first token. A sentence longer than the model reads is tagged in parts.
    """

    def __init__(self, model: str, *args: Any, **kwargs: Any):
        super().__init__(AutoModelForTokenClassification, "ForTokenClassification", model, *args, **kwargs)

    def __call__(self, texts: list[str]) -> list[list[Row]]:
        """Return the entities of each text, each with `text`, `start`, `end`, `type` and `score`."""
        spans = [split_words(text) for text in texts]
        ends = Ends(self.tokenizer)
        room = self.max_length - len(ends.before) - len(ends.after)
        columns: dict[str, list] = {name: [] for name in ends.columns}
        places: list[list[tuple[int, int]]] = []  # of each row: the position of a word's first token, and the word
        owners: list[int] = []
        words = [[text[start:end] for start, end in of_text] for text, of_text in zip(texts, spans, strict=True)]
        for owner, parts in enumerate(encode_parts(self.tokenizer, words)):
            for ids, firsts in _rows_of(parts, room):
                for name, values in ends.around(ids).items():
                    columns[name].append(values)
                places.append([(len(ends.before) + at, word) for at, word in firsts])
                owners.append(owner)
        tags: list[list[tuple[str, float]]] = [[("O", 1.0)] * len(of_text) for of_text in spans]
        for batch, logits in self.logits(columns):
            best = logits.softmax(-1).max(-1)
            for i, scores, numbers in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
                for at, word in places[i]:
                    tags[owners[i]][word] = self.labels[numbers[at]], scores[at]
        return [list(_entities(*row)) for row in zip(texts, spans, tags, strict=True)]


def _rows_of(parts: list[list[int]], room: int) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Yield rows of at most `room` tokens of whole words, with the position and number of each word's first token."""
    ids: list[int] = []
    firsts: list[tuple[int, int]] = []
    for word, tokens in enumerate(parts):
        tokens = tokens[:room]
        if len(ids) + len(tokens) > room:
            yield ids, firsts
            ids, firsts = [], []
        if tokens:
            firsts.append((len(ids), word))
            ids = ids + tokens
    if firsts:
        yield ids, firsts


def _entities(text: str, spans: list[tuple[int, int]], tags: list[tuple[str, float]]) -> Iterator[Row]:
    """Yield the entities: a word whose tag is I-X after an X continues it, any other tag begins one."""
    current: list[int] = []
    kind = None
    for word, (tag, _) in enumerate([*tags, ("O", 1.0)]):
        prefix, _, name = tag.partition("-") if tag[:2] in ("B-", "I-") else ("B", "", tag)
        if current and prefix == "I" and name == kind:
            current.append(word)
            continue
        if current:
            start, end = spans[current[0]][0], spans[current[-1]][1]
            score = sum(tags[i][1] for i in current) / len(current)
            yield {"text": text[start:end], "start": start, "end": end, "type": kind, "score": round(score, 4)}
        current, kind = ([], None) if tag == "O" else ([word], name)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Return the characters of each sentence of a text."""
    found, at = [], 0
    for sentence in sentences(text):
        at = text.index(sentence, at)
        found.append((at, at + len(sentence)))
        at += len(sentence)
    return found


def pairs_of(
    text: str, mentions: list[Row], types: list[list[str]], max_distance: int
) -> Iterator[tuple[Row, Row, tuple[int, int]]]:
    """Yield head, tail and the characters of their sentence for each pair of mentions of a sentence, in both orders.

    Args:
        text: the text.
        mentions: its mentions, with `start`, `end` and `type`.
        types: pairs of types that may have a relation; empty for all.
        max_distance: most words between the two mentions.
    """
    spans: list[tuple[int, int]] = []
    for start, end in sentence_spans(text):
        if spans and any(mention["start"] < spans[-1][1] and mention["end"] > start for mention in mentions):
            start = spans.pop()[0]  # a mention such as "Warner Bros. Pictures" ends no sentence
        spans.append((start, end))
    for start, end in spans:
        inside = [mention for mention in mentions if start <= mention["start"] and mention["end"] <= end]
        for head, tail in permutations(inside, 2):
            one, other = (Mention(mention["start"], mention["end"]) for mention in (head, tail))
            if overlap(one, other) or words_between(text, one, other) > max_distance:
                continue
            if not types or [head["type"], tail["type"]] in types:
                yield head, tail, (start, end)
