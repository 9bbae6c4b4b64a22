"""Train encoder-decoders and evaluate them by generating texts.

In addition to the promises of `common.training.trainer`:

- Evaluation generates on batches sorted by the length of the source, and returns outputs in data set order. It computes
  no loss. Under `--predict_with_generate false` it computes the loss and generates nothing.
- The search is greedy during training, and follows `GenerationArguments` afterwards.
- Generation uses the precision of training.
- `--max_tokens_per_batch` fills each batch up to a budget of tokens (`common.training.order.TokenBudgetBatches`), and
  resumes bit for bit.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import (
    EvalPrediction,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module
from transformers.trainer_utils import TrainOutput

from common.args import TrainingArguments, check_best_metric
from common.errors import InputError, one_line, tell
from common.inference.search import shrinking_search, why_not_shared
from common.models.decoding import BeginWith, GenerationArguments, generating, padded, shift_right
from common.models.encoder_decoder import Seq2SeqModelArguments
from common.models.sizes import PAD_MULTIPLE, pad_multiple
from common.models.trial import FAILURES, trial
from common.speed.head import losses_at_labels
from common.training import checkpoints
from common.training.evaluation import batches_of
from common.training.loss import Losses
from common.training.order import StepSampler, TokenBudgetBatches, in_dataset_order, row_lengths
from common.training.trainer import Trainer
from common.tuning.methods import TuningArguments

#: search of evaluations during training: beam search takes several times as long and ranks checkpoints alike
GREEDY = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False}


@dataclass
class Seq2SeqTrainingArguments(TrainingArguments):
    """Training arguments of encoder-decoders."""

    max_tokens_per_batch: int = field(
        default=0,
        metadata={
            "help": "tokens in a batch, padding included; 0: --per_device_train_batch_size rows",
            "resume": "splits_step",
        },
    )
    predict_with_generate: bool = field(
        default=True, metadata={"help": "evaluate by generating; false: by the loss only, during training"}
    )
    eval_generate_samples: int | None = field(
        default=None, metadata={"help": "number of validation rows to generate for during training"}
    )
    average_checkpoints: int = field(
        default=0,
        metadata={"help": "average the weights of the last N checkpoints at the end, instead of taking the best"},
    )

    def __post_init__(self) -> None:
        if self.average_checkpoints:
            self._keep_averaged_checkpoints()
        super().__post_init__()
        if self.max_tokens_per_batch < 0:
            raise InputError("--max_tokens_per_batch must be at least 0")
        if self.max_tokens_per_batch and self.auto_find_batch_size:
            raise InputError(
                "--auto_find_batch_size: counts rows, not tokens; leave it out, or give --max_tokens_per_batch 0"
            )
        if self.max_tokens_per_batch and self.train_sampling_strategy == "sequential":
            raise InputError(
                "--train_sampling_strategy sequential: --max_tokens_per_batch sorts rows by length; leave it out, or "
                "give --max_tokens_per_batch 0"
            )
        drawn = "--keep replay" if self.keep == "replay" else "--domain_temperature"
        if self.max_tokens_per_batch and (self.keep == "replay" or self.domain_temperature is not None):
            raise InputError(f"{drawn}: counts rows, not tokens; leave it out, or give --max_tokens_per_batch 0")
        if self.eval_generate_samples is not None and self.eval_generate_samples < 1:
            raise InputError("--eval_generate_samples must be at least 1")

    def _keep_averaged_checkpoints(self) -> None:
        n = self.average_checkpoints
        if n < 2:
            raise InputError(f"--average_checkpoints {n}: must be at least 2; 0 for none")
        if self.ema_decay is not None or self.swa_start is not None:
            raise InputError(
                "--average_checkpoints, --ema_decay and --swa_start: each averages the weights; give only one"
            )
        saved = self.num_train_epochs if self.save_strategy == "epoch" and self.max_steps <= 0 else n
        if self.save_strategy == "no" or saved < n:
            many = "none" if self.save_strategy == "no" else f"{saved:g}"
            raise InputError(
                f"--average_checkpoints {n}: the run would save {many}; train longer, or save more often with "
                "--save_strategy steps --save_steps STEPS"
            )
        self.load_best_model_at_end = False
        self.save_min_seconds = 0
        if self.save_total_limit is not None:
            self.save_total_limit = max(self.save_total_limit, n)

    def watched(self, rows: int) -> list[int]:
        """Return the numbers of the validation rows that evaluations during training use, evenly spaced."""
        number = min((self.predict_with_generate and self.eval_generate_samples) or rows, rows)
        return np.linspace(0, rows - 1, number).astype(int).tolist()

    def check_together(
        self,
        generation: GenerationArguments,
        model: Seq2SeqModelArguments,
        tuning: TuningArguments,
        scores: Collection[str],
    ) -> None:
        """Raise `InputError` for arguments that contradict each other, or a best score that evaluations lack.

        `scores` are the names of the scores of generated outputs. A row of maximum length must fit into a batch.
        """
        longest = max(generation.max_source_length, generation.max_target_length)
        longest += -longest % PAD_MULTIPLE
        if 0 < self.max_tokens_per_batch < longest:
            raise InputError(
                f"--max_tokens_per_batch {self.max_tokens_per_batch}: a row may have {longest} tokens; give at least "
                f"{longest}, or lower --max_source_length and --max_target_length"
            )
        if tuning.method != "full" and (model.from_scratch or model.warm_start):
            raise InputError(
                f"{tuning.asked}: new weights need full training; name an encoder-decoder, or leave it out"
            )
        if self.average_checkpoints and tuning.is_beside():
            raise InputError(f"--average_checkpoints: does not work with {tuning.asked}; leave one of them out")
        by_loss = (self.metric_for_best_model or "loss").removeprefix("eval_") == "loss"
        if by_loss and self.predict_with_generate:
            raise InputError(
                "--metric_for_best_model loss: generating evaluations have no loss; add --predict_with_generate false"
            )
        if not by_loss and not self.predict_with_generate:
            raise InputError(
                "--predict_with_generate false: evaluations have the loss only; add --metric_for_best_model loss"
            )
        check_best_metric(self, scores)


class Seq2SeqCollator:
    """Collate rows of `input_ids` and `labels`, each side padded to a multiple of 8, if its longest rows are one.

    Returns `input_ids`, `attention_mask`, `labels` (-100 at padding) and `decoder_input_ids` (labels shifted right by
    one), each of shape (rows, length of the side).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, lengths: tuple[int | None, int | None]
    ):
        """Choose padding and start token; `lengths` are the most tokens of a source and of a target."""
        self.multiples = [pad_multiple(length) for length in lengths]
        search = model.generation_config
        start = search.bos_token_id if search.decoder_start_token_id is None else search.decoder_start_token_id
        self.pad = tokenizer.pad_token_id
        self.shift: Callable[[Tensor], Tensor]
        # not every model has a function for the shift; only mBART starts with the last label, the language
        if model.config.model_type == "mbart":
            # torch annotates what it does not know of a module as a tensor or a module
            self.shift = model.prepare_decoder_input_ids_from_labels  # type: ignore[assignment]
        else:
            self.shift = partial(shift_right, start=start, pad=self.pad)

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        sources, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
        of_source, of_target = self.multiples
        mask = padded([[1] * len(source) for source in sources], 0, of_source)
        padded_labels = padded(labels, -100, of_target)
        return {
            "input_ids": padded(sources, self.pad, of_source),
            "attention_mask": mask,
            "labels": padded_labels,
            "decoder_input_ids": self.shift(padded_labels),
        }


