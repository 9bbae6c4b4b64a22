"""Text to pretrain on: files, folders and patterns to texts, and texts to blocks of sub-tokens.

Without files the text is what every Python has: the language's own documentation, read at run time.
"""

import ast
import glob
import hashlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from tokenizers import Encoding
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.args import DataArguments
from common.data.files import NOT_UTF8, Located, Row, read_file
from common.data.rows import checked, load_splits
from common.errors import InputError, Problems, nearest_file, tell

PLAIN = (".txt", ".text")
ENDINGS = (*PLAIN, ".jsonl", ".json", ".csv", ".tsv", ".parquet")
BINARY = "holds zero bytes, so it is binary, or text in UTF-16; convert it: iconv -f UTF-16 -t UTF-8"
#: a text, or the end of a text that a block cuts off, of fewer sub-tokens teaches nothing
SHORTEST_TEXT, SHORTEST_PIECE = 3, 8

BLOCKS = Features({"input_ids": List(Value("int32")), "marks": List(Value("int8")), "lengths": List(Value("int32"))})

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n")

#: what a recipe says of the sub-tokens of a text: a small number each, 0 being kept for special ones
Marks = Callable[[str, Encoding], list[int]]
Marked = tuple[list[int], list[int]]  # the sub-tokens of a text, and their marks


@dataclass
class CorpusArguments(DataArguments):
    """Texts to pretrain on; without any file, Python's own documentation."""

    train_file: str | None = field(
        default=None,
        metadata={"help": f"a file, a folder, or a pattern such as 'texts/**/*.txt'; {' '.join(ENDINGS)}"},
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "the same for validation; carved from the training texts when missing"}
    )
    test_file: str | None = field(default=None, metadata={"help": "the same for test, evaluated once at the end"})
    forgetting_file: str | None = field(
        default=None, metadata={"help": "texts of another kind, evaluated before and after: what is forgotten"}
    )
    text_column_name: str = field(default="text", metadata={"help": "column with the text, in files that have columns"})
    text_unit: Literal["line", "paragraph", "document"] = field(
        default="line", metadata={"help": "what of a .txt file is a text: a line, a paragraph, the whole file"}
    )
    max_seq_length: int = field(
        default=256, metadata={"help": "sub-tokens in a row; longer texts take several", "resume": "fixed"}
    )
    pack: bool = field(
        default=True,
        metadata={
            "help": "fill rows with several texts, none of which sees the others; else one a row",
            "resume": "fixed",
        },
    )
    pack_as: Literal["auto", "pieces", "blocks"] = field(
        default="auto",
        metadata={
            "help": "texts of a row as rows of the batch, or in one row under a block mask; auto: by hardware",
            "resume": "fixed",
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "read the training texts while training, never all; needs --max_steps", "resume": "fixed"},
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "of a stream: texts that are shuffled together", "resume": "fixed"}
    )
    stream_shares: int | None = field(
        default=None,
        metadata={
            "help": "of a stream: parts that are read side by side; processes times workers when not given",
            "resume": "fixed",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.forgetting_file:
            self.check_path("forgetting_file", self.forgetting_file)
        if self.max_seq_length < 16:
            raise InputError(f"--max_seq_length {self.max_seq_length}: must be at least 16")
        for name in ("shuffle_buffer", "stream_shares"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1")

    def check_path(self, name: str, path: str) -> None:
        """Raise `InputError` unless `path` names a file, a folder with texts, or a pattern that some file matches."""
        try:
            files_of(path)
        except InputError as error:
            raise InputError(f"--{name} {error}") from None

    def files(self) -> dict[str, str]:
        """The files of the run, each under the argument that names it, numbered where that names several.

        Those to stream are left out: to hash them would be to read them all.
        """
        found = {}
        for name, path in super().files().items():
            if self.streaming and name == "train_file":
                continue
            files = files_of(path)
            for i, file in enumerate(files, 1):
                found[name if len(files) == 1 else f"{name} {i}"] = str(file)
        return found


# Files to texts


def files_of(path: str) -> list[Path]:
    """The files that `path` names: itself, those with texts in the folder and below it, or those of a pattern; sorted.

    Raises `InputError` where there is none.
    """
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        found = [p for p in Path(path).rglob("*") if p.suffix.lower() in ENDINGS and p.is_file()]
        visible = sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts))
        if not visible:
            raise InputError(f"{path}: no file with texts in this folder; looked for: {' '.join(ENDINGS)}")
        return visible
    if glob.has_magic(path):
        matched = sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())
        if not matched:
            raise InputError(f"{path}: no file matches this pattern")
        return matched
    raise InputError(f"{path}: no such file{nearest_file(path)}")


def read_texts(path: str, unit: str, max_chars: int) -> Iterator[Located]:
    """Rows of all files that `path` names, each with its place. Of a `.txt` file a `unit` is a row, as `text`."""
    for file in files_of(path):
        try:
            yield from _read_plain(file, unit, max_chars) if file.suffix.lower() in PLAIN else read_file(file)
        except OSError as error:
            raise InputError(f"{file}: {error.strerror or error}") from None


