"""`make compare`: configurations side by side, made once, in a table and a picture; what is wrong is told first."""

import json

import pytest

from common import compare
from common.args import parse
from common.errors import InputError
from recipes.ner import train


def record(name: str, seed: str, score: float, **more) -> dict:
    about = {"name": name, "seed": seed, "metric": "f1", "scores": {"eval_f1": 0.9, "test_f1": score}}
    sizes = {"trainable_parameters": 1000, "train_seconds": 2.0, "peak_memory_mib": 300, "saved_bytes": 2**20}
    return about | sizes | more


@pytest.fixture
def words(arguments) -> list[str]:
    at = arguments.index("--output_dir")
    return [*arguments[:at], *arguments[at + 2 :], "--num_train_epochs", "1"]


def test_settings_are_compared_once_and_what_fails_is_told(words, tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text("plain:\ntogether: --lora_r 2 --l2_sp 0.1\n")
    command = [
        "ner",
        "--methods",
        "bias",
        "--settings",
        str(settings),
        "--seeds",
        "1",
        "--folder",
        str(tmp_path / "out"),
        *words,
    ]
    rows = compare.main(command)
    told = capsys.readouterr().out
    assert "1 of 3: bias, seed 1: test_f1 0." in told
    assert "2 of 3: plain, seed 1: test_f1 0." in told
    assert "3 of 3: together, seed 1: --l2_sp: holds pretrained weights where they are" in told
    bias, plain, together = rows
    scores = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[1])["scores"]
    assert plain["values"] == [scores["test_f1"]]
    assert 0 < bias["trainable_parameters"] < plain["trainable_parameters"] / 10
    assert plain["saved_bytes"] == pytest.approx(4 * plain["trainable_parameters"], rel=0.1)
    assert plain["train_seconds"] > 0
    assert plain["peak_memory_mib"] > 100
    assert together["seeds"] == []
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert not list((tmp_path / "out").rglob("checkpoint-*"))
    settings.write_text("plain:\n")
    made = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert compare.main(command) == [bias, plain]
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == made
    table = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[-2:]] == ["| bias", "| plain"]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"] == [bias, plain]
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_has_means_deviations_and_medians():
    records = [record("full", str(seed), score) for seed, score in ((1, 0.5), (2, 0.7), (3, 0.6))]
    records[0]["train_seconds"] = None  # it was stopped, and went on
    records[1]["train_seconds"] = 8.0
    records += [{"name": "vera", "seed": "1", "error": "not for this model"}]
    full, vera = compare.summary(["full", "vera"], records, None)
    assert (full["score"], full["mean"], full["seeds"]) == ("test_f1", pytest.approx(0.6), ["1", "2", "3"])
    assert full["standard_deviation"] == pytest.approx(0.1)
    assert full["train_seconds"] == 5.0
    assert vera["errors"] == ["not for this model"]
    lines = compare.markdown("title", [full, vera]).splitlines()
    assert lines[-2:] == [
        "| full | 0.6000 ± 0.1000 | 1,000 | 5.0 | 300 | 1.00 |",
        "| vera | not for this model | | | | |",
    ]
    assert compare.score_of(records[0], "f1") == ("test_f1", 0.5)
    with pytest.raises(InputError, match="--score accuracy: not among the scores of the recipe: eval_f1, test_f1"):
        compare.score_of(records[0], "accuracy")


def test_processes_are_launched_as_by_the_makefile():
    assert compare.launcher(None)[1:] == ["-m"]
    assert compare.launcher(1)[2:] == ["accelerate.commands.launch", "--num_processes", "1", "-m"]
    assert compare.launcher(4)[2:] == ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "4", "-m"]


def test_the_file_of_regularisers_is_of_arguments_that_go_together():
    asked = compare.configurations([], "common/regularisers.yaml", [])
    assert len(asked) > 8
    for words in asked.values():
        parse(train.ARGUMENTS, words)
    with pytest.raises(InputError, match="unknown argument --lerning_rate; did you mean learning_rate"):
        compare.check_arguments("ner", [[], ["--lerning_rate", "1"]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compare: give --methods or --settings"),
        (["--methods", "full", "--seed", "3"], "--seed: a comparison sets it itself; seeds are given by --seeds"),
        (["--settings", "none.yaml"], "--settings none.yaml"),
        (["--settings", "pyproject.toml"], "--settings pyproject.toml"),
    ],
)
def test_what_cannot_be_compared_is_told(arguments, message):
    with pytest.raises(InputError, match=message):
        compare.main(["ner", *arguments])
    with pytest.raises(InputError, match="nothing: no such recipe here"):
        compare.check_arguments("nothing", [[]])
