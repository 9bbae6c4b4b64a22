"""Promise: a checkpoint is whole or absent, and two checkpoints are `--save_min_seconds` apart or more.

`check_saving` saves once before training: what cannot be saved is reported before the hours of training.

`common.training.checkpoints` writes and checks the files.
"""

import os
import shutil
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.trainer import TRAINING_ARGS_NAME

from common.errors import InputError, in_main_process, one_line
from common.models.structure import transformer_of
from common.training import checkpoints
from common.training.regularisation import Regularised
from common.tuning.adapters import is_adapter
from common.tuning.peft_methods import allocation, is_adalora
from common.tuning.tune import BASE, is_beside, is_gradual

#: a model up to this size is saved in full before training; it takes about a second
SCRATCH_BYTES = 2**28


class WholeCheckpoints(Regularised):
    """Write checkpoints to a staging folder and publish whole ones; raise `RunStopped` if the disk is full."""

    #: the newest whole checkpoint of this run, or the one that it resumed from
    last_whole: str | None = None
    _saved_step = -1
    _saved_at = 0.0
    #: weights of the best step, if its checkpoint was skipped
    _unsaved_best: dict[str, Tensor] | None = None

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """Return whether this step is the best so far: a better score, or the same score with a lower `eval_loss`."""
        # upstream: sets `best_metric` and `best_global_step`; `log_history` has the evaluations, this one included
        if super()._determine_best_metric(metrics, trial):
            return True
        name, best = self.args.metric_for_best_model, self.state.best_global_step
        losses = [e["eval_loss"] for e in self.state.log_history if e["step"] == best and "eval_loss" in e]
        if name is None or not losses or metrics[f"eval_{name.removeprefix('eval_')}"] != self.state.best_metric:
            return False
        if not metrics.get("eval_loss", float("inf")) < losses[-1]:
            return False
        self.state.best_global_step = self.state.global_step
        return True

    def _get_output_dir(self, trial=None) -> str:
        """Return the folder in which the parent writes and removes checkpoints."""
        # upstream: `_save_checkpoint` writes below it, `_finalize_training` removes checkpoints below it
        return str(Path(super()._get_output_dir(trial), checkpoints.STAGING))

    def save_now(self) -> None:
        """Save a checkpoint of the current step, unless it exists."""
        if self._saved_step != self.state.global_step:
            self._save_checkpoint(self.model_wrapped, None)

    def save_beside(self, folder: Path) -> None:
        """Save additional state of a subclass into `folder`, on every process; the base class has none."""

    def _save_checkpoint(self, model, trial) -> None:
        # upstream: writes all files of a checkpoint below `_get_output_dir`, by `save_model` and `torch.save`
        if self._may_wait():
            if self.state.best_global_step == self.state.global_step:
                with self.averaged():
                    self._unsaved_best = self.trained_weights()
            return
        folder = self.args.folder
        staged = folder / checkpoints.STAGING / f"checkpoint-{self.state.global_step}"
        torch.serialization.set_crc32_options(False)  # slower and weaker than SHA-256 in the manifest
        try:
            with self.averaged() as unaveraged, checkpoints.clear_disk_errors(folder, self._checkpoint_bytes):
                super()._save_checkpoint(model, trial)
                self.save_beside(staged)
                self.accelerator.wait_for_everyone()
                self._publish(staged, folder, unaveraged)
        finally:
            torch.serialization.set_crc32_options(True)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = {folder / staged.name, *([Path(best)] if best else [])}
            checkpoints.rotate(folder, self.args.save_total_limit, keep)
        self.accelerator.wait_for_everyone()
        self.last_whole, self._saved_step = str(folder / staged.name), self.state.global_step
        self._saved_at, self._unsaved_best = time.monotonic(), None

    def _publish(self, staged: Path, folder: Path, unaveraged: dict[str, Tensor]) -> None:
        if self.state.best_global_step == self.state.global_step:
            self._unsaved_best = None
            self.state.best_model_checkpoint = str(folder / staged.name)
        elif self._unsaved_best is not None:
            self.state.best_model_checkpoint = str(folder / staged.name)
        if self.args.should_save:
            if self._unsaved_best is not None:
                save_file(self._unsaved_best, staged / checkpoints.BEST)
            if unaveraged:
                save_file(unaveraged, staged / checkpoints.UNAVERAGED)
            self.state.save_to_json(str(staged / checkpoints.STATE))
            order = self.args.train_sampling_strategy
            checkpoints.publish(staged, folder, processes=self.args.world_size, order=order)

    def _may_wait(self) -> bool:
        """Return whether to skip the checkpoint of an epoch, because the last one is younger than `--save_min_seconds`.

        The next checkpoint holds the weights of a skipped best epoch. The checkpoint of the last step and a checkpoint
        after a signal are never skipped. No checkpoint is skipped if no process has all the weights.
        """
        by_epoch = self.args.save_strategy == "epoch" or self.args.few_rows
        if not by_epoch or self.stop_asked or self.control.should_training_stop:
            return False
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        soon = torch.tensor(
            int(time.monotonic() - self._saved_at < self.args.save_min_seconds), device=self.args.device
        )
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(soon, src=0)  # all processes use the clock of rank 0
        return bool(soon)

    def check_saving(self) -> None:
        """Save the model into a scratch folder below the output folder, as after training, and remove it again.

        Weights of more than `SCRATCH_BYTES` are not written; only their shared memory is checked.

        Raises:
            InputError: the model cannot be saved, or the disk has too little room for the model and a checkpoint.
        """
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # no process has all the weights
            in_main_process(self._try_saving)

    def _try_saving(self) -> None:
        folder, model = self.args.folder, self.model
        folder.mkdir(parents=True, exist_ok=True)
        size = sum(weight.nbytes for weight in model.parameters())
        trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
        checkpoint = (trained if is_beside(model) else size) + 2 * trained  # with the two moments of AdamW
        needed = size + (checkpoint if self.args.save_strategy != "no" else 0)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise InputError(
                f"--output_dir {folder}: the disk has {free:,} bytes free, and the model with a checkpoint needs about "
                f"{needed:,}; free disk space, or choose another --output_dir"
            )
        scratch = folder / checkpoints.STAGING / "scratch"
        try:
            if size <= SCRATCH_BYTES and not isinstance(model, PeftModel):
                self._save(str(scratch / "model"))
                return
            plain = model.get_base_model() if isinstance(model, PeftModel) else model
            if isinstance(model, PeftModel):
                model.save_pretrained(str(scratch / "adapter"))
            elif isinstance(model, PreTrainedModel):
                remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
            if isinstance(plain, PreTrainedModel):
                plain.config.save_pretrained(scratch)
                if plain.can_generate():
                    plain.generation_config.save_pretrained(scratch)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(scratch)
        except (OSError, ValueError, TypeError, RuntimeError, AttributeError, SafetensorError) as error:
            name = getattr(transformer_of(model), "name_or_path", "") or type(model).__name__
            raise InputError(
                f"{name}: cannot be saved after training: {one_line(error)}; correct the files of the checkpoint, or "
                "choose another --model_name_or_path"
            ) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            if not any(scratch.parent.iterdir()):
                scratch.parent.rmdir()

    def changing_weights(self) -> dict[str, Tensor]:
        """Return the tensors that training changes: trained parameters, those still frozen, and buffers."""
        model = self.accelerator.unwrap_model(self.model)
        kept = model.state_dict().keys()
        buffers = {k: v for k, v in model.named_buffers() if k in kept}
        every = is_gradual(self.tuned)
        # PiSSA subtracts the principal components from frozen weights; other machines round differently
        changed = is_beside(model) and self.tuned.tuning.method == "pissa"
        return {
            k: v for k, v in model.named_parameters() if v.requires_grad or every or (changed and ".base_layer." in k)
        } | buffers

    def trained_weights(self) -> dict[str, Tensor]:
        """Return copies of `changing_weights` in main memory."""
        return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in self.changing_weights().items()}

    def _checkpoint_bytes(self) -> int:
        """Return the approximate size of a checkpoint on the disk, in bytes."""
        state = [t for values in self.optimizer.state.values() for t in values.values()] if self.optimizer else []
        return sum(t.nbytes for t in [*self.model.state_dict().values(), *state] if isinstance(t, Tensor))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # upstream: `save_model` calls it, under FSDP and DeepSpeed with the gathered state; writes model and tokenizer
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PreTrainedModel | PeftModel):
            state = model.state_dict() if state_dict is None else state_dict
            first = {
                value.data_ptr(): name for name, value in reversed(state.items())
            }  # safetensors: one name a memory
            state_dict = {n: v for n, v in state.items() if not v.numel() or first[v.data_ptr()] == n}
            if is_beside(model):  # as `merge` lets a model of transformers save itself
                state_dict = {n: v for n, v in state_dict.items() if not is_adapter(n)}
                folder = Path(output_dir or self.args.folder)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)
                output_dir = str(folder / BASE)
        elif Path(output_dir or "").parent.name == checkpoints.STAGING and isinstance(model, PreTrainedModel):
            # resume needs the names of `state_dict`; `save_pretrained` renames those of some models, such as Mixtral
            vars(model)["save_pretrained"] = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            vars(model).pop("save_pretrained", None)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the parent does, readable by all users and without a pickle.

        A checkpoint of a model with separate trained parameters (LoRA, adapters, prompts) holds these parameters only.
        """
        folder = Path(output_dir or self.args.folder)
        if folder.parent.name == checkpoints.STAGING and is_beside(self.model):
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                ranks = allocation(self.model) if is_adalora(self.model) else {}
                save_file(self.trained_weights() | ranks, folder / checkpoints.TRAINED)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)
            return
        with checkpoints.clear_disk_errors(self.args.folder, self._checkpoint_bytes):
            super().save_model(str(folder), _internal_call=True)
        if self.args.should_save:
            # a pickle; run.json holds the arguments. FSDP with sharded states does not write it
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            umask = os.umask(0)
            os.umask(umask)
            for file in folder.rglob("*.safetensors"):
                file.chmod(0o666 & ~umask)  # safetensors leaves mode 0600
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
