"""Test that a trial on a model leaves no trace."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForTokenClassification, PreTrainedModel

from common.args import SpeedArguments
from common.errors import InputError
from common.models.load import LoadedModel
from common.models.structure import check_bf16, watch
from common.models.trial import trial
from common.speed import apply, head, padding_free
from tests.common.speed.models import NO_DROPOUT, SIZES, language_model


def state(model: nn.Module) -> list:
    """Return everything in a model that a trial could change, in comparable form."""
    parts = []
    for name, module in model.named_modules():
        parts.append((name, type(module).__name__, module.training, *map(len, (
            module._forward_hooks, module._forward_pre_hooks, vars(module),
        ))))  # fmt: skip
    config = model.config.to_dict() | {"kernel": model.config._attn_implementation}
    return [parts, config, {name: value.tolist() for name, value in model.state_dict().items()}]


def test_a_trial_that_fails_restores_attributes_hooks_buffers_kernels_and_random_states():
    model = language_model("bert").train()
    before, number = state(model), torch.random.get_rng_state()
    numbers = random.getstate(), np.random.get_state()[1].tolist()

    def fail() -> None:
        with trial(model):
            assert not model.training
            model.set_attn_implementation("eager")
            model.bert.encoder.layer[0].register_forward_hook(print)
            model.bert.embeddings.position_ids.zero_()
            model.bert.encoder.layer[1] = nn.Identity()
            model.config.extra = model.bert.extra = 1
            torch.rand(1), np.random.rand(), random.random()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert state(model) == before
    assert torch.equal(torch.random.get_rng_state(), number)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == numbers


def big_bird() -> PreTrainedModel:
    sizes = SIZES | NO_DROPOUT | {"block_size": 4, "num_random_blocks": 1, "attention_type": "block_sparse"}
    return AutoModelForTokenClassification.from_config(AutoConfig.for_model("big_bird", **sizes))


def mobile_bert() -> PreTrainedModel:
    sizes = SIZES | NO_DROPOUT | {"embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32}
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model("mobilebert", **sizes))


@pytest.mark.parametrize(
    "use", [watch, lambda model: apply(LoadedModel(model, None), SpeedArguments())], ids=["watch", "speed"]
)
def test_big_bird_stays_block_sparse(use):
    model = big_bird()
    use(model)
    assert model.bert.attention_type == "block_sparse"
    kinds = {type(layer.attention.self).__name__ for layer in model.bert.encoder.layer}
    assert kinds == {"BigBirdBlockSparseAttention"}


@pytest.mark.parametrize("kind", ["mobilebert", "bert"])
def test_a_head_whose_trial_fails_computes_the_next_batch_from_all_positions(kind, monkeypatch):
    """The trial of the last layer fails inside the head; the positions that it took must not reach the next batch."""
    for module, name in ((head, "HEAD_AT_LABELS"), (head, "LAST_LAYER"), (padding_free, "PADDING_FREE")):
        monkeypatch.setattr(module, name, frozenset({kind}))
    model = mobile_bert() if kind == "mobilebert" else language_model("bert")
    model.eval()
    ids = torch.randint(5, 200, (3, 13))
    mask = (torch.arange(13) < torch.tensor([[5], [13], [7]])).long()
    labels = ids.masked_fill(mask * ids % 3 != 1, -100)
    expected = model(input_ids=ids, attention_mask=mask).logits[labels != -100]
    speed = apply(LoadedModel(model, None), SpeedArguments())
    for _ in range(2):
        with torch.no_grad(), speed.at_labels(labels, scores=True):
            logits = model(input_ids=ids, attention_mask=mask).logits
        logits = logits[0] if len(logits) == 1 else logits[labels != -100]
        assert torch.allclose(logits, expected, atol=1e-4)


def test_big_bird_is_refused_in_bf16_before_training():
    with pytest.raises(InputError, match="a big_bird model fails in bf16 on long rows; give --precision fp32"):
        check_bf16(big_bird().config, bf16=True)
    check_bf16(big_bird().config, bf16=False)
