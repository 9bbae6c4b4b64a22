"""Write, verify, rotate and average checkpoints. A checkpoint is whole or absent.

A checkpoint is written into `.saving/` inside the output folder. `manifest.json` gets the size and SHA-256 of each
file. After a sync to the disk the folder is renamed to `checkpoint-<step>`: a process that dies at any moment leaves
no new checkpoint or a whole one. (The atomic rename of Pillai et al. 2014,
https://www.usenix.org/conference/osdi14/technical-sessions/presentation/pillai.)
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.errors import InputError, RunStopped, one_line, tell, warn

STAGING = ".saving"
MANIFEST = "manifest.json"
STATE = "trainer_state.json"
#: weights of the best step so far, if no checkpoint was saved at this step
BEST = "best.safetensors"
#: trained weights, if the weights of the checkpoint are their mean over steps
UNAVERAGED = "unaveraged.safetensors"
#: trained parameters that are separate from the weights of the model (LoRA, adapters, prompts)
TRAINED = "trained.safetensors"
#: file patterns of which one must exist for an exact resume
NEEDED = {
    "trainer state": [STATE],
    "weights": ["*.safetensors", "pytorch_model_fsdp*", "global_step*"],
    "optimizer": ["optimizer.pt", "optimizer*", "global_step*"],
    "scheduler": ["scheduler.pt", "global_step*"],
    "random states": ["rng_state*.pth"],
}
#: suffixes of pickles, which could run code when read
PICKLES = {".bin", ".pkl", ".pickle", ".joblib"}
#: pickles that are never read (arguments of the stock Trainer), or by `torch.load(weights_only=True)` (FSDP)
HARMLESS = {"training_args.bin", "pytorch_model_fsdp.bin", "optimizer.bin"}


def sha256(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint from its name."""
    return int(checkpoint.name.split("-")[1])


