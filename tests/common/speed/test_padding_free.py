"""Test that layers that compute real tokens only agree with padded ones."""

import copy
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from common.models.structure import transformer_of, watch
from common.speed import padding_free
from common.speed.head import HeadAtLabels, losses_at_labels, read_first_tokens
from common.speed.padding_free import PADDING_FREE, PackedBatch, leave_out_padding, leaves_out_padding
from common.tuning.adapters import Shape, insert_adapters

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"vocab_size": 200, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
DISTILBERT = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "vocab_size": 200}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build(kind: str, auto_class=AutoModelForTokenClassification, **settings):
    torch.manual_seed(0)
    sizes = DISTILBERT if kind == "distilbert" else SIZES
    return auto_class.from_config(AutoConfig.for_model(kind, **sizes | settings, num_labels=3))


def batch(rows: int = 20, length: int = 30) -> dict[str, torch.Tensor]:
    """Make rows of every length from 0 to `length`, shuffled."""
    torch.manual_seed(1)
    ids = torch.randint(5, 200, (rows, length))
    mask = (torch.arange(length) < torch.randint(0, length + 1, (rows, 1))).long()
    mask[0] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", sorted(PADDING_FREE))
def test_gradients_equal_those_of_the_padded_model(kind):
    """Compare each listed model type, with a sum over the vectors of all real tokens as loss."""
    padded = build(kind, AutoModel).eval()
    packed = copy.deepcopy(padded)
    assert leave_out_padding(packed) is None
    assert leaves_out_padding(packed)
    assert not leaves_out_padding(padded)
    rows = batch()
    real = rows["attention_mask"].bool()
    weights = torch.randn(int(real.sum()), 32)
    found = []
    for model in (padded, packed):
        vectors = model(**rows)[0][real]
        (vectors * weights).sum().backward()
        found.append([vectors.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    assert len(found[0]) > 20
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "xlm-roberta", "camembert", "distilbert", "gpt2"])
@pytest.mark.parametrize("auto_class", [AutoModelForTokenClassification, AutoModelForSequenceClassification])
def test_loss_and_gradients_equal_those_of_the_padded_model(kind, auto_class):
    padded = build(kind, auto_class)
    packed = copy.deepcopy(padded)
    assert leave_out_padding(packed) is None
    firsts_only = auto_class is AutoModelForSequenceClassification and kind != "gpt2"
    assert (read_first_tokens(packed) is None) is firsts_only
    rows = batch()
    if auto_class is AutoModelForTokenClassification:
        rows["labels"] = (rows["input_ids"] % 3).masked_fill(rows["attention_mask"] == 0, -100)
    else:
        rows["attention_mask"][:, 0] = 1  # the head reads the first token, or the last real token
        rows["input_ids"][rows["attention_mask"] == 0] = SIZES["pad_token_id"]
        rows["labels"] = rows["input_ids"][:, 0] % 3
    losses = [model.eval()(**rows).loss for model in (padded, packed)]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    found = dict(packed.named_parameters())
    for name, weight in padded.named_parameters():
        if weight.grad is not None:
            assert torch.allclose(found[name].grad, weight.grad, atol=1e-6), name
    assert (fed_forward(packed, rows) == len(rows["labels"])) is firsts_only


def fed_forward(model, rows, within: AbstractContextManager | None = None) -> int:
    """Count the tokens that the last linear map of the last layer computes."""
    last, seen = watch(model)[-1].output, []
    hook = model.get_submodule(last).register_forward_hook(lambda _, args, output: seen.append(output[..., 0].numel()))
    with torch.no_grad(), within or nullcontext():
        model(**rows)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_first_tokens_only_in_training_under_what_is_put_into_a_layer(method):
    """Test checkpointing, which repeats the last layer before the other layers."""
    models = [build("bert", AutoModelForSequenceClassification, **NO_DROPOUT) for _ in range(2)]
    assert leave_out_padding(models[1]) is None
    assert read_first_tokens(models[1]) is None
    rows = batch()
    rows["labels"] = rows["input_ids"][:, 0] % 3
    rows["attention_mask"][:, 0] = 1
    gradients = []
    for model in models:
        torch.manual_seed(2)
        if method == "lora":
            model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
        else:
            insert_adapters(model, Shape("houlsby", 2))
            insert_adapters(model, Shape("pfeiffer", 2))
        assert (fed_forward(model, rows) == 20) is (len(gradients) == 1)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(**rows).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert len(gradients[0]) > 10
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, atol=1e-6), name


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2"])
def test_the_last_layer_computes_labels_only_where_the_head_does(kind):
    auto_class = AutoModelForCausalLM if kind == "gpt2" else AutoModelForMaskedLM
    models = [build(kind, auto_class) for _ in range(2)]
    assert leave_out_padding(models[1]) is None
    rows = batch()
    labels = rows["input_ids"].masked_fill(rows["input_ids"] * rows["attention_mask"] % 5 != 1, -100)
    gradients = []
    for model in models:
        head = HeadAtLabels(model.eval())
        assert head.reason is None
        assert (head.last_layer_reason is None) is (model is models[1] and kind != "gpt2")
        with head.at(labels):
            losses_at_labels(model(**rows).logits, labels).sum().backward()
        seen = fed_forward(model, rows, head.at(labels))
        assert (seen == int((labels != -100).sum())) is (model is models[1] and kind != "gpt2")
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
        with head.at(torch.full_like(labels, -100)):
            assert model(**rows).logits.shape == (1, 0, 200)
        assert model(**rows).logits.shape == (20, 30, 200)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-4, atol=1e-5), name


