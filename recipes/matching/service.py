"""Customer service: name the intent of each question, answer it from the passages, or hand it over to a person.

    make sentiment ARGS="--train_file recipes/matching/sample/train.jsonl --text_column_name query --label_column_name topic --output_dir outputs/topics"
    python -m recipes.matching.service --intents outputs/topics --validation_file recipes/matching/sample/validation.jsonl --input questions.txt --output answered.jsonl

Each row gets `intent`, `answer`, `confidence` and `action`: `answer`; `route` (the intent is sure, no answer is); or
`hand_over`. The confidence is the mean of the probability of the intent and the cosine of the best passage. At most 1 -
`--coverage` of questions like those of `--validation_file` are handed over (CUSTOMER_SERVICE.md).
"""  # noqa: E501

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from transformers import AutoModelForSequenceClassification

from common.cli import command_line, parse
from common.data import READERS, read_file
from common.data.source import Row
from common.errors import InputError, Problems, check_file_exists, tell
from common.inference.predictor import InputRows, PredictArguments, Predictor, predict_file
from common.run import print_table

from .encoder import Embedder
from .index import Hit
from .predict import open_index
from .reading import is_text
from .reranking import check_reads_heads
from .scoring import INSIDE, interval

#: columns that this command writes
WRITTEN = ("intent", "answer", "confidence", "action")