def _read_plain(path: Path, unit: str, max_chars: int) -> Iterator[Located]:
    first, lines = "", []
    for where, text, problem in _bounded_lines(path, max_chars):
        if problem:
            yield where, problem
        elif unit == "line":
            if text.strip():
                yield where, {"text": text}
        elif text.strip() or (unit == "document" and lines):
            first = first if lines else where
            lines.append(text)
        elif lines:
            yield first, {"text": "\n".join(lines)}
            lines = []
    if lines:
        yield first, {"text": "\n".join(lines).rstrip("\n")}


def _bounded_lines(path: Path, max_chars: int) -> Iterator[tuple[str, str, str | None]]:
    """Place, text and problem of each line. Of a line that is too long no more is held than may be read."""
    most = 4 * max_chars + 2  # bytes: UTF-8 has up to four a character
    with open(path, "rb") as file:
        if b"\0" in file.read(8192):
            yield str(path), "", BINARY
            return
        file.seek(0)
        number = 0
        while raw := file.readline(most):
            number += 1
            where = f"{path}:{number}"
            if len(raw) == most and not raw.endswith(b"\n"):
                while (raw := file.readline(most)) and not raw.endswith(b"\n"):
                    pass
                yield where, "", f"more than --max_chars {max_chars:,} characters in one line; split it, or allow more"
                continue
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                yield where, "", NOT_UTF8
            else:
                yield where, text, BINARY if "\0" in text else None


def check_text(row: Row) -> Iterator[str]:
    """A sentence if a row holds no text."""
    if not isinstance(row["text"], str):
        yield f"text is {row['text']!r}; needed: a text"


def load_corpus(args: CorpusArguments) -> DatasetDict:
    """Texts of the run with splits train, validation and perhaps test, columns `text` and `id`.

    Raises `InputError` for broken rows, with file and line, and where a split holds no text. Blank texts are none.
    """
    if not (args.train_file or args.dataset_name):
        data = python_documentation()
        for split, limit in (("train", args.max_train_samples), ("validation", args.max_eval_samples)):
            if limit is not None:
                data[split] = data[split].select(range(min(limit, len(data[split]))))
        return data
    read = partial(read_texts, unit=args.text_unit, max_chars=args.max_chars)
    data = load_splits(args, {"text": args.text_column_name}, check_text, read=read)
    for split, rows in data.items():
        data[split] = _without_blank(rows, split)
    return data


def load_texts(path: str, args: CorpusArguments) -> Dataset:
    """Texts of one more file, folder or pattern, as `load_corpus` reads them."""
    problems = Problems()
    source = read_texts(path, args.text_unit, args.max_chars)
    columns = {"text": args.text_column_name}
    found = checked(source, path, columns, check_text, (), args.max_chars, problems)
    rows = Dataset.from_list([row for _, row in found])
    problems.check()
    return _without_blank(rows, path)


def _without_blank(rows: Dataset, name: str) -> Dataset:
    texts = rows["text"][:]
    kept = [i for i, text in enumerate(texts) if text.strip()]
    if not kept:
        raise InputError(f"{name}: every text is blank")
    if len(kept) == len(texts):
        return rows
    tell(f"{name}: {len(texts) - len(kept)} of {len(texts)} texts are blank and left out")
    return rows.select(kept)


# The text that is always there


def python_documentation() -> DatasetDict:
    """What Python says of itself: topics of its reference, and docstrings of its standard library.

    Columns `text` and `id`, the module. All texts of a module, and each topic, are in one split; about a tenth is
    validation, chosen by a hash of the name. The sources are read, not imported.
    """
    from pydoc_data.topics import topics  # half a megabyte, only for this

    texts = {f"topics/{name}": [text.strip()] for name, text in topics.items()}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or {"test", "tests", "idlelib", "lib2to3"} & set(parts):
            continue
        texts.setdefault(parts[0], []).extend(_docstrings(path))
    rows: dict[str, list[Row]] = {"train": [], "validation": []}
    for name, found in texts.items():
        held_out = hashlib.sha256(name.encode()).digest()[0] < 20
        rows["validation" if held_out else "train"] += [{"text": text, "id": name} for text in dict.fromkeys(found)]
    if not all(rows.values()) or len(rows["train"]) < 1000:
        raise InputError("this Python has no sources of its standard library to read; give --train_file")
    tell(f"no --train_file: reads the documentation of Python {sys.version.split()[0]} itself")
    return DatasetDict({split: Dataset.from_list(found) for split, found in rows.items()})


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # some are broken on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            if len(text.split()) >= SHORTEST_TEXT:
                yield text


# Texts to blocks


def sentences_of(text: str) -> list[str]:
    """The sentences of `text`, by marks that end one and by blank lines; blanks in them become single spaces."""
    return [" ".join(part.split()) for part in _SENTENCE.split(text) if part.strip()]


