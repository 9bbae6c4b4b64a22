"""Choose the pretrained model, and where a new head starts."""

from dataclasses import dataclass, field
from typing import Literal

from common.errors import InputError

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass
class ModelArguments:
    """Choose the pretrained model, its attention kernel and its attention dropout."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        default=DEFAULT_ENCODER,
        metadata={
            "help": "local folder or hub id; the embedded default needs no network",
            "resume": "fixed",
        },
    )
    after: str | None = field(
        default=None,
        metadata={
            "help": "trained model to start from, instead of --model_name_or_path; see --keep",
            "resume": "fixed",
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the hub"})
    attn_implementation: str = field(
        default="auto",
        metadata={"help": "attention kernel: auto (fastest measured on this hardware), sdpa, eager, ..."},
    )
    attention_dropout: float | None = field(
        default=None, metadata={"help": "attention dropout instead of the checkpoint's; 0 is faster on a CPU"}
    )
    allow_special_tokens: bool = field(
        default=False,
        metadata={
            "help": "special tokens in texts, such as </s>, act as special tokens; false: they are plain text",
            "resume": "fixed",
        },
    )

    def __post_init__(self) -> None:
        if self.after is None:
            return
        default = type(self).__dataclass_fields__["model_name_or_path"].default
        if self.model_name_or_path not in (default, self.after):
            raise InputError("--after and --model_name_or_path: both name the model to start from; give one of them")
        self.model_name_or_path = self.after


@dataclass
class HeadArguments(ModelArguments):
    """Choose the pretrained model, and where a new head starts."""

    head_init: Literal["probe", "random"] = field(
        default="probe",
        metadata={
            "help": "weights of a new head: probe (logistic regression on the frozen encoder), random",
            "resume": "fixed",
        },
    )


@dataclass
class ClassifierArguments(HeadArguments):
    """Choose the pretrained model, what the head of a classifier of texts reads, and where it starts."""

    pooling: Literal["auto", "mean", "first"] = field(
        default="auto",
        metadata={
            "help": "what the head reads: mean of all tokens, first token; auto: as the encoder was trained",
            "resume": "fixed",
        },
    )
