"""Attention that keeps the signs of its weights is attention with dropout."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from common import attention as module
from common.attention import attention

SHAPE = (2, 3, 7, 4)


def inputs(dtype: torch.dtype, *shape: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape or SHAPE).to(dtype).requires_grad_() for _ in range(3)]


def bias(dtype: torch.dtype) -> torch.Tensor:
    """Of every row the last places are hidden, as many as its number in the batch and one."""
    hidden = torch.arange(7) >= torch.tensor([[6], [5]])
    return torch.zeros(2, 1, 1, 7, dtype=dtype).masked_fill_(hidden[:, None, None], torch.finfo(dtype).min)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_are_those_of_the_output(p, monkeypatch):
    """By differences, in float64, what is dropped being the same each time."""
    monkeypatch.setattr(module, "EXACT", 0)  # the softmax in float64 as well

    def run(q, k, v):
        torch.manual_seed(1)
        return module._Attention.apply(q, k, v, bias(q.dtype), p, 0.5)

    assert gradcheck(run, inputs(torch.float64))


@pytest.mark.parametrize("exact", [0, 128])
@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
def test_without_dropout_it_is_that_of_torch(dtype, far, exact, monkeypatch):
    monkeypatch.setattr(module, "EXACT", exact)
    ours = inputs(dtype)
    theirs = [x.detach().float().requires_grad_() for x in ours]
    output = module._Attention.apply(*ours, bias(dtype), 0.0, 0.5)
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=bias(torch.float32), scale=0.5)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=far, atol=far)
    (output.float() ** 2).sum().backward()
    (expected**2).sum().backward()
    for own, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad.float(), their.grad, rtol=4 * far, atol=4 * far)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_weights_are_dropped_at_their_rate_and_scaled(p, dtype):
    """Equal weights and values of one place each show which weights are dropped."""
    n = 256
    q, k = torch.zeros(2, 1, n, n, dtype=dtype)
    q.requires_grad_()
    v = torch.eye(n, dtype=dtype)[None]
    torch.manual_seed(0)
    output = attention(q, k, v, p, None, lambda kind: torch.zeros(1, 1, dtype=kind))
    kept = output != 0
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p)) ** 0.5 / n)
    assert kept.double().mean(-2).std().item() == pytest.approx((p * (1 - p) / n) ** 0.5, rel=0.2)  # no pattern
    torch.testing.assert_close(output[kept], torch.full_like(output[kept], 1 / n / (1 - p)), rtol=0.01, atol=0)
    torch.manual_seed(0)
    assert torch.equal(attention(q, k, v, p, None, lambda kind: torch.zeros(1, 1, dtype=kind)), output)


@pytest.mark.parametrize(("p", "weights"), [(0.1, 512 * 512), (0.0, 0)])
def test_what_is_kept_for_the_way_back_is_two_bytes_a_weight_or_none(p, weights):
    vectors = inputs(torch.bfloat16, 1, 512, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        attention(*vectors, p, None, lambda kind: torch.zeros(1, 1, dtype=kind))
    assert sum(kept) - 2 * weights < 50_000