def ends_of(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts in front of a text, and those behind it."""
    inside = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(inside)] == inside)
    return whole[:start], whole[start + len(inside) :]


def blocks_of(
    texts: Iterable[Marked],
    ends: tuple[list[int], list[int]],
    length: int,
    pack: bool,
    whole: bool = False,
) -> Iterator[Row]:
    """Rows of at most `length` sub-tokens from texts, which are pairs of sub-tokens and their marks.

    With `pack` a row is filled with one text after the other, and the last is cut where the row is full, or if `whole`
    goes to the next row; else each text has rows of its own. Each piece has its special tokens. A row holds
    `input_ids`, `marks` (0 at special tokens) and `lengths`, those of its pieces.
    """
    row = yield from fill_rows(texts, ends, length, pack, whole, row=empty_row())
    if row["lengths"]:
        yield row


def fill_rows(
    texts: Iterable[Marked],
    ends: tuple[list[int], list[int]],
    length: int,
    pack: bool,
    whole: bool = False,
    *,
    row: Row,
) -> Generator[Row, None, Row]:
    """Rows of `blocks_of`, of which the first goes on with `row`; returns the last, which is not full yet."""
    before, after = ends
    extra = len(before) + len(after)
    for ids, marks in texts:
        at = 0
        while at < len(ids):
            room = length - len(row["input_ids"]) - extra
            rest = len(ids) - at - room
            if 0 < rest < SHORTEST_PIECE:  # leave more than a stub
                room -= SHORTEST_PIECE - rest
            if rest > 0 and row["lengths"] and (whole or room < SHORTEST_PIECE):
                yield row
                row = empty_row()
                continue
            piece, piece_marks = ids[at : at + room], marks[at : at + room]
            row["input_ids"] += [*before, *piece, *after]
            row["marks"] += [0] * len(before) + piece_marks + [0] * len(after)
            row["lengths"].append(len(piece) + extra)
            at += room
            if not pack:
                yield row
                row = empty_row()
    return row


def empty_row() -> Row:
    """A row of `blocks_of` that nothing is in yet."""
    return {"input_ids": [], "marks": [], "lengths": []}


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast, marks: Marks) -> list[Marked]:
    """Sub-tokens of each text without special ones, and their marks: those of `marks(text, encoding)`."""
    found = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [(encoding.ids, marks(text, encoding)) for text, encoding in zip(texts, found, strict=True)]


def to_blocks(
    data: DatasetDict, tokenizer: PreTrainedTokenizerFast, args: CorpusArguments, marks: Marks
) -> DatasetDict:
    """The texts of each split as rows of `blocks_of`, with the special tokens that the tokenizer puts around a text."""
    return rows_of(data, lambda texts: encode(texts["text"], tokenizer, marks), ends_of(tokenizer), args)


def rows_of(
    data: DatasetDict,
    encoded: Callable[[dict[str, list]], list[Marked]],
    ends: tuple[list[int], list[int]],
    args: CorpusArguments,
    least: int = SHORTEST_TEXT,
    whole: bool = False,
) -> DatasetDict:
    """Each split as rows of `blocks_of`, with `row`, their number, from what `encoded` makes of a batch of its rows.

    Says how many had fewer than `least` sub-tokens and were left out; raises `InputError` where all of a split had.
    """
    features = Features(BLOCKS | {"texts": Value("int64")})

    def rows(batch: dict[str, list]) -> dict[str, list]:
        texts = [pair for pair in encoded(batch) if len(pair[0]) >= least]
        found = list(blocks_of(texts, ends, args.max_seq_length, args.pack, whole))
        columns = {name: [row[name] for row in found] for name in BLOCKS}
        # in one row of the batch, so that the sum over the rows is their number
        return columns | {"texts": [len(texts)] + [0] * (len(found) - 1) if found else []}

    blocks = {}
    for split, texts in data.items():
        made = texts.map(rows, batched=True, remove_columns=texts.column_names, features=features)
        if len(made) == 0:
            raise InputError(f"{split}: every text is shorter than {least} sub-tokens; nothing to learn from")
        short = len(texts) - sum(made["texts"])
        if short:
            tell(f"{split}: {short} of {len(texts)} texts are shorter than {least} sub-tokens and left out")
        made = made.remove_columns("texts").add_column("row", np.arange(len(made)))
        blocks[split] = made.with_format("numpy")
    return DatasetDict(blocks)


def pieces(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """The pieces of a row of `blocks_of`, from its sub-tokens or anything else with a value for each."""
    return np.split(values, np.cumsum(lengths)[:-1])


def padded(rows: list[np.ndarray], longest: int, value: int) -> Tensor:
    """Rows filled up with `value`, of shape (rows, longest)."""
    found = np.full((len(rows), longest), value, dtype=np.int64)
    for i, row in enumerate(rows):
        found[i, : len(row)] = row
    return torch.from_numpy(found)
