"""Test summarization as a user runs it: sample, articles, both methods, ROUGE, resume, predict and bad input."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from rouge_score import rouge_scorer
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LEDConfig,
    PegasusConfig,
)

from common.args import TrainingArguments
from common.data.files import read_file
from common.errors import InputError
from recipes.summarization import predict, train, train_abstractive
from recipes.summarization.arguments import SummarizationDataArguments
from recipes.summarization.articles import as_text, check_row, check_splits, flatten, of_cell, units
from recipes.summarization.extractive import (
    cut,
    document_scores,
    encode_windows,
    marked,
    sentence_logits,
    sentence_losses,
)
from recipes.summarization.scoring import KINDS, Rouge, UnicodeWords, oracle, scores, style
from tests.bad_inputs import lines_of, variants
from tests.common.data.test_bad_inputs import check_refusal, no_hang  # noqa: F401  (a fixture)
from tests.conftest import ROOT, read_jsonl, write_jsonl
from tests.faults import Job
from tests.margins import assert_same_but_for_a_tie, assert_same_texts
from tests.recipes.test_translation import SMALL, family

SAMPLE = {s: read_jsonl(ROOT / f"recipes/summarization/sample/{s}.jsonl") for s in ("train", "validation", "test")}


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Return the arguments that all runs here share: the first rows of the sample as files, and the output folder."""
    words = ["--output_dir", str(tmp_path / "out"), "--precision", "fp32", "--disable_tqdm", "true"]
    for split, size in (("train", 24), ("validation", 8), ("test", 10)):
        words += [f"--{split}_file", write_jsonl(tmp_path / f"{split}.jsonl", SAMPLE[split][:size])]
    return [*words, "--save_min_seconds", "0", "--num_train_epochs", "2"]


@pytest.fixture
def picking(files, tiny) -> list[str]:
    """Return arguments of an extractive run of seconds."""
    more = ["--max_source_length", "96", "--per_device_train_batch_size", "8", "--learning_rate", "1e-3"]
    return [*files, "--model_name_or_path", tiny, *more]


@pytest.fixture
def writing(files) -> list[str]:
    """Return arguments of an abstractive run of seconds, on documents of a few words."""
    for split in ("train", "validation", "test"):
        at = files.index(f"--{split}_file") + 1
        rows = [{"document": sum_up(row), "summary": sum_up(row, 4)} for row in read_jsonl(Path(files[at]))]
        write_jsonl(Path(files[at]), rows)
    more = ["--from_scratch", "tiny", "--vocab_size", "400", "--config_overrides", SMALL, "--dropout", "0"]
    more += ["--max_source_length", "64", "--max_target_length", "32", "--max_tokens_per_batch", "512"]
    return [*files, *more, "--num_beams", "2"]


def sum_up(row: dict, words: int = 8) -> str:
    return " ".join(row["document"].split()[:words])


