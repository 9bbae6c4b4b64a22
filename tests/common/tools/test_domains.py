"""Test leaving out one domain at a time: the runs, what is reused, the table, and errors before any run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import InputError
from common.run.transferable import of_classes
from common.tools import domains
from tests.conftest import write_jsonl

TEST = [("a", "yes"), ("a", "no"), ("a", "no"), ("b", "yes"), ("b", "no"), ("new", "no")]


@pytest.fixture
def started(monkeypatch):
    """Replace the training of a run: without a domain the model says yes to it, else no; return what was started."""
    runs = []

    def start(recipe, words, folder, gpus, at_once, slot):
        left_out = words[words.index("--leave_out") + 1] if "--leave_out" in words else None
        runs.append((left_out, words[words.index("--seed") + 1]))
        folder.mkdir(parents=True)
        counts = {"train": {"a": 5, "b": 7}, "test": {"a": 3, "b": 2, "new": 1}}
        (folder / "run.json").write_text(json.dumps({"domains": counts}))
        lines = [{"label": gold, "domain": d, "predicted": "yes" if d == left_out else "no"} for d, gold in TEST]
        write_jsonl(folder / "predictions_test.jsonl", lines)
        result = {"metric": "worst_domain_accuracy", "scores": {"test_worst_domain_accuracy": 0.5}, "hardware": {}}
        return SimpleNamespace(
            folder=folder, outcome=lambda: result, process=SimpleNamespace(poll=lambda: 0, returncode=0)
        )

    monkeypatch.setattr(domains, "start", start)
    monkeypatch.setattr(domains, "check_arguments", lambda recipe, words: [{}])
    monkeypatch.setattr(domains, "described", lambda hardware: "a machine")
    monkeypatch.setattr(
        domains, "statistics_of",
        lambda recipe: lambda rows, score: of_classes(*([[r[k]] for r in rows] for k in ("label", "predicted")), score),
    )  # fmt: skip
    return runs


def test_each_domain_is_left_out_once_and_the_table_says_what_that_costs(started, tmp_path, capsys):
    words = ["sentiment", "--domain_column", "topic", "--seeds", "1", "2", "--folder", str(tmp_path)]
    a, b, mean = domains.main(words)
    assert started == [(None, "1"), (None, "2"), ("a", "1"), ("b", "1"), ("a", "2"), ("b", "2")]  # not the new one
    assert [a["left_out"].mean, a["trained"].mean] == pytest.approx([1 / 3, 2 / 3])
    assert [b["left_out"].mean, b["trained"].mean, b["difference"].mean] == [0.5, 0.5, 0]
    assert (mean["left_out"].mean, mean["test_rows"]) == (pytest.approx((1 / 3 + 1 / 2) / 2), 5)
    assert a["difference"].low < a["difference"].mean < a["difference"].high
    table = (tmp_path / "leave_one_out.md").read_text()
    assert "| a | 5 | 3 | 33.3 ± " in table
    assert "| mean of the domains |  | 5 | 41.7 ± " in table
    assert json.loads((tmp_path / "leave_one_out.json").read_text())["rows"][1]["trained"]["mean"] == 0.5
    assert domains.main(words)
    assert len(started) == 6
    (tmp_path / "results.jsonl").write_text("")  # as if each run was stopped: its folder is removed too
    domains.main([*words, "--seeds", "1", "--fresh"])
    assert len(started) == 9
    domains.main(["ner", *words[1:], "--seeds", "1"])  # another recipe in the same folder
    assert len(started) == 12
    capsys.readouterr()


def test_the_resamples_of_the_mean_are_the_means_of_independent_resamples():
    one, two = (domains.Arm(np.array([s, s]), np.full((2, 4), s), 10) for s in (0.2, 0.6))
    mean = domains.mean_of([one, two])
    assert mean.scores.tolist() == [0.4, 0.4]
    assert mean.draws.shape == (2, 4)
    assert mean.rows == 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train_file", "a"], "--domain_column: is missing"),
        (["--domain_column", "d", "--leave_out", "a"], "--leave_out: is set by this command"),
        (["--domain_column", "d", "--seed=3"], r"--seed: is set by this command; leave it out \(seeds: --seeds\)"),
        (["--domain_column", "d", "--seeds", "1", "1"], "--seeds: 1 is repeated"),
        (["--domain_column", "d", "--score", "mcc"], "score mcc: no statistics"),
    ],
)
def test_errors_come_before_any_run(started, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        domains.main(["sentiment", "--folder", str(tmp_path), *words])
    assert not started


def test_one_domain_cannot_be_left_out(tmp_path):
    runs = domains.Runs("sentiment", [], ["1"], tmp_path)
    runs.output((None, "1")).mkdir(parents=True)
    (runs.output((None, "1")) / "run.json").write_text(
        json.dumps({"domains": {"train": {"a": 1, "b": 1}, "test": {"a": 2}}})
    )
    with pytest.raises(InputError, match="1 domains have training rows and test rows, and 2 are needed"):
        runs.domains()


def test_a_recipe_without_scores_of_rows_is_rejected_before_training():
    with pytest.raises(InputError, match="mlm: has no score of single test rows"):
        domains.main(["mlm", "--domain_column", "d"])
