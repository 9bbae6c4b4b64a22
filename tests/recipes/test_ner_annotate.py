"""Test which sentences are chosen to be labelled, and that corrected tags come back from each tool."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification, BertConfig, BertForTokenClassification

from common.errors import InputError
from common.tools.annotate import select
from common.tools.annotate.strategies import entropies, margins
from recipes.ner.annotate import Annotator
from recipes.ner.arguments import NerDataArguments
from recipes.ner.reading import load_tagged
from recipes.ner.tagging import entity_spans
from tests.conftest import SAMPLE, read_jsonl, write_jsonl

TAGS = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]


@pytest.fixture
def sentences() -> list[list[str]]:
    return [row["tokens"] for row in read_jsonl(SAMPLE / "train.jsonl")[:12]]


@pytest.fixture
def saved(tokenizer, sentences, tmp_path):
    """Return a function that saves a random tagger with more entries in its configuration."""

    def save(tags=TAGS, **more) -> str:
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=128, initializer_range=0.6, id2label=dict(enumerate(tags)),
            label2id={tag: i for i, tag in enumerate(tags)}, **({"max_seq_length": 64, "doc_stride": 16} | more),
        )  # fmt: skip
        torch.manual_seed(1)
        BertForTokenClassification(config).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


def annotate(model, rows, tmp_path, *more, output="to_label.jsonl"):
    pool = write_jsonl(tmp_path / "pool.jsonl", rows)
    words = ["--model", model, "--input", pool, "--output", str(tmp_path / output), "--precision", "fp32"]
    return select.main(["ner", *words, "--overwrite", "true", *more], "")


def tagged(file, **more):
    args = NerDataArguments(train_file=str(file), validation_file=str(file), **more)
    data = load_tagged(args)[0]["train"]
    return [(row["tokens"], row["ner_tags"]) for row in data]


def test_the_words_of_a_sentence_are_averaged_over_its_windows(saved, sentences, tmp_path):
    folder = saved(max_seq_length=20, doc_stride=4)
    annotator = Annotator(folder, precision="fp32")
    long = sentences[0] + sentences[1] + sentences[2]
    guesses = list(annotator.guesses([{"tokens": long}, {"tokens": sentences[3]}], gradients=True))
    tags = [tags for tags, _ in annotator([long, sentences[3]])]
    assert [entity_spans(guess.labels) for guess in guesses] == [entity_spans(of_row) for of_row in tags]
    assert len(guesses[0].labels) == len(long)
    assert guesses[0].gradient[1].shape == (5 * 32,)


def test_the_gradient_is_that_of_the_mean_loss_of_the_guessed_tags(saved, sentences):
    folder = saved(max_seq_length=128)
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    annotator = Annotator(folder, precision="fp32")
    (guess,) = annotator.guesses([{"tokens": sentences[0]}], gradients=True)
    ((tags, _),) = annotator([sentences[0]])
    inputs = annotator.tokenizer(sentences[0], is_split_into_words=True, return_tensors="pt")
    numbers = inputs.word_ids()
    firsts = [i for i, word in enumerate(numbers) if word is not None and word != numbers[i - 1]]
    gold = torch.full_like(inputs["input_ids"], -100)
    gold[0, firsts] = torch.tensor([TAGS.index(tag) for tag in tags])
    output = model(**inputs, labels=gold)
    output.loss.backward()
    assert guess.gradient[1].reshape(5, 32) == pytest.approx(model.classifier.weight.grad.numpy(), abs=1e-5)
    probs = output.logits[0, firsts].detach().softmax(-1).numpy()
    assert guess.margin == pytest.approx(margins(probs).mean(), abs=1e-5)
    assert guess.entropy == pytest.approx(entropies(probs).mean(), abs=1e-5)


@pytest.mark.parametrize("strategy", ["margin", "diverse", "badge"])
def test_rows_of_words_keep_words_and_columns(strategy, saved, sentences, tmp_path, capsys):
    columns = {"tokens": {"name": "words"}, "ner_tags": {"name": "gold"}}
    model = saved(columns=columns)
    rows = [{"words": words, "source": i} for i, words in enumerate(sentences)]
    labeled = write_jsonl(tmp_path / "train.jsonl", [{"text": "".join(sentences[0])}])
    annotate(model, [*rows, rows[1]], tmp_path, "--n", "6", "--strategy", strategy, "--labeled", labeled)
    assert "are left out: 1 equal a labelled row, 1 repeat another row" in capsys.readouterr().out
    found = read_jsonl(tmp_path / "to_label.jsonl")
    assert len({row["source"] for row in found} - {0}) == 6
    assert all(row["words"] == sentences[row["source"]] and len(row["gold"]) == len(row["words"]) for row in found)
    read = tagged(tmp_path / "to_label.jsonl", text_column_name="words", label_column_name="gold")
    assert [words for words, _ in read] == [row["words"] for row in found]


@pytest.mark.parametrize("of_words", [True, False])
def test_tasks_come_back_from_each_tool_with_the_corrected_tags(of_words, saved, sentences, tmp_path):
    model = saved()
    sentences[0] = ["A", "🏦", "in", "New-York/Rio", "."]  # words that no rule of ours would cut like this
    rows = [{"tokens": words} if of_words else {"text": " ".join(words)} for words in sentences]
    annotate(model, rows, tmp_path, "--n", "12")
    wanted = sorted(tagged(tmp_path / "to_label.jsonl"))
    assert sorted(words for words, _ in wanted) == sorted(sentences) or not of_words
    assert {tag[:2] for _, tags in wanted for tag in tags} == {"B-", "I-", "O"}

    annotate(model, rows, tmp_path, "--n", "12", "--format", "doccano")
    exported = [row | {"id": 7 + i, "Comments": []} for i, row in enumerate(read_jsonl(tmp_path / "to_label.jsonl"))]
    assert sorted(tagged(write_jsonl(tmp_path / "doccano.jsonl", exported))) == wanted

    annotate(model, rows, tmp_path, "--n", "12", "--format", "label_studio", output="in.json")
    tasks = json.loads((tmp_path / "in.json").read_text())
    view = ET.parse(tmp_path / "in.xml").getroot()
    assert [label.get("value") for label in view.iter("Label")] == ["LOC", "PER"]
    exported, small = [], []
    for i, task in enumerate(tasks):
        results = task["predictions"][0]["result"]
        assert {result["from_name"] for result in results} <= {view.find("Labels").get("name")}
        exported.append(task | {"id": 90 + i, "annotations": [{"result": results, "was_cancelled": False}]})
        found = {"label": [result["value"] for result in results]} if results else {}
        small.append(task["data"] | found | {"annotator": 1, "annotation_id": i})
    for name, export in (("export", exported), ("min", small)):
        (tmp_path / f"{name}.json").write_text(json.dumps(export))
        assert sorted(tagged(tmp_path / f"{name}.json")) == wanted

    # a correction of the annotator: the first span becomes a LOC, the others go
    for task in exported:
        for result in task["annotations"][0]["result"][:1]:
            result["value"]["labels"] = ["LOC"]
        del task["annotations"][0]["result"][1:]
    (tmp_path / "export.json").write_text(json.dumps(exported))
    corrected = tagged(tmp_path / "export.json")
    assert len(corrected) == 12
    assert all(tags.count("B-LOC") <= 1 and not {"B-PER", "I-PER"} & set(tags) for _, tags in corrected)


def test_rows_of_other_tools_are_read_and_labelled_ones_left_out(saved, sentences, tmp_path):
    text = " ".join(sentences[0])
    rows = [
        {"id": 1, "data": {"text": text}, "annotations": []},
        {"id": 2, "data": {"text": "x y"}, "annotations": [{"result": [
            {"value": {"start": 0, "end": 1, "text": "x", "labels": ["PER"]}}]}]},
        {"id": 3, "text": "Mara called.", "label": [[0, 4, "PER"]]},
        {"id": 4, "text": "Nobody called.", "label": []},
        {"id": 5, "tokens": ["a", "b"], "ner_tags": ["O", "B-PER"]},
    ]  # fmt: skip
    annotate(saved(), rows, tmp_path)
    found = {row["id"]: row for row in read_jsonl(tmp_path / "to_label.jsonl")}
    assert set(found) == {1, 4}
    assert found[1]["text"] == text
    assert "data" not in found[1]
    assert "label" not in found[4]
    assert len(tagged(tmp_path / "to_label.jsonl")) == 2
    annotate(saved(), rows, tmp_path, "--relabel", "true")
    assert len(read_jsonl(tmp_path / "to_label.jsonl")) == 5


def test_models_of_single_words_write_tags(saved, tmp_path):
    model = saved(["ADJ", "NOUN", "O"], tag_scheme="none")
    annotate(model, [{"text": "The old river."}], tmp_path)
    (row,) = read_jsonl(tmp_path / "to_label.jsonl")
    assert row["tokens"] == ["The", "old", "river", "."]
    assert set(row["ner_tags"]) <= {"ADJ", "NOUN", "O"}
    with pytest.raises(InputError, match="--format doccano: labels spans, but the model tags single words"):
        annotate(model, [{"text": "The old river."}], tmp_path, "--format", "doccano")


def test_bad_input_is_named(saved, tmp_path):
    model = saved()
    for rows, message in (
        ([{"body": "x"}], r'pool.jsonl:1: needs "text" \(a text\) or "tokens"'),
        ([{"text": " "}], r"pool.jsonl:1: the text is blank; needed: a text with words"),
        ([], "pool.jsonl: contains no rows; add some"),
    ):
        with pytest.raises(InputError, match=message):
            annotate(model, rows, tmp_path)
    labeled = write_jsonl(tmp_path / "train.jsonl", [{"body": "x"}])
    with pytest.raises(InputError, match=r"train.jsonl:1: needs"):
        annotate(model, [{"text": "x"}], tmp_path, "--labeled", labeled)
    with pytest.raises(InputError, match=r"--labeled .*gone.jsonl: no such file"):
        annotate(model, [{"text": "x"}], tmp_path, "--labeled", str(tmp_path / "gone.jsonl"))
    assert np.isfinite(annotate(model, [{"text": "x"}], tmp_path)[0].guess.margin)
