"""Test relations as a user runs them: sample, both poolings, saved model, predict, triples of texts, overfitting."""

import json
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForTokenClassification,
)

from common.errors import InputError
from common.models import LoadedModel
from recipes.relation import predict, train
from recipes.relation.extraction import MentionFinder, pairs_of, sentence_spans
from recipes.relation.graph import Graph, layout
from recipes.relation.markers import (
    Markers,
    encode_pairs,
    output_names,
    pair_logits,
    relations_of,
    score_at_markers,
    window,
)
from recipes.relation.probe import features, probe
from recipes.relation.reading import check_row
from recipes.relation.scoring import is_directed, most_frequent, scores, semeval_macro_f1
from tests.conftest import ROOT, read_jsonl, write_jsonl

SAMPLE = {s: read_jsonl(ROOT / f"recipes/relation/sample/{s}.jsonl") for s in ("train", "validation", "test")}
MENTIONS = ("head", "tail")


@pytest.fixture
def pairs(tiny, tmp_path) -> list[str]:
    """Return arguments of a run of seconds: tiny model, the first rows of the sample, fp32."""
    words = ["--model_name_or_path", tiny, "--output_dir", str(tmp_path / "out"), "--precision", "fp32"]
    for split, size in (("train", 48), ("validation", 20), ("test", 20)):
        words += [f"--{split}_file", write_jsonl(tmp_path / f"{split}.jsonl", SAMPLE[split][:size])]
    words += ["--num_train_epochs", "2", "--learning_rate", "1e-3", "--per_device_train_batch_size", "16"]
    return [*words, "--save_min_seconds", "0", "--disable_tqdm", "true"]


def predicted_by(model: str, rows: list[dict], folder: Path, *more: str) -> list[dict]:
    source, target = write_jsonl(folder / "in.jsonl", rows), folder / "found.jsonl"
    words = ["--model", model, "--input", source, "--output", str(target), "--precision", "fp32", "--overwrite"]
    predict.main([*words, *more])
    return read_jsonl(target)


def pair(text: str, head: str, tail: str, **more) -> dict:
    """Return a row; the mentions are the first occurrences in the text, of types PER and LOC."""
    ends = {
        name: (text.index(part), text.index(part) + len(part))
        for name, part in zip(MENTIONS, (head, tail), strict=True)
    }
    types = {"head": "PER", "tail": "LOC"}
    return {"text": text} | {n: {"start": a, "end": b, "type": types[n]} for n, (a, b) in ends.items()} | more


def test_the_sample_is_what_it_promises():
    texts = {split: {row["text"] for row in rows} for split, rows in SAMPLE.items()}
    assert {split: len(found) for split, found in texts.items()} == {"train": 300, "validation": 80, "test": 80}
    assert len({text.lower() for found in texts.values() for text in found}) == 460  # no sentence in two splits
    for rows in SAMPLE.values():
        labels = Counter(row["label"] for row in rows)
        assert len(labels) == 9
        assert min(labels.values()) >= 4
        assert 0.4 < labels["no_relation"] / len(rows) < 0.6
        assert {row[name]["type"] for row in rows for name in MENTIONS} == {"PER", "ORG", "LOC", "MISC"}
        assert max(Counter(row["text"] for row in rows).values()) > 2  # several pairs in a sentence
        for row in rows:
            assert list(check_row(row)) == []
    rows = [row for split in SAMPLE.values() for row in split]
    shapes = {  # no sentence pattern with exchanged names
        row["text"].replace(row["head"]["text"], "#").replace(row["tail"]["text"], "#").lower() for row in rows
    }
    assert len(shapes) > 460
    keys = [(row["text"], *((row[n]["start"], row[n]["end"]) for n in MENTIONS)) for row in rows]
    assert len(set(keys)) == len(keys)  # no pair has two labels


# Markers


def with_markers(folder: str, types=("LOC", "PER"), relations=("a", "b")) -> tuple[LoadedModel, Markers]:
    model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=2 * len(relations))
    loaded, marks = LoadedModel(model, AutoTokenizer.from_pretrained(folder)), Markers(list(types))
    marks.add(loaded)
    return loaded, marks


def shown(tokenizer, columns: dict, row: int = 0) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(columns["input_ids"][row]))


