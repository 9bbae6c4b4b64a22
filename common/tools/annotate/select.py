"""Write the rows of a pool to label next."""

import importlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from types import ModuleType

from tqdm import tqdm

from common.cli import parse, training_module
from common.data.files import fresh_file
from common.data.source import Row
from common.errors import InputError, tell
from common.tools.annotate.arguments import AnnotateArguments
from common.tools.annotate.pool import Chosen, Seen, Selection

#: column with the place of a row in the order, and how unsure the model is
COLUMN = "annotate"


def module_of(recipe: str) -> ModuleType:
    """Return the module `annotate` of a recipe.

    Raises:
        InputError: there is no such recipe, or it has no such module.
    """
    package = training_module(recipe).rpartition(".")[0]
    name = f"{package}.annotate"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        known = "recipes that have the file annotate.py"
        raise InputError(f"{recipe}: cannot choose rows to label; annotate works with {known}") from None


def main(argv: list[str], about: str) -> list[Chosen]:
    """Choose rows by the arguments `argv`, of which the first is the recipe, and write them."""
    if argv[:1] in ([], ["--help"]):
        print(about)
        return []
    module = module_of(argv[0])
    (args,) = parse(module.ARGUMENTS, argv[1:], about)
    pool = module.open_pool(args)
    annotator = module.Annotator(args.model, **args.settings())
    annotator.check_format(args.format)
    labeled = Seen()
    for path in args.labeled or []:
        for text in annotator.labeled_texts(path, args):
            labeled.add(text)
    selection = Selection(args.strategy, args.n, args.seed, args.candidates, args.buffer_rows, args.relabel)
    with tqdm(unit=" rows") as bar:
        chosen = selection.choose(_counted(pool, bar), annotator, labeled)
    _check_some(args, selection.counts)
    rows = [annotator.written(one.row, one.guess, args.format, _place(i, one)) for i, one in enumerate(chosen, 1)]
    lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
    with fresh_file(args.output or "", args.overwrite) as file:
        file.write("[\n" + ",\n".join(lines) + "\n]\n" if args.format == "label_studio" else "\n".join([*lines, ""]))
    if args.format == "label_studio":
        with fresh_file(args.interface, args.overwrite) as file:
            file.write(annotator.interface())
    _report(args, selection, len(chosen))
    return chosen


def _counted(rows: Iterable[Row], bar: tqdm) -> Iterator[Row]:
    for row in rows:
        yield row
        bar.update()


def _place(rank: int, chosen: Chosen) -> Row:
    guess = chosen.guess
    return {COLUMN: {"rank": rank, "margin": round(guess.margin, 4), "entropy": round(guess.entropy, 4)}}


def _check_some(args: AnnotateArguments, counts: Counter[str]) -> None:
    """Raise `InputError` if no row of the pool can be chosen."""
    if not counts["rows"]:
        raise InputError(f"--input {args.input}: contains no rows; add some")
    if counts["rows"] == counts["have a label"]:
        raise InputError(
            f"--input {args.input}: each of the {counts['rows']:,} rows has a label; name rows without labels, or add "
            "--relabel true to choose among rows with labels (with make: ARGS=)"
        )
    if not counts["candidates"]:
        raise InputError(f"--input {args.input}: no row is left to label: {_left_out(counts)}; add rows to the pool")


def _left_out(counts: Counter[str]) -> str:
    reasons = ("have a label", "equal a labelled row", "repeat another row")
    return ", ".join(f"{counts[reason]:,} {reason}" for reason in reasons if counts[reason])


def _report(args: AnnotateArguments, selection: Selection, chosen: int) -> None:
    """Print how many rows were chosen among how many, and what to do next."""
    counts = selection.counts
    if out := _left_out(counts):
        tell(f"{args.input}: of {counts['rows']:,} rows are left out: {out}")
    if args.strategy in ("diverse", "badge") and counts["candidates"] < counts["fresh"]:
        which = "drawn at random" if args.strategy == "diverse" else "with the smallest margin"
        tell(f"{args.strategy} chooses among {counts['candidates']:,} of {counts['fresh']:,} rows, {which}")
    if chosen < args.n:
        tell(f"--n {args.n}: the pool has only {chosen:,} rows to label; all of them are written")
    tell(f"{chosen:,} row{'s' * (chosen != 1)} written to {args.output}, in the order of {args.strategy}")
    if args.format == "label_studio":
        tell(f"{args.interface}: the labelling interface of the project in Label Studio")
