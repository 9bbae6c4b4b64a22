"""Promise: running out of memory stops the run with a remedy, or halves the batch under `--auto_find_batch_size`.

The smaller batches make the same optimizer steps. (The stock Trainer continues with half-trained weights.)
"""

import math
import random
import time

import numpy as np
import torch
from accelerate.utils import release_memory
from torch import Tensor
from transformers.trainer_utils import TrainOutput

from common.errors import tell
from common.hardware import is_out_of_memory, out_of_memory
from common.training.order import SeededOrder
from common.training.resume import early_stopping
from common.training.saving import WholeCheckpoints
from common.tuning.tune import is_gradual


class BatchThatFits(WholeCheckpoints, SeededOrder):
    """Train again from the last checkpoint or the start after running out of memory, if the user allows it."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """Train as the parent does; raise `RunStopped` if memory runs out."""
        assert not isinstance(resume_from_checkpoint, bool)  # `ExactResume.train` passes the folder
        shrinks, self.args.auto_find_batch_size = self.args.auto_find_batch_size, False
        if shrinks:
            weights = {name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()}
            states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
        while True:
            self._forget_steps()
            self.resumed_from = resume_from_checkpoint
            try:
                return super().train(resume_from_checkpoint, *args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                batch = self.args.per_device_train_batch_size
                if not shrinks or batch == 1:
                    raise out_of_memory(self._where(batch), error) from None
            # outside of `except` the traceback no longer holds the tensors of the failed step
            self._halve(batch)
            resume_from_checkpoint = self.last_whole
            if resume_from_checkpoint is None:
                self._begin_again(weights, states)
            tell(
                f"out of memory with {batch} rows at a time: takes {self.args.per_device_train_batch_size}, and "
                f"{self.args.gradient_accumulation_steps} batches a step; starts again from "
                f"{resume_from_checkpoint or 'the initial weights'}"
            )

    def _forget_steps(self) -> None:
        """Forget the steps of an earlier attempt."""
        self._seen_step, self._save_at_end, self.step_losses = -1, False, []
        self.forget_losses()
        self._saved_at, self._unsaved_best = time.monotonic(), None
        # an evaluation before training marks the model as prepared; accelerate would then not wrap it, and each of
        # several processes would train alone
        if self.args.world_size > 1 and getattr(self.model, "_is_accelerate_prepared", False):
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            vars(self.model)["_is_accelerate_prepared"] = False
            self.accelerator._models.clear()

    def _where(self, batch: int) -> str:
        rows_or_tokens, remedy = smaller(batch, self.args.world_size, getattr(self.args, "max_tokens_per_batch", 0))
        return f"in step {self.state.global_step + 1} with {rows_or_tokens} at a time; {remedy}"

    def _halve(self, batch: int) -> None:
        args = self.args
        args.per_device_train_batch_size = math.ceil(batch / 2)
        args.gradient_accumulation_steps = math.ceil(self.step_rows / args.per_device_train_batch_size)
        self._train_batch_size = args.train_batch_size
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        self.model.zero_grad()
        if is_gradual(self.tuned):  # the new optimizer must hold weights that are unfrozen later
            self.model.requires_grad_(True)
        release_memory()

    def _begin_again(self, weights: dict[str, Tensor], states: tuple) -> None:
        self.model.load_state_dict(weights)
        for callback in early_stopping(self):
            callback.early_stopping_patience_counter = 0
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


def smaller(rows: int, processes: int, tokens: int) -> tuple[str, str]:
    """Return the size of a batch in words, and the arguments that make it smaller.

    Args:
        rows: rows of the batch.
        processes: number of processes; several cannot agree on a smaller batch by themselves.
        tokens: budget of tokens of the batch; 0 without one.
    """
    halved = "give half the --{} and twice the --gradient_accumulation_steps"
    if tokens:
        return f"up to {tokens} tokens", halved.format("max_tokens_per_batch")
    if rows == 1:
        return "1 row", "take a smaller model"
    alone = "give --auto_find_batch_size true"
    return f"{rows} rows", alone if processes == 1 else halved.format("per_device_train_batch_size")
