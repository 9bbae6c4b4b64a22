"""Compute the head of a model at selected positions only: a language model at its labels.

An encoder without padding (`common.speed.padding_free`) computes its last layer at these positions only as well.
`tests/benchmarks/LOG.md` has the gains.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from common.errors import one_line
from common.models.structure import input_embeddings, transformer_of, watch
from common.models.trial import FAILURES, trial
from common.speed.padding_free import PackedBatch, leaves_out_padding, model_types, packed_batch, untested

#: model types whose head may compute labels only; a test compares each with plain transformers
HEAD_AT_LABELS = frozenset(
    {
        "albert", "bart", "bert", "biogpt", "bloom", "camembert", "data2vec-text", "deberta", "deberta-v2",
        "distilbert", "electra", "encoder-decoder", "ernie", "gemma", "gpt2", "gpt_neox", "llama", "m2m_100", "marian",
        "mbart", "megatron-bert", "mistral", "modernbert", "mpnet", "mt5", "olmo2", "pegasus", "phi", "qwen2", "qwen3",
        "rembert", "roberta", "roberta-prelayernorm", "smollm3", "t5", "xglm", "xlm-roberta", "xlm-roberta-xl",
    }
)  # fmt: skip
#: model types of these that add another bias to the scores of the last linear layer
BIAS_AFTER_HEAD = frozenset({"bart", "marian", "mbart", "pegasus"})
#: model types whose last layer may compute only what the head reads; a test compares each with plain transformers
LAST_LAYER = frozenset(
    {
        "bert", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "roberta", "xlm-roberta",
    }
)  # fmt: skip

#: labels whose scores are in memory at a time on a CPU; more do not fit into the cache
LABELS_TOGETHER = 128
#: the number of labels is rounded up to this multiple: each new shape of matrices costs time and memory
LABEL_MULTIPLE = 64
#: last dimension of a head that returns loss and hit of each label; every vocabulary is larger
LOSS_AND_HIT = 2


class HeadAtLabels:
    """Compute the head of a language model only where a batch has labels.

    A forward hook selects the vectors at the labels from the output of the Transformer. The last linear layer may give
    the losses of these labels instead of their scores. Each change is made only if it agrees with the plain model on a
    test batch.

    Attributes:
        reason: why the head computes every position; None if it computes labels only.
        losses_reason: why the last linear layer gives scores; None if it gives losses.
        last_layer_reason: why the last layer computes every position; None if it computes labels only.
    """

    def __init__(self, model: PreTrainedModel, losses: bool = False, chunk: int | None = None):
        """Install the hooks.

        Args:
            model: the language model, without a wrapper of peft.
            losses: whether the last linear layer may give losses.
            chunk: labels whose scores are in memory at a time, forward and backward; None for all of a batch.
        """
        self._chunk, self._gives_losses, self._taken = chunk, False, False
        self._positions: Tensor | None = None
        self._labels: Tensor | None = None
        self._smoothing = 0.0
        self._body = _body(model)
        self._layer = model.get_output_embeddings()
        self.losses_reason: str | None = "scores are needed at every position"
        self.last_layer_reason: str | None = self.losses_reason
        self.reason = untested(model, HEAD_AT_LABELS)
        if self.reason is not None:
            return
        self.reason = self._try(model, lambda: self._body.register_forward_hook(self._select))
        if self.reason is not None:
            return
        self.last_layer_reason = self._begin_in_last_layer(model)
        self.losses_reason = self._give_losses(model) if losses else "scores are needed"

    @contextmanager
    def at(self, labels: Tensor, label_smoothing: float = 0.0, scores: bool = False) -> Iterator[None]:
        """Compute the head only where `labels` is not -100, within a `with` block.

        The logits are then scores, of shape (1, labels, classes). If the head gives losses, they have shape
        (1, labels, 2): the loss, and 1 if the label has the highest score, else 0; in training on a CPU always 0.

        Args:
            labels: of shape (rows, length); for an encoder-decoder those of the decoder.
            label_smoothing: weight spread over all classes.
            scores: return scores in any case.
        """
        if self.reason is None:
            chosen = labels != -100
            self._positions = chosen.flatten().nonzero()[:, 0]
            self._labels = labels[chosen] if self._gives_losses and not scores else None
            self._smoothing = label_smoothing
        try:
            yield
        finally:
            self._positions = self._labels = None
            self._taken = False

    def _select(self, module: nn.Module, args: tuple, output: tuple | ModelOutput) -> tuple | ModelOutput:
        if self._positions is None:
            return output
        selected = output[0].flatten(0, 1)
        if not self._taken:
            selected = selected.index_select(0, self._positions)
        self._taken, selected = False, selected[None]
        if isinstance(output, tuple):
            return (selected, *output[1:])
        output[next(iter(output))] = selected
        return output

    def _begin_in_last_layer(self, model: PreTrainedModel) -> str | None:
        if not leaves_out_padding(model):
            return "the layers compute padding"
        ids = torch.randint(
            0, transformer_of(model).config.vocab_size, (3, 13), generator=torch.Generator().manual_seed(0)
        )
        mask = (torch.arange(13) < torch.tensor([[5], [13], [7]])).long()
        labels = ids.masked_fill(mask * ids % 3 != 1, -100)

        def run() -> list[Tensor]:
            with self.at(labels):
                return [
                    value for value in model(input_ids=ids, attention_mask=mask).values() if isinstance(value, Tensor)
                ]

        return limit_last_layer(model, self._packed_positions, run)

    def _packed_positions(self, batch: PackedBatch) -> Tensor | None:
        if self._positions is None:
            return None
        self._taken = True
        return batch.packed_of_padded[self._positions]

    def _give_losses(self, model: PreTrainedModel) -> str | None:
        if BIAS_AFTER_HEAD & model_types(model):
            return "the model adds a bias to the scores"
        self._scores = self._layer.forward

        def install() -> None:
            self._layer.forward = self._losses
            self._gives_losses = True

        reason = self._try(model, install)
        self._gives_losses = reason is None
        return reason

    def _losses(self, vectors: Tensor) -> Tensor:
        if self._labels is None:
            return self._scores(vectors)
        chunk = self._chunk or max(1, len(self._labels))
        parts = list(zip(vectors[0].split(chunk), self._labels.split(chunk), strict=True))
        if len(parts) == 1:  # all scores are in memory at once in any case
            return self._losses_and_hits(*parts[0], self._smoothing)[None]
        chunks = [checkpoint(self._losses_and_hits, *part, self._smoothing, use_reentrant=False) for part in parts]
        return torch.cat(chunks)[None]

    def _losses_and_hits(self, vectors: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        if torch.is_grad_enabled() and vectors.device.type == "cpu" and type(self._layer) is nn.Linear:
            losses = head_losses(self._layer, vectors, labels, smoothing)
            return torch.stack([losses, torch.zeros_like(losses)], 1)
        scores = self._scores(vectors).float()
        losses = F.cross_entropy(scores, labels, reduction="none", label_smoothing=smoothing)
        return torch.stack([losses, (scores.argmax(-1) == labels).float()], 1)

    def _try(self, model: PreTrainedModel, install: Callable[[], object]) -> str | None:
        """Try a change on a test batch, and make it if the losses agree with those of scores at every position.

        Returns:
            Why the change was not made; None if it was.
        """
        random = torch.Generator().manual_seed(0)
        size = self._body.config.vocab_size
        ids, labels = (torch.randint(0, size, (3, 13), generator=random) for _ in range(2))
        chosen = torch.zeros(3, 13, dtype=torch.bool)
        chosen[[0, 0, 1, 2, 2], [1, 12, 5, 0, 7]] = True
        ids, labels = ids.to(model.device), labels.masked_fill(~chosen, -100).to(model.device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.config.is_encoder_decoder:
            inputs["input_ids"] = ids % input_embeddings(model).num_embeddings
            inputs |= {"decoder_input_ids": ids, "use_cache": False}
        try:
            with trial(model):
                expected = losses_at_labels(scores_of(model(**inputs)), labels, 0.1)
                install()
                with self.at(labels, 0.1):
                    output = scores_of(model(**inputs))
                losses = losses_at_labels(output, labels, 0.1)
        except FAILURES as error:
            return f"fails on a test batch: {one_line(error)[:100]}"
        shape = (1, int(chosen.sum()), LOSS_AND_HIT if self._gives_losses else size)
        if output.shape != shape or not torch.allclose(losses, expected, 1e-4, 1e-4):
            return "results differ on a test batch"
        install()
        return None


def _body(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of `model` whose first output its head reads."""
    return transformer_of(model.get_decoder() if model.config.is_encoder_decoder else model)


