"""Linear maps as a CPU trains them faster: those of one input in one product, in one step of the way forth and back.

Under autocast a linear map casts its input, its weights and its bias, each by itself, and as often back again; queries,
keys and values do so three times over for one input. Here the maps that take the same input, one after the other, are
one product of matrices. What is computed is the same, to rounding (`tests/benchmarks/NOTES.md` has the gains).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.models.structure import sharing_input


class _Products(torch.autograd.Function):
    """Several linear maps of x, of shape (..., width): weights (classes, width) and biases (classes,) or None.

    Products are of type `kind`, and so is what comes out: one tensor (..., classes) a map.
    """

    @staticmethod
    def forward(ctx, kind: torch.dtype, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = parameters[::2], parameters[1::2]
        cast, weight = x.reshape(-1, x.shape[-1]).to(kind), _joined(weights, kind)
        product = F.linear(cast, weight, None if biases[0] is None else _joined(biases, kind))
        ctx.save_for_backward(cast, weight)
        ctx.shape, ctx.type, ctx.sizes = x.shape, x.dtype, [len(w) for w in weights]
        ctx.types = [None if p is None else p.dtype for p in parameters]
        # unsafe: nothing else reads the product, so that what comes out may be changed in place
        return product.view(*x.shape[:-1], -1).unsafe_split_with_sizes(ctx.sizes, dim=-1)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cast, weight = ctx.saved_tensors
        flat = [g.reshape(-1, g.shape[-1]) for g in gradients]
        gradient = flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)
        of_x, found = None, [None] * len(ctx.types)
        if ctx.needs_input_grad[1]:
            of_x = (gradient @ weight).view(ctx.shape).to(ctx.type)
        if any(ctx.needs_input_grad[2::2]):
            found[::2] = (gradient.t() @ cast).split(ctx.sizes)
        if any(ctx.needs_input_grad[3::2]):
            found[1::2] = gradient.sum(0).split(ctx.sizes)
        wanted = zip(found, ctx.types, ctx.needs_input_grad[2:], strict=True)
        return None, of_x, *(value.to(kind) if needed else None for value, kind, needed in wanted)


def _joined(parts: Sequence[Tensor], kind: torch.dtype) -> Tensor:
    if len(parts) == 1:
        return parts[0].to(kind)
    joined = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=kind)
    for part, place in zip(parts, joined.split([len(part) for part in parts]), strict=True):
        place.copy_(part)
    return joined


class _Together:
    """Linear maps that take the same input one after the other: the first that is asked computes what all give."""

    def __init__(self, maps: list["QuickLinear"]):
        self.maps = maps
        self.input: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def __call__(self, asked: "QuickLinear", x: Tensor) -> Tensor:
        if x is not self.input or id(asked) not in self.outputs:
            kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
            parameters = [value for one in self.maps for value in (one.weight, one.bias)]
            found = _Products.apply(kind, x, *parameters)
            self.input, self.outputs = x, dict(zip(map(id, self.maps), found, strict=True))
        output = self.outputs.pop(id(asked))
        if not self.outputs:
            self.input = None
        return output


class QuickLinear(nn.Linear):
    """`nn.Linear` that is computed with those `together` with it while it is trained; else as ever."""

    together: _Together

    def forward(self, x: Tensor) -> Tensor:
        return self.together(self, x) if self.training and torch.is_grad_enabled() else super().forward(x)


def quicken_linear(model: PreTrainedModel) -> None:
    """Make every `nn.Linear` in the layers of `model` a `QuickLinear`, together with those that take the same input."""
    for maps in sharing_input(model):
        together = _Together(maps)
        for one in maps:
            one.__class__, one.together = QuickLinear, together
