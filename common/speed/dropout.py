"""Compute dropout from cheap random bits, on a CPU.

The probability is that of torch, the random numbers are others. `tests/benchmarks/LOG.md` has the gains.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def quick_dropout(x: Tensor, p: float) -> Tensor:
    """Drop elements of `x` with probability `p`, from 8 random bits each; torch draws a double for each.

    8 bits give multiples of 1/256 only. Each call uses one of the two nearest multiples, at random, with mean `p`.
    """
    return _Dropout.apply(x, p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        drawn = torch.empty(x.numel() // 8 + 2, dtype=torch.int64).random_(-(2**63), None)
        dropped = min(int(p * 2**8 + int(drawn[-1] & 0xFFFF) / 2**16), 255)  # of 256
        # writing and reading int8 is several times as fast as bool
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
    """Return x * keep * scale, in one pass after the conversion of `keep`."""
    return torch.addcmul(x.new_zeros(()), x, keep.to(x.dtype), value=scale)


class QuickDropout(nn.Dropout):
    """`nn.Dropout` computed by `quick_dropout` during training."""

    def forward(self, x: Tensor) -> Tensor:
        return quick_dropout(x, self.p) if self.training and 0 < self.p < 1 else super().forward(x)


def quicken_dropout(model: nn.Module) -> None:
    """Turn every `nn.Dropout` in `model` into a `QuickDropout`."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = QuickDropout


@contextmanager
def quick_functional_dropout() -> Iterator[None]:
    """Replace `torch.nn.functional.dropout`, which BART and similar models call, within a `with` block.

    A `TorchFunctionMode` would need no change to torch, but takes time at every call of every function.
    """
    F.dropout = _functional_dropout
    try:
        yield
    finally:
        F.dropout = _torch_dropout


_torch_dropout = F.dropout


def _functional_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return quick_dropout(input, p) if training and 0 < p < 1 else _torch_dropout(input, p, training, inplace)
