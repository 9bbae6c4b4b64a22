"""Test that rows are mapped without hashing the function, as `no_function_is_hashed` in conftest.py asks everywhere."""

from datasets import Dataset
from datasets.fingerprint import Hasher

from common.data.mapping import Splits, map_rows

ROWS = Splits({"train": Dataset.from_dict({"n": [1, 2, 3]}), "test": Dataset.from_dict({"n": [4]})})


def double(batch: dict[str, list], times: int) -> dict[str, list]:
    """Return a batch of products."""
    return {"product": [times * n for n in batch["n"]]}


def test_rows_of_all_splits_are_mapped_without_a_hash_of_the_function(monkeypatch):
    hashed, update = [], Hasher.update
    monkeypatch.setattr(Hasher, "update", lambda self, value: (hashed.append(value), update(self, value)))
    mapped = ROWS.map(double, batched=True, remove_columns="n", fn_kwargs={"times": 2})
    assert isinstance(mapped, Splits)
    assert {split: rows["product"][:] for split, rows in mapped.items()} == {"train": [2, 4, 6], "test": [8]}
    assert map_rows(ROWS["test"], double, batched=True, fn_kwargs={"times": 3})["product"][:] == [12]
    assert not any(map(callable, hashed))


def test_different_functions_give_different_fingerprints():
    one, other = (ROWS.map(lambda row, k=k: {"n": row["n"] + k})["train"] for k in (1, 2))
    assert one._fingerprint != other._fingerprint
