"""Test that the head at labels gives the losses and gradients of the scores at every position."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedModel

from common.speed.head import (
    BIAS_AFTER_HEAD,
    HEAD_AT_LABELS,
    LAST_LAYER,
    HeadAtLabels,
    hits_at_labels,
    losses_at_labels,
    scores_of,
)
from common.speed.padding_free import leave_out_padding
from tests.common.speed.models import MASKED, VOCABULARY, language_model


def padded_batch(model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor]:
    """Make a batch with padding, and labels at some real tokens."""
    torch.manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (2, 6, 20))
    mask = (torch.arange(20) < torch.tensor([20, 3, 11, 1, 17, 8])[:, None]).long()
    labels = ids[1].masked_fill((mask == 0) | (torch.rand(6, 20) < 0.6), -100)
    inputs = {"input_ids": ids[0], "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids[1], "use_cache": False}
    return inputs, labels


def losses_and_gradients(model: PreTrainedModel, head: HeadAtLabels | None, smoothing: float) -> list[Tensor]:
    inputs, labels = padded_batch(model)
    if head is None:
        scores = scores_of(model(**inputs)).flatten(0, 1)
        losses = F.cross_entropy(scores, labels.flatten(), reduction="none", label_smoothing=smoothing).view_as(labels)
    else:
        with head.at(labels, smoothing):
            losses = losses_at_labels(scores_of(model(**inputs)), labels, smoothing)
    weights = torch.rand(losses.shape, generator=torch.Generator().manual_seed(2))  # a different gradient for each loss
    (losses * weights).sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def agree(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("losses", [False, True])
@pytest.mark.parametrize("kind", sorted(HEAD_AT_LABELS))
def test_losses_and_gradients_are_those_of_the_scores_at_every_position(kind, losses):
    model = language_model(kind).eval()
    expected = losses_and_gradients(copy.deepcopy(model), None, 0.1)
    head = HeadAtLabels(model, losses)
    assert head.reason is None
    without_bias = losses and kind not in BIAS_AFTER_HEAD
    assert (head.losses_reason is None) is without_bias
    agree(losses_and_gradients(model, head, 0.1), expected)
    inputs, labels = padded_batch(model)
    count = int((labels != -100).sum())
    with torch.no_grad():
        plain = scores_of(model(**inputs))
        assert plain.shape == (*labels.shape, VOCABULARY)
        with head.at(labels):
            found = scores_of(model(**inputs))
        assert found.shape == (1, count, 2 if without_bias else VOCABULARY)
        assert torch.equal(hits_at_labels(found, labels), hits_at_labels(plain, labels))
        with head.at(labels, scores=True):
            assert torch.allclose(scores_of(model(**inputs))[0], plain[labels != -100], rtol=1e-4, atol=1e-5)
        with head.at(torch.full_like(labels, -100)):
            assert scores_of(model(**inputs)).shape[:2] == (1, 0)


@pytest.mark.parametrize("kind", sorted(LAST_LAYER))
def test_the_last_layer_at_labels_gives_the_same(kind):
    model = language_model(kind).eval()
    expected = losses_and_gradients(copy.deepcopy(model), None, 0.0)
    assert leave_out_padding(model) is None
    head = HeadAtLabels(model, True)
    assert head.reason is head.losses_reason is head.last_layer_reason is None
    agree(losses_and_gradients(model, head, 0.0), expected)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "m2m_100"])
def test_losses_in_chunks_are_the_whole_losses(kind, chunk):
    model = language_model(kind).eval()
    expected = losses_and_gradients(copy.deepcopy(model), None, 0.0)
    agree(losses_and_gradients(model, HeadAtLabels(model, True, chunk), 0.0), expected)


def test_scores_of_a_whole_batch_never_exist():
    model = language_model("gpt2")
    head = HeadAtLabels(model, True, 16)
    sizes: Counter = Counter()
    ids = torch.randint(5, VOCABULARY, (4, 40))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update([t.numel()]) or t, lambda t: t):
        with head.at(ids):
            found = model(input_ids=ids).logits
        losses_at_labels(found, ids).sum().backward()
    assert 4 * 40 * VOCABULARY not in sizes
    assert 16 * VOCABULARY not in sizes  # no scores of a chunk either: the backward pass computes them again


@pytest.mark.parametrize("kind", ["bert", "gpt2", "m2m_100"])
@pytest.mark.parametrize("on_head", [False, True])
def test_under_lora(kind, on_head):
    """Test the last linear layer with and without a LoRA matrix."""
    found = []
    for quick in (False, True):
        model = language_model(kind)
        names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        last = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
        chosen = [name for name in names if name != last] or ["c_attn"]
        torch.manual_seed(3)
        lora = LoraConfig(target_modules=chosen + [last] * on_head, init_lora_weights=False)
        wrapped = get_peft_model(model, lora).eval()
        head = HeadAtLabels(wrapped.get_base_model(), True) if quick else None
        assert head is None or head.reason is head.losses_reason is None
        found.append(losses_and_gradients(wrapped, head, 0.0) + [torch.zeros(1)] * 10)
    agree(*found)


def neighbours():
    """Custom head that reads neighbouring tokens."""
    model = language_model("bert")
    transform = model.cls.predictions.transform
    forward = transform.forward
    transform.forward = lambda x: forward(x + x.roll(1, dims=1))
    return model


class OwnHead(BartForConditionalGeneration):
    """Custom language model."""


UNABLE = {
    "differs": (neighbours, "results differ on a test batch"),
    "own head": (
        lambda: OwnHead(BartConfig(vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1)),
        "not tested with OwnHead",
    ),
}


@pytest.mark.parametrize("name", UNABLE)
def test_a_head_that_cannot_computes_everywhere_and_is_left_as_it_was(name):
    make, reason = UNABLE[name]
    model = make().eval()
    head = HeadAtLabels(model, True)
    assert head.reason == reason
    assert not any(module._forward_hooks for module in model.modules())
    assert "forward" not in vars(model.get_output_embeddings())
    inputs, labels = padded_batch(model)
    with head.at(labels), torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (*labels.shape, VOCABULARY)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert losses_at_labels(logits, labels).sum().item() == pytest.approx(expected.item(), rel=1e-6)


def test_every_type_of_a_last_layer_is_a_masked_language_model():
    assert set(MASKED) >= LAST_LAYER