def results(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


# Data


def test_the_sample_is_what_it_promises():
    assert len(SAMPLE["train"]) >= 200
    assert min(len(SAMPLE["validation"]), len(SAMPLE["test"])) >= 50
    rows = [row for split in SAMPLE.values() for row in split]
    assert len({row["document"] for row in rows}) == len({row["summary"] for row in rows}) == len(rows)
    domains = [Counter(row["domain"] for row in split) for split in SAMPLE.values()]
    assert domains[0].keys() == domains[1].keys() == domains[2].keys()
    assert len(domains[0]) == 11
    assert min(domains[2].values()) >= 4
    for row in rows:
        assert list(check_row(row | {"references": None})) == []
        assert 5 <= len(units(row["document"])) <= 20
        assert row["summary"] not in row["document"]


def test_turns_and_texts_of_a_dialogue_are_the_same_and_keep_who_speaks(tmp_path):
    text = "#Person1#: Hello. How are\tyou?\n#Person2#: Fine: thanks."
    turns = [
        {"speaker": "#Person1#", "text": "Hello. How are\nyou?"},
        {"role": "#Person2#", "utterance": "Fine: thanks."},
    ]
    forms = [text, text.split("\n"), turns]
    assert [units(as_text(form)) for form in forms] == [
        ["#Person1#: Hello. How are\tyou?", "#Person2#: Fine: thanks."],
        *[["#Person1#: Hello. How are you?", "#Person2#: Fine: thanks."]] * 2,
    ]
    assert units("「はい。」 次。 終\n") == ["「はい。」", "次。", "終"]
    assert units("One here. Two: there\nThree") == ["One here.", "Two: there", "Three"]
    assert [as_text(x) for x in ([], [""], [{"text": "a"}], 7, None, [["a"]], [{"speaker": "A", "text": 3}])] == [
        None
    ] * 7


def test_every_form_of_rows_is_the_same_data(tmp_path):
    rows = [{"document": f"A {n}. B.", "summary": f"B {n}", "references": [f"B {n}", "C"]} for n in range(3)]
    cells = [
        f'"{r["document"]}","{r["summary"]}","{json.dumps(r["references"]).replace(chr(34), chr(34) * 2)}"'
        for r in rows
    ]
    (tmp_path / "t.csv").write_text("text,tldr,more\n" + "\n".join(cells) + "\n", encoding="utf-8")
    names = {"document_column_name": "text", "summary_column_name": "tldr", "references_column_name": "more"}
    forms = [{"train_file": write_jsonl(tmp_path / "t.jsonl", rows)}, {"train_file": str(tmp_path / "t.csv"), **names}]
    found = []
    for form in forms:
        args = SummarizationDataArguments(**form, validation_file=form["train_file"])
        data, _ = args.load()
        found.append(data["train"].to_list())
    assert found[0] == found[1] == [{**row, "id": str(n)} for n, row in enumerate(rows, 1)]
    assert flatten({"document": ["a", "b"], "summary": "s", "references": ["t"]}) == {
        "document": "a\nb", "summary": "s", "references": ["s", "t"],
    }  # fmt: skip


def test_a_carved_validation_split_shares_no_document(tmp_path):
    turns = [[{"speaker": "Ann", "text": f"Hello {n // 3}."}, {"speaker": "Bob", "text": "Hi."}] for n in range(60)]
    rows = [{"document": document, "summary": f"They meet {n}."} for n, document in enumerate(turns)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for source in ({"train_file": write_jsonl(tmp_path / "t.jsonl", rows)}, {"dataset_name": str(tmp_path / "saved")}):
        data, _ = SummarizationDataArguments(**source).load()
        assert len(data["validation"]) == 6
        assert not {*data["validation"]["document"]} & {*data["train"]["document"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"document": " ", "summary": "a"}, "the document is empty"),
        ({"document": "a", "summary": ""}, "no summary: summary is ''"),
        ({"document": "a", "summary": ["b"]}, "the summary must be a string, not list"),
        ({"document": [{"text": "a"}], "summary": "b"}, "the document must be a string or a list of turns"),
        ({"document": "a", "summary": "b", "references": ["b", 7]}, "the references must be a list of strings"),
        ({"document": "a", "summary": "b", "references": ""}, "the references must be a list of strings"),
        ({"document": "a"}, "no column summary; columns here: document"),
        ({"document": "a", "summary": "b", "domain": "lead"}, "the group name lead is reserved for other scores"),
    ],
)
def test_rows_that_cannot_be_summarized_are_told_with_their_line(tmp_path, row, message):
    more = ["--group_column_name", "domain"] if "domain" in row else []
    file = write_jsonl(tmp_path / "t.jsonl", [{"document": "a b", "summary": "b", "domain": "news"}, row])
    with pytest.raises(InputError) as error:
        train.main(["--train_file", file, "--output_dir", str(tmp_path / "out"), *more])
    assert f"{file}:2: {message}" in str(error.value)
    assert not (tmp_path / "out").exists()


