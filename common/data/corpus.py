"""Read texts for pretraining from files, folders and patterns.

Without files, the texts are the documentation of the installed Python.
"""

import glob
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from datasets import Dataset, DatasetDict

from common.args import FileArguments, GroupedDataArguments
from common.data.documentation import python_documentation
from common.data.domains import OLD, Groups, groups_of
from common.data.files import READERS, read_file, read_text
from common.data.rows import accepted, checked, load_splits, with_old
from common.data.samples import sample
from common.data.source import Located, Row, Source, ending_of
from common.data.workbooks import WORKBOOKS
from common.errors import InputError, Problems, nearest_file, tell

PLAIN = (".txt", ".text")
ENDINGS = (*PLAIN, ".jsonl", ".json", ".csv", ".tsv", ".parquet", *WORKBOOKS)


@dataclass
class CorpusArguments(GroupedDataArguments):
    """Choose the texts for pretraining; without files, the documentation of Python."""

    train_file: str | None = field(
        default=None,
        metadata={"help": f"file, folder, or pattern such as 'texts/**/*.txt'; endings: {' '.join(ENDINGS)}"},
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "the same for validation; default: split off from the training texts"}
    )
    test_file: str | None = field(
        default=None, metadata={"help": "the same for test; scored before and after training"}
    )
    forgetting_file: str | None = field(
        default=None,
        metadata={"help": "texts of another domain, evaluated before and after training to measure forgetting"},
    )
    text_column_name: str = field(default="text", metadata={"help": "column of the text, in files with columns"})
    text_unit: Literal["line", "paragraph", "document"] = field(
        default="line",
        metadata={"help": "unit of a .txt file that is one text: line, paragraph, document (the whole file)"},
    )
    max_seq_length: int = field(
        default=256, metadata={"help": "tokens in a row; longer texts fill several rows", "resume": "fixed"}
    )
    pack: bool = field(
        default=True,
        metadata={
            "help": "fill a row with several texts, none of which sees the others; false: one text a row",
            "resume": "fixed",
        },
    )
    pack_as: Literal["auto", "pieces", "blocks"] = field(
        default="auto",
        metadata={
            "help": "pieces: each text is a row of the batch; blocks: one row under a block mask; auto: by hardware",
            "resume": "fixed",
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "read the training texts during training, without loading all; needs --max_steps",
            "resume": "fixed",
        },
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "with --streaming: texts that are shuffled together", "resume": "fixed"}
    )
    stream_shares: int | None = field(
        default=None,
        metadata={
            "help": "with --streaming: parts read in parallel; default: processes times workers",
            "resume": "fixed",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.forgetting_file:
            self.check_path("forgetting_file", self.forgetting_file)
        if self.domain_column is not None:
            self._check_columns()
        if self.max_seq_length < 16:
            raise InputError(f"--max_seq_length {self.max_seq_length}: must be at least 16")
        for name in ("shuffle_buffer", "stream_shares"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")

    def check_path(self, name: str, path: str) -> None:
        """Raise `InputError` unless `path` is a file, a folder with texts, or a pattern that matches a file."""
        try:
            files_of(path)
        except InputError as error:
            raise InputError(f"--{name} {error}") from None

    def _check_columns(self) -> None:
        """Raise `InputError` if the texts have no columns, so none with a domain."""
        asked = f"--domain_column {self.domain_column}"
        if not self.has_source():
            raise InputError(f"{asked}: the documentation of Python has no domains; give --train_file")
        for name in ("train_file", "validation_file", "test_file", "replay_file"):
            path = getattr(self, name)
            if plain := next((file for file in files_of(path) if ending_of(file) in PLAIN) if path else iter(()), None):
                raise InputError(f"{asked}: {plain} has no columns; convert it to .jsonl or .csv, with this column")

    def files(self) -> dict[str, str]:
        """Return argument -> file for the files of the run, with a number if one argument names several.

        Streamed files are left out, because hashing them would read them completely.
        """
        named = {}
        for name, path in super().files().items():
            if self.streaming and name == "train_file":
                continue
            files = files_of(path)
            for i, file in enumerate(files, 1):
                named[name if len(files) == 1 else f"{name} {i}"] = str(file)
        return named


# Files to texts


def files_of(path: str) -> list[Path]:
    """Return the sorted files that `path` names: one file, all text files in and below a folder, or all matches.

    Hidden files and folders below a folder are skipped.

    Raises:
        InputError: there is no such file.
    """
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        texts = [p for p in Path(path).rglob("*") if ending_of(p) in ENDINGS and p.is_file()]
        visible = sorted(p for p in texts if not any(part.startswith(".") for part in p.relative_to(path).parts))
        if not visible:
            raise InputError(f"{path}: no text file in this folder; add files with these endings: {' '.join(ENDINGS)}")
        return visible
    if glob.has_magic(path):
        matched = sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())
        if not matched:
            raise InputError(f"{path}: no file matches this pattern; correct the pattern")
        return matched
    raise InputError(f"{path}: no such file{nearest_file(path)}")


def read_texts(path: str, unit: str, args: FileArguments) -> Iterator[Located]:
    """Yield the rows of all files that `path` names, each with its place.

    Args:
        path: file, folder or pattern.
        unit: line, paragraph or document, the part of a `.txt` file that becomes a row with column `text`.
        args: how to read the files.

    Raises:
        InputError: there is no such file, or a file is unreadable.
    """
    readers = READERS | dict.fromkeys(PLAIN, partial(_read_plain, unit=unit))
    for file in files_of(path):
        yield from read_file(file, readers, args)


def _read_plain(source: Source, unit: str) -> Iterator[Located]:
    if unit == "line":
        yield from read_text(source)
        return
    first = ""
    lines: list[str] = []
    for where, text, problem in source.lines(bounded=True, carriage_returns=True):
        if problem:
            yield where, problem
        elif text.strip() or (unit == "document" and lines):
            first = first if lines else where
            lines.append(text)
        elif lines:
            yield first, {"text": "\n".join(lines)}
            lines = []
    if lines:
        yield first, {"text": "\n".join(lines).rstrip("\n")}


def check_text(row: Row) -> Iterator[str]:
    """Yield a problem if column `text` of a row is not a string."""
    if not isinstance(row["text"], str):
        yield f"text is {row['text']!r}; must be a string"


def load_corpus(args: CorpusArguments) -> DatasetDict:
    """Load the texts of a run. Blank texts are dropped and counted on the terminal.

    Returns:
        The splits train, validation and, if given, test, with columns `text` and `id`, and those of `load_splits`.

    Raises:
        InputError: rows are invalid, with file and line, or a split has only blank texts.
    """
    if not (args.train_file or args.dataset_name):
        data = python_documentation()
        for split, limit in (("train", args.max_train_samples), ("validation", args.max_eval_samples)):
            if limit is not None:
                data[split] = data[split].select(sample([None] * len(data[split]), limit))
        if args.replay_file is not None:
            lists = {split: rows.to_list() for split, rows in data.items()}
            lists[OLD] = load_texts(args.replay_file, args).to_list()
            data = DatasetDict({split: Dataset.from_list(rows) for split, rows in with_old(lists).items()})
        return data
    read = partial(read_texts, unit=args.text_unit, args=args)
    data = load_splits(args, {"text": args.text_column_name}, check_text, read=read, carve_by="text")
    for split, rows in data.items():
        data[split] = _without_blank(rows, split)
    return data


def load_texts(path: str, args: CorpusArguments) -> Dataset:
    """Load the texts of one more file, folder or pattern; columns and errors as for `load_corpus`."""
    problems = Problems(args.skip_bad_rows)
    source = read_texts(path, args.text_unit, args)
    columns = {"text": args.text_column_name}
    texts = accepted(checked(source, columns, check_text, (), args.max_chars), problems)
    if not texts and not problems.count:
        problems.add(path, "contains no rows; add some")
    problems.check()
    rows = Dataset.from_list(texts)
    return _without_blank(rows, path)


def _without_blank(rows: Dataset, name: str) -> Dataset:
    texts = rows["text"][:]
    kept = [i for i, text in enumerate(texts) if text.strip()]
    if len(kept) == len(texts):
        return rows
    left = rows.select(kept)
    check_left(groups_of(rows), groups_of(left), name, "every text is blank; give texts")
    tell(f"{name}: dropped {len(texts) - len(kept)} blank texts of {len(texts)}")
    return left


def check_left(before: Groups, after: Groups, split: str, problem: str) -> None:
    """Raise `InputError` if no new text of a split is left, or no old one."""
    left = {values.get(OLD, False) for values, rows in after if len(rows)}
    for old in {values.get(OLD, False) for values, _ in before} - left:
        raise InputError(f"{'--replay_file' if old else split}: {problem}")
