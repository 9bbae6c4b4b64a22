"""Hash the code, files and arguments of a run, to tell whether two runs would have the same result."""

import dataclasses
import hashlib
import inspect
import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.args import DataArguments, TrainingArguments
from common.hardware import hardware
from common.training.checkpoints import sha256

COMMON = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "peft", "tokenizers", "seqeval")
#: arguments that change no result, and the seed, which the tools compare themselves
NOT_COMPARED = ("output_dir", "overwrite", "resume_from_checkpoint", "seed")
#: entry of a fingerprint -> its name in a message
NAMES = {
    "code": "code",
    "files": "data files",
    "arguments": "arguments",
    "base_model": "model files",
    "versions": "packages",
    "hardware": "machine",
}


def fingerprint(parsed: Sequence[Any]) -> dict[str, Any]:
    """Return a JSON value for each entry of `NAMES`.

    Args:
        parsed: the arguments of a run, one instance of each dataclass of its recipe.
    """
    data_args = next(part for part in parsed if isinstance(part, DataArguments))
    args = next(part for part in parsed if isinstance(part, TrainingArguments))
    arguments = {k: v for part in reversed(parsed) for k, v in plain(part).items() if k not in NOT_COMPARED}
    named = {k: v for k, v in arguments.items() if isinstance(v, str) and os.path.exists(v)} | data_args.files()
    return {
        "code": code_hash(data_args),
        "files": {name: path_hash(path) for name, path in named.items()},
        "arguments": hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest(),
        "base_model": model_hash(arguments["model_name_or_path"]),
        "versions": versions(),
        "hardware": hardware() | {"precision": precision(args)},
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the names of the entries that differ; an entry that `before` lacks differs too."""
    return [name for key, name in NAMES.items() if key in now and before.get(key) != now[key]]


def plain(arguments: Any) -> dict[str, Any]:
    """Return a dataclass of arguments as JSON values."""
    # to_dict masks the hub token; devices and paths become text
    values = arguments.to_dict() if isinstance(arguments, TrainingArguments) else dataclasses.asdict(arguments)
    return json.loads(json.dumps(values, default=str))


def precision(args: TrainingArguments) -> str:
    """Return the precision of the training: bf16, fp16 or fp32."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute results."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def recipe_folder(arguments: Any) -> Path:
    """Return the folder of the recipe that defines the class of `arguments`."""
    return Path(inspect.getfile(type(arguments))).parent


def code_hash(arguments: Any) -> str | None:
    """Return one hash over the code of `common` and of the recipe that defines the class of `arguments`."""
    return _hash_of([*COMMON.rglob("*.py"), *recipe_folder(arguments).rglob("*.py")])


def common_hash() -> str | None:
    """Return one hash over the code of `common`."""
    return _hash_of(COMMON.rglob("*.py"))


def model_hash(model: str | None) -> str | None:
    """Return one hash over weights and configuration of a model in a local folder; None for any other model."""
    if model is None or not Path(model).is_dir():
        return None
    return _hash_of([*Path(model).glob("*.safetensors"), *Path(model).glob("*.json")])


def files_below(path: str | Path) -> list[Path]:
    """Return a file, or the files in and below a folder."""
    path = Path(path)
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def path_hash(path: str | Path) -> str:
    """Return a hash of a file, or of the files in and below a folder."""
    return sha256(path) if Path(path).is_file() else _hash_of(files_below(path)) or ""


def _hash_of(files: Iterable[Path]) -> str | None:
    """Return one hash over several files; None without files."""
    hashes = [sha256(file) for file in sorted(files)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if hashes else None
