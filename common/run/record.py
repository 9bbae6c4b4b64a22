"""Make, read and write the record of a run, `run.json`."""

import hashlib
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from common.args import DataArguments, TrainingArguments
from common.hardware import hardware
from common.run.contents import RECORD
from common.run.fingerprint import COMMON, code_hash, files_below, model_hash, path_hash, plain, precision, versions


def new_record(
    args: TrainingArguments, data_args: DataArguments, more: tuple[Any, ...], rows: DatasetDict
) -> dict[str, Any]:
    """Return the record of a run that begins.

    Args:
        args: the arguments of the training.
        data_args: the arguments of the data; the file of their class is in the folder of the recipe.
        more: further dataclasses of arguments.
        rows: the data of the run.
    """
    arguments = {k: v for part in (args, *more, data_args) for k, v in plain(part).items()}
    return {
        "started": now(),
        "finished": None,
        "command": _command(),
        "arguments": arguments,
        "data": {
            n: {"file": f, "sha256": path_hash(f), "bytes": sum(p.stat().st_size for p in files_below(f))}
            for n, f in data_args.files().items()
        },
        "rows": {split: _sha256_of_rows(data) for split, data in rows.items()},
        "code": code_hash(data_args),
        "base_model": model_hash(arguments["model_name_or_path"]),
        "versions": versions(),
        "git_commit": _git_commit(),
        "hardware": hardware() | {"processes": args.world_size, "precision": precision(args)},
        "phases": {},
        "files": [],
    }


def read_record(folder: Path, like: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of the run that wrote a folder; None without a record that has the entries of `like`."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.keys() >= like.keys() else None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record, so that a kill leaves the old one or the new one."""
    new = folder / f"{RECORD}.new"
    with open(new, "w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / RECORD)


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def step_size(record: dict[str, Any]) -> str:
    """Return the rows of an optimizer step, or its tokens under `--max_tokens_per_batch`, with the unit."""
    arguments, processes = record["arguments"], record["hardware"]["processes"]
    budget = arguments.get("max_tokens_per_batch")
    size = (budget or arguments["per_device_train_batch_size"]) * arguments["gradient_accumulation_steps"] * processes
    return f"{size} {'tokens' if budget else 'rows'}"


def _command() -> list[str]:
    """Return program and arguments as for `python -m`, without the hub token."""
    spec = sys.modules["__main__"].__spec__
    words = re.sub(r"(--hub[_-]token[\0=])[^\0]*", r"\1HIDDEN", "\0".join(sys.argv[1:])).split("\0")
    return [spec.name if spec else sys.argv[0], *filter(None, words)]


def _sha256_of_rows(data: Dataset) -> str:
    """Return a hash of the rows of a data set, independent of file names."""
    digest = hashlib.sha256()
    for row in data:
        digest.update(json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _git_commit() -> str | None:
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=COMMON, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=COMMON, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + (" with uncommitted changes" if changed.stdout.strip() else "")