BAD = [
    {"document": f"The {n} cat sat.\nIt slept; {n} times. Then it left.", "summary": f"Cat {n} slept.", "id": str(n)}
    for n in range(12)
]


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.soak)])
def test_every_corrupted_variant_is_read_as_it_stands_or_refused(tmp_path, tokenizer, no_hang, capsys, every):  # noqa: F811
    several = [row | {"references": [row["summary"], f"A cat {row['id']}."]} for row in BAD]
    good = write_jsonl(tmp_path / "good.jsonl", BAD)
    file = tmp_path / "bad.jsonl"
    rouge = Rouge("english", [])
    wrong, counts = [], {"read": 0, "refused": 0}
    for variant in [*variants(BAD), *variants(several, seed=1)][::every]:
        file.write_bytes(variant.content)
        no_hang()
        args = SummarizationDataArguments(train_file=str(file), validation_file=good)
        try:
            data, _ = args.load()
            rows = marked(data, rouge)["train"]
            windows = encode_windows(rows[:], list(range(len(rows))), tokenizer, 32)
        except InputError as error:
            counts["refused"] += 1
            fault = check_refusal(error, file, variant.line)
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            counts["read"] += 1
            lines = [json.loads(line) for line in lines_of(variant.content)]
            held = [("\n".join(d) if isinstance(d := r["document"], list) else d, r["summary"]) for r in lines]
            same = held == list(zip(data["train"]["document"], data["train"]["summary"], strict=True))
            # each sentence is in a window, and each window has a document
            whole = Counter(n for pair in zip(windows["row"], windows["sentences"], strict=True) for n in
                            {(pair[0], number) for number in pair[1]})  # fmt: skip
            same &= len(whole) == sum(map(len, rows["parts"]))
            fault = None if same else "other rows than the file holds"
        if fault:
            wrong.append(f"{variant.name}: {fault}")
    capsys.readouterr()
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)
    assert counts["read"] >= 60 // every
    assert counts["refused"] >= 150 // every


def test_what_is_odd_in_the_rows_is_said(capsys):
    rows = {"document": ["a b", "c"], "summary": ["a b", "c d e"]}
    check_splits({"train": rows, "test": rows})
    printed = capsys.readouterr()
    assert "train: 1 of 2 summaries are the document itself" in printed.out
    assert "train: 1 of 2 summaries are longer than their document" in printed.err
    assert "test: 2 of 2 documents are also training rows" in printed.err


# Scores


def test_rouge_is_that_of_rouge_score_and_the_best_reference_counts():
    texts = [row["summary"] for row in SAMPLE["test"][:6]]
    gold = [[row["summary"], "Nothing alike."] for row in SAMPLE["test"][1:7]]
    found = Rouge("auto", texts)(texts, gold)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for row, text, (reference, other) in zip(found, texts, gold, strict=True):
        expected = [max(scorer.score(r, text)[kind].fmeasure for r in (reference, other)) for kind in KINDS[:3]]
        assert row[:3].tolist() == pytest.approx([100 * x for x in expected])
    # ROUGE-Lsum ignores the order of sentences
    by_sentence = Rouge("english", [])(["A cat sat. Dogs ran off."], [["Dogs ran off. A cat sat."]])[0]
    assert by_sentence[3] == 100 > by_sentence[2]


def test_words_of_other_scripts_count():
    assert Rouge("auto", ["Привет, мир"]).signature.endswith("words:unicode|stemmer:no|references:best")
    assert Rouge("auto", ["Привет"])(["Привет мир"], [["привет мир"]])[0].tolist() == [100] * 4
    assert UnicodeWords().tokenize("Größe_12 東京x é") == ["größe", "12", "東", "京", "x", "é"]


def test_style_by_hand():
    found = style(["a b c d e f", "a b"], ["a b x", ""])
    assert found == {
        "novel_1grams": pytest.approx(1 / 3), "novel_2grams": 0.5, "novel_3grams": 1,
        "compression": pytest.approx(8 / 3), "words": 1.5,
    }  # fmt: skip


