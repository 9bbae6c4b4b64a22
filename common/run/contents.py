"""Tell the files of a run from those of the user in an output folder, and lose none of the user's."""

import filecmp
import os
import shutil
from pathlib import Path
from typing import Any

from common.training import checkpoints

RECORD = "run.json"
#: folder with copies of the user's files, while a run may write files of the same names
COPIES = ".kept"


def files_in(folder: Path) -> dict[str, int]:
    """Return the files of a folder with their time of change, without checkpoints, copies, lock and record."""
    apart = {path.name for path in checkpoints.in_order(folder)} | {checkpoints.STAGING, COPIES, ".lock", RECORD}
    files = (path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] not in apart)
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


def written_files(folder: Path, record: dict[str, Any]) -> list[str]:
    """Return the names of the files that a run wrote into a folder, without checkpoints and record."""
    existing = files_in(folder)  # excludes names such as ../x
    return [name for name in record["files"] if name in existing]


def remove_run(folder: Path, record: dict[str, Any]) -> None:
    """Remove the files of a run from a folder. Its record stays until another one replaces it."""
    shutil.rmtree(folder / checkpoints.STAGING, ignore_errors=True)
    for path in (*(folder / name for name in written_files(folder, record)), *checkpoints.in_order(folder)):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    parents = {folder / parent for name in record["files"] for parent in Path(name).parents} - {folder}
    for path in sorted((path for path in folder.rglob("*") if path in parents), reverse=True):  # inner folders first
        if not any(path.iterdir()):
            path.rmdir()


def move_run(folder: Path, record: dict[str, Any], target: Path, with_checkpoints: bool) -> None:
    """Move the files of a run into folder `target`; a file of the user there gets another name."""
    target.mkdir(exist_ok=True)
    shutil.copy(folder / RECORD, target / f"{RECORD}.new")
    (target / f"{RECORD}.new").replace(target / RECORD)
    names = written_files(folder, record)
    for name in names + ([path.name for path in checkpoints.in_order(folder)] if with_checkpoints else []):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (target / name).exists():
            (target / name).rename(_free_name(target / name))
        shutil.move(folder / name, target / name)


def copy_aside(folder: Path, names: list[str]) -> None:
    """Copy files of the user into `COPIES`, so that a run may write files of the same names; keep existing copies."""
    for name in (name for name in names if not (folder / COPIES / name).exists()):
        copy, part = folder / COPIES / name, folder / COPIES / f"{name}.{os.getpid()}.part"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / name, part)
        part.replace(copy)


def give_back(folder: Path) -> dict[str, str]:
    """Put those copies beside the user's files that the run has overwritten, and remove all other copies.

    Returns:
        Name of each file that was overwritten -> name of its copy in the folder.
    """
    found = {}
    for copy in sorted(path for path in (folder / COPIES).rglob("*") if path.is_file()):
        original = folder / copy.relative_to(folder / COPIES)
        if copy.suffix != ".part" and not (original.is_file() and filecmp.cmp(copy, original, shallow=False)):
            beside = _free_name(original)
            beside.parent.mkdir(parents=True, exist_ok=True)
            copy.replace(beside)
            found[original.relative_to(folder).as_posix()] = beside.relative_to(folder).as_posix()
    shutil.rmtree(folder / COPIES, ignore_errors=True)
    return found


def _free_name(path: Path) -> Path:
    """Return a name beside `path` that no file has: `a.jsonl.yours`, `a.jsonl.yours2`, ..."""
    names = (path.with_name(f"{path.name}.yours{number}") for number in ("", *range(2, 1_000_000)))
    return next(name for name in names if not name.exists())
