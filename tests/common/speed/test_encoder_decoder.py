"""Test that encoder-decoders that compute real tokens only agree with padded ones."""

import copy
from contextlib import nullcontext

import pytest
import torch

from common.models.structure import attention_by
from common.speed.encoder_decoder import PADDING_FREE, PaddingFreePairs
from common.training import label_losses
from tests.common.speed.models import language_model

KINDS = sorted(PADDING_FREE - {"bert"})  # bert is a side of an encoder-decoder


def batch() -> dict[str, torch.Tensor]:
    """Make rows of every length from 1 to 30, shuffled."""
    torch.manual_seed(1)
    ids = torch.randint(5, 200, (20, 30))
    mask = (torch.arange(30) < torch.randint(1, 31, (20, 1))).long()
    mask[0] = 1
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("longest", [9, 30])
def test_loss_and_gradients_equal_those_of_the_padded_model(kind, longest):
    padded = language_model(kind).eval()
    packed = copy.deepcopy(padded)
    pairs = PaddingFreePairs(packed)
    assert pairs.reason is None
    inputs = batch()
    ids = torch.randint(5, 200, (20, longest))
    labels = ids.masked_fill(torch.arange(longest) >= torch.randint(1, longest + 1, (20, 1)), -100)
    labels[3, 0] = -100  # a token without label before tokens with labels
    labels[3, 1:4] = 7
    inputs |= {"decoder_input_ids": ids}
    gradients = []
    for model, within in ((padded, nullcontext()), (packed, pairs.at(inputs["attention_mask"], labels))):
        with within:
            logits = model(**inputs).logits
        loss = label_losses(logits, labels).sum()
        loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()} | {"loss": loss.detach()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            assert torch.allclose(gradients[1][name], gradient, rtol=1e-4, atol=1e-5), name
    with torch.no_grad():  # outside the context the model is unchanged
        assert torch.equal(packed(**inputs).logits, padded(**inputs).logits)


def test_layers_compute_real_tokens_only():
    model = language_model("m2m_100")
    pairs, rows = PaddingFreePairs(model), batch()
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)[:, :20]
    sizes = {}
    for name in ("encoder", "decoder"):
        last = model.get_submodule(f"model.{name}.layers.1.fc2")
        last.register_forward_hook(lambda _, args, output, name=name: sizes.update({name: output[..., 0].numel()}))
    with torch.no_grad(), pairs.at(rows["attention_mask"], labels):
        model(**rows, decoder_input_ids=labels.clamp(min=0))
    for name, real in (("encoder", rows["attention_mask"].sum()), ("decoder", (labels != -100).sum())):
        assert real < sizes[name] <= real + 64


def with_layerdrop():
    model = language_model("bart")
    model.get_decoder().layerdrop = 0.1
    return model


def with_another_kernel():
    model = language_model("bart")
    model.set_attn_implementation("watched")
    return model


def with_other_code():
    model = language_model("bart")
    attention = model.get_decoder().layers[1].self_attn
    attention.q_proj.register_forward_hook(lambda _, args, output: output + torch.arange(output.shape[1])[:, None])
    return model


UNABLE = {
    "t5": (lambda: language_model("t5"), "not tested with t5"),  # attention depends on the distance
    "layerdrop": (with_layerdrop, "layerdrop leaves out layers"),
    "kernel": (with_another_kernel, "attention by another kernel"),
    "code": (with_other_code, "results differ on a test batch"),
}


@pytest.mark.parametrize("name", UNABLE)
def test_an_encoder_decoder_that_cannot_is_left_as_it_was(name):
    make, reason = UNABLE[name]
    model = make().eval()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    kernel = model.config._attn_implementation
    inputs = batch() | {"decoder_input_ids": torch.randint(5, 200, (20, 9))}
    with torch.no_grad():
        expected = model(**inputs).logits
        assert PaddingFreePairs(model).reason == reason
        assert torch.equal(model(**inputs).logits, expected)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert model.config._attn_implementation == kernel
    with attention_by(model, {kernel: kernel}) as unchanged:
        assert unchanged