def test_the_oracle_is_greedy_and_stops_where_nothing_is_gained():
    rouge = Rouge("english", [])
    parts = ["The dog barked.", "A red fox ran over the hill.", "It rained.", "The hill was green."]
    assert oracle(parts, ["A red fox ran over the green hill."], rouge) == [1]
    assert oracle(parts, ["A fox ran over the hill, and it rained."], rouge) == [1, 2]
    assert oracle(parts, ["Nobody", "It rained"], rouge) == [2]
    assert oracle(parts, ["zzz"], rouge) == []


# Windows


def test_windows_hold_whole_sentences_and_score_each_sub_token_once():
    parts = [[1] * 5, [2] * 4, [3] * 3, [4] * 30, [], [5] * 4]
    windows = cut(parts, 12, [0])
    assert windows[0] == ([1] * 5 + [2] * 4 + [3] * 3, [(0, 5), (5, 9), (9, 12)], [0, 1, 2])
    for ids, spans, numbers in windows[1:]:
        assert ids[0] == 0
        assert len(ids) <= 12
        for (start, end), number in zip(spans, numbers, strict=True):
            assert set(ids[start:end]) <= {number if number < 4 else 5} | {number + 1}
    scored = Counter(
        n for _, spans, numbers in windows for (a, b), n in zip(spans, numbers, strict=True) for _ in range(a, b)
    )
    assert [scored[n] for n in range(6)] == [len(part) for part in parts]
    # context: the part of the preceding sentences that fits into a quarter of the window
    assert cut([[1] * 6, [2] * 3, [3] * 7], 12, [0])[1] == ([0, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3], [(4, 11)], [2])


def test_encode_windows_by_hand(tokenizer):
    parts = ["London is here.", "He left."]
    found = encode_windows({"parts": [parts], "oracle": [[1]]}, [7], tokenizer, 64)
    assert found["input_ids"] == [tokenizer(" ".join(parts))["input_ids"]]
    first = len(tokenizer(parts[0], add_special_tokens=False)["input_ids"])
    assert found["labels"] == [[[1, 1 + first, 0], [1 + first, len(found["input_ids"][0]) - 1, 1]]]
    assert (found["row"], found["sentences"]) == ([7], [[0, 1]])


def test_sentences_are_the_means_of_their_sub_tokens_in_scores_and_losses():
    logits = torch.tensor([[[9.0], [1.0], [3.0], [5.0], [9.0]]], requires_grad=True)
    labels = torch.tensor([[[1, 3, 1], [3, 4, 0], [-100] * 3]])
    assert sentence_logits(logits, labels).tolist() == [[2.0, 5.0, 0.0]]
    losses = sentence_losses(logits, labels)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor([2.0, 5.0]), torch.tensor([1.0, 0.0]))
    assert (losses.sum() / (labels != -100).sum()).item() == pytest.approx(expected.item())
    losses.sum().backward()
    assert logits.grad[0, [0, 4]].abs().sum() == 0  # these tokens are in no sentence
    windows = {"row": [0, 0], "sentences": [[0, 1], [1]], "labels": [[[1, 2, 0], [2, 5, 0]], [[1, 2, 0]]]}
    found = document_scores([np.array([1.0, 2.0, 99.0]), np.array([6.0])], windows, [3])
    assert found[0].tolist() == [1, 3, -np.inf]


# Extractive


