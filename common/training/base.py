"""Declare the state that the parts of the trainer share."""

from typing import Any

import transformers
from torch import Tensor, nn

from common.args import TrainingArguments
from common.tuning.tune import TunedModel


class TrainerBase(transformers.Trainer):
    """`transformers.Trainer` with the attributes that `common.training.trainer.Trainer` adds or narrows.

    A part of the trainer inherits from this class, and from the other parts whose methods it calls.
    """

    args: TrainingArguments
    model: nn.Module
    tuned: TunedModel
    #: a data set, several by name, or a stream
    train_dataset: Any
    eval_dataset: Any
    #: the checkpoint that the run resumed from
    resumed_from: str | None = None
    #: losses of the batches of the step so far
    step_losses: list[Tensor]
    #: the signal that the processes agreed on; 0 for none
    stop_asked = 0
