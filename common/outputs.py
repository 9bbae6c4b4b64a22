"""The output folder of a run: held by one run at a time, and the record `run.json` of what was run."""

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers.trainer_utils import get_last_checkpoint

from common.args import DataArguments, TrainingArguments
from common.errors import InputError, is_main_process, tell

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "peft", "tokenizers", "seqeval")
#: what a run writes, and so what `--overwrite` takes away
WRITTEN = (
    "checkpoint-*", "*_results.json", "predictions_*.jsonl", "run.json", "README.md", "config.json",
    "trainer_state.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab.*", "merges.txt",
    "special_tokens_map.json", "adapter", "runs",
)  # fmt: skip
#: arguments that do not change what is computed
INCIDENTAL = {"output_dir", "overwrite", "resume_from_checkpoint", "report_to", "disable_tqdm", "run_name"}


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def fresh_file(path: str | Path, overwrite: bool) -> Iterator[TextIO]:
    """A file to write that appears under its name when it is whole. Refuses to replace one without `overwrite`."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already; give another name, or --overwrite")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w", encoding="utf-8") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


class Run:
    """A run that holds its output folder until the process ends, and keeps its record in `run.json`.

    Raises `InputError` when the folder cannot be written, another live process holds it, or it holds the results of a
    different run (other arguments or other data) and neither `--overwrite` nor `--resume_from_checkpoint` is given.
    On several processes only the main one touches the folder.
    """

    def __init__(self, args: TrainingArguments, data_args: DataArguments, *more: Any):
        self.folder = Path(args.output_dir)
        files = {n: getattr(data_args, n) for n in ("train_file", "validation_file", "test_file")}
        arguments = {k: v for a in (data_args, *more) for k, v in dataclasses.asdict(a).items()} | _plain(args)
        self.record: dict[str, Any] = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "finished": None,
            "command": [_module(), *sys.argv[1:]],
            "arguments": arguments,
            "data": {
                n: {"file": f, "sha256": sha256(f), "bytes": Path(f).stat().st_size} for n, f in files.items() if f
            },
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "git_commit": _git_commit(),
            "hardware": _hardware()
            | {"processes": args.world_size, "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"},
            "phases": {},
        }
        if is_main_process():
            self._claim(args)
            self.save()

    def _claim(self, args: TrainingArguments) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
        except OSError as error:
            raise InputError(f"--output_dir {self.folder}: cannot be written: {error.strerror}") from None
        if args.resume_from_checkpoint:
            self._check_checkpoint(args.resume_from_checkpoint)
            return
        there = [path for path in self.folder.iterdir() if path.name != ".lock"]
        if not there:
            return
        if not args.overwrite and not self._same_as_before():
            raise InputError(
                f"--output_dir {self.folder}: holds the results of a different run; give another --output_dir, go on "
                "with --resume_from_checkpoint true, or replace them with --overwrite"
            )
        tell(f"{self.folder}: " + ("replaces the run that is there" if args.overwrite else "runs the same run again"))
        for pattern in WRITTEN:
            for path in self.folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _check_checkpoint(self, asked: str | bool) -> None:
        checkpoint = get_last_checkpoint(self.folder) if asked is True else asked
        if checkpoint is None:
            raise InputError(
                f"--resume_from_checkpoint true: there is no checkpoint in {self.folder}; leave it out to start anew"
            )
        if not Path(checkpoint, "trainer_state.json").is_file():
            raise InputError(
                f"--resume_from_checkpoint {checkpoint}: not a checkpoint folder (no trainer_state.json in it)"
            )
        tell(f"goes on from {checkpoint}")

    def _lock(self) -> None:
        """Hold the folder against other runs. A lock whose process is dead is stale and is taken over."""
        lock = self.folder / ".lock"
        self._lock_file = open(lock, "a+")  # noqa: SIM115  (held open, so that the lock lasts as long as the process)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.seek(0)
            raise InputError(
                f"--output_dir {self.folder}: in use by {self._lock_file.read().strip()}; wait for it, or give "
                "another folder"
            ) from None
        self._lock_file.truncate(0)
        self._lock_file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock_file.flush()

    def _same_as_before(self) -> bool:
        try:
            before = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
            return _identity(before) == _identity(json.loads(json.dumps(self.record)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure seconds and peak memory of a part of the run and put them into the record."""
        _reset_peak_memory()
        start = time.perf_counter()
        yield
        self.record["phases"][name] = {"seconds": round(time.perf_counter() - start, 2)} | _peak_memory()
        self.save()

    def finish(self, **more: Any) -> None:
        """Mark the run as finished, with what else is to be on record."""
        self.record |= {"finished": datetime.now(UTC).isoformat(timespec="seconds")} | more
        self.save()

    def save(self) -> None:
        if is_main_process():
            new = self.folder / "run.json.new"
            new.write_text(json.dumps(self.record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            new.replace(self.folder / "run.json")


def _module() -> str:
    """The program as `python -m` takes it, such as recipes.ner.train."""
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def _plain(args: TrainingArguments) -> dict[str, Any]:
    # to_dict masks the hub token; what is neither text nor number (devices, paths) becomes text
    return json.loads(json.dumps(args.to_dict(), default=str))


def _identity(record: dict[str, Any]) -> Any:
    arguments = {k: v for k, v in record["arguments"].items() if k not in INCIDENTAL}
    return arguments, [file["sha256"] for file in record["data"].values()], record["versions"], record["hardware"]


def _git_commit() -> str | None:
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + (" with uncommitted changes" if changed.stdout.strip() else "")


def _hardware() -> dict[str, Any]:
    found: dict[str, Any] = {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "cores": os.cpu_count(),
    }
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def _reset_peak_memory() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here on
    except OSError:
        pass
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_memory() -> dict[str, int]:
    """Peak resident memory in MiB, and that of the GPU. Where the kernel cannot reset it: the peak of the process."""
    try:
        status = Path("/proc/self/status").read_text()
        kib = int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    found = {"peak_memory_mib": kib // 1024}
    if torch.cuda.is_available():
        found["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
    return found
