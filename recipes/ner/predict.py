"""Find the entities in a file of texts with a model saved by `train`.

    make predict RECIPE=ner MODEL=outputs/ner INPUT=texts.jsonl OUTPUT=entities.jsonl
    python -m recipes.ner.predict --model outputs/ner --input texts.txt --output entities.jsonl

The input is JSON Lines of {"text": ...} or {"tokens": [...]}, or a .txt file with one text per line. The output has the
same rows in the same order. Each row gets `entities`, a list of {label, text, start, end, score}. `start` and `end` are
characters of the text, or of the tokens joined by spaces. `score` is the mean probability of the tags of the entity's
words. Memory use does not grow with the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

from transformers import AutoModelForTokenClassification

from common.cli import command_line, parse
from common.data import Row, check_file, read_file
from common.inference.predictor import PredictArguments, Predictor, predict_file

from .conll import SENTENCES
from .tagging import cut_windows, entity_spans, split_words


@dataclass
class NerPredictArguments(PredictArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder that train saved, or a hub id"},
    )


ARGUMENTS = (NerPredictArguments,)


class Tagger(Predictor):
    """Tag words with a saved model, in windows cut as in training.

    `batch_tokens` limits the tokens of a batch, padding included.
    """

    def __init__(self, model: str, batch_tokens: int = 4096, precision: str = "auto", speed: str = "auto"):
        super().__init__(
            AutoModelForTokenClassification, "ForTokenClassification", model, batch_tokens, precision, speed
        )
        self.doc_stride = getattr(self.config, "doc_stride", self.max_length // 4)

    def __call__(self, sentences: list[list[str]]) -> list[tuple[list[str], list[float]]]:
        """Return, for each list of words, the tag of each word and the probability of the tag."""
        if not sentences:
            return []
        windows = cut_windows(sentences, self.tokenizer, self.max_length, self.doc_stride)
        tagged: list = [None] * len(windows["input_ids"])
        for batch, logits in self.logits(windows):
            scores, tags = (t.cpu().numpy() for t in logits.softmax(-1).max(-1))
            for i, row_tags, row_scores in zip(batch, tags, scores, strict=True):
                positions = windows["positions"][i]
                tagged[i] = (row_tags[positions].tolist(), row_scores[positions].tolist())
        results: list[tuple[list[str], list[float]]] = [([], []) for _ in sentences]
        for sentence, (tags, scores) in zip(windows["sentence"], tagged, strict=True):
            results[sentence][0].extend(self.labels[tag] for tag in tags)
            results[sentence][1].extend(scores)
        return results


def check_row(row: Row) -> Iterator[str]:
    """Yield a message for each error in an input row."""
    text, tokens = row.get("text"), row.get("tokens")
    if "entities" in row:
        yield 'already has "entities", which would be overwritten; rename that column'
    elif tokens is not None:
        if not isinstance(tokens, list) or not all(isinstance(token, str) and token.strip() for token in tokens):
            yield "tokens must be a list of non-blank texts"
    elif not isinstance(text, str):
        yield f'needs "text" (a text) or "tokens" (a list of texts); columns here: {", ".join(row) or "none"}'


def words_of(row: Row) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a row and the character span of each word."""
    if row.get("tokens") is None:
        return row["text"], split_words(row["text"])
    ends = accumulate(len(token) + 1 for token in row["tokens"])
    spans = [(end - 1 - len(token), end - 1) for token, end in zip(row["tokens"], ends, strict=True)]
    return " ".join(row["tokens"]), spans


def with_entities(rows: list[Row], tagger: Tagger) -> Iterator[Row]:
    """Yield the rows with their `entities`."""
    texts = [words_of(row) for row in rows]
    tagged = tagger([[text[start:end] for start, end in spans] for text, spans in texts if spans])
    results = iter(tagged)
    for row, (text, spans) in zip(rows, texts, strict=True):
        tags, scores = next(results) if spans else ([], [])
        entities = []
        for label, first, last in entity_spans(tags):
            start, end = spans[first][0], spans[last - 1][1]
            score = round(sum(scores[first:last]) / (last - first), 4)
            entities.append({"label": label, "text": text[start:end], "start": start, "end": end, "score": score})
        yield row | {"entities": entities}


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    read = partial(read_file, readers=SENTENCES)
    check_file(args.input, check_row, args.max_chars, read)
    tagger = Tagger(args.model, args.batch_tokens, args.precision, args.speed)
    return predict_file(args, lambda rows: with_entities(rows, tagger), read)


if __name__ == "__main__":
    command_line(main)
