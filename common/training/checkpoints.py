"""Checkpoints that are whole or absent: written aside, hashed, synced, renamed; resume takes the newest that verifies.

A checkpoint is written into `.saving/` inside the output folder. Once `manifest.json` holds the size and SHA-256 of
each of its files, and all of it is on the disk, it is renamed to `checkpoint-<step>`: a process that dies at any moment
leaves either no new checkpoint or a whole one. (The atomic-rename pattern of Pillai et al. 2014,
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
#: weights of the best step so far, where they are neither this checkpoint's own nor another's
BEST = "best.safetensors"
#: weights that are trained, where the checkpoint's own are their mean over steps
UNAVERAGED = "unaveraged.safetensors"
#: weights of a model that is trained beside its own (LoRA, adapters, prompts), without those
TRAINED = "trained.safetensors"
#: without one of each group a resumed run would not be the same run
NEEDED = {
    "trainer state": [STATE],
    "weights": ["*.safetensors", "pytorch_model_fsdp*", "global_step*"],
    "optimizer": ["optimizer.pt", "optimizer*", "global_step*"],
    "scheduler": ["scheduler.pt", "global_step*"],
    "random states": ["rng_state*.pth"],
}
#: pickles that could run code when read
PICKLES = {".bin", ".pkl", ".pickle", ".joblib"}
#: of those, what is never read (the stock Trainer's arguments), or by `torch.load(weights_only=True)` (under FSDP)
HARMLESS = {"training_args.bin", "pytorch_model_fsdp.bin", "optimizer.bin"}


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved, from its name."""
    return int(checkpoint.name.split("-")[1])


