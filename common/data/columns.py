"""Save the names and kinds of the training columns, and find these columns in the rows of predict."""

from typing import Any

from datasets import Dataset, List, Value
from transformers import PretrainedConfig

from common.data.source import Row
from common.data.tables import MissingColumn, header_hint

#: name of the entry in the saved configuration: recipe's name of a column -> its name and kind in the user's data
SAVED = "columns"


def described(names: dict[str, str], rows: Dataset) -> dict[str, dict[str, str]]:
    """Return the entry of the saved configuration.

    Args:
        names: the recipe's name of a column -> its name in the user's data.
        rows: rows with the columns of the recipe, from which their kinds are read.
    """
    return {ours: {"name": theirs} | _kind(rows.features.get(ours)) for ours, theirs in names.items()}


def _kind(feature: Any) -> dict[str, str]:
    if isinstance(feature, List):
        inner = _kind(feature.feature)
        return {"kind": f"list of {inner['kind']}s"} if inner else {"kind": "list"}
    if isinstance(feature, Value):
        kinds = {"string": "text", "large_string": "text", "int64": "integer", "float64": "number", "bool": "boolean"}
        return {"kind": kinds.get(feature.dtype, feature.dtype)}
    return {"kind": "object"} if feature is not None else {}


class Columns:
    """The columns that predict reads. A row may name them as in the training data, or as documented.

    Attributes:
        names: the recipe's name of a column -> the names to look for, in this order.
        trained: the columns of the training rows; None if the configuration was saved without them.
    """

    def __init__(self, config: PretrainedConfig, **documented: tuple[str, ...]):
        saved = getattr(config, SAVED, None)
        self.trained: set[str] | None = None if saved is None else set(saved)
        self.names = {
            ours: tuple(dict.fromkeys([*([saved[ours]["name"]] if saved and ours in saved else []), *names]))
            for ours, names in documented.items()
        }

    def value(self, row: Row, ours: str) -> Any:
        """Return the value of a column in a row, or None."""
        return next((row[name] for name in self.names[ours] if row.get(name) is not None), None)

    def problem(self, row: Row, ours: str, kind: str = "a text") -> MissingColumn:
        """Return the problem of a row that lacks a column, or has another kind of value in it."""
        named = " or ".join(f'"{name}"' for name in self.names[ours])
        here = ", ".join(map(str, row)) or "none"
        return MissingColumn(f"needs {named} ({kind}); columns here: {here}{header_hint(row, self.names[ours][:1])}")
