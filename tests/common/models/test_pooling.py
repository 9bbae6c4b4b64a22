"""Test that a classifier reads the mean of all tokens, in the plain class of transformers."""

import json
import shutil

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, AutoModelForTokenClassification

from common.args import ClassifierArguments, ModelArguments, SpeedArguments
from common.errors import InputError
from common.models import load_model
from common.models.load import LoadedModel, trained_pooling
from common.models.pooling import pool, pool_mean
from common.models.structure import layer_names, pooling_names
from common.speed import apply
from common.tuning import TuningArguments, tune

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
IDS = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(9) < torch.tensor([[4], [9], [6]])).long()


def classifier(kind: str):
    config = CONFIG_MAPPING[kind](**SIZE)
    for name in ("intermediate_size", "hidden_dim"):
        if hasattr(config, name):
            setattr(config, name, 48)
    config.num_labels, config.pad_token_id = 3, 0
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "camembert", "ernie"])
def test_the_first_token_of_the_pooling_layer_is_the_normalised_mean(kind, tmp_path):
    model = classifier(kind)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    with torch.no_grad():
        states = model.base_model(**inputs)[0]
        assert pool_mean(model) is None
        pooled = model.base_model(**inputs)[0][:, 0]
        mean = (states * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True)
        assert (torch.cosine_similarity(pooled, mean - mean.mean(-1, keepdim=True)) > 0.99).all()
        assert pool_mean(model) is None  # has one already
        assert len(layer_names(model, pooling=True)) == 3
        model.save_pretrained(tmp_path)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_modernbert_has_a_setting():
    model = classifier("modernbert")
    assert pool_mean(model) is None
    assert model.config.classifier_pooling == "mean"
    assert not pooling_names(model)


@pytest.mark.parametrize("kind", ["mpnet", "albert", "deberta-v2"])
def test_a_model_that_cannot_weigh_all_tokens_alike_stays_as_it_is(kind):
    model = classifier(kind)
    before, config = {n: w.clone() for n, w in model.state_dict().items()}, model.config.to_dict()
    reason = pool_mean(model)
    if reason is None:  # weighs them alike
        assert pooling_names(model)
        return
    assert kind in reason
    assert model.config.to_dict() == config
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_sentence_transformers_says(tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    for settings, pooling in (
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, "first"),
        ({"pooling_mode": "max"}, None),
    ):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
        assert trained_pooling(str(tmp_path)) == pooling
    (tmp_path / "1_Pooling" / "config.json").rename(tmp_path / "config.json")
    assert trained_pooling(str(tmp_path)) is None


def test_what_was_trained_between_keeps_the_pooling(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "encoder")
    (tmp_path / "encoder" / "1_Pooling").mkdir()
    (tmp_path / "encoder" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    tagger = load_model(AutoModelForTokenClassification, ModelArguments(str(tmp_path / "encoder")), ["a", "b"], 32)
    tagger.model.save_pretrained(tmp_path / "tagger")
    tagger.tokenizer.save_pretrained(tmp_path / "tagger")
    for asked, number in (("auto", 1), ("first", 0)):
        loaded = load_model(
            AutoModelForSequenceClassification, ModelArguments(str(tmp_path / "tagger")), ["a", "b"], 32
        )
        pool(loaded, ClassifierArguments(str(tmp_path / "tagger"), pooling=asked))
        assert bool(pooling_names(loaded.model)) == number
        loaded.model.save_pretrained(tmp_path / asked)
        assert trained_pooling(str(tmp_path / asked)) == ("mean" if number else "first")


def test_it_is_never_trained_and_no_other_head_reads_it(tiny, tmp_path):
    def load(auto_class=AutoModelForSequenceClassification, name=tiny):
        return load_model(auto_class, ModelArguments(model_name_or_path=name), ["a", "b"], 32)

    for method in ("full", "head", "top:1", "lora", "bias", "layernorm", "adapter", "gradual"):
        loaded = load()
        pool(loaded, ClassifierArguments(tiny, pooling="mean"))
        tuned = tune(loaded, TuningArguments(tuning=method), "SEQ_CLS")
        trained = [name for name, weight in tuned.model.named_parameters() if weight.requires_grad]
        assert not [name for name in trained if "layer.2." in name]
        assert bool([name for name in trained if "layer.1." in name]) == (method != "head")
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    asked = ClassifierArguments(str(tmp_path), pooling="first")
    with pytest.raises(InputError, match="trained with --pooling mean; leave it out"):
        pool(load(name=str(tmp_path)), asked)
    tagger = load(AutoModelForTokenClassification, str(tmp_path)).model
    assert len(layer_names(tagger)) == tagger.config.num_hidden_layers == 2
    assert not hasattr(tagger.config, "pooling_layer")


def test_it_is_computed_at_the_first_token_only(tiny):
    models = [load_model(AutoModelForSequenceClassification, ModelArguments(tiny), ["a", "b"], 32) for _ in range(2)]
    models[1].model.load_state_dict(models[0].model.state_dict())
    for loaded in models:
        pool(loaded, ClassifierArguments(tiny, pooling="mean"))
        loaded.model.eval()
    speed = apply(models[1], SpeedArguments())
    assert "last_layer_at_first_token" in speed.applied
    plain, fast = (LoadedModel(m.model, m.tokenizer).model(input_ids=IDS, attention_mask=MASK).logits for m in models)
    assert torch.allclose(plain, fast, atol=1e-5)