def test_an_extractive_run_leaves_its_results_and_predict_gives_the_same_by_its_path(picking, tmp_path, capsys):
    metrics = train.main([*picking, "--group_column_name", "domain"])
    out = tmp_path / "out"
    assert results(out) == pytest.approx(metrics | results(out))
    for name in ("lead", "random", "oracle"):
        assert metrics["test_oracle_rouge_mean"] >= metrics[f"test_{name}_rouge_mean"] > 0
    assert metrics["test_oracle_rouge_mean"] >= metrics["test_rouge_mean"]
    assert metrics["test_novel_1grams"] == 0
    assert metrics["test_reference_novel_2grams"] > 0
    record = json.loads((out / "run.json").read_text())
    assert record["signatures"]["rouge"] == "rouge_score:0.1.2|words:english|stemmer:porter|references:best"
    printed = capsys.readouterr().out
    assert re.search(r"oracle +\d", printed)
    assert f"| rouge1 | {metrics['test_rouge1']:.4f} |" in (out / "README.md").read_text()
    assert AutoModelForTokenClassification.from_pretrained(out).num_labels == 1
    assert (out / "curve.png").is_file()
    assert "Summaries of test" in (out / "samples_test.html").read_text(encoding="utf-8")

    report = read_jsonl(out / "predictions_test.jsonl")
    gold = SAMPLE["test"][:10]
    assert [(row["document"], row["references"]) for row in report] == [(r["document"], [r["summary"]]) for r in gold]
    for row in report:
        assert row["predicted"] == " ".join(units(row["document"])[i] for i in row["sentences"])
    source = write_jsonl(tmp_path / "in.jsonl", [{"document": row["document"], "n": n} for n, row in enumerate(gold)])
    command = ["--model", str(out), "--input", source, "--precision", "fp32"]
    predict.main([*command, "--output", str(tmp_path / "p.jsonl")])
    found = read_jsonl(tmp_path / "p.jsonl")
    assert [(row["n"], row["predicted"]) for row in found] == [(n, row["predicted"]) for n, row in enumerate(report)]
    assert all(row["windows"] > 1 and 0 < row["score"] < 1 for row in found)  # documents exceed 96 tokens
    predict.main([*command, "--output", str(tmp_path / "q.jsonl"), "--buffer_rows", "3", "--batch_tokens", "1"])
    assert [row["predicted"] for row in read_jsonl(tmp_path / "q.jsonl")] == [row["predicted"] for row in found]
    assert predict.load(str(out))([" "]) == [{"predicted": "", "score": 0.0, "sentences": [], "windows": 0}]
    predict.main([*command, "--output", str(tmp_path / "r.jsonl"), "--summary_sentences", "4"])
    assert {len(row["sentences"]) for row in read_jsonl(tmp_path / "r.jsonl")} == {4}
    for more in (["--n_best", "2"], ["--long", "join"]):
        with pytest.raises(
            InputError, match="--n_best, --num_beams, --length_penalty and --long: need an abstractive model"
        ):
            predict.main([*command, "--output", str(tmp_path / "s.jsonl"), *more])

    card = (out / "README.md").read_text()
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})  # the usage from the model card

    other = str(out / "predictions_test.jsonl")
    compared = train.main([*picking, "--output_dir", str(tmp_path / "b"), "--seed", "7", "--compare_to", other])
    assert compared["test_compared_rouge_mean"] == pytest.approx(metrics["test_rouge_mean"])
    assert 0 < compared["test_compared_p"] <= 1


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_extraction_overfits_to_the_oracle(picking, tmp_path, lora):
    few = [
        {"document": " ".join(units(row["document"])[:5]), "summary": units(row["document"])[n % 5]}
        for n, row in enumerate(SAMPLE["train"][:12])
    ]
    file = write_jsonl(tmp_path / "few.jsonl", few)
    same = [word for split in ("train", "validation", "test") for word in (f"--{split}_file", file)]
    more = ["--eval_strategy", "no", "--save_strategy", "no", "--num_train_epochs", "150" if lora else "60"]
    if lora:
        more += ["--lora_r", "32", "--lora_dropout", "0", "--learning_rate", "1e-3"]
        more += ["--lora_target_modules", "query", "key", "value", "dense"]
    metrics = train.main([*picking, *same, *more])
    assert metrics["test_oracle_rouge1"] == 100
    assert metrics["test_lead_rouge1"] < 60
    assert metrics["test_rouge1"] > 85
    assert (tmp_path / "out" / "adapter").exists() == lora


