"""Run trainings of recipes in processes of their own, for the commands that start many of them.

A command checks the arguments of all runs (`check_arguments`) before it starts the first (`start`). `in_turn` keeps a
number of runs going, and passes signals on. A stopped run has a checkpoint, from which `start` resumes it.
"""

import fcntl
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from common.cli import training_module
from common.errors import InputError, RunStopped
from common.hardware import cores
from common.run.fingerprint import common_hash

#: arguments that the command sets for each run
OWN = ("--seed", "--output_dir", "--overwrite", "--resume_from_checkpoint")
#: prefixes of the name of a score; the first that exists is shown
PREFIXES = ("test_", "after_test_", "eval_", "after_validation_", "")
#: phases of a run that train; the first stage, such as contrastive training on pairs, comes before the head
TRAINING = ("first stage", "train")
#: what a process loads that runs are forked from: with their libraries, most of what a recipe imports
LOADED = ("common.models.pooling", "common.run", "common.training.probe", "common.tuning", "matplotlib.pyplot")
#: parses the arguments of all runs, because a mistake in the last run must stop the first; prints their fingerprints
CHECK = """
import importlib, json, sys
from common.cli import command_line, parse
from common.run.fingerprint import fingerprint
arguments = importlib.import_module(sys.argv[1]).ARGUMENTS
found = lambda: [fingerprint(parse(arguments, words)) for words in json.load(sys.stdin)]
command_line(lambda: print(json.dumps(found()), flush=True))
"""


def check_no_token(words: list[str]) -> None:
    """Raise `InputError` for an access token, which the results of the runs would contain."""
    if any(word.split("=")[0].replace("-", "_") == "__hub_token" for word in words):
        raise InputError("--hub_token: would be written into the results; leave it out, and run: hf auth login")


