"""Summarize a file of documents with a model that `train` saved, whichever method it is of.

    make predict RECIPE=summarization MODEL=outputs/summarization INPUT=articles.jsonl OUTPUT=summaries.jsonl
    python -m recipes.summarization.predict --model outputs/summarization --input t.txt --output t.jsonl

The input is JSON Lines (or .json, .csv, .parquet) with the model's document column, or `document`, `dialogue` or
`text`: a text, or a list of turns; or a .txt file with a document a line. The output has the same rows in the same
order, each with `predicted`, `score` and `windows`: how many parts a document too long for the model was read in.

- extractive: sentences are scored in windows that share some context; `sentences` are the numbers of those taken, from
  0, and `score` the mean probability that these are part of a summary. `--summary_sentences 3` takes three.
- abstractive: each window of whole sentences is summarized, and, as long as they do not fit into one window, so are the
  summaries, one after the other (`--long join` leaves them as they are). `ended` is false where an output was cut off
  at the greatest length, and `score` is the mean log-probability of the sub-tokens written last. `--num_beams`,
  `--length_penalty` and `--n_best` are as in `recipes/translation`.

Memory does not grow with the file.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import AutoModelForTokenClassification

from common.cli import command_line, parse
from common.data.files import Row, check_file
from common.data.language_codes import Direction, set_direction
from common.data.sentences import pieces
from common.errors import InputError
from common.inference.generation import Generator, SearchArguments
from common.inference.predictor import Predictor, predict_file
from common.models.load import load_config, resolve_model

from .articles import as_text, units
from .extractive import best_sentences, document_scores, encode_windows, sentence_logits
from .scoring import extract

WRITTEN = ("predicted", "score", "windows", "sentences", "ended", "n_best")
COLUMNS = ("document", "dialogue", "text")


@dataclass
class SummarizationPredictArguments(SearchArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder that train saved"},
    )
    summary_sentences: int | None = field(
        default=None, metadata={"help": "sentences of an extractive summary; as in training when not given"}
    )
    long: Literal["again", "join"] = field(
        default="again", metadata={"help": "summaries of the windows of a long document: summarized again, or joined"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.summary_sentences is not None and self.summary_sentences < 1:
            raise InputError("--summary_sentences must be at least 1")


ARGUMENTS = (SummarizationPredictArguments,)


class Extractor(Predictor):
    """A saved extractive model. `sentences` takes the place of the number it was saved with."""

    def __init__(self, model: str, batch_tokens: int = 4096, precision: str = "auto", sentences: int | None = None):
        super().__init__(AutoModelForTokenClassification, "ForTokenClassification", model, batch_tokens, precision)
        self.sentences = sentences or self.config.summarization["sentences"]
        self.max_length = self.config.max_source_length

    def __call__(self, documents: list[str]) -> list[Row]:
        """For each text `predicted`, `score`, `sentences` and `windows`."""
        parts = [units(text) for text in documents]
        rows = {"parts": parts, "oracle": [[]] * len(parts)}
        windows = encode_windows(rows, list(range(len(parts))), self.tokenizer, self.max_length)
        found: list[np.ndarray] = [np.zeros(0)] * len(windows["row"])
        for batch, logits in self.logits({"input_ids": windows["input_ids"]}):
            for i, of_window in zip(batch, logits, strict=True):
                labels = logits.new_tensor(windows["labels"][i], dtype=torch.long).view(1, -1, 3)
                found[i] = sentence_logits(of_window[None], labels)[0].cpu().numpy()
        scores = document_scores(found, windows, list(map(len, parts)))
        counts = Counter(windows["row"])
        results = []
        for row, (text, of_document) in enumerate(zip(documents, scores, strict=True)):
            picked = best_sentences(of_document, self.sentences)
            sure = 1 / (1 + np.exp(-of_document[picked])) if picked else np.zeros(1)
            results.append({
                "predicted": extract(text, picked),
                "score": round(float(sure.mean()), 4),
                "sentences": picked,
                "windows": counts[row],
            })  # fmt: skip
        return results


class Writer(Generator):
    """A saved abstractive model. `long` says what becomes of the summaries of a long document's windows."""

    def __init__(self, model: str, *args, long: str = "again", **kwargs):
        config = load_config(resolve_model(model))
        told = config.summarization
        super().__init__(model, *args, prefix=told["prefix"], **kwargs)
        code = told["source_code"]
        set_direction(self.tokenizer, self.model, Direction("", "", code, code))
        self.long = long

    def __call__(self, documents: list[str], n_best: int = 1) -> list[list[Row]]:
        """For each text its best summaries, the best first: `predicted`, `score`, `windows` and `ended`.

        Of a text in several windows the second best is that of its last summary, or with `long="join"` of each window.
        Summaries that are no shorter than what they summarize are joined as well.
        """
        self.check_n_best(n_best)
        texts = list(documents)
        cut = {i: self._windows(text) for i, text in enumerate(texts)}
        sizes, ended = [len(cut[i]) for i in range(len(texts))], [True] * len(texts)
        stuck: set[int] = set()
        while self.long == "again" and (long := [i for i, parts in cut.items() if len(parts) > 1 and i not in stuck]):
            found = iter(self.best([part for i in long for part in cut[i]]))
            for i in long:
                outputs = [next(found)[0] for _ in cut[i]]
                shorter = " ".join(text for text, *_ in outputs)
                if len(shorter) >= len(texts[i]):  # a model that makes nothing shorter would never end
                    stuck.add(i)
                    continue
                ended[i] &= all(e for *_, e in outputs)
                texts[i], cut[i] = shorter, self._windows(shorter)
        found = iter(self.best([part for i in cut for part in cut[i]], n_best))
        results = []
        for i, parts in cut.items():
            own = [next(found) for _ in parts]
            results.append([])
            for rank in range(n_best):
                best = [of_window[rank] for of_window in own]
                total, tokens = sum(t for _, t, *_ in best), sum(n for *_, n, _ in best)
                results[-1].append({
                    "predicted": " ".join(text for text, *_ in best),
                    "score": round(total / max(1, tokens), 4),
                    "windows": sizes[i],
                    "ended": ended[i] and all(e for *_, e in best),
                })  # fmt: skip
        return results

    def _windows(self, text: str) -> list[str]:
        """`text`, or where that is too long as many whole sentences at a time as fit, without the blanks between."""
        if self.fits(text):
            return [text]
        windows: list[str] = []
        between = ""
        for piece, after in pieces(text, self.fits):
            if windows and self.fits(windows[-1] + between + piece):
                windows[-1] += between + piece
            else:
                windows.append(piece)
            between = after
        return windows


