"""Read unlabelled rows that a recipe trains on beside its labelled rows."""

import atexit
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datasets import Dataset, DatasetDict
from datasets.arrow_writer import ArrowWriter

from common.args import LabeledDataArguments
from common.data.files import FileReader, too_long
from common.data.samples import sample
from common.data.source import Row
from common.data.tables import MissingColumn
from common.errors import InputError, Problems, check_file_exists, tell, warn

#: name of the split of unlabelled rows
POOL = "pool"
#: arguments that act only with `--semi`, and the methods that use them
USED_BY = {
    "semi_rounds": ("pseudo", "noisy_student"),
    "semi_noise": ("fixmatch", "noisy_student"),
    "semi_threshold": ("pseudo", "fixmatch", "noisy_student"),
    "semi_weight": ("pseudo", "fixmatch", "noisy_student"),
    "max_unlabeled_samples": ("pseudo", "fixmatch", "noisy_student"),
}


@dataclass
class PoolArguments(LabeledDataArguments):
    """Choose unlabelled rows, and how they are used in training; see `common.training.semi`."""

    unlabeled_file: list[str] | None = field(
        default=None, metadata={"help": "files of rows without labels for --semi, in the formats of predict"}
    )
    semi: Literal["pseudo", "fixmatch", "noisy_student"] | None = field(
        default=None,
        metadata={
            "help": "learn from --unlabeled_file: pseudo (classes that a first model predicts), fixmatch (classes that "
            "the model in training predicts), noisy_student (probabilities of a first model, in rounds)",
            "resume": "fixed",
        },
    )
    max_unlabeled_samples: int | None = field(
        default=None, metadata={"help": "use only N random unlabelled rows; every --seed has the same rows"}
    )
    semi_rounds: int | None = field(
        default=None,
        metadata={
            "help": "training runs after that of the first model; default: pseudo 1, noisy_student 2",
            "resume": "fixed",
        },
    )
    semi_threshold: float | None = field(
        default=None,
        metadata={
            "help": "minimum probability of a predicted class; default: chosen on the validation rows",
            "resume": "fixed",
        },
    )
    semi_weight: float | None = field(
        default=None,
        metadata={
            "help": "weight of unlabelled rows in the loss; default: chosen on the validation rows",
            "resume": "fixed",
        },
    )
    semi_noise: float | None = field(
        default=None, metadata={"help": "share of masked tokens, for fixmatch and noisy_student; default: 0.15"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.semi is None:
            if self.unlabeled_file:
                raise InputError("--unlabeled_file: has no effect without --semi; add --semi pseudo")
            for name in USED_BY:
                if getattr(self, name) is not None:
                    raise InputError(f"--{name}: needs --semi and --unlabeled_file; add them, or leave it out")
            return
        if not self.unlabeled_file:
            raise InputError(f"--semi {self.semi}: needs rows without labels; add --unlabeled_file")
        for path in self.unlabeled_file:
            check_file_exists("unlabeled_file", path)
        for name, methods in USED_BY.items():
            if getattr(self, name) is not None and self.semi not in methods:
                raise InputError(f"--{name}: has no effect with --semi {self.semi}; leave it out")
        if self.semi_rounds is None:
            self.semi_rounds = 2 if self.semi == "noisy_student" else 1
        if self.semi_noise is None:
            self.semi_noise = 0.0 if self.semi == "pseudo" else 0.15
        for name in ("semi_rounds", "max_unlabeled_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("semi_threshold", "semi_noise"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 0 and below 1")
        if self.semi_weight is not None and not self.semi_weight > 0:
            raise InputError(f"--semi_weight {self.semi_weight}: must be above 0")

    def files(self) -> dict[str, str]:
        """Return argument -> file for the files of the run."""
        several = self.unlabeled_file or []
        names = [f"unlabeled_file{f'_{number}' * (len(several) > 1)}" for number in range(1, len(several) + 1)]
        return super().files() | dict(zip(names, several, strict=True))


def key_of(*texts: str | None) -> str:
    """Return what two equal rows have in common: their texts without white space and case."""
    return "\t".join("".join(text.split()).casefold() for text in texts if text is not None)


def read_pool(
    args: PoolArguments,
    read: FileReader,
    convert: Callable[[Row], Row | str],
    check: Callable[[Row], Iterable[str]],
    key: Callable[[Row], str],
    data: DatasetDict,
) -> Dataset:
    """Read `--unlabeled_file` in memory that does not grow with the files, and check each row.

    Rows that equal a row of `data` are dropped: a training row has its label already, and training on the text of a
    validation or test row would raise the scores. Their number is printed for each split.

    Args:
        args: names the files.
        read: reads a file as rows with their places.
        convert: returns a row in the columns of the recipe, with a placeholder for its label; or its problem.
        check: yields the problems of a converted row.
        key: returns the `key_of` of a converted row.
        data: the labelled rows. The result has the columns of the training rows.

    Raises:
        InputError: a file cannot be read or has no rows, up to ten problems of rows, or no row is left.
    """
    known = {key(row): split for split, rows in reversed(data.items()) for row in rows}
    found, problems, count = Counter[str](), Problems(args.skip_bad_rows), 0
    folder = Path(tempfile.mkdtemp(prefix="unlabeled-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    columns = data["train"].features
    with ArrowWriter(path=str(folder / "rows.arrow"), features=columns) as writer:
        for path in args.unlabeled_file or []:
            before = count
            for where, item in read(path):
                count += 1
                row = convert(item) if isinstance(item, dict) else item
                if isinstance(row, str):
                    of_header = isinstance(row, MissingColumn) and isinstance(item, dict) and row.place(item, where)
                    problems.reject(of_header or where, [row])
                elif messages := [*check(row), *too_long(row, args.max_chars)]:
                    problems.reject(where, messages)
                elif split := known.get(key(row)):
                    found[split] += 1
                else:
                    writer.write({name: row.get(name) for name in columns} | {"id": str(count)})
            if count == before:
                problems.add(path, "contains no rows; add some")
        problems.check()
        kept = writer.finalize()[0]
    if found["train"]:
        tell(f"--unlabeled_file: dropped {found['train']:,} rows that equal a training row")
    for split in data.keys() & found.keys() - {"train"}:
        warn(f"--unlabeled_file: dropped {found[split]:,} rows that equal a {split} row; its score would be too high")
    if not kept:
        raise InputError(f"--unlabeled_file: all {count:,} rows are dropped; give texts that have no label yet")
    rows = Dataset.from_file(str(folder / "rows.arrow"))
    if args.max_unlabeled_samples is not None and args.max_unlabeled_samples < kept:
        rows = rows.select(sample([None] * kept, args.max_unlabeled_samples))
    tell(f"--unlabeled_file: {len(rows):,} of {count:,} rows are used")
    return rows
