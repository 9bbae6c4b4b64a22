"""The Trainer of transformers with the promises its users take for granted. No fork: hooks and a sampler.

- Loss: an optimizer step's loss is the mean over all its labels, however they are spread over accumulated batches and
  processes. (The stock Trainer multiplies gradient and loss by the number of accumulated batches, or of processes, for
  most heads: https://github.com/huggingface/transformers/issues/47688.) `eval_loss` is the mean over all labels too.
- Order: seed and epoch alone decide which rows an optimizer step takes. `evaluate` and `predict` sort rows by length,
  but give predictions and labels back in data set order, as a list of one array a row.
- Memory: `preprocess_logits_for_metrics` reduces the logits of each batch on the device, and rows of different length
  are never padded together.
- Counting: on several processes each row is evaluated once.
- Resume: a run that was killed and resumed ends with the weights of one that was not, bit for bit on a CPU.
- Checkpoints: whole or absent (`common.training.checkpoints`), and no more often than is cheap (`--save_min_seconds`). SIGTERM
  and SIGINT save one and exit with 143 and 130.
- Regularisation that the arguments ask for (`common.training.regularisation`), under all of these promises: where the weights
  are averaged, it is their mean that is evaluated and saved.
- Failure: a loss or gradient that is not finite, a lost process, a full disk and exhausted memory stop the run with a
  sentence (`common.training.interrupts`), and leave the last whole checkpoint as it is.
"""

import json
import math
import os
import pickle
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, reduce
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import release_memory
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, EvalPrediction, ProgressCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import nested_concat
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import ModelOutput

from common.args import TrainingArguments
from common.data.workers import ignore_group_signals
from common.errors import InputError, RunStopped, one_line, tell, warn
from common.hardware import is_out_of_memory, out_of_memory, reraise_out_of_memory
from common.speed import apply
from common.training import checkpoints
from common.training.interrupts import HOW_TO_GO_ON, StopSignals, reraise_lost_ranks
from common.training.order import LengthSortedSampler, TrainingBatches, in_dataset_order, row_lengths, row_parts
from common.training.regularisation import (
    Adversary,
    Mixout,
    PullToPretrained,
    WeightAverage,
    divergence,
    pretrained_parameters,
    repeat_batch,
)
from common.tuning.peft_methods import allocation, is_adalora, orthogonality, restore_allocation
from common.tuning.tune import TunedModel, callbacks, is_beside, is_gradual, layer_rates

#: sub-tokens that a CPU evaluates at a time
EVALUATED_TOGETHER = 4096
#: values of a configuration: shares of layers that a step leaves out
LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def label_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each label; 0 where the label is -100.

    `logits` has shape (rows, ..., classes) and `labels` (rows, ...); the result has the shape of `labels`.
    """
    flat = F.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return flat.view(labels.shape)


@runtime_checkable
class EpochSeeded(Protocol):
    """A collator that draws at random: what it draws must follow from its seed, the epoch and the row alone.

    The trainer names the epoch before its first batch. Drawn from the global random state, the masks of a resumed run
    would be others than those of the run that was not stopped.
    """

    def set_epoch(self, epoch: int) -> None: ...


@contextmanager
def reading(checkpoint: str) -> Iterator[None]:
    """Turn what the loaders raise over a file of `checkpoint` into a sentence; `weights_only` loads refuse code."""
    try:
        yield
    except pickle.UnpicklingError as error:
        reason = one_line(error).split(". ")[0][:160]
        raise InputError(f"{checkpoint}: one of its files holds code, not numbers, and was not run: {reason}") from None
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        reason = one_line(error)[:300]
        raise InputError(f"{checkpoint}: cannot be read, damaged or of another model: {reason}") from None


class Progress(ProgressCallback):
    """The progress bar of transformers with the losses and the deciding score only, not every metric."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        best = args.metric_for_best_model or "loss"
        shown = {"loss", "grad_norm", "learning_rate", "eval_loss", f"eval_{best.removeprefix('eval_')}", "epoch"}
        super().on_log(args, state, control, logs={k: v for k, v in logs.items() if k in shown}, **kwargs)


