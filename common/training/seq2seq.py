"""Training and generating with encoder-decoders: the Trainer's promises for outputs that are texts.

Beside those of `common.training.trainer`:

- Evaluation generates, on batches sorted by the length of the source, and gives the outputs back in data set order.
  The loss is not computed beside it; under `--predict_with_generate false` it is, and nothing is generated.
- During training it searches greedily, afterwards as `GenerationArguments` say.
- It generates in the precision of the training.
- `--max_tokens_per_batch` fills each batch up to a budget of tokens (`common.training.order.TokenBudgetBatches`). A
  resumed run goes on bit for bit with it too.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import (
    EvalPrediction,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module
from transformers.trainer_utils import TrainOutput

from common.args import TrainingArguments, check_best_metric
from common.errors import InputError, tell
from common.inference.search import shrinking_search
from common.models.decoding import PAD_MULTIPLE, BeginWith, GenerationArguments, generating, padded, shift_right
from common.models.encoder_decoder import Seq2SeqModelArguments
from common.speed.head import losses_at_labels
from common.training import checkpoints
from common.training.loss import Losses
from common.training.order import TokenBudgetBatches, TrainingBatches, in_dataset_order, row_lengths
from common.training.trainer import Trainer
from common.tuning.methods import TuningArguments

#: the search of evaluations during training: beams take several times as long, and rank checkpoints much the same
GREEDY = {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False}


@dataclass
class Seq2SeqTrainingArguments(TrainingArguments):
    """Training arguments of encoder-decoders."""

    max_tokens_per_batch: int = field(
        default=0,
        metadata={
            "help": "sub-tokens in a batch, padding included; 0: --per_device_train_batch_size rows",
            "resume": "splits_step",
        },
    )
    predict_with_generate: bool = field(
        default=True, metadata={"help": "evaluate by generating; false: by the loss alone, until the training is over"}
    )
    eval_generate_samples: int | None = field(
        default=None, metadata={"help": "generate for so many validation rows only, until the training is over"}
    )
    average_checkpoints: int = field(
        default=0,
        metadata={"help": "in the end take the mean of the weights of the last n checkpoints, instead of the best one"},
    )

    def __post_init__(self) -> None:
        if self.average_checkpoints:
            self._keep_what_is_averaged()
        super().__post_init__()
        if self.max_tokens_per_batch < 0:
            raise InputError("--max_tokens_per_batch must be at least 0")
        if self.max_tokens_per_batch and self.auto_find_batch_size:
            raise InputError("--auto_find_batch_size: counts rows; give --max_tokens_per_batch 0, or a smaller budget")
        if self.eval_generate_samples is not None and self.eval_generate_samples < 1:
            raise InputError("--eval_generate_samples must be at least 1")

    def _keep_what_is_averaged(self) -> None:
        n = self.average_checkpoints
        if n < 2:
            raise InputError(f"--average_checkpoints {n}: must be at least 2; 0 for none")
        if self.ema_decay is not None or self.swa_start is not None:
            raise InputError(
                "--average_checkpoints, --ema_decay and --swa_start: ways to average the weights; give one"
            )
        saved = self.num_train_epochs if self.save_strategy == "epoch" and self.max_steps <= 0 else n
        if self.save_strategy == "no" or saved < n:
            many = "none" if self.save_strategy == "no" else f"{saved:g}"
            raise InputError(
                f"--average_checkpoints {n}: the run would save {many}; train longer, or save more often by "
                "--save_strategy steps --save_steps"
            )
        self.load_best_model_at_end = False
        self.save_min_seconds = 0
        if self.save_total_limit is not None:
            self.save_total_limit = max(self.save_total_limit, n)

    def watched(self, rows: int) -> list[int]:
        """Which of so many validation rows evaluations during training are of: evenly from the first to the last."""
        number = min((self.predict_with_generate and self.eval_generate_samples) or rows, rows)
        return np.linspace(0, rows - 1, number).astype(int).tolist()

    def check_together(
        self,
        generation: GenerationArguments,
        model: Seq2SeqModelArguments,
        tuning: TuningArguments,
        scores: Collection[str],
    ) -> None:
        """Raise `InputError` for arguments that contradict one another, or a best score that no evaluation gives.

        `scores` are those of evaluations that generate. A row of the greatest length must fit into a batch.
        """
        longest = max(generation.max_source_length, generation.max_target_length)
        longest += -longest % PAD_MULTIPLE
        if 0 < self.max_tokens_per_batch < longest:
            raise InputError(
                f"--max_tokens_per_batch {self.max_tokens_per_batch}: a row may have {longest} sub-tokens; allow as "
                "many, or lower --max_source_length and --max_target_length"
            )
        if tuning.method != "full" and (model.from_scratch or model.warm_start):
            raise InputError(
                f"{tuning.asked}: new weights are trained in full; name an encoder-decoder, or leave it out"
            )
        if self.average_checkpoints and tuning.is_beside():
            raise InputError(f"--average_checkpoints: what {tuning.asked} trains has no such mean; leave one out")
        by_loss = (self.metric_for_best_model or "loss").removeprefix("eval_") == "loss"
        if by_loss and self.predict_with_generate:
            raise InputError(
                "--metric_for_best_model loss: evaluations that generate give none; add --predict_with_generate false"
            )
        if not by_loss and not self.predict_with_generate:
            raise InputError(
                "--predict_with_generate false: evaluations give the loss alone; add --metric_for_best_model loss"
            )
        check_best_metric(self, scores)


class Seq2SeqCollator:
    """Rows of `input_ids` and `labels` to a batch, each side padded to its longest row, to a multiple of 8.

    Gives `input_ids`, `attention_mask`, `labels` (-100 at padding) and `decoder_input_ids` (labels moved on by one),
    each of shape (rows, length of the side).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel):
        search = model.generation_config
        start = search.bos_token_id if search.decoder_start_token_id is None else search.decoder_start_token_id
        self.pad = tokenizer.pad_token_id
        # not every model has a function for it; mBART alone begins with the last of the labels, the language
        if model.config.model_type == "mbart":
            self.shift = model.prepare_decoder_input_ids_from_labels
        else:
            self.shift = partial(shift_right, start=start, pad=self.pad)

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        sources, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
        ids, mask = padded(sources, self.pad), padded([[1] * len(source) for source in sources], 0)
        labels = padded(labels, -100)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "decoder_input_ids": self.shift(labels),
        }