def test_a_document_of_100_000_sub_tokens_is_read_to_its_end(picking, tmp_path):
    train.main([*picking, "--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"])
    model = predict.load(str(tmp_path / "out"), precision="fp32", sentences=1)
    long = " ".join(f"He left London {n} times." for n in range(12_000)) + " x" * 300 + "."
    sizes = [len(ids) for ids in model.tokenizer(units(long), add_special_tokens=False)["input_ids"]]
    assert sum(sizes) > 100_000
    rows = {"parts": [units(long)], "oracle": [[]]}
    windows = encode_windows(rows, [0], model.tokenizer, model.max_length)
    seen = Counter(n for spans, own in zip(windows["labels"], windows["sentences"], strict=True) for (a, b, _), n in
                   zip(spans, own, strict=True) for _ in range(a, b))  # fmt: skip
    assert [seen[n] for n in range(len(sizes))] == sizes
    assert model([long[:2000]])[0]["windows"] > 1
    row = {"document": "a " * 600_000, "summary": "b"}
    with pytest.raises(InputError, match=r"1,200,001 characters in one row, more than --max_chars"):
        train.main([*picking, "--train_file", write_jsonl(tmp_path / "long.jsonl", [row])])


# Abstractive


def test_writing_overfits_on_rouge_and_predict_writes_the_same(writing, tmp_path):
    file = writing[writing.index("--train_file") + 1]
    same = [word for split in ("train", "validation", "test") for word in (f"--{split}_file", file)]
    more = ["--eval_strategy", "no", "--save_strategy", "no", "--label_smoothing_factor", "0", "--weight_decay", "0"]
    metrics = train_abstractive.main([*writing, *same, *more, "--num_train_epochs", "80", "--learning_rate", "3e-3"])
    assert metrics["test_rouge1"] > 90
    assert metrics["test_hit_max_length"] == metrics["test_cut"] == 0
    out = tmp_path / "out"
    report = read_jsonl(out / "predictions_test.jsonl")
    command = ["--model", str(out), "--input", file, "--precision", "fp32"]
    predict.main([*command, "--output", str(tmp_path / "p.jsonl"), "--n_best", "2"])
    found = read_jsonl(tmp_path / "p.jsonl")
    assert [row["predicted"] for row in found] == [row["predicted"] for row in report]
    assert all(row["windows"] == 1 and row["ended"] and row["score"] <= 0 for row in found)
    assert all(len(row["n_best"]) == 2 and row["n_best"][0]["predicted"] == row["predicted"] for row in found)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    for row in report[:4]:  # with the saved model only
        ids = model.generate(**tokenizer([row["document"]], return_tensors="pt"))
        assert tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip() == row["predicted"]

    # for a document too long for the model, predict summarizes or joins the summaries of its windows
    long = " ".join(row["document"] + "." for row in report[:20])
    rows = [{"text": report[0]["document"]}, {"text": long}, {"text": [" Ann: hi", "Bob: no"]}]
    command = ["--model", str(out), "--input", write_jsonl(tmp_path / "long.jsonl", rows), "--precision", "fp32"]
    predict.main([*command, "--output", str(tmp_path / "again.jsonl")])
    predict.main([*command, "--output", str(tmp_path / "join.jsonl"), "--long", "join"])
    again, joined = read_jsonl(tmp_path / "again.jsonl"), read_jsonl(tmp_path / "join.jsonl")
    assert [row["text"] for row in again] == [row["text"] for row in rows]
    assert again[0]["predicted"] == joined[0]["predicted"] == report[0]["predicted"]
    assert again[1]["windows"] == joined[1]["windows"] > 3
    assert len(again[1]["predicted"]) < len(joined[1]["predicted"]) < len(long)
    writer = predict.load(str(out), precision="fp32")
    assert " ".join(writer._windows(long)) == long
    assert all(map(writer.fits, writer._windows(long)))


def test_lengths_are_said_and_summaries_that_are_cut_teach_nothing(writing, tmp_path, capsys):
    more = ["--max_source_length", "16", "--max_target_length", "8", "--eval_strategy", "no", "--save_strategy", "no"]
    metrics = train_abstractive.main([*writing, *more, "--num_beams", "1", "--num_train_epochs", "1"])
    printed = capsys.readouterr().out
    assert re.search(r"train: \d+ of 24 documents exceed --max_source_length and are cut", printed)
    assert re.search(r"train: \d+ of 24 summaries exceed --max_target_length and are not used for training", printed)
    assert 0 < metrics["test_cut"] <= 1
    with pytest.raises(InputError, match="every training summary exceeds"):
        train_abstractive.main([*writing, *more, "--max_target_length", "2", "--overwrite", "true"])