class Seq2SeqTrainer(Trainer):
    """Train encoder-decoders.

    `compute_metrics(prediction, dataset)` gets one array of generated tokens a row in `prediction.predictions` (see
    `finished_ids`), and the padded labels in `prediction.label_ids`. Without generation it is not called, and the loss
    is the only score.

    `begins` sets where the decoder gets the language of a row, which may differ between rows: the "start" token of its
    input, or the "first" label. None: as the generation configuration says.
    """

    args: Seq2SeqTrainingArguments

    def __init__(self, *args, losses: Losses, begins: Literal["start", "first"] | None = None, **kwargs):
        super().__init__(*args, losses=losses, **kwargs)
        if self.args.average_checkpoints and self.is_fsdp_enabled:
            raise InputError("--average_checkpoints: does not work under FSDP; leave it out")
        self._begins = begins
        # any other loss needs the scores of the vocabulary
        if losses is not losses_at_labels or self.args.keep == "lwf":
            self.speed.head = None
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._try_search()

    def _try_search(self) -> None:
        """Generate two tokens with the final settings; raise `InputError` if the search fails, before training."""
        whole: Any = self.model
        model: Any = whole.get_base_model() if isinstance(whole, PeftModel) else whole
        ids = torch.arange(1, 5, device=self.args.device)[None]
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self._begins == "start":
            arguments["decoder_start_token_id"] = [1]
        if self.args.speed != "off":
            arguments["custom_generate"] = shrinking_search
            if model.generation_config.num_beams not in (None, 1):
                self.speed.note("beams_share_source", why_not_shared(model))
        try:
            with trial(self.model):
                whole.generate(**arguments, max_new_tokens=2)
        except FAILURES as error:
            raise InputError(
                f"{model.name_or_path or type(model).__name__}: cannot generate: {one_line(error)}; choose another "
                "--model_name_or_path, or correct its generation_config.json"
            ) from None

    def make_batches(self, dataset: Dataset) -> StepSampler:
        """Return the batch sampler, by rows or by a budget of tokens; a pair has the length of its longer side."""
        lengths = np.maximum(row_lengths(dataset), row_lengths(dataset, "labels"))
        if self.args.max_tokens_per_batch:
            step_tokens = self.args.max_tokens_per_batch * self.args.gradient_accumulation_steps * self.args.world_size
            return TokenBudgetBatches(lengths, step_tokens, multiple=PAD_MULTIPLE, **self.cut())
        return self.row_batches(lengths)

    def compute_loss(self, model, inputs, *args, **kwargs):
        at_labels = self.speed.at_labels(inputs["labels"], self.args.label_smoothing_factor)
        with self.speed.training_pass(inputs["attention_mask"], inputs["labels"]), at_labels:
            return super().compute_loss(model, inputs | {"use_cache": False}, *args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log as the parent does, without rows a second under a budget of tokens."""
        if self.args.max_tokens_per_batch and self.args.max_steps > 0:
            logs.pop("train_samples_per_second", None)  # assumes --per_device_train_batch_size rows a batch
        super().log(logs, *args, **kwargs)

    def train(self, *args, **kwargs) -> TrainOutput:
        """Train as the parent does, then average checkpoints under `--average_checkpoints`."""
        output = super().train(*args, **kwargs)
        if self.args.average_checkpoints:
            self._take_average(self.args.average_checkpoints)
        return output

    def _take_average(self, n: int) -> None:
        """Load the mean of the weights of the last `n` checkpoints into the model."""
        folders = checkpoints.in_order(self.args.folder)
        last = [path for path in folders if checkpoints.step_of(path) <= self.state.global_step][:n]
        if len(last) < n:
            raise InputError(
                f"--average_checkpoints {n}: {self.args.output_dir} has {len(last)} checkpoints; save more often with "
                "--save_strategy steps --save_steps STEPS, or average fewer with --resume_from_checkpoint true"
            )
        for folder in last:
            reason = checkpoints.problem(folder, self.args.accept_unverified_checkpoint)
            if reason:
                raise InputError(f"--average_checkpoints {n}: {folder}: {reason}")
        current = self.accelerator.unwrap_model(self.model).state_dict()
        mean = checkpoints.average(last)
        # a checkpoint has one name for tied weights, which share their memory
        covered = {current[name].data_ptr() for name in mean if name in current}
        if not mean.keys() <= current.keys() or any(value.data_ptr() not in covered for value in current.values()):
            raise InputError(f"{last[0]}: holds other weights than the model; leave --average_checkpoints out")
        for name, value in mean.items():
            current[name].copy_(value)
        steps = ", ".join(str(checkpoints.step_of(path)) for path in last[::-1])
        tell(f"the model is the mean of the checkpoints of steps {steps}")

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Generate for a batch and return ((outputs,), labels), or reduce its loss as the parent does."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels", None)
        if self.args.predict_with_generate:
            plain = self.accelerator.unwrap_model(model)
            shared = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self.model)
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
            with torch.no_grad(), generating(plain, dtype):
                arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
                if self._begins == "start":
                    arguments["decoder_start_token_id"] = inputs["decoder_input_ids"][:, 0].tolist()
                elif self._begins == "first":
                    arguments["logits_processor"] = LogitsProcessorList([BeginWith(labels[:, 0])])
                search = GREEDY if self.is_in_train else {}
                if shared:
                    arguments["synced_gpus"] = True
                elif self.args.speed != "off":
                    arguments["custom_generate"] = shrinking_search
                return None, (plain.generate(**arguments, **search),), labels
        smoothing = self.args.label_smoothing_factor
        with torch.no_grad(), self.compute_loss_context_manager(), self.speed.at_labels(labels, smoothing):
            logits = self.logits_of(model(**inputs, use_cache=False), "labels")
        losses = self.losses["labels"](logits, labels, smoothing).sum(1)
        return None, (torch.zeros_like(losses), losses, (labels != -100).sum(1)), labels

    def rows_of(self, predictions: list[tuple], labels: list[np.ndarray] | None) -> tuple:
        """Return outputs and labels in data set order; the loss is None for generated outputs."""
        if len(predictions[0]) > 1:
            return super().rows_of(predictions, labels)
        rows = in_dataset_order([batch[0] for batch in predictions], self._order)
        return rows, None if labels is None else in_dataset_order(labels, self._order), None

    def score(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the scores of generated outputs, or the loss only."""
        if len(prediction.predictions[0]) > 1:
            return {"loss": self.rows_of(*batches_of(prediction))[2]}
        return {name: value for name, value in super().score(prediction).items() if value is not None}