def saved_step(checkpoint: Path) -> int:
    """Return the step of a checkpoint from its trainer state; the folder may have any name."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["global_step"]


def in_order(output_dir: str | Path) -> list[Path]:
    """Return the checkpoint folders in `output_dir`, whole or not, last step first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    named = [path for path in folders if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(named, key=step_of, reverse=True)


# Saving


def publish(staged: Path, output_dir: Path, **about: Any) -> Path:
    """Write the manifest of the complete folder `staged`, and move the folder into `output_dir`.

    Args:
        staged: the folder; its name becomes the name of the checkpoint.
        output_dir: the output folder; a checkpoint of the same step there is replaced.
        **about: entries of the manifest.

    Returns:
        The checkpoint folder.
    """
    files = sorted((path for path in staged.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing overlaps with the sync to the disk
        synced = [pool.submit(_sync, path) for path in files]
        hashed = list(pool.map(sha256, files))
        for task in synced:
            task.result()
    sums = {
        str(path.relative_to(staged)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hashed, strict=True)
    }
    manifest = staged / MANIFEST
    content = about | {"files": sums}
    content["sha256"] = _sum_of(content)  # the hash of the manifest itself
    manifest.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for path in (manifest, *{file.parent for file in files}, staged):
        _sync(path)
    final = output_dir / staged.name
    if final.exists():  # resume skipped it as damaged, or this step is saved again
        final.rename(staged.with_name(staged.name + ".replaced"))
    staged.rename(final)
    _sync(output_dir)
    clear_staging(output_dir)
    return final


def clear_staging(output_dir: str | Path) -> None:
    """Remove the files of an unfinished save, and restore a checkpoint that it was replacing."""
    for replaced in Path(output_dir, STAGING).glob("checkpoint-*.replaced"):
        if not Path(output_dir, replaced.stem).exists():
            replaced.rename(Path(output_dir, replaced.stem))
    shutil.rmtree(Path(output_dir, STAGING), ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Remove the oldest checkpoints beyond `limit`, except those in `keep` (the last and the best).

    Folders without a manifest are neither counted nor removed.
    """
    kept = {path.resolve() for path in keep}
    others = [p for p in in_order(output_dir) if p.resolve() not in kept and (p / MANIFEST).is_file()]
    if limit:
        for path in others[max(0, limit - 1) :]:
            shutil.rmtree(path, ignore_errors=True)
            if path.exists():
                warn(f"{path}: cannot remove this old checkpoint; remove it by hand")


@contextmanager
def clear_disk_errors(folder: str | Path, needed: Callable[[], int]) -> Iterator[None]:
    """Raise `RunStopped` with the bytes needed and free if writing fails, and remove the partial checkpoint."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError
        free = shutil.disk_usage(folder).free
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not full and not isinstance(error, OSError) and free > needed():
            raise
        staged = Path(folder, STAGING)
        partial = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
        clear_staging(folder)
        existing = in_order(folder)
        remedy = "free disk space"
        if existing:
            remedy += f", then resume from {existing[0].name} with --resume_from_checkpoint true"
        raise RunStopped(
            f"{folder}: cannot be written ({one_line(error)[:200]}): about {needed():,} bytes are needed "
            f"and {free + partial:,} are free; {remedy}",
            code=RunStopped.NOT_SAVED,
        ) from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Resuming


def newest_whole(output_dir: str | Path, accept_unverified: bool = False) -> Path:
    """Return the newest whole checkpoint in `output_dir`; warn about each damaged one, with the reason.

    Raises `InputError` if no checkpoint is whole. Nothing is removed.
    """
    reasons = []
    for path in in_order(output_dir):
        reason = problem(path, accept_unverified)
        if reason is None:
            return path
        reasons.append(f"{path}: {reason}")
        warn(f"skipped {reasons[-1]}")
    if reasons:
        raise InputError(
            *reasons,
            f"{output_dir}: no whole checkpoint; nothing was removed; give --overwrite to train from the start",
        )
    raise InputError(f"--resume_from_checkpoint true: no checkpoint in {output_dir}; leave it out to start")


def given(path: str | Path, accept_unverified: bool = False) -> Path:
    """Return the checkpoint folder that the user named; raise `InputError` if it is not whole."""
    path = Path(path)
    if not (path / STATE).is_file() and not (path / MANIFEST).is_file():
        problem_here = f"not a checkpoint folder (no {STATE})" if path.is_dir() else "no such folder"
        raise InputError(f"--resume_from_checkpoint {path}: {problem_here}; name a folder checkpoint-STEP")
    reason = problem(path, accept_unverified)
    if reason:
        raise InputError(f"--resume_from_checkpoint {path}: {reason}")
    return path


def problem(folder: Path, accept_unverified: bool = False) -> str | None:
    """Return why a run cannot resume from the checkpoint in `folder`; None for a whole one."""
    if not (folder / MANIFEST).is_file() and (missing := _missing(folder)):
        return missing
    return damage(folder, accept_unverified) or _missing(folder)


def about(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint; empty without one."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def damage(folder: Path, accept_unverified: bool = False) -> str | None:
    """Return how the files in `folder` differ from its manifest; None if they do not."""
    try:
        return _damage(folder, accept_unverified)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


def _damage(folder: Path, accept_unverified: bool) -> str | None:
    for path in folder.rglob("*"):
        if path.suffix in PICKLES and path.name not in HARMLESS:
            return f"{path.name} is a pickle, which could run code; remove it (it is never read)"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop("sha256") != _sum_of(manifest):
            return f"{MANIFEST} is damaged"
        files = {name: (about["bytes"], about["sha256"]) for name, about in manifest["files"].items()}
    except FileNotFoundError:
        if accept_unverified:
            return None
        return f"has no {MANIFEST}, so it cannot be verified; if you trust it, give --accept_unverified_checkpoint true"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes and should have {size:,}"
    extra = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - files.keys() - {MANIFEST}
    if extra:
        return f"{', '.join(sorted(extra))}: not in its {MANIFEST}"
    with ThreadPoolExecutor(max_workers=2) as pool:
        for name, digest in zip(files, pool.map(lambda name: sha256(folder / name), files), strict=True):
            if digest != files[name][1]:
                return f"{name} is damaged (its sha256 differs from {MANIFEST})"
    return None


def _sum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _missing(folder: Path) -> str | None:
    for part, patterns in NEEDED.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return f"the {part} ({patterns[0]}) is missing, which an exact resume needs"
    return None


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the whole model in a checkpoint folder, by name; empty without `model*.safetensors`."""
    return {
        name: value for file in sorted(folder.glob("model*.safetensors")) for name, value in load_file(file).items()
    }


def average(folders: list[Path]) -> dict[str, Tensor]:
    """Return the mean of the weights in checkpoint folders, by name (Vaswani et al. 2017, arXiv:1706.03762, 6.1).

    Weights are summed in float32 and returned in their type. Integer tensors come from the first folder. Tied weights
    appear once, as in a checkpoint. Raises `InputError` if names or shapes differ, or a folder has no safetensors.
    """
    sums: dict[str, Tensor] = {}
    types: dict[str, torch.dtype] = {}
    for folder in folders:
        values = weights(folder)
        if not values:
            raise InputError(f"{folder}: has no weights as safetensors to average; leave --average_checkpoints out")
        shapes = {name: value.shape for name, value in values.items()}
        if sums and shapes != {name: value.shape for name, value in sums.items()}:
            raise InputError(f"{folder}: holds other weights than {folders[0]}; leave --average_checkpoints out")
        for name, value in values.items():
            if name not in sums:
                types[name] = value.dtype
                sums[name] = value.float() if value.is_floating_point() else value
            elif value.is_floating_point():
                sums[name] += value
    return {
        name: (value / len(folders)).to(types[name]) if types[name].is_floating_point else value
        for name, value in sums.items()
    }


def tell_of(folder: Path) -> None:
    """Print the checkpoint that the run resumes from; warn if it has no manifest."""
    if not (folder / MANIFEST).is_file():
        warn(f"{folder}: no {MANIFEST}; used unverified (--accept_unverified_checkpoint)")
    tell(f"resuming from {folder}")
