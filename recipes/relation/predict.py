"""Classify pairs of mentions, or find the relations in raw texts, with a model saved by `train`.

    make predict RECIPE=relation MODEL=outputs/relation INPUT=pairs.jsonl OUTPUT=relations.jsonl
    make predict RECIPE=relation INPUT=texts.txt OUTPUT=triples.jsonl ARGS="--ner_model outputs/ner --graph graph.png"
    python -m recipes.relation.predict --model outputs/relation --input pairs.jsonl --output relations.jsonl

The output has the same rows in the same order.

- Rows with two mentions, in any format of `train`, get `predicted` and `probability`.
- Other rows, {"text": ...} or lines of a .txt file, get `triples`, a list of {head, relation, tail, probability}: all
  pairs of mentions of a sentence that have a relation. `--ner_model` finds the mentions, or the row has them as
  `entities`. Pairs have at most `--max_distance` words between them, and types that had a relation in training.
  `--graph FILE.png` draws the most probable triples.

Memory use does not grow with the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from common.cli import command_line, parse
from common.data.columns import Columns
from common.data.files import check_output
from common.data.source import Row
from common.errors import InputError, tell, warn
from common.inference.predictor import DomainPredictArguments, InputRows, PredictArguments, Predictor, predict_file
from common.models.load import load_config, resolve_model

from .extraction import MentionFinder, pairs_of
from .formats import Names
from .graph import Graph
from .markers import Markers, encode_pairs, pair_logits
from .mentions import MENTIONS, Mention, Pair, Unusable, read_mention, read_pair, read_text
from .reading import plain_row, read_rows
from .scoring import predictions

WRITTEN = ("predicted", "probability", "triples")
COLUMNS = {"text": ("text", "tokens"), "head": ("head",), "tail": ("tail",)}


@dataclass
class RelationPredictArguments(DomainPredictArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}", metadata={"help": "folder that train saved"}
    )
    ner_model: str | None = field(
        default=None, metadata={"help": "folder or hub id of a token classifier that finds the mentions in raw texts"}
    )
    max_distance: int | None = field(
        default=None, metadata={"help": "maximum words between the mentions of a pair; default: as in training"}
    )
    min_probability: float = field(default=0.0, metadata={"help": "leave out triples with a lower probability"})
    graph: str | None = field(
        default=None, metadata={"help": "picture of the most probable triples, such as graph.png"}
    )
    all_probabilities: bool = field(default=False, metadata={"help": "write the probability of each relation"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_distance is not None and self.max_distance < 0:
            raise InputError(f"--max_distance {self.max_distance}: must be at least 0")
        if not 0 <= self.min_probability <= 1:
            raise InputError(f"--min_probability {self.min_probability}: must be between 0 and 1")
        if self.graph is not None:
            if Path(self.graph).suffix.lower() not in (".png", ".svg", ".pdf"):
                raise InputError(f"--graph {self.graph}: is a picture; choose a name that ends in .png, .svg or .pdf")
            check_output(self.graph, self.overwrite)


ARGUMENTS = (RelationPredictArguments,)


class Classifier(Predictor):
    """Classify pairs of mentions with a saved model. `batch_tokens` limits the tokens of a batch, padding included."""

    def __init__(self, model: str, *args: Any, **kwargs: Any):
        settings = getattr(load_config(resolve_model(model)), "relation", None)
        if not isinstance(settings, dict):
            raise InputError(
                f"--model {model}: is no model of relations; name a folder that recipes.relation.train saved"
            )
        self.at_markers = settings["pooling"] == "markers"
        auto_class = AutoModelForTokenClassification if self.at_markers else AutoModelForSequenceClassification
        super().__init__(auto_class, auto_class.__name__.removeprefix("AutoModel"), model, *args, **kwargs)
        self.names, self.no_relation = settings["relations"], settings["no_relation"]
        self.markers, self.types = Markers(settings["types"]), settings["pairs"]
        self.max_distance = settings["max_distance"]
        self.columns = Columns(self.config, **COLUMNS)

    def probabilities(self, pairs: list[Pair]) -> np.ndarray:
        """Return the probability of each relation for each pair, (pairs, relations)."""
        rows = {"text": [pair.text for pair in pairs]}
        rows |= {name: [getattr(pair, name).in_row(pair.text) for pair in pairs] for name in MENTIONS}
        columns = encode_pairs(rows, self.tokenizer, self.markers, self.max_length)
        found = np.zeros((len(pairs), len(self.names)))
        for batch, logits in self.logits(columns):
            if self.at_markers:
                at = logits.new_tensor([columns["at"][i] for i in batch]).long()
                logits = pair_logits(logits, at)
            found[batch] = logits.softmax(-1).cpu().numpy()
        return found

    def __call__(self, rows: list[Row], every: bool = False) -> list[Row]:
        """Return rows with two mentions with `predicted` and `probability`; with `every` that of each relation."""
        pairs = [read_pair(*(self.columns.value(row, name) for name in ("text", *MENTIONS))) for row in rows]
        return list(predictions(rows, self.probabilities(pairs), self.names, every)) if rows else []


def mentions_of(row: Row, columns: Columns) -> list[Row] | None:
    """Return the entities of a row, with characters of its text and types; None for a row without entities.

    Raises:
        Unusable: an entity is wrong.
    """
    if not isinstance(row.get("entities"), list):
        return None
    text, tokens = read_text(columns.value(row, "text"))
    found = [read_mention(f"entity {number}", cell, text, tokens) for number, cell in enumerate(row["entities"], 1)]
    return [mention.in_row(text) for mention in found]


def check_row(row: Row, columns: Columns, finds: bool) -> Iterator[str]:
    """Yield a message for each problem of an input row; `finds` says whether a model finds the mentions of texts."""
    for name in WRITTEN:
        if name in row:
            yield f'has "{name}" already, and predict would overwrite it; rename that column'
    given = [name for name in MENTIONS if columns.value(row, name) is not None]
    text = columns.value(row, "text")
    if not isinstance(text, str | list):
        yield columns.problem(row, "text", "a text or a list of tokens")
        return
    try:
        if len(given) == 2:
            read_pair(*(columns.value(row, name) for name in ("text", *MENTIONS)))
        elif given:
            yield f"has {given[0]} and no {'tail' if given == ['head'] else 'head'}; mark both mentions, or none"
        elif mentions_of(row, columns) is None:
            if not finds:
                yield "has no head and tail; for raw texts give --ner_model, such as --ner_model outputs/ner"
            elif text:
                read_text(text) if isinstance(text, list) or text.strip() else None
    except Unusable as error:
        yield str(error)


class Extractor:
    """Add relations to rows: to marked pairs by `classifier`, to raw texts with mentions of `finder` too."""

    def __init__(self, classifier: Classifier, finder: MentionFinder | None, args: RelationPredictArguments):
        self.classifier, self.finder, self.args = classifier, finder, args
        self.graph, self.texts, self.untyped = Graph(), 0, 0
        self.distance = classifier.max_distance if args.max_distance is None else args.max_distance

    def __call__(self, rows: list[Row]) -> Iterator[Row]:
        """Yield the rows with their predictions."""
        columns = self.classifier.columns
        marked = [all(columns.value(row, name) is not None for name in MENTIONS) for row in rows]
        pairs = iter(self.classifier([r for r, m in zip(rows, marked, strict=True) if m], self.args.all_probabilities))
        triples = iter(self.triples([r for r, m in zip(rows, marked, strict=True) if not m]))
        for row, is_pair in zip(rows, marked, strict=True):
            if is_pair:
                yield next(pairs)
                continue
            found = next(triples)
            self.texts += 1
            self.graph.add(found)
            yield row | {"triples": found}

    def triples(self, rows: list[Row]) -> list[list[Row]]:
        """Return the triples of each row of a text."""
        columns = self.classifier.columns
        values = [columns.value(row, "text") or "" for row in rows]
        texts = [value if isinstance(value, str) else " ".join(value) for value in values]
        mentions = [mentions_of(row, columns) for row in rows]
        if self.finder is not None:
            asked = [i for i, found in enumerate(mentions) if found is None]
            for i, found in zip(asked, self.finder([texts[i] for i in asked]), strict=True):
                mentions[i] = found
        if self.classifier.types and not any(None in types for types in self.classifier.types):
            self.untyped += sum(mention["type"] is None for found in mentions for mention in found or [])
        candidates = [
            (i, *pair)
            for i, (text, found) in enumerate(zip(texts, mentions, strict=True))
            for pair in pairs_of(text, found or [], self.classifier.types, self.distance)
        ]
        results: list[list[Row]] = [[] for _ in rows]
        if not candidates:
            return results
        asked_pairs = [
            Pair(texts[i][start:end], *(Mention(m["start"] - start, m["end"] - start, m["type"]) for m in (head, tail)))
            for i, head, tail, (start, end) in candidates
        ]
        for (i, head, tail, _), probs in zip(candidates, self.classifier.probabilities(asked_pairs), strict=True):
            name, probability = self.classifier.names[int(probs.argmax())], round(float(probs.max()), 4)
            if name != self.classifier.no_relation and probability >= self.args.min_probability:
                results[i].append({"head": head, "relation": name, "tail": tail, "probability": probability})
        return results


def check_types(classifier: Classifier, finder: MentionFinder) -> None:
    """Raise `InputError` if the mentions of `finder` have none of the types that have relations."""
    labels = set(finder.labels.values())
    found = {label.partition("-")[2] if label[:2] in ("B-", "I-") else label for label in labels} - {"O"}
    needed = {kind for types in classifier.types for kind in types}
    if needed and not needed & found:
        raise InputError(
            f"--ner_model: finds {', '.join(sorted(found))}, but relations are between {', '.join(sorted(needed))}; "
            "train both on the same types of entities"
        )


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    columns = Columns(load_config(resolve_model(args.model)), **COLUMNS)
    names = Names(*(columns.names[name][0] for name in COLUMNS), "label")

    def read(path: str) -> Iterator[tuple[str, Row | str]]:
        for where, row in read_rows(path, args, names, predicting=True):
            yield where, row if isinstance(row, str) else plain_row(row, names)

    rows = InputRows(args, lambda row: check_row(row, columns, args.ner_model is not None), read)
    classifier = Classifier(args.model, **args.settings())
    finder = MentionFinder(args.ner_model, **PredictArguments.settings(args)) if args.ner_model else None
    if finder is not None:
        check_types(classifier, finder)
    extractor = Extractor(classifier, finder, args)
    count = predict_file(args, extractor, rows)
    if extractor.texts:
        tell(f"{extractor.graph.seen:,} triples in {extractor.texts:,} texts")
    if extractor.untyped:
        warn(
            f"{extractor.untyped:,} entities have no type, and the relations of the model are between types: none is "
            "tried for them; give each entity a type"
        )
    if args.graph:
        drawn = extractor.graph.draw(args.graph)
        tell(f"{args.graph}: the {drawn} most probable triples")
    return count


if __name__ == "__main__":
    command_line(main)
