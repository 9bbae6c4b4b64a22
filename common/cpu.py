"""What a CPU computes faster, of any model: dropout from cheap random bits, and a head that gives losses.

The dropout drops with the same probability from other random numbers; the losses agree with those of the scores to
rounding, which is checked on each model before they are used. `tests/benchmarks/NOTES.md` has the gains.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

#: labels whose scores of the vocabulary exist at a time: so many stay in the cache
LABELS_TOGETHER = 128
#: their number is filled up to a multiple of this
LABEL_MULTIPLE = 64


def quick_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout of `x` with probability `p`, from 8 random bits an element; torch's draws a double for each.

    Of so few bits a share can only be a multiple of 1/256: each call drops one of the two beside `p`, drawn so that an
    element is dropped with probability `p`.
    """
    return _Dropout.apply(x, p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        drawn = torch.empty(x.numel() // 8 + 2, dtype=torch.int64).random_(-(2**63), None)
        dropped = min(int(p * 2**8 + int(drawn[-1] & 0xFFFF) / 2**16), 255)  # of 256
        # int8 is as good as bool, and made and read several times as fast
        keep = torch.empty(x.shape, dtype=torch.int8)
        torch.ge(drawn.view(torch.int8)[: x.numel()].view(x.shape), dropped - 2**7, out=keep)
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - p)
        return _scaled(x, keep, ctx.scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _scaled(gradient, keep, ctx.scale), None


def _scaled(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """x * keep * scale in one pass, but for the conversion."""
    return torch.addcmul(x.new_zeros(()), x, keep.to(x.dtype), value=scale)


class QuickDropout(nn.Dropout):
    """`nn.Dropout` by `quick_dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return quick_dropout(x, self.p) if self.training and 0 < self.p < 1 else super().forward(x)


def quicken_dropout(model: nn.Module) -> None:
    """Make every `nn.Dropout` in `model` a `QuickDropout`."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = QuickDropout


@contextmanager
def quick_functional_dropout() -> Iterator[None]:
    """Within it `torch.nn.functional.dropout`, which BART and its kin call by themselves, is `quick_dropout`.

    (A `TorchFunctionMode` would do it without a change to torch, but looks at every call of every function.)
    """
    F.dropout = _functional_dropout
    try:
        yield
    finally:
        F.dropout = _torch_dropout


_torch_dropout = F.dropout


def _functional_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return quick_dropout(input, p) if training and 0 < p < 1 else _torch_dropout(input, p, training, inplace)


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