def in_order(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders in `output_dir`, whole or not, the one of the last step first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


# Saving


def publish(staged: Path, output_dir: Path, **about: Any) -> Path:
    """Seal the finished folder `staged` with a manifest and move it into `output_dir`. Returns its place there.

    `about` goes into the manifest. What stood in its place, a checkpoint of the same step, is replaced.
    """
    files = sorted((path for path in staged.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(max_workers=4) as pool:  # reading what is being pushed to the disk costs no more time
        synced = [pool.submit(_sync, path) for path in files]
        hashed = list(pool.map(sha256, files))
        for task in synced:
            task.result()
    sums = {
        str(path.relative_to(staged)): {"bytes": path.stat().st_size, "sha256": found}
        for path, found in zip(files, hashed, strict=True)
    }
    manifest = staged / MANIFEST
    content = about | {"files": sums}
    content["sha256"] = _sum_of(content)  # of the manifest itself
    manifest.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for path in (manifest, *{file.parent for file in files}, staged):
        _sync(path)
    final = output_dir / staged.name
    if final.exists():  # only where resume passed it over, or this step is saved a second time
        final.rename(staged.with_name(staged.name + ".replaced"))
    staged.rename(final)
    _sync(output_dir)
    clear_staging(output_dir)
    return final


def clear_staging(output_dir: str | Path) -> None:
    """Take away what an unfinished save left; a checkpoint that it was about to replace is put back."""
    for replaced in Path(output_dir, STAGING).glob("checkpoint-*.replaced"):
        if not Path(output_dir, replaced.stem).exists():
            replaced.rename(Path(output_dir, replaced.stem))
    shutil.rmtree(Path(output_dir, STAGING), ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Remove the oldest checkpoints beyond `limit`, but none of `keep`: the one just published, and the best.

    Folders without a manifest are neither counted nor removed.
    """
    kept = {path.resolve() for path in keep}
    others = [p for p in in_order(output_dir) if p.resolve() not in kept and (p / MANIFEST).is_file()]
    if limit:
        for path in others[max(0, limit - 1) :]:
            shutil.rmtree(path, ignore_errors=True)
            if path.exists():
                warn(f"{path}: an old checkpoint that could not be removed")


@contextmanager
def clear_disk_errors(folder: str | Path, needed: Callable[[], int]) -> Iterator[None]:
    """Turn a failure to write into one sentence with the bytes needed and free; a half-written checkpoint goes away."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError is that of torch.save
        free = shutil.disk_usage(folder).free
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not full and not isinstance(error, OSError) and free > needed():
            raise
        staged = Path(folder, STAGING)
        partial = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
        clear_staging(folder)
        before = in_order(folder)
        remedy = "make room"
        if before:
            remedy += f", then go on from {before[0].name} by --resume_from_checkpoint true"
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
    """The newest checkpoint in `output_dir` that verifies; says which it passes over, and why.

    Raises `InputError` where there is none. Nothing is removed.
    """
    reasons = []
    for path in in_order(output_dir):
        reason = problem(path, accept_unverified)
        if reason is None:
            return path
        reasons.append(f"{path}: {reason}")
        warn(f"passed over {reasons[-1]}")
    if reasons:
        raise InputError(*reasons, f"{output_dir}: no whole checkpoint to go on from; nothing was removed")
    raise InputError(
        f"--resume_from_checkpoint true: there is no checkpoint in {output_dir}; leave it out to start anew"
    )


def given(path: str | Path, accept_unverified: bool = False) -> Path:
    """The checkpoint folder that the user named, verified; raises `InputError` where it is not whole."""
    path = Path(path)
    if not (path / STATE).is_file() and not (path / MANIFEST).is_file():
        raise InputError(f"--resume_from_checkpoint {path}: not a checkpoint folder (no {STATE} in it)")
    reason = problem(path, accept_unverified)
    if reason:
        raise InputError(f"--resume_from_checkpoint {path}: {reason}")
    return path


def problem(folder: Path, accept_unverified: bool = False) -> str | None:
    """Why the checkpoint in `folder` cannot be gone on from, in words; None for a whole one."""
    if not (folder / MANIFEST).is_file() and (missing := _missing(folder)):
        return missing
    return damage(folder, accept_unverified) or _missing(folder)


def about(folder: Path) -> dict[str, Any]:
    """What the manifest of a checkpoint says of its run; nothing where it has none."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def damage(folder: Path, accept_unverified: bool = False) -> str | None:
    """What is wrong with the files in `folder` by its manifest, in words; None where all are as they were written."""
    try:
        return _damage(folder, accept_unverified)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


def _damage(folder: Path, accept_unverified: bool) -> str | None:
    for path in folder.rglob("*"):
        if path.suffix in PICKLES and path.name not in HARMLESS:
            return f"{path.name} is a pickle, which could run code; it is never read, so take it away"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop("sha256") != _sum_of(manifest):
            return f"{MANIFEST} is damaged"
        files = {name: (about["bytes"], about["sha256"]) for name, about in manifest["files"].items()}
    except FileNotFoundError:
        if accept_unverified:
            return None
        return (
            f"no {MANIFEST}, so it cannot be told whether it is whole; if you trust it, "
            "give --accept_unverified_checkpoint"
        )
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
        for name, found in zip(files, pool.map(lambda name: sha256(folder / name), files), strict=True):
            if found != files[name][1]:
                return f"{name} is damaged (its sha256 is not that of the {MANIFEST})"
    return None


def _sum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _missing(folder: Path) -> str | None:
    for what, patterns in NEEDED.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return f"the {what} ({patterns[0]}) is missing, without which the run would not go on as it was"
    return None


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a whole model in a checkpoint folder, by name; none if there are no safetensors of one."""
    return {
        name: value for file in sorted(folder.glob("model*.safetensors")) for name, value in load_file(file).items()
    }


def average(folders: list[Path]) -> dict[str, Tensor]:
    """The mean of the weights in checkpoint folders, by name, summed in float32 and of the type that they have.

    As in Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762, section 6.1). What holds whole numbers is that of the
    first folder. Tied weights are in a checkpoint once, and so here. Raises `InputError` where the folders hold weights
    of different names or shapes, or none as safetensors.
    """
    sums: dict[str, Tensor] = {}
    types: dict[str, torch.dtype] = {}
    for folder in folders:
        found = weights(folder)
        if not found:
            raise InputError(f"{folder}: holds no weights as safetensors, so they cannot be averaged")
        shapes = {name: value.shape for name, value in found.items()}
        if sums and shapes != {name: value.shape for name, value in sums.items()}:
            raise InputError(f"{folder}: holds other weights than {folders[0]}, so they cannot be averaged")
        for name, value in found.items():
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
    """Say which checkpoint the run goes on from, and where it was taken without a manifest."""
    if not (folder / MANIFEST).is_file():
        warn(f"{folder}: no {MANIFEST}; taken unverified, as asked")
    tell(f"goes on from {folder}")
