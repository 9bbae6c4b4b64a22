"""Train with exact resume, atomic checkpoints and correct losses: one file of this folder for each promise.

`common.training.upstream` lists the private methods of transformers that these files override.
"""

from collections.abc import Callable

from datasets import Dataset
from torch import nn
from transformers import EarlyStoppingCallback, EvalPrediction, PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from common.args import TrainingArguments
from common.errors import InputError, one_line
from common.models.structure import check_bf16, transformer_of
from common.speed import apply
from common.speed.apply import Speed
from common.training.continual import Continual
from common.training.domains import MixedDomains
from common.training.evaluation import Reducer, RowEvaluation
from common.training.finite import FiniteCheck
from common.training.interrupts import OrderlyStop
from common.training.loss import Losses, MeanLoss, named_losses
from common.training.memory import BatchThatFits
from common.training.optimizer import LayerRates
from common.training.order import SeededOrder, SetEpoch
from common.training.progress import Progress
from common.training.regularisation import Regularised
from common.training.resume import ExactResume, RestoreState
from common.training.saving import WholeCheckpoints
from common.training.semi import SemiSupervised, Unlabeled
from common.training.tasks import SeveralTasks
from common.tuning.tune import TunedModel, callbacks, is_gradual, merge

#: values of a configuration: probability that a step skips a layer
LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


class Trainer(
    # outermost first: an exception passes the classes from the last to the first
    ExactResume,
    OrderlyStop,
    BatchThatFits,
    WholeCheckpoints,
    FiniteCheck,
    LayerRates,
    MixedDomains,
    RowEvaluation,
    Continual,
    Regularised,
    SeveralTasks,
    SemiSupervised,
    SeededOrder,
    MeanLoss,
):
    """`transformers.Trainer` with exact resume, atomic checkpoints and correct losses.

    Takes the arguments of its parent, with these differences.

    Args:
        model: the result of `common.tuning.tune`; a plain module is trained in full.
        args: the training arguments.
        losses: `losses(logits, labels, label_smoothing)` returns the loss of each label, in the shape of `labels`. A
            dictionary has a function for each label column of a batch (`{"labels": label_losses, "topic": ...}`) or
            for each task; the loss of a step is the sum of their means.
        compute_metrics: `compute_metrics(prediction, dataset)` also gets the evaluated data set with all its columns.
            `prediction.predictions` and `.label_ids` are lists of one array a row, in the order of the data set.
        preprocess_logits_for_metrics: `f(logits, labels)` reduces a batch on the device; or a dictionary of functions
            with the keys of `losses`.
        train_dataset: a dictionary by task trains several tasks (`common.training.tasks`).
        unlabeled: rows without labels, which each step takes beside labelled ones (`common.training.semi`).
    """

    def __init__(
        self,
        model: TunedModel | nn.Module,
        args: TrainingArguments,
        *,
        losses: Losses | dict[str, Losses],
        compute_metrics: Callable[[EvalPrediction, Dataset], dict[str, float]] | None = None,
        preprocess_logits_for_metrics: Reducer | dict[str, Reducer] | None = None,
        unlabeled: Unlabeled | None = None,
        **kwargs,
    ):
        self.tuned = model if isinstance(model, TunedModel) else TunedModel(model, kwargs.get("processing_class"))
        self.losses, self.user_metrics = named_losses(losses), compute_metrics
        reduce = preprocess_logits_for_metrics
        self.reducers = {name: reduce.get(name) if isinstance(reduce, dict) else reduce for name in self.losses}
        self.take_old_task(args, unlabeled)
        kwargs |= self.take_domains(args, **kwargs)
        self.speed = self.quicken(args)
        if isinstance(model, TunedModel):
            kwargs.setdefault("processing_class", model.tokenizer)
        kwargs |= self.take_tasks(args, **kwargs) | self.take_unlabeled(args, unlabeled, **kwargs)
        config = transformer_of(self.tuned.model).config
        check_bf16(config, bool(args.bf16))
        drops = any(getattr(config, name, None) for name in LAYER_DROPS)
        if drops or is_gradual(self.tuned) or self.by_task:  # else a process waits for gradients that a step lacks
            args.ddp_find_unused_parameters = True
        if args.label_smoothing_factor and getattr(self.tuned.model, "config", None) is None:
            raise InputError(
                f"--label_smoothing_factor: transformers reads {type(self.tuned.model).__name__}.config; set it to the "
                "config of the encoder"
            )
        super().__init__(self.tuned.model, args, compute_metrics=self.score, **kwargs)
        self.args.eval_do_concat_batches = False  # concatenation would pad all rows to the longest
        if self.args.train_sampling_strategy == "auto":
            self.args.train_sampling_strategy = "random" if self.speed.without_padding else "group_by_length"
        self.step_rows = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        if self.args.label_names is None:  # the signature of a wrapped model does not show label names
            self.label_names = ["labels"] if self.by_task else list(self.losses)
        for stock in (ProgressCallback, PrinterCallback):
            self.pop_callback(stock)
        self.add_callback(Progress)
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        for callback in (*callbacks(self.tuned), SetEpoch(self), RestoreState(self)):
            self.add_callback(callback)
        if self.old_task is not None:
            self.old_task.to(self.args.device)
        self.keep_numbers()
        self.check_fisher()
        self.regularise()
        self.choose_threshold()

    def quicken(self, args: TrainingArguments) -> Speed:
        """Make the model compute faster, and return how."""
        return apply(self.tuned, args)

    def merged(self, folder: str, save: bool) -> nn.Module:
        """Return the model as it is saved after training; see `common.tuning.tune.merge`."""
        return merge(self.tuned, folder, save)

    def train(self, *args, **kwargs) -> TrainOutput:
        """Train as `ExactResume.train`, and add the number of trained parameters to the metrics."""
        result = super().train(*args, **kwargs)
        trained = [value for value in self.model.parameters() if value.requires_grad]
        result.metrics["trainable_parameters"] = sum(value.numel() for value in trained)
        return result

    def init_hf_repo(self, *args, **kwargs) -> None:
        """Create the repository on the hub; raise `InputError` if that fails."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except (OSError, ValueError) as error:  # no network, not logged in, or no right to write there
            raise InputError(f"--push_to_hub: {one_line(error)}; log in first: hf auth login") from None

    def create_model_card(self, *args, **kwargs) -> None:
        """Draft a model card before a push to the hub, unless the recipe wrote one."""
        if not (self.args.folder / "README.md").exists():
            super().create_model_card(*args, **kwargs)
