"""Test classification: all kinds of labels, truncation, scores, and complete runs from file to prediction."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, pipeline

from common.args import DEFAULT_ENCODER
from common.errors import InputError
from common.models.load import load_tokenizer, resolve_model
from recipes.sentiment import predict, train
from recipes.sentiment.pictures import draw
from recipes.sentiment.scoring import bag_of_words, calibration_error, probabilities, scores, tune_thresholds
from recipes.sentiment.texts import class_weights, cut
from recipes.sentiment.windows import cut_windows, pool, text_numbers
from tests.bad_inputs import tried, variants
from tests.conftest import ROOT, read_jsonl, write_jsonl
from tests.faults import Job, difference
from tests.margins import assert_same_but_for_a_tie

SAMPLE = ROOT / "recipes" / "sentiment" / "sample"
SPLITS = {"train": 48, "validation": 24, "test": 24}


@pytest.fixture
def rows() -> dict[str, list[dict]]:
    return {split: read_jsonl(SAMPLE / f"{split}.jsonl")[:size] for split, size in SPLITS.items()}


@pytest.fixture
def start(tiny, tmp_path):
    """Return a function that trains on rows by split and returns the metrics; `more` extends the command line."""

    def go(rows: dict[str, list[dict]], *more: str) -> dict[str, float]:
        files = [
            w
            for split, data in rows.items()
            for w in (f"--{split}_file", write_jsonl(tmp_path / f"{split}.jsonl", data))
        ]
        return train.main([
            *files, "--model_name_or_path", tiny, "--output_dir", str(tmp_path / "out"), "--overwrite", "true",
            "--max_seq_length", "64", "--precision", "fp32", "--num_train_epochs", "2", "--learning_rate", "1e-3",
            "--per_device_train_batch_size", "16", "--disable_tqdm", "true", *more,
        ])  # fmt: skip

    return go


def predicted(tmp_path, rows: list[dict], *more: str) -> list[dict]:
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    predict.main([
        "--model", str(tmp_path / "out"), "--input", file, "--output", str(tmp_path / "found.jsonl"),
        "--overwrite", "true", "--precision", "fp32", *more,
    ])  # fmt: skip
    return read_jsonl(tmp_path / "found.jsonl")


# Sample


def test_the_sample_is_what_it_promises():
    found = {split: read_jsonl(SAMPLE / f"{split}.jsonl") for split in SPLITS}
    assert [len(found[s]) >= n for s, n in (("train", 400), ("validation", 100), ("test", 100))] == [True] * 3
    texts = [row["text"] for rows in found.values() for row in rows]
    assert len(set(texts)) == len(texts)
    assert len({" ".join(re.findall(r"\w+", text.lower())[:4]) for text in texts}) > 0.99 * len(texts)
    for rows in found.values():
        for domain in ("films", "products", "services"):
            counts = [
                sum(r["domain"] == domain and r["label"] == label for r in rows) for label in ("positive", "negative")
            ]
            assert counts[0] == counts[1] > 10


# Complete runs


def test_a_run_leaves_model_results_pictures_and_hardest_rows(start, rows, tmp_path, capsys):
    metrics = start(rows)
    out = tmp_path / "out"
    printed = capsys.readouterr().out
    assert "all (macro)" in printed
    assert "bag of words" in printed
    assert {"test_accuracy", "test_mcc", "test_roc_auc", "test_calibration_error", "test_weighted_f1"} <= metrics.keys()
    for name in ("confusion", "roc", "precision_recall", "reliability", "learning"):
        with Image.open(out / "pictures" / f"{name}.png") as image:
            image.verify()
    found = read_jsonl(out / "predictions_test.jsonl")
    assert [row["text"] for row in found] == [row["text"] for row in rows["test"]]
    right = np.mean([row["label"] == row["predicted"] for row in found])
    assert metrics["test_accuracy"] == pytest.approx(right)
    hardest = read_jsonl(out / "hardest_test.jsonl")
    assert [row["loss"] for row in hardest] == sorted((row["loss"] for row in hardest), reverse=True)
    assert {row["text"] for row in hardest} == {row["text"] for row in found}
    again = predicted(tmp_path, [{"text": row["text"]} for row in rows["test"]])
    assert [row["predicted"] for row in again] == [row["predicted"] for row in found]
    assert [row["probability"] for row in again] == pytest.approx([row["probability"] for row in found], abs=2e-4)
    classify = pipeline("text-classification", model=str(out))
    assert [r["label"] for r in classify([row["text"] for row in rows["test"]])] == [r["predicted"] for r in found]


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_it_overfits_on_macro_f1(start, rows, lora):
    data = {"train": rows["train"], "validation": rows["train"], "test": rows["train"]}
    more = ["--lora_r", "8", "--learning_rate", "2e-2"] if lora else ["--learning_rate", "3e-3"]
    metrics = start(data, *more, "--num_train_epochs", "30", "--save_strategy", "no", "--eval_strategy", "no")
    assert metrics["test_macro_f1"] > 0.95


def test_integer_labels_are_classes_in_order_of_size(start, rows, tmp_path):
    stars = [10, 9, 2, -1, 0]
    data = {s: [{"text": r["text"], "label": stars[i % 5]} for i, r in enumerate(rs)] for s, rs in rows.items()}
    start(data)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["-1", "0", "2", "9", "10"]
    assert config["problem_type"] == "single_label_classification"
    found = predicted(tmp_path, data["test"][:3], "--all_probabilities", "true")
    assert found[0].keys() == {"text", "label", "predicted", "probability"}
    assert sum(found[0]["probability"].values()) == pytest.approx(1, abs=1e-3)


def test_pairs_and_a_text_alone_are_read_differently(start, rows, tmp_path):
    data = {
        s: [{"a": r["text"], "b": r["domain"], "label": r["domain"]} for r in rs] for s, rs in rows.items()
    }  # fmt: skip
    metrics = start(
        {"train": data["train"], "validation": data["train"], "test": data["train"]},
        *("--text_column_name", "a", "--text_pair_column_name", "b", "--num_train_epochs", "30"),
        *("--learning_rate", "1e-3", "--eval_strategy", "no", "--save_strategy", "no"),
    )
    assert metrics["test_macro_f1"] > 0.95
    pairs = [{"text": r["a"], "text_pair": r["b"]} for r in data["train"][:10]]
    assert [r["predicted"] for r in predicted(tmp_path, pairs)] == [r["b"] for r in data["train"][:10]]


def test_several_labels_a_row_with_tuned_thresholds(start, rows, tmp_path):
    data = {
        s: [{"text": r["text"], "label": [r["domain"]] + ["good"] * (r["label"] == "positive")} for r in rs]
        for s, rs in rows.items()
    }
    data["train"][0]["label"] = []
    metrics = start(data)
    assert {"test_micro_f1", "test_macro_f1"} <= metrics.keys()
    assert "test_mcc" not in metrics
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert len(config["thresholds"]) == 4
    gold = read_jsonl(tmp_path / "out" / "predictions_test.jsonl")
    found = predicted(tmp_path, [{"text": row["text"]} for row in data["test"]])
    assert [row["predicted"] for row in found] == [row["predicted"] for row in gold]
    assert pipeline("text-classification", model=str(tmp_path / "out"), top_k=None)("So so.")


def test_r_drop_without_dropout_changes_nothing_and_with_it_does(start, rows, tmp_path):
    def weights() -> dict[str, torch.Tensor]:
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()

    start(rows)
    plain = weights()
    start(rows, "--r_drop", "1.0")  # the tiny model has no dropout, and both passes are equal
    doubled = weights()
    assert max((plain[k] - doubled[k]).abs().max() for k in plain) < 1e-5


@pytest.mark.soak
def test_two_processes_give_the_scores_of_one(start, rows, tmp_path):
    start(rows)
    words = [w for split in SPLITS for w in (f"--{split}_file", str(tmp_path / f"{split}.jsonl"))]
    words += ["--model_name_or_path", str(tmp_path / "out"), "--max_seq_length", "64", "--precision", "fp32"]
    words += ["--max_steps", "1", "--learning_rate", "0", "--disable_tqdm", "true", "--use_cpu", "true"]
    results = []
    for processes, name in enumerate(("one", "two"), 1):
        arguments = [*words, "--output_dir", str(tmp_path / name)]
        Job(arguments, tmp_path / "log", processes=processes, main=train.main).succeeds()
        results.append(json.loads((tmp_path / name / "all_results.json").read_text()))
    one, two = results
    compared = [k for k in one if k.startswith(("eval_", "test_")) and "second" not in k and "runtime" not in k]
    assert {"test_accuracy", "test_roc_auc", "test_class_positive_f1", "test_calibration_error"} < set(compared)
    reports = [read_jsonl(tmp_path / name / "predictions_test.jsonl") for name in ("one", "two")]
    same = assert_same_but_for_a_tie(*([row["predicted"] for row in report] for report in reports))
    for name in compared if same else ():
        by_rounding = name.endswith(
            ("loss", "calibration_error")
        )  # rounding of probabilities from batches of other shapes
        assert two[name] == pytest.approx(one[name], abs=1e-6 if by_rounding else 0, rel=0), name


# Truncation


def test_head_tail_and_both_keep_the_right_tokens(tokenizer):
    text = " ".join(read_jsonl(SAMPLE / "train.jsonl")[0]["text"].split() * 10)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 60
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    for keep, kept in (("head", ids[:18]), ("tail", ids[-18:]), ("head+tail", ids[:9] + ids[-9:])):
        found = cut(tokenizer, [text, "short"], None, 20, keep)
        assert found["input_ids"][0] == [cls, *kept, sep]
        assert found["cut"] == [True, False]
        assert found["input_ids"][1] == tokenizer("short")["input_ids"]
    assert cut(tokenizer, [text], None, 21, "head+tail")["input_ids"][0] == [cls, *ids[:10], *ids[-9:], sep]


def test_of_a_pair_the_longer_text_is_cut_first(tokenizer):
    long, short = "the film was long " * 20, "it was"
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (long, short))
    for pair, parts in (
        ((long, short), (a[: 17 - len(b)], b)),
        ((short, long), (b, a[: 17 - len(b)])),
        ((long, long), (a[:8], a[:9])),
    ):
        found = cut(tokenizer, [pair[0]], [pair[1]], 20, "head")
        expected = [tokenizer.cls_token_id, *parts[0], tokenizer.sep_token_id, *parts[1], tokenizer.sep_token_id]
        assert found["input_ids"] == [expected]
    whole = cut(tokenizer, ["a film"], ["it was"], 20, "tail")
    assert whole["input_ids"][0] == tokenizer("a film", "it was")["input_ids"]


def test_what_fits_is_encoded_as_the_tokenizer_does_it():
    tokenizer = load_tokenizer(resolve_model(DEFAULT_ENCODER))
    texts = [row["text"] for row in read_jsonl(SAMPLE / "test.jsonl")[:20]]
    for pairs in (None, texts[::-1]):
        found = cut(tokenizer, texts, pairs, 128, "head")
        expected = tokenizer(texts, pairs)
        assert {name: found[name] for name in found if name != "cut"} == dict(expected)
        assert not any(found["cut"])


# Windows


@pytest.mark.parametrize(("size", "stride"), [(20, 5), (20, 0), (20, 10), (4, 2), (3, None), (64, None)])
def test_windows_hold_every_token_and_overlap_by_the_stride(tokenizer, size, stride):
    text = "the film was long and the end was late " * 6
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = cut_windows(tokenizer, [text, "short", text], None, size, stride)
    assert found["first_window"].count(True) == 3
    numbers, shared = text_numbers(found["first_window"]), min(size // 4 if stride is None else stride, (size - 2) // 2)
    for number, whole in ((0, ids), (2, ids), (1, tokenizer("short", add_special_tokens=False)["input_ids"])):
        windows = [row for row, of in zip(found["input_ids"], numbers, strict=True) if of == number]
        assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in windows)
        assert max(map(len, windows)) <= size
        assert [*windows[0][1:-1], *(t for row in windows[1:] for t in row[1 + shared : -1])] == whole


def test_windows_of_a_pair_cover_the_longer_text_beside_the_other(tokenizer):
    long, short = "the film was long " * 20, "it was late"
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (long, short))
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    for pair in ((short, long), (long, short)):
        found = cut_windows(tokenizer, [pair[0]], [pair[1]], 30, 0)
        assert not any(found["cut"])
        read = []
        for row in found["input_ids"]:
            one, other = row[1 : row.index(sep)], row[row.index(sep) + 1 : -1]
            assert (row[0], row[-1]) == (cls, sep)
            assert (one if pair[0] is short else other) == b
            read += other if pair[0] is short else one
        assert read == a
    both = cut_windows(tokenizer, [long], [long], 31, 7)
    assert all(both["cut"])
    assert {tuple(row[1 : row.index(sep)]) for row in both["input_ids"]} == {tuple(a[:14])}


def test_pooled_logits_give_the_mean_probabilities_of_the_windows():
    random = np.random.default_rng(0)
    logits = random.normal(0, 20, (6, 4))
    first = [True, False, False, True, True, False]
    for multi_label in (False, True):
        each = probabilities(list(logits), multi_label)
        pooled = pool(logits, first, multi_label)
        found = probabilities(list(pooled), multi_label)
        assert found == pytest.approx(np.stack([each[:3].mean(0), each[3], each[4:].mean(0)]))
        assert (pooled[1] == logits[3]).all()


@pytest.mark.parametrize("several", [False, True])
def test_a_run_with_windows_scores_and_predicts_one_pooled_result_a_text(start, rows, tmp_path, capsys, several):
    data = {
        s: [{"text": f"{r['text']} " * (1 + 2 * (i % 2)), "label": [r["label"]] if several else r["label"]}
            for i, r in enumerate(rs)] for s, rs in rows.items()
    }  # fmt: skip
    more = ["--multi_label", "true"] if several else []
    metrics = start(data, "--long_texts", "windows", "--max_seq_length", "32", "--head_init", "random", *more)
    printed = capsys.readouterr()
    assert re.search(r"(\d+) of 96 texts exceed --max_seq_length 32 and are read in windows", printed.out)
    report = read_jsonl(tmp_path / "out" / "predictions_test.jsonl")
    assert [row["text"] for row in report] == [row["text"] for row in data["test"]]
    found = predicted(tmp_path, [{"text": row["text"]} for row in data["test"]], "--all_probabilities", "true")
    assert [row["predicted"] for row in found] == [row["predicted"] for row in report]
    gold = [row["label"][0] if several else row["label"] for row in data["test"]]
    probs = np.array([[row["probability"][name] for name in ("negative", "positive")] for row in found])
    right = probs[np.arange(24), [int(label == "positive") for label in gold]]
    if several:  # each row has one label: the loss is a mean over both classes
        right = np.stack([right, 1 - probs.sum(1) + right])
    assert metrics["test_loss"] == pytest.approx(-np.log(right).mean(), abs=1e-3)
    classify = pipeline("text-classification", model=str(tmp_path / "out"), top_k=None)
    windows = classify.tokenizer(data["test"][1]["text"], truncation=True, max_length=32, stride=8,
                                 return_overflowing_tokens=True, return_tensors="pt", padding=True)  # fmt: skip
    inputs = {name: windows[name] for name in classify.tokenizer.model_input_names}
    logits = classify.model(**inputs).logits.detach()
    mean = (logits.sigmoid() if several else logits.softmax(-1)).mean(0)
    assert len(logits) > 1
    assert probs[1] == pytest.approx(mean.numpy(), abs=2e-4)


def test_rows_that_are_cut_are_counted_and_arguments_of_windows_must_agree(start, rows, capsys):
    start(rows, "--max_seq_length", "12", "--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no")
    warning = capsys.readouterr().err
    assert re.search(r"\d+ of 96 texts exceed --max_seq_length 12: only their head is read; --long_texts", warning)
    for more, message in (
        (["--long_texts", "all"], "must be truncate or windows"),
        (["--doc_stride", "4"], "--doc_stride 4: needs --long_texts windows"),
        (["--long_texts", "windows", "--keep_part", "tail"], "--keep_part tail: has no effect"),
        (["--long_texts", "windows", "--doc_stride", "33"], "--doc_stride 33: .* --max_seq_length 64; give at most 32"),
        (["--max_seq_length", "4", "--text_pair_column_name", "domain"], "--max_seq_length 4: .*; give at least 5"),
    ):
        with pytest.raises(InputError, match=message):
            start(rows, *more)


@pytest.mark.soak
def test_windows_on_two_processes_and_resumed_give_the_scores_of_one_run(start, rows, tmp_path):
    data = {s: [r | {"text": f"{r['text']} " * 3} for r in rs] for s, rs in rows.items()}
    words = ["--long_texts", "windows", "--max_seq_length", "32", "--save_min_seconds", "0", "--save_strategy", "steps"]
    words += ["--save_steps", "7", "--eval_strategy", "steps", "--eval_steps", "7"]
    start(data, *words, "--num_train_epochs", "1")
    common = [w for s in SPLITS for w in (f"--{s}_file", str(tmp_path / f"{s}.jsonl"))]
    common += ["--model_name_or_path", str(tmp_path / "out"), *words, "--precision", "fp32", "--use_cpu", "true"]
    common += ["--num_train_epochs", "2", "--learning_rate", "1e-3", "--disable_tqdm", "true", "--speed", "off"]
    results = {}
    for name, processes, kill_at in (("one", 1, None), ("two", 2, None), ("again", 1, 9)):
        arguments = [*common, "--output_dir", str(tmp_path / name)]
        arguments += ["--per_device_train_batch_size", str(8 // processes)]
        if kill_at:
            Job(arguments, tmp_path / "log", kill_at=kill_at, main=train.main).ends()
            arguments += ["--resume_from_checkpoint", "true"]
        Job(arguments, tmp_path / "log", processes=processes, main=train.main).succeeds()
        results[name] = json.loads((tmp_path / name / "all_results.json").read_text())
    assert difference(tmp_path / "again", tmp_path / "one") == 0
    for score in ("eval_loss", "test_loss", "test_accuracy", "test_roc_auc"):
        assert results["again"][score] == results["one"][score]
        assert results["two"][score] == pytest.approx(results["one"][score], abs=1e-3), score


# Scores


def test_scores_by_hand():
    found = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    result = scores(found, np.array([0, 1, 1, 1]), ["a", "b"], None)
    assert result["accuracy"] == 0.75
    assert result["class_b_recall"] == pytest.approx(2 / 3)
    assert result["macro_f1"] == pytest.approx((2 / 3 + 0.8) / 2)
    assert result["weighted_f1"] == pytest.approx((2 / 3 + 3 * 0.8) / 4)
    assert result["mcc"] == pytest.approx((1 * 2 - 1 * 0) / (2 * 1 * 2 * 3) ** 0.5)
    assert result["roc_auc"] == 1.0
    assert result["calibration_error"] == pytest.approx((0.1 + 0.8 + 0.4 + 0.3) / 4)


def test_macro_scores_are_those_of_scikit_learn_where_classes_are_absent():
    random = np.random.default_rng(0)
    names = list("abcde")
    for _ in range(20):
        gold, found = random.integers(0, 3, 6), random.dirichlet(np.ones(5), 6)
        result = scores(found, gold, names, None)
        assert result["macro_f1"] == pytest.approx(f1_score(gold, found.argmax(1), average="macro", zero_division=0))
        assert result["absent_classes"] == 5 - len({*gold, *found.argmax(1)})
    gold = np.array([[1, 0, 0], [0, 1, 0]])
    several = scores(np.array([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1]]), gold, names[:3], [0.5] * 3)
    assert (several["macro_f1"], several["absent_classes"]) == (1, 1)


def test_calibration_error_of_a_calibrated_model_is_small():
    random = np.random.default_rng(0)
    sure = random.uniform(0.5, 1, 200_000)
    assert calibration_error(sure, random.random(200_000) < sure) < 0.005
    assert calibration_error(np.full(10, 0.9), np.zeros(10, dtype=bool)) == pytest.approx(0.9)


def test_tuned_thresholds_are_the_best_there_are():
    random = np.random.default_rng(0)
    found = random.random((60, 3)).round(2)  # with ties
    gold = (random.random((60, 3)) < found).astype(float)
    for i, threshold in enumerate(tune_thresholds(found, gold)):

        def f1(t: float, i=i) -> float:
            chosen = found[:, i] >= t
            return 2 * (chosen * gold[:, i]).sum() / max(1, chosen.sum() + gold[:, i].sum())

        assert f1(threshold) == pytest.approx(max(f1(t) for t in np.linspace(0, 1, 2001)))


@pytest.mark.parametrize("several", [False, True])
def test_the_bag_of_words_of_texts_without_words_is_the_most_frequent_answer(several):
    labels = [["a"], ["a"], ["b"]] if several else ["a", "a", "b"]
    rows = {"text": ["👍", "👍 !", "👎"], "label": labels}
    assert bag_of_words(rows, rows, ["a", "b"], several)["bag_of_words_accuracy"] == pytest.approx(2 / 3)


def test_the_bag_of_words_gives_each_row_a_label_that_all_training_rows_have():
    rows = {"text": ["good film", "bad film"], "label": [["a", "b"], ["a"]]}
    for train_rows in (rows, rows | {"label": [["a"], ["a"]]}):
        of_test = {"text": ["bad film"], "label": [["a"]]}
        assert bag_of_words(train_rows, of_test, ["a", "b"], True)["bag_of_words_accuracy"] == 1


def test_class_weights():
    assert class_weights(None, [0, 1], ["a", "b"], False) is None
    balanced = class_weights(["balanced"], [0, 0, 0, 1], ["a", "b"], False)
    assert balanced.tolist() == pytest.approx([2 / 3, 2.0])
    assert class_weights(["1", "3"], [0, 0, 0, 1], ["a", "b"], False).tolist() == pytest.approx([2 / 3, 2.0])
    for words in (["1"], ["x", "y"], ["-1", "2"], ["0", "0"]):
        with pytest.raises(InputError, match="--class_weights"):
            class_weights(words, [0, 1], ["a", "b"], False)


# Bad input


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": " ", "label": "a"}, "text is ' '; needed: a non-blank text"),
        (
            {"text": "x", "label": None},
            "no label: label is None; add it, remove the row, or pass --drop_unlabeled true",
        ),
        ({"text": "x", "label": {}}, "label is {}; needed: a text, a number, or a list of either"),
        ({"text": "x", "label": ["a"]}, "is of type list of type text, but the first row has type text"),
        ({"text": "x", "label": 3}, "is of type number, but the first row has type text"),
        ({"text": 7, "label": "a"}, "text is 7"),
        ({"txt": "x", "label": "a"}, "no column text; columns here: txt, label; name yours with --text_column_name"),
    ],
)
def test_bad_rows_name_file_and_line(start, rows, tmp_path, bad, message):
    with pytest.raises(InputError) as error:
        start(rows | {"train": [*rows["train"][:3], bad]})
    assert str(error.value).startswith(f"{tmp_path / 'train.jsonl'}:4: ")
    assert message in str(error.value)
    assert not list((tmp_path / "out").glob("*"))


def test_one_class_and_a_label_named_twice_are_refused(start, rows):
    one = [row | {"label": "positive"} for row in rows["train"]]
    with pytest.raises(InputError, match="1 class in the 96 rows read"):
        start({"train": one, "validation": one})
    with pytest.raises(InputError, match=r":1: label \['a', 'a'\] names a class twice; remove the duplicate"):
        start({"train": [{"text": "x", "label": ["a", "a"]}]})


@pytest.mark.parametrize("every", [24, pytest.param(1, marks=pytest.mark.soak)])
def test_corrupted_files_are_refused_or_train_as_they_stand(start, rows, tmp_path, capsys, every):
    good = [{"text": row["text"], "label": row["label"]} for row in rows["train"][:12]]
    found = list(variants(good))
    assert len(found) >= 150
    found = found[::every]
    file = tmp_path / "bad.jsonl"
    words = "--train_file", str(file), "--max_steps", "1", "--save_strategy", "no", "--eval_strategy", "no"
    trained, refused = tried(found, file, lambda: start({"validation": good}, *words), also="class")
    capsys.readouterr()
    assert trained > 30 // every
    assert refused > 100 // every


# Pictures


@pytest.mark.parametrize("classes", [2, 77])
def test_pictures_for_few_and_for_many_classes(tmp_path, classes):
    random = np.random.default_rng(0)
    gold = random.integers(0, classes, 2000)
    found = random.dirichlet(np.ones(classes), 2000)
    found[np.arange(2000), gold] += 0.5
    names = [f"a rather long name of class {i}" for i in range(classes)]
    history = [{"step": i, "loss": 1 / i} for i in range(1, 9)] + [{"step": 4, "eval_loss": 0.5, "eval_macro_f1": 0.6}]
    draw(tmp_path, found / found.sum(1, keepdims=True), gold, names, None, history, "macro_f1")
    sizes = {path.stem: Image.open(path).size for path in (tmp_path / "pictures").glob("*.png")}
    assert set(sizes) == {"confusion", "roc", "precision_recall", "reliability", "learning"}
    assert sizes["confusion"][0] > (1500 if classes == 77 else 400)
