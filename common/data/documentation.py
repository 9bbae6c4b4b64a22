"""Read the documentation of the installed Python, the texts of language models without files."""

import ast
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict

from common.data.source import Row
from common.errors import InputError, tell

#: words of the shortest docstring that is read
SHORTEST_DOCSTRING = 3


def python_documentation() -> DatasetDict:
    """Read the topics of Python's reference and the docstrings of its standard library.

    A hash of the name puts about a tenth of the topics and modules into validation. All texts of a module are in one
    split. The source files are parsed, not imported.

    Returns:
        The splits train and validation, with columns `text` and `id` (name of the module or topic).

    Raises:
        InputError: this Python has too few source files of its standard library.
    """
    from pydoc_data.topics import topics  # imported here, because it takes half a megabyte

    texts = {f"topics/{name}": [text.strip()] for name, text in topics.items()}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or {"test", "tests", "idlelib", "lib2to3"} & set(parts):
            continue
        texts.setdefault(parts[0], []).extend(_docstrings(path))
    rows: dict[str, list[Row]] = {"train": [], "validation": []}
    for name, docs in texts.items():
        held_out = hashlib.sha256(name.encode()).digest()[0] < 20
        rows["validation" if held_out else "train"] += [{"text": text, "id": name} for text in dict.fromkeys(docs)]
    if not all(rows.values()) or len(rows["train"]) < 1000:
        raise InputError(
            "--train_file: not given, and this Python lacks the source files of its standard library; give --train_file"
        )
    tell(f"no --train_file given: training on the documentation of Python {sys.version.split()[0]}")
    return DatasetDict({split: Dataset.from_list(texts_of) for split, texts_of in rows.items()})


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # some test files are invalid on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            if len(text.split()) >= SHORTEST_DOCSTRING:
                yield text
