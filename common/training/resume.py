"""Promise: a killed and resumed run ends with the weights of an uninterrupted run, bit for bit on a CPU."""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from common.errors import InputError, one_line, warn
from common.hardware import is_out_of_memory
from common.training import checkpoints
from common.training.saving import WholeCheckpoints
from common.tuning.peft_methods import is_adalora, restore_allocation


@contextmanager
def reading(checkpoint: str) -> Iterator[None]:
    """Raise `InputError` for a file of `checkpoint` that cannot be loaded; `weights_only` loads reject code."""
    try:
        yield
    except pickle.UnpicklingError as error:
        reason = one_line(error).split(". ")[0][:160]
        raise InputError(
            f"{checkpoint}: a file holds code, not numbers; resume from another checkpoint (nothing was run): {reason}"
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        reason = one_line(error)[:300]
        raise InputError(
            f"{checkpoint}: is damaged or of another model; resume from another checkpoint: {reason}"
        ) from None


def early_stopping(trainer: transformers.Trainer) -> list[EarlyStoppingCallback]:
    """Return the callbacks of `trainer` that stop it early."""
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]


class RestoreState(TrainerCallback):
    """Adapt the restored state to the present folder and arguments before the first step."""

    def __init__(self, trainer: "ExactResume"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        state.num_train_epochs = trainer.epochs
        if trainer.resumed_from is not None:
            # the folder may have moved since; the best checkpoint is in the folder of the resumed one
            best = trainer.saved_state()["best_model_checkpoint"]
            if best and Path(args.output_dir, Path(best).name).is_dir():
                state.best_model_checkpoint = str(Path(args.output_dir, Path(best).name))
            elif best and state.best_model_checkpoint is None:
                state.best_metric = None
                warn(f"{best}: the best checkpoint is missing; only later checkpoints can be chosen as best")
            for stopping in early_stopping(trainer):
                stopping.early_stopping_patience = args.early_stopping_patience
        for callback in (c for c in trainer.callback_handler.callbacks if isinstance(c, ExportableState)):
            state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())


