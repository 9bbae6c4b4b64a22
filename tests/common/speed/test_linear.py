"""Linear maps in one product are what they are one by one."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForTokenClassification

from common.models.structure import sharing_input
from common.speed.linear import QuickLinear, _Together, quicken_linear

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"vocab_size": 200, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build(kind: str = "bert"):
    torch.manual_seed(0)
    return AutoModelForTokenClassification.from_config(AutoConfig.for_model(kind, **SIZES))


def batch(model) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(5, 200, (5, 11))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 2}


def gradients_of(model, precision: torch.dtype | None) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
        loss = model(**batch(model)).loss
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return found | {"loss": loss.detach()}


def test_maps_of_one_input_are_found():
    names = ["query", "key", "value"]
    model = build()
    layer = model.bert.encoder.layer[0]
    found = sharing_input(model)
    assert found[0] == [getattr(layer.attention.self, name) for name in names]
    assert found[1:4] == [[layer.attention.output.dense], [layer.intermediate.dense], [layer.output.dense]]
    assert len(found) == 8
    parts = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "vocab_size": 99, "encoder_attention_heads": 2}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **parts, decoder_attention_heads=2))
    across = model.model.decoder.layers[0].encoder_attn
    assert [across.q_proj] in sharing_input(model)
    assert [across.k_proj, across.v_proj] in sharing_input(model)


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "distilbert", "albert"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_gradients_are_those_of_separate_maps(kind, precision):
    plain = build(kind)
    quick = copy.deepcopy(plain)
    quicken_linear(quick)
    found, expected = gradients_of(quick, precision), gradients_of(plain, precision)
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype
        assert torch.allclose(found[name], gradient, atol=1e-6 if precision is None else 0.005 * largest), name


def test_queries_keys_and_values_are_one_product_in_training_only():
    model = build()
    quicken_linear(model)
    calls = {}
    for training in (True, False):
        model.train(training)
        with torch.profiler.profile() as profile:
            model(**batch(model))
        calls[training] = sum(event.count for event in profile.key_averages() if event.key == "aten::linear")
    assert calls == {True: 2 * 4 + 1, False: 2 * 6 + 1}


@pytest.mark.parametrize("which", ["lora", "frozen", "checkpointing"])
def test_under_what_changes_the_training(which):
    found = []
    for quick in (False, True):
        model = build()
        if quick:
            quicken_linear(model)
        torch.manual_seed(2)
        if which == "lora":
            model = get_peft_model(model, LoraConfig(target_modules=["query", "value"], init_lora_weights=False))
        elif which == "frozen":
            for name, weight in model.named_parameters():
                weight.requires_grad_("layer.1.attention.self.key" in name or "classifier" in name)
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients_of(model.train(), None))
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 3
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, atol=1e-6), name


def test_a_copy_trains_itself_and_operations_are_counted():
    model = build()
    quicken_linear(model)
    gradients_of(model, None)
    other = copy.deepcopy(model)
    other.zero_grad()
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.query.weight.zero_()
    before = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    gradients_of(other, None)
    assert all(torch.equal(weight.grad, before[name]) for name, weight in model.named_parameters() if name in before)
    assert isinstance(other.bert.encoder.layer[0].attention.self.query, QuickLinear)
    counts = []
    for one in (build(), model):
        with FlopCounterMode(display=False) as counter:
            one.train()(**batch(one)).loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_what_comes_out_may_be_changed_in_place():
    """As AdaLoRA adds to the output of a map, and LED divides queries."""
    plain = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    quick = copy.deepcopy(plain)
    together = _Together(list(quick))
    for one in quick:
        one.__class__, one.together = QuickLinear, together
    found = []
    for maps in (plain, quick):
        x = torch.arange(12.0).view(2, 6).requires_grad_()
        outputs = [one(x) for one in maps]
        outputs[0] /= 2
        outputs[1] += outputs[2] * 3
        (outputs[0] * outputs[1]).sum().backward()
        found.append([x.grad, *(weight.grad for weight in maps.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5)
