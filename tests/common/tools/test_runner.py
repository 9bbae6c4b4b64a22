"""Test the runner of compare and transfer: processes in turn, their share of the machine, and signals."""

import json
import os
import signal
import subprocess
import sys
from functools import partial

import pytest

from common.errors import InputError, RunStopped
from common.hardware import cores
from common.tools import runner

#: starts a run, prints the process groups of command, forking process and run, and ends the run
SERVE = """
import os, signal, sys
from pathlib import Path
from common.tools import runner
runner.LOADED = ()  # nothing needs them here
run = runner.Forked("http.server", ["--bind", "127.0.0.1", "0"], Path(sys.argv[1]), {})
parent = int(Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2].split()[1])
print(os.getpgid(0), os.getpgid(parent), os.getpgid(run.pid))
os.killpg(run.pid, signal.SIGTERM)
print(run.wait())
"""


def test_all_runs_under_way_are_stopped_and_none_is_begun(tmp_path):
    text = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); print(1, flush=True)"

    def begin(seconds: float, slot: int) -> runner.Child:
        command = [sys.executable, "-c", f"{text}; time.sleep({seconds})"]
        child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
        child.stdout.readline()  # the child is ready for the signal
        begun.append(child)
        return runner.Child(child, tmp_path, tmp_path / "log", False)

    begun: list[subprocess.Popen] = []
    before = signal.getsignal(signal.SIGTERM)
    seconds = {"short": 0, "long": 60, "later": 60, "no": 0}
    jobs = iter([(name, partial(begin, number)) for name, number in seconds.items()])
    ending = runner.in_turn(jobs, 2)
    assert next(ending)[0] == "short"
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(RunStopped, match="SIGTERM; run the same command again to resume"):
        next(ending)
    assert [child.poll() for child in begun] == [0, 143]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_job_that_must_wait_is_asked_for_again(tmp_path):
    def begin(slot: int) -> runner.Child:
        return runner.Child(subprocess.Popen([sys.executable, "-c", ""]), tmp_path, tmp_path / "log", False)

    ended: list[str] = []

    def jobs():
        yield "first", begin
        while not ended:
            yield None
        yield "second", begin

    for key, _ in runner.in_turn(jobs(), 2):
        ended.append(key)
    assert ended == ["first", "second"]


def test_a_forked_run_is_that_of_a_new_process(tmp_path):
    log = tmp_path / "log"
    run = runner.Forked("recipes.sentiment.train", ["--num_train_epochs", "many"], log, {})
    assert (run.wait(), run.returncode) == (2, 2)
    assert log.read_text() == "error: --num_train_epochs: invalid float value: 'many'\n"
    before = dict(os.environ)
    run = runner.Forked("recipes.sentiment.train", ["--help"], log, {"COLUMNS": "100"})
    assert run.wait() == 0
    assert "usage: train.py [--config FILE.yaml]" in log.read_text()
    assert before == os.environ


@pytest.mark.soak
def test_signals_to_the_command_do_not_end_the_process_that_runs_are_forked_from(tmp_path):
    done = subprocess.run([sys.executable, "-c", SERVE, str(tmp_path / "log")], capture_output=True, text=True)
    groups, code = done.stdout.splitlines()
    assert (len(set(groups.split())), code) == (3, str(-signal.SIGTERM)), done.stderr


def test_runs_at_once_share_cores_and_gpus(monkeypatch):
    assert runner.share(1, 0) == {}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    shares = [runner.share(3, slot) for slot in range(3)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["2", "5", "2"]
    assert {share["OMP_NUM_THREADS"] for share in shares} == {str(max(1, cores() // 3))}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in runner.share(3, 0)


def test_processes_are_launched_as_by_the_makefile():
    assert runner.launcher(None)[1:] == ["-m"]
    assert runner.launcher(1)[2:] == ["accelerate.commands.launch", "--num_processes", "1", "-m"]
    assert runner.launcher(4)[2:] == ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "4", "-m"]


def test_two_commands_keep_the_results_of_each_other(tmp_path):
    results = tmp_path / "results.jsonl"
    assert runner.read_results(results) == []
    with runner.changed_results(results) as found:
        found.append({"name": "one"})
    text = "import fcntl, sys, time; lock = open(sys.argv[1] + '.lock', 'w'); fcntl.lockf(lock, fcntl.LOCK_EX); "
    text += "print(1, flush=True); time.sleep(0.2); print('{}', file=open(sys.argv[1], 'a'), flush=True)"
    other = subprocess.Popen([sys.executable, "-c", text, str(results)], stdout=subprocess.PIPE)
    other.stdout.readline()  # it holds the lock
    with runner.changed_results(results) as found:
        found.append({"name": "two"})
    assert runner.read_results(results) == [{"name": "one"}, {}, {"name": "two"}]
    assert other.wait() == 0


@pytest.mark.parametrize(
    ("score", "greater"), [("test_f1", True), ("eval_f1", True), ("eval_loss", None), ("macro_f1", None)]
)
def test_the_direction_of_a_score_is_known_if_it_picks_checkpoints(score, greater):
    assert runner.greater_is_better({"metric": "f1", "greater_is_better": True}, score) is greater
    assert runner.greater_is_better({"metric": "loss", "greater_is_better": None}, "test_loss") is False


def test_a_recipe_that_does_not_exist_is_named():
    with pytest.raises(InputError, match="nothing: no such recipe in this folder"):
        runner.check_arguments("nothing", [[]])
    with pytest.raises(InputError, match="--hub_token: would be written into the results"):
        runner.check_arguments("ner", [[], ["--hub-token=secret"]])


@pytest.mark.parametrize(
    ("tuning", "parts", "size"),
    [("full", ["."], 10), ("lora", [".", "adapter"], 20), ("adapter", ["base", "adapter"], 20),
     ("domains", ["base", "adapter"], 30)],
)  # fmt: skip
def test_a_run_is_measured_with_all_its_training_and_the_weights_of_its_task(tmp_path, tuning, parts, size):
    """The bytes are those of each further task: an adapter alone, unless the weights below it are trained too."""
    for number, part in enumerate(parts):
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / "weights.safetensors").write_bytes(b"0" * 10 * (number + 1))
    record = {
        "arguments": {"metric_for_best_model": "f1", "greater_is_better": True, "tuning": tuning},
        "phases": {
            "first stage": {"seconds": 5.0, "peak_memory_mib": 9}, "train": {"seconds": 2.0, "peak_memory_mib": 7},
            "eval": {"seconds": 100.0, "peak_memory_mib": 9},
        },
        "scores": {"eval_f1": 0.5}, "code": "", "rows": "", "hardware": {}, "finished": "", "git_commit": None,
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "train_results.json").write_text('{"trainable_parameters": 3}')
    found = runner.measured(tmp_path)
    assert (found["train_seconds"], found["peak_memory_mib"], found["saved_bytes"]) == (7.0, 7, size)
