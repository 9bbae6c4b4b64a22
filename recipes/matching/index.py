"""A folder with the vectors of passages and a FAISS index, written in parts, each of which is whole or absent.

`index.json` lists the parts; a reader ignores files that it does not list. It is replaced last, in one step, so a
stopped write leaves the index as it was. A part has at most `PART_ROWS` passages, which bounds the memory.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import faiss
import numpy as np

from common.args import TrainingArguments
from common.data.source import Row
from common.errors import InputError, Problems, brief, in_main_process

from .encoder import Embedder, fingerprint
from .reading import Corpus

#: passages of a part
PART_ROWS = 50_000
FORMAT = 2
#: passages of a part that tell its columns
FIRST_ROWS = 1000
#: the list of parts
INDEX = "index.json"
#: entries of the list
ENTRIES = {"format", "kind", "version", "parts", "width", "model", "fingerprint"}
#: neighbours of a node of HNSW, and candidates while it is built and searched (Malkov and Yashunin 2018)
LINKS, BUILD_CANDIDATES, SEARCH_CANDIDATES = 32, 200, 128
#: kinds of an index
KINDS = ("exact", "hnsw")


@dataclass
class Hit:
    """A found passage, with the columns of its row."""

    row: Row
    score: float


class Index:
    """An index on the disk.

    Attributes:
        folder: its folder.
        about: the content of `index.json`.
    """

    def __init__(self, folder: str | Path):
        """Open an index.

        Raises:
            InputError: the folder has no whole index.
        """
        self.folder = Path(folder)
        try:
            self.about: dict[str, Any] = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        except FileNotFoundError:
            where = "is no folder" if not self.folder.is_dir() else f"has no {INDEX}, so it is no whole index"
            raise InputError(f"--index {folder}: {where}; write one with --command index") from None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.folder / INDEX}: cannot be read ({error}); write it with --command index"
            ) from None
        try:
            lacking = self._lacking()
        except (KeyError, TypeError, AttributeError, ValueError):
            lacking = INDEX
        if lacking:
            raise InputError(
                f"--index {folder}: is no whole index of this recipe ({lacking} is missing or damaged); write it again "
                "with --command index"
            )

    def _lacking(self) -> str | None:
        """Return the file that is missing or has another size than when it was written; None if all are whole."""
        if self.about["format"] != FORMAT or self.about["kind"] not in KINDS or not self.about.keys() >= ENTRIES:
            return INDEX
        for part in self.about["parts"]:
            if not (isinstance(part["rows"], int) and isinstance(part["deleted"], int)):
                return INDEX
            sizes = part["bytes"] | ({part["mask"]: None} if part["deleted"] else {})
            for name, size in sizes.items():
                path = self.folder / part["name"] / name
                if not path.is_file() or size not in (None, path.stat().st_size):
                    return f"{part['name']}/{name}"
        return None

    def check_model(self, model: str) -> None:
        """Raise `InputError` unless `model` wrote this index."""
        if fingerprint(model) != self.about["fingerprint"]:
            raise InputError(
                f"--index {self.folder}: holds vectors of another model ({self.about['model']}), and those of {model} "
                "lie elsewhere; name that model, or write the index again with --command index"
            )

    def __len__(self) -> int:
        """Return the number of passages."""
        return sum(part["rows"] - part["deleted"] for part in self.about["parts"])

    # Read

    def _file(self, part: dict[str, Any], name: str) -> Path:
        """Return a file of a part.

        Raises:
            InputError: it is gone, because another process has written the index again, or deleted passages twice.
        """
        path = self.folder / part["name"] / name
        if not path.is_file():
            raise InputError(f"--index {self.folder}: another process has changed it; run the command again")
        return path

    def search(self, vectors: np.ndarray, count: int) -> list[list[Hit]]:
        """Return the `count` passages of the largest dot product with each vector, best first.

        Args:
            vectors: of the queries, (queries, width).
            count: passages for each query.
        """
        best: list[list[tuple[float, int, int]]] = [[] for _ in vectors]  # score, part, place in the part
        for number, part in enumerate(self.about["parts"]):
            found = self._search_part(part, vectors, count)
            for of_query, scores, places in zip(best, *found, strict=True):
                of_query += [(s, number, i) for s, i in zip(scores.tolist(), places.tolist(), strict=True) if i >= 0]
                of_query.sort(key=lambda hit: (-hit[0], *hit[1:]))
                del of_query[count:]  # the memory does not grow with the parts
        rows = self._rows({(part, place) for of_query in best for _, part, place in of_query})
        return [[Hit(rows[part, place], score) for score, part, place in of_query] for of_query in best]

    def _search_part(self, part: dict[str, Any], vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        if part["rows"] == part["deleted"]:
            return np.empty((len(vectors), 0)), np.empty((len(vectors), 0), dtype=np.int64)
        # mapped: the system reads the pages that the search needs, and may drop them again
        index = faiss.read_index(str(self._file(part, "index.faiss")), faiss.IO_FLAG_MMAP_IFC)
        selector = None
        if part["deleted"]:
            kept = np.packbits(~self._deleted(part), bitorder="little")
            selector = faiss.IDSelectorBitmap(part["rows"], faiss.swig_ptr(kept))
        if self.about["kind"] == "hnsw":
            settings = faiss.SearchParametersHNSW(sel=selector, efSearch=max(SEARCH_CANDIDATES, 2 * count))
        else:
            settings = faiss.SearchParameters(sel=selector)
        return index.search(vectors, min(count, part["rows"]), params=settings)

    def _deleted(self, part: dict[str, Any]) -> np.ndarray:
        """Return whether each passage of a part is deleted."""
        if not part["deleted"]:
            return np.zeros(part["rows"], dtype=bool)
        return np.load(self._file(part, part["mask"]))

    def _rows(self, places: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Row]:
        """Return the rows at (part, place)."""
        rows = {}
        by_part: dict[int, list[int]] = {}
        for part, place in sorted(places):
            by_part.setdefault(part, []).append(place)
        for number, of_part in by_part.items():
            listed = self.about["parts"][number]
            starts = np.load(self._file(listed, "starts.npy"), mmap_mode="r")
            with open(self._file(listed, "rows.jsonl"), "rb") as file:
                for place in of_part:
                    file.seek(int(starts[place]))
                    rows[number, place] = json.loads(file.readline())
        return rows

    def columns(self) -> list[str]:
        """Return the columns of the first passages of each part."""
        named: dict[str, None] = {}
        for part in self.about["parts"]:
            with open(self._file(part, "rows.jsonl"), "rb") as file:
                for line in islice(file, FIRST_ROWS):
                    named |= dict.fromkeys(json.loads(line))
        return list(named)

    def highest_number(self) -> int:
        """Return the highest id that is a number; 0 without one."""
        highest = 0
        for part in self.about["parts"]:
            with open(self._file(part, "rows.jsonl"), "rb") as file:
                ids = (json.loads(line)["id"] for line in file)
                highest = max([highest, *(int(name) for name in ids if name.isdecimal())])
        return highest

    def find(self, ids: list[str]) -> dict[str, tuple[int, int]]:
        """Return id -> (part, place) of the passages with these ids; absent ids are left out."""
        wanted = hashes(ids)
        candidates = []
        for number, part in enumerate(self.about["parts"]):
            there = np.load(self._file(part, "ids.npy"), mmap_mode="r")
            found = np.flatnonzero(np.isin(there, wanted) & ~self._deleted(part))
            candidates += [(number, int(place)) for place in found]
        named = {row["id"]: place for place, row in self._rows(candidates).items()}
        return {name: named[name] for name in ids if name in named}

    # Write

    def add(self, rows: Iterable[Row], embedder: Embedder, text_column: str, kept: Iterable[str]) -> int:
        """Add passages; the index has all of them, or none if this fails. Return their number.

        Args:
            rows: rows with `id` and a text.
            embedder: the model of the index.
            text_column: column of the text.
            kept: names of the columns that a search returns.

        Raises:
            InputError: an id is in the index already, or occurs twice.
        """
        kept = tuple(kept)
        with self._locked():
            self.check_model(embedder.name)
            parts = list(self.about["parts"])
            count, remaining = 0, iter(rows)
            while some := list(islice(remaining, PART_ROWS)):
                parts.append(self._write_part(some, embedder, text_column, kept, parts))
                count += len(some)
            self._publish(parts)
        return count

    def delete(self, ids: list[str]) -> int:
        """Delete the passages with these ids; return their number.

        Raises:
            InputError: an id is not in the index.
        """
        with self._locked():
            found = self.find(ids)
            problems = Problems()
            for name in dict.fromkeys(ids):
                if name not in found:
                    problems.add(f"--index {self.folder}", f"has no passage with the id {brief(name)}; remove the id")
            problems.check()
            parts = [dict(part) for part in self.about["parts"]]
            by_part: dict[int, list[int]] = {}
            for number, place in found.values():
                by_part.setdefault(number, []).append(place)
            for number, places in by_part.items():
                part, deleted = parts[number], self._deleted(parts[number])
                deleted[places] = True
                part |= {"deleted": int(deleted.sum()), "mask": f"deleted-{self.about['version'] + 1}.npy"}
                np.save(self.folder / part["name"] / part["mask"], deleted)
            self._publish(parts)
        return len(found)

    def _write_part(
        self, rows: list[Row], embedder: Embedder, text_column: str, kept: tuple[str, ...], parts: list[dict[str, Any]]
    ) -> dict[str, Any]:
        self._check_ids(rows, parts)
        # the name is new, so that no process takes the files of one part for those of another
        name = f"part-{self.about['version'] + 1:06d}-{len(parts):04d}-{uuid4().hex[:8]}"
        folder = self.folder / name
        folder.mkdir()
        vectors = embedder.passages([row[text_column] for row in rows])
        np.save(folder / "vectors.npy", vectors)
        np.save(folder / "ids.npy", hashes([row["id"] for row in rows]))
        lines = [
            json.dumps({"id": row["id"], "text": row[text_column]} | {k: row[k] for k in kept if k in row},
                       ensure_ascii=False, default=str).encode() + b"\n"
            for row in rows
        ]  # fmt: skip
        (folder / "rows.jsonl").write_bytes(b"".join(lines))
        np.save(folder / "starts.npy", np.cumsum([0, *map(len, lines)])[:-1])
        index = new_faiss(self.about["kind"], vectors.shape[1])
        index.add(vectors)
        faiss.write_index(index, str(folder / "index.faiss"))
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        return {"name": name, "rows": len(rows), "deleted": 0, "bytes": sizes}

    def _check_ids(self, rows: list[Row], parts: list[dict[str, Any]]) -> None:
        """Raise `InputError` if an id occurs twice among `rows`, in `parts`, or both."""
        problems = Problems()
        names = [row["id"] for row in rows]
        seen: set[str] = set()
        for name in names:
            if name in seen:
                problems.add(f"--output {self.folder}", f"the id {brief(name)} occurs twice; give each a different id")
            seen.add(name)
        before, self.about = self.about, self.about | {"parts": parts}
        there = self.find(names)
        self.about = before
        for name in there:
            problems.add(
                f"--output {self.folder}",
                f"has a passage with the id {brief(name)}; delete it first, or give another id",
            )
        problems.check()

    def _publish(self, parts: list[dict[str, Any]]) -> None:
        """Replace `index.json`, and remove the files that neither it nor the version before lists.

        A process that has opened the version before can go on with it.
        """
        before = {part["name"]: part for part in self.about["parts"]}
        self.about = self.about | {"parts": parts, "version": self.about["version"] + 1}
        write_json(self.folder / INDEX, self.about)
        listed = {part["name"]: part for part in parts}
        for path in self.folder.glob("part-*"):
            if path.name not in listed:
                shutil.rmtree(path)
                continue
            masks = {parts[path.name].get("mask") for parts in (before, listed) if path.name in parts}
            for mask in path.glob("deleted-*.npy"):
                if mask.name not in masks:
                    mask.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from writing, and read what they have written before."""
        with lock_of(self.folder):
            self.about = Index(self.folder).about
            yield


