"""Attention that keeps little for the way back, as a CPU trains it faster than SDPA's kernels.

SDPA has no CPU kernel that knows dropout, and a slow one for gradients in bfloat16. Written out, attention keeps its
weights, those of them that dropout leaves and what it drops: 5 bytes a weight in bfloat16. Here it keeps 2, as weights
are never negative: the sign of each tells whether it is dropped. Without dropout it keeps none, and computes them again
on the way back. `tests/benchmarks/NOTES.md` has the gains.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.cpu import random_bits

#: up to this many sub-tokens attention in bfloat16 is faster written out than by SDPA's kernel (`NOTES.md`)
WRITTEN_OUT = 512
#: up to this many the softmax is computed in float32, which costs little there
EXACT = 128


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    bias: Callable[[torch.dtype], Tensor],
    is_causal: bool = False,
) -> Tensor:
    """Attention with dropout of its weights: query of shape (..., n, width), key and value of (..., length, width).

    `bias` gives what is added to the scores, of a shape that broadcasts to (..., n, length) and has no gradient. With
    `is_causal` a kernel that knows what comes after a place needs none. Without `scaling` scores are divided by the
    root of the width (https://arxiv.org/abs/1706.03762).
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not dropout and (query.dtype != torch.bfloat16 or key.shape[-2] > WRITTEN_OUT):
        mask = None if is_causal else bias(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, scale=scaling)
    return _Attention.apply(query, key, value, bias(query.dtype), dropout, scaling)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, p: float, scaling: float) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            weights = _weights(query, key, bias, scaling)
            if p:
                weights = torch.copysign(weights, _negative(p, weights.shape))
            output = _kept(weights, p) @ (value / (1 - p))
        ctx.save_for_backward(query, key, value, weights if p else bias, output)
        ctx.p, ctx.scaling = p, scaling
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        query, key, value, weights, output = ctx.saved_tensors
        if not ctx.p:
            weights = _weights(query, key, weights, ctx.scaling)
        kept = _kept(weights, ctx.p)
        of_value = kept.transpose(-1, -2) @ gradient / (1 - ctx.p)
        # of the softmax: w (g - sum(w g)), where g is 0 at what is dropped; the sum is that of the output's gradient
        # times the output, as in FlashAttention (https://arxiv.org/abs/2205.14135, appendix B.4)
        total = (gradient.float() * output).sum(-1, keepdim=True).to(gradient.dtype)
        of_scores = gradient @ (value / (1 - ctx.p)).transpose(-1, -2)
        of_scores.sub_(total).mul_(kept)
        if ctx.p:
            of_scores.addcmul_(weights.clamp_max(0), total)
        of_query = of_scores @ key * ctx.scaling
        of_key = of_scores.transpose(-1, -2) @ query * ctx.scaling
        return of_query, of_key, of_value, None, None, None


def _weights(query: Tensor, key: Tensor, bias: Tensor, scaling: float) -> Tensor:
    scores = (query * scaling) @ key.transpose(-1, -2)
    if key.shape[-2] <= EXACT:
        scores = scores.float()
    scores += bias
    return scores.softmax(-1).to(query.dtype)


def _negative(p: float, shape: torch.Size) -> Tensor:
    """Numbers of which a share of `p` is negative, by chance."""
    # of 15 bits, so that the difference fits into 16
    drawn = random_bits(shape).bitwise_right_shift_(1).sub_(round(p * 2**15) - 2**14)
    return drawn.view(torch.bfloat16)  # which has its sign in the same bit


def _kept(weights: Tensor, p: float) -> Tensor:
    return weights.relu() if p else weights
