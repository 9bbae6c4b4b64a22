"""Kill, stop, starve and resume runs, for `test_faults.py` and `make soak`.

A run is a forked child that calls the recipe's `main`. A server process imports the recipe first, which makes a run
take a second. The run is unmodified, except for a callback that logs each finished step and can kill the process.
"""

import atexit
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, TrainerCallback, trainer
from transformers.trainer_pt_utils import safe_globals

from common.cli import command_line
from common.training import checkpoints
from recipes.ner import train
from tests.conftest import SAMPLE, build_tokenizer, read_jsonl, write_jsonl

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults"])


# Files


def make_files(folder: Path) -> dict[str, str]:
    """Return a BERT of two layers with dropout, its tokenizer, and 48/20/20 sentences of the sample."""
    tokenizer = build_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    sizes = {"train": 48, "validation": 20, "test": 20}
    files = {
        f"{split}_file": write_jsonl(folder / f"{split}.jsonl", read_jsonl(SAMPLE / f"{split}.jsonl")[:size])
        for split, size in sizes.items()
    }
    return files | {"model_name_or_path": str(folder / "model")}


def make_texts(files: dict[str, str], folder: Path) -> dict[str, str]:
    """Return the sentences of `files` as plain text, for pretraining the same model."""
    texts = {"model_name_or_path": files["model_name_or_path"]}
    for name in ("train_file", "validation_file"):
        lines = [" ".join(row["tokens"]) for row in read_jsonl(Path(files[name]))]
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
        texts[name] = str(folder / f"{name}.txt")
    return texts


def words(files: dict[str, str], output_dir: Path, **settings: object) -> list[str]:
    """Return command-line words of an NER run: 3 epochs of 6 steps of 8 rows, a checkpoint every second step."""
    arguments = files | {
        "output_dir": str(output_dir),
        **{"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "precision": "fp32"},
        **{"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "disable_tqdm": True},
        **{"max_seq_length": 128, "save_total_limit": 3, "save_min_seconds": 0, "use_cpu": True},
    }
    return [word for name, value in (arguments | settings).items() for word in (f"--{name}", str(value))]


# Runs


class _AtStep(TrainerCallback):
    """Log each finished step; send the signal `by` to this process after step `kill_at`, before that step is saved."""

    def __init__(self, log: str, kill_at: int | None, by: int):
        self.log, self.kill_at, self.by = log, kill_at, by

    def on_step_end(self, args, state, control, **kwargs):
        with open(self.log, "a") as file:
            file.write(f"{state.global_step}\n")
        if state.global_step == self.kill_at:
            os.kill(os.getpid(), self.by)


def _child(main, arguments: list[str], log: str, kill: tuple[int | None, int], memory: int | None, environment: dict):
    # workers as in a real run; workers of this process's server would outlive a killed run
    multiprocessing.set_start_method("fork", force=True)
    if environment.pop("GROUP", None):
        os.setpgid(0, 0)
    os.environ |= environment
    descriptor = os.open(f"{log}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if memory:
        limit_memory(memory)
    trainer.DEFAULT_CALLBACKS.append(_AtStep(log, *kill))
    sys.argv = ["recipes.ner.train", *arguments]
    command_line(lambda: main(arguments))


def limit_memory(more: int) -> None:
    """Limit the address space of this process to its current size plus `more` bytes."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))


class Job:
    """A run in `processes` processes. `output` is the printed text, `steps` the finished steps."""

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        kill_at: int | None = None,
        by: int = signal.SIGKILL,
        processes: int = 1,
        memory: int | None = None,
        group: bool = False,
        main=train.main,
    ):
        self.log = log
        for path in (log, log.with_name(f"{log.name}.txt")):
            path.unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.processes = []
        for rank in range(processes):
            environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            if group:
                environment["GROUP"] = "its own"
            if processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            path = str(log) if rank == 0 else f"{log}.{rank}"
            process = CONTEXT.Process(target=_child, args=(main, arguments, path, (kill_at, by), memory, environment))
            process.start()
            atexit.register(process.kill)  # otherwise a hanging process delays the end of the tests
            self.processes.append(process)

    @property
    def steps(self) -> list[int]:
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []

    @property
    def output(self) -> str:
        logs = [self.log.with_name(f"{self.log.name}.txt"), *self.log.parent.glob(f"{self.log.name}.?.txt")]
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())

    def reaches(self, step: int, seconds: float = 60) -> "Job":
        """Wait until `step` is finished."""
        end = time.monotonic() + seconds
        while not (self.steps and self.steps[-1] >= step):
            assert time.monotonic() < end, f"did not reach step {step}:\n{self.output}"
            assert self.processes[0].is_alive(), f"ended before step {step}:\n{self.output}"
            time.sleep(0.005)
        return self

    def kill(self, number: int, rank: int = 0) -> "Job":
        os.kill(self.processes[rank].pid, number)
        return self

    def ends(self, seconds: float = 120) -> list[int]:
        """Return the exit statuses of all ranks; a killed rank has minus the signal."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def succeeds(self) -> None:
        codes = self.ends()
        assert not any(codes), f"exit status {codes}:\n{self.output}"


# Results of a run


def last_checkpoint(output_dir: Path) -> Path:
    return max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def tensors_of(state: object) -> Iterable[torch.Tensor]:
    """Yield all tensors and numbers of a nested state, in order."""
    if isinstance(state, torch.Tensor):
        yield state.double() if state.dtype != torch.uint8 else state
    elif isinstance(state, (int, float)):
        yield torch.tensor(float(state), dtype=torch.float64)
    elif isinstance(state, np.ndarray):
        yield torch.from_numpy(state.astype(np.int64))
    elif isinstance(state, dict):
        for key in sorted(state, key=str):
            yield from tensors_of(state[key])
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors_of(value)


def difference(a: Path, b: Path) -> float:
    """Return the largest absolute difference of two finished runs: weights, optimizer, schedule and random states."""
    model = "base/model.safetensors" if (a / "base").is_dir() else "model.safetensors"
    pairs = [(load_file(path / model) for path in (a, b))]
    last = last_checkpoint(a)
    for name in sorted(path.name for path in last.glob("*.safetensors") if path.name != checkpoints.BEST):
        pairs.append([load_file(last_checkpoint(path) / name) for path in (a, b)])
    for name in ("optimizer.pt", "scheduler.pt", *(path.name for path in last.glob("rng_state*.pth"))):
        with safe_globals():
            pairs.append(tuple(torch.load(last_checkpoint(path) / name, weights_only=True) for path in (a, b)))
    worst = 0.0
    for one, other in pairs:
        for x, y in zip(tensors_of(one), tensors_of(other), strict=True):
            worst = max(worst, (x.double() - y.double()).abs().max().item() if x.numel() else 0.0)
    states = [json.loads((last_checkpoint(path) / "trainer_state.json").read_text()) for path in (a, b)]
    for state in states:
        state["best_model_checkpoint"] = state["best_model_checkpoint"] and Path(state["best_model_checkpoint"]).name
    for key in ("best_metric", "best_global_step", "best_model_checkpoint", "global_step", "stateful_callbacks"):
        if states[0][key] != states[1][key]:
            return float("inf")
    return worst
