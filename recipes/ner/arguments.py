"""Data arguments of named entity recognition."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from common.data.augment import AugmentedDataArguments
from common.data.pool import PoolArguments
from common.errors import InputError

from .brat import is_brat
from .conll import Columns
from .schemes import Name

#: default names of the columns of words and tags
WORDS, TAGS = "tokens", "ner_tags"


@dataclass
class NerDataArguments(PoolArguments, AugmentedDataArguments):
    sample: ClassVar[Path | None] = Path(__file__).resolve().parent / "sample"
    augmentations = ("synonym", "eda", "mention", "contextual")

    text_column_name: str = field(
        default=WORDS, metadata={"help": "column with the list of words, or with the text of rows with spans"}
    )
    label_column_name: str = field(
        default=TAGS, metadata={"help": "column with the list of tags, one per word, or with the spans of a text"}
    )
    sentence_column_name: str | None = field(
        default=None, metadata={"help": "column that numbers the sentences of a table with one word a row"}
    )
    label_names: list[str] | None = field(
        default=None, metadata={"help": "names of tags that are numbers from 0, such as O,B-PER,I-PER"}
    )
    tag_scheme: Name = field(
        default="auto",
        metadata={
            "help": "scheme of the tags, converted to IOB2; none: each tag is of one word, such as a part of speech"
        },
    )
    conll_word_column: str | None = field(
        default=None, metadata={"help": "column of the word in CoNLL files: number from 1, or name in .conllu files"}
    )
    conll_tag_column: str | None = field(
        default=None, metadata={"help": "column of the tag: number from 1, or name such as upos; default: the last"}
    )
    max_seq_length: int = field(
        default=256, metadata={"help": "tokens per window; a longer text gets several windows", "resume": "fixed"}
    )
    doc_stride: int | None = field(
        default=None,
        metadata={
            "help": "tokens that neighbouring windows share; default: a quarter of a window",
            "resume": "fixed",
        },
    )
    repair_bio: bool = field(
        default=False, metadata={"help": "read an I-X that does not continue an X entity as B-X (for IOB1 files)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        Columns(self.conll_word_column, self.conll_tag_column)  # checks the values
        if self.label_names is not None:
            self.label_names = [name.strip() for names in self.label_names for name in names.split(",")]
        if self.doc_stride is None:
            self.doc_stride = self.max_seq_length // 4
        if not 0 <= self.doc_stride <= self.max_seq_length // 2:
            raise InputError(
                f"--doc_stride {self.doc_stride}: must be between 0 and half of --max_seq_length "
                f"{self.max_seq_length}; give at most {self.max_seq_length // 2}"
            )

    def columns(self) -> dict[str, str]:
        """Return the recipe's name of each column -> its name in the user's data."""
        return {"tokens": self.text_column_name, "ner_tags": self.label_column_name}

    def check_path(self, name: str, path: str) -> None:
        """Raise `InputError` unless `path` is a file or a folder of brat."""
        if not Path(path).is_dir():
            super().check_path(name, path)
        elif not is_brat(path):
            raise InputError(f"--{name} {path}: is a folder without .ann files of brat; name a file")
