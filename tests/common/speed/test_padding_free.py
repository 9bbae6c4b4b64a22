"""Layers on real sub-tokens only agree with padded ones."""

import copy
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    T5Config,
    T5ForConditionalGeneration,
)

from common.models.structure import watch
from common.speed import padding_free as unpadded
from common.speed.head import Selection, losses_at_labels
from common.speed.padding_free import PackedBatch, UnpaddedPairs, leave_out_padding, leaves_out_padding
from common.training.trainer import label_losses
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


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_bfloat16_is_that_of_sdpa(causal, full, monkeypatch):
    torch.manual_seed(0)
    packed = PackedBatch(torch.ones(3, 64, dtype=torch.bool) if full else batch()["attention_mask"].bool(), causal)
    hides = packed._bias(0, packed.groups[0][1], torch.float32) is not None
    assert hides == (causal or not full)  # full bins of one row each need no mask
    size = len(packed.padded_of_packed)
    exact = torch.randn(3, 1, 2, size, 4)
    found = []
    for written_out, dtype in ((0, torch.float32), (0, torch.bfloat16), (256, torch.bfloat16)):
        monkeypatch.setattr(unpadded, "WRITTEN_OUT", written_out)
        inputs = exact.to(dtype, copy=True).requires_grad_()
        out = packed.attend(*inputs, 0.0, None)
        (out[:, : packed.real] ** 2).sum().backward()
        found.append((out[:, : packed.real].float(), inputs.grad[..., : packed.real, :].float()))
    for sdpa, other in zip(found[0], found[2], strict=True):
        assert torch.allclose(sdpa, other, atol=0.02 * float(sdpa.detach().abs().max()))
        assert (sdpa - other).abs().mean() < 0.01
    assert not torch.equal(found[1][0], found[2][0])  # it was another computation


def test_rows_lie_end_to_end_in_bins_of_one_length_and_no_more_than_stay_in_the_cache(monkeypatch):
    lengths = torch.randint(1, 120, (90, 2), generator=torch.Generator().manual_seed(0)).tolist()
    lengths = [(source, min(target, 40)) for source, target in lengths]
    groups = unpadded.in_bins(lengths)
    assert sorted(row for _, bins in groups for rows in bins for row in rows) == list(range(90))
    for sides, bins in groups:
        assert all(side % 32 == 0 and side >= 64 for side in sides)
        assert len(bins) * max(sides) ** 2 <= unpadded.SCORES_TOGETHER
        for rows in bins:
            assert all(sum(lengths[row][k] for row in rows) <= side for k, side in enumerate(sides))
    filled = sum(source for source, _ in lengths) / sum(sides[0] for sides, bins in groups for rows in bins if rows)
    assert filled > 0.8
    assert unpadded.in_bins([(384,), (376,), (8,)]) == [((384,), [[0]]), ((384,), [[1, 2]])]
    assert unpadded.in_bins([(30,)] * 9) == [((64,), [[0, 1], [2, 3], [4, 5], [6, 7], [8], [], [], []])]
    assert unpadded.in_bins([(0,), (5,)]) == [((64,), [[1, 0], [], [], []])]

    mask = batch()["attention_mask"].bool()
    vectors = torch.randn(3, *mask.shape, 8)
    packed = [PackedBatch(mask)]
    monkeypatch.setattr(unpadded, "SCORES_TOGETHER", 1)
    packed.append(PackedBatch(mask))
    assert len(packed[0].groups) == 1
    assert len(packed[1].groups) > 4
    found = []
    for part in packed:
        inputs = (part.pack(x).view(1, -1, 2, 4).transpose(1, 2) for x in vectors)
        found.append(part.unpack(part.attend(*inputs, 0.0, None).flatten(2))[mask])
    assert torch.allclose(*found, atol=1e-6)


PAIRS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
PAIRS |= {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 200, "max_position_embeddings": 64}
PAIRS |= {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 1}
PAIRS |= {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
T5 = {"d_model": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2, "d_ff": 24, "vocab_size": 200, "pad_token_id": 1}


def encoder_decoder(kind: str):
    torch.manual_seed(0)
    if kind == "t5":
        return T5ForConditionalGeneration(T5Config(**T5)).eval()
    if kind != "bert2bert":
        return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **PAIRS)).eval()
    parts = (
        BertConfig(**SIZES, **NO_DROPOUT),
        BertConfig(**SIZES, **NO_DROPOUT, is_decoder=True, add_cross_attention=True),
    )
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    config.pad_token_id, config.decoder_start_token_id = 1, 0
    return EncoderDecoderModel(config=config).eval()


@pytest.mark.parametrize("kind", ["m2m_100", "bart", "mbart", "marian", "pegasus", "bert2bert"])
@pytest.mark.parametrize("longest", [9, 30])
def test_loss_and_gradients_of_unpadded_pairs_equal_those_of_the_padded_model(kind, longest):
    padded = encoder_decoder(kind)
    packed = copy.deepcopy(padded)
    pairs = UnpaddedPairs(packed)
    assert pairs.works
    rows = batch(20, 30)
    rows["attention_mask"][:, 0] = 1
    ids = torch.randint(5, 200, (20, longest))
    labels = ids.masked_fill(torch.arange(longest) >= torch.randint(1, longest + 1, (20, 1)), -100)
    labels[3, 0] = -100  # one that is not asked for, in front of some that are
    labels[3, 1:4] = 7
    inputs = rows | {"decoder_input_ids": ids, "use_cache": False}
    gradients = []
    for model, within in ((padded, nullcontext()), (packed, pairs.at(rows["attention_mask"], labels))):
        with within:
            logits = model(**inputs).logits
        loss = label_losses(logits, labels).sum()
        loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()} | {"loss": loss.detach()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            assert torch.allclose(gradients[1][name], gradient, rtol=1e-4, atol=1e-5), name
    with torch.no_grad():  # outside it is what it was
        assert torch.equal(packed(**inputs).logits, padded(**inputs).logits)


def test_pairs_compute_real_sub_tokens_only():
    model = encoder_decoder("m2m_100")
    pairs, rows = UnpaddedPairs(model), batch(20, 30)
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)[:, :20]
    sizes = {}
    for name in ("encoder", "decoder"):
        last = model.get_submodule(f"model.{name}.layers.1.fc2")
        last.register_forward_hook(lambda _, args, output, name=name: sizes.update({name: output[..., 0].numel()}))
    with torch.no_grad(), pairs.at(rows["attention_mask"], labels):
        model(**rows, decoder_input_ids=labels.clamp(min=0))
    for name, real in (("encoder", rows["attention_mask"].sum()), ("decoder", (labels != -100).sum())):
        assert real < sizes[name] <= real + 64


def test_an_encoder_decoder_that_cannot_is_left_as_it_was():
    model = encoder_decoder("t5")  # adds to its scores what depends on the distance
    rows = batch() | {"decoder_input_ids": torch.randint(5, 200, (20, 9))}
    with torch.no_grad():
        expected = model(**rows).logits
        assert not UnpaddedPairs(model).works
        assert torch.equal(model(**rows).logits, expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
