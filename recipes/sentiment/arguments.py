"""Data arguments of text classification."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from common.args import DataArguments
from common.errors import InputError


@dataclass
class SentimentDataArguments(DataArguments):
    sample: ClassVar[Path | None] = Path(__file__).resolve().parent / "sample"

    text_column_name: str = field(default="text", metadata={"help": "column with the text"})
    text_pair_column_name: str | None = field(default=None, metadata={"help": "column with a second text"})
    label_column_name: str = field(
        default="label", metadata={"help": "column with the label: text, integer, or a list of labels"}
    )
    max_seq_length: int = field(
        default=128, metadata={"help": "tokens read from a text; the rest is cut", "resume": "fixed"}
    )
    keep: str = field(default="head", metadata={"help": "part read of a longer text: head, tail, head+tail"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep not in ("head", "tail", "head+tail"):
            raise InputError(f"--keep {self.keep}: must be head, tail or head+tail")
