"""Data arguments of relation classification."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from common.args import LabeledDataArguments
from common.errors import InputError

#: labels that stand for "no relation" under `--no_relation_label auto`, in the order of the search
NO_RELATION = ("no_relation", "Other", "NA")


@dataclass
class RelationDataArguments(LabeledDataArguments):
    sample: ClassVar[Path | None] = Path(__file__).resolve().parent / "sample"

    text_column_name: str = field(
        default="text", metadata={"help": "column with the text; a row without it may have its words in `tokens`"}
    )
    head_column_name: str = field(
        default="head", metadata={"help": "column with the first mention, such as {start, end, type}"}
    )
    tail_column_name: str = field(default="tail", metadata={"help": "column with the second mention"})
    label_column_name: str = field(default="label", metadata={"help": "column with the relation of head to tail"})
    no_relation_label: str = field(
        default="auto",
        metadata={
            "help": "label of pairs without a relation, left out of the F1; none: no such label; auto: "
            + ", ".join(NO_RELATION)
            + ", whichever the labels have"
        },
    )
    other_pairs: bool = field(
        default=True,
        metadata={"help": "for files of entities and relations: also make rows of pairs without a relation"},
    )
    max_distance: int = field(
        default=30,
        metadata={"help": "maximum words between the mentions of a pair, under --other_pairs and in predict"},
    )
    typed_markers: bool = field(
        default=True, metadata={"help": "mark a mention with its type, if it has one", "resume": "fixed"}
    )
    pooling: Literal["markers", "first"] = field(
        default="markers",
        metadata={
            "help": "states that the head reads: at the two start markers, or of the first token",
            "resume": "fixed",
        },
    )
    max_seq_length: int = field(
        default=128,
        metadata={
            "help": "tokens of a row; longer texts are cut around the mentions",
            "resume": "fixed",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_distance < 0:
            raise InputError(f"--max_distance {self.max_distance}: must be at least 0")
