"""Test runs that are killed, stopped, starved or given damaged files; `make soak` repeats this with full counts."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import BertConfig, BertModel

from common.errors import InputError
from common.hardware import is_out_of_memory
from common.training import checkpoints
from common.training.memory import smaller
from common.training.order import TrainingBatches
from recipes.clm import train as clm
from recipes.mlm import train as mlm
from recipes.ner import predict, train
from tests.conftest import ROOT, read_jsonl, write_jsonl
from tests.faults import CONTEXT, Job, difference, last_checkpoint, limit_memory, make_files, make_texts, words


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory) -> Path:
    """Return an undisturbed run: 18 steps; checkpoints 14, 16 and 18, and the best."""
    out = tmp_path_factory.mktemp("finished") / "out"
    Job(words(files, out), out.parent / "log").succeeds()
    return out


@pytest.fixture
def damaged(finished, tmp_path) -> Path:
    """Return a copy of the undisturbed run to damage, as if stopped before its end."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "model.safetensors").unlink()
    return out


def resumed(files, out: Path, **settings) -> Job:
    return Job(words(files, out, resume_from_checkpoint="true", **settings), out.parent / "resumed")


class Canary:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# 1. Exact resume

SETTINGS = [
    pytest.param({"eval_strategy": "epoch", "save_strategy": "epoch"}, id="by-epoch"),
    pytest.param(
        {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": 2},
        id="grouped-workers",
        marks=pytest.mark.soak,
    ),
    pytest.param(  # 3 rows in the last step: it shares with the step before, and one of 8 batches has no row
        {"gradient_accumulation_steps": 8, "per_device_train_batch_size": 1, "max_train_samples": 43},
        id="accumulated",
        marks=pytest.mark.soak,
    ),
    pytest.param({"lora_r": 4, "early_stopping_patience": 50}, id="lora", marks=pytest.mark.soak),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_killed_and_resumed_equals_uninterrupted(files, tmp_path, settings):
    Job(words(files, tmp_path / "whole", **settings), tmp_path / "log").succeeds()
    killed = words(files, tmp_path / "out", **settings)
    steps = (9,) if "eval_strategy" in settings else (3, 9)  # in epoch 0, if it has a checkpoint, and in epoch 1
    for step in steps:
        again = [] if step == steps[0] else ["--resume_from_checkpoint", "true"]
        assert Job(killed + again, tmp_path / "log", kill_at=step).ends() == [-signal.SIGKILL]
    resumed(files, tmp_path / "out", **settings).succeeds()
    assert difference(tmp_path / "whole", tmp_path / "out") == 0


@pytest.mark.soak
@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"dataloader_num_workers": 2}, marks=pytest.mark.soak),
        {
            **{"masking": "span", "pack": False, "train_sampling_strategy": "group_by_length"},
            **{"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        },
    ],
    ids=["packed-workers", "one-a-row"],
)
def test_masks_drawn_by_row_resume_exactly(files, tmp_path, more):
    texts = make_texts(files, tmp_path)
    settings = {"metric_for_best_model": "loss", "max_seq_length": 32} | more
    Job(words(texts, tmp_path / "whole", **settings), tmp_path / "log", main=mlm.main).succeeds()
    out = words(texts, tmp_path / "out", **settings)
    assert Job(out, tmp_path / "log", kill_at=9, main=mlm.main).ends() == [-signal.SIGKILL]
    Job([*out, "--resume_from_checkpoint", "true"], tmp_path / "log", main=mlm.main).succeeds()
    assert difference(tmp_path / "whole", tmp_path / "out") == 0
    assert (tmp_path / "whole" / "fill_ins.jsonl").read_bytes() == (tmp_path / "out" / "fill_ins.jsonl").read_bytes()


