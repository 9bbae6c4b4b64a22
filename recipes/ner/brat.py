"""Read folders of brat: texts in `.txt` files, with their annotations in `.ann` files of the same name."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from common.args import FileArguments
from common.data import Located, Source
from common.errors import InputError

_SPAN = re.compile(r"(T\d+)\t(\S+) (\d+ \d+(?:;\d+ \d+)*)\t(.*)")


def is_brat(folder: str | Path) -> bool:
    """Return whether a folder, or a folder in it, holds `.ann` files."""
    return any(_files(Path(folder), "ann"))


def _files(folder: Path, ending: str) -> list[Path]:
    return [path for pattern in (f"*.{ending}", f"*/*.{ending}") for path in folder.glob(pattern)]


def read_brat(folder: Path, args: FileArguments, annotated: bool = True) -> Iterator[Located]:
    """Yield each document of a folder, and of the folders in it, as a row of `id`, `text` and `spans`.

    Args:
        folder: the folder.
        args: the encoding of the files.
        annotated: whether each text must have an `.ann` file.
    """
    names = sorted({path.with_suffix("") for ending in ("txt", "ann") for path in _files(folder, ending)})
    for name in names:
        text_file, notes = name.with_name(name.name + ".txt"), name.with_name(name.name + ".ann")
        if not text_file.is_file():
            yield str(notes), f"has no text file {text_file.name} beside it; add it"
            continue
        if annotated and not notes.is_file():
            yield str(text_file), f"has no file {notes.name} beside it; add an empty file if the text has no entities"
            continue
        try:
            raw = Source(text_file, args).text()
            lines = Source(notes, args).text().split("\n") if notes.is_file() else []
        except InputError as error:
            where, _, problem = str(error).partition(": ")
            yield where, problem
            continue
        spans, wrong = [], False
        for number, line in enumerate(lines, 1):
            if not line.startswith("T"):  # relations, events, attributes, notes and equivalences
                continue
            match = _SPAN.fullmatch(line.rstrip("\r"))
            if match is None:
                yield f"{notes}:{number}", f"no annotation of brat: {line[:60]!r}; needed: T1<TAB>TYPE 0 4<TAB>text"
                wrong = True
            else:
                parts = sorted(tuple(map(int, part.split())) for part in match[3].split(";"))
                spans.append((match[2], parts, match[4]))
        if wrong:
            continue
        text = _text_of_offsets(raw, spans)
        rows = [
            {
                "start": parts[0][0],
                "end": parts[-1][1],
                "label": label,
                "text": quoted,
                "apart": any(text[a:b].strip() for (_, a), (b, _) in pairwise(parts)),
            }
            for label, parts, quoted in spans
        ]
        yield str(text_file), {"id": str(name.relative_to(folder)), "text": text, "spans": rows}


def _text_of_offsets(raw: str, spans: list[tuple[str, list[tuple[int, ...]], str]]) -> str:
    """Return the text that the offsets count: that of the file, or with line feeds alone where only that fits."""

    def fits(text: str) -> bool:
        quotes = (" ".join(text[a:b] for a, b in parts).split() for _, parts, _ in spans)
        return all(quote == given.split() for quote, (_, _, given) in zip(quotes, spans, strict=True))

    unix = raw.replace("\r\n", "\n")
    return unix if not fits(raw) and fits(unix) else raw