# The last layer


def read_first_tokens(model: nn.Module) -> str | None:
    """Let the last layer of a sequence classifier compute the first token of each row only.

    Returns:
        Why the last layer computes every token; None if it computes first tokens only.
    """
    if not leaves_out_padding(model):
        return "the layers compute padding"
    ids = torch.randint(0, transformer_of(model).config.vocab_size, (3, 13), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(13) < torch.tensor([[5], [13], [2]])).long()
    return limit_last_layer(model, first_tokens, lambda: [model(input_ids=ids, attention_mask=mask).logits])


def first_tokens(batch: PackedBatch) -> Tensor:
    """Return the places of the first token of each row among the packed tokens."""
    return batch.firsts


def limit_last_layer(
    model: nn.Module, choose: Callable[[PackedBatch], Tensor | None], run: Callable[[], list[Tensor]]
) -> str | None:
    """Let the last layer of a model without padding compute chosen tokens only. Keys and values are of all tokens.

    The head then gets each chosen token as a row of one token, of shape (n, 1, width).

    Args:
        model: a model that `common.speed.padding_free.leave_out_padding` has changed.
        choose: returns the places of the chosen tokens among the packed ones; None for all.
        run: returns the outputs of the model for a test batch.

    Returns:
        Why the last layer computes every token; None if it computes chosen tokens only.
    """
    reason = untested(model, LAST_LAYER)
    if reason is not None:
        return reason
    last = watch(model, pooling=True)[-1]
    layer, attention = model.get_submodule(last.name), model.get_submodule(last.attention[-1])
    if any(getattr(hook, "func", None) is take_chosen for hook in layer._forward_pre_hooks.values()):
        return "an earlier trainer of this model limits it"

    def install() -> None:
        layer.register_forward_pre_hook(partial(take_chosen, choose), with_kwargs=True)
        attention.register_forward_pre_hook(_attend_to_whole, with_kwargs=True)
        attention.register_forward_hook(_keep_chosen, with_kwargs=True)

    try:
        with trial(model):
            expected = run()
            install()
            outputs = run()
    except FAILURES as error:
        return f"fails on a test batch: {one_line(error)[:100]}"
    for one, other in zip(expected, outputs, strict=True):
        if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
            return "the head reads other tokens"
    install()
    return None