@pytest.mark.soak
@pytest.mark.parametrize("recipe", [mlm, clm])
def test_a_run_from_scratch_goes_on_with_its_own_tokenizer(files, tmp_path, recipe):
    settings = {"tokenizer_train": "bpe", "vocab_size": 400, "model_size": "tiny", "dropout": 0.1}
    settings |= {"max_seq_length": 32, "save_total_limit": 20, "metric_for_best_model": "loss"}
    texts = make_texts(files, tmp_path)
    if recipe is clm:
        del texts["model_name_or_path"]
    Job(words(texts, tmp_path / "whole", **settings), tmp_path / "log", main=recipe.main).succeeds()
    shutil.copytree(tmp_path / "whole", tmp_path / "out")  # as if killed after step 8
    for checkpoint in checkpoints.in_order(tmp_path / "out"):
        if checkpoints.step_of(checkpoint) > 8:
            shutil.rmtree(checkpoint)
    out = words(texts, tmp_path / "out", **settings, resume_from_checkpoint="true")
    run = Job(out, tmp_path / "log", main=recipe.main)
    run.succeeds()
    assert run.steps[0] == 9
    assert difference(tmp_path / "whole", tmp_path / "out") == 0


@pytest.mark.soak
def test_patience_and_best_score_survive(files, tmp_path):
    settings = {
        "early_stopping_patience": 3,
        "learning_rate": 1e-12,
        "save_total_limit": 20,
    }  # not better than the first
    Job(words(files, tmp_path / "whole", **settings), tmp_path / "log").succeeds()
    state = json.loads((last_checkpoint(tmp_path / "whole") / "trainer_state.json").read_text())
    end = state["global_step"]
    assert end < 18
    out = words(files, tmp_path / "out", **settings)
    assert Job(out, tmp_path / "log", kill_at=end - 1).ends() == [-signal.SIGKILL]
    resumed(files, tmp_path / "out", **settings).succeeds()
    assert difference(tmp_path / "whole", tmp_path / "out") == 0
    shutil.rmtree(tmp_path / "out")  # killed after the last checkpoint, it trains no further
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    run = resumed(files, tmp_path / "out", **settings)
    run.succeeds()
    assert run.steps == []


def test_what_would_not_be_the_same_run_is_refused_or_named(files, damaged):
    run = resumed(files, damaged, per_device_train_batch_size=16)
    assert run.ends() == [2]
    assert "the run took 8 rows a step and would now take 16" in run.output
    run = resumed(files, damaged, seed=7)
    assert run.ends() == [2]
    assert "--seed: the run has 42 and cannot resume with 7; give --seed 42" in run.output
    run = resumed(files, damaged, max_train_samples=40)
    assert run.ends() == [2]
    assert "its run was on other data" in run.output
    run = resumed(files, damaged, train_sampling_strategy="group_by_length")
    assert run.ends() == [2]
    assert "its run took rows in another order; give --train_sampling_strategy random" in run.output
    run = resumed(files, damaged, num_train_epochs=4)
    run.succeeds()
    assert "resuming with changed arguments" in run.output
    assert "--num_train_epochs 3.0 to 4.0" in run.output
    assert run.steps[-1] == 24


# 2. Whole checkpoints


@pytest.mark.soak
def test_kills_at_random_moments_lose_one_save_interval_at_most(files, tmp_path):
    random.seed(0)
    assert kill_and_resume(files, tmp_path, kills=4) == []


def kill_and_resume(files, folder: Path, kills: int) -> list[str]:
    """Kill runs after random times and resume them. Returns a list of faults."""
    wrong = []
    out, done = folder / "out", 0
    while done < kills:
        again = {"resume_from_checkpoint": "true"} if list(out.glob("checkpoint-*")) else {"overwrite": True}
        run = Job(words(files, out, num_train_epochs=100, save_steps=2, **again), folder / "log")
        run.reaches(1)
        time.sleep(random.uniform(0, 0.6))
        run.kill(signal.SIGKILL).ends()
        done += 1
        step = run.steps[-1]
        found = None
        try:
            found = checkpoints.newest_whole(out)
        except InputError as error:
            if step > 3:
                wrong.append(f"kill {done} at step {step}: {error}")
        if found and step - int(found.name.split("-")[1]) > 2:
            wrong.append(f"kill {done} at step {step}: newest whole is {found.name}")
        if step > 500:
            shutil.rmtree(out)
    return wrong


