"""Test runs on unlabelled rows: rounds, their resume, and the scores without and with these rows."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import InputError
from recipes.ner import train
from tests.conftest import SAMPLE, read_jsonl, write_jsonl
from tests.faults import Job, difference, make_files, words


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Return the files of a tiny run, with 40 sentences without tags and one that is a test row."""
    folder = tmp_path_factory.mktemp("rounds")
    rows = read_jsonl(SAMPLE / "train.jsonl")[48:88] + read_jsonl(SAMPLE / "test.jsonl")[:1]
    pool = write_jsonl(folder / "pool.jsonl", [{"tokens": row["tokens"]} for row in rows])
    return make_files(folder) | {"unlabeled_file": pool}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_rounds_are_runs_that_resume_one_by_one(files, tmp_path, capsys):
    out, first = tmp_path / "out", tmp_path / "out-teacher"
    settings = {"semi": "pseudo", "semi_threshold": 0.1, "max_steps": 6, "save_total_limit": 9, "seed": 3}
    settings |= {"dropout": 0.1, "num_train_epochs": 1}
    found = train.main(words(files, out, **settings))
    printed = capsys.readouterr()
    assert "dropped 1 rows that equal a test row" in printed.err
    assert "unlabelled rows count with weight" in printed.out
    assert "training steps" in printed.out

    # the run without unlabelled rows is the ordinary one of the same seed
    plain = {name: value for name, value in files.items() if name != "unlabeled_file"}
    ordinary = {name: value for name, value in settings.items() if not name.startswith("semi")}
    alone = train.main(words(plain, tmp_path / "alone", **ordinary))
    assert all(torch.equal(value, weights(first)[name]) for name, value in weights(tmp_path / "alone").items())
    assert found["without_test_f1"] == alone["test_f1"]
    assert record(first)["arguments"]["semi"] is None
    assert set(record(out)["scores"]) >= {"semi_threshold", "semi_weight", "without_eval_f1"}

    # as if killed in the last round after step 4; the finished round is not trained again
    wanted, times = weights(out), [path.stat().st_mtime_ns for path in sorted(first.rglob("*")) if path.is_file()]
    for path in out.iterdir():
        if path.name.startswith("checkpoint-") and int(path.name.split("-")[1]) > 4:
            shutil.rmtree(path)
    (out / "model.safetensors").unlink()
    (out / "run.json").write_text(json.dumps(record(out) | {"finished": None}))
    again = train.main(words(files, out, **settings, resume_from_checkpoint="true"))
    assert "resuming from" in capsys.readouterr().out
    assert all(torch.equal(value, weights(out)[name]) for name, value in wanted.items())
    assert {n: v for n, v in again.items() if "_f1" in n} == {n: v for n, v in found.items() if "_f1" in n}
    assert [path.stat().st_mtime_ns for path in sorted(first.rglob("*")) if path.is_file()] == times

    # other arguments do not fit the finished round
    shutil.rmtree(out)
    with pytest.raises(InputError, match=r"finished run in .*-teacher differs in --learning_rate"):
        train.main(words(files, out, **settings | {"learning_rate": 1e-4}, resume_from_checkpoint="true"))
    assert not out.exists()


@pytest.mark.soak
@pytest.mark.parametrize(("semi", "kill_at"), [("noisy_student", 3), ("noisy_student", 20), ("fixmatch", 25)])
def test_a_run_killed_in_any_round_ends_in_the_same_bytes(files, tmp_path, semi, kill_at):
    settings = {"semi": semi, "semi_threshold": 0.1, "dropout": 0.1}  # 18 steps without unlabelled rows, 72 with them
    Job(words(files, tmp_path / "whole", **settings), tmp_path / "log").succeeds()
    arguments = words(files, tmp_path / "again", **settings)
    job = Job(arguments, tmp_path / "log", kill_at=kill_at)
    assert job.ends() == [-9]
    steps = job.steps
    assert (len(steps) > 18) == (kill_at > 18)
    resumed = Job([*arguments, "--resume_from_checkpoint", "true"], tmp_path / "log")
    resumed.succeeds()
    if kill_at > 18:
        assert resumed.steps[0] == kill_at // 2 * 2 - (kill_at % 2 == 0) * 2 + 1
    for name in ("", "-teacher", "-teacher-teacher"):
        if (tmp_path / f"whole{name}").exists():
            assert difference(tmp_path / f"again{name}", tmp_path / f"whole{name}") == 0