@dataclass
class ServiceArguments(PredictArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder of an encoder that train saved, or a hub id"},
    )
    index: str | None = field(default=None, metadata={"help": "index of the answers; default: MODEL/index"})
    intents: str | None = field(
        default=None,
        metadata={"help": "text classifier that predicts the intent: folder of a model of sentiment, or a hub id"},
    )
    query_column_name: str = field(default="query", metadata={"help": "column with the question"})
    intent_column_name: str = field(default="intent", metadata={"help": "column with the intent, in --test_file"})
    answer_intent_column: str | None = field(
        default=None,
        metadata={"help": "column of the index with the intent of a passage; the best passage decides the intent"},
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "questions in scope, not used in training; they set the threshold"}
    )
    coverage: float = field(default=0.95, metadata={"help": "share of the questions in scope that are not handed over"})
    test_file: str | None = field(default=None, metadata={"help": "questions in scope, with intents, to measure on"})
    out_of_scope_file: str | None = field(default=None, metadata={"help": "questions out of scope, to measure on"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_file is None:
            raise InputError("--validation_file: names the questions that set the threshold; give it")
        for name in ("validation_file", "test_file", "out_of_scope_file"):
            if getattr(self, name) is not None:
                check_file_exists(name, getattr(self, name))
        if not 0 < self.coverage < 1:
            raise InputError(f"--coverage {self.coverage}: must be above 0 and below 1")


ARGUMENTS = (ServiceArguments,)


@dataclass
class Answered:
    """What the models say of a question.

    Attributes:
        intent: the intent; None without a classifier and without intents of passages.
        probability: its probability; None without a classifier.
        hit: the best passage.
    """

    intent: str | None
    probability: float | None
    hit: Hit | None

    @property
    def confidence(self) -> float:
        """Return the mean of the probability and the cosine, or the one that there is."""
        values = [self.probability, self.hit.score if self.hit else 0.0]
        return float(np.mean([value for value in values if value is not None]))


class Intents(Predictor):
    """A classifier of single texts, of which it reads the first `max_length` tokens."""

    def __init__(self, model: str, **settings):
        super().__init__(AutoModelForSequenceClassification, "ForSequenceClassification", model, **settings)
        check_reads_heads(self.config, f"--intents {model}")

    def __call__(self, texts: list[str]) -> tuple[list[str], np.ndarray]:
        """Return the most probable intent of each text, and its probability."""
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        probabilities = np.empty((len(texts), len(self.labels)))
        for batch, logits in self.logits(dict(encoded)):
            probabilities[batch] = logits.softmax(-1).cpu().numpy()
        best = probabilities.argmax(1)
        return [self.labels[int(i)] for i in best], probabilities.max(1)


def conformal_threshold(confidences: np.ndarray, coverage: float) -> float:
    """Return the confidence that a new question in scope reaches with a probability of at least `coverage`.

    Split conformal prediction (Vovk et al. 2005; Angelopoulos and Bates 2021, https://arxiv.org/abs/2107.07511): the
    k-th smallest of n confidences with k = floor((n + 1)(1 - coverage)). The promise holds for questions drawn as those
    of the confidences, and for any model.

    Args:
        confidences: of questions in scope that no model was trained on, (n,).
        coverage: the share to keep.

    Returns:
        The threshold; minus infinity if n is too small for the promise.
    """
    k = int(np.floor((len(confidences) + 1) * (1 - coverage) + 1e-9))
    return float(np.sort(confidences)[k - 1]) if k else -np.inf


class Service:
    """Answer questions from an index, with the intent by a classifier or by the best passage."""

    def __init__(self, args: ServiceArguments):
        self.index, self.intent_column = open_index(args), args.answer_intent_column
        if self.intent_column and self.intent_column not in (kept := self.index.columns()):
            raise InputError(
                f"--answer_intent_column {self.intent_column}: the index keeps {', '.join(kept)}; write it with "
                f"--keep_columns {self.intent_column}"
            )
        self.embedder = Embedder(args.model, **args.settings())
        self.intents = Intents(args.intents, **args.settings()) if args.intents else None
        self.threshold = self.answer_threshold = -np.inf

    def __call__(self, questions: list[str]) -> list[Answered]:
        """Return what the models say of each question."""
        hits = self.index.search(self.embedder.queries(questions), 1)
        names, probabilities = self.intents(questions) if self.intents else ([None] * len(hits), [None] * len(hits))
        found = []
        for of_query, name, probability in zip(hits, names, probabilities, strict=True):
            hit = of_query[0] if of_query else None
            if self.intent_column and hit:
                name = hit.row.get(self.intent_column, name)
            found.append(Answered(name, None if probability is None else float(probability), hit))
        return found

    def calibrate(self, questions: list[str], coverage: float) -> None:
        """Set the thresholds from questions in scope."""
        answered = self(questions)
        self.threshold = conformal_threshold(np.array([a.confidence for a in answered]), coverage)
        cosines = np.array([a.hit.score if a.hit else 0.0 for a in answered])
        self.answer_threshold = conformal_threshold(cosines, coverage)
        if not np.isfinite(self.threshold):
            needed = int(np.ceil(1 / (1 - coverage))) - 1
            raise InputError(
                f"--coverage {coverage}: needs at least {needed} rows in --validation_file, and it has "
                f"{len(questions)}; add rows, or lower it"
            )

    def action(self, answered: Answered) -> str:
        """Return answer, route or hand_over."""
        if answered.confidence < self.threshold or answered.hit is None:
            return "hand_over"
        return "answer" if self.intents is None or answered.hit.score >= self.answer_threshold else "route"


def questions_of(path: str, args: ServiceArguments) -> list[Row]:
    """Return the rows of a file of questions, each with its text in `query`.

    Raises:
        InputError: a row has no question, or there are no rows.
    """
    problems, found = Problems(), []
    for where, row in read_file(path, READERS, args):
        text = row if isinstance(row, str) else row.get(args.query_column_name, row.get("text"))
        if isinstance(row, str) or not is_text(text):
            problems.reject(where, [row if isinstance(row, str) else f"needs {args.query_column_name} (a text)"])
        else:
            found.append(row | {"query": text})
    if not found and not problems.count:
        problems.add(path, "contains no rows; add some")
    problems.check()
    return found


def measure(service: Service, args: ServiceArguments) -> dict[str, float]:
    """Print coverage, accuracy and recall on the files to measure on, with intervals; return them."""
    lines: list[list] = []
    results: dict[str, float] = {}

    def add(name: str, values: np.ndarray) -> None:
        results[name] = float(values.mean())
        low, high = interval(values)
        lines.append([name, len(values), results[name], low, high])

    if args.test_file:
        rows = questions_of(args.test_file, args)
        answered = service([row["query"] for row in rows])
        kept = np.array([service.action(one) != "hand_over" for one in answered])
        add("in scope, not handed over", kept.astype(float))
        if all(args.intent_column_name in row for row in rows) and answered[0].intent is not None:
            right = np.array(
                [str(one.intent) == str(row[args.intent_column_name]) for one, row in zip(answered, rows, strict=True)]
            )
            add("in scope, intent right", right.astype(float))
            add("in scope, intent right of those kept", right[kept].astype(float))
    if args.out_of_scope_file:
        answered = service([row["query"] for row in questions_of(args.out_of_scope_file, args)])
        add(
            "out of scope, handed over", np.array([service.action(one) == "hand_over" for one in answered], dtype=float)
        )
    if lines:
        print_table([f"coverage {args.coverage:g}", "rows", "share", f"{INSIDE:.0%} from", "to"], lines)
    return results


def check_question(row: Row, args: ServiceArguments) -> Iterator[str]:
    """Yield a message for each error in a row to answer."""
    for name in WRITTEN:
        if name in row:
            yield f'already has "{name}", which would be overwritten; rename that column'
    if not is_text(row.get(args.query_column_name, row.get("text"))):
        yield f'needs "{args.query_column_name}" or "text"; columns here: {", ".join(map(str, row)) or "none"}'


def with_answers(rows: list[Row], service: Service, text: Callable[[Row], str]) -> Iterator[Row]:
    """Yield the rows with the columns `WRITTEN`."""
    for row, one in zip(rows, service([text(row) for row in rows]), strict=True):
        action = service.action(one)
        answer = one.hit.row["text"] if one.hit and action == "answer" else None
        yield row | {"intent": one.intent, "answer": answer, "confidence": round(one.confidence, 4), "action": action}


def main(argv: list[str] | None = None) -> dict[str, float]:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    rows = InputRows(args, partial(check_question, args=args), partial(read_file, readers=READERS, args=args))
    service = Service(args)
    service.calibrate([row["query"] for row in questions_of(args.validation_file, args)], args.coverage)
    tell(f"threshold {service.threshold:.4f} for a coverage of {args.coverage:g}")
    results = measure(service, args)
    predict_file(
        args, lambda some: with_answers(some, service, lambda r: r.get(args.query_column_name, r.get("text"))), rows
    )
    return results


if __name__ == "__main__":
    command_line(main)