class ExactResume(WholeCheckpoints):
    """Resume from the newest whole checkpoint, or from a given one."""

    #: epochs of the whole run
    epochs = 0

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """Train from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint folder; True for the newest whole one; None to train from the start.
            *args: passed to the parent.
            **kwargs: passed to the parent.

        Raises:
            InputError: the checkpoint cannot be read, or its run took the rows in another order.
            RunStopped: the run ends early.
        """
        if resume_from_checkpoint is True:
            accept = self.args.accept_unverified_checkpoint
            resume_from_checkpoint = str(checkpoints.newest_whole(self.args.folder, accept))
        if self.is_world_process_zero():
            checkpoints.clear_staging(self.args.folder)
        self.last_whole = resume_from_checkpoint or None
        if self.last_whole is not None:
            self._check_order(Path(self.last_whole))
        return super().train(self.last_whole, *args, **kwargs)

    def _check_order(self, checkpoint: Path) -> None:
        """Raise `InputError` if the run took its rows in another order; warn if it cannot resume exactly."""
        then = checkpoints.about(checkpoint)
        order, processes = then.get("order"), then.get("processes")
        if order not in (None, self.args.train_sampling_strategy):
            raise InputError(
                f"{checkpoint}: its run took rows in another order; give --train_sampling_strategy {order}"
            )
        if processes not in (None, self.args.world_size):
            warn(
                f"{checkpoint}: saved by {processes} processes, and this run has {self.args.world_size}; dropout and "
                "other random numbers will differ from the original run"
            )

    def check_steps(self, checkpoint: str) -> None:
        """Raise `InputError` if the run would end before the step of `checkpoint`."""
        steps = super().set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        if steps < (step := checkpoints.saved_step(Path(checkpoint))):
            raise InputError(
                f"--num_train_epochs {self.args.num_train_epochs:g}: are {steps} steps, and {checkpoint} is of step "
                f"{step}; give more epochs"
            )

    def saved_state(self) -> dict:
        """Return the trainer state of the checkpoint that the run resumed from."""
        assert self.resumed_from is not None
        return json.loads(Path(self.resumed_from, checkpoints.STATE).read_text(encoding="utf-8"))

    def set_initial_training_values(self, args, dataloader: DataLoader) -> tuple:
        """Return the values of the parent, with 0 epochs for a run that had ended: the parent would train a step."""
        values = super().set_initial_training_values(args, dataloader)
        self.epochs = values[0]
        return (0 if self._was_over(max_steps=values[-1]) else self.epochs, *values[1:])

    def _was_over(self, max_steps: int) -> bool:
        if self.resumed_from is None:
            return False
        state, patience = self.saved_state(), self.args.early_stopping_patience
        stopping = state["stateful_callbacks"].get(EarlyStoppingCallback.__name__)
        for entry in (stopping if isinstance(stopping, list) else [stopping]) if stopping and patience else []:
            if entry["attributes"]["early_stopping_patience_counter"] >= patience:
                return True
        return state["global_step"] >= max_steps

    # The content of the checkpoint

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        # upstream: called by `train` before the data loader is made, under FSDP once the model is wrapped
        unaveraged = Path(resume_from_checkpoint, checkpoints.UNAVERAGED)
        if unaveraged.is_file() and self.average is None:
            raise InputError(
                f"{resume_from_checkpoint}: its run averages the weights; give its --ema_decay or --swa_start"
            )
        with reading(resume_from_checkpoint):
            if (trained := Path(resume_from_checkpoint, checkpoints.TRAINED)).is_file():
                self._load_trained(trained)
            elif not self._load_whole(Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self.average is not None and unaveraged.is_file():
                self.average.resumed = load_file(unaveraged)

    def _load_best_model(self) -> None:
        # upstream: called at the end of the training, before `on_train_end`
        assert self.state.best_model_checkpoint is not None
        best = Path(self.state.best_model_checkpoint)
        damage = checkpoints.damage(best, self.args.accept_unverified_checkpoint)
        if damage:
            raise InputError(
                f"{best}: cannot load the best checkpoint: {damage}; to use the last one give "
                "--load_best_model_at_end false"
            )
        with reading(str(best)):
            part = next((p for p in (best / checkpoints.BEST, best / checkpoints.TRAINED) if p.is_file()), None)
            if part is not None:
                self._put_back(load_file(part))
            elif not self._load_whole(best):
                super()._load_best_model()
        if self.average:
            self.average.mean = {}  # the weights of the best checkpoint are a mean already

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # upstream: reads optimizer.pt and scheduler.pt by `torch.load(weights_only=True)`
        with reading(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # upstream: reads rng_state*.pth by `torch.load(weights_only=True)`, after the skipped batches
        with reading(str(checkpoint)):
            super()._load_rng_state(checkpoint)

    def _load_trained(self, file: Path) -> None:
        weights = load_file(file)
        if missing := self.changing_weights().keys() - weights.keys():
            raise ValueError(f"{file.name} has no {sorted(missing)[0]}")
        self._put_back(weights)
        if is_adalora(self.model):
            restore_allocation(self.model, {name: value for name, value in weights.items() if ":" in name})

    def _put_back(self, weights: dict[str, Tensor]) -> None:
        current = self.changing_weights()
        with torch.no_grad():
            for name in current.keys() & weights.keys():
                current[name].copy_(weights[name])

    def _load_whole(self, checkpoint: Path) -> bool:
        """Load all weights of the model; return False if only the parent can read the checkpoint."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not (weights := checkpoints.weights(checkpoint)):
            return False
        model = self.accelerator.unwrap_model(self.model)
        current, ignored = model.state_dict(), getattr(model, "_keys_to_ignore_on_save", None) or ()
        # a checkpoint has one name for tied weights, which share their memory
        covered = {current[name].data_ptr() for name in weights if name in current}
        missing = {n for n, value in current.items() if value.data_ptr() not in covered and n not in ignored}
        if different := sorted(missing | (weights.keys() - current.keys())):
            raise ValueError(f"its weights are not those of the model: {different[0]}")
        model.load_state_dict(weights, strict=False)
        return True