def test_mentions_are_marked_with_their_types_in_both_orders(tiny):
    loaded, marks = with_markers(tiny)
    rows = [pair("the Lima of Rome", "Lima", "Rome"), pair("in Rome, Lima is", "Lima", "Rome")]
    rows[1]["head"]["type"] = "GAS"  # not in training
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    encoded = encode_pairs(columns, loaded.tokenizer, marks, 64)
    split = {text: " ".join(loaded.tokenizer.tokenize(text)) for text in ("the", "Lima", "of", "Rome", "in", ",", "is")}
    assert shown(loaded.tokenizer, encoded) == (
        f"[CLS] {split['the']} <head:PER> {split['Lima']} </head:PER> {split['of']} <tail:LOC> {split['Rome']} "
        "</tail:LOC> [SEP]"
    )
    assert shown(loaded.tokenizer, encoded, 1) == (
        f"[CLS] {split['in']} <tail:LOC> {split['Rome']} </tail:LOC> {split[',']} <head> {split['Lima']} </head> "
        f"{split['is']} [SEP]"
    )
    for ids, at, spans in zip(encoded["input_ids"], encoded["at"], encoded["spans"], strict=True):
        tokens = loaded.tokenizer.convert_ids_to_tokens(ids)
        assert [tokens[i][:5] for i in at] == ["<head", "<tail"]
        for (first, last), mention in zip(spans, ("Lima", "Rome"), strict=True):
            assert " ".join(tokens[first:last]) == split[mention]
    bare = encode_pairs(columns, loaded.tokenizer, None, 64)
    assert shown(loaded.tokenizer, bare) == f"[CLS] {split['the']} {split['Lima']} {split['of']} {split['Rome']} [SEP]"
    assert bare["spans"][0][0][0] == bare["at"][0][0]


def test_adjacent_and_unreadable_mentions_and_markers_in_a_text(tiny):
    loaded, marks = with_markers(tiny, types=())
    tokenizer = loaded.tokenizer
    tokenizer.backend_tokenizer.encode_special_tokens = True
    tokenizer.split_special_tokens = True
    rows = [
        pair("x<head>y", "x", "y"),  # a marker in a text is plain text
        {"text": "xy z", "head": {"start": 0, "end": 1, "type": None}, "tail": {"start": 1, "end": 2, "type": None}},
        {
            "text": "x \u200b z",
            "head": {"start": 2, "end": 3, "type": None},
            "tail": {"start": 4, "end": 5, "type": None},
        },
    ]
    encoded = encode_pairs({name: [row[name] for row in rows] for name in rows[0]}, tokenizer, marks, 64)
    for number in range(3):
        tokens = shown(tokenizer, encoded, number).split()
        for mark in ("<head>", "</head>", "<tail>", "</tail>"):
            assert tokens.count(mark) == 1
        assert [tokens[i] for i in encoded["at"][number]] == ["<head>", "<tail>"]
    assert "<head> </head>" in shown(tokenizer, encoded, 2)


@pytest.mark.parametrize("length", [10, 40, 200])
def test_a_window_keeps_both_mentions_in_view(length):
    for room in (10, 16, 31):
        for first in range(0, length - 3, 7):
            for second in range(first + 2, length - 1, 5):
                mentions = [(first, first + 2), (second, second + 1)]
                for order in (mentions, mentions[::-1]):
                    kept = window(length, order, room)
                    assert len(kept) == len(set(kept.tolist())) <= room
                    assert len(kept) == min(length, room) or second - first > room // 2
                    assert {first, first + 1, second} <= set(kept.tolist())
                    assert kept.tolist() == sorted(kept.tolist())
    kept = window(1000, [(100, 400), (500, 900)], 20).tolist()  # mentions longer than the window keep their beginning
    assert kept == [*range(100, 110), *range(500, 510)]


def test_a_long_text_is_cut_around_its_mentions(tiny):
    loaded, marks = with_markers(tiny)
    middle = "and " * 60
    row = pair(f"{middle}Lima was {middle}in Rome {middle}", "Lima", "Rome")
    encoded = encode_pairs({name: [row[name]] for name in row}, loaded.tokenizer, marks, 32)
    text = shown(loaded.tokenizer, encoded)
    assert len(text.split()) <= 32
    lima, rome = (" ".join(loaded.tokenizer.tokenize(word)) for word in ("Lima", "Rome"))
    assert f"<head:PER> {lima} </head:PER>" in text
    assert f"<tail:LOC> {rome} </tail:LOC>" in text
    assert encoded["cut"] == [True]


