"""Test `make compare`: configurations side by side, run once, in a table and a picture; errors before any run."""

import json
from pathlib import Path

import pytest

from common.cli import parse
from common.errors import InputError
from common.tools import compare
from recipes.ner import train


def record(name: str, seed: str, score: float, **more) -> dict:
    about = {"name": name, "seed": seed, "metric": "f1", "scores": {"eval_f1": 0.9, "test_f1": score}}
    sizes = {"trainable_parameters": 1000, "train_seconds": 2.0, "peak_memory_mib": 300, "saved_bytes": 2**20}
    return about | sizes | more


@pytest.fixture
def words(arguments) -> list[str]:
    at = arguments.index("--output_dir")
    return [*arguments[:at], *arguments[at + 2 :], "--num_train_epochs", "1"]


@pytest.fixture
def no_epochs(words) -> list[str]:
    """Return `words` for a run whose length is set in steps."""
    for _ in range(words.count("--num_train_epochs")):
        at = words.index("--num_train_epochs")
        del words[at : at + 2]
    return words


def written(folder: Path, settings: str) -> list[str]:
    """Return arguments that compare these settings with one seed, into the folder out."""
    path = folder / "settings.yaml"
    path.write_text(settings)
    return ["--settings", str(path), "--seeds", "1", "--folder", str(folder / "out")]


