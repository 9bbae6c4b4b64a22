"""What a CPU computes faster, of any model: dropout from cheap random bits, and a head that gives losses.

The dropout drops with the same probability from other random numbers; the losses agree with those of the scores to
rounding, which is checked on each model before they are used. `tests/benchmarks/NOTES.md` has the gains.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
