"""Data arguments of text classification."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from common.args import LabeledDataArguments
from common.errors import InputError


@dataclass
class SentimentDataArguments(LabeledDataArguments):
    sample: ClassVar[Path | None] = Path(__file__).resolve().parent / "sample"

    text_column_name: str = field(default="text", metadata={"help": "column with the text"})
    text_pair_column_name: str | None = field(default=None, metadata={"help": "column with a second text"})
    label_column_name: str = field(
        default="label",
        metadata={"help": "column with the label or list of labels; or columns of 0 and 1, such as toxic,insult"},
    )
    label_separator: str | None = field(
        default=None, metadata={"help": "character between several labels in a text, such as | in rude|threat"}
    )
    multi_label: str = field(
        default="auto",
        metadata={"help": "true: a row may have several labels; false: it has one; auto: several if any row has them"},
    )
    max_seq_length: int = field(
        default=128, metadata={"help": "tokens of a row; see --long_texts for longer texts", "resume": "fixed"}
    )
    long_texts: str = field(
        default="truncate",
        metadata={
            "help": "truncate: cut longer texts; windows: read all of them, and average the predictions of the windows",
            "resume": "fixed",
        },
    )
    doc_stride: int | None = field(
        default=None,
        metadata={
            "help": "tokens that neighbouring windows share; a quarter of a window if not given",
            "resume": "fixed",
        },
    )
    keep: str = field(default="head", metadata={"help": "part read of a longer text: head, tail, head+tail"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.multi_label = self.multi_label.lower()
        if self.multi_label not in ("auto", "true", "false"):
            raise InputError(f"--multi_label {self.multi_label}: must be auto, true or false")
        if self.label_separator and (self.multi_label == "false" or "," in self.label_column_name):
            other = "--multi_label false" if self.multi_label == "false" else "several --label_column_name"
            raise InputError(f"--label_separator: contradicts {other}; leave one of them out")
        if self.keep not in ("head", "tail", "head+tail"):
            raise InputError(f"--keep {self.keep}: must be head, tail or head+tail")
        if self.long_texts not in ("truncate", "windows"):
            raise InputError(f"--long_texts {self.long_texts}: must be truncate or windows")
        if self.long_texts == "truncate":
            if self.doc_stride is not None:
                raise InputError(f"--doc_stride {self.doc_stride}: needs --long_texts windows; add it")
        elif self.keep != "head":
            raise InputError(f"--keep {self.keep}: has no effect with --long_texts windows; leave one of them out")
        elif self.doc_stride is None:
            self.doc_stride = self.max_seq_length // 4
        elif not 0 <= self.doc_stride <= self.max_seq_length // 2:
            raise InputError(
                f"--doc_stride {self.doc_stride}: must be between 0 and half of --max_seq_length "
                f"{self.max_seq_length}; give at most {self.max_seq_length // 2}"
            )

    def reading(self) -> dict[str, int | str | None]:
        """Return the arguments of `windows.read`, which the saved configuration keeps for predict."""
        return {name: getattr(self, name) for name in ("max_seq_length", "keep", "long_texts", "doc_stride")}
