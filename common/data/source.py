"""Open an input file: compressed or not, in any encoding, as lines or as a whole."""

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import pyarrow as pa

from common.args import FileArguments
from common.data.encodings import SAMPLE, encoding_problem, marked_encoding
from common.errors import InputError

Row = dict[str, Any]
#: item of a reader: the place of a row ("file:line"), and the row or its problem
Located = tuple[str, Row | str]


class Line(NamedTuple):
    """A line of a file: its place ("file:line"), its text, and the problem of a line that is no text."""

    where: str
    text: str
    problem: str | None = None


def _open_zip(path: Path) -> IO[bytes]:
    archive = zipfile.ZipFile(path)
    return archive.open(_member(archive, path))


def _member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        names = ", ".join(m.filename for m in members[:5]) or "none"
        raise InputError(f"{path}: {len(members)} files in this archive ({names}); unpack it, and name one of them")
    if members[0].flag_bits & 1:
        raise InputError(f"{path}: is encrypted; unpack it with its password")
    return members[0]


def _open_zstandard(path: Path) -> BinaryIO:
    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


#: ending of a compressed file -> its name, and what opens it
COMPRESSED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    ".gz": ("gzip", gzip.open),
    ".bz2": ("bzip2", bz2.open),
    ".xz": ("xz", lzma.open),
    ".zst": ("zstandard", _open_zstandard),
    ".zip": ("zip", _open_zip),
}
#: errors of a compressed file that is damaged
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile, zlib.error, pa.ArrowException)


def ending_of(path: Path) -> str:
    """Return the ending of a file in lower case, without that of its compression: `.csv` of `a.CSV.gz`."""
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending in COMPRESSED else ending


@dataclass(frozen=True)
class Source:
    """An input file, with the arguments that say how to read it.

    Attributes:
        path: the file.
        args: the encoding, the layout of tables, and the longest row.
    """

    path: Path
    args: FileArguments = field(default_factory=FileArguments)

    @property
    def ending(self) -> str:
        """Return the ending of the file without that of its compression."""
        ending = ending_of(self.path)
        if not ending and self.path.suffix.lower() == ".zip":
            with self._named_errors(), zipfile.ZipFile(self.path) as archive:
                return Path(_member(archive, self.path).filename).suffix.lower()
        return ending

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file for reading bytes, decompressed.

        Raises:
            InputError: the file cannot be read, or its compression is damaged.
        """
        with self._named_errors():
            compression = COMPRESSED.get(self.path.suffix.lower())
            with compression[1](self.path) if compression else open(self.path, "rb") as file:
                yield file

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        name = COMPRESSED.get(self.path.suffix.lower(), ("", None))[0]
        try:
            yield
        except DAMAGED as error:
            raise InputError(f"{self.path}: not a whole {name} file: {error}; compress the file again") from None
        except OSError as error:
            reason = error.strerror or f"not a whole {name} file: {error}; compress the file again"
            raise InputError(f"{self.path}: {reason}") from None

    def head(self) -> bytes:
        """Return the first bytes of the file."""
        with self.open() as file:
            return file.read(SAMPLE)

    def text(self) -> str:
        """Return the whole text, with its newlines as they are.

        Raises:
            InputError: the file is not text in its encoding.
        """
        lines = []
        for where, text, problem in self.lines(keep_ends=True):
            if problem:
                raise InputError(f"{where}: {problem}")
            lines.append(text)
        return "".join(lines)

    def lines(self, keep_ends: bool = False, bounded: bool = False, carriage_returns: bool = False) -> Iterator[Line]:
        r"""Yield the lines of the file, without a byte order mark, which selects the encoding if `--encoding` does not.

        After a line that is not text, the file is read on only under `--skip_bad_rows`, as all lines may be like it.

        Args:
            keep_ends: keep the newline of each line, and the readable part of a line that is not text, as a CSV reader
                needs both; otherwise such a line is empty.
            bounded: report a line over `--max_chars` without holding it in memory.
            carriage_returns: lines end in `\r` if the file has no `\n`.
        """
        head = self.head()
        newline = "\r" if carriage_returns and b"\r" in head and b"\n" not in head else "\n"
        encoding = self.args.encoding or marked_encoding(head) or "utf-8"
        encoding = encoding.removesuffix("-sig")  # else a mark is removed from each line
        by_bytes = newline == "\n" and "\n".encode(encoding) == b"\n"  # else a newline is not one byte, as in UTF-16
        most = self.args.max_chars + 2 if bounded else -1
        read = partial(self._byte_lines, encoding) if by_bytes else partial(self._text_lines, encoding, newline)
        raw_lines = read(head, most)
        for number, (text, problem) in enumerate(raw_lines, 1):
            text = text.removeprefix("\ufeff") if number == 1 else text
            text = text if keep_ends else "" if problem else text.rstrip("\r\n")
            yield Line(f"{self.path}:{number}", text, problem)

    def _byte_lines(self, encoding: str, head: bytes, most: int) -> Iterator[tuple[str, str | None]]:
        """Yield text and problem of each line; a line over `most` characters is a problem."""
        decode = codecs.getdecoder(encoding)
        most *= 4 if most > 0 else 1  # bytes of a character
        with self.open() as file:
            while raw := file.readline(most):
                end = raw
                while len(end) == most and not end.endswith(b"\n"):
                    end = file.readline(most)
                if end is not raw:
                    yield "", self._over_limit()
                    continue
                try:
                    if b"\0" in raw:
                        raise UnicodeError
                    yield decode(raw)[0], None
                except UnicodeError:
                    yield decode(raw, "replace")[0], encoding_problem(head, raw, encoding)
                    if not self.args.skip_bad_rows:
                        return

    def _text_lines(self, encoding: str, newline: str, head: bytes, most: int) -> Iterator[tuple[str, str | None]]:
        """Do the same for an encoding or a newline that needs the whole stream decoded."""
        with self.open() as file:
            text = io.TextIOWrapper(file, encoding=encoding, newline=newline)
            try:
                while line := text.readline(most):
                    end = line
                    while len(end) == most and not end.endswith(newline):
                        end = text.readline(most)
                    yield (line, None) if end is line else ("", self._over_limit())
            except UnicodeError:
                raise InputError(f"{self.path}: {encoding_problem(head, head[:1000], encoding)}") from None

    def _over_limit(self) -> str:
        return f"more than --max_chars {self.args.max_chars:,} characters in one line; split it, or raise --max_chars"
