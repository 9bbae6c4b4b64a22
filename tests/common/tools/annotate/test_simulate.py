"""Test the simulation: which rows each run gets, that nothing runs twice, and the stop advice."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import InputError
from common.tools.annotate import simulate
from tests.conftest import ROOT, read_jsonl, write_jsonl

SAMPLE = ROOT / "recipes" / "sentiment" / "sample"


def test_stop_advice_is_the_slope_of_the_last_scores_against_its_error():
    rising = np.array([[0.1, 0.5, 0.6, 0.7], [0.9, 0.5, 0.62, 0.74], [0.2, 0.5, 0.58, 0.66]])
    mean, error = simulate.gain(rising)
    assert mean == pytest.approx(0.1)  # slopes 0.1, 0.12, 0.08
    assert error == pytest.approx(0.02 / 3**0.5)
    assert simulate.advice(rising, 50) == "label on: the last sizes brought +0.1000 ± 0.0115 for 50 labels"
    flat = np.array([[0.5, 0.6, 0.5], [0.5, 0.4, 0.52], [0.5, 0.5, 0.49]])
    assert simulate.advice(flat, 50).startswith("stop, or add many more labels at once: the last sizes brought +0.0017")
    assert simulate.advice(-rising, 50, greater=False) == simulate.advice(rising, 50)
    assert simulate.advice(rising[:1], 50) == "no stop advice: it needs two seeds and two sizes"
    failed = np.vstack([rising, [0.1, 0.5, np.nan, 0.7]])
    assert simulate.gain(failed) == simulate.gain(rising)
    assert simulate.advice(rising, 50, greater=None).startswith("no stop advice: it needs the score that picks")


class Ended:
    """A run that has ended, with scores that its rows decide."""

    def __init__(self, folder, rows):
        self.folder, self.rows = folder, rows

    def outcome(self):
        about = {"metric": "f1", "greater_is_better": True, "hardware": {}, "scores": {"test_f1": len(self.rows) / 100}}
        return {"error": "too little memory"} if 13 in self.rows else about


@pytest.fixture
def simulated(tmp_path, monkeypatch):
    """Return a function that runs a simulation whose runs end at once; it returns the runs begun."""
    begun = []

    def start(recipe, words, folder, gpus, at_once, slot):
        rows = [int(line) - 1 for line in Path(words[words.index("--train_rows") + 1]).read_text().splitlines()]
        begun.append((folder.name.rpartition("-")[0], rows))
        folder.mkdir(parents=True, exist_ok=True)
        return Ended(folder, rows)

    def choose(self, folder, name, key, rows):
        left = [number for number in range(len(self.rows)) if number not in rows]
        return left[:: -1 if name == "badge" else 1][: self.options.add]

    monkeypatch.setattr(simulate, "start", start)
    monkeypatch.setattr(simulate.Simulation, "_choose", choose)
    monkeypatch.setattr(simulate, "described", lambda hardware: "a machine")
    monkeypatch.setattr(simulate, "check_arguments", lambda recipe, words: [{"code": "1"}])

    def go(*more):
        begun.clear()
        found = simulate.main([
            "--recipe", "sentiment", "--train_file", str(SAMPLE / "train.jsonl"), "--max_train_samples", "60",
            "--validation_file", str(SAMPLE / "validation.jsonl"), "--start", "4", "--add", "3", "--rounds", "2",
            "--folder", str(tmp_path / "out"), *more,
        ])  # fmt: skip
        return found, dict(begun)

    monkeypatch.setattr(
        simulate, "in_turn", lambda jobs, at_once: ((key, begin(0)) for job in iter(jobs) for key, begin in [job])
    )
    return go


def test_each_strategy_grows_its_rows_from_the_same_first_ones(simulated, tmp_path, capsys):
    strategies = ["--strategies", "random", "margin", "badge", "--seeds", "1", "2"]
    found, runs = simulated(*strategies)
    assert len(runs) == 2 * (1 + 3 * 2)
    for seed in "12":
        first = runs[f"start-{seed}-0"]
        assert len(set(first)) == 4
        for name in ("random", "margin", "badge"):
            one, two = runs[f"{name}-{seed}-1"], runs[f"{name}-{seed}-2"]
            assert one[:4] == first
            assert two[:7] == one
            assert len(set(two)) == 10
        left = [row for row in range(60) if row not in first]
        assert runs[f"margin-{seed}-1"][4:] == left[:3]
        assert runs[f"badge-{seed}-1"][4:] == left[:-4:-1]
    assert runs["start-1-0"] != runs["start-2-0"]
    assert found["labels"] == [4, 7, 10]
    table = (tmp_path / "out" / "simulation.md").read_text()
    assert "| labels | random | margin | badge |" in table
    assert (tmp_path / "out" / "simulation.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "simulation.json").read_text()) == found

    again, runs = simulated(*strategies)
    assert runs == {}
    assert again == found
    assert len(simulated(*strategies, "--fresh")[1]) == 14
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 14
    _, runs = simulated("--strategies", "random", "margin", "--seeds", "1", "2", "3")
    assert {name.split("-")[1] for name in runs} == {"3"}
    _, runs = simulated(*strategies, "--rounds", "3")
    assert {name[-1] for name in runs} == {"2", "3"}  # the models of round 2 had chosen no rows
    assert not any(name.startswith("random") and name.endswith("2") for name in runs)


def test_a_run_whose_model_chose_another_number_of_rows_is_not_taken_up(simulated):
    simulated("--strategies", "margin", "--seeds", "1")
    _, runs = simulated("--strategies", "margin", "--seeds", "1", "--add", "2")
    assert {name: len(rows) for name, rows in runs.items()} == {"start-1-0": 4, "margin-1-1": 6, "margin-1-2": 8}


def test_a_failed_run_ends_its_curve_and_is_run_again(simulated, capsys):
    more = ["--strategies", "random", "margin", "--seeds", "5"]
    _, runs = simulated(*more)
    failed = [name for name, rows in runs.items() if 13 in rows]
    captured = capsys.readouterr()
    assert captured.out.count("too little memory") == len(failed)
    _, again = simulated(*more)
    assert set(again) == set(failed)


def test_bad_options_are_named_before_any_run(simulated):
    for words, message in (
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--seeds", "1", "1"], "--seeds: 1 is repeated"),
        (["--strategies", "margin", "margin"], "--strategies: a strategy is repeated"),
        (["--train_rows", "x"], "--train_rows: cannot be given to a simulation"),
        (["--add", "40"], r"need more than 84 training rows to choose from; there are 60; give fewer"),
    ):
        with pytest.raises(InputError, match=message):
            simulated(*words)
    with pytest.raises(InputError, match="qa: cannot choose rows to label"):
        simulate.main(["--recipe", "qa"])


def test_the_rows_that_a_model_chooses_are_numbers_of_training_rows(monkeypatch, tmp_path):
    rows = [{"text": str(i)} for i in range(20)]

    class Annotator:
        def __init__(self, folder):
            pass

        def text(self, row):
            return row["text"]

        def guesses(self, rows, gradients):
            return [SimpleNamespace(margin=abs(int(row["text"]) - 10), gradient=None) for row in rows]

    monkeypatch.setattr(simulate, "module_of", lambda recipe: SimpleNamespace(Annotator=Annotator))
    monkeypatch.setattr("common.tools.annotate.pool.replace", lambda guess, **_: guess)
    options = SimpleNamespace(recipe="x", add=3)
    simulation = simulate.Simulation(options, [], rows, tmp_path, {})
    assert simulation._choose(tmp_path, "margin", ("1", "margin", 1), [10, 3]) == [9, 11, 8]
    simulation.rows = [{"text": str(i % 4)} for i in range(20)]
    options.add = 5
    with pytest.raises(InputError, match="--add 5: margin finds only 4 different rows to add to 2"):
        simulation._choose(tmp_path, "margin", ("1", "margin", 1), [10, 3])


@pytest.mark.soak
def test_a_simulation_trains_and_chooses(tiny, tmp_path, capsys):
    train = write_jsonl(tmp_path / "train.jsonl", read_jsonl(SAMPLE / "train.jsonl")[:80])
    test = write_jsonl(tmp_path / "test.jsonl", read_jsonl(SAMPLE / "test.jsonl")[:40])
    command = [
        "--recipe", "sentiment", "--train_file", train, "--validation_file", test, "--test_file", test, "--start", "20",
        "--add", "10", "--rounds", "1", "--seeds", "1", "2", "--strategies", "random", "margin", "badge",
        "--folder", str(tmp_path / "out"), "--at_once", "2", "--model_name_or_path", tiny, "--num_train_epochs", "1",
        "--max_seq_length", "64", "--precision", "fp32",
    ]  # fmt: skip
    found = simulate.main(command)
    assert all(len(row) == 2 and None not in row for of_name in found["scores"].values() for row in of_name)
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    made = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert simulate.main(command) == found
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == made
