"""Compute the head of a model at the labels only."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from common.errors import tell
from common.speed.padding_free import PackedBatch, compute_chosen_only, leaves_out_padding

#: labels whose scores of the vocabulary exist at a time: so many stay in the cache
LABELS_TOGETHER = 128
#: their number is filled up to a multiple of this
LABEL_MULTIPLE = 64


class HeadLosses:
    """Lets the last layer of an encoder-decoder, which scores the vocabulary, give the losses of labels instead.

    Of `LABELS_TOGETHER` labels at a time, none at padding: of all labels of a batch the scores, their logarithms and
    the gradients of both, in float32, take several times as long to write and read as to compute. `works` tells whether
    that gives the losses of a test batch that the model's scores give, and so whether `at` may be used.
    """

    def __init__(self, model: PreTrainedModel):
        self.labels: Tensor | None = None
        self.label_smoothing = 0.0
        layer = model.get_output_embeddings()
        self.works = type(layer) is nn.Linear and layer.in_features < layer.out_features
        if self.works:
            self._layer, self._scores = layer, layer.forward
            layer.forward = self._forward
            self.works = self._gives_the_same(model)
            if not self.works:
                layer.forward = self._scores

    @contextmanager
    def at(self, labels: Tensor, label_smoothing: float = 0.0) -> Iterator[None]:
        """Within it the model's logits are the losses of `labels` (rows, length), of shape (rows, length, 1)."""
        self.labels, self.label_smoothing = labels, label_smoothing
        try:
            yield
        finally:
            self.labels = None

    def _forward(self, vectors: Tensor) -> Tensor:
        if self.labels is None:
            return self._scores(vectors)
        chosen = (self.labels != -100).flatten().nonzero()[:, 0]
        labels = self.labels.flatten()[chosen]
        picked = vectors.flatten(0, 1).index_select(0, chosen)
        found = head_losses(self._layer, picked, labels, self.label_smoothing)
        losses = found.new_zeros(self.labels.numel()).index_copy(0, chosen, found)
        return losses.view(*self.labels.shape, 1)

    def _gives_the_same(self, model: PreTrainedModel) -> bool:
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.get_output_embeddings().out_features, (3, 2, 9), generator=random)
        labels = ids[2].masked_fill(torch.arange(9) > torch.tensor([[8], [4]]), -100)
        inputs = {"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0]), "decoder_input_ids": ids[1]}
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                scores = model(**inputs, use_cache=False).logits.flatten(0, 1)
                with self.at(labels, 0.1):
                    found = model(**inputs, use_cache=False).logits
            expected = F.cross_entropy(scores.float(), labels.flatten(), reduction="none", label_smoothing=0.1)
            return found.shape == (*labels.shape, 1) and torch.allclose(found.flatten(), expected, 1e-4, 1e-4)
        except Exception:  # whatever it is, this architecture cannot
            return False
        finally:
            model.train(training)


def head_losses(layer: nn.Linear, vectors: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy (n,) of labels (n,), none of them padding, by the scores that `layer` gives vectors (n, width).

    The scores of `LABELS_TOGETHER` labels exist at a time. Of all of them only the gradients are kept.
    """
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else vectors.dtype
    # a number that recurs, as each new shape of matrices costs time and memory
    more = -len(labels) % LABEL_MULTIPLE
    padded = F.pad(vectors, (0, 0, 0, more)), F.pad(labels, (0, more))
    return _HeadLosses.apply(padded[0], layer.weight, layer.bias, padded[1], label_smoothing, kind)[: len(labels)]


class _HeadLosses(torch.autograd.Function):
    """Cross-entropy of labels (n,) from vectors (n, width), the weight (classes, width) and bias of the last layer.

    Products are of type `kind`, the rest is float32. The gradients of the scores are found on the way forth, while
    these are at hand, and kept in `kind`.
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


class Selection:
    """Lets the head of a model see only the vectors at chosen positions: its cost falls with their number.

    It takes them from what the encoder gives out, and knows no model by name. `works` tells whether, on a test batch,
    the head then gives the scores that it gives at these positions of a whole batch. Where it does not, as with a head
    that looks at neighbours, nothing is changed.

    With `chunk` the last layer, which scores the vocabulary, also takes only so many vectors at a time, and gives their
    losses instead of their scores: those of more vectors never exist at once, neither on the way forth nor back.
    `chunked` tells whether that works.
    """

    def __init__(self, model: PreTrainedModel, chunk: int | None = None):
        self.positions: Tensor | None = None
        self.labels: Tensor | None = None
        self.chunk, self.label_smoothing = chunk, 0.0
        self.works = self.chunked = self._taken = False
        if model.base_model is not model:
            hook = model.base_model.register_forward_hook(self._select)
            self.works = self._gives_the_same(model)
            if not self.works:
                hook.remove()
        if self.works and leaves_out_padding(model):
            self._begin_in_the_last_layer(model)
        if chunk and self.works and model.get_output_embeddings() is not None:
            self._head = model.get_output_embeddings()
            self._scores = self._head.forward
            self._head.forward = self._losses
            self.chunked = self._gives_the_same(model)
            if not self.chunked:
                self._head.forward = self._scores

    def make_way(self, model: nn.Module) -> None:
        """Give up `chunked` where tuning has put a layer of its own around the last one of `model`, or in its place."""
        if self.chunked and model.get_output_embeddings() is not self._head:
            tell("the layer that scores the vocabulary is tuned as well: the scores of a whole batch exist at once")
            self._head.forward = self._scores
            self.chunked = False

    @contextmanager
    def at(self, labels: Tensor, scores: bool = False) -> Iterator[None]:
        """Within it the head sees the n vectors where `labels` (rows, length) is not -100.

        It gives scores (1, n, classes), or if `chunked` and no `scores` are asked for, losses and hits (1, n, 2); hits
        are 0 or 1, and 0 in a training on a CPU, which needs none.
        """
        chosen = labels != -100
        self.positions = chosen.flatten().nonzero()[:, 0] if self.works else None
        self.labels = labels[chosen] if self.chunked and not scores else None
        try:
            yield
        finally:
            self.positions = self.labels = None

    def _select(self, module: nn.Module, args: tuple, output):
        if self.positions is None:
            return output
        picked = output[0].flatten(0, 1)
        if not self._taken:
            picked = picked.index_select(0, self.positions)
        self._taken, picked = False, picked[None]
        if isinstance(output, tuple):
            return (picked, *output[1:])
        output[next(iter(output))] = picked
        return output

    def _begin_in_the_last_layer(self, model: PreTrainedModel) -> None:
        """Let the last layer compute chosen positions only as well, where nothing else of the output changes."""
        ids = torch.randint(0, model.config.vocab_size, (3, 13), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": (torch.arange(13) < torch.tensor([[5], [13], [7]])).long()}

        def run() -> list[Tensor]:
            with self.at(ids.masked_fill(inputs["attention_mask"] * ids % 3 != 1, -100)):
                return [value for value in model(**inputs).values() if isinstance(value, Tensor)]

        compute_chosen_only(model, self._places, run)

    def _places(self, batch: PackedBatch) -> Tensor | None:
        if self.positions is None or batch.causal:  # a decoder has labels nearly everywhere
            return None
        self._taken = True
        return batch.packed_of_padded[self.positions]

    def _losses(self, vectors: Tensor) -> Tensor:
        if self.labels is None:
            return self._scores(vectors)
        vectors, labels = vectors[0].split(self.chunk), self.labels.split(self.chunk)
        if len(labels) == 1:  # all exist at once anyway
            return self._part(vectors[0], labels[0])[None]
        parts = zip(vectors, labels, strict=True)
        return torch.cat([checkpoint(self._part, *part, use_reentrant=False) for part in parts])[None]

    def _part(self, vectors: Tensor, labels: Tensor) -> Tensor:
        if torch.is_grad_enabled() and vectors.device.type == "cpu" and type(self._head) is nn.Linear:
            losses = head_losses(self._head, vectors, labels, self.label_smoothing)
            return torch.stack([losses, torch.zeros_like(losses)], 1)
        scores = self._scores(vectors).float()
        losses = F.cross_entropy(scores, labels, reduction="none", label_smoothing=self.label_smoothing)
        return torch.stack([losses, (scores.argmax(-1) == labels).float()], 1)

    def _gives_the_same(self, model: PreTrainedModel) -> bool:
        random = torch.Generator().manual_seed(0)
        ids, labels = (torch.randint(0, model.config.vocab_size, (3, 13), generator=random) for _ in range(2))
        chosen = torch.zeros(3, 13, dtype=torch.bool)
        chosen[[0, 0, 1, 2, 2], [1, 12, 5, 0, 7]] = True
        labels = labels.masked_fill(~chosen, -100)
        ids, labels, chosen = (x.to(model.device) for x in (ids, labels, chosen))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        training, trying_chunks = model.training, self.works
        model.eval()
        try:
            with torch.no_grad():
                expected = scores_of(model(**inputs))[chosen]
                self.works, self.chunked = True, trying_chunks
                with self.at(labels):
                    found = scores_of(model(**inputs))[0]
            if trying_chunks:
                expected = F.cross_entropy(expected.float(), labels[chosen], reduction="none")
                found = found[:, 0]
            return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
        except Exception:  # whatever it is, this architecture cannot
            return False
        finally:
            self.works, self.chunked = trying_chunks, False
            model.train(training)


def scores_of(output) -> Tensor:
    """The scores of the vocabulary in the output of a model."""
    return output.prediction_logits if "prediction_logits" in output else output.logits


def losses_at_labels(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each label, in the shape of `labels` (rows, length); 0 where the label is -100.

    `logits` are those of all positions, (rows, length, classes), or those of the labels one after the other,
    (1, labels, classes).
    """
    at = labels != -100
    if logits.shape[:-1] == labels.shape:
        logits = logits[at]
    losses = F.cross_entropy(
        logits.float().flatten(0, -2), labels[at], reduction="none", label_smoothing=label_smoothing
    )
    return torch.zeros(labels.shape, dtype=losses.dtype, device=losses.device).masked_scatter(at, losses)


def hits_at_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels of each row have the highest score; shape (rows,). Arguments as for `losses_at_labels`."""
    at = labels != -100
    if logits.shape[:-1] == labels.shape:
        logits = logits[at]
    right = (logits.flatten(0, -2).argmax(-1) == labels[at]).long()
    return torch.zeros(labels.shape, dtype=torch.int64, device=right.device).masked_scatter(at, right).sum(1)


def chunked_losses(found: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """As `losses_at_labels`, from what a chunked `Selection` gives."""
    losses = torch.zeros(labels.shape, dtype=found.dtype, device=found.device)
    return losses.masked_scatter(labels != -100, found[0, :, 0])


def chunked_hits(found: Tensor, labels: Tensor) -> Tensor:
    """As `hits_at_labels`, from what a chunked `Selection` gives."""
    hits = torch.zeros(labels.shape, dtype=torch.int64, device=found.device)
    return hits.masked_scatter(labels != -100, found[0, :, 1].long()).sum(1)
