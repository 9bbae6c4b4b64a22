"""Train a model for a few steps from the start, without checkpoints."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from common.args import TrainingArguments
from common.errors import InputError

T = TypeVar("T")


def shuffled(items: Iterable[T], random: np.random.Generator) -> Iterator[T]:
    """Yield the items without end, each once before any a second time, in a new order each time."""
    items = list(items)
    while True:
        for place in random.permutation(len(items)).tolist():
            yield items[place]


def train_steps(
    model: nn.Module,
    batches: Iterable[np.ndarray],
    loss_of: Callable[[np.ndarray], Tensor],
    steps: int,
    rate: float,
    args: TrainingArguments,
) -> float:
    """Train all weights of `model` by AdamW, with a warm-up of a tenth of the steps and linear decay.

    The result follows from the arguments: a killed run repeats these steps from the start, and each of several
    processes does all of them.

    Args:
        model: the model.
        batches: row numbers of each batch.
        loss_of: returns the loss of a batch.
        steps: number of steps.
        rate: highest learning rate.
        args: seed, precision, device and largest norm of the gradient.

    Returns:
        The loss of the last step.

    Raises:
        InputError: a loss is no finite number.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    loss = torch.zeros(())
    with torch.random.fork_rng([] if args.device.type == "cpu" else [args.device]):
        torch.manual_seed(args.seed)
        model.train()
        for batch in islice(batches, steps):
            with torch.autocast(args.device.type, torch.bfloat16, enabled=bool(args.bf16)):
                loss = loss_of(batch)
            if not torch.isfinite(loss):
                raise InputError(f"--few_shot_learning_rate {rate:g}: the loss is {loss.item()}; give a lower rate")
            loss.backward()
            if args.max_grad_norm:  # 0: no clipping, as in the Trainer
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return loss.item()