@pytest.mark.soak
def test_two_processes_give_the_scores_of_one(picking, writing, tmp_path):
    sgd = ["--optim", "sgd", "--learning_rate", "0.1", "--max_predict_samples", "9"]
    writing += ["--num_beams", "1"]
    split = {"one": (["--per_device_train_batch_size", "8"], ["--max_tokens_per_batch", "512"]),
             "two": (["--per_device_train_batch_size", "4"], ["--max_tokens_per_batch", "256"])}  # fmt: skip
    for number, (main, base) in enumerate(((train.main, picking), (train_abstractive.main, writing))):
        for processes, name in enumerate(split, 1):
            words = [*base, *sgd, *split[name][number], "--output_dir", str(tmp_path / f"{name}{number}")]
            words += ["--per_device_eval_batch_size", "3"]
            Job(words, tmp_path / "log", processes=processes, main=main).succeeds()
        two, one = tmp_path / f"two{number}", tmp_path / f"one{number}"
        names = ("test_rouge1", "test_rouge2", "test_rougeLsum", "eval_rouge_mean", "test_oracle_rouge1")
        reports = [read_jsonl(folder / "predictions_test.jsonl") for folder in (two, one)]
        if assert_same_but_for_a_tie(*reports):
            assert [results(two)[name] for name in names] == [results(one)[name] for name in names]
        weights = [load_file(folder / "model.safetensors") for folder in (two, one)]
        assert max((weights[0][k] - weights[1][k]).abs().max().item() for k in weights[1]) < 1e-5


def other_family(name: str, folder: Path) -> None:
    """Save a tiny LED or PEGASUS, with the tokenizer of a tiny BART."""
    family("bart", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = AutoConfig.from_pretrained(folder).to_diff_dict()
    kept = ("d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    kept += (
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "pad_token_id",
        "eos_token_id",
        "decoder_start_token_id",
        "vocab_size",
    )
    sizes = {key: sizes[key] for key in kept if key in sizes} | {"bos_token_id": 0}
    if name == "led":
        config = LEDConfig(
            **sizes, attention_window=[8], max_encoder_position_embeddings=128, max_decoder_position_embeddings=64
        )
    else:
        config = PegasusConfig(**sizes, max_position_embeddings=128)
    torch.manual_seed(0)
    for file in folder.iterdir():
        file.unlink()
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "led", "pegasus", "encoder"])
def test_families_train_and_predict_writes_the_same(name, writing, tiny, tmp_path):
    at = writing.index("--from_scratch")
    writing[at : at + 8] = []
    if name == "encoder":
        base, writing = tiny, [*writing, "--warm_start", "both"]
    else:
        base = str(tmp_path / "base")
        (family if name in ("t5", "bart", "mbart") else other_family)(name, tmp_path / "base")
    command = [*writing, "--model_name_or_path", base, "--num_train_epochs", "1", "--num_beams", "1"]
    if name == "mbart":
        with pytest.raises(InputError, match=r"--language: .* needs the language of the texts"):
            train_abstractive.main(command)
        command += ["--language", "de"]
    train_abstractive.main([*command, "--eval_strategy", "no", "--save_strategy", "no"])
    out = tmp_path / "out"
    told = AutoConfig.from_pretrained(out).summarization
    assert told["prefix"] == ("summarize: " if name == "t5" else "")
    assert told["source_code"] == ("de_DE" if name == "mbart" else "")
    report = read_jsonl(out / "predictions_test.jsonl")
    source = writing[writing.index("--test_file") + 1]
    predict.main(["--model", str(out), "--input", source, "--output", str(tmp_path / "p.jsonl"), "--precision", "fp32"])
    found = {row["document"]: row for row in read_jsonl(tmp_path / "p.jsonl")}
    whole = [row for row in report if found[row["document"]]["windows"] == 1]
    assert len(whole) >= 5
    texts = [[found[row["document"]]["predicted"] for row in whole], [row["predicted"] for row in whole]]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert_same_texts(*texts, [told["prefix"] + row["document"] for row in whole], model, tokenizer)