def test_new_markers_begin_as_the_mean_of_their_words_and_known_ones_stay(tiny, tmp_path):
    loaded, _ = with_markers(tiny)
    plain = AutoModel.from_pretrained(tiny).get_input_embeddings().weight
    tokenizer, weight = loaded.tokenizer, loaded.model.get_input_embeddings().weight
    words = tokenizer("subject person", add_special_tokens=False)["input_ids"]
    added = weight[tokenizer.convert_tokens_to_ids("<head:PER>")]
    assert torch.allclose(added, plain[words].mean(0))
    assert torch.equal(weight[: len(plain)], plain)
    with torch.no_grad():
        added.fill_(3.0)
    loaded.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = with_markers(str(tmp_path), types=("LOC", "ORG", "PER"))
    assert torch.equal(again.model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<head:PER>")], added)
    assert again.model.get_input_embeddings().num_embeddings == len(again.tokenizer) == len(tokenizer) + 4


def test_the_scores_equal_a_linear_layer_on_both_states(tiny):
    loaded, marks = with_markers(tiny, relations=("a", "b", "c"))
    row = pair("the Lima of Rome", "Lima", "Rome")
    encoded = encode_pairs({name: [row[name]] * 2 for name in row}, loaded.tokenizer, marks, 64)
    ids, at = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["at"])
    model = loaded.model.eval()
    with torch.no_grad():
        states = model.base_model(input_ids=ids)[0]
        both = torch.cat([states[0, at[0, 0]], states[0, at[0, 1]]])
        layer = model.classifier
        joint = torch.cat([layer.weight[:3], layer.weight[3:]], 1)
        expected = joint @ both + layer.bias[:3] + layer.bias[3:]
        assert torch.allclose(pair_logits(model(input_ids=ids).logits, at)[1], expected, atol=1e-5)
        score_at_markers(model)
        assert torch.allclose(model(input_ids=ids, markers_at=at).logits[0], expected, atol=1e-5)
        assert model(input_ids=ids).logits.shape == (*ids.shape, 6)
    assert relations_of(output_names(["x", "head y"])) == ["x", "head y"]


# Scores


def numbers(names: list[str], labels: str) -> np.ndarray:
    return np.array([names.index(label) for label in labels.split()])


def test_micro_and_macro_f1_leave_out_no_relation():
    names = ["a", "b", "no_relation"]
    gold = numbers(names, "a a a b no_relation no_relation no_relation")
    decided = numbers(names, "a a no_relation no_relation a no_relation no_relation")
    found = scores(gold, decided, names, "no_relation")
    # as the scorer of TACRED: 2 correct of 3 guessed and of 4 in the key
    assert found["micro_precision"] == pytest.approx(2 / 3)
    assert found["micro_recall"] == pytest.approx(2 / 4)
    assert found["micro_f1"] == pytest.approx(4 / 7)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["accuracy"] == pytest.approx(4 / 7)
    assert found["relation_a_support"] == 3
    assert "relation_no_relation_f1" not in found
    assert scores(gold, gold, names, None)["micro_f1"] == 1.0
    absent = scores(numbers(names, "a a"), numbers(names, "a no_relation"), names, "no_relation")
    assert absent["macro_f1"] == pytest.approx(2 / 3)  # b is neither gold nor predicted


def test_the_official_score_of_semeval_by_hand():
    labels = ["C-E(e1,e2)", "C-E(e2,e1)", "M-T(e1,e2)", "M-T(e2,e1)", "P-P(e1,e2)", "Other"]
    c, c2, m, m2, p, other = labels
    gold = [c, c, c2, m, m2, other, other, c]
    predicted = [c, c2, c2, m, other, c, p, m]
    # C-E: 2 correct; predicted 4 (one in the wrong direction, one of Other); gold 4: P 2/4, R 2/4, F1 0.5
    # M-T: 1 correct; predicted 2, gold 2: F1 0.5. P-P is never gold and does not count.
    assert semeval_macro_f1(gold, predicted, "Other") == pytest.approx(0.5)
    gold, predicted = [c, c, c, m, m, other], [c, c, c2, m, c, m]
    # C-E: 2 correct, predicted 4, gold 3: F1 4/7; M-T: 1 correct, predicted 2, gold 2: F1 1/2
    assert 100 * semeval_macro_f1(gold, predicted, "Other") == pytest.approx(53.57, abs=0.005)
    assert semeval_macro_f1([other, other], [c, other], "Other") == 0.0
    assert is_directed(labels, "Other")
    assert not is_directed([*labels, "part_of"], "Other")
    found = scores(numbers(labels, " ".join(gold)), numbers(labels, " ".join(predicted)), labels, "Other")
    assert found["semeval_macro_f1"] == pytest.approx(0.535714, abs=1e-6)


