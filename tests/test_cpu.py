"""Layers on real sub-tokens only agree with padded ones; quick dropout is dropout."""

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BartForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
)

from common import cpu
from common.adapters import Shape, insert_adapters
from common.cpu import (
    HeadLosses,
    PackedBatch,
    QuickDropout,
    QuickFunctionalDropout,
    leave_out_padding,
    leaves_out_padding,
    quick_dropout,
    quicken_dropout,
)
from common.language import Selection, losses_at_labels
from common.layers import watch
from common.trainer import label_losses
from tests.conftest import run

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"vocab_size": 200, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
DISTILBERT = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "vocab_size": 200}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build(kind: str, auto_class=AutoModelForTokenClassification, **settings):
    torch.manual_seed(0)
    sizes = DISTILBERT if kind == "distilbert" else SIZES
    return auto_class.from_config(AutoConfig.for_model(kind, **sizes | settings, num_labels=3))


def batch(rows: int = 20, length: int = 30) -> dict[str, torch.Tensor]:
    """Rows of every length from none to `length`, in no order."""
    torch.manual_seed(1)
    ids = torch.randint(5, 200, (rows, length))
    mask = (torch.arange(length) < torch.randint(0, length + 1, (rows, 1))).long()
    mask[0] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "xlm-roberta", "camembert", "distilbert", "gpt2"])
@pytest.mark.parametrize("auto_class", [AutoModelForTokenClassification, AutoModelForSequenceClassification])
def test_loss_and_gradients_equal_those_of_the_padded_model(kind, auto_class):
    padded = build(kind, auto_class)
    packed = copy.deepcopy(padded)
    assert leave_out_padding(packed)
    assert leaves_out_padding(packed)
    assert not leaves_out_padding(padded)
    rows = batch()
    if auto_class is AutoModelForTokenClassification:
        rows["labels"] = (rows["input_ids"] % 3).masked_fill(rows["attention_mask"] == 0, -100)
    else:
        rows["attention_mask"][:, 0] = 1  # the head reads the first sub-token, or the last that is not padding
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
    firsts_only = auto_class is AutoModelForSequenceClassification and kind != "gpt2"
    assert (fed_forward(packed, rows) == len(rows["labels"])) is firsts_only


def fed_forward(model, rows, within: AbstractContextManager | None = None) -> int:
    """How many sub-tokens the last linear map of the last layer computes."""
    last, seen = watch(model)[-1].output, []
    hook = model.get_submodule(last).register_forward_hook(lambda _, args, output: seen.append(output[..., 0].numel()))
    with torch.no_grad(), within or nullcontext():
        model(**rows)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_first_sub_tokens_only_in_training_under_what_is_put_into_a_layer(method):
    """With checkpointing, whose second pass through the last layer comes before those through the others."""
    models = [build("bert", AutoModelForSequenceClassification, **NO_DROPOUT) for _ in range(2)]
    assert leave_out_padding(models[1])
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
    assert leave_out_padding(models[1])
    rows = batch()
    labels = rows["input_ids"].masked_fill(rows["input_ids"] * rows["attention_mask"] % 5 != 1, -100)
    gradients = []
    for model in models:
        selection = Selection(model.eval())
        assert selection.works
        with selection.at(labels):
            losses_at_labels(model(**rows).logits, labels).sum().backward()
        seen = fed_forward(model, rows, selection.at(labels))
        assert (seen == int((labels != -100).sum())) is (model is models[1] and kind != "gpt2")
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
        with selection.at(torch.full_like(labels, -100)):
            assert model(**rows).logits.shape == (1, 0, 200)
        assert model(**rows).logits.shape == (20, 30, 200)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-4, atol=1e-5), name


def test_the_last_layer_computes_all_where_another_head_reads_other_sub_tokens():
    model = build("bert", AutoModelForPreTraining).eval()
    rows = batch()
    rows["attention_mask"][:, 0] = 1
    assert leave_out_padding(model)
    expected = model(**rows).seq_relationship_logits
    selection = Selection(model)
    with selection.at(rows["input_ids"]):
        assert torch.equal(model(**rows).seq_relationship_logits, expected)