class Trainer(transformers.Trainer):
    """`transformers.Trainer` for models with classes over labels, with the promises of this module.

    Takes what its parent takes, with three differences. `compute_metrics(prediction, dataset)` also gets the data set
    that was evaluated, with all its columns; `prediction.predictions` and `.label_ids` are lists of one array a row, in
    the order of that data set. `preprocess_logits_for_metrics(logits, labels)` runs on the device, batch by batch.
    `losses(logits, labels, label_smoothing)` gives the loss of each label, in the shape of `labels`.
    """

    def __init__(
        self,
        model: TunedModel | nn.Module,
        args: TrainingArguments,
        *,
        compute_metrics: Callable[[EvalPrediction, Dataset], dict[str, float]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        losses: Callable[[Tensor, Tensor, float], Tensor] = label_losses,
        **kwargs,
    ):
        self.tuned = model if isinstance(model, TunedModel) else TunedModel(model, kwargs.get("processing_class"))
        self.speed = apply(self.tuned, args)
        if isinstance(model, TunedModel):
            kwargs.setdefault("processing_class", model.tokenizer)
        super().__init__(self.tuned.model, args, compute_metrics=self._metrics, compute_loss_func=self._loss, **kwargs)
        self.args.eval_do_concat_batches = False  # lists of batches: joining them pads all rows to the longest
        if self.args.train_sampling_strategy == "auto":
            self.args.train_sampling_strategy = "random" if self.speed.without_padding else "group_by_length"
        self._user_metrics = compute_metrics
        self._reduce = preprocess_logits_for_metrics
        self._losses_of = losses
        self._step_rows = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self._saving, self._saved_step, self._last_whole = False, -1, None
        self._asked = 0
        self._operations: int | None = None  # of a sub-token
        if self.pop_callback(ProgressCallback):
            self.add_callback(Progress)
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        for callback in callbacks(self.tuned):
            self.add_callback(callback)
        if self.args.label_names is None:
            self.label_names = ["labels"]  # which the signature of a wrapped model does not show
        self._regularise()

    def _regularise(self) -> None:
        """Make ready what the arguments turn on, while the weights are those that the run begins with."""
        args, seed = self.args, self.args.seed
        self._pull = self._mixout = self._adversary = self._average = None
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        for name in ("l2_sp", "mixout", "adversarial", "ema_decay", "swa_start"):
            if sharded and getattr(args, name) not in (None, 0.0):
                raise InputError(
                    f"--{name}: not where FSDP or DeepSpeed shards the weights; launch with multi_gpu.yaml"
                )
        if args.l2_sp:
            self._pull = PullToPretrained(pretrained_parameters(self.model, self.tuned.pretrained, "l2_sp"), args.l2_sp)
        if args.mixout:
            self._mixout = Mixout(
                self.model, pretrained_parameters(self.model, self.tuned.pretrained, "mixout"), args.mixout, seed
            )
        if args.adversarial:
            freelb = args.adversarial_steps, args.adversarial_step_size
            self._adversary = Adversary(self.model, args.adversarial_epsilon, *freelb, seed)
        if args.ema_decay is not None or args.swa_start is not None:
            self._average = WeightAverage(args.ema_decay, args.swa_start)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        return [name for name in names if self._pull is None or name not in self._pull.pairs]

    def _build_accelerator_args(self, **kwargs) -> dict:
        drops = any(getattr(self.model.config, name, None) for name in LAYER_DROPS)
        if drops or is_gradual(self.tuned):  # processes must not wait for gradients of what is left out or held fast
            self.args.ddp_find_unused_parameters = True
        return super()._build_accelerator_args(**kwargs)

    # Loss

    def _logits(self, outputs: ModelOutput) -> Tensor | tuple[Tensor, ...]:
        """A model's logits; where it has several, such as of starts and of ends, all of them."""
        return outputs["logits"] if "logits" in outputs else tuple(v for k, v in outputs.items() if k != "loss")

    def _loss(self, outputs, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        losses = self._losses_of(self._logits(outputs), labels, self.args.label_smoothing_factor)
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        total = losses.sum()
        if is_adalora(self.model) and self.model.training:
            total = total + orthogonality(self.model) * (labels != -100).sum()  # once a step, however it is cut
        if self.args.r_drop and self.model.training:  # the labels are there twice
            total = total + 2 * self.args.r_drop * divergence(self._logits(outputs), labels)
        return total / max(count, 1)  # a step may hold no label at all

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As its parent does; under `--layerwise_lr_decay` with the rate of its layer for each parameter."""
        shares = layer_rates(self.tuned)
        if shares is None or self.optimizer is not None:
            return super().create_optimizer(model)
        decays = set(self.get_decay_parameter_names(self.model))
        groups: dict[tuple[float, bool], list] = {}
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                groups.setdefault((shares[name], name in decays), []).append(weight)
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        # the head comes first: its rate is the one that is logged
        self.optimizer = optimizer_class(
            [
                {"params": weights, "lr": self.args.learning_rate * share}
                | {"weight_decay": self.args.weight_decay if decay else 0.0}
                for (share, decay), weights in sorted(groups.items(), key=lambda item: -item[0][0])
            ],
            **settings,
        )
        return self.optimizer

    # Batches

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        accumulation, processes = self.args.gradient_accumulation_steps, self.args.world_size
        self._train_batches = TrainingBatches(
            row_lengths(dataset),
            step_rows=self._step_rows,
            accumulation=accumulation,
            processes=processes,
            rank=self.args.process_index,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            by_length=self.args.train_sampling_strategy == "group_by_length",
        )
        return self._train_batches

    def _run_epoch(self, *args, epoch: int, **kwargs):
        if self._was_over():
            self.control.should_training_stop = True
            return
        # the loop names the epoch through one wrapper of the sampler; a resumed epoch on several processes has two
        if self.args.train_sampling_strategy in ("random", "group_by_length"):
            self._train_batches.set_epoch(epoch)
        if isinstance(self.data_collator, EpochSeeded):
            self.data_collator.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    # Ends

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """Train from the start, from the checkpoint folder `resume_from_checkpoint`, or if True from the newest whole.

        Raises `RunStopped` where the run ends early.
        """
        if resume_from_checkpoint is True:
            accept = self.args.accept_unverified_checkpoint
            resume_from_checkpoint = str(checkpoints.newest_whole(self.args.output_dir, accept))
        if self.is_world_process_zero():
            checkpoints.clear_staging(self.args.output_dir)
        if resume_from_checkpoint is not None:
            self._check_order(Path(resume_from_checkpoint))
        self._last_whole = resume_from_checkpoint
        try:
            with StopSignals() as self._signals, reraise_lost_ranks():
                result = self._train_in_memory(resume_from_checkpoint, **kwargs)
                trained = [value for value in self.model.parameters() if value.requires_grad]
                result.metrics["trainable_parameters"] = sum(value.numel() for value in trained)
                if self._signals.number:
                    raise RunStopped(
                        f"{signal.Signals(self._signals.number).name} after the last step; {HOW_TO_GO_ON}",
                        code=128 + self._signals.number,
                    )
                return result
        except RunStopped as error:
            raise error.with_traceback(None) from None  # its frames would keep the data loader's workers alive

    def _check_order(self, checkpoint: Path) -> None:
        """Refuse a checkpoint whose run took its rows in another order; warn where it cannot go on exactly."""
        then = checkpoints.about(checkpoint)
        order, processes = then.get("order"), then.get("processes")
        if order not in (None, self.args.train_sampling_strategy):
            raise InputError(f"{checkpoint}: rows came in another order; give --train_sampling_strategy {order}")
        if processes not in (None, self.args.world_size):
            warn(
                f"{checkpoint}: saved by {processes} processes, and this run has {self.args.world_size}: it goes "
                "on, but draws other random numbers (dropout) than the run would have"
            )

    def _train_in_memory(self, resume_from_checkpoint: str | None, **kwargs) -> TrainOutput:
        """Train; where memory runs out, under `--auto_find_batch_size` again with half the batch at a time."""
        args, shrinks = self.args, self.args.auto_find_batch_size
        args.auto_find_batch_size = False  # transformers' own goes on with half-trained weights and other steps
        if shrinks:
            weights = {name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()}
            states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
        while True:
            self._seen_step, self._save_at_end, self._losses = -1, False, []
            self._resumed_weights: dict[str, Tensor] = {}
            if self._mixout:
                self._mixout.forget()
            self._saved_at, self._unsaved_best = time.monotonic(), None
            try:
                return super().train(resume_from_checkpoint, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                batch = args.per_device_train_batch_size
                if not shrinks or batch == 1:
                    remedy, taken = (
                        "give --auto_find_batch_size true" if batch > 1 else "take a smaller model",
                        f"{batch} rows",
                    )
                    if budget := getattr(args, "max_tokens_per_batch", 0):
                        taken = f"up to {budget} sub-tokens"
                        remedy = "give half the --max_tokens_per_batch and twice the --gradient_accumulation_steps"
                    step = self.state.global_step + 1
                    raise out_of_memory(f"in step {step} with {taken} at a time; {remedy}", error) from None
            # out here the failed step's tensors are gone with its traceback
            args.per_device_train_batch_size = math.ceil(batch / 2)
            args.gradient_accumulation_steps = math.ceil(self._step_rows / args.per_device_train_batch_size)
            self._train_batch_size = args.train_batch_size
            self.optimizer = self.lr_scheduler = None
            self.model_wrapped = self.model
            self.model.zero_grad()
            if is_gradual(self.tuned):  # the new optimizer is to have what is unfrozen later, too
                self.model.requires_grad_(True)
            release_memory()
            resume_from_checkpoint = self._last_whole
            if resume_from_checkpoint is None:
                self.model.load_state_dict(weights)
                for callback in self._early_stopping():
                    callback.early_stopping_patience_counter = 0
                random.setstate(states[0])
                np.random.set_state(states[1])
                torch.random.set_rng_state(states[2])
            tell(
                f"out of memory with {batch} rows at a time: takes {args.per_device_train_batch_size}, and "
                f"{args.gradient_accumulation_steps} such batches a step; begins again from "
                f"{resume_from_checkpoint or 'the initial weights'}"
            )

    def _prepare_for_training(self, *args, **kwargs):
        # an evaluation before the training marks the model as prepared, and accelerate would not wrap it any more: each
        # of several processes would train for itself
        if self.args.world_size > 1 and getattr(self.model, "_is_accelerate_prepared", False):
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model._is_accelerate_prepared = False
            self.accelerator._models.clear()
        return super()._prepare_for_training(*args, **kwargs)

    def _init_training_state(self, *args) -> tuple[int, int]:
        max_steps, *_, checkpoint, _ = args
        found = super()._init_training_state(*args)
        if self._average:
            self._average.begin(max_steps)
            self._average.load(self.model, self._resumed_weights)
        if checkpoint is not None:
            # the folder may have been moved or copied since; its own best checkpoint is the one beside this one
            best = json.loads(Path(checkpoint, checkpoints.STATE).read_text(encoding="utf-8"))["best_model_checkpoint"]
            if best and Path(self.args.output_dir, Path(best).name).is_dir():
                self.state.best_model_checkpoint = str(Path(self.args.output_dir, Path(best).name))
            elif best and self.state.best_model_checkpoint is None:
                self.state.best_metric = None
                warn(f"{best}: the best checkpoint so far is gone; the best of those to come will be taken")
            for callback in self._early_stopping():
                callback.early_stopping_patience = self.args.early_stopping_patience
        for callback in (c for c in self.callback_handler.callbacks if isinstance(c, ExportableState)):
            self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        return found

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]

    def _was_over(self) -> bool:
        """Whether the run that is resumed had come to its end: transformers would train one step more."""
        return self.state.global_step >= self.state.max_steps or any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self._early_stopping()
        )

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """As its parent, which walks through all of the model for each batch: here it does once."""
        if "input_ids" not in inputs:
            return super().floating_point_ops(inputs)
        if self._operations is None:
            self._operations = super().floating_point_ops({"input_ids": torch.empty(1)})
        return inputs["input_ids"].numel() * self._operations

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        whole = self.accelerator.sync_gradients  # the last batch of its step
        if self._average:
            self._average.before_step(self.model)
        if self._mixout:
            self._mixout.mix(self.state.global_step)
        if self.args.r_drop:
            inputs, num_items_in_batch = repeat_batch(inputs), 2 * num_items_in_batch
        if self._adversary:
            losses = []
            for last in self._adversary.perturbed(inputs, self.state.global_step):
                with nullcontext() if whole and last else self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, dict(inputs), num_items_in_batch))
            loss = torch.stack(losses).mean()
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        if whole:
            self._complete_gradient()
        return loss

    def _complete_gradient(self) -> None:
        """What regularisation does to a step's gradient once it is summed over batches and processes."""
        if self._adversary:
            for value in self.model.parameters():
                if value.grad is not None:
                    value.grad.div_(self._adversary.passes)
        if self._mixout:
            self._mixout.restore()
        if self._pull:
            self._pull.add_gradient(1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale())

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        losses, self._losses = torch.stack(self._losses), []
        self._stop_unless_finite(losses, norm)
        return norm

    def _stop_unless_finite(self, losses: Tensor, norm: Tensor | float | None) -> None:
        """End the run before its weights take a step with a loss, of any accumulated batch, or gradient not finite."""
        scaled = self.accelerator.scaler is not None  # fp16: the scaler skips a step whose gradient overflows
        if not math.isfinite(losses.sum()) or not (scaled or norm is None or math.isfinite(norm)):
            bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
            what, rows = ("loss", self._rows_of(bad)) if bad else ("gradient norm", "")
            if not bad and self.args.world_size == 1:  # else the gradient is of all processes' rows in sum
                rows = self._rows_of(list(range(len(losses))))
            kept = "checkpoints are" if self.is_deepspeed_enabled else "weights and checkpoints are"  # it has stepped
            raise RunStopped(
                f"the {what} of step {self.state.global_step + 1} is not a finite number; {rows}the {kept} as before "
                "this step; try a lower --learning_rate, or --precision fp32",
                code=RunStopped.NOT_FINITE,
            )

    def _rows_of(self, batches: list[int]) -> str:
        """Which training rows this process takes in some batches of the step that is being run, for a message."""
        if self.args.train_sampling_strategy not in ("random", "group_by_length"):
            return ""
        accumulation = self.args.gradient_accumulation_steps
        first = self.state.global_step % math.ceil(len(self._train_batches) / accumulation) * accumulation
        step = list(islice(self._train_batches, first, first + accumulation))
        rows = sorted(row for i in batches for row in step[i])
        return f"its rows, as numbered in the encoded training data from 0: {', '.join(map(str, rows[:64]))}; "

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """Called after each step and again at the end of an epoch, or of the training.

        Where the two coincide a checkpoint waits for the second call: saved before the evaluation that ends an epoch,
        it would lose that evaluation when it is resumed.
        """
        ends = self.control.should_training_stop or float(self.state.epoch).is_integer()
        first_call = self.state.global_step != self._seen_step
        self._seen_step = self.state.global_step
        if self._average and first_call:
            self._average.after_step(self.model, self.state.global_step)
        self._asked = asked = self._signals.agreed(self.args.device)
        if ends and first_call:
            self._save_at_end, self.control.should_save = self.control.should_save, False
        elif asked or self._save_at_end:
            self.control.should_save = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if ends and first_call:
            return
        self._save_at_end = False
        if asked:
            if self._saved_step != self.state.global_step:  # --save_strategy best saves only better models
                self._save_checkpoint(self.model_wrapped, None)
            raise RunStopped(
                f"{signal.Signals(asked).name} after step {self.state.global_step}; checkpoint-{self.state.global_step}"
                f" is whole; {HOW_TO_GO_ON}",
                code=128 + asked,
            )

    # Evaluation

    def _get_eval_sampler(self, eval_dataset: Dataset) -> LengthSortedSampler:
        return LengthSortedSampler(eval_dataset)

    def _get_dataloader(self, dataset: Dataset, *args, **kwargs):
        loader = super()._get_dataloader(dataset, *args, **kwargs)
        loader.worker_init_fn = partial(ignore_group_signals, loader.worker_init_fn)
        loader.full_dataset = dataset  # the loader's own has lost the columns that the model does not take
        return loader

    def evaluation_loop(self, dataloader, *args, **kwargs) -> EvalLoopOutput:
        self._evaluated = dataloader.full_dataset
        self._order = LengthSortedSampler(self._evaluated).order
        too_much = (
            f"in an evaluation with {self.args.per_device_eval_batch_size} rows at a time; give a smaller "
            f"--per_device_eval_batch_size; {HOW_TO_GO_ON}"
        )
        with reraise_out_of_memory(lambda: too_much), reraise_lost_ranks(), self._averaged():
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.pop(f"{prefix}_model_preparation_time", None)
        predictions, labels, _ = self._rows(output.predictions, output.label_ids)
        return output._replace(predictions=predictions, label_ids=labels)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Reduces a batch on the device to (predictions, summed loss of each row, labels of each row), and labels.

        A CPU takes about `EVALUATED_TOGETHER` sub-tokens of it at a time: more take no less time, but memory. (Not on
        several processes, which count each part's labels together, and so must have as many parts.)
        """
        alone = self.args.device.type == "cpu" and self.args.world_size == 1
        parts = row_parts(inputs, EVALUATED_TOGETHER) if alone else [inputs]
        found = [self._reduced(model, part, prediction_loss_only, ignore_keys) for part in parts]
        if len(found) == 1:
            return None, *found[0]
        reduced, labels = zip(*found, strict=True)
        return None, reduce(nested_concat, reduced), None if labels[0] is None else reduce(nested_concat, labels)

    def _reduced(self, model, inputs, prediction_loss_only, ignore_keys) -> tuple:
        _, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        if labels is None:
            return (logits if self._reduce is None else self._reduce(logits, labels),), None
        losses = self._losses_of(logits, labels, self.args.label_smoothing_factor).view(len(labels), -1).sum(1)
        counts = (labels != -100).view(len(labels), -1).sum(1)
        if self._user_metrics is None or prediction_loss_only:
            reduced = torch.zeros_like(losses)
        else:
            reduced = logits if self._reduce is None else self._reduce(logits, labels)
        return (reduced, losses, counts), labels

    def _rows(self, predictions: list[tuple], labels: list[np.ndarray] | None) -> tuple:
        """Predictions, labels and mean loss from the batches that `prediction_step` made; rows in data set order."""
        rows = in_dataset_order([batch[0] for batch in predictions], self._order)
        if labels is None:
            return rows, None, None
        losses = np.concatenate([batch[1] for batch in predictions]).sum(dtype=np.float64)
        counts = np.concatenate([batch[2] for batch in predictions]).sum()
        return rows, in_dataset_order(labels, self._order), losses / counts

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        rows, labels, loss = self._rows(prediction.predictions, prediction.label_ids)
        metrics = {"loss": loss}
        if self._user_metrics is not None:
            metrics |= self._user_metrics(EvalPrediction(predictions=rows, label_ids=labels), self._evaluated)
        return metrics

    # Saving

    def _get_output_dir(self, trial=None) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, checkpoints.STAGING)) if self._saving else folder

    def _averaged(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Within it the model has the mean of its weights; gives the weights themselves, nothing without a mean."""
        return self._average.in_place(self.model) if self._average else nullcontext({})

    def _save_checkpoint(self, model, trial) -> None:
        """Save a checkpoint aside, and publish it when it is whole."""
        with self._averaged() as unaveraged:
            self._save_whole(model, trial, unaveraged)

    def _save_whole(self, model, trial, unaveraged: dict[str, Tensor]) -> None:
        if self._may_wait():
            if self.state.best_global_step == self.state.global_step:
                self._unsaved_best = self._trained_weights()
            return
        folder = Path(self.args.output_dir)
        staged = folder / checkpoints.STAGING / f"checkpoint-{self.state.global_step}"
        self._saving = True
        torch.serialization.set_crc32_options(False)  # a slower and weaker sum than that of the manifest
        try:
            with checkpoints.clear_disk_errors(folder, self._checkpoint_bytes):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
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
        finally:
            self._saving = False
            torch.serialization.set_crc32_options(True)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = {folder / staged.name, *([Path(best)] if best else [])}
            checkpoints.rotate(folder, self.args.save_total_limit, keep)
        self.accelerator.wait_for_everyone()
        self._last_whole, self._saved_step = str(folder / staged.name), self.state.global_step
        self._saved_at, self._unsaved_best = time.monotonic(), None

    def _may_wait(self) -> bool:
        """Whether the checkpoint due at the end of an epoch is left out, as the last one was saved a moment ago.

        The weights of the best epoch that was left out go into the next checkpoint. The last step's is never left out,
        nor one that a signal asks for, nor where no process has all the weights.
        """
        if self.args.save_strategy != "epoch" or self._asked or self.control.should_training_stop:
            return False
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        soon = torch.tensor(
            int(time.monotonic() - self._saved_at < self.args.save_min_seconds), device=self.args.device
        )
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(soon, src=0)  # by one clock
        return bool(soon)

    def _weights(self) -> dict[str, Tensor]:
        """What training changes and a checkpoint holds: trained parameters, also those yet frozen, and buffers."""
        model = self.accelerator.unwrap_model(self.model)
        kept = model.state_dict().keys()
        buffers = {k: v for k, v in model.named_buffers() if k in kept}
        every = is_gradual(self.tuned)
        # PiSSA takes the principal components out of its frozen weights, which another machine may round otherwise
        changed = is_beside(model) and self.tuned.tuning.method == "pissa"
        return {
            k: v for k, v in model.named_parameters() if v.requires_grad or every or (changed and ".base_layer." in k)
        } | buffers

    def _trained_weights(self) -> dict[str, Tensor]:
        return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in self._weights().items()}

    def _checkpoint_bytes(self) -> int:
        """About what a checkpoint takes on the disk."""
        state = [t for values in self.optimizer.state.values() for t in values.values()] if self.optimizer else []
        return sum(t.nbytes for t in [*self.model.state_dict().values(), *state] if isinstance(t, Tensor))

    def _finalize_training(self, *args) -> TrainOutput:
        if self._average:
            self._average.apply_mean(self.model)
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # or it removes all but the best
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        damage = checkpoints.damage(best, self.args.accept_unverified_checkpoint)
        if damage:
            raise InputError(
                f"{best}: the best checkpoint cannot be restored: {damage}; the last one is beside it; to do without "
                "the best give --load_best_model_at_end false"
            )
        with reading(str(best)):
            for name in (checkpoints.BEST, checkpoints.TRAINED):
                if (best / name).is_file():
                    return self._put_back(load_file(best / name))
            return super()._load_best_model()

    def _issue_warnings_after_load(self, load_result) -> None:
        own = self.accelerator.unwrap_model(self.model).state_dict()
        missing = set(load_result.missing_keys)
        # tied weights are in a checkpoint once, and share their memory in the model
        there = {value.data_ptr() for name, value in own.items() if name not in missing}
        load_result.missing_keys[:] = [
            name for name in load_result.missing_keys if name not in own or own[name].data_ptr() not in there
        ]
        super()._issue_warnings_after_load(load_result)

    def _put_back(self, weights: dict[str, Tensor]) -> None:
        own = self._weights()
        for name, value in weights.items():
            if name in own:
                own[name].detach().copy_(value)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        unaveraged = Path(resume_from_checkpoint, checkpoints.UNAVERAGED)
        if unaveraged.is_file() and self._average is None:
            raise InputError(
                f"{resume_from_checkpoint}: of a run that averages its weights; give its --ema_decay or --swa_start"
            )
        with reading(resume_from_checkpoint):
            self._load_weights(Path(resume_from_checkpoint), model)
            self._resumed_weights = load_file(unaveraged) if unaveraged.is_file() else {}

    def _load_weights(self, checkpoint: Path, model=None) -> None:
        path = checkpoint / checkpoints.TRAINED
        if not path.is_file():
            return super()._load_from_checkpoint(str(checkpoint), model)
        kept = load_file(path)
        missing = self._weights().keys() - kept.keys()
        if missing:
            raise ValueError(f"{path.name} has no {sorted(missing)[0]}")
        self._put_back(kept)
        if is_adalora(self.model):
            restore_allocation(self.model, {name: value for name, value in kept.items() if ":" in name})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint)):
            super()._load_rng_state(checkpoint)

    def init_hf_repo(self, *args, **kwargs) -> None:
        try:
            super().init_hf_repo(*args, **kwargs)
        except (OSError, ValueError) as error:  # no network, not logged in, or no right to write there
            raise InputError(f"--push_to_hub: {one_line(error)}; log in first by: hf auth login") from None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self._saving and is_beside(self.model):
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            ranks = allocation(self.model) if is_adalora(self.model) else {}
            save_file(self._trained_weights() | ranks, Path(output_dir, checkpoints.TRAINED))
            self.processing_class.save_pretrained(output_dir)
            return
        with checkpoints.clear_disk_errors(self.args.output_dir, self._checkpoint_bytes):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / transformers.trainer.TRAINING_ARGS_NAME).unlink()  # a pickle; run.json has the arguments
            umask = os.umask(0)
            os.umask(umask)
            for file in folder.rglob("*.safetensors"):
                file.chmod(0o666 & ~umask)  # safetensors leaves 0600, which no colleague can read

    def create_model_card(self, *args, **kwargs) -> None:
        """Drafts a card as the stock Trainer does before a push to the hub, unless the recipe wrote one."""
        if not Path(self.args.output_dir, "README.md").exists():
            super().create_model_card(*args, **kwargs)
