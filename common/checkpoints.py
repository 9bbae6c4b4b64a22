"""Checkpoints that are whole or absent: written aside, hashed, synced, renamed; resume takes the newest that verifies.

A checkpoint is written into `.saving/` inside the output folder. Once `manifest.json` holds the size and SHA-256 of
each of its files, and all of it is on the disk, it is renamed to `checkpoint-<step>`: a process that dies at any moment
leaves either no new checkpoint or a whole one. (The atomic-rename pattern of Pillai et al. 2014,
https://www.usenix.org/conference/osdi14/technical-sessions/presentation/pillai.)
"""

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

from common.errors import InputError, RunStopped, tell, warn

STAGING = ".saving"
MANIFEST = "manifest.json"
STATE = "trainer_state.json"
#: without one of each group a resumed run would not be the same run
NEEDED = {
    "trainer state": [STATE],
    "weights": ["*.safetensors", "pytorch_model_fsdp*", "global_step*"],
    "optimizer": ["optimizer.pt", "optimizer*", "global_step*"],
    "scheduler": ["scheduler.pt", "global_step*"],
    "random states": ["rng_state*.pth"],
}
#: pickles that could run code when read; those of FSDP are read by `torch.load(weights_only=True)`
PICKLES = {".bin", ".pkl", ".pickle", ".joblib"}
READ_AS_TENSORS = {"pytorch_model_fsdp.bin", "optimizer.bin"}


def in_order(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders in `output_dir`, whole or not, the one of the last step first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda path: -int(path.name.split("-")[1]))


# Saving


def publish(staged: Path, output_dir: Path, **about: Any) -> Path:
    """Seal the finished folder `staged` with a manifest and move it into `output_dir`. Returns its place there.

    `about` goes into the manifest. What stood in its place, a checkpoint of the same step, is replaced.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    with ThreadPoolExecutor(max_workers=2) as pool:
        sums = dict(zip((str(path.relative_to(staged)) for path in files), pool.map(_sum_and_sync, files), strict=True))
    manifest = staged / MANIFEST
    manifest.write_text(json.dumps(about | {"files": sums}, indent=1) + "\n", encoding="utf-8")
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
    """Take away what an unfinished save left."""
    shutil.rmtree(Path(output_dir, STAGING), ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Remove the oldest checkpoints beyond `limit`, but none of `keep`: the one just published, and the best."""
    kept = {path.resolve() for path in keep}
    others = [path for path in in_order(output_dir) if path.resolve() not in kept]
    if limit:
        for path in others[max(0, limit - 1) :]:
            shutil.rmtree(path)


@contextmanager
def clear_disk_errors(folder: str | Path, needed: Callable[[], int]) -> Iterator[None]:
    """Turn a failure to write into one sentence with the bytes needed and free; a half-written checkpoint goes away."""
    try:
        yield
    except RunStopped:
        raise
    except Exception as error:  # OSError, SafetensorError, or RuntimeError from torch.save
        free = shutil.disk_usage(folder).free
        if not isinstance(error, OSError) and "space" not in str(error) and free > needed():
            raise
        staged = Path(folder, STAGING)
        partial = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
        clear_staging(folder)
        before = in_order(folder)
        remedy = "make room"
        if before:
            remedy += f", then go on from {before[0].name} by --resume_from_checkpoint true"
        raise RunStopped(
            f"{folder}: cannot be written ({' '.join(str(error).split())[:200]}): about {needed():,} bytes are needed "
            f"and {free + partial:,} are free; {remedy}",
            code=RunStopped.NOT_SAVED,
        ) from None


def _sum_and_sync(path: Path) -> dict[str, Any]:
    _sync(path)
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


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
    for path in folder.rglob("*"):
        if path.suffix in PICKLES and path.name not in READ_AS_TENSORS:
            return f"{path.name} is a pickle, which could run code; it is never read, so take it away"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (about["bytes"], about["sha256"]) for name, about in manifest["files"].items()}
    except FileNotFoundError:
        missing = _missing(folder)
        if missing or accept_unverified:
            return missing
        return (
            f"no {MANIFEST}, so it cannot be told whether it is whole; if you trust it, "
            "give --accept_unverified_checkpoint"
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
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
        for name, found in zip(files, pool.map(lambda name: _sum(folder / name), files), strict=True):
            if found != files[name][1]:
                return f"{name} is damaged (its sha256 is not that of the {MANIFEST})"
    return _missing(folder)


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _missing(folder: Path) -> str | None:
    for what, patterns in NEEDED.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return f"the {what} ({patterns[0]}) is missing, without which the run would not go on as it was"
    return None


def warn_unverified(folder: Path) -> None:
    """Say so where `folder` was taken without a manifest."""
    if not (folder / MANIFEST).is_file():
        warn(f"{folder}: no {MANIFEST}; taken unverified, as asked")
    tell(f"goes on from {folder}")
