"""Define the model and data arguments of causal language modelling."""

from dataclasses import dataclass, field
from typing import Literal

from common.args import ModelArguments
from common.data.corpus import CorpusArguments
from common.errors import InputError
from common.models.new import ScratchArguments


@dataclass
class ClmModelArguments(ModelArguments):
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "decoder: local folder or hub id; default: a new model"}
    )


@dataclass
class ClmScratchArguments(ScratchArguments):
    vocab_size: int = field(
        default=4000, metadata={"help": "maximum tokens of the new tokenizer, special tokens included"}
    )


@dataclass
class ClmDataArguments(CorpusArguments):
    loss_on: Literal["auto", "all", "completion"] = field(
        default="auto",
        metadata={
            "help": "tokens in the loss: all; completion: completions and answers only; auto: by the columns",
            "resume": "fixed",
        },
    )
    chat_template: Literal["auto", "plain"] = field(
        default="auto",
        metadata={
            "help": "form of dialogues: auto (the tokenizer's template, plain if it has none) or plain",
            "resume": "fixed",
        },
    )
    prompt_column_name: str = field(default="prompt", metadata={"help": "column with the prompt"})
    completion_column_name: str = field(default="completion", metadata={"help": "column with the completion"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming and self.loss_on == "completion":
            raise InputError("--loss_on completion: does not work with --streaming; leave --streaming out")
        if self.forgetting_file:
            if self.loss_on == "completion":
                raise InputError("--forgetting_file: does not work with --loss_on completion; leave one out")
            self.check_path("forgetting_file", self.forgetting_file)