class Seq2SeqTrainer(Trainer):
    """`common.training.trainer.Trainer` for encoder-decoders, with the promises of this module.

    `compute_metrics(prediction, dataset)` gets in `prediction.predictions` one array of generated sub-tokens a row, as
    the model gave them (see `finished_ids`), and in `prediction.label_ids` the padded labels. Without generation it is
    not called, and the loss is the only score.

    `begins` says where a row's language is told to the decoder, which then may be another for each row: by the "start"
    of its input, or by the "first" of its labels. Without it, as the generation configuration says.
    """

    def __init__(self, *args, losses: Losses, begins: Literal["start", "first"] | None = None, **kwargs):
        super().__init__(*args, losses=losses, **kwargs)
        if self.args.average_checkpoints and self.is_fsdp_enabled:
            raise InputError("--average_checkpoints: not where FSDP shards the weights; leave it out")
        self._begins = begins
        if losses is not losses_at_labels:  # a loss of your own needs the scores of the vocabulary
            self.speed.head = None

    def make_batches(self, dataset: Dataset) -> Sampler:
        """Return the batch sampler: by rows, or by a budget of tokens, of the longer side of each pair."""
        lengths = np.maximum(row_lengths(dataset), row_lengths(dataset, "labels"))
        if self.args.max_tokens_per_batch:
            step_tokens = self.args.max_tokens_per_batch * self.args.gradient_accumulation_steps * self.args.world_size
            return TokenBudgetBatches(lengths, step_tokens, multiple=PAD_MULTIPLE, **self.cut())
        by_length = self.args.train_sampling_strategy == "group_by_length"
        return TrainingBatches(lengths, self.step_rows, by_length=by_length, **self.cut())

    def compute_loss(self, model, inputs, *args, **kwargs):
        at_labels = self.speed.at_labels(inputs["labels"], self.args.label_smoothing_factor)
        with self.speed.training_pass(inputs["attention_mask"], inputs["labels"]), at_labels:
            return super().compute_loss(model, inputs | {"use_cache": False}, *args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log as the parent does, without a number of rows that it cannot know."""
        if self.args.max_tokens_per_batch and self.args.max_steps > 0:
            logs.pop("train_samples_per_second", None)  # takes all batches to have --per_device_train_batch_size rows
        super().log(logs, *args, **kwargs)

    def train(self, *args, **kwargs) -> TrainOutput:
        """Train as the parent does; in the end average checkpoints if asked to."""
        output = super().train(*args, **kwargs)
        if self.args.average_checkpoints:
            self._take_average(self.args.average_checkpoints)
        return output

    def _take_average(self, n: int) -> None:
        """Put the mean of the weights of the last `n` checkpoints into the model."""
        there = checkpoints.in_order(self.args.output_dir)
        last = [path for path in there if checkpoints.step_of(path) <= self.state.global_step][:n]
        if len(last) < n:
            raise InputError(
                f"--average_checkpoints {n}: {self.args.output_dir} has {len(last)} checkpoints; save more often by "
                "--save_strategy steps --save_steps, or take the mean of fewer with --resume_from_checkpoint true"
            )
        for folder in last:
            reason = checkpoints.problem(folder, self.args.accept_unverified_checkpoint)
            if reason:
                raise InputError(f"--average_checkpoints {n}: {folder}: {reason}")
        own = self.accelerator.unwrap_model(self.model).state_dict()
        mean = checkpoints.average(last)
        # of tied weights, which share their memory, a checkpoint has one name
        covered = {own[name].data_ptr() for name in mean if name in own}
        if not mean.keys() <= own.keys() or any(value.data_ptr() not in covered for value in own.values()):
            raise InputError(f"{last[0]}: holds other weights than the model, so they cannot be averaged")
        for name, value in mean.items():
            own[name].copy_(value)
        steps = ", ".join(str(checkpoints.step_of(path)) for path in last[::-1])
        tell(f"the model is the mean of the checkpoints of steps {steps}")

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Generate for a batch, which gives ((outputs,), labels), or reduce its loss as the parent does."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels", None)
        if self.args.predict_with_generate:
            plain = self.accelerator.unwrap_model(model)
            shared = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(self.model)
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
            with torch.no_grad(), generating(plain, dtype):
                kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
                if self._begins == "start":
                    kept["decoder_start_token_id"] = inputs["decoder_input_ids"][:, 0].tolist()
                elif self._begins == "first":
                    kept["logits_processor"] = LogitsProcessorList([BeginWith(labels[:, 0])])
                search = GREEDY if self.is_in_train else {}
                kept |= {"synced_gpus": True} if shared else {"custom_generate": shrinking_search}
                return None, (plain.generate(**kept, **search),), labels
        smoothing = self.args.label_smoothing_factor
        with torch.no_grad(), self.compute_loss_context_manager(), self.speed.at_labels(labels, smoothing):
            logits = self.logits_of(model(**inputs, use_cache=False), "labels")
        losses = self.losses["labels"](logits, labels, smoothing).sum(1)
        return None, (torch.zeros_like(losses), losses, (labels != -100).sum(1)), labels

    def rows_of(self, predictions: list[tuple], labels: list[np.ndarray] | None) -> tuple:
        """Return outputs and labels in data set order; there is no loss where the model generated."""
        if len(predictions[0]) > 1:
            return super().rows_of(predictions, labels)
        rows = in_dataset_order([batch[0] for batch in predictions], self._order)
        return rows, None if labels is None else in_dataset_order(labels, self._order), None

    def score(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the loss alone, or the scores of the outputs that the model generated."""
        if len(prediction.predictions[0]) > 1:
            return {"loss": self.rows_of(prediction.predictions, prediction.label_ids)[2]}
        return {name: value for name, value in super().score(prediction).items() if value is not None}
