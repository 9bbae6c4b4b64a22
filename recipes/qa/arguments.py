"""Data arguments of question answering."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from common.data.augment import AugmentedDataArguments
from common.errors import InputError

from .scoring import UNITS


@dataclass
class QaDataArguments(AugmentedDataArguments):
    sample: ClassVar[Path | None] = Path(__file__).resolve().parent / "sample"

    question_column_name: str = field(default="question", metadata={"help": "column with the question"})
    context_column_name: str = field(default="context", metadata={"help": "column with the text that holds the answer"})
    answer_column_name: str = field(
        default="answers", metadata={"help": "column with the answers, {text: [...], answer_start: [...]}"}
    )
    fix_answer_offsets: bool = field(
        default=False,
        metadata={"help": "correct a wrong answer_start when the answer occurs exactly once in the context"},
    )
    max_seq_length: int = field(
        default=384, metadata={"help": "tokens per window; a longer text gets several windows", "resume": "fixed"}
    )
    doc_stride: int = field(default=128, metadata={"help": "tokens that neighbouring windows share", "resume": "fixed"})
    max_question_length: int = field(default=64, metadata={"help": "tokens read from a question; the rest is cut"})
    max_answer_length: int = field(default=30, metadata={"help": "maximum tokens of a predicted answer"})
    f1_unit: str = field(
        default="auto", metadata={"help": "unit of F1: word, character (Chinese, Japanese, Thai), or auto (by script)"}
    )

    def columns(self) -> dict[str, str]:
        """Return the recipe's name of each column -> its name in the user's data."""
        names = self.question_column_name, self.context_column_name, self.answer_column_name
        return dict(zip(("question", "context", "answers"), names, strict=True))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.f1_unit not in ("auto", *UNITS):
            raise InputError(f"--f1_unit {self.f1_unit}: must be auto, {' or '.join(UNITS)}")
        if min(self.doc_stride, self.max_question_length, self.max_answer_length) < 1:
            raise InputError("--doc_stride, --max_question_length and --max_answer_length must be at least 1")
        if self.max_question_length + self.doc_stride + 8 > self.max_seq_length:  # 8: special tokens, a short step
            raise InputError(
                f"--max_seq_length {self.max_seq_length}: too short for questions of {self.max_question_length} "
                f"tokens and an overlap of {self.doc_stride}; raise it, or lower --max_question_length or --doc_stride"
            )