def test_the_last_layer_computes_all_where_another_head_reads_other_tokens():
    model = build("bert", AutoModelForPreTraining).eval()
    rows = batch()
    rows["attention_mask"][:, 0] = 1
    assert leave_out_padding(model) is None
    expected = model(**rows).seq_relationship_logits
    head = HeadAtLabels(model)
    assert head.last_layer_reason == "the head reads other tokens"
    with head.at(rows["input_ids"]):
        assert torch.equal(model(**rows).seq_relationship_logits, expected)


@pytest.mark.parametrize("auto_class", [AutoModelForTokenClassification, AutoModelForSequenceClassification])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_mode_uses_both_attention_branches(dropout, auto_class):
    model = build("bert", auto_class, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    before = copy.deepcopy(model)
    assert leave_out_padding(model) is None
    assert model.training
    rows = batch()
    real = rows["attention_mask"].bool()
    if auto_class is AutoModelForSequenceClassification:
        real = rows["attention_mask"][:, 0].bool()
    with torch.no_grad():
        draws = torch.stack([model(**rows).logits[real] for _ in range(200 if dropout else 1)])
        expected = before.eval()(**rows).logits[real]
    assert torch.allclose(draws.mean(0), expected, atol=0.1 if dropout else 1e-5)
    assert (draws.std(0).min() > 0.001) if dropout else True


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_decoder_looks_at_nothing_after(dropout):
    """Test that later tokens change nothing at a position, in both branches of attention."""
    model = build("gpt2", attn_pdrop=dropout, resid_pdrop=0.0, embd_pdrop=0.0)
    plain = copy.deepcopy(model)
    assert leave_out_padding(model) is None
    rows = batch()
    other = rows | {"input_ids": rows["input_ids"].clone()}
    other["input_ids"][:, 9:] = 7
    real = rows["attention_mask"].bool()[:, :9]
    model.base_model.train()
    model.classifier.eval()
    model.dropout.eval()
    with torch.no_grad():
        found = []
        for inputs in (rows, other):
            torch.manual_seed(0)
            found.append(model(**inputs).logits[:, :9][real])
        assert torch.allclose(*found, atol=1e-5)
        draws = torch.stack([model(**rows).logits[:, :9][real] for _ in range(200 if dropout else 1)])
        assert torch.allclose(draws.mean(0), plain.eval()(**rows).logits[:, :9][real], atol=0.1 if dropout else 1e-5)


def test_gradient_checkpointing_and_no_mask():
    model = build("bert", **NO_DROPOUT)
    rows = batch()
    rows["labels"] = (rows["input_ids"] % 3).masked_fill(rows["attention_mask"] == 0, -100)
    assert leave_out_padding(model) is None
    model.train()(**rows).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**rows).loss.backward()
    for name, weight in model.named_parameters():
        assert torch.allclose(weight.grad, expected[name], atol=1e-6), name
    with torch.no_grad():
        ids = rows["input_ids"][:, :7]
        plain = model.eval()(input_ids=ids).logits
        assert torch.allclose(plain, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, atol=1e-5)


class Pooled(nn.Module):
    """Custom head that also reads padding."""

    def __init__(self):
        super().__init__()
        self.encoder, self.classifier = build("bert", AutoModel), nn.Linear(32, 3)

    def forward(self, input_ids, attention_mask):
        return self.classifier(self.encoder(input_ids, attention_mask=attention_mask)[0].mean(1))


def relative():
    """BERT with distance-dependent attention: different code under a tested model type."""
    model = build("bert")
    attention = model.bert.encoder.layer[1].attention.self
    attention.query.register_forward_hook(lambda _, args, output: output + torch.arange(output.shape[1])[:, None])
    return model


