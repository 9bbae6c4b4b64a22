"""Repeat kills, signals, lost ranks, damage and hostile files many times: `make soak`. Prints one table at the end.

    python -m tests.soak                 all experiments at full counts: 15 to 25 minutes on 2 cores
    python -m tests.soak --only kills    one experiment

`make soak` then runs the long tests, `pytest --soak`: every corrupted file through the complete recipe, for
classification, MLM, CLM and question answering. `make test` takes every eighth file.

Each experiment disturbs some runs and checks their results. `figure` is the worst value, with its unit.
The exit status is 1 if a run did not survive.
"""

import argparse
import copy
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import transformers

from common.run.report import print_table
from common.training import checkpoints
from common.training.interrupts import StopSignals
from common.training.trainer import Trainer
from recipes.mlm import train as mlm
from recipes.ner import train
from tests.common.training.test_faults import kill_and_resume, launched, ranks_of
from tests.conftest import read_jsonl, write_jsonl
from tests.faults import Job, difference, last_checkpoint, make_files, make_texts, words

Outcome = tuple[bool, float]  # survived, figure


def exact_resume(files: dict[str, str], folder: Path) -> Iterator[Outcome]:
    """Largest difference of weights and states after SIGKILL in epoch 0 and 1, over all combinations of settings."""
    choices = itertools.product((0, 2), (1, 2), (None, 4), ("random", "group_by_length"))
    for i, (workers, accumulation, lora, order) in enumerate(choices):
        settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
        settings |= {"dataloader_num_workers": workers, "train_sampling_strategy": order}
        settings |= {"lora_r": lora} if lora else {}
        yield from _exact(files, folder / str(i), settings, train.main)
    texts = make_texts(files, folder)
    for workers in (0, 2):
        settings = {"dataloader_num_workers": workers, "metric_for_best_model": "loss", "max_seq_length": 32}
        yield from _exact(texts, folder / f"mlm{workers}", settings, mlm.main)


def _exact(files, folder: Path, settings: dict, main: Callable) -> Iterator[Outcome]:
    folder.mkdir()
    Job(words(files, folder / "whole", **settings), folder / "log", main=main).succeeds()
    for step in (3, 9):
        out = folder / f"out{step}"
        codes = Job(words(files, out, **settings), folder / "log", kill_at=step, main=main).ends()
        resumed = Job(words(files, out, resume_from_checkpoint="true", **settings), folder / "log", main=main)
        survived = codes == [-signal.SIGKILL] and resumed.ends() == [0]
        worst = difference(folder / "whole", out) if survived else float("inf")
        yield worst == 0, worst


def kills(files: dict[str, str], folder: Path) -> Iterator[Outcome]:
    """SIGKILL at random moments with a checkpoint every second step; figure: steps lost beyond one save interval."""
    for _ in range(100):
        wrong = kill_and_resume(files, folder, kills=1)
        for message in wrong:
            print(message)
        yield not wrong, len(wrong)


def signals_one_process(files: dict[str, str], folder: Path) -> Iterator[Outcome]:
    """SIGTERM and SIGINT at random moments; figure: seconds from the signal to the end."""
    for i in range(20):
        number = (signal.SIGTERM, signal.SIGINT)[i % 2]
        out = folder / str(i)
        settings = {"num_train_epochs": 300, "save_steps": 1000, "eval_steps": 1000}
        run = Job(words(files, out, **settings), folder / "log").reaches(random.randrange(1, 40))
        start = time.monotonic()
        codes = run.kill(number).ends()
        seconds = time.monotonic() - start
        whole = codes == [128 + number] and checkpoints.newest_whole(out).name == f"checkpoint-{run.steps[-1]}"
        yield whole and seconds < 10, seconds