def check_arguments(recipe: str, all_words: list[list[str]]) -> list[dict[str, Any]]:
    """Return the fingerprint of each run by its arguments. Raises `InputError` if the recipe rejects any of them."""
    for words in all_words:
        check_no_token(words)
    done = subprocess.run(
        [sys.executable, "-c", CHECK, training_module(recipe)],
        input=json.dumps(all_words),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise InputError(done.stderr.strip().removeprefix("error: ") or done.stdout.strip())
    return json.loads(done.stdout.splitlines()[-1])


def check_seeds(seeds: list[str]) -> None:
    """Raise `InputError` if a seed is no integer or is repeated: runs of one seed are equal and have no spread."""
    for seed in seeds:
        if not seed.isdecimal():
            raise InputError(f"--seeds {seed}: must be an integer of at least 0")
    repeated = [number for number, count in Counter(map(int, seeds)).items() if count > 1]
    if repeated:
        raise InputError(f"--seeds: {repeated[0]} is repeated, and its runs would be equal; name each seed once")


def check_at_once(at_once: int, gpus: int | None) -> None:
    """Raise `InputError` unless `at_once` runs can share the machine."""
    if at_once < 1 or (at_once > 1 and gpus):
        raise InputError("--at_once: must be at least 1, and 1 with --gpus, which gives all GPUs to each run")


def launcher(gpus: int | None) -> list[str]:
    """Return the command that runs a module in `gpus` processes, as the Makefile does; None: in one process."""
    if gpus is None:
        return [sys.executable, "-m"]
    several = ["--multi_gpu"] if gpus > 1 else []
    return [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(gpus), "-m"]


@cache
def _first_code() -> str | None:
    """Return the hash of the code of `common` at the first call."""
    return common_hash()


class Forked:
    """A run in a process that is forked from one with the libraries loaded, which saves their time for each run.

    It has the methods and attributes of `subprocess.Popen` that are used here.
    """

    def __init__(self, module: str, words: list[str], log: Path, environment: dict[str, str]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["common.tools.own_session", *LOADED])
        before = os.environ.copy()
        os.environ |= environment  # libgomp reads its variables when it is loaded
        try:
            self._process = context.Process(target=_be_run, args=(module, words, log, environment, os.getcwd()))
            self._process.start()
        finally:
            os.environ.clear()
            os.environ |= before
        assert self._process.pid is not None
        self.pid = self._process.pid
        with suppress(ProcessLookupError):  # it has ended already
            while self.poll() is None and os.getpgid(self.pid) != self.pid:  # signals go to the process group
                time.sleep(0.01)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


def _be_run(module: str, words: list[str], log: Path, environment: dict[str, str], folder: str) -> None:
    """Do what `python -m MODULE WORDS >>LOG 2>&1` does in a folder."""
    os.setsid()
    os.chdir(folder)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ |= environment
    sys.argv[1:] = words
    sys.path.insert(0, folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "recipes"]:
        del sys.modules[name]  # may be those of another folder
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@dataclass
class Child:
    """A running process that trains one run.

    Attributes:
        process: the process.
        folder: output folder of the run.
        log: file of its standard output and standard error.
        resumed: whether the run resumes from a checkpoint.
        before: bytes of the log that earlier processes wrote.
    """

    process: subprocess.Popen | Forked
    folder: Path
    log: Path
    resumed: bool
    before: int = 0

    def outcome(self) -> dict[str, Any]:
        """Return the measurements of an ended run, or `error`."""
        if self.process.returncode == 0:
            unknown = {"train_seconds": None} if self.resumed else {}  # only the seconds since the resume are known
            return measured(self.folder) | unknown
        lines = self.log.read_bytes()[self.before :].decode("utf-8", "replace").splitlines()
        messages = [line for line in lines if line.startswith(("error: ", "stopped: "))] or lines
        messages = messages or [f"exit status {self.process.returncode}"]
        return {"error": messages[-1].removeprefix("error: ").removeprefix("stopped: ")}


def share(at_once: int, slot: int) -> dict[str, str]:
    """Return the environment variables that limit the run in `slot` of `at_once` to its share of cores and GPUs.

    A number of threads that the user chose stays.
    """
    if at_once == 1:
        return {}
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    gpu = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores() // at_once))}
    return threads | gpu


def start(recipe: str, words: list[str], folder: Path, gpus: int | None, at_once: int, slot: int) -> Child:
    """Start a run, or resume a stopped one, in a new process on its share of the machine.

    Args:
        recipe: name of a recipe, as of its target of make.
        words: its arguments, without those in `OWN` except `--seed`.
        folder: its output folder; the log is beside it.
        gpus: see `launcher`.
        at_once: number of runs that share the machine.
        slot: number of this run among them.
    """
    resumed = any(folder.glob("checkpoint-*"))
    again = ["--resume_from_checkpoint", "true"] if resumed else ["--overwrite"]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    before = log.stat().st_size if log.exists() else 0
    module, words = training_module(recipe), [*words, "--output_dir", str(folder), *again]
    plain = gpus is None and sys.platform == "linux" and not torch.cuda.is_available()
    if plain and common_hash() == _first_code():  # else the loaded code is not that of the files
        return Child(Forked(module, words, log, share(at_once, slot)), folder, log, resumed, before)
    command = [*launcher(gpus), module, *words]
    environment = os.environ | share(at_once, slot)
    with open(log, "a", encoding="utf-8") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    return Child(child, folder, log, resumed, before)


#: key of a run, and the function that starts it in the slot that it gets
Job = tuple[Any, Callable[[int], Child]]


def in_turn(jobs: Iterator[Job | None], at_once: int) -> Iterator[tuple[Any, Child]]:
    """Start the jobs, `at_once` at a time, and yield each run that ends.

    Ctrl-C and SIGTERM are passed on: the running processes save a checkpoint, and `RunStopped` is raised.

    Args:
        jobs: yields the next job; None while the next job must wait for a running one.
        at_once: number of slots.
    """
    stopped: list[int] = []
    running: dict[Any, Child] = {}
    slots: dict[Any, int] = {}
    left = True

    def hand_on(number: int, frame: Any = None) -> None:
        stopped.append(number)
        for child in running.values():
            with suppress(ProcessLookupError):
                os.killpg(child.process.pid, number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while running or (left and not stopped):
            while left and len(running) < at_once and not stopped:
                job = next(jobs, ())
                if not job:
                    left = job is None
                    break
                key, begin = job
                slots[key] = next(slot for slot in range(at_once) if slot not in slots.values())
                running[key] = begin(slots[key])
            for key in [key for key, child in running.items() if child.process.poll() is not None]:
                child = running.pop(key)
                del slots[key]
                if child.process.returncode == 0 or not stopped:
                    yield key, child
            time.sleep(0.05)
    finally:
        if running:  # the caller has failed
            hand_on(signal.SIGTERM)
            for child in running.values():
                child.process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        raise RunStopped(
            f"{signal.Signals(stopped[0]).name}; run the same command again to resume", code=128 + stopped[0]
        )


def measured(folder: Path) -> dict[str, Any]:
    """Read the record of a finished run: scores, seconds and memory of the training, and sizes."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    trained = json.loads((folder / "train_results.json").read_text(encoding="utf-8"))
    phases = record["phases"]
    parts = {"domains": ("base", "adapter")}.get(record["arguments"].get("tuning"), ("adapter",))
    folders = [folder / part for part in parts] if (folder / "adapter").is_dir() else [folder]
    saved = sum(path.stat().st_size for part in folders for path in part.glob("*.safetensors"))
    name = (record["arguments"]["metric_for_best_model"] or "loss").removeprefix("eval_")
    return {
        "metric": name,
        "greater_is_better": record["arguments"]["greater_is_better"],
        "scores": {k: v for k, v in record["scores"].items() if isinstance(v, (int, float))},
        "trainable_parameters": trained["trainable_parameters"],
        "train_seconds": sum(phases[name]["seconds"] for name in TRAINING if name in phases),
        "peak_memory_mib": phases["train"].get("peak_gpu_memory_mib", phases["train"]["peak_memory_mib"]),
        "saved_bytes": saved,
        **{key: record[key] for key in ("code", "rows", "hardware", "finished", "git_commit")},
    }


def score_of(record: dict[str, Any], name: str | None = None) -> tuple[str, float]:
    """Return name and value of score `name` (None: of the score that picks checkpoints), on test rows if possible."""
    scores, name = record["scores"], name or record["metric"]
    for prefix in PREFIXES:
        if prefix + name in scores:
            return prefix + name, scores[prefix + name]
    raise InputError(f"--score {name}: the recipe has no such score; choose one of {', '.join(sorted(scores))}")


def greater_is_better(record: dict[str, Any], score: str) -> bool | None:
    """Return whether greater values of `score` are better; None unless it is the score that picks checkpoints."""
    known = score in [prefix + record["metric"] for prefix in PREFIXES]
    return bool(record["greater_is_better"]) if known else None


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the results in a file of JSON Lines; none if there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


@contextmanager
def changed_results(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the results in a file, and write them back; another command with the same folder waits meanwhile."""
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        results = read_results(path)
        yield results
        keep(path, "".join(json.dumps(one) + "\n" for one in results))


def keep(path: Path, text: str) -> None:
    """Write a file at once or not at all: a kill leaves the old file or the new one."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def remove_weights(folder: Path) -> None:
    """Remove the weights and the checkpoints of a run; its record, scores and predictions stay."""
    for path in [*folder.rglob("*.safetensors"), *folder.glob("checkpoint-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