# Arguments


def test_arguments_that_make_no_sense_are_refused(picking, writing, tiny, tmp_path):
    for base, more, message in (
        (writing, ["--model_name_or_path", tiny], "exclude each other"),
        (picking, ["--max_tokens_per_batch", "64"], "unknown argument"),
        (picking, ["--metric_for_best_model", "rouge"], "no such score; did you mean rouge"),
        (picking, ["--summary_sentences", "0"], "must be at least 1"),
        (picking, ["--method", "x"], "unknown argument --method"),
        (picking, ["--max_source_length", "4000"], "--max_source_length 4000: .* reads at most 128 tokens"),
        (writing, ["--metric_for_best_model", "loss"], "add --predict_with_generate false"),
        (writing, ["--predict_with_generate", "false"], "add --metric_for_best_model loss"),
        (writing, ["--summary_sentences", "2"], "unknown argument --summary_sentences"),
        (picking, ["--source_prefix", "x", "--language", "de"], "unknown argument --source_prefix"),
        (picking, ["--predict_with_generate", "false"], "unknown argument"),
        (writing, ["--from_scratch", "tiny", "--warm_start", "both"], "exclude each other"),
        (writing, ["--lora_r", "4"], "new weights need full training"),
        (picking, ["--warm_start", "both"], "unknown argument"),
        (picking, ["--r_drop", "1"], "does not work with sentence scores"),
        (picking, ["--num_beams", "1", "--no_repeat_ngram_size", "0"], "unknown argument --num_beams"),
        (writing, ["--no_repeat_ngram_size", "-1"], "must be at least 16"),
        (picking, ["--compare_to", str(tmp_path / "none")], "No such file"),
    ):
        with pytest.raises(InputError, match=message):
            (train_abstractive if base is writing else train).main([*base, *more])
    with pytest.raises(InputError, match="--validation_file and --test_file: no training rows; add --train_file"):
        train.main(["--test_file", picking[picking.index("--test_file") + 1]])
    with pytest.raises(InputError, match="is no summarization model"):
        predict.load(tiny)
    assert scores(Rouge("english", []), Rows(), ["a"], TrainingArguments(output_dir="unused"))["rouge1"] == 100


class Rows(dict):
    """Split of one row, as `scores` reads it."""

    column_names = ("document", "summary", "references")

    def __init__(self):
        super().__init__(document=["a b"], summary=["a"], references=[["a"]])


def test_rouge_keeps_the_marks_of_letters():
    rouge = Rouge("auto", ["हिन्दी भाषा"])
    assert rouge(["काली", "हिन्दी भाषा"], [["काला"], ["हिन्दी भाषा"]])[:, 0].tolist() == [0.0, 100.0]
    for kind in ("english", "unicode"):
        rouge = Rouge(kind, [])
        assert rouge(["le cafe\u0301"], [["le café"]])[0, 0] == pytest.approx(100)
    assert "words:unicode" in Rouge("auto", ["e\u0301te\u0301 e\u0301toile"]).signature


def test_a_cell_may_hold_a_list_of_turns(tmp_path):
    turns = [{"speaker": "Ann", "text": "Hi."}, {"speaker": "Bo", "text": "Hello."}]
    cells = [json.dumps(turns), str(turns), "[1] A note.", "[2]"]
    rows = "".join(f'"{cell}",s\n' for cell in (cell.replace('"', '""') for cell in cells))
    (tmp_path / "a.csv").write_text(f"document,summary\n{rows}", encoding="utf-8")
    arguments = SummarizationDataArguments(train_file=str(tmp_path / "a.csv"))
    texts = [row["document"] for _, row in arguments.read(arguments.train_file)]
    assert texts == ["Ann: Hi.\nBo: Hello."] * 2 + cells[2:]
    read = [row for _, row in read_file(tmp_path / "a.csv")]
    assert [as_text(of_cell(row, row["document"])) for row in read] == texts