@pytest.mark.parametrize("auto_class", [AutoModelForTokenClassification, AutoModelForSequenceClassification])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_mode_uses_both_attention_branches(dropout, auto_class):
    model = build("bert", auto_class, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    before = copy.deepcopy(model)
    assert leave_out_padding(model)
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
    """Sub-tokens after a place change nothing at it, with either branch of attention."""
    model = build("gpt2", attn_pdrop=dropout, resid_pdrop=0.0, embd_pdrop=0.0)
    plain = copy.deepcopy(model)
    assert leave_out_padding(model)
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
    assert leave_out_padding(model)
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


@pytest.mark.parametrize("kind", ["deberta-v2", "albert", "mpnet", "modernbert"])
def test_a_model_that_cannot_is_left_as_it_was(kind):
    model = build(kind).eval()
    rows = batch(4, 12)
    rows["attention_mask"][:, :2] = 1
    before = model.config._attn_implementation
    with torch.no_grad():
        expected = model(**rows).logits
        assert not leave_out_padding(model)
        assert torch.equal(model(**rows).logits, expected)
    assert model.config._attn_implementation == before


def test_every_sub_token_is_packed_once():
    mask = batch()["attention_mask"].bool()
    packed = PackedBatch(mask)
    assert packed.real == mask.sum()
    assert len(packed.padded_of_packed) % 64 == 0
    assert len(packed.padded_of_packed) > packed.real
    assert sorted(packed.padded_of_packed[: packed.real].tolist()) == mask.flatten().nonzero().flatten().tolist()
    values = torch.arange(mask.numel(), dtype=torch.float32).view(*mask.shape, 1)
    assert torch.equal(packed.unpack(packed.pack(values))[mask], values[mask])


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_bfloat16_is_that_of_sdpa(causal, monkeypatch):
    torch.manual_seed(0)
    packed = PackedBatch(batch()["attention_mask"].bool(), causal)
    size = len(packed.padded_of_packed)
    exact = torch.randn(3, 1, 2, size, 4)
    found = []
    for written_out, dtype in ((0, torch.float32), (0, torch.bfloat16), (256, torch.bfloat16)):
        monkeypatch.setattr(cpu, "WRITTEN_OUT", written_out)
        inputs = exact.to(dtype, copy=True).requires_grad_()
        out = packed.attend(*inputs, 0.0, None)
        (out[:, : packed.real] ** 2).sum().backward()
        found.append((out[:, : packed.real].float(), inputs.grad[..., : packed.real, :].float()))
    for sdpa, other in zip(found[0], found[2], strict=True):
        assert torch.allclose(sdpa, other, atol=0.1)
        assert (sdpa - other).abs().mean() < 0.01
    assert not torch.equal(found[1][0], found[2][0])  # it was another computation


def test_attention_takes_rows_of_one_length_together_and_no_more_than_stay_in_the_cache(monkeypatch):
    assert cpu._group_sizes([384, 376, 8]) == [1, 1, 1]
    assert cpu._group_sizes([256] * 5) == [2, 2, 1]
    assert cpu._group_sizes([64] * 40) == [32, 8]
    assert cpu._group_sizes([24] * 5 + [16] * 20 + [8] * 100) == [8, 17, 100]
    packed = [PackedBatch(batch()["attention_mask"].bool())]
    monkeypatch.setattr(cpu, "SCORES_TOGETHER", 1)
    packed.append(PackedBatch(batch()["attention_mask"].bool()))
    assert len(packed[0].groups) < len(packed[1].groups) == 20
    vectors = torch.randn(3, 1, 2, len(packed[0].padded_of_packed), 4)
    one, each = (part.attend(*vectors, 0.0, None)[:, : part.real] for part in packed)
    assert torch.allclose(one, each, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_quick_dropout_drops_at_its_rate_and_scales(kind):
    torch.manual_seed(0)
    x = torch.ones(1001, 999, dtype=kind, requires_grad=True)
    y = quick_dropout(x, 0.1)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(0.9, abs=0.0015)  # five standard deviations
    assert kept.float().mean(0).std().item() == pytest.approx((0.09 / 1001) ** 0.5, rel=0.1)  # no pattern in columns
    assert torch.all(y[kept] == torch.tensor(1 / 0.9, dtype=kind))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    torch.manual_seed(0)
    assert torch.equal(quick_dropout(x, 0.1), y)


def test_quicken_dropout_keeps_evaluation_and_the_ends():
    model = build("bert")
    quicken_dropout(model)
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts
    assert all(type(m) is QuickDropout for m in dropouts)
    x = torch.ones(5)
    assert torch.equal(QuickDropout(0.5).eval()(x), x)
    assert torch.equal(QuickDropout(0.0)(x), x)
    assert torch.equal(QuickDropout(1.0)(x), 0 * x)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_of_the_head_and_their_gradients_are_those_of_the_scores(smoothing):
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layerdrop": 0.0, "dropout": 0.0}
    model = M2M100ForConditionalGeneration(M2M100Config(vocab_size=300, attention_dropout=0.0, **sizes))
    ids = torch.randint(5, 300, (3, 20, 11))  # more labels than are taken at a time
    labels = ids[2].masked_fill(torch.rand(20, 11) < 0.2, -100)
    weight = torch.rand(20, 11)  # of the losses, so that no gradient is as another
    gradients = []
    for quick in (False, True):
        head = HeadLosses(model) if quick else None
        assert head is None or head.works
        model.zero_grad()
        inputs = {"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0]), "decoder_input_ids": ids[1]}
        if quick:
            with head.at(labels, smoothing):
                losses = model(**inputs).logits[..., 0]
            assert model(**inputs).logits.shape == (20, 11, 300)
        else:
            losses = label_losses(model(**inputs).logits, labels, smoothing)
        (losses * weight).sum().backward()
        gradients.append([losses.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    bart = BartForConditionalGeneration(BartConfig(vocab_size=300, max_position_embeddings=32, **sizes))
    assert not HeadLosses(bart).works  # it adds to the scores after the head, and keeps its own way
    assert bart(**inputs).logits.shape == (20, 11, 300)


def test_functional_dropout_drops_its_share():
    x = torch.ones(100_000)
    with QuickFunctionalDropout():
        found = torch.nn.functional.dropout(x, 0.3)
        assert torch.equal(torch.nn.functional.dropout(x, p=0.3, training=False), x)
    assert abs((found == 0).float().mean() - 0.3) < 0.01
    assert torch.allclose(found[found > 0], torch.tensor(1 / 0.7))


MANY_SHAPES = """
import torch
from common.memory import settle
from tests.benchmarks.watched import resident_mib
settle()
layer = torch.nn.Linear(384, 384).bfloat16()
sizes = []
for rows in range(3, 1200, 3):
    layer(torch.randn(rows, 384).bfloat16()).sum().backward()
    sizes.append(resident_mib())
print(sizes[-1] - sizes[20])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by Linux")
def test_batches_of_many_lengths_do_not_fill_the_memory():
    """With the capacity that oneDNN has by itself these 400 shapes took 800 MiB where bfloat16 is native."""
    assert int(run("-c", MANY_SHAPES).stdout) < 150
