"""The output folder of a run: held by one run at a time, and the record `run.json` of what was run."""

import dataclasses
import fcntl
import hashlib
import inspect
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict

from common.args import DataArguments, TrainingArguments
from common.errors import InputError, in_main_process, is_main_process, tell, warn
from common.hardware import hardware
from common.training import checkpoints
from common.training.checkpoints import sha256

COMMON = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "peft", "tokenizers", "seqeval")
#: what a run writes, and so what `--overwrite` takes away
WRITTEN = (
    checkpoints.STAGING, "*_results.json", "predictions_*.jsonl", "run.json", "README.md", "config.json",
    "trainer_state.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.*", "merges.txt", "special_tokens_map.json", "adapter", "base", "runs", "fill_ins.jsonl",
    "completions.jsonl", "curve.png", "samples_*.html", "hardest_test.jsonl", "pictures", "generation_config.json",
    "*.spm",
    "sentencepiece.*", "spiece.model",
)  # fmt: skip
#: arguments that do not change what is computed
INCIDENTAL = {
    "output_dir", "overwrite", "resume_from_checkpoint", "report_to", "disable_tqdm", "run_name", "logging_dir",
    "accept_unverified_checkpoint", "ddp_timeout", "dataloader_num_workers", "save_min_seconds",
}  # fmt: skip
#: arguments that cut a step into parts, and do not change it
SPLITS_A_STEP = {
    "per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size", "max_tokens_per_batch",
}  # fmt: skip
#: arguments without which a checkpoint does not fit
FIXED = {
    "seed", "data_seed", "model_name_or_path", "lora_r", "lora_target_modules", "tuning", "optim", "max_seq_length",
    "doc_stride", "pack", "pack_as", "streaming", "shuffle_buffer", "stream_shares", "batch_ramp_start",
    "batch_ramp_steps", "objective", "loss_on", "tokenizer_train", "vocab_size", "model_size", "config_overrides",
    "from_scratch", "source_lang", "target_lang", "pairs", "sampling_temperature", "warm_start", "max_source_length",
    "max_target_length", "method", "adapter_reduction", "adapter_placement", "num_virtual_tokens",
    "layerwise_lr_decay", "peft_config", "quantize", "ema_decay", "swa_start",
}  # fmt: skip