def test_the_baseline_of_types_by_hand():
    def row(head, tail, label=None):
        return {"head": {"type": head}, "tail": {"type": tail}, "label": label}

    known = [row("P", "L", "lives"), row("P", "L", "lives"), row("P", "L", "none"), row("P", "O", "works"),
             row("O", "L", "none"), row("O", "L", "none"), row("O", "L", "none")]  # fmt: skip
    asked = [row("P", "L"), row("P", "O"), row("O", "L"), row("L", "L"), row(None, None)]
    assert most_frequent(known, asked) == ["lives", "works", "none", "none", "none"]


def test_the_probe_reads_frozen_states_of_the_mentions(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForTokenClassification.from_pretrained(tiny).train()
    rows = Dataset.from_list([
        pair(f"{a} {verb} {b} again and again", a, b, label=verb)
        for a in ("Ann", "Bob", "Mara") for b in ("Oslo", "Rome") for verb in ("left", "saw")
    ])  # fmt: skip
    found = features(rows, model, tokenizer, 64, torch.device("cpu"))
    with torch.no_grad():
        states = model.eval().base_model(**tokenizer(rows[1]["text"], return_tensors="pt"))[0][0]
    assert found.shape == (12, 3 * 64)
    assert np.allclose(found[1][128:], states.mean(0), atol=1e-5)
    width = len(tokenizer.tokenize("Ann"))
    assert np.allclose(found[1][:64], states[1 : 1 + width].mean(0), atol=1e-5)
    data = DatasetDict(train=rows, validation=rows, test=rows)
    relations = ["founded", "left", "saw"]  # no row has the first one
    assert probe(data, relations, model, tokenizer, 64, torch.device("cpu")) == rows["label"][:]
    one = data["train"].filter(lambda row: row["label"] == "left")
    data["train"] = one
    assert set(probe(data, relations, model, tokenizer, 64, torch.device("cpu"))) == {"left"}


# Runs


@pytest.mark.parametrize("pooling", ["markers", "first"])
def test_a_run_leaves_results_pictures_and_predictions(pairs, tmp_path, capsys, pooling):
    metrics = train.main([*pairs, "--pooling", pooling])
    out = tmp_path / "out"
    results = json.loads((out / "all_results.json").read_text())
    for name in ("micro_f1", "macro_f1", "type_pair_micro_f1", "probe_micro_f1", "relation_works_for_support"):
        assert results[f"test_{name}"] == metrics[f"test_{name}"]
    assert (out / "confusion.png").is_file()
    assert (out / "curve.png").is_file()
    table = capsys.readouterr().out
    for name in ("works_for", "all (micro)", "by types alone (micro)", "probe on frozen states"):
        assert name in table
    rows = read_jsonl(out / "predictions_test.jsonl")
    assert [{name: row[name] for name in SAMPLE["test"][0]} for row in rows] == SAMPLE["test"][:20]
    after = predicted_by(str(out), SAMPLE["test"][:20], tmp_path)
    assert [row["predicted"] for row in after] == [row["predicted"] for row in rows]
    each = predicted_by(str(out), SAMPLE["test"][:2], tmp_path, "--all_probabilities", "true")
    assert len(each[0]["probability"]) == 9
    assert sum(each[0]["probability"].values()) == pytest.approx(1, abs=0.01)
    kind = AutoModelForTokenClassification if pooling == "markers" else AutoModelForSequenceClassification
    assert kind.from_pretrained(out).config.num_labels == (18 if pooling == "markers" else 9)


@pytest.mark.parametrize("more", [(), pytest.param(("--lora_r", "32", "--lora_dropout", "0"), marks=pytest.mark.soak)])
def test_it_overfits_and_knows_the_direction(tiny, tmp_path, more):
    texts = [
        ("Ann raised Bob well", "Ann", "Bob"),
        ("Bob was raised by Ann", "Ann", "Bob"),
        ("Ann met Bob", "Ann", "Bob"),
    ]
    rows = []
    for text, parent, child in texts:
        label = "no_relation" if "met" in text else "parent_of"
        rows += [pair(text, parent, child, label=label), pair(text, child, parent, label="no_relation")]
    file, out = write_jsonl(tmp_path / "few.jsonl", rows), str(tmp_path / "out")
    if more:
        more = (*more, "--lora_target_modules", "query", "key", "value", "dense")
    metrics = train.main([
        *("--train_file", file, "--validation_file", file, "--test_file", file, "--model_name_or_path", tiny),
        *("--output_dir", out, "--precision", "fp32", "--per_device_train_batch_size", "6", "--weight_decay", "0"),
        *("--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true", "--learning_rate", "3e-3"),
        *("--num_train_epochs", "60", *more),
    ])  # fmt: skip
    assert metrics["test_micro_f1"] == 1.0
    assert metrics["test_accuracy"] == 1.0
    model = AutoModelForTokenClassification.from_pretrained(out)
    assert list(model.config.id2label.values()) == output_names(["no_relation", "parent_of"])
    assert Path(out, "adapter").exists() == bool(more)
    found = predicted_by(out, [{k: row[k] for k in ("text", *MENTIONS)} for row in rows], tmp_path)
    assert [row["predicted"] for row in found] == [row["label"] for row in rows]


@pytest.mark.parametrize("method", ["lora", *(pytest.param(m, marks=pytest.mark.soak) for m in ("adalora", "dora"))])
def test_lora_trains_the_embeddings_of_the_markers(pairs, tiny, tmp_path, method):
    train.main([*pairs, "--tuning", method, "--max_steps", "6", "--learning_rate", "1e-2"])
    out = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(out)
    after, before = (AutoModel.from_pretrained(path).get_input_embeddings().weight for path in (out, tiny))
    assert torch.equal(after[: len(before)], before)
    added = AutoTokenizer.from_pretrained(tiny)
    used = {f"{role}:{row[role]['type']}>" for row in SAMPLE["train"][:48] for role in MENTIONS}
    for name, words in Markers(["LOC", "ORG", "PER"]).tokens().items():
        initial = before[added(words, add_special_tokens=False)["input_ids"]].mean(0)
        changed = (after[tokenizer.convert_tokens_to_ids(name)] - initial).abs().max()
        assert (changed > 1e-3) == (name.strip("</") in used), name
    found = predicted_by(str(out), [{k: row[k] for k in ("text", *MENTIONS)} for row in SAMPLE["test"][:20]], tmp_path)
    report = read_jsonl(out / "predictions_test.jsonl")
    assert [row["predicted"] for row in found] == [row["predicted"] for row in report]


def test_a_trained_model_is_trained_further_with_its_head_and_markers(pairs, tmp_path, capsys):
    train.main(pairs)
    capsys.readouterr()
    again = [*pairs, "--model_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "more")]
    train.main([*again, "--max_steps", "1", "--learning_rate", "1e-9"])
    assert "new weights" not in capsys.readouterr().out
    before, after = (read_jsonl(tmp_path / name / "predictions_test.jsonl") for name in ("out", "more"))
    assert before == after


def test_bad_arguments_and_other_models_are_refused(pairs, tiny, tmp_path):
    with pytest.raises(InputError, match="--no_relation_label Other: no row has it; the labels are based"):
        train.main([*pairs, "--no_relation_label", "Other"])
    with pytest.raises(InputError, match="--max_seq_length 8: a row has 2 special tokens and needs 10 or more"):
        train.main([*pairs, "--max_seq_length", "8"])
    known = "known: loss, accuracy, .*macro_f1, and those of each label or type, such as relation_based_in_f1$"
    with pytest.raises(InputError, match=f"--metric_for_best_model f1: no such score; {known}"):
        train.main([*pairs, "--metric_for_best_model", "f1"])
    assert not (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(InputError, match=r"is no model of relations; name a folder that recipes\.relation"):
        predicted_by(tiny, SAMPLE["test"][:2], tmp_path)


# Raw texts


def test_pairs_are_of_one_sentence_of_known_types_and_near():
    text = "Ann left Oslo. Bob, who never once in his long life saw a mountain, stayed in Rome."
    assert [text[a:b] for a, b in sentence_spans(text)] == [text[:14], text[15:]]
    mentions = [
        {"text": word, "start": text.index(word), "end": text.index(word) + len(word), "type": kind}
        for word, kind in (("Ann", "PER"), ("Oslo", "LOC"), ("Bob", "PER"), ("Rome", "LOC"))
    ]

    def found(types: list, distance: int) -> list[tuple[str, str]]:
        return [(head["text"], tail["text"]) for head, tail, _ in pairs_of(text, mentions, types, distance)]

    assert found([], 30) == [("Ann", "Oslo"), ("Oslo", "Ann"), ("Bob", "Rome"), ("Rome", "Bob")]
    assert found([["PER", "LOC"]], 30) == [("Ann", "Oslo"), ("Bob", "Rome")]
    assert found([["PER", "LOC"]], 3) == [("Ann", "Oslo")]
    assert found([["ORG", "LOC"]], 30) == []
    text = "Yahoo! Japan hired Ann. Bob left."  # a mention ends no sentence
    mentions = [
        {"start": text.index(word), "end": text.index(word) + len(word), "type": None, "text": word}
        for word in ("Yahoo! Japan", "Ann", "Bob")
    ]
    assert len(sentence_spans(text)) == 3
    assert found([], 30) == [("Yahoo! Japan", "Ann"), ("Ann", "Yahoo! Japan")]


@pytest.fixture
def tagger(tiny, tmp_path) -> str:
    """Return the folder of a token classifier with random weights for tags of PER and LOC."""
    labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    torch.manual_seed(1)
    model = BertForTokenClassification.from_pretrained(tiny, num_labels=5, id2label=dict(enumerate(labels)))
    model.config.max_seq_length = 24
    model.save_pretrained(tmp_path / "tagger")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "tagger")
    return str(tmp_path / "tagger")


def test_mentions_are_those_of_the_tags_of_words(tagger, monkeypatch):
    finder = MentionFinder(tagger, precision="fp32", speed="off")
    assert finder(["", "  "]) == [[], []]
    texts = [
        "Ann Smith's cat left New Oslo, Ann.",
        "word " * 40 + "Ann Oslo",
    ]  # the second is longer than the model reads
    for entities, text in zip(finder(texts), texts, strict=True):
        for entity in entities:
            assert entity["text"] == text[entity["start"] : entity["end"]] == entity["text"].strip()
            assert entity["type"] in ("PER", "LOC")
            assert 0 < entity["score"] <= 1
    tags = {"Ann": "B-PER", "Smith": "I-PER", "New": "B-LOC", "Oslo": "I-LOC"}
    number = {label: i for i, label in finder.labels.items()}
    tokenizer = finder.tokenizer
    first = {tokenizer(word, add_special_tokens=False)["input_ids"][0]: number[tag] for word, tag in tags.items()}

    def logits(columns):
        for i, ids in enumerate(columns["input_ids"]):
            yield [i], torch.nn.functional.one_hot(torch.tensor([[first.get(t, number["O"]) for t in ids]]), 5).float()

    monkeypatch.setattr(finder, "logits", logits)
    found = [[(e["text"], e["type"]) for e in entities] for entities in finder(texts)]
    assert found == [[("Ann Smith", "PER"), ("New Oslo", "LOC"), ("Ann", "PER")], [("Ann", "PER"), ("Oslo", "LOC")]]


def test_texts_in_triples_out(pairs, tagger, tmp_path, capsys):
    train.main([*pairs, "--max_steps", "3"])
    out, picture = str(tmp_path / "out"), tmp_path / "graph.png"
    texts = [row["text"] for row in SAMPLE["test"][:12]] + ["", "Nobody came."]
    rows = [{"text": text, "n": n} for n, text in enumerate(texts)] + [SAMPLE["test"][0]]
    found = predicted_by(out, rows, tmp_path, "--ner_model", tagger, "--graph", str(picture))
    assert [{name: row[name] for name in asked} for row, asked in zip(found, rows, strict=True)] == rows
    assert "predicted" in found[-1]
    assert "triples in 14 texts" in capsys.readouterr().out
    assert picture.stat().st_size > 1000
    allowed = {(row["head"]["type"], row["tail"]["type"]) for row in SAMPLE["train"] if row["label"] != "no_relation"}
    for row in found[:-1]:
        for triple in row["triples"]:
            assert triple["relation"] != "no_relation"
            assert 0 < triple["probability"] <= 1
            assert (triple["head"]["type"], triple["tail"]["type"]) in allowed
            for name in MENTIONS:
                assert row["text"][triple[name]["start"] : triple[name]["end"]] == triple[name]["text"]

    # entities in the row take the place of --ner_model; the same pairs are classified as when they are marked
    row = SAMPLE["test"][0]
    entities = [{"label": row[name]["type"], "start": row[name]["start"], "end": row[name]["end"]} for name in MENTIONS]
    (given,) = predicted_by(out, [{"text": row["text"], "entities": entities}], tmp_path)
    marked = [
        {"text": row["text"], "head": row[a], "tail": row[b]}
        for a, b in permutations(MENTIONS)
        if (row[a]["type"], row[b]["type"]) in allowed
    ]
    expected = [p["predicted"] for p in predicted_by(out, marked, tmp_path) if p["predicted"] != "no_relation"]
    assert [triple["relation"] for triple in given["triples"]] == expected
    (none,) = predicted_by(out, [{"text": row["text"], "entities": entities}], tmp_path, "--min_probability", "1")
    assert none["triples"] == []
    untyped = [{name: value for name, value in one.items() if name != "label"} for one in entities]
    capsys.readouterr()
    (none,) = predicted_by(out, [{"text": row["text"], "entities": untyped}], tmp_path)
    assert none["triples"] == []
    assert (
        "warning: 2 entities have no type, and the relations of the model are between types" in capsys.readouterr().err
    )


def test_predict_refuses_what_it_cannot_use(pairs, tiny, tagger, tmp_path):
    train.main([*pairs, "--max_steps", "1"])
    out = str(tmp_path / "out")
    good = {"text": "Ann left Oslo", "head": [0, 3], "tail": [9, 13]}
    bad = [good, {"text": "Ann"}, {"text": "Ann", "head": [0, 3]}, {"text": 7}, good | {"tail": [9, 99]},
           good | {"predicted": "x"}, {"text": "Ann", "entities": [{"start": 0, "end": 9}]}]  # fmt: skip
    with pytest.raises(InputError) as error:
        predicted_by(out, bad, tmp_path)
    told = str(error.value).splitlines()
    assert [line.split(":")[1] for line in told] == ["2", "3", "4", "5", "6", "7"]
    assert "for raw texts give --ner_model, such as --ner_model outputs/ner" in told[0]
    assert "has head and no tail" in told[1]
    with pytest.raises(InputError, match=r"--graph a.txt: is a picture; choose a name that ends in .png"):
        predicted_by(out, [good], tmp_path, "--graph", "a.txt")
    exists = tmp_path / "graph.png"
    exists.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        predict.main(["--model", out, "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "new.jsonl"),
                      "--graph", str(exists)])  # fmt: skip
    labels = {0: "O", 1: "B-GENE", 2: "I-GENE"}
    BertForTokenClassification.from_pretrained(tiny, num_labels=3, id2label=labels).save_pretrained(tagger)
    with pytest.raises(
        InputError, match=r"--ner_model: finds GENE, but relations are between .*PER.*; train both on the"
    ):
        predicted_by(out, [{"text": "Ann"}], tmp_path, "--ner_model", tagger)
    with pytest.raises(InputError, match="not ForTokenClassification"):
        predicted_by(out, [{"text": "Ann"}], tmp_path, "--ner_model", tiny)


def test_the_graph_keeps_the_most_probable_triples_and_draws_them_apart(tmp_path):
    graph = Graph()
    for i in range(2000):
        name = {"text": f"N{i}"}
        graph.add([{"head": name, "relation": "r", "tail": {"text": "$x$"}, "probability": i / 2000}])
    assert graph.seen == 2000
    assert len(graph.triples) <= 660
    assert graph.draw(str(tmp_path / "a.png")) == 60
    assert ("N1999", "r", "$x$") in graph.triples
    assert Graph().draw(str(tmp_path / "empty.png")) == 0
    edges = [(i, (i + 1) % 12) for i in range(12)] + [(12, 13), (14, 15)]
    places = layout(16, edges)
    gaps = np.linalg.norm(places[:, None] - places[None], axis=-1) + 9 * np.eye(16)
    assert gaps.min() > 0.5
    assert np.isfinite(places).all()
    assert np.array_equal(places, layout(16, edges))
    assert all(0.5 < gaps[a, b] < 2 for a, b in edges)
