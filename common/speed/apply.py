"""Make a model compute faster on this hardware, with the results of plain transformers."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from common.args import SpeedArguments, TrainingArguments
from common.errors import tell
from common.models.load import LoadedModel
from common.models.structure import output_embeddings, transformer_of
from common.speed.dropout import quick_functional_dropout, quicken_dropout
from common.speed.head import HeadAtLabels, read_first_tokens
from common.speed.padding_free import leave_out_padding

#: names that configurations have for the dropout of attention
ATTENTION_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "dropout_rate", "attn_pdrop")
#: without attention dropout the kernel of SDPA is the faster one from this many tokens on
LONG = 256


@dataclass
class Speed:
    """What computes faster in a model. It is empty under `--speed off`.

    Attributes:
        applied: names of the features that were applied, in order.
        fell_back: name of a feature that was not applied -> the reason.
        head: computes the head of a language model at the labels only; None if the head computes every position.
    """

    applied: list[str] = field(default_factory=list)
    fell_back: dict[str, str] = field(default_factory=dict)
    head: HeadAtLabels | None = None

    def note(self, name: str, reason: str | None) -> bool:
        """Record the feature `name` as applied, or with the reason why it was not; return whether it was."""
        if reason is None:
            self.applied.append(name)
        else:
            self.fell_back[name] = reason
        return reason is None

    @property
    def without_padding(self) -> bool:
        """Whether the layers compute no padding, so that rows of different length in one batch cost nothing."""
        return "padding_free" in self.applied

    def at_labels(
        self, labels: Tensor, label_smoothing: float = 0.0, scores: bool = False
    ) -> AbstractContextManager[None]:
        """Within it the head of a language model computes only where there are labels (see `HeadAtLabels.at`)."""
        return nullcontext() if self.head is None else self.head.at(labels, label_smoothing, scores)

    def functional_dropout(self) -> AbstractContextManager[None]:
        """Within it `torch.nn.functional.dropout` is the faster dropout, if that was applied."""
        return quick_functional_dropout() if "functional_dropout" in self.applied else nullcontext()

    def record(self) -> dict[str, list[str] | dict[str, str]]:
        """Return `applied` and `fell_back` for `run.json`."""
        return {"applied": self.applied, "fell_back": self.fell_back}

    def line(self) -> str:
        """Return `applied` and `fell_back` as one line for the terminal."""
        fell_back = ", ".join(f"{name} ({reason})" for name, reason in self.fell_back.items())
        return f"speed: {', '.join(self.applied) or 'nothing applied'}" + (f"; not {fell_back}" if fell_back else "")


def apply(loaded: LoadedModel, args: SpeedArguments) -> Speed:
    """Change `loaded.model` so that it computes faster. Results agree with the plain model to rounding.

    Call it after `common.tuning.tune`. Each feature is applied to the model types that a test compares with plain
    transformers. Before training, one line says what was applied.

    Args:
        loaded: the model; wrapped by peft or not.
        args: `speed` decides. Training arguments decide on attention, dropout and losses as well.

    Returns:
        What was applied, and what was not, with the reason.
    """
    speed = Speed()
    if args.speed == "off":
        return speed
    plain = loaded.model.get_base_model() if isinstance(loaded.model, PeftModel) else loaded.model
    training = isinstance(args, TrainingArguments)
    if not torch.accelerator.is_available():
        _apply_to_layers(speed, loaded, plain, training)
        if training and transformer_of(plain).config.is_encoder_decoder:
            recomputes = "--gradient_checkpointing draws it again" if args.gradient_checkpointing else None
            speed.note("functional_dropout", recomputes)
    if output_embeddings(plain) is not None:
        _apply_to_head(speed, plain, args)
    if training:
        tell(speed.line())
    return speed


def _apply_to_layers(speed: Speed, loaded: LoadedModel, plain: nn.Module, training: bool) -> None:
    """Leave out padding, choose the kernel of attention, and take the faster dropout: on a CPU alone."""
    if loaded.attn_implementation is not None:
        reason = f"attn_implementation is {loaded.attn_implementation}"
    elif isinstance(loaded.model, PeftModel) and loaded.model.active_peft_config.is_prompt_learning:
        reason = "virtual tokens are in no batch"
    else:
        reason = leave_out_padding(plain)
    if speed.note("padding_free", reason) and type(plain).__name__.endswith("ForSequenceClassification"):
        speed.note("last_layer_at_first_token", read_first_tokens(plain))
    if training and not speed.without_padding and loaded.attn_implementation is None:
        _choose_kernel(speed, transformer_of(plain), loaded.read_length or LONG)
    quicken_dropout(loaded.model)
    speed.note("dropout", None)


def _choose_kernel(speed: Speed, transformer: nn.Module, length: int) -> None:
    """Take eager attention where it is the faster kernel of a CPU.

    SDPA has no fast kernel with attention dropout there, and eager attention takes 1.1 to 1.5 times less a step in
    bfloat16; without dropout SDPA wins on long rows. `python -m tests.benchmarks.attention` measures it.
    """
    values = vars(transformer.config)
    dropout = max((values[name] for name in ATTENTION_DROPOUTS if isinstance(values.get(name), float)), default=0.0)
    if dropout or length < LONG:
        transformer.set_attn_implementation("eager")
        speed.note("eager_attention", None)


def _apply_to_head(speed: Speed, plain: nn.Module, args: SpeedArguments) -> None:
    """Compute the head of a language model at labels, and in training its losses in place of its scores."""
    both_sides = plain.config.is_encoder_decoder
    if is_deepspeed_zero3_enabled():
        speed.note("head_at_labels", "DeepSpeed shards the weights")
        return
    if both_sides and torch.accelerator.is_available():
        speed.note("head_at_labels", "measured on CPUs only")
        return
    training = isinstance(args, TrainingArguments)
    chunk = getattr(args, "loss_chunk", None)
    losses = training and not args.r_drop and (both_sides or chunk is not None)
    head = HeadAtLabels(plain, losses, chunk)
    if not speed.note("head_at_labels", head.reason):
        return
    speed.head = head
    if speed.without_padding:
        speed.note("last_layer_at_labels", head.last_layer_reason)
    if training:
        speed.note("head_losses", head.losses_reason if not args.r_drop else "--r_drop compares scores")
