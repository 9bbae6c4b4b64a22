"""Test the rate of the faster dropout."""

import pytest
import torch
from transformers import BertConfig, BertModel

from common.speed.dropout import QuickDropout, quick_dropout, quick_functional_dropout, quicken_dropout


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_quick_dropout_drops_at_its_rate_and_scales(kind):
    torch.manual_seed(0)
    x = torch.ones(1001, 999, dtype=kind, requires_grad=True)
    shares = [(quick_dropout(x.detach(), 0.1) == 0).double().mean().item() for _ in range(100)]
    # each call drops 25 or 26 of 256, on average 25.6; all bounds are five standard deviations
    assert {round(share * 256) for share in shares} == {25, 26}
    assert all(min(abs(share * 256 - 25), abs(share * 256 - 26)) < 0.4 for share in shares)
    assert sum(shares) / 100 == pytest.approx(0.1, abs=0.001)
    y = quick_dropout(x, 0.1)
    kept = y != 0
    assert kept.float().mean(0).std().item() == pytest.approx((0.09 / 1001) ** 0.5, rel=0.1)  # no pattern in columns
    assert torch.all(y[kept] == torch.tensor(1 / 0.9, dtype=kind))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(quick_dropout(x, 0.1))
    assert torch.equal(*found)


@pytest.mark.parametrize("p", [0.001, 0.25, 0.5, 0.999])
def test_quick_dropout_of_other_shares(p):
    torch.manual_seed(0)
    dropped = [(quick_dropout(torch.ones(10_007), p) == 0).double().mean().item() for _ in range(400)]
    assert sum(dropped) / 400 == pytest.approx(p, abs=0.003)


def test_quicken_dropout_keeps_evaluation_and_the_ends():
    model = BertModel(BertConfig(num_hidden_layers=1, hidden_size=12, intermediate_size=12, vocab_size=9))
    quicken_dropout(model)
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts
    assert all(type(m) is QuickDropout for m in dropouts)
    x = torch.ones(5)
    assert torch.equal(QuickDropout(0.5).eval()(x), x)
    assert torch.equal(QuickDropout(0.0)(x), x)
    assert torch.equal(QuickDropout(1.0)(x), 0 * x)


def test_functional_dropout_drops_its_share():
    x = torch.ones(100_000)
    with quick_functional_dropout():
        found = torch.nn.functional.dropout(x, 0.3)
        assert torch.equal(torch.nn.functional.dropout(x, p=0.3, training=False), x)
    assert abs((found == 0).float().mean() - 0.3) < 0.01
    assert torch.allclose(found[found > 0], torch.tensor(1 / 0.7))