UNABLE = {
    "deberta-v2": (lambda: build("deberta-v2"), "not tested with deberta-v2"),
    "albert": (lambda: build("albert"), "not tested with albert"),
    "modernbert": (lambda: build("modernbert", cls_token_id=0, sep_token_id=2), "not tested with modernbert"),
    "own head": (Pooled, "not tested with Pooled"),
    "layerdrop": (lambda: build("opt", AutoModel, layerdrop=0.1), "layerdrop leaves out layers"),
    "differs": (relative, "results differ on a test batch"),
}


@pytest.mark.parametrize("name", UNABLE)
def test_a_model_that_cannot_is_left_as_it_was(name):
    make, reason = UNABLE[name]
    model = make().eval()
    rows = batch(4, 12)
    rows["attention_mask"][:, :2] = 1
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    transformer = transformer_of(model)
    before = transformer.config._attn_implementation
    with torch.no_grad():
        expected = model(**rows)
        assert leave_out_padding(model) == reason
        found = model(**rows)
    assert torch.equal(*(x if isinstance(x, torch.Tensor) else x[0] for x in (expected, found)))
    assert transformer.config._attn_implementation == before
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


def test_every_token_is_packed_once():
    mask = batch()["attention_mask"].bool()
    packed = PackedBatch(mask)
    assert packed.real == mask.sum()
    assert len(packed.padded_of_packed) % 64 == 0
    assert len(packed.padded_of_packed) > packed.real
    assert sorted(packed.padded_of_packed[: packed.real].tolist()) == mask.flatten().nonzero().flatten().tolist()
    values = torch.arange(mask.numel(), dtype=torch.float32).view(*mask.shape, 1)
    assert torch.equal(packed.unpack(packed.pack(values))[mask], values[mask])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_bfloat16_is_that_of_sdpa(causal, full, monkeypatch):
    torch.manual_seed(0)
    packed = PackedBatch(torch.ones(3, 64, dtype=torch.bool) if full else batch()["attention_mask"].bool(), causal)
    hides = packed._bias(0, packed.groups[0][1], torch.float32) is not None
    assert hides == (causal or not full)  # full bins of one row need no mask
    size = len(packed.padded_of_packed)
    exact = torch.randn(3, 1, 2, size, 4)
    found = []
    for written_out, dtype in ((0, torch.float32), (0, torch.bfloat16), (256, torch.bfloat16)):
        monkeypatch.setattr(padding_free, "WRITTEN_OUT", written_out)
        inputs = exact.to(dtype, copy=True).requires_grad_()
        out = packed.attend(*inputs, 0.0, None)
        (out[:, : packed.real] ** 2).sum().backward()
        found.append((out[:, : packed.real].float(), inputs.grad[..., : packed.real, :].float()))
    for sdpa, other in zip(found[0], found[2], strict=True):
        assert torch.allclose(sdpa, other, atol=0.02 * float(sdpa.detach().abs().max()))
        assert (sdpa - other).abs().mean() < 0.01
    assert not torch.equal(found[1][0], found[2][0])  # the computation differs


def test_rows_lie_end_to_end_in_bins_of_one_length_and_no_more_than_stay_in_the_cache(monkeypatch):
    lengths = torch.randint(1, 120, (90, 2), generator=torch.Generator().manual_seed(0)).tolist()
    lengths = [(source, min(target, 40)) for source, target in lengths]
    groups = padding_free.in_bins(lengths)
    assert sorted(row for _, bins in groups for rows in bins for row in rows) == list(range(90))
    for sides, bins in groups:
        assert all(side % 32 == 0 and side >= 64 for side in sides)
        assert len(bins) * max(sides) ** 2 <= padding_free.SCORES_TOGETHER
        for rows in bins:
            assert all(sum(lengths[row][k] for row in rows) <= side for k, side in enumerate(sides))
    filled = sum(source for source, _ in lengths) / sum(sides[0] for sides, bins in groups for rows in bins if rows)
    assert filled > 0.8
    assert padding_free.in_bins([(384,), (376,), (8,)]) == [((384,), [[0]]), ((384,), [[1, 2]])]
    assert padding_free.in_bins([(30,)] * 9) == [((64,), [[0, 1], [2, 3], [4, 5], [6, 7], [8], [], [], []])]
    assert padding_free.in_bins([(0,), (5,)]) == [((64,), [[1, 0], [], [], []])]

    mask = batch()["attention_mask"].bool()
    vectors = torch.randn(3, *mask.shape, 8)
    packed = [PackedBatch(mask)]
    monkeypatch.setattr(padding_free, "SCORES_TOGETHER", 1)
    packed.append(PackedBatch(mask))
    assert len(packed[0].groups) == 1
    assert len(packed[1].groups) > 4
    found = []
    for part in packed:
        inputs = (part.pack(x).view(1, -1, 2, 4).transpose(1, 2) for x in vectors)
        found.append(part.unpack(part.attend(*inputs, 0.0, None).flatten(2))[mask])
    assert torch.allclose(*found, atol=1e-6)