def take_chosen(choose: Callable[[PackedBatch], Tensor | None], layer: nn.Module, args: tuple, kwargs: dict):
    """Cut the input of the last layer down to the tokens that `choose` returns."""
    batch = packed_batch(args, kwargs)
    if batch is None:
        return None
    batch.chosen = choose(batch)
    if batch.chosen is None:
        return None
    batch.whole = args[0]
    return (args[0].index_select(1, batch.chosen), *args[1:]), kwargs


# The batch keeps the whole input, because checkpointed attention runs again in the backward pass without the hooks of
# the layer.


def _attend_to_whole(attention: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
    batch = packed_batch(args, kwargs)
    if batch is None or batch.chosen is None:
        return None
    batch.firsts_only = batch.chosen is batch.firsts
    return (batch.whole, *args[1:]), kwargs


def _keep_chosen(attention: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple:
    batch = packed_batch(args, kwargs)
    if batch is None or batch.chosen is None:
        return output
    batch.firsts_only = False
    return output[0].index_select(1, batch.chosen), *output[1:]


# Losses


def head_losses(layer: nn.Linear, vectors: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross-entropy (n,) of labels (n,) from vectors (n, width) and the last linear layer.

    The scores of `LABELS_TOGETHER` labels are in memory at a time. Only the gradients of all scores are kept.
    """
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else vectors.dtype
    more = -len(labels) % LABEL_MULTIPLE
    padded = F.pad(vectors, (0, 0, 0, more)), F.pad(labels, (0, more))
    return _HeadLosses.apply(padded[0], layer.weight, layer.bias, padded[1], label_smoothing, kind)[: len(labels)]


class _HeadLosses(torch.autograd.Function):
    """Compute cross-entropy of labels (n,) from vectors (n, width), weight (classes, width) and bias of the last layer.

    Products have type `kind`, all else is float32. The forward pass computes the gradients of the scores while the
    scores are in the cache, and keeps the gradients in `kind`.
    """

    @staticmethod
    def forward(
        ctx, vectors: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float, kind: torch.dtype
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            cast, turned = vectors.to(kind), weight.to(kind).t()
            gradients = torch.empty(len(labels), len(weight), dtype=kind)
            losses = []
            for start in range(0, len(labels), LABELS_TOGETHER):
                part = slice(start, start + LABELS_TOGETHER)
                scores = cast[part] @ turned
                if bias is not None:
                    scores = scores + bias.to(kind)
                logs = scores.float().log_softmax(-1)
                wanted = labels[part, None]
                own = logs.gather(1, wanted)[:, 0]
                losses.append(-own if not smoothing else (smoothing - 1) * own - smoothing * logs.mean(-1))
                logs.exp_()
                if smoothing:
                    logs.sub_(smoothing / len(weight))
                logs.scatter_add_(1, wanted, torch.full_like(wanted, smoothing - 1, dtype=logs.dtype))
                gradients[part] = logs
        ctx.save_for_backward(cast, weight, gradients)
        ctx.kind = kind
        return torch.cat(losses) if losses else vectors.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        cast, weight, gradients = ctx.saved_tensors
        scale = gradient[:, None]
        wanted = ctx.needs_input_grad
        of_vectors = (gradients @ weight.to(ctx.kind)).float() * scale if wanted[0] else None
        scale = scale.to(ctx.kind)
        of_weight = (gradients.t() @ (cast * scale)).to(weight.dtype) if wanted[1] else None
        of_bias = (gradients.t() @ scale)[:, 0].to(weight.dtype) if wanted[2] else None
        return of_vectors, of_weight, of_bias, None, None, None


def scores_of(output: ModelOutput) -> Tensor:
    """Return the scores of the vocabulary in the output of a model."""
    return output["prediction_logits"] if "prediction_logits" in output else output["logits"]


def losses_at_labels(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross-entropy of each label, in the shape of `labels` (rows, length); 0 where the label is -100.

    Args:
        logits: scores of every position, (rows, length, classes), or the output of a model within `HeadAtLabels.at`.
        labels: (rows, length).
        label_smoothing: weight spread over all classes; losses of `HeadAtLabels.at` include it already.
    """
    at = labels != -100
    if logits.shape[-1] == LOSS_AND_HIT:
        losses = logits[0, :, 0]
    else:
        scores = logits[at] if logits.shape[:-1] == labels.shape else logits[0]
        losses = F.cross_entropy(scores.float(), labels[at], reduction="none", label_smoothing=label_smoothing)
    return torch.zeros(labels.shape, dtype=losses.dtype, device=losses.device).masked_scatter(at, losses)


def hits_at_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the labels of each row that have the highest score; shape (rows,). Arguments as for `losses_at_labels`."""
    at = labels != -100
    if logits.shape[-1] == LOSS_AND_HIT:
        hits = logits[0, :, 1].long()
    else:
        scores = logits[at] if logits.shape[:-1] == labels.shape else logits[0]
        hits = (scores.argmax(-1) == labels[at]).long()
    return torch.zeros(labels.shape, dtype=torch.int64, device=hits.device).masked_scatter(at, hits).sum(1)
