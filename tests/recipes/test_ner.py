"""Test the NER recipe as a user runs it: sample, results, saved model, prediction, LoRA and overfitting."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification, pipeline

from common.errors import InputError
from common.training.checkpoints import sha256
from recipes.ner import predict, train
from recipes.ner.reading import check_row
from recipes.ner.tagging import entity_spans
from tests.conftest import SAMPLE, read_jsonl, write_jsonl


def predicted_by(model: str, rows: list[dict], folder: Path) -> list[dict]:
    source = write_jsonl(folder / "in.jsonl", rows)
    predict.main(
        [
            "--model",
            model,
            "--input",
            source,
            "--output",
            str(folder / "found.jsonl"),
            "--precision",
            "fp32",
            "--overwrite",
        ]
    )
    return read_jsonl(folder / "found.jsonl")


def entities_of(tokens: list[str], tags: list[str]) -> list[tuple]:
    """Return (label, start, end) in characters of the tokens joined by spaces."""
    starts = np.cumsum([0] + [len(token) + 1 for token in tokens])
    return [(t, int(starts[a]), int(starts[b - 1]) + len(tokens[b - 1])) for t, a, b in entity_spans(tags)]


def test_the_sample_is_what_it_promises():
    rows = {split: read_jsonl(SAMPLE / f"{split}.jsonl") for split in ("train", "validation", "test")}
    assert len(rows["train"]) >= 300
    assert min(len(rows["validation"]), len(rows["test"])) >= 100
    sentences = [" ".join(row["tokens"]).lower() for split in rows.values() for row in split]
    assert len(set(sentences)) == len(sentences)  # no sentence occurs twice, nor in train and test
    for split in rows.values():
        for row in split:
            assert list(check_row({k: row[k] for k in ("tokens", "ner_tags")})) == []
        assert {tag[2:] for row in split for tag in row["ner_tags"]} - {""} == {"PER", "ORG", "LOC", "MISC"}
        assert np.mean([set(row["ner_tags"]) == {"O"} for row in split]) > 0.05
    shapes = [
        " ".join(word if tag == "O" else tag for word, tag in zip(row["tokens"], row["ner_tags"], strict=True))
        for split in rows.values()
        for row in split
    ]
    assert len(set(shapes)) > 0.99 * len(shapes)  # no sentence pattern with exchanged names


def test_a_run_leaves_results_model_card_and_predictions(arguments, small, tmp_path, capsys):
    metrics = train.main(arguments)
    out = tmp_path / "out"
    results = {s: json.loads((out / f"{s}_results.json").read_text()) for s in ("train", "eval", "test", "all")}
    assert results["test"]["test_f1"] == results["all"]["test_f1"] == metrics["test_f1"]
    assert results["eval"]["eval_loss"] == metrics["eval_loss"]
    assert results["train"]["train_loss"] > 0
    assert "test_gazetteer_f1" in results["test"]
    card = (out / "README.md").read_text()
    assert f"| f1 | {metrics['test_f1']:.4f} |" in card
    assert "pipeline_tag: token-classification" in card
    assert not (out / "training_args.bin").exists()
    table = capsys.readouterr().out
    for name in ("PER", "ORG", "LOC", "MISC", "all (micro)", "all (macro)", "gazetteer of train"):
        assert name in table
    rows = read_jsonl(out / "predictions_test.jsonl")
    gold = read_jsonl(Path(small["test"]))
    assert [(row["id"], row["tokens"], row["ner_tags"]) for row in rows] == [
        (row["id"], row["tokens"], row["ner_tags"]) for row in gold
    ]
    for row in rows:
        assert len(row["predicted_tags"]) == len(row["tokens"])
        assert row["differ_at"] == [
            i for i, (a, b) in enumerate(zip(row["ner_tags"], row["predicted_tags"], strict=True)) if a != b
        ]


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_it_overfits_on_entity_f1_and_predict_finds_the_same(tiny, small, tmp_path, lora):
    rows = read_jsonl(Path(small["train"]))
    rows = sorted(rows, key=lambda row: -len(row["tokens"]))[:2] + rows[:10]
    file = write_jsonl(tmp_path / "few.jsonl", rows)
    out = str(tmp_path / "out")
    adapted = ("--lora_r", "32", "--lora_dropout", "0", "--lora_target_modules", "query", "key", "value", "dense")
    metrics = train.main(
        [
            *("--train_file", file, "--validation_file", file, "--test_file", file, "--model_name_or_path", tiny),
            *("--output_dir", out, "--max_seq_length", "24", "--doc_stride", "8", "--precision", "fp32"),
            *("--per_device_train_batch_size", "8", "--weight_decay", "0", "--warmup_steps", "0.3"),
            *("--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true"),
            *("--num_train_epochs", "120" if lora else "60", "--learning_rate", "2e-3", *(adapted if lora else ())),
        ]
    )
    assert metrics["test_f1"] > 0.95

    model = AutoModelForTokenClassification.from_pretrained(out)
    assert model.config.id2label[model.config.label2id["B-PER"]] == "B-PER"
    found = pipeline("token-classification", model=out, aggregation_strategy="simple")(" ".join(rows[0]["tokens"]))
    assert {entity["entity_group"] for entity in found} <= {"PER", "ORG", "LOC", "MISC"}

    in_training = read_jsonl(Path(out, "predictions_test.jsonl"))
    assert any(len(row["tokens"]) > 24 for row in rows), "the test needs sentences of several windows"
    after = predicted_by(out, [{"tokens": row["tokens"], "n": i} for i, row in enumerate(rows)], tmp_path)
    assert [row["n"] for row in after] == list(range(12))
    for row, before in zip(after, in_training, strict=True):
        found = [(e["label"], e["start"], e["end"]) for e in row["entities"]]
        assert found == entities_of(row["tokens"], before["predicted_tags"])

    assert Path(out, "adapter").exists() == lora
    if lora:
        torch.manual_seed(5)  # another head under the adapter, which the saved head must replace
        base = AutoModelForTokenClassification.from_pretrained(tiny, num_labels=model.config.num_labels)
        ids = torch.randint(5, 500, (2, 20))
        with torch.no_grad():
            unmerged = PeftModel.from_pretrained(base, f"{out}/adapter").eval()(input_ids=ids).logits
            assert (model.eval()(input_ids=ids).logits - unmerged).abs().max() < 1e-4


def test_predict_keeps_rows_order_and_offsets(arguments, tmp_path):
    train.main([*arguments, "--num_train_epochs", "12", "--learning_rate", "3e-3"])
    out = str(tmp_path / "out")
    texts = [" ".join(row["tokens"]) for row in read_jsonl(SAMPLE / "validation.jsonl")[:30]]
    rows = [{"text": text, "n": i} for i, text in enumerate(texts)]
    rows[3] = {"text": "", "n": 3}
    rows[5] = {"text": "Ünïcode 東京 \u200b\U0001f600 " + "very " * 300 + "long text in Oslo", "n": 5}
    found = predicted_by(out, rows, tmp_path)
    assert [{k: row[k] for k in ("text", "n")} for row in found] == rows
    for row in found:
        for entity in row["entities"]:
            assert row["text"][entity["start"] : entity["end"]] == entity["text"]
            assert 0 < entity["score"] <= 1
    assert sum(len(row["entities"]) for row in found) > 0

    source = write_jsonl(tmp_path / "in.jsonl", rows)
    small_buffer = str(tmp_path / "small.jsonl")
    predict.main(
        ["--model", out, "--input", source, "--output", small_buffer, "--precision", "fp32", "--buffer_rows", "4"]
    )
    for row, other in zip(found, read_jsonl(Path(small_buffer)), strict=True):
        assert [{**e, "score": None} for e in row["entities"]] == [{**e, "score": None} for e in other["entities"]]


def test_predict_reads_plain_text_and_refuses_what_it_cannot_use(arguments, tiny, tmp_path):
    train.main(arguments)
    out = str(tmp_path / "out")
    (tmp_path / "a.txt").write_text("Ann left Oslo.\nNobody came.\n", encoding="utf-8")
    target = tmp_path / "b.jsonl"
    predict.main(["--model", out, "--input", str(tmp_path / "a.txt"), "--output", str(target)])
    assert [row["text"] for row in read_jsonl(target)] == ["Ann left Oslo.", "Nobody came."]

    written = target.read_text()
    with pytest.raises(InputError, match="exists already"):
        predict.main(["--model", out, "--input", str(tmp_path / "a.txt"), "--output", str(target)])
    assert target.read_text() == written
    bad = write_jsonl(
        tmp_path / "bad.jsonl",
        [{"text": "fine"}, {"txt": "a"}, {"tokens": ["b", 1]}, {"text": "c", "tokens": 1}],
    )
    with pytest.raises(InputError) as error:
        predict.main(["--model", out, "--input", bad, "--output", str(tmp_path / "c.jsonl")])
    assert [line.split(":")[1] for line in str(error.value).splitlines()] == ["2", "3", "4"]
    assert not (tmp_path / "c.jsonl").exists()
    with pytest.raises(InputError, match="not ForTokenClassification; name a model of this recipe"):
        predict.main(["--model", tiny, "--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "c.jsonl")])
    gold = write_jsonl(tmp_path / "gold.jsonl", [{"text": "Ann", "entities": [[0, 3, "PER"]]}, {"text": "b"}])
    predict.main(["--model", out, "--input", gold, "--output", str(tmp_path / "e.jsonl")])
    rows = read_jsonl(tmp_path / "e.jsonl")
    assert rows[0]["entities"] == [[0, 3, "PER"]]
    assert all("predicted_entities" in row for row in rows)
    blank = write_jsonl(tmp_path / "blank.jsonl", [{"text": ""}, {"tokens": []}, {"text": " "}])
    predict.main(["--model", out, "--input", blank, "--output", str(tmp_path / "d.jsonl"), "--buffer_rows", "1"])
    assert [row["entities"] for row in read_jsonl(tmp_path / "d.jsonl")] == [[], [], []]
    with pytest.raises(InputError, match="give --input FILE and --output FILE"):
        predict.main([])


def test_repair_is_asked_for_and_counted(arguments, tmp_path, capsys):
    rows = read_jsonl(SAMPLE / "train.jsonl")[:20]
    iob1 = [row | {"ner_tags": [tag.replace("B-", "I-") for tag in row["ner_tags"]]} for row in rows]
    file = write_jsonl(tmp_path / "iob1.jsonl", iob1)
    arguments[arguments.index("--train_file") + 1] = file
    with pytest.raises(InputError, match="--repair_bio"):
        train.main(arguments)
    train.main([*arguments, "--repair_bio"])
    stray = sum(a.startswith("B-") for row in rows for a in row["ner_tags"])
    assert f"--repair_bio: {stray} tags I-X became B-X" in capsys.readouterr().out


def test_parts_of_speech_are_scored_and_predicted_word_by_word(arguments, small, tmp_path):
    for file in small.values():
        rows = [{"tokens": r["tokens"], "ner_tags": ["NOUN" if t[0].isupper() else "VERB" for t in r["tokens"]]}
                for r in read_jsonl(Path(file))]  # fmt: skip
        write_jsonl(Path(file), rows)
    metrics = train.main([*arguments, "--num_train_epochs", "6"])
    assert metrics["test_NOUN_support"] + metrics["test_VERB_support"] == sum(len(r["tokens"]) for r in rows)
    assert metrics["test_accuracy"] == pytest.approx(metrics["test_f1"])
    assert metrics["test_f1"] > 0.8
    out = str(tmp_path / "out")
    assert set(AutoConfig.from_pretrained(out).label2id) == {"NOUN", "VERB"}
    (found,) = predicted_by(out, [{"text": "Ann met Bob"}], tmp_path)
    assert [entity["text"] for entity in found["entities"]] == ["Ann", "met", "Bob"]


def test_the_same_seed_gives_the_same_model(arguments, tmp_path):
    for name in ("a", "b"):
        train.main([*arguments, "--output_dir", str(tmp_path / name)])
    assert sha256(tmp_path / "a" / "model.safetensors") == sha256(tmp_path / "b" / "model.safetensors")


@pytest.mark.parametrize("model_type", ["distilbert", "roberta", "electra", "modernbert", "xlm-roberta"])
def test_other_architectures_train_and_predict(tokenizer, arguments, tmp_path, model_type):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if model_type == "distilbert":
        sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    config = AutoConfig.for_model(
        model_type, vocab_size=len(tokenizer), max_position_embeddings=130, **sizes, **special
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    arguments[arguments.index("--model_name_or_path") + 1] = str(tmp_path / "base")
    train.main(arguments)
    found = predicted_by(str(tmp_path / "out"), [{"text": "Ann left Oslo."}] * 3, tmp_path)
    assert len(found) == 3


def test_gradient_checkpointing_changes_no_weight(arguments, tmp_path):
    train.main([*arguments, "--output_dir", str(tmp_path / "a")])
    train.main([*arguments, "--output_dir", str(tmp_path / "b"), "--activation_checkpointing"])
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6