@pytest.mark.soak
def test_settings_are_compared_once_and_what_fails_is_told(words, tmp_path, capsys):
    compared = written(tmp_path, "plain:\ntogether: --lora_r 2 --l2_sp 0.1\n")
    command = ["ner", "--methods", "bias", *compared, *words]
    rows = compare.main(command)
    told = capsys.readouterr().out
    assert "1 of 3: bias, seed 1: test_f1 0." in told
    assert "2 of 3: plain, seed 1: test_f1 0." in told
    assert "3 of 3: together, seed 1: --l2_sp: needs trained pretrained weights" in told
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
    written(tmp_path, "plain:\n")
    made = (tmp_path / "out" / "results.jsonl").read_bytes()
    data = Path(words[words.index("--train_file") + 1])
    data.write_text(data.read_text() * 2)
    capsys.readouterr()
    assert compare.main(command) == [bias, plain]
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == made
    assert (
        "warning: 2 of 2 finished runs were made with other data files; their results are taken as they are; --fresh "
        "runs all again\n"
    ) in capsys.readouterr().err
    table = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[-2:]] == ["| bias", "| plain"]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"] == [bias, plain]
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.soak
def test_a_method_by_number_of_rows_two_runs_at_once(no_epochs, tmp_path, capsys):
    over = ["--over", "max_train_samples", "8", "all", "--steps", "10", "20", "--at_once", "2", "--seeds", "1"]
    command = ["ner", "--methods", "bias", "--folder", str(tmp_path / "out"), *over, *no_epochs]
    rows = compare.main(command)
    told = capsys.readouterr().out
    assert "2 of 2: bias, max_train_samples " in told
    assert [(row["max_train_samples"], row["name"]) for row in rows] == [("8", "bias"), ("all", "bias")]
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [record["at_once"] for record in records] == [2, 2]
    assert records[0]["rows"]["train"] != records[1]["rows"]["train"]
    states = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("trainer_state.json")]
    assert sorted(state["global_step"] for state in states) == [10, 20]
    assert [sum("eval_f1" in entry for entry in state["log_history"]) for state in states] == [10, 10]
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert "; 10, 20 steps; 2 runs at once; " in table
    assert "\n\n| test_f1 by max_train_samples | 8 | all | best at |\n| --- | ---: | ---: | ---: |\n| bias | " in table
    assert "\nmax_train_samples all:\n\n| | test_f1 | trained parameters |" in table
    for name in ("comparison.png", "max_train_samples.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    made = (tmp_path / "out" / "results.jsonl").read_bytes()
    capsys.readouterr()
    assert compare.main(command) == rows
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == made
    assert "were made with other" not in capsys.readouterr().err
    assert [row["values"] for row in compare.main([*command, "--fresh"])] == [row["values"] for row in rows]
    again = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(again) == 2
    assert all(one["finished"] > other["finished"] for one, other in zip(again, records, strict=True))


def over_table(metric: str, greater: bool) -> list[str]:
    full, lora = ([{"name": name, "seeds": ["1"], "score": "eval_f1", "standard_deviation": None, "mean": mean}
                   for mean in means] for name, means in (("full", (0.5, 0.7)), ("lora", (0.6, 0.4))))  # fmt: skip
    found = {"1e-3": [full[0], lora[0]], "1e-2": [full[1], lora[1]]}
    return compare.markdown_over("learning_rate", found, {"metric": metric, "greater_is_better": greater}).splitlines()


def test_the_best_of_each_value_and_the_best_value_of_each_method_are_marked():
    assert over_table("f1", True) == [
        "| eval_f1 by learning_rate | 1e-3 | 1e-2 | best at |",
        "| --- | ---: | ---: | ---: |",
        "| full | 0.5000 | **0.7000** | 1e-2 |",
        "| lora | **0.6000** | 0.4000 | 1e-3 |",
    ]
    assert over_table("f1", False)[2:] == [
        "| full | **0.5000** | 0.7000 | 1e-3 |",
        "| lora | 0.6000 | **0.4000** | 1e-2 |",
    ]
    assert over_table("accuracy", True)[2:] == ["| full | 0.5000 | 0.7000 |  |", "| lora | 0.6000 | 0.4000 |  |"]


def test_a_table_has_means_deviations_and_medians():
    records = [record("full", str(seed), score) for seed, score in ((1, 0.5), (2, 0.7), (3, 0.6))]
    records[0]["train_seconds"] = None  # the run was stopped and resumed
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
    records[2] = {"name": "full", "seed": "3", "error": "stopped"}
    (full,) = compare.summary(["full"], records, None)
    assert "| full | 0.6000 ± 0.1414 (seeds 1, 2 only) | 1,000 |" in compare.markdown("title", [full])
    assert compare.score_of(records[0], "f1") == ("test_f1", 0.5)
    with pytest.raises(
        InputError, match="--score accuracy: the recipe has no such score; choose one of eval_f1, test_f1"
    ):
        compare.score_of(records[0], "accuracy")


@pytest.mark.soak
def test_a_run_that_failed_keeps_its_checkpoints_and_goes_on_from_them(no_epochs, tmp_path):
    settings = written(tmp_path, "too fast: --learning_rate 1e30 --warmup_steps 0\n")
    command = ["ner", *settings, "--steps", "4", "--eval_steps", "1", "--save_steps", "1", *no_epochs]
    for _ in range(2):
        with pytest.raises(InputError, match="of step 2 is not a finite number"):
            compare.main(command)
        assert [path.name for path in (tmp_path / "out").rglob("checkpoint-*")] == ["checkpoint-1"]
    (log,) = (tmp_path / "out").rglob("*.log")
    assert "checkpoint-1" in log.read_text()  # the second run resumed from it


@pytest.mark.soak
def test_the_file_of_regularisers_is_of_arguments_that_go_together():
    asked = compare.configurations([], "common/tools/regularisers.yaml", [])
    assert len(asked) > 8
    for words in asked.values():
        parse(train.ARGUMENTS, words)
    with pytest.raises(InputError, match="unknown argument --lerning_rate; did you mean --learning_rate"):
        compare.check_arguments("ner", [[], ["--lerning_rate", "1"]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compare: give --methods or --settings"),
        (["--methods", "full", "--seed", "3"], r"--seed: is set by the comparison; leave it out \(seeds: --seeds\)"),
        (["--settings", "none.yaml"], "--settings none.yaml"),
        (["--settings", "pyproject.toml"], "--settings pyproject.toml"),
        (["--methods", "full", "--over", "max_train_samples"], "--over: give an argument and at least two values"),
        (["--methods", "full", "--over", "seed", "1", "2"], "--over seed: is set by the comparison"),
        (["--methods", "full", "--over", "r_drop", "1", "2", "--steps", "1", "2", "3"], "--steps: give one number, or"),
        (["--methods", "full", "--seeds", "1", "2", "01"], "--seeds: 1 is repeated, and its runs would be equal"),
        (["--methods", "full", "--seeds", "one"], "--seeds one: must be an integer"),
        (
            ["--methods", "full", "--over", "max_steps", "5", "9", "--steps", "7"],
            "--over max_steps: is also set by --steps; leave one of them out",
        ),
        (["--methods", "full", "--steps", "0"], "--steps must be at least 1"),
        (["--methods", "full", "--steps", "9", "--max_steps", "3"], "full: --max_steps: is also set by --steps"),
        (["--methods", "full", "--over", "r_drop", "1", "2", "--r_drop", "3"], "full: --r_drop: is also set by --over"),
        (["--methods", "full", "--at_once", "2", "--gpus", "2"], "--at_once: must be at least 1, and 1 with --gpus"),
    ],
)
def test_what_cannot_be_compared_is_told(arguments, message):
    with pytest.raises(InputError, match=message):
        compare.main(["ner", *arguments])