def load(model: str, **kwargs) -> Extractor | Writer:
    """The model in folder `model`, ready to summarize; `kwargs` as `Extractor` or `Writer` takes them.

    Of a list of texts an `Extractor` gives a row for each, and a `Writer` the list of its best.
    """
    told = getattr(load_config(resolve_model(model)), "summarization", None)
    if not isinstance(told, dict):
        raise InputError(f"--model {model}: is no summarizer; name a folder that recipes.summarization.train saved")
    return (Extractor if told["method"] == "extractive" else Writer)(model, **kwargs)


def document_of(row: Row, column: str) -> str | None:
    """The document of an input row as a text; None where it has none."""
    return next((as_text(row[name]) for name in (column, *COLUMNS) if name in row), None)


def check_row(row: Row, column: str) -> Iterator[str]:
    """A sentence for each thing that is wrong with an input row."""
    for name in WRITTEN:
        if name in row:
            yield f'has "{name}" already, which would be lost; rename that column'
    if document_of(row, column) is None:
        names = dict.fromkeys((column, *COLUMNS))
        yield f"needs a text or turns in one of: {', '.join(names)}; columns here: {', '.join(map(str, row)) or 'none'}"


def with_summaries(rows: list[Row], model: Extractor | Writer, column: str, n_best: int = 0) -> Iterator[Row]:
    """The rows, each with its summary, and `n_best` of them where asked for."""
    documents = [document_of(row, column) for row in rows]
    if isinstance(model, Extractor):
        yield from (row | found for row, found in zip(rows, model(documents), strict=True))
        return
    for row, options in zip(rows, model(documents, max(1, n_best)), strict=True):
        yield row | options[0] | ({"n_best": options} if n_best else {})


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    told = getattr(load_config(resolve_model(args.model)), "summarization", None) or {}
    own = {"batch_tokens": args.batch_tokens, "precision": args.precision}
    if told.get("method") == "extractive":
        if args.n_best or args.num_beams is not None or args.length_penalty is not None or args.long == "join":
            raise InputError(
                "--n_best, --num_beams, --length_penalty and --long: the model picks sentences, and writes nothing"
            )
        model = load(args.model, **own, sentences=args.summary_sentences)
    else:
        if args.summary_sentences is not None:
            raise InputError("--summary_sentences: the model writes, and does not pick sentences")
        model = load(args.model, **own, beams=args.num_beams, length_penalty=args.length_penalty, long=args.long)
        model.check_n_best(args.n_best)
    column = told["document_column_name"]
    check_file(args.input, lambda row: check_row(row, column), args.max_chars)
    return predict_file(args, lambda rows: with_summaries(rows, model, column, args.n_best))


if __name__ == "__main__":
    command_line(main)
