"""Make a model compute faster on this hardware, wherever a test batch shows that its results stay the same."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.args import SpeedArguments, TrainingArguments
from common.models.load import LoadedModel
from common.models.structure import output_embeddings, transformer_of
from common.speed.dropout import quick_functional_dropout, quicken_dropout
from common.speed.head import HeadLosses, Selection
from common.speed.linear import quicken_linear
from common.speed.padding_free import UnpaddedPairs, leave_out_padding

#: names that configurations have for the dropout of attention
ATTENTION_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "dropout_rate", "attn_pdrop")
#: without attention dropout the kernel of SDPA is the faster one from this many tokens on
LONG = 256


@dataclass
class Speed:
    """What computes faster in a model. It is empty under `--speed off`.

    Attributes:
        applied: names of what was applied, in order.
        fell_back: name of what was not applied -> the reason.
    """

    applied: list[str] = field(default_factory=list)
    fell_back: dict[str, str] = field(default_factory=dict)
    selection: Selection | None = None
    head: HeadLosses | None = None
    pairs: UnpaddedPairs | None = None
    functional_dropout: bool = False

    def note(self, name: str, works: bool, reason: str) -> bool:
        """Record whether `name` was applied, or else the reason; returns `works`."""
        if works:
            self.applied.append(name)
        else:
            self.fell_back[name] = reason
        return works

    @property
    def without_padding(self) -> bool:
        """Whether the layers compute no padding, so that rows of different length in one batch cost nothing."""
        return "padding_free" in self.applied

    @contextmanager
    def at_labels(self, labels: Tensor, scores: bool = False) -> Iterator[None]:
        """Within it the head of a language model sees only the positions that have a label (see `Selection.at`)."""
        with nullcontext() if self.selection is None else self.selection.at(labels, scores):
            yield


def apply(loaded: LoadedModel, args: SpeedArguments) -> Speed:
    """Change `loaded.model` so that it computes faster. Results agree with the plain model to rounding.

    Call it after `common.tuning.tune`. Each way is tried on a test batch, and used only if the results agree.

    Args:
        loaded: the model; wrapped by peft or not.
        args: `speed` decides. Of the arguments of a training `r_drop` and `loss_chunk` are read as well.

    Returns:
        What was applied, and what was not, with the reason.
    """
    speed = Speed()
    if args.speed == "off":
        return speed
    plain = loaded.model.get_base_model() if isinstance(loaded.model, PeftModel) else loaded.model
    transformer = transformer_of(plain)
    virtual = isinstance(loaded.model, PeftModel) and loaded.model.active_peft_config.is_prompt_learning
    training = isinstance(args, TrainingArguments)
    r_drop = training and args.r_drop > 0
    on_cpu = not torch.accelerator.is_available()
    if on_cpu:
        if loaded.attn_implementation is None:
            if training:
                _choose_kernel(transformer, loaded.read_length or LONG)
            if not virtual and not transformer.config.is_encoder_decoder and isinstance(plain, PreTrainedModel):
                speed.note("padding_free", leave_out_padding(plain), f"{transformer.config.model_type}: results differ")
        quicken_dropout(loaded.model)
        if isinstance(plain, PreTrainedModel):
            quicken_linear(plain)
        speed.applied.append("dropout")
    if output_embeddings(plain) is None:
        return speed
    if transformer.config.is_encoder_decoder:
        if on_cpu:
            speed.functional_dropout = True
            if not r_drop:  # it compares the scores
                head = HeadLosses(plain)
                speed.head = head if speed.note("head_at_labels", head.works, "losses differ") else None
            if not virtual and loaded.pretrained:
                pairs = UnpaddedPairs(plain)
                speed.pairs = pairs if speed.note("padding_free", pairs.works, "results differ") else None
    else:
        speed.selection = Selection(plain, None if r_drop else getattr(args, "loss_chunk", None))
        speed.note("head_at_labels", speed.selection.works, "the head reads more than one position")
    return speed


def _choose_kernel(transformer: nn.Module, length: int) -> None:
    """Take eager attention where it is the faster kernel of a CPU.

    SDPA has no fast kernel with attention dropout there, and eager attention takes 1.1 to 1.5 times less a step in
    bfloat16; without dropout SDPA wins on long rows. `python -m tests.benchmarks.attention` measures it.
    """
    values = vars(transformer.config)
    dropout = max((values[name] for name in ATTENTION_DROPOUTS if isinstance(values.get(name), float)), default=0.0)
    if dropout or length < LONG:
        transformer.set_attn_implementation("eager")


@contextmanager
def training_pass(speed: Speed, inputs: dict[str, Tensor], label_smoothing: float, recomputes: bool) -> Iterator[None]:
    """Within it an encoder-decoder computes the loss of a training batch faster.

    Args:
        speed: what `apply` returned.
        inputs: the batch.
        label_smoothing: weight spread over all classes.
        recomputes: whether activations are computed again on the way back, outside of this context.
    """
    dropout = quick_functional_dropout() if speed.functional_dropout and not recomputes else nullcontext()
    padding_free = speed.pairs is not None and not recomputes
    pairs = speed.pairs.at(inputs["attention_mask"], inputs["labels"]) if padding_free else nullcontext()
    head = nullcontext() if speed.head is None else speed.head.at(inputs["labels"], label_smoothing)
    with dropout, pairs, head:
        yield
