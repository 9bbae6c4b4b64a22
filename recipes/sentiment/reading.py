"""Read rows from tables, fastText files, two parallel files, and a folder with a folder for each class."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from common.args import FileArguments
from common.data import READERS, TABLES, Located, Row, Source, read_file
from common.data.source import Line
from common.errors import InputError, brief, tell

#: keys of a task in the JSON export of Label Studio
TASK = ("data", "annotations", "completions", "predictions", "drafts", "meta")
PLAIN = (".txt", ".text")
#: begin of a label in a file of fastText: `__label__good __label__short The text`
FASTTEXT = "__label__"
#: folder of texts without a label in the IMDb reviews of Maas et al. 2011
WITHOUT_LABELS = "unsup"


def read_rows(
    path: str | Path, args: FileArguments, columns: tuple[str, str], labels: str | None = None, predicting: bool = False
) -> Iterator[Located]:
    """Yield the rows of a table, of a folder of classes, or of a text file with its file of labels.

    Args:
        path: the table, folder or text file.
        args: how to read files.
        columns: names of the text and the label in the rows of folders and parallel files.
        labels: file with a label a line; None for other files.
        predicting: a text file needs no labels.

    Raises:
        InputError: the file cannot be read, or is not parallel to its labels.
    """
    source = Source(Path(path), args)
    if source.path.is_dir():
        return _read_folder(source.path, args, columns)
    if labels is not None:
        return _read_parallel(source, Source(Path(labels), args), columns)
    if source.ending in PLAIN and next(iter(source.lines()), Line("", "")).text.startswith(FASTTEXT):
        return _read_fasttext(source, columns)
    if source.ending in PLAIN and not predicting:
        raise InputError(
            f"{path}: plain text has no labels; give --label_file with a label a line; end the name of a table in one "
            f"of: {' '.join(TABLES)}"
        )
    return _without_tasks(read_file(path, READERS, args), columns)


def _without_tasks(rows: Iterator[Located], columns: tuple[str, str]) -> Iterator[Located]:
    """Yield the rows, with the text and the labels of a task of Label Studio in `columns`."""
    for where, row in rows:
        if isinstance(row, dict) and isinstance(row.get("data"), dict) and columns[0] not in row:
            data = row["data"]
            names = [name for name in data if name in (columns[0], "text")] or list(data)
            if len(names) == 1:
                others = {name: value for name, value in (row | data).items() if name not in (*TASK, *names)}
                row = others | {columns[0]: data[names[0]], columns[1]: _choices(row)}
        elif isinstance(row, dict) and isinstance(row.get(columns[1]), dict) and "choices" in row[columns[1]]:
            row = row | {columns[1]: row[columns[1]]["choices"]}  # JSON-MIN of Label Studio
        yield where, row


def _choices(task: Row) -> list[str] | None:
    """Return the labels of a task by its first annotation that is not cancelled; None without labels."""
    annotations = task.get("annotations") or task.get("completions") or []
    kept = [one for one in annotations if isinstance(one, dict) and not one.get("was_cancelled")]
    results = kept[0].get("result") or [] if kept else []
    chosen = [choice for one in results for choice in one.get("value", {}).get("choices", [])]
    return list(dict.fromkeys(chosen)) or None


def _read_fasttext(source: Source, columns: tuple[str, str]) -> Iterator[Located]:
    """Yield a row for each line of labels and a text. With one label in each line, the labels are no lists."""
    single = all(len(_fasttext_line(line.text)[0]) < 2 for line in source.lines())
    for where, text, problem in source.lines():
        if problem:
            yield where, problem
        elif text.strip():
            labels, rest = _fasttext_line(text)
            if labels:
                yield where, {columns[0]: rest, columns[1]: labels[0] if single else labels}
            else:
                yield where, f"does not begin with {FASTTEXT} as the first line does; correct the line"


def _fasttext_line(line: str) -> tuple[list[str], str]:
    """Return the labels at the begin of a line, and its text."""
    labels, rest = [], line.strip()
    while rest.startswith(FASTTEXT):
        label, *after = rest.split(maxsplit=1)
        labels.append(label.removeprefix(FASTTEXT))
        rest = "".join(after)
    return labels, rest


def _read_parallel(texts: Source, labels: Source, columns: tuple[str, str]) -> Iterator[Located]:
    ended = Line("", "")
    for text, label in zip_longest(texts.lines(), labels.lines(), fillvalue=ended):
        if text.problem or label.problem:
            yield (text.where, text.problem) if text.problem else (label.where, label.problem or "")
        elif (text is ended and label.text.strip()) or (label is ended and text.text.strip()):
            longer, shorter = (labels, texts) if text is ended else (texts, labels)
            where = label.where if text is ended else text.where
            raise InputError(f"{where}: {shorter.path} has no line for this line of {longer.path}; make them parallel")
        elif text.text.strip() or label.text.strip():
            yield text.where, {columns[0]: text.text, columns[1]: label.text.strip()}


def check_texts(row: Row) -> Iterator[str]:
    """Yield a message for each text of a row that is missing or blank."""
    for name in ("text", "text_pair"):
        if name in row and (not isinstance(row[name], str) or not row[name].strip()):
            yield f"{name} is {brief(row[name])}; needed: a non-blank text"


def _read_folder(folder: Path, args: FileArguments, columns: tuple[str, str]) -> Iterator[Located]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise InputError(f"{folder}: has no folder for each class; name a file, or a folder such as with pos and neg")
    for of_class in classes:
        if of_class.name == WITHOUT_LABELS:
            tell(f"{of_class}: left out, as its texts have no label")
            continue
        files = sorted(path for path in of_class.iterdir() if path.is_file() and path.suffix.lower() in (*PLAIN, ""))
        files = [path for path in files if not path.name.startswith(".")]
        if not files:
            inner = sorted(path.name for path in of_class.iterdir() if path.is_dir())
            as_split = f"name it as a split, such as --train_file {of_class}"
            remedy = as_split if inner else "add some, or remove the folder"
            raise InputError(f"{of_class}: no .txt file in this folder of a class; {remedy}")
        for path in files:
            text = Source(path, args).text()
            yield str(path), {columns[0]: text, columns[1]: of_class.name, "id": f"{of_class.name}/{path.name}"}
