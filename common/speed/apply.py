"""Make a model compute faster on this hardware, with the results of plain transformers."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from common.args import SpeedArguments, TrainingArguments
from common.errors import tell
from common.models.load import LoadedModel
from common.models.structure import output_embeddings, transformer_of
from common.speed.dropout import quick_functional_dropout, quicken_dropout
from common.speed.encoder_decoder import PaddingFreePairs
from common.speed.head import HeadAtLabels, read_first_tokens
from common.speed.padding_free import leave_out_padding, leaves_out_padding

#: names that configurations have for the dropout of attention
ATTENTION_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "dropout_rate", "attn_pdrop")
#: without attention dropout the kernel of SDPA is the faster one from this many tokens on
LONG = 256
#: how the names of decoders end; they have labels nearly everywhere
DECODERS = ("CausalLM", "LMHeadModel")
#: why a context of the forward pass is not entered: the backward pass computes layers again outside of it
RECOMPUTES = "--gradient_checkpointing computes layers twice"


@dataclass
class Speed:
    """The faster features applied to a model; empty under `--speed off`.

    Attributes:
        applied: names of the features that were applied, in order.
        fell_back: name of a feature that was not applied -> the reason.
        head: computes the head of a language model at the labels only; None if the head computes every position.
        pairs: leaves out the padding of an encoder-decoder in training; None if its layers compute padding.
    """

    applied: list[str] = field(default_factory=list)
    fell_back: dict[str, str] = field(default_factory=dict)
    head: HeadAtLabels | None = None
    pairs: PaddingFreePairs | None = None

    def note(self, name: str, reason: str | None) -> bool:
        """Record the feature `name` as applied, or with the reason why it was not; return whether it was."""
        if reason is None:
            self.applied.append(name)
        else:
            self.fell_back[name] = reason
        return reason is None

    @property
    def without_padding(self) -> bool:
        """Return whether the layers skip padding; rows of different lengths in a batch then cost nothing."""
        return "padding_free" in self.applied

    def at_labels(
        self, labels: Tensor, label_smoothing: float = 0.0, scores: bool = False
    ) -> AbstractContextManager[None]:
        """Compute the head of a language model only at labels, within a `with` block (see `HeadAtLabels.at`)."""
        return nullcontext() if self.head is None else self.head.at(labels, label_smoothing, scores)

    @contextmanager
    def training_pass(self, attention_mask: Tensor, labels: Tensor) -> Iterator[None]:
        """Let an encoder-decoder skip padding and use the faster dropout within a `with` block, if applied.

        Args:
            attention_mask: mask of the sources, (rows, length).
            labels: labels of the targets, (rows, length).
        """
        dropout = quick_functional_dropout() if "functional_dropout" in self.applied else nullcontext()
        with dropout, nullcontext() if self.pairs is None else self.pairs.at(attention_mask, labels):
            yield

    def record(self) -> dict[str, list[str] | dict[str, str]]:
        """Return `applied` and `fell_back` for `run.json`."""
        return {"applied": self.applied, "fell_back": self.fell_back}

    def line(self) -> str:
        """Return `applied` and `fell_back` as one line for the terminal."""
        if not self.applied:
            return "speed: plain transformers" + (f" ({self._reasons()})" if self.fell_back else "")
        rest = f"; not used: {self._reasons()}" if self.fell_back else ""
        return f"speed: same results faster by {', '.join(self.applied)} (--speed off: without){rest}"

    def _reasons(self) -> str:
        return ", ".join(f"{name}: {reason}" for name, reason in self.fell_back.items())


def apply(loaded: LoadedModel, args: SpeedArguments) -> Speed:
    """Change `loaded.model` to compute faster. Results agree with the plain model to rounding.

    Call it after `common.tuning.tune`. Each feature is applied to the model types that a test compares with plain
    transformers. Before training, one line lists the applied features.

    Args:
        loaded: the model; wrapped by peft or not.
        args: `speed` turns everything off; training arguments also select attention, dropout and losses.

    Returns:
        The applied features, and the others with the reason.
    """
    speed = Speed()
    if args.speed == "off":
        return speed
    plain = loaded.model.get_base_model() if isinstance(loaded.model, PeftModel) else loaded.model
    if not torch.accelerator.is_available():
        _apply_to_layers(speed, loaded, plain, args)
    if isinstance(plain, PreTrainedModel) and output_embeddings(plain) is not None:
        _apply_to_head(speed, plain, args)
    if isinstance(args, TrainingArguments):
        tell(speed.line())
    return speed


def _apply_to_layers(speed: Speed, loaded: LoadedModel, plain: nn.Module, args: SpeedArguments) -> None:
    """Choose the kernel of attention, skip padding, and use the faster dropout; on a CPU only."""
    training = args if isinstance(args, TrainingArguments) else None
    transformer = transformer_of(plain)
    both_sides = transformer.config.is_encoder_decoder
    eager = False
    reason: str | None
    if training is not None and loaded.attn_implementation is None and not leaves_out_padding(transformer):
        eager = _choose_kernel(transformer, loaded.read_length or LONG)
    if isinstance(loaded.model, PeftModel) and loaded.model.active_peft_config.is_prompt_learning:
        reason = "batches lack the virtual tokens"
    elif both_sides:
        reason = _leave_out_padding_of_pairs(speed, loaded, plain, training) if training else "generation keeps padding"
    elif loaded.attn_implementation is not None:
        reason = f"attn_implementation is {loaded.attn_implementation}"
    else:
        reason = leave_out_padding(plain)
    if speed.note("padding_free", reason) and type(plain).__name__.endswith("ForSequenceClassification"):
        speed.note("last_layer_at_first_token", read_first_tokens(plain))
    if eager and not speed.without_padding:
        speed.note("eager_attention", None)
    quicken_dropout(loaded.model)
    speed.note("dropout", None)
    if training is not None and both_sides:
        speed.note("functional_dropout", RECOMPUTES if training.gradient_checkpointing else None)


def _leave_out_padding_of_pairs(
    speed: Speed, loaded: LoadedModel, plain: nn.Module, args: TrainingArguments
) -> str | None:
    """Leave out the padding of an encoder-decoder; return why not, or None."""
    if args.gradient_checkpointing:
        return RECOMPUTES
    if loaded.source is None:
        return "batches of a new model have little padding"
    pairs = PaddingFreePairs(plain)
    speed.pairs = pairs if pairs.reason is None else None
    return pairs.reason


def _choose_kernel(transformer: PreTrainedModel, length: int) -> bool:
    """Use eager attention if it is the faster kernel on a CPU; return whether it is used.

    On a CPU SDPA has no fast kernel with attention dropout, and a step with eager attention is 1.1 to 1.5 times as fast
    in bfloat16. Without dropout SDPA is faster on long rows. `python -m tests.benchmarks.attention` measures it.
    """
    # the configuration of an encoder-decoder of two models contains theirs
    parts = [transformer.config, *(v for v in vars(transformer.config).values() if isinstance(v, PretrainedConfig))]
    rates = [vars(part).get(name) for part in parts for name in ATTENTION_DROPOUTS]
    dropout = max((rate for rate in rates if isinstance(rate, float)), default=0.0)
    eager = dropout > 0 or length < LONG
    if eager:
        transformer.set_attn_implementation("eager")
    return eager


def _apply_to_head(speed: Speed, plain: PreTrainedModel, args: SpeedArguments) -> None:
    """Compute the head of a language model at labels only, and losses in place of scores in training."""
    both_sides = plain.config.is_encoder_decoder
    if is_deepspeed_zero3_enabled():
        speed.note("head_at_labels", "DeepSpeed shards the weights")
        return
    if both_sides and torch.accelerator.is_available():
        speed.note("head_at_labels", "measured on CPUs only")
        return
    training = args if isinstance(args, TrainingArguments) else None
    chunk = getattr(args, "loss_chunk", None)
    needed = None  # why the scores of the vocabulary are needed
    if training is not None and (training.r_drop or training.keep == "lwf"):
        needed = f"{'--r_drop' if training.r_drop else '--keep lwf'} compares scores"
    losses = training is not None and needed is None and (both_sides or chunk is not None)
    head = HeadAtLabels(plain, losses, chunk)
    if not speed.note("head_at_labels", head.reason):
        return
    speed.head = head
    if leaves_out_padding(plain) and not type(plain).__name__.endswith(DECODERS):
        speed.note("last_layer_at_labels", head.last_layer_reason)
    if training is not None:
        speed.note("head_losses", needed or head.losses_reason)