def test_damage_is_seen_and_an_older_checkpoint_taken(files, finished, damaged):
    newest = damaged / "checkpoint-18"
    (damaged / "checkpoint-99").mkdir()
    shutil.copytree(damaged / "checkpoint-16", damaged / "checkpoint-17")
    (damaged / "checkpoint-17" / "optimizer.pt").unlink()
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    run = resumed(files, damaged)
    run.succeeds()
    assert "checkpoint-99: the trainer state (trainer_state.json) is missing" in run.output
    assert "checkpoint-18: model.safetensors is damaged" in run.output
    assert "checkpoint-17: optimizer.pt is missing" in run.output
    assert f"resuming from {damaged / 'checkpoint-16'}" in run.output
    assert (finished / "model.safetensors").read_bytes() == (damaged / "model.safetensors").read_bytes()
    assert (damaged / "checkpoint-99").exists()  # the user's files stay
    assert checkpoints.problem(damaged / "checkpoint-18") is None  # replaced by a new checkpoint


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_flipped_bit_a_cut_and_a_missing_file_are_seen(damaged, name):
    checkpoint = damaged / "checkpoint-18"
    assert checkpoints.problem(checkpoint) is None
    whole = (checkpoint / name).read_bytes()
    random.seed(name)
    for _ in range(5):
        bit = random.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (checkpoint / name).write_bytes(flipped)
        assert f"{name} is damaged" in checkpoints.problem(checkpoint)
    (checkpoint / name).write_bytes(whole[: len(whole) // 2])
    assert f"{name} has {len(whole) // 2:,} bytes and should have" in checkpoints.problem(checkpoint)
    (checkpoint / name).unlink()
    assert f"{name} is missing" in checkpoints.problem(checkpoint)
    (checkpoint / "manifest.json").unlink()  # a missing file is an error even without a manifest
    assert f"({name if name != 'model.safetensors' else '*.safetensors'}" in checkpoints.problem(checkpoint, True) or (
        name == "rng_state.pth" and "random states" in checkpoints.problem(checkpoint, True)
    )


def test_a_checkpoint_without_manifest_needs_to_be_accepted(files, damaged):
    for checkpoint in damaged.glob("checkpoint-*"):
        (checkpoint / "manifest.json").unlink()
    run = resumed(files, damaged)
    assert run.ends() == [2]
    assert "no whole checkpoint; nothing was removed" in run.output
    assert "--accept_unverified_checkpoint" in run.output
    assert len(list(damaged.glob("checkpoint-*"))) >= 3
    run = resumed(files, damaged, accept_unverified_checkpoint=True)
    run.succeeds()
    assert "used unverified (--accept_unverified_checkpoint)" in run.output


def test_the_best_and_the_last_whole_checkpoint_are_kept(files, tmp_path):
    settings = {"learning_rate": 1e-12, "save_total_limit": 1}  # all scores are equal, and the first is the best
    run = Job(words(files, tmp_path / "out", **settings), tmp_path / "log", kill_at=17)
    assert run.ends() == [-signal.SIGKILL]
    state = json.loads((tmp_path / "out" / "checkpoint-16" / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.name != "checkpoint-16"
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {best.name, "checkpoint-16"}
    assert checkpoints.problem(best) is None


def test_a_finished_run_keeps_its_last_checkpoint_beside_the_best_and_what_is_not_its_own(files, tmp_path):
    mine = tmp_path / "out" / "checkpoint-2-mine"
    settings = {"learning_rate": 0.5, "save_total_limit": 1, "num_train_epochs": 2}
    run = Job(words(files, tmp_path / "out", **settings), tmp_path / "log").reaches(1)
    mine.mkdir(parents=True)
    run.succeeds()
    assert mine.is_dir()
    assert (tmp_path / "out" / "checkpoint-12").is_dir()
    assert checkpoints.newest_whole(tmp_path / "out").name == "checkpoint-12"
    Job(words(files, tmp_path / "out", overwrite=True, **settings), tmp_path / "log").succeeds()
    assert mine.is_dir()


@pytest.mark.soak
def test_a_moved_folder_resumes_with_its_own_best_checkpoint(files, tmp_path):
    settings = {"learning_rate": 0.5}  # the best score comes early
    Job(words(files, tmp_path / "whole", **settings), tmp_path / "log").succeeds()
    assert Job(words(files, tmp_path / "old", **settings), tmp_path / "log", kill_at=15).ends() == [-signal.SIGKILL]
    (tmp_path / "old").rename(tmp_path / "out")
    resumed(files, tmp_path / "out", **settings).succeeds()
    assert difference(tmp_path / "whole", tmp_path / "out") == 0


def test_a_run_on_a_named_data_set_resumes(files, tmp_path):
    rows = {split: read_jsonl(Path(files[f"{split}_file"])) for split in ("train", "validation", "test")}
    DatasetDict({split: Dataset.from_list(data) for split, data in rows.items()}).save_to_disk(tmp_path / "data")
    named = {"model_name_or_path": files["model_name_or_path"], "dataset_name": str(tmp_path / "data")}
    Job(words(named, tmp_path / "whole"), tmp_path / "log").succeeds()
    assert Job(words(named, tmp_path / "out"), tmp_path / "log", kill_at=9).ends() == [-signal.SIGKILL]
    resumed(named, tmp_path / "out").succeeds()
    assert difference(tmp_path / "whole", tmp_path / "out") == 0


def test_a_checkpoint_of_the_stock_trainer_is_taken_when_accepted(files, damaged, tmp_path):
    out = tmp_path / "stock"
    shutil.copytree(damaged / "checkpoint-16", out / "checkpoint-16")
    (out / "checkpoint-16" / "manifest.json").unlink()
    (out / "checkpoint-16" / "training_args.bin").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    run = Job(words(files, out, resume_from_checkpoint="true", accept_unverified_checkpoint=True), tmp_path / "log")
    run.succeeds()
    assert "no record of its run" in run.output
    assert run.steps == [17, 18]
    assert not (tmp_path / "canary").exists()


# 3. Disk full


def test_a_full_disk_is_told_and_the_checkpoint_before_is_intact(files, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        run = Job(words(files, disk / "out", save_total_limit=20), tmp_path / "log")
        assert run.ends() == [5]
        assert "bytes are needed" in run.output
        assert "resume from checkpoint-" in run.output
        assert "Traceback" not in run.output
        assert not (disk / "out" / ".saving").exists()
        newest = checkpoints.newest_whole(disk / "out")
        assert newest == last_checkpoint(disk / "out")
        shutil.copytree(disk / "out", tmp_path / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    resumed(files, tmp_path / "out", save_total_limit=20).succeeds()


# 4. SIGTERM and SIGINT


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits_with_its_status(files, tmp_path, number, code):
    out = tmp_path / "out"
    run = Job(words(files, out, num_train_epochs=200, save_steps=1000, eval_steps=1000), tmp_path / "log").reaches(7)
    start = time.monotonic()
    assert run.kill(number).ends() == [code]
    assert time.monotonic() - start < 10
    step = run.steps[-1]
    assert checkpoints.newest_whole(out).name == f"checkpoint-{step}"
    assert "the same command and --resume_from_checkpoint true" in run.output
    assert "Traceback" not in run.output


@pytest.mark.parametrize("by", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.soak)])
def test_stopped_in_the_last_step_of_an_epoch_it_loses_no_evaluation(files, tmp_path, by):
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "early_stopping_patience": 50}
    Job(words(files, tmp_path / "whole", **settings), tmp_path / "log").succeeds()
    run = Job(words(files, tmp_path / "out", **settings), tmp_path / "log", kill_at=12, by=by)
    assert run.ends() == [143 if by == signal.SIGTERM else -by]
    resumed(files, tmp_path / "out", **settings).succeeds()
    assert difference(tmp_path / "whole", tmp_path / "out") == 0


@pytest.mark.soak
def test_two_processes_resume_exactly_in_the_middle_of_an_epoch(files, tmp_path):
    settings = {"per_device_train_batch_size": 4, "eval_strategy": "epoch", "save_strategy": "epoch"}
    Job(words(files, tmp_path / "whole", **settings), tmp_path / "log", processes=2).succeeds()
    # both processes get the signal in the middle of epoch 1
    run = Job(words(files, tmp_path / "out", **settings), tmp_path / "log", kill_at=9, by=signal.SIGTERM, processes=2)
    assert run.ends() == [143, 143]
    assert last_checkpoint(tmp_path / "out").name in [f"checkpoint-{step}" for step in range(9, 13)]  # busy: later
    run = Job(words(files, tmp_path / "out", resume_from_checkpoint="true", **settings), tmp_path / "log", processes=2)
    run.succeeds()
    assert difference(tmp_path / "whole", tmp_path / "out") == 0


def test_a_signal_to_one_of_two_ranks_stops_both(files, tmp_path):
    settings = {"num_train_epochs": 300, "save_steps": 1000, "eval_steps": 1000}
    run = Job(words(files, tmp_path / "out", **settings), tmp_path / "log", processes=2).reaches(8)
    assert run.kill(signal.SIGTERM, rank=1).ends() == [143, 143]
    assert checkpoints.newest_whole(tmp_path / "out").name == f"checkpoint-{run.steps[-1]}"


def launched(files, out: Path, log: Path, *launcher: str, **settings) -> subprocess.Popen:
    """Start a launcher with two processes, and wait for the first checkpoint."""
    command = [*(launcher or ("torch.distributed.run", "--nproc_per_node", "2")), "-m", "recipes.ner.train"]
    defaults = {"per_device_train_batch_size": 4, "num_train_epochs": 500, "save_steps": 20, "eval_steps": 20}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, *words(files, out, **defaults | settings)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    end = time.monotonic() + 60
    while not list(out.glob("checkpoint-*")):
        assert time.monotonic() < end, log.read_text()
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    return process


def ranks_of(launcher: int) -> list[int]:
    """Return the process ids of a launcher's runs, rank 0 first."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == launcher:
                environment = (folder / "environ").read_bytes().split(b"\0")
                found |= {int(v[5:]): int(folder.name) for v in environment if v.startswith(b"RANK=")}
        except OSError:
            continue
    return [found[rank] for rank in sorted(found)]


@pytest.mark.soak
def test_a_signal_to_the_launcher_publishes_a_checkpoint(files, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    process = launched(files, out, log, save_steps=5, eval_steps=5)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert time.monotonic() - start < 15
    assert "is complete; resume with the same command" in log.read_text()
    assert checkpoints.problem(last_checkpoint(out)) is None


def test_a_signal_to_the_whole_process_group_spares_the_workers(files, tmp_path):
    settings = {"dataloader_num_workers": 2, "num_train_epochs": 300, "save_steps": 1000, "eval_steps": 1000}
    run = Job(words(files, tmp_path / "out", **settings), tmp_path / "log", group=True).reaches(9)
    os.killpg(run.processes[0].pid, signal.SIGTERM)
    assert run.ends(20) == [143], run.output
    assert "Traceback" not in run.output
    assert checkpoints.newest_whole(tmp_path / "out").name == f"checkpoint-{run.steps[-1]}"


@pytest.mark.soak
def test_a_second_signal_ends_a_run_that_waits_for_a_stopped_rank(files, tmp_path):
    settings = {"num_train_epochs": 500, "save_steps": 1000, "eval_steps": 1000}
    run = Job(words(files, tmp_path / "out", **settings), tmp_path / "log", processes=2).reaches(3)
    run.kill(signal.SIGSTOP, rank=1)
    time.sleep(0.5)
    run.kill(signal.SIGTERM)
    time.sleep(3.5)
    assert run.processes[0].exitcode is None
    run.kill(signal.SIGTERM)
    run.processes[0].join(10)
    assert run.processes[0].exitcode == 143
    run.kill(signal.SIGKILL, rank=1).ends()


# 5. A dead or hung rank


@pytest.mark.soak
def test_a_dead_rank_ends_the_run_at_once(files, tmp_path):
    process = launched(files, tmp_path / "out", tmp_path / "log.txt")
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    start = time.monotonic()
    assert process.wait(60) != 0
    assert time.monotonic() - start < 10
    assert checkpoints.newest_whole(tmp_path / "out")


def test_a_hanging_rank_is_named_within_the_bound(files, tmp_path):
    settings = {"num_train_epochs": 500, "ddp_timeout": 3, "save_steps": 1000, "eval_steps": 1000}
    run = Job(words(files, tmp_path / "out", **settings), tmp_path / "log", processes=2).reaches(3)
    start = time.monotonic()
    run.kill(signal.SIGSTOP, rank=1)
    run.processes[0].join(30)
    assert run.processes[0].exitcode == 4
    assert 2 < time.monotonic() - start < 10
    stopped = run.processes[1].pid
    run.kill(signal.SIGKILL, rank=1).ends()
    assert f"rank 1 (process {stopped}, stopped) no longer answers" in run.output


# 6. Not a number


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_rows(files, tmp_path):
    out = tmp_path / "out"
    run = Job(
        words(files, out, learning_rate=1e20, max_grad_norm=0, save_steps=1, eval_steps=1),
        tmp_path / "log",
    )
    assert run.ends() == [3]
    step = run.steps[-1] + 1
    assert f"the loss of step {step} is not a finite number" in run.output
    lengths = [1] * 48  # each sentence is one window, and steps of random rows do not depend on lengths
    batches = TrainingBatches(lengths, 8, 1, 1, 0, 42, by_length=False)
    rows = sorted(list(batches)[step - 1])
    assert f"from 0: {', '.join(map(str, rows))};" in run.output
    assert last_checkpoint(out).name == f"checkpoint-{step - 1}"
    assert not (out / "model.safetensors").exists()


# 7. Out of memory


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ((8, 1, 0), ("8 rows", "give --auto_find_batch_size true")),
        # several processes reject that argument
        ((8, 2, 0), ("8 rows", "give half the --per_device_train_batch_size and twice the --gradient_accumul")),
        ((1, 2, 0), ("1 row", "take a smaller model")),
        ((8, 1, 512), ("up to 512 tokens", "give half the --max_tokens_per_batch and twice the --gradient_accumul")),
    ],
)
def test_the_remedy_for_a_batch_that_exceeds_memory_is_allowed(batch, found):
    size, remedy = smaller(*batch)
    assert (size, remedy[: len(found[1])]) == found


@pytest.mark.soak
def test_out_of_memory_halves_the_batch_and_begins_again_with_the_same_steps(files, tmp_path):
    third = list(TrainingBatches([1] * 48, 8, 1, 1, 0, 42, by_length=False))[2]
    sizes = [110 if row in third else 3 for row in range(48)]  # two steps fit into memory, the third does not
    rows = [{"tokens": ["the"] * size, "ner_tags": ["B-PER"] + ["O"] * (size - 1)} for size in sizes]
    train_file = write_jsonl(tmp_path / "train.jsonl", rows)
    settings = {"model_name_or_path": str(make_wide(files, tmp_path)), "train_file": train_file, "num_train_epochs": 2}
    settings |= {"save_strategy": "no", "eval_strategy": "no", "per_device_eval_batch_size": 4}
    memory = 15 * 2**27  # 4 rows take up to 1,700 MiB, 8 rows 2,100 MiB
    run = Job(words(files, tmp_path / "plain", **settings), tmp_path / "log", memory=memory)
    assert run.ends() == [6]
    assert "out of memory in step 3 with 8 rows at a time; give --auto_find_batch_size true" in run.output
    settings |= {"auto_find_batch_size": True}
    run = Job(words(files, tmp_path / "out", **settings), tmp_path / "log", memory=memory)
    run.succeeds()
    assert "out of memory with 8 rows at a time: takes 4, and 2 batches a step" in run.output
    parts = next(n for n in (8, 4, 2) if f"takes {8 // n}, and" in run.output)
    settings |= {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
    Job(words(files, tmp_path / "parts", **settings), tmp_path / "log").succeeds()
    found = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "parts")]
    assert found[0] == found[1]
    settings |= {"per_device_eval_batch_size": 64, "max_steps": 1}
    run = Job(words(files, tmp_path / "eval", **settings), tmp_path / "log", memory=2**30)
    assert run.ends() == [6]
    assert "out of memory in an evaluation with 64 rows at a time; give a smaller --per_device_eval" in run.output

    texts = write_jsonl(tmp_path / "texts.jsonl", [{"tokens": ["the"] * 110}] * 40)
    written = tmp_path / "predicted.jsonl"
    command = ["--model", str(tmp_path / "out"), "--input", texts, "--output", str(written), "--precision", "fp32"]
    run = Job(command, tmp_path / "log", memory=2**30, main=predict.main)
    assert run.ends() == [6]
    assert "out of memory after 0 rows, with up to 4096 tokens at a time; give a smaller --batch_t" in run.output
    assert not written.exists()
    Job([*command, "--batch_tokens", "256"], tmp_path / "log", memory=2**30, main=predict.main).succeeds()
    assert len(read_jsonl(written)) == 40


def test_a_kernel_for_which_there_is_no_memory_is_out_of_memory(tmp_path):
    """oneDNN allocates memory for compiled kernels, and reports only that it "could not create a primitive"."""
    process = CONTEXT.Process(target=_starved, args=(str(tmp_path / "said"),))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "said").read_text() == "True False"


def _starved(said: str) -> None:
    values = torch.randn(64, 64)
    limit_memory(0)
    found = []
    for compute in (lambda: torch.nn.functional.gelu(values), lambda: values @ values[:3]):
        with pytest.raises(RuntimeError) as raised:
            compute()
        found.append(is_out_of_memory(raised.value))
    Path(said).write_text(" ".join(map(str, found)))


def make_wide(files, folder: Path) -> Path:
    """Model of one layer with large activations and small weights."""
    wide = folder / "wide"
    shutil.copytree(files["model_name_or_path"], wide)
    config = BertConfig.from_pretrained(wide, num_hidden_layers=1, intermediate_size=150_000)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(wide)
    return wide


# 9. No code from checkpoints


PLANTED = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "adapter_model.bin"]


@pytest.mark.parametrize("name", [*PLANTED, "custom_checkpoint_0.pkl"])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_planted_pickle_is_never_run(files, damaged, tmp_path, name, sealed):
    for checkpoint in damaged.glob("checkpoint-*"):
        (checkpoint / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
        (checkpoint / "manifest.json").unlink()
        if sealed:  # as someone with write access would do
            staged = damaged / ".saving" / checkpoint.name
            shutil.copytree(checkpoint, staged)
            checkpoints.publish(staged, damaged)
    with pytest.raises(InputError) as error:
        train.main(
            words(files, damaged, resume_from_checkpoint="true", num_train_epochs=4, accept_unverified_checkpoint=True)
        )
    assert not (tmp_path / "canary").exists()
    assert "is a pickle, which could run code" in str(error.value) or "holds code, not numbers" in str(error.value)
