"""Search passages with a model saved by `train`; write and change indexes of passages; compare pairs of texts.

    make predict RECIPE=matching MODEL=outputs/matching INPUT=questions.txt OUTPUT=answers.jsonl
    python -m recipes.matching.predict --command index --input passages.jsonl --output outputs/passages
    python -m recipes.matching.predict --index outputs/passages --input questions.txt --output answers.jsonl
    python -m recipes.matching.predict --command add --input new.jsonl --output outputs/passages
    python -m recipes.matching.predict --command delete --input ids.txt --output outputs/passages

`--model` is outputs/matching unless given. `search`, the default, writes the rows with `found`: passages with id, text
and score, best first. It searches the corpus of the training unless `--index` names another index. `index` and `add`
read rows of {"id", "text"}, `delete` reads ids. `compare` writes rows of `text` and `text_pair` with `similarity`.
`mine` writes rows of `query` and `positive` with `negatives`: found passages that are the positive of no row with this
query. Memory use does not grow with the files, but by 8 bytes a row under `mine`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from common.cli import command_line, parse
from common.data import READERS, read_file
from common.data.columns import Columns
from common.data.files import FileReader
from common.data.source import Row
from common.errors import InputError, brief, tell
from common.inference.predictor import InputRows, PredictArguments, predict_file
from common.models import resolve_model
from common.models.load import load_config

from . import index
from .encoder import Embedder
from .index import Index
from .reading import is_text, with_ids
from .reranking import Reranker

#: command -> columns that it writes into the rows
WRITTEN = {"search": ("found",), "compare": ("similarity",), "mine": ("negatives",)}
COLUMNS = {"query": ("query", "text"), "positive": ("positive",), "text": ("text",), "text_pair": ("text_pair",)}
#: command -> columns that it reads
READ = {"search": ("query",), "compare": ("text", "text_pair"), "mine": ("query", "positive")}
Command = Literal["search", "compare", "mine", "index", "add", "delete"]


@dataclass
class MatchingPredictArguments(PredictArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder that train saved, or a hub id of an encoder"},
    )
    command: Command | None = field(
        default=None,
        metadata={"help": "what to do (see above); default: search, or compare for a model of scored pairs"},
    )
    index: str | None = field(
        default=None, metadata={"help": "folder of the index to search; default: that of the training, MODEL/index"}
    )
    index_kind: Literal["exact", "hnsw"] = field(
        default="exact",
        metadata={"help": "exact: compares all passages; hnsw: a graph, faster from 100,000 passages on"},
    )
    passage_column_name: str = field(default="text", metadata={"help": "index, add: column with the passage"})
    keep_columns: list[str] = field(
        default_factory=lambda: ["title", "url"],
        metadata={"help": "index, add: further columns that a search returns, if rows have them"},
    )
    top_k: int = field(default=10, metadata={"help": "passages of a query, or negatives of a row"})
    min_score: float | None = field(default=None, metadata={"help": "search: leave out passages below this score"})
    rerank: str | None = field(
        default=None, metadata={"help": "search: classifier of text pairs that reorders the found passages"}
    )
    rerank_label: str | None = field(
        default=None, metadata={"help": "class of --rerank for passages that answer the query"}
    )
    rerank_candidates: int = field(default=50, metadata={"help": "passages of a query that --rerank reads"})
    max_share: float = field(
        default=0.95,
        metadata={"help": "mine: leave out passages with a score above this share of the positive's score"},
    )
    as_pairs: bool = field(
        default=False,
        metadata={"help": "mine: write rows of text, text_pair and label, to train a classifier of pairs"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top_k", "rerank_candidates"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.rerank_label is not None and self.rerank is None:
            raise InputError("--rerank_label: names a class of a classifier; add --rerank")

    def check_output(self) -> None:
        """Raise `InputError` unless `--output` can be written: a file, or the folder of an index."""
        if self.command == "index":
            index.check_new(self.output or "", self.overwrite)
        elif self.command in ("add", "delete"):
            Index(self.output or "")
        else:
            super().check_output()


ARGUMENTS = (MatchingPredictArguments,)


def check_row(row: Row, columns: Columns, command: str) -> Iterator[str]:
    """Yield a message for each error in an input row of search, compare or mine."""
    for name in WRITTEN[command]:
        if name in row and not (command == "mine" and not row[name]):
            yield f'already has "{name}", which would be overwritten; rename that column'
    for name in READ[command]:
        if not is_text(columns.value(row, name)):
            yield columns.problem(row, name, "a non-blank text")


def check_passage(row: Row, column: str) -> Iterator[str]:
    """Yield a message if a row of a corpus has no passage."""
    if not is_text(row.get(column)):
        here = ", ".join(map(str, row)) or "none"
        yield f"{column} is {brief(row.get(column))}; needed: a non-blank text; columns here: {here}"


def id_of(row: Row) -> str | None:
    """Return the id in a row of `delete`: its `id`, or the line of a text file."""
    value = row.get("id", row.get("text"))
    return None if value is None or value == "" else str(value).strip()


def check_id(row: Row) -> Iterator[str]:
    """Yield a message if a row of `delete` has no id."""
    if not id_of(row):
        yield f'needs "id"; columns here: {", ".join(map(str, row)) or "none"}'


def command_of(args: MatchingPredictArguments) -> str:
    """Return the command: search, or compare for a model of scored pairs, unless one is given."""
    if args.command:
        return args.command
    trained = Columns(load_config(resolve_model(args.model))).trained or set()
    return "compare" if "text_pair" in trained else "search"


def open_index(args: PredictArguments) -> Index:
    """Return the index to search.

    Raises:
        InputError: there is none, or another model wrote it.
    """
    folder = args.index or str(Path(args.model or "", "index"))
    if args.index is None and not Path(folder, index.INDEX).is_file():
        raise InputError(
            f"--model {args.model}: has no index of passages; write one with --command index, name it --index"
        )
    found = Index(folder)
    found.check_model(args.model or "")
    return found


def with_found(
    rows: list[Row], embedder: Embedder, columns: Columns, opened: Index, args: MatchingPredictArguments,
    reranker: Reranker | None,
) -> Iterator[Row]:  # fmt: skip
    """Yield the rows with `found`."""
    queries = [columns.value(row, "query") for row in rows]
    candidates = max(args.rerank_candidates, args.top_k) if reranker else args.top_k
    hits = opened.search(embedder.queries(queries), candidates)
    if reranker:
        hits = reranker.reorder(queries, hits, args.top_k)
    for row, of_query in zip(rows, hits, strict=True):
        kept = [hit for hit in of_query if args.min_score is None or hit.score >= args.min_score]
        yield row | {"found": [hit.row | {"score": round(hit.score, 4)} for hit in kept]}


def with_similarity(rows: list[Row], embedder: Embedder, columns: Columns) -> Iterator[Row]:
    """Yield the rows with the cosine of their texts in `similarity`."""
    one, other = (embedder([columns.value(row, name) for row in rows]) for name in ("text", "text_pair"))
    for row, similarity in zip(rows, np.einsum("ij,ij->i", one, other).tolist(), strict=True):
        yield row | {"similarity": round(similarity, 4)}


def with_negatives(
    rows: list[Row], embedder: Embedder, columns: Columns, opened: Index, args: MatchingPredictArguments,
    known: np.ndarray,
) -> Iterator[Row]:  # fmt: skip
    """Yield the rows with found passages that are no positive of the query, or a row for each pair under `--as_pairs`.

    A passage that is nearly as near to the query as the positive probably answers it too, and is left out (Moreira et
    al. 2024, https://arxiv.org/abs/2407.15831, TopK-PercPos).
    """
    queries, positives = ([columns.value(row, name) for row in rows] for name in ("query", "positive"))
    vectors = embedder.queries(queries)
    nearness = np.einsum("ij,ij->i", vectors, embedder.passages(positives))
    for row, query, positive, near, hits in zip(
        rows, queries, positives, nearness, opened.search(vectors, 4 * args.top_k), strict=True
    ):
        pairs = pair_hashes([query] * len(hits), [hit.row["text"] for hit in hits])
        answers = known[np.searchsorted(known, pairs).clip(max=len(known) - 1)] == pairs
        most = args.max_share * float(near)
        others = [hit.row["text"] for hit, a in zip(hits, answers, strict=True) if not a and hit.score <= most]
        found = others[: args.top_k]
        if args.as_pairs:
            texts = [(positive, "yes"), *((text, "no") for text in found)]
            yield from ({"text": query, "text_pair": text, "label": name} for text, name in texts)
        else:
            yield row | {"negatives": found}


def pair_hashes(queries: list[str], passages: list[str]) -> np.ndarray:
    """Return 64 bits of a hash of each query with its passage."""
    return index.hashes([f"{query}\0{passage}" for query, passage in zip(queries, passages, strict=True)])


def known_pairs(rows: Iterable[Row], columns: Columns) -> np.ndarray:
    """Return the hashes of all queries with their positives: 8 bytes a row."""
    remaining, found = iter(rows), [np.empty(0, dtype=np.uint64)]
    while some := list(islice(remaining, index.PART_ROWS)):
        found.append(pair_hashes(*([columns.value(row, name) for row in some] for name in ("query", "positive"))))
    return np.unique(np.concatenate(found))


def change_index(args: MatchingPredictArguments, command: str, read: FileReader) -> int:
    """Write an index, add passages to it, or delete some; return their number."""
    folder, column = args.output or "", args.passage_column_name
    if command == "delete":
        ids = [id_of(row) or "" for row in InputRows(args, check_id, read)]
        count = Index(folder).delete(ids)
        tell(f"{count:,} passages deleted from {folder}")
        return count
    opened = Index(folder) if command == "add" else None
    if opened is not None:
        opened.check_model(args.model or "")
    before = cache(opened.highest_number) if opened is not None else lambda: 0
    rows = InputRows(args, lambda row: check_passage(row, column), lambda path: with_ids(read(path), before))
    embedder = Embedder(args.model, **args.settings())
    if opened is not None:
        count = opened.add(rows, embedder, column, args.keep_columns)
    else:
        count = len(index.create(folder, rows, embedder, args.index_kind, column, args.keep_columns))
    tell(f"{count:,} passages {'added to' if command == 'add' else 'written to'} {folder}")
    return count


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    read = partial(read_file, readers=READERS, args=args)
    command = command_of(args)
    if command not in READ:
        return change_index(args, command, read)
    columns = Columns(load_config(resolve_model(args.model)), **COLUMNS)
    opened = open_index(args) if command != "compare" else None
    rows = InputRows(args, lambda row: check_row(row, columns, command), read)
    known = known_pairs(rows if command == "mine" else (), columns)
    embedder = Embedder(args.model, **args.settings())
    reranker = Reranker(args.rerank, args.rerank_label, **args.settings()) if args.rerank else None

    def predicted(some: list[Row]) -> Iterable[Row]:
        if command == "compare":
            return with_similarity(some, embedder, columns)
        if command == "mine":
            return with_negatives(some, embedder, columns, opened, args, known)
        return with_found(some, embedder, columns, opened, args, reranker)

    return predict_file(args, predicted, rows)


if __name__ == "__main__":
    command_line(main)