def signals_one_rank(files: dict[str, str], folder: Path) -> Iterator[Outcome]:
    """SIGTERM to one of two ranks; figure: seconds from the signal to the end of both."""
    for i in range(20):
        out = folder / str(i)
        settings = {"num_train_epochs": 300, "save_steps": 1000, "eval_steps": 1000}
        run = Job(words(files, out, **settings), folder / "log", processes=2).reaches(random.randrange(1, 40))
        start = time.monotonic()
        codes = run.kill(signal.SIGTERM, rank=i % 2).ends()
        seconds = time.monotonic() - start
        whole = codes == [143, 143] and checkpoints.newest_whole(out).name == f"checkpoint-{run.steps[-1]}"
        yield whole and seconds < 10, seconds


def signals_launcher(files: dict[str, str], folder: Path) -> Iterator[Outcome]:
    """SIGTERM to torchrun over two ranks; figure: seconds from the signal to the end of the launcher."""
    for i in range(20):
        out, log = folder / str(i), folder / f"{i}.txt"
        process = launched(files, out, log, save_steps=5, eval_steps=5)
        time.sleep(random.uniform(0, 0.3))
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        seconds = time.monotonic() - start
        whole = "is complete; resume" in log.read_text() and checkpoints.problem(last_checkpoint(out)) is None
        yield whole and seconds < 10, seconds
        shutil.rmtree(out)


def dead_rank(files: dict[str, str], folder: Path) -> Iterator[Outcome]:
    """SIGKILL of one of two ranks under torchrun; figure: seconds until the run has ended."""
    for i in range(10):
        out = folder / str(i)
        process = launched(files, out, folder / f"{i}.txt")
        os.kill(ranks_of(process.pid)[i % 2], signal.SIGKILL)
        start = time.monotonic()
        code = process.wait(60)
        seconds = time.monotonic() - start
        yield code != 0 and seconds < 10 and checkpoints.newest_whole(out).exists(), seconds
        shutil.rmtree(out)


def hung_rank(files: dict[str, str], folder: Path) -> Iterator[Outcome]:
    """SIGSTOP of one of two ranks with --ddp_timeout 3; figure: seconds until the other has ended, naming it."""
    for i in range(5):
        settings = {"num_train_epochs": 500, "ddp_timeout": 3, "save_steps": 1000, "eval_steps": 1000}
        run = Job(words(files, folder / str(i), **settings), folder / f"log{i}", processes=2).reaches(3)
        start = time.monotonic()
        run.kill(signal.SIGSTOP, rank=1)
        run.processes[0].join(30)
        seconds = time.monotonic() - start
        named = f"rank 1 (process {run.processes[1].pid}, stopped)" in run.output
        yield run.processes[0].exitcode == 4 and named and seconds < 10, seconds
        run.kill(signal.SIGKILL, rank=1)


def damage(files: dict[str, str], folder: Path) -> Iterator[Outcome]:
    """One flipped bit in a file of a checkpoint, 20 times each file; figure: flips not seen."""
    Job(words(files, folder / "out"), folder / "log").succeeds()
    checkpoint = last_checkpoint(folder / "out")
    for path in sorted(checkpoint.iterdir()):
        whole = path.read_bytes()
        for _ in range(20):
            bit = random.randrange(8 * len(whole))
            path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
            seen = checkpoints.problem(checkpoint) is not None
            yield seen, float(not seen)
        path.write_bytes(whole)


def hostile_text(files: dict[str, str], folder: Path) -> Iterator[Outcome]:
    """A row of 30 MB, and a million labels, are refused; figure: peak memory in MiB, with the libraries."""
    rows = read_jsonl(Path(files["train_file"]))
    word = [{"tokens": ["x" * 30_000_000], "ner_tags": ["O"]}]
    sentence = [{"tokens": ["y"] * 6_000_000, "ner_tags": ["O"] * 6_000_000}]
    labels = [{"tokens": ["x"] * 100, "ner_tags": [f"B-{i}" for i in range(n, n + 100)]} for n in range(0, 10**6, 100)]
    for name, bad in (("word", word), ("sentence", sentence), ("labels", labels)):
        file = write_jsonl(folder / f"{name}.jsonl", rows + bad)
        peak = 0.0
        run = Job(words(files | {"train_file": file}, folder / name), folder / "log")
        while run.processes[0].is_alive():
            peak = max(peak, _peak_mib(run.processes[0].pid))
            time.sleep(0.02)
        yield run.ends() == [2] and "Traceback" not in run.output, peak