@contextmanager
def lock_of(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to an index; the lock of a dead process is released by the kernel.

    Raises:
        InputError: another process writes to it, or has just replaced it.
    """
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"--output {folder}: another process writes to it; wait for it") from None
        there = folder / ".lock"
        if not there.exists() or not os.path.samestat(os.fstat(lock.fileno()), there.stat()):
            raise InputError(f"--output {folder}: another process has replaced it; run the command again")
        yield


def new_faiss(kind: str, width: int) -> faiss.Index:
    """Return an empty index of FAISS for dot products."""
    if kind == "exact":
        return faiss.IndexFlatIP(width)
    index = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BUILD_CANDIDATES
    return index


def hashes(ids: list[str]) -> np.ndarray:
    """Return 64 bits of a hash of each id."""
    digests = b"".join(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, dtype=np.uint64)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file that appears under its name once it is whole."""
    new = path.with_name(f"{path.name}.new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def check_new(folder: str | Path, overwrite: bool) -> None:
    """Raise `InputError` if an index cannot be written to `folder`."""
    path = Path(folder)
    if path.is_file():
        raise InputError(f"--output {folder}: is a file; name a folder")
    if path.is_dir() and any(path.iterdir()):
        if not (path / INDEX).is_file():
            raise InputError(f"--output {folder}: holds files that are no index; name another folder")
        if not overwrite:
            raise InputError(f"--output {folder}: exists already; choose another name, or add --overwrite")


def create(
    folder: str | Path, rows: Iterable[Row], embedder: Embedder, kind: str, text_column: str, kept: Iterable[str] = ()
) -> Index:
    """Write an index that appears under its name once it is whole, in place of an index there.

    Args:
        folder: the folder.
        rows: rows with `id` and a text.
        embedder: the model.
        kind: exact, or hnsw.
        text_column: column of the text.
        kept: further columns that a search returns.

    Raises:
        InputError: there are no rows, or an id is repeated.
    """
    path = Path(os.path.realpath(folder))
    unique = f"{os.getpid()}-{uuid4().hex[:8]}"
    new, old = (path.with_name(f"{path.name}.{unique}.{end}") for end in ("part", "old"))
    new.mkdir(parents=True)
    try:
        about = {"format": FORMAT, "kind": kind, "version": 0, "parts": [], "width": embedder.width}
        about |= {"model": embedder.name, "fingerprint": fingerprint(embedder.name)}
        write_json(new / INDEX, about)
        index = Index(new)
        if not index.add(rows, embedder, text_column, kept):
            raise InputError("the corpus contains no passages; add some")
        with lock_of(path) if (path / INDEX).is_file() else nullcontext():
            if path.exists():
                path.rename(old)
            new.rename(path)
    finally:
        if not path.exists() and old.exists():
            old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    index.folder = Path(folder)
    return index


def write_for(args: TrainingArguments, corpus: Corpus) -> None:
    """Write the index of the corpus of a run into its output folder, from the main process only."""

    def write() -> None:
        precision = "bf16" if args.bf16 else "fp32"
        embedder = Embedder(str(args.folder), precision=precision, speed=args.speed)
        rows = ({"id": name, "text": text} for name, text in zip(corpus.ids, corpus.texts, strict=True))
        create(args.folder / "index", rows, embedder, "exact", "text")

    in_main_process(write)
