"""Test that the head of a classifier starts at a logistic regression on the frozen encoder."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from common.args import HeadArguments, ModelArguments, TrainingArguments
from common.models import load_model
from common.training.probe import SHARE, STRENGTHS, features_of, last_linear, pass_on, start_at_probe
from tests.common.models.test_pooling import IDS, MASK, classifier


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), precision="fp32")


def loaded_with(tiny: str, labels: list[str]):
    return load_model(AutoModelForSequenceClassification, ModelArguments(model_name_or_path=tiny), labels, 32)


def rows_of(labels: list) -> DatasetDict:
    """Return rows whose tokens tell the label a little."""
    random = np.random.default_rng(0)
    ids = [random.integers(5, 60, 5).tolist() + [70 + int(np.sum(label))] * 2 for label in labels]
    rows = Dataset.from_dict({"input_ids": ids, "labels": labels})
    return DatasetDict({"train": rows, "validation": rows.select(range(0, len(rows), 3))})


def logits_of(model, rows: Dataset) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(rows["input_ids"][:])).logits.numpy()


def test_the_head_has_less_weight_if_training_follows(tiny, args):
    heads = []
    for args.num_train_epochs in (0, 3):
        loaded = loaded_with(tiny, ["a", "b"])
        assert start_at_probe(loaded, rows_of([i % 2 for i in range(30)]), HeadArguments(), args)
        layer = last_linear(loaded.model)
        heads.append(torch.cat([layer.weight, layer.bias[:, None]], 1))
    torch.testing.assert_close(heads[1], SHARE * heads[0])


def test_a_head_without_a_bias_starts_at_the_weights(tiny, args):
    loaded = loaded_with(tiny, ["a", "b"])
    layer = last_linear(loaded.model)
    layer.bias, before = None, layer.weight.clone()
    assert start_at_probe(loaded, rows_of([i % 2 for i in range(30)]), HeadArguments(), args)
    assert (layer.weight - before).abs().max() > 0


@pytest.mark.parametrize("classes", [2, 3])
def test_the_model_is_the_best_of_the_logistic_regressions(tiny, args, classes):
    args.num_train_epochs = 0
    loaded, rows = loaded_with(tiny, ["a", "b", "c"][:classes]), rows_of([i % classes for i in range(30)])
    weights = torch.tensor([0.5, 2.0, 1.0])[:classes]
    assert start_at_probe(loaded, rows, HeadArguments(), args, weights)
    layer = last_linear(loaded.model)
    (features, labels), (held_out, gold) = (features_of(loaded, layer, rows[s], args) for s in ("train", "validation"))
    mean = features.mean(0)
    scale = np.maximum(features.std(0), 0.1 * np.sqrt((features**2).mean()))
    fits = [
        LogisticRegression(C=c, max_iter=300, tol=1e-3).fit((features - mean) / scale, labels, weights.numpy()[labels])
        for c in STRENGTHS
    ]
    found = torch.tensor(logits_of(loaded.model, rows["validation"])).softmax(-1).numpy()
    expected = [fit.predict_proba((held_out - mean) / scale) for fit in fits]
    losses = [log_loss(gold, p, labels=range(classes)) for p in expected]
    same = [i for i, p in enumerate(expected) if np.abs(p - found).max() < 1e-4]
    assert len(same) == 1
    assert losses[same[0]] == min(losses)


def test_several_labels_a_row_and_labels_without_rows(tiny, args):
    loaded = loaded_with(tiny, ["a", "b", "never", "always"])
    labels = [[float(i % 2), float(i % 3 == 0), 0.0, 1.0] for i in range(30)]
    rows = rows_of(labels)
    assert start_at_probe(loaded, rows, HeadArguments(), args, None, True)
    scores = logits_of(loaded.model, rows["train"])
    assert (scores[:, 2] < 0).all()
    assert (scores[:, 3] > 0).all()
    assert ((scores > 0) == (np.array(labels) > 0))[:, :2].mean() > 0.6


def test_a_class_that_only_validation_has_is_rare(tiny, args):
    loaded, rows = loaded_with(tiny, ["a", "b", "c", "d"]), rows_of([i % 3 for i in range(30)])
    assert start_at_probe(loaded, rows, HeadArguments(), args)
    assert 3 not in logits_of(loaded.model, rows["train"]).argmax(-1)


def test_a_head_of_the_checkpoint_and_rows_of_one_label_change_nothing(tiny, args, tmp_path):
    loaded, rows = loaded_with(tiny, ["a", "b"]), rows_of([i % 2 for i in range(30)])
    loaded.model.save_pretrained(tmp_path / "trained")
    loaded.tokenizer.save_pretrained(tmp_path / "trained")
    again = loaded_with(str(tmp_path / "trained"), ["b", "a"])
    before = last_linear(again.model).weight.clone()
    assert not start_at_probe(again, rows, HeadArguments(), args)
    assert torch.equal(last_linear(again.model).weight, before)
    assert start_at_probe(loaded_with(str(tmp_path / "trained"), ["good", "bad"]), rows, HeadArguments(), args)
    random = HeadArguments(head_init="random")
    assert not start_at_probe(loaded_with(str(tmp_path / "trained"), ["good", "bad"]), rows, random, args)
    assert not start_at_probe(loaded, rows_of([0] * 10), HeadArguments(), args)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "modernbert", "mpnet", "fnet"])
def test_the_head_passes_the_output_of_the_encoder_on(kind):
    """After `pass_on`, an affine function of the encoder's output fits what the last layer reads."""
    model = classifier(kind)
    last = last_linear(model)
    pass_on(model, last)
    seen = {}
    last.register_forward_hook(lambda module, args, output: seen.update(read=args[0]))
    with torch.no_grad():
        more = {} if kind == "fnet" else {"attention_mask": MASK}
        states = model.base_model(input_ids=IDS, **more)[0]
        model(input_ids=IDS, **more)
    read = seen["read"]
    read = read[torch.arange(3), 0] if read.ndim == 3 else read
    assert np.corrcoef(states[:, 0].flatten(), read.flatten())[0, 1] > 0.98


def test_a_tagger_starts_at_a_probe_of_the_labelled_tokens(tiny, args):
    loaded = load_model(AutoModelForTokenClassification, ModelArguments(tiny), ["O", "B-X", "I-X"], 32)
    random = np.random.default_rng(0)
    ids = [random.integers(5, 60, random.integers(4, 9)).tolist() for _ in range(20)]
    labels = [[-100, *(i % 3 for i in row[1:-1]), -100] for row in ids]
    rows = Dataset.from_dict({"input_ids": ids, "labels": labels, "attention_mask": [[1] * len(row) for row in ids]})
    layer = last_linear(loaded.model)
    features, found = features_of(loaded, layer, rows, args)
    assert found.tolist() == [i % 3 for row in ids for i in row[1:-1]]
    with torch.no_grad():
        alone = loaded.model.bert(torch.tensor([ids[7]]))[0][0, 1:-1]
    at = sum(len(row) - 2 for row in ids[:7])
    assert features[at : at + len(ids[7]) - 2] == pytest.approx(alone.numpy(), abs=1e-5)
    assert start_at_probe(loaded, DatasetDict(train=rows, validation=rows), HeadArguments(), args)
    with torch.no_grad():
        predicted = [loaded.model.eval()(torch.tensor([row])).logits[0, 1:-1].argmax(-1) for row in ids]
    assert (torch.cat(predicted).numpy() == found).mean() > 0.6