def _peak_mib(process: int) -> float:
    try:
        status = Path(f"/proc/{process}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return 0.0


def cost(files: dict[str, str], folder: Path) -> Iterator[Outcome]:
    """`make ner` with its defaults; figure: percent of the training time that the trainer's guarantees cost.

    The cost has four parts: saving each checkpoint, minus the time of the stock Trainer for the same state; keeping the
    best weights when a checkpoint is skipped; verifying the best checkpoint before restoring; and checks for signals
    and for numbers that are not finite.
    """
    for i in range(3):
        seconds = _timed_run(folder / str(i), folder / f"stock{i}")
        train = seconds["train"] - seconds["stock"]
        extra = seconds["ours"] + seconds["looks"] - seconds["stock"]
        yield extra < 0.02 * train, 100 * extra / train


def _timed_run(out: Path, aside: Path) -> dict[str, float]:
    """Return seconds of training, of saving (ours and stock), and of checks, in a run of the recipe."""
    spent = {"ours": 0.0, "stock": 0.0, "looks": 0.0}

    def timed(function: Callable, name: str) -> Callable:
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - start
            return result

        return wrapper

    save = timed(Trainer._save_checkpoint, "ours")
    stock_save = timed(transformers.Trainer._save_checkpoint, "stock")

    def save_both(trainer: Trainer, model, trial) -> None:
        save(trainer, model, trial)
        if trainer._saved_step != trainer.state.global_step:  # no checkpoint at this step
            return
        state, trainer.state = trainer.state, copy.deepcopy(trainer.state)
        with patch.object(trainer.args, "output_dir", str(aside)):
            stock_save(trainer, model, trial)
        trainer.state = state

    with ExitStack() as stack:
        for owner, name, function in (
            (Trainer, "_save_checkpoint", save_both),
            (StopSignals, "agreed", timed(StopSignals.agreed, "looks")),
            (Trainer, "_stop_unless_finite", timed(Trainer._stop_unless_finite, "looks")),
            (checkpoints, "damage", timed(checkpoints.damage, "looks")),
        ):
            stack.enter_context(patch.object(owner, name, function))
        train.main(["--output_dir", str(out), "--disable_tqdm", "true"])
    metrics = json.loads((out / "train_results.json").read_text())
    return spent | {"train": metrics["train_runtime"]}


EXPERIMENTS: dict[str, tuple[Callable[[dict[str, str], Path], Iterator[Outcome]], str]] = {
    "exact_resume": (exact_resume, "difference"),
    "kills": (kills, "intervals lost"),
    "signals_one_process": (signals_one_process, "s to end"),
    "signals_one_rank": (signals_one_rank, "s to end"),
    "signals_launcher": (signals_launcher, "s to end"),
    "dead_rank": (dead_rank, "s to end"),
    "hung_rank": (hung_rank, "s to end"),
    "damage": (damage, "not seen"),
    "hostile_text": (hostile_text, "MiB"),
    "cost": (cost, "% of training"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    options = parser.parse_args()
    random.seed(0)
    table = []
    with tempfile.TemporaryDirectory() as name:
        files = make_files(Path(name))
        for experiment in options.only:
            function, unit = EXPERIMENTS[experiment]
            folder = Path(name, experiment)
            folder.mkdir()
            start = time.monotonic()
            outcomes = list(function(files, folder))
            shutil.rmtree(folder, ignore_errors=True)
            figures = [figure for _, figure in outcomes]
            row = [experiment, len(outcomes), sum(ok for ok, _ in outcomes)]
            row += [f"{statistics.median(figures):.3g}", f"{max(figures):.3g} {unit}", round(time.monotonic() - start)]
            table.append(row)
            print(*row, flush=True)
    print()
    print_table(["experiment", "tries", "survived", "median", "worst", "seconds"], table)
    sys.exit(any(row[1] != row[2] for row in table))


if __name__ == "__main__":
    main()