class Run:
    """A run that holds its output folder until the process ends, and keeps its record in `run.json`.

    `rows` is the data of the run, of which a hash is kept. Making a run only looks at the folder; `start` takes away
    what an earlier run left there. Raises `InputError` when the folder cannot be written, another live process holds
    it, it holds files that no run wrote, or it holds a run that was stopped or is a different one (other arguments,
    data or code) and neither `--overwrite` nor `--resume_from_checkpoint` is given. On several processes only the main
    one touches the folder, and all go on from the checkpoint that it chose.
    """

    def __init__(self, args: TrainingArguments, data_args: DataArguments, *more: Any, rows: DatasetDict):
        self.folder = Path(args.output_dir)
        arguments = {k: v for a in (data_args, *more) for k, v in dataclasses.asdict(a).items()} | _plain(args)
        self.record: dict[str, Any] = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "finished": None,
            "command": _command(),
            "arguments": arguments,
            "data": {
                n: {"file": f, "sha256": sha256(f), "bytes": Path(f).stat().st_size}
                for n, f in data_args.files().items()
            },
            "rows": {split: _sha256_of_rows(data) for split, data in rows.items()},
            "code": _sha256_of([*COMMON.rglob("*.py"), *_folder_of(data_args).glob("*.py")]),
            "base_model": _sha256_of(_local_weights(arguments["model_name_or_path"])),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "git_commit": _git_commit(),
            "hardware": hardware()
            | {"processes": args.world_size, "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"},
            "phases": {},
        }
        self._clears = False
        # the main process looks, and all go on from the same checkpoint
        args.resume_from_checkpoint = in_main_process(lambda: self._open(args))

    def _open(self, args: TrainingArguments) -> str | None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
        except OSError as error:
            raise InputError(f"--output_dir {self.folder}: cannot be written: {error.strerror}") from None
        checkpoint = self._checkpoint(args)
        self._check(args, checkpoint)
        if checkpoint:
            checkpoints.tell_of(checkpoint)
        return checkpoint and str(checkpoint)

    def _checkpoint(self, args: TrainingArguments) -> Path | None:
        if not args.resume_from_checkpoint:
            return None
        if args.resume_from_checkpoint is True:
            return checkpoints.newest_whole(self.folder, args.accept_unverified_checkpoint)
        return checkpoints.given(args.resume_from_checkpoint, args.accept_unverified_checkpoint)

    def _check(self, args: TrainingArguments, checkpoint: Path | None) -> None:
        if all(path.name in (".lock", checkpoints.STAGING) for path in self.folder.iterdir()):
            return
        where = f"--output_dir {self.folder}"
        before = self._before()
        inside = checkpoint is not None and checkpoint.resolve().parent == self.folder.resolve()
        if before is None and inside and args.accept_unverified_checkpoint:
            warn(f"{where}: no record of its run (run.json), so nothing tells whether data and arguments are the same")
            return
        if before is None:
            raise InputError(f"{where}: holds files that no run of a recipe wrote; give another folder")
        if inside:
            if before["rows"] != self.record["rows"]:
                splits = [name for name, found in self.record["rows"].items() if before["rows"].get(name) != found]
                raise InputError(
                    f"{where}: its run was on other data ({', '.join(splits) or 'with other splits'}), so it cannot "
                    "go on; give another folder"
                )
            if before["base_model"] != self.record["base_model"]:
                raise InputError(
                    f"{where}: --model_name_or_path holds other files than when its run began, so it cannot go on"
                )
            self._check_changes(before)
            last = checkpoints.step_of(checkpoint)
            newer = [p.name for p in checkpoints.in_order(self.folder) if checkpoints.step_of(p) > last]
            if newer and args.resume_from_checkpoint is not True:  # or each was passed over, and why was said
                warn(
                    f"{', '.join(newer)}: newer, and what a later --resume_from_checkpoint true would take; remove them"
                )
            return
        if not args.overwrite:
            remedy = "go on with it by --resume_from_checkpoint true, replace it by --overwrite, or give another folder"
            if _identity(before) != _identity(json.loads(json.dumps(self.record))):
                raise InputError(f"{where}: holds a different run; {remedy}")
            if before["finished"] is None and checkpoints.in_order(self.folder):
                raise InputError(f"{where}: holds a run that was stopped; {remedy}")
        model = self.record["arguments"]["model_name_or_path"]  # None where it begins from nothing
        if model and Path(model).is_dir() and Path(model).resolve().is_relative_to(self.folder.resolve()):
            raise InputError(
                f"{where}: is where --model_name_or_path is read from, and would be replaced; give another"
            )
        same = "holds this very run, and is emptied to run it again"
        tell(f"{self.folder}: " + ("replaces the run that is there" if args.overwrite else same))
        self._clears = True

    def start(self) -> None:
        """Take the folder over, once nothing but the training itself can go wrong any more."""
        if self._clears:
            for pattern in WRITTEN:
                for path in self.folder.glob(pattern):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path in checkpoints.in_order(self.folder):
                shutil.rmtree(path)
        self.save()

    def _check_changes(self, before: dict[str, Any]) -> None:
        """Refuse to go on with arguments under which a checkpoint means something else; name other changes."""
        then, now = before["arguments"], json.loads(json.dumps(self.record["arguments"]))
        sizes = [_step_size(record) for record in (before, self.record)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"--resume_from_checkpoint: the run took {sizes[0]} a step and would now take {sizes[1]}, and so meet "
                "some rows twice and others not at all; give a batch, accumulation and processes of that product"
            )
        changed = [k for k in now if k not in INCIDENTAL | SPLITS_A_STEP and k in then and now[k] != then[k]]
        for name in changed:
            if name in FIXED:
                raise InputError(f"--{name}: the run has {then[name]}, so it cannot go on with {now[name]}")
        if changed:
            changes = ", ".join(f"--{name} {then[name]} to {now[name]}" for name in changed)
            warn(f"goes on with other arguments, so not as the run would have: {changes}")

    def _lock(self) -> None:
        """Hold the folder against other runs. A lock whose process is dead is stale and is taken over."""
        lock = self.folder / ".lock"
        self._lock_file = open(lock, "a+")  # noqa: SIM115  (held open, so that the lock lasts as long as the process)
        try:
            # of POSIX, not flock: a data loader's worker that outlives a killed run would hold that one on
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._lock_file.seek(0)
            raise InputError(
                f"--output_dir {self.folder}: in use by {self._lock_file.read().strip()}; wait for it, or give "
                "another folder"
            ) from None
        self._lock_file.truncate(0)
        self._lock_file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock_file.flush()

    def _before(self) -> dict[str, Any] | None:
        """The record of the run that left its files here; None where there is none."""
        try:
            record = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and record.keys() >= self.record.keys() else None

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
            with open(new, "w", encoding="utf-8") as file:
                file.write(json.dumps(self.record, indent=2, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.folder / "run.json")


def _step_size(record: dict[str, Any]) -> str:
    """What an optimizer step takes: rows, or sub-tokens where batches are filled up to a budget of these."""
    arguments, processes = record["arguments"], record["hardware"]["processes"]
    budget = arguments.get("max_tokens_per_batch")
    size = (budget or arguments["per_device_train_batch_size"]) * arguments["gradient_accumulation_steps"] * processes
    return f"{size} {'sub-tokens' if budget else 'rows'}"


def _command() -> list[str]:
    """Program and arguments as `python -m` takes them; the hub token stays out of files that are shared."""
    spec = sys.modules["__main__"].__spec__
    words = re.sub(r"(--hub[_-]token[\0=])[^\0]*", r"\1HIDDEN", "\0".join(sys.argv[1:])).split("\0")
    return [spec.name if spec else sys.argv[0], *filter(None, words)]


def _plain(args: TrainingArguments) -> dict[str, Any]:
    # to_dict masks the hub token; what is neither text nor number (devices, paths) becomes text
    return json.loads(json.dumps(args.to_dict(), default=str))


def _identity(record: dict[str, Any]) -> Any:
    """What decides the results of a run."""
    arguments = {k: v for k, v in record["arguments"].items() if k not in INCIDENTAL | set(record["data"])}
    return arguments, *(record[key] for key in ("rows", "code", "base_model", "versions", "hardware"))


def _sha256_of_rows(data: Dataset) -> str:
    """A hash of what the rows of a data set hold, whichever file or name they came from."""
    found = hashlib.sha256()
    for row in data:
        found.update(json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def _sha256_of(files: Iterable[Path]) -> str | None:
    """One hash over several files; None for none."""
    hashes = [sha256(file) for file in sorted(files)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if hashes else None


def _folder_of(arguments: Any) -> Path:
    """The folder of the recipe that defines the class of `arguments`."""
    return Path(inspect.getfile(type(arguments))).parent


def _local_weights(model: str | None) -> list[Path]:
    if model is None or not Path(model).is_dir():
        return []
    return [*Path(model).glob("*.safetensors"), *Path(model).glob("*.json")]


def _git_commit() -> str | None:
    here = COMMON
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + (" with uncommitted changes" if changed.stdout.strip() else "")


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
