"""Answer a file of questions, each from its context, with a model saved by `train`.

    make predict RECIPE=qa MODEL=outputs/qa INPUT=questions.jsonl OUTPUT=answers.jsonl
    python -m recipes.qa.predict --model outputs/qa --input questions.jsonl --output answers.jsonl --n_best 5

The input has rows of `question` and `context` (.jsonl .json .csv .parquet, or the nested .json of SQuAD). The output
has the same rows in the same order. Each row gets `answer`, `score`, `start` and `end`, and with `--n_best` a list of
the best answers. `answer` is empty if the model finds no answer. `score` is the probability of the answer among the
best spans and "no answer". `start` and `end` are characters of the context, or null without an answer. Memory use does
not grow with the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering

from common.cli import command_line, parse
from common.data.columns import Columns
from common.data.source import Row
from common.errors import InputError
from common.inference.predictor import DomainPredictArguments, InputRows, Predictor, predict_file
from common.models.load import load_config, resolve_model

from .spans import CANDIDATES, Spans, best_positions, best_spans, context_mask, cut_windows, trimmed
from .squad import read_squad

WRITTEN = ("answer", "score", "start", "end", "n_best")
COLUMNS = {"question": ("question",), "context": ("context",)}


@dataclass
class QaPredictArguments(DomainPredictArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder that train saved, or a hub id"},
    )
    n_best: int = field(default=0, metadata={"help": "number of best answers to write for each question"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.n_best <= CANDIDATES:
            raise InputError(f"--n_best {self.n_best}: must be between 0 and {CANDIDATES}")


ARGUMENTS = (QaPredictArguments,)


class Reader(Predictor):
    """Answer questions from contexts with a saved model, in windows cut as in training.

    `batch_tokens` limits the tokens of a batch, padding included.
    """

    def __init__(self, model: str, batch_tokens: int = 4096, precision: str = "auto", speed: str = "auto", **more):
        super().__init__(
            AutoModelForQuestionAnswering, "ForQuestionAnswering", model, batch_tokens, precision, speed, **more
        )
        self.columns = Columns(self.config, **COLUMNS)
        self.doc_stride = getattr(self.config, "doc_stride", self.max_length // 4)
        self.max_question_length = getattr(self.config, "max_question_length", self.max_length // 4)
        self.max_answer_length = getattr(self.config, "max_answer_length", 30)
        self.threshold = getattr(self.config, "no_answer_threshold", None)

    def __call__(self, questions: list[str], contexts: list[str]) -> list[list[Row]]:
        """Return the best answers of each question, the best first, with `answer`, `score`, `start` and `end`."""
        if not questions:
            return []
        limits = self.max_length, self.doc_stride, self.max_question_length
        windows = cut_windows(questions, contexts, self.tokenizer, *limits)
        candidates = np.zeros((len(windows["row"]), 1 + 4 * CANDIDATES), np.float32)
        for batch, outputs in self.outputs(windows):
            logits = (outputs.start_logits.float(), outputs.end_logits.float())
            begins, sizes = [windows["begin"][i] for i in batch], [len(windows["starts"][i]) for i in batch]
            outside = ~context_mask(begins, sizes, logits[0].shape[1]).to(self.device)
            kept = best_positions(tuple(part.masked_fill(outside, float("-inf")) for part in logits))
            candidates[batch] = kept.cpu().numpy()
        columns = {name: windows[name] for name in ("row", "begin", "starts", "ends")}
        spans = best_spans(candidates, Dataset.from_dict(columns), self.max_answer_length)
        return list(ranked(contexts, spans, self.threshold))


def ranked(contexts: list[str], spans: Spans, threshold: float | None) -> Iterator[list[Row]]:
    """Yield the different answers from each context, sorted by score; with a threshold, "no answer" is one of them.

    The scores are softmax probabilities over this list. The threshold is subtracted from the logits of "no answer".
    """
    for i, context in enumerate(contexts):
        of_context = slice(spans.first[i], spans.first[i + 1])
        logits: dict[tuple[int, int] | None, float] = {}  # None is "no answer", and a span of spaces
        columns = (x[of_context].tolist() for x in (spans.start, spans.end, spans.score))
        for start, end, score in zip(*columns, strict=True):
            place = trimmed(context, start, end)
            logits.setdefault(place if place[0] < place[1] else None, score)  # the best comes first
        if threshold is not None or not logits:
            null = float(spans.null[i]) - (threshold or 0.0)
            logits[None] = max(null, logits.get(None, null))
        places, scores = list(logits), np.array(list(logits.values()))
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        options = []
        for best in np.argsort(-probabilities, kind="stable"):
            start, end = places[best] or (None, None)
            answer = "" if start is None else context[start:end]
            options.append(
                {"answer": answer, "score": round(float(probabilities[best]), 4), "start": start, "end": end}
            )
        yield options


def check_row(row: Row, columns: Columns) -> Iterator[str]:
    """Yield a message for each error in an input row."""
    for name in WRITTEN:
        if name in row:
            yield f'already has "{name}", which would be overwritten; rename that column'
    for name in COLUMNS:
        text = columns.value(row, name)
        if not isinstance(text, str) or not text.strip():
            yield columns.problem(row, name, "a non-blank text")


def with_answers(rows: list[Row], reader: Reader, n_best: int = 0) -> Iterator[Row]:
    """Yield the rows with `answer`, `score`, `start` and `end`, and with the list `n_best` if `n_best` is above 0."""
    answers = reader(*([reader.columns.value(row, name) for row in rows] for name in COLUMNS))
    for row, options in zip(rows, answers, strict=True):
        yield row | options[0] | ({"n_best": options[:n_best]} if n_best else {})


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    columns = Columns(load_config(resolve_model(args.model)), **COLUMNS)
    rows = InputRows(args, lambda row: check_row(row, columns), partial(read_squad, args=args))
    reader = Reader(args.model, **args.settings())
    return predict_file(args, lambda some: with_answers(some, reader, args.n_best), rows)


if __name__ == "__main__":
    command_line(main)
