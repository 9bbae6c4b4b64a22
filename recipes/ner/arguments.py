"""Data arguments of named entity recognition."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from common.args import DataArguments
from common.errors import InputError


@dataclass
class NerDataArguments(DataArguments):
    sample: ClassVar[Path | None] = Path(__file__).resolve().parent / "sample"

    text_column_name: str = field(default="tokens", metadata={"help": "column with the list of words"})
    label_column_name: str = field(
        default="ner_tags", metadata={"help": "column with the list of BIO tags, one per word"}
    )
    max_seq_length: int = field(
        default=256, metadata={"help": "tokens per window; a longer text gets several windows", "resume": "fixed"}
    )
    doc_stride: int | None = field(
        default=None,
        metadata={
            "help": "tokens that neighbouring windows share; a quarter of a window if not given",
            "resume": "fixed",
        },
    )
    repair_bio: bool = field(
        default=False, metadata={"help": "read an I-X that does not continue an X entity as B-X (for IOB1 files)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.doc_stride is None:
            self.doc_stride = self.max_seq_length // 4
        if not 0 <= self.doc_stride <= self.max_seq_length // 2:
            raise InputError(f"--doc_stride {self.doc_stride}: must be between 0 and half of --max_seq_length")
