"""Promise: a loss or gradient that is not finite stops the run before the optimizer step, and names the rows."""

import math
from itertools import islice

import torch
from torch import Tensor

from common.errors import RunStopped
from common.training.order import SeededOrder


class FiniteCheck(SeededOrder):
    """Check the losses of all batches of a step, and the norm of its gradient."""

    def _get_grad_norm(self, model, grad_norm=None):
        # upstream: called once a step, with the norm before clipping, before `optimizer.step`
        norm = super()._get_grad_norm(model, grad_norm)
        losses, self.step_losses = torch.stack(self.step_losses), []
        self._stop_unless_finite(losses, norm)
        return norm

    def _stop_unless_finite(self, losses: Tensor, norm: Tensor | float | None) -> None:
        scaled = self.accelerator.scaler is not None  # fp16: the scaler skips a step whose gradient overflows
        if not math.isfinite(losses.sum()) or not (scaled or norm is None or math.isfinite(norm)):
            bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
            name, rows = ("loss", self._numbers_of(bad)) if bad else ("gradient norm", "")
            if not bad and self.args.world_size == 1:  # else the gradient sums the rows of all processes
                rows = self._numbers_of(list(range(len(losses))))
            kept = "checkpoints" if self.is_deepspeed_enabled else "weights and checkpoints"  # DeepSpeed has stepped
            raise RunStopped(
                f"the {name} of step {self.state.global_step + 1} is not a finite number; {rows}the {kept} are those "
                "before this step; give a lower --learning_rate, or --precision fp32",
                code=RunStopped.NOT_FINITE,
            )

    def _numbers_of(self, batches: list[int]) -> str:
        """Return the numbers of the rows of this process in some batches of the current step, as part of a message."""
        if self.train_batches is None:
            return ""
        accumulation = self.args.gradient_accumulation_steps
        first = self.state.global_step % math.ceil(len(self.train_batches) / accumulation) * accumulation
        step = list(islice(self.train_batches, first, first + accumulation))
        rows = sorted(row for i in batches for row in step[i])
        return f"rows of the encoded training data, counted from 0: {', '.join(map(str, rows[:64]))}; "
