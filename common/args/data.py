"""Choose the rows of a run, and say how their files are read."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from common.errors import InputError, check_file_exists

SPLITS = ("train", "validation", "test")


def _file(help: str) -> Any:
    """Return an optional field that names an existing file."""
    return field(default=None, metadata={"help": help})


@dataclass
class FileArguments:
    """Say how input files are read, in training and in predict."""

    encoding: str | None = field(
        default=None, metadata={"help": "encoding of text files, such as cp1252, gb18030, utf-16; default: UTF-8"}
    )
    csv_delimiter: str | None = field(
        default=None, metadata={"help": "character between cells, or tab; default: a comma in .csv, a tab in .tsv"}
    )
    csv_quoting: Literal["auto", "csv", "none"] = field(
        default="auto",
        metadata={
            "help": 'csv: "a ""b""" is the cell a "b"; none: quotation marks are text; auto: csv for .csv; for .tsv '
            "as the file shows"
        },
    )
    csv_header: bool = field(default=True, metadata={"help": "line 1 of .csv and .tsv holds the column names"})
    column_names: list[str] | None = field(
        default=None, metadata={"help": "with --csv_header false: names of the columns, such as text,label"}
    )
    sheet: str | None = field(
        default=None, metadata={"help": "sheet of .xlsx, .xls and .ods files; default: the first"}
    )
    skip_bad_rows: int = field(
        default=0, metadata={"help": "drop up to N rows with problems, and print them; 0: reject the file"}
    )
    max_chars: int = field(
        default=1_000_000, metadata={"help": "maximum characters of a row; longer rows are rejected"}
    )

    def __post_init__(self) -> None:
        if self.encoding is not None:
            try:
                b"a".decode(self.encoding, errors="ignore")  # no codec is looked up for empty bytes
            except (LookupError, UnicodeError):
                raise InputError(
                    f"--encoding {self.encoding}: no encoding of text; give utf-8, utf-16, cp1252, gb18030, ..."
                ) from None
        if self.csv_delimiter is not None:
            delimiter = {"\\t": "\t", "tab": "\t"}.get(self.csv_delimiter, self.csv_delimiter)
            if len(delimiter) != 1 or delimiter in '\r\n"':
                raise InputError(f"--csv_delimiter {self.csv_delimiter!r}: must be one character, such as ; or tab")
            self.csv_delimiter = delimiter
        if self.column_names is not None:
            self.column_names = [name.strip() for names in self.column_names for name in names.split(",")]
            if self.csv_header:
                raise InputError("--column_names: names the columns of files without a header; add --csv_header false")
            named = [name for name in self.column_names if name]
            if len(set(named)) < len(named):
                raise InputError(f"--column_names {','.join(self.column_names)}: a name is repeated; rename one column")
        elif not self.csv_header:
            raise InputError("--csv_header false: name the columns by --column_names, such as text,label")
        if self.skip_bad_rows < 0:
            raise InputError(f"--skip_bad_rows {self.skip_bad_rows}: must be at least 0")
        if self.max_chars < 1:
            raise InputError(f"--max_chars {self.max_chars}: must be at least 1")


@dataclass
class DataArguments(FileArguments):
    """Choose the rows. Recipes subclass this to name their columns.

    Attributes:
        sample: folder with `train.*`, `validation.*` and `test.*`, read when the user names no data; None without a
            sample.
    """

    _argument_group_name = "data"
    sample: ClassVar[Path | None] = None

    train_file: str | None = _file("training rows: .jsonl .json .csv .tsv .xlsx .parquet, or a format of the recipe")
    validation_file: str | None = _file("validation rows; default: split off from the training rows")
    test_file: str | None = _file("test rows, evaluated once at the end")
    dataset_name: str | None = field(
        default=None, metadata={"help": "hub data set, or folder saved by datasets, instead of files"}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of the hub data set"})
    validation_split_percentage: int = field(
        default=10, metadata={"help": "percent of the training rows to split off if there are no validation rows"}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "use only N random training rows; every --seed has the same rows"}
    )
    train_rows: str | None = field(
        default=None,
        metadata={"help": "file with the numbers of the training rows to use, one a line, counted from 1"},
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "use only N random validation rows; every --seed has the same rows"}
    )
    max_predict_samples: int | None = field(
        default=None, metadata={"help": "use only N random test rows; every --seed has the same rows"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.has_source():
            if self.validation_file or self.test_file:
                raise InputError("--validation_file and --test_file: no training rows; add --train_file")
            for split, file in self.sample_files().items():
                setattr(self, f"{split}_file", file)
        files = {f"{split}_file": getattr(self, f"{split}_file") for split in SPLITS}
        for name, path in files.items():
            if path is not None:
                self.check_path(name, path)
        if self.dataset_name and any(files.values()):
            raise InputError("--dataset_name and files exclude each other; give one of them")
        if self.train_rows is not None:
            check_file_exists("train_rows", self.train_rows)
        if not 0 < self.validation_split_percentage < 100:
            raise InputError(
                f"--validation_split_percentage {self.validation_split_percentage}: must be between 1 and 99"
            )
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")

    def has_source(self) -> bool:
        """Return whether the user named training data."""
        return bool(self.train_file or self.dataset_name)

    def sample_files(self) -> dict[str, str]:
        """Return split -> file of the sample."""
        if self.sample is None:
            return {}
        return {split: str(file) for split in SPLITS for file in self.sample.glob(f"{split}.*")}

    def check_path(self, name: str, path: str) -> None:
        """Raise `InputError` unless `path`, the value of argument `name`, is a file."""
        check_file_exists(name, path)

    def columns(self) -> dict[str, str]:
        """Return the recipe's name of each column -> its name in the user's data; predict reads the saved names."""
        ending = "_column_name"
        named = {f.name.removesuffix(ending): getattr(self, f.name) for f in fields(self) if f.name.endswith(ending)}
        return {ours: theirs for ours, theirs in named.items() if theirs}

    def predict_arguments(self) -> list[str]:
        """Return arguments that predict needs for a model of this run."""
        return []

    def files(self) -> dict[str, str]:
        """Return argument -> file for the files of the run."""
        named = {f"{split}_file": getattr(self, f"{split}_file") for split in SPLITS}
        return {name: path for name, path in named.items() if path}


@dataclass
class GroupedDataArguments(DataArguments):
    """Choose rows that may have domains, and rows of an earlier task beside them."""

    domain_column: str | None = field(
        default=None,
        metadata={"help": "column with the domain of a row; adds the score of each domain, their mean and the worst"},
    )
    replay_file: str | None = field(
        default=None, metadata={"help": "rows of an earlier task or domain, for --keep replay or ewc"}
    )
    leave_out: str | None = field(
        default=None,
        metadata={"help": "domain to leave out of the training and validation rows; its test rows are scored"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.leave_out is not None and self.domain_column is None:
            raise InputError(f"--leave_out {self.leave_out}: the rows have no domains; add --domain_column")
        if self.replay_file is not None:
            self.check_path("replay_file", self.replay_file)

    def files(self) -> dict[str, str]:
        """Return argument -> file for the files of the run."""
        return super().files() | ({"replay_file": self.replay_file} if self.replay_file else {})


@dataclass
class LabeledDataArguments(GroupedDataArguments):
    """Choose the rows of a task in which each row has a gold value: a label, tags, answers, a target or a summary."""

    drop_unlabeled: bool | None = field(
        default=None,
        metadata={"help": "true: drop and count rows without a gold value; default: such rows are an error"},
    )
