"""Test which texts are chosen to be labelled, and that corrected labels come back from each tool."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from common.errors import InputError
from common.tools.annotate import select
from recipes.sentiment.annotate import Annotator
from recipes.sentiment.arguments import SentimentDataArguments
from recipes.sentiment.labels import load_labeled
from recipes.sentiment.predict import Classifier
from tests.conftest import read_jsonl, write_jsonl

NAMES = ["bad", "good", "so-so"]
TEXTS = [f"the {noun} was {word} in {place}" for noun, word, place in zip(
    ("film", "meeting", "river", "house", "report", "company", "train", "city"), ("good", "late", "long", "old") * 2,
    ("London", "March", "the North", "Oslo", "2012", "court", "town", "Berlin"), strict=True)]  # fmt: skip


@pytest.fixture
def saved(tokenizer, tmp_path):
    """Return a function that saves a random classifier with more entries in its configuration."""

    def save(**more) -> str:
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=128, initializer_range=0.6,
            id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)},
            columns={"text": {"name": "text"}, "label": {"name": "label"}}, **more,
        )  # fmt: skip
        torch.manual_seed(1)
        model = BertForSequenceClassification(config).eval()
        with torch.no_grad():  # else each text gets the same class
            model.classifier.bias -= model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.mean(0)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


def annotate(model, rows, tmp_path, *more, output="to_label.jsonl"):
    pool = write_jsonl(tmp_path / "pool.jsonl", rows)
    words = ["--model", model, "--input", pool, "--output", str(tmp_path / output), "--precision", "fp32"]
    return select.main(["sentiment", *words, "--overwrite", "true", *more], "")


def labels(file, **more):
    args = SentimentDataArguments(train_file=str(file), validation_file=str(file), **more)
    data = load_labeled(args)[0]["train"]
    return dict(zip(data["text"], data["label"], strict=True))


def test_the_smallest_margins_of_predict_come_first(saved, tmp_path, capsys):
    model = saved()
    rows = [{"text": text, "id": i} for i, text in enumerate([*TEXTS, TEXTS[2]])]
    labeled = write_jsonl(tmp_path / "train.jsonl", [{"text": TEXTS[0], "label": "good"}])
    annotate(model, rows, tmp_path, "--n", "6", "--labeled", labeled)
    probs = Classifier(model, precision="fp32")(TEXTS)
    best = np.sort(probs, axis=1)
    order = sorted(range(1, len(TEXTS)), key=lambda i: best[i, -1] - best[i, -2])[:6]
    found = read_jsonl(tmp_path / "to_label.jsonl")
    assert [row["id"] for row in found] == order
    assert [row["label"] for row in found] == [NAMES[probs[i].argmax()] for i in order]
    assert [row["annotate"]["rank"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert found[0]["annotate"]["margin"] == pytest.approx(best[order[0], -1] - best[order[0], -2], abs=1e-4)
    assert labels(tmp_path / "to_label.jsonl") == {row["text"]: row["label"] for row in found}
    out = capsys.readouterr().out
    assert "of 9 rows are left out: 1 equal a labelled row, 1 repeat another row" in out
    annotate(model, rows, tmp_path, "--n", "40")
    assert "--n 40: the pool has only 8 rows to label; all of them are written" in capsys.readouterr().out


def test_named_classes_are_written_by_name_beside_files_with_numbers(saved, tmp_path):
    labeled = write_jsonl(tmp_path / "train.jsonl", [{"text": "a text", "label": 1}])  # by --label_names
    annotate(saved(), [{"text": TEXTS[0]}], tmp_path, "--labeled", labeled)
    assert read_jsonl(tmp_path / "to_label.jsonl")[0]["label"] in NAMES


def test_the_gradient_is_that_of_the_loss_of_the_guess(saved):
    folder = saved()
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    annotator = Annotator(folder, precision="fp32")
    guesses = annotator.guesses([{"text": text} for text in TEXTS[:3]], gradients=True)
    for text, guess in zip(TEXTS, guesses, strict=False):
        model.zero_grad()
        gold = torch.tensor([NAMES.index(guess.labels[0])])
        model(**annotator.tokenizer(text, return_tensors="pt"), labels=gold).loss.backward()
        assert np.outer(*guess.gradient) == pytest.approx(model.classifier.weight.grad.numpy(), abs=1e-5)


def test_windows_and_several_labels_a_text(saved, tmp_path):
    folder = saved(
        problem_type="multi_label_classification", thresholds=[0.0, 0.5, 1.1],
        max_seq_length=16, long_texts="windows", doc_stride=4, keep="head",
    )  # fmt: skip
    long = " ".join(TEXTS)
    annotator = Annotator(folder, precision="fp32")
    (guess,) = annotator.guesses([{"text": long}], gradients=True)
    probs = annotator([long])[0]
    assert guess.labels == [name for name, yes in zip(NAMES, probs >= [0.0, 0.5, 1.1], strict=True) if yes]
    assert guess.margin == pytest.approx(np.abs(2 * probs - 1).mean())
    assert guess.gradient[0] == pytest.approx(probs - [1, probs[1] >= 0.5, 0], abs=1e-6)
    annotate(folder, [{"text": long}], tmp_path)
    assert read_jsonl(tmp_path / "to_label.jsonl")[0]["label"] == guess.labels


@pytest.mark.parametrize("strategy", ["entropy", "diverse", "badge", "random"])
def test_tasks_come_back_from_each_tool_with_the_corrected_labels(strategy, saved, tmp_path):
    model, rows = saved(), [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    annotate(model, rows, tmp_path, "--n", "5", "--strategy", strategy, "--format", "doccano")
    imported = read_jsonl(tmp_path / "to_label.jsonl")
    wanted = {row["text"]: "so-so" if i == 0 else row["label"][0] for i, row in enumerate(imported)}
    exported = [row | {"id": 70 + i, "label": [wanted[row["text"]]], "Comments": []} for i, row in enumerate(imported)]
    assert len(wanted) == 5
    assert labels(write_jsonl(tmp_path / "doccano.jsonl", exported)) == wanted

    annotate(model, rows, tmp_path, "--n", "5", "--strategy", strategy, "--format", "label_studio", output="in.json")
    tasks = json.loads((tmp_path / "in.json").read_text())
    view = ET.parse(tmp_path / "in.xml").getroot()
    assert [choice.get("value") for choice in view.iter("Choice")] == NAMES
    exported, small = [], []
    for i, task in enumerate(tasks):
        (prediction,) = task["predictions"]
        (result,) = prediction["result"]
        assert (result["from_name"], result["to_name"]) == (
            view.find("Choices").get("name"),
            view.find("Text").get("name"),
        )
        assert result["value"]["choices"] == [wanted[task["data"]["text"]]] or i == 0
        corrected = result | {"id": "x", "value": {"choices": [wanted[task["data"]["text"]]]}}
        exported.append(task | {"id": 90 + i, "annotations": [{"result": [corrected], "was_cancelled": False}]})
        small.append(task["data"] | {"label": corrected["value"]["choices"][0], "annotator": 1, "annotation_id": i})
    for name, export in (("export", exported), ("min", small)):
        (tmp_path / f"{name}.json").write_text(json.dumps(export))
        assert labels(tmp_path / f"{name}.json") == wanted


def test_pairs_keep_both_texts(saved, tmp_path):
    columns = {name: {"name": theirs} for name, theirs in (("text", "premise"), ("text_pair", "claim"), ("label", "y"))}
    model = saved()
    about = json.loads((tmp_path / "model" / "config.json").read_text()) | {"columns": columns}
    (tmp_path / "model" / "config.json").write_text(json.dumps(about))
    rows = [{"premise": text, "claim": other} for text, other in zip(TEXTS, TEXTS[::-1], strict=True)]
    annotate(model, rows, tmp_path, "--format", "label_studio", output="in.json")
    tasks = json.loads((tmp_path / "in.json").read_text())
    for task in tasks:
        task["annotations"] = task.pop("predictions")
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    args = {"text_pair_column_name": "text_pair"}
    found = load_labeled(SentimentDataArguments(train_file=str(tmp_path / "export.json"), **args,
                                                validation_file=str(tmp_path / "export.json")))[0]["train"]  # fmt: skip
    assert sorted(zip(found["text"], found["text_pair"], strict=True)) == sorted(
        (r["premise"], r["claim"]) for r in rows
    )
    annotate(model, [rows[0] | {"y": None}, rows[1] | {"y": "bad"}], tmp_path)
    (row,) = read_jsonl(tmp_path / "to_label.jsonl")
    assert (row["premise"], row["claim"]) == (TEXTS[0], TEXTS[-1])
    assert row["y"] in NAMES
    with pytest.raises(InputError, match="--format doccano: shows one text, but the model reads pairs"):
        annotate(model, rows, tmp_path, "--format", "doccano")


def test_labels_are_written_as_in_the_labelled_rows(saved, tmp_path):
    model = saved()
    labeled = write_jsonl(tmp_path / "train.jsonl", [{"text": "x", "label": ["good"]}])
    annotate(model, [{"text": text} for text in TEXTS], tmp_path, "--labeled", labeled)
    assert all(row["label"][0] in NAMES for row in read_jsonl(tmp_path / "to_label.jsonl"))


def test_bad_input_is_named(saved, tmp_path):
    model = saved()
    for rows, message in (
        ([{"body": "x"}], r'pool.jsonl:1: needs "text" \(a text\); columns here: body'),
        ([{"text": "x"}, {"text": " "}], r"pool.jsonl:2: text is ' '; needed: a non-blank text"),
        ([], "pool.jsonl: contains no rows; add some"),
        ([{"text": "x", "label": "good"}], "each of the 1 rows has a label; .*add --relabel true"),
    ):
        with pytest.raises(InputError, match=message):
            annotate(model, rows, tmp_path)
    labeled = write_jsonl(tmp_path / "train.jsonl", [{"text": "x"}])
    with pytest.raises(InputError, match="no row is left to label: 2 equal a labelled row; add rows to the pool"):
        annotate(model, [{"text": "x"}, {"text": "x"}], tmp_path, "--labeled", labeled)
    assert not (tmp_path / "to_label.jsonl").exists()
    annotate(model, [{"text": "x", "label": "good"}], tmp_path, "--relabel", "true")
    with pytest.raises(InputError, match=r"to_label.jsonl: exists already"):
        annotate(model, [{"text": "x"}], tmp_path, "--overwrite", "false")
    with pytest.raises(InputError, match=r"Label Studio imports \.json; end the name in \.json"):
        annotate(model, [{"text": "x"}], tmp_path, "--format", "label_studio")
    with pytest.raises(InputError, match="--n and --candidates must be at least 1"):
        annotate(model, [{"text": "x"}], tmp_path, "--n", "0")
    words = ["--model", model, "--input", str(tmp_path / "pool.jsonl"), "--output", str(tmp_path / "o.jsonl")]
    with pytest.raises(InputError, match="is BertForSequenceClassification, not ForTokenClassification"):
        select.main(["ner", *words], "")
    with pytest.raises(InputError, match="qa: cannot choose rows to label; annotate works with recipes that have"):
        select.main(["qa", *words], "")
    with pytest.raises(InputError, match="no such recipe"):
        select.main(["nothing", *words], "")
