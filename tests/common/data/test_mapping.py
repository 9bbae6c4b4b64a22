"""Test that rows are mapped without hashing the function, by `map_rows` and in the whole project."""

import ast

from datasets import Dataset, DatasetDict
from datasets.fingerprint import Hasher

from common.data.mapping import map_rows
from tests.conftest import ROOT

ROWS = DatasetDict({"train": Dataset.from_dict({"n": [1, 2, 3]}), "test": Dataset.from_dict({"n": [4]})})


def double(batch: dict[str, list], times: int) -> dict[str, list]:
    """Return a batch of products."""
    return {"product": [times * n for n in batch["n"]]}


def test_rows_of_all_splits_are_mapped_without_a_hash_of_the_function(monkeypatch):
    hashed, update = [], Hasher.update
    monkeypatch.setattr(Hasher, "update", lambda self, value: (hashed.append(value), update(self, value)))
    mapped = map_rows(ROWS, double, batched=True, remove_columns="n", fn_kwargs={"times": 2})
    assert {split: rows["product"][:] for split, rows in mapped.items()} == {"train": [2, 4, 6], "test": [8]}
    assert map_rows(ROWS["test"], double, batched=True, fn_kwargs={"times": 3})["product"][:] == [12]
    assert not any(map(callable, hashed))


def test_different_functions_give_different_fingerprints():
    one, other = (map_rows(ROWS["train"], lambda row, k=k: {"n": row["n"] + k}) for k in (1, 2))
    assert one._fingerprint != other._fingerprint


def test_no_module_lets_the_library_hash_a_function():
    hashing = []
    for path in (path for top in ("common", "recipes") for path in (ROOT / top).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "map"):
                continue
            if ast.unparse(call.func.value) != "pool" and "new_fingerprint" not in {k.arg for k in call.keywords}:
                hashing.append(f"{path}:{call.lineno}")
    assert not hashing, f"rows.map hashes its function, which takes seconds; use map_rows: {hashing}"
