"""Summarize a file of documents with a model that `train` or `train_abstractive` saved.

    make predict RECIPE=summarization MODEL=outputs/summarization INPUT=articles.jsonl OUTPUT=summaries.jsonl
    python -m recipes.summarization.predict --model outputs/summarization --input t.txt --output t.jsonl

The input is JSON Lines, .json, .csv or .parquet with the model's document column, `document`, `dialogue` or `text`; a
document is a text or a list of turns. A .txt file has one document per line. The output has the same rows in the same
order, each with `predicted`, `score` and `windows` (number of windows for a document too long for the model).

- Extractive models score sentences in windows. `sentences` are the numbers of the selected sentences, from 0. `score`
  is the mean probability of these sentences. `--summary_sentences 3` selects three sentences.
- Abstractive models summarize each window of whole sentences. The summaries of several windows are joined and
  summarized again until they fit into one window; `--long join` only joins the summaries. `ended` is false if an output
  was cut off at the maximum length. `score` is the mean log-probability of the last output's tokens. `--num_beams`,
  `--length_penalty` and `--n_best` control the search.

Memory use does not grow with the file.
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
from common.data.columns import Columns
from common.data.language_codes import Direction, set_direction
from common.data.sentences import pieces
from common.data.source import Row
from common.errors import InputError
from common.inference.generation import Generator, SearchArguments
from common.inference.predictor import InputRows, Predictor, predict_file
from common.models.load import load_config, resolve_model

from .articles import as_text, of_cell, units
from .extractive import best_sentences, document_scores, encode_windows, sentence_logits
from .scoring import extract

WRITTEN = ("predicted", "score", "windows", "sentences", "ended", "n_best")
COLUMNS = {"document": ("document", "dialogue", "text")}


@dataclass
class SummarizationPredictArguments(SearchArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder that train saved"},
    )
    summary_sentences: int | None = field(
        default=None, metadata={"help": "sentences of an extractive summary; default: as in training"}
    )
    long: Literal["again", "join"] = field(
        default="again", metadata={"help": "summaries of a long document's windows: summarize again, or join"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.summary_sentences is not None and self.summary_sentences < 1:
            raise InputError("--summary_sentences must be at least 1")


ARGUMENTS = (SummarizationPredictArguments,)


class Extractor(Predictor):
    """Load a saved extractive model; `sentences` overrides the saved number of sentences."""

    def __init__(self, model: str, *args, sentences: int | None = None, **kwargs):
        super().__init__(AutoModelForTokenClassification, "ForTokenClassification", model, *args, **kwargs)
        self.sentences = sentences or self.config.summarization["sentences"]
        self.max_length = self.config.max_source_length

    def __call__(self, documents: list[str]) -> list[Row]:
        """Return one row for each text, with `predicted`, `score`, `sentences` and `windows`."""
        parts = [units(text) for text in documents]
        rows = {"parts": parts, "oracle": [[]] * len(parts)}
        windows = encode_windows(rows, list(range(len(parts))), self.tokenizer, self.max_length)
        window_scores: list[np.ndarray] = [np.zeros(0)] * len(windows["row"])
        for batch, logits in self.logits({"input_ids": windows["input_ids"]}):
            for i, of_window in zip(batch, logits, strict=True):
                labels = logits.new_tensor(windows["labels"][i], dtype=torch.long).view(1, -1, 3)
                window_scores[i] = sentence_logits(of_window[None], labels)[0].cpu().numpy()
        scores = document_scores(window_scores, windows, list(map(len, parts)))
        counts = Counter(windows["row"])
        results = []
        for row, (text, of_document) in enumerate(zip(documents, scores, strict=True)):
            picked = best_sentences(of_document, self.sentences)
            probabilities = 1 / (1 + np.exp(-of_document[picked])) if picked else np.zeros(1)
            results.append({
                "predicted": extract(text, picked),
                "score": round(float(probabilities.mean()), 4),
                "sentences": picked,
                "windows": counts[row],
            })  # fmt: skip
        return results


class Writer(Generator):
    """Load a saved abstractive model; `long` ("again" or "join") handles documents of several windows."""

    def __init__(self, model: str, *args, long: str = "again", **kwargs):
        config = load_config(resolve_model(model))
        settings = config.summarization
        super().__init__(model, *args, prefix=settings["prefix"], **kwargs)
        code = settings["source_code"]
        set_direction(self.tokenizer, self.model, Direction("", "", code, code))
        self.long = long

    def __call__(self, documents: list[str], n_best: int = 1) -> list[list[Row]]:
        """Return the `n_best` summaries of each text, best first: `predicted`, `score`, `windows` and `ended`.

        For a text in several windows, `n_best` applies to the last pass, or with `long="join"` to each window.
        Summaries that are not shorter than their text are joined.
        """
        self.check_n_best(n_best)
        texts = list(documents)
        cut = {i: self._windows(text) for i, text in enumerate(texts)}
        sizes, ended = [len(cut[i]) for i in range(len(texts))], [True] * len(texts)
        stuck: set[int] = set()
        while self.long == "again" and (long := [i for i, parts in cut.items() if len(parts) > 1 and i not in stuck]):
            generated = iter(self.best([part for i in long for part in cut[i]]))
            for i in long:
                outputs = [next(generated)[0] for _ in cut[i]]
                shorter = " ".join(text for text, *_ in outputs)
                if len(shorter) >= len(texts[i]):  # another pass would loop forever
                    stuck.add(i)
                    continue
                ended[i] &= all(e for *_, e in outputs)
                texts[i], cut[i] = shorter, self._windows(shorter)
        generated = iter(self.best([part for i in cut for part in cut[i]], n_best))
        results = []
        for i, parts in cut.items():
            of_windows = [next(generated) for _ in parts]
            results.append([])
            for rank in range(n_best):
                best = [of_window[rank] for of_window in of_windows]
                total, tokens = sum(t for _, t, *_ in best), sum(n for *_, n, _ in best)
                results[-1].append({
                    "predicted": " ".join(text for text, *_ in best),
                    "score": round(total / max(1, tokens), 4),
                    "windows": sizes[i],
                    "ended": ended[i] and all(e for *_, e in best),
                })  # fmt: skip
        return results

    def _windows(self, text: str) -> list[str]:
        """Divide `text` into windows of whole sentences that fit into the model; drop the spaces between windows."""
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
    """Load the model in folder `model`; `kwargs` go to `Extractor` or `Writer`.

    An `Extractor` returns one row for each text, a `Writer` a list of the `n_best` rows.

    Raises:
        InputError: the folder holds no summarization model.
    """
    settings = getattr(load_config(resolve_model(model)), "summarization", None)
    if not isinstance(settings, dict):
        raise InputError(
            f"--model {model}: is no summarization model; use a folder that recipes.summarization.train saved"
        )
    return (Extractor if settings["method"] == "extractive" else Writer)(model, **kwargs)


def check_row(row: Row, columns: Columns) -> Iterator[str]:
    """Yield a message for each problem in an input row."""
    for name in WRITTEN:
        if name in row:
            yield f'has "{name}" already, and predict would overwrite it; rename that column'
    if as_text(of_cell(row, columns.value(row, "document"))) is None:
        yield columns.problem(row, "document", "a string or a list of turns")


def with_summaries(rows: list[Row], model: Extractor | Writer, columns: Columns, n_best: int = 0) -> Iterator[Row]:
    """Yield the rows, each with its summary, and with the `n_best` summaries if `n_best` is above 0."""
    documents = [as_text(of_cell(row, columns.value(row, "document"))) for row in rows]
    if isinstance(model, Extractor):
        yield from (row | summary for row, summary in zip(rows, model(documents), strict=True))
        return
    for row, options in zip(rows, model(documents, max(1, n_best)), strict=True):
        yield row | options[0] | ({"n_best": options} if n_best else {})


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    config = load_config(resolve_model(args.model))
    settings = getattr(config, "summarization", None) or {}
    names = ("batch_tokens", "precision", "speed", "allow_special_tokens")
    options = {name: getattr(args, name) for name in names}
    if settings.get("method") == "extractive":
        if args.n_best or args.num_beams is not None or args.length_penalty is not None or args.long == "join":
            raise InputError(
                "--n_best, --num_beams, --length_penalty and --long: need an abstractive model; leave them out"
            )
        model = load(args.model, **options, sentences=args.summary_sentences)
    else:
        if args.summary_sentences is not None:
            raise InputError("--summary_sentences: needs an extractive model; leave --summary_sentences out")
        search = {"beams": args.num_beams, "length_penalty": args.length_penalty}
        model = load(args.model, **options, **search, long=args.long)
        model.check_n_best(args.n_best)
    columns = Columns(config, **COLUMNS)
    rows = InputRows(args, lambda row: check_row(row, columns))
    return predict_file(args, lambda some: with_summaries(some, model, columns, args.n_best), rows)


if __name__ == "__main__":
    command_line(main)
