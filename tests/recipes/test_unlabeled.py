"""Test rows without a gold value in every recipe: an error, dropped on request, and predicted as a test split."""

import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from common.errors import InputError
from recipes.ner import train as ner
from recipes.ner.arguments import NerDataArguments
from recipes.ner.reading import load_tagged
from tests.conftest import read_jsonl, write_jsonl

SHORT = [
    "--max_seq_length",
    "64",
    "--max_steps",
    "1",
    "--eval_strategy",
    "no",
    "--save_strategy",
    "no",
    "--disable_tqdm",
    "true",
]
WORDS = [["Ann", "left", str(i)] for i in range(12)]


def tagged(folder: Path, tags: list, **arguments) -> tuple:
    """Load a NER file in which every third row has `tags`, or no tags at all for `...`."""
    rows = [{"tokens": words, "ner_tags": ["B-PER", "O", "O"]} for words in WORDS]
    for row in rows[::3]:
        row |= {"ner_tags": tags}
        if tags is ...:
            del row["ner_tags"]
    file = write_jsonl(folder / "a.jsonl", rows)
    return load_tagged(NerDataArguments(train_file=file, validation_file=file, **arguments))


@pytest.mark.parametrize("tags", [None, [], [None] * 3, [-100] * 3, ["O", -1, "O"], ["-"] * 3, ...])
def test_sentences_without_tags_are_an_error_or_dropped(tmp_path, capsys, tags):
    with pytest.raises(InputError, match=r"a.jsonl:1: no .*ner_tags.* --drop_unlabeled true"):
        tagged(tmp_path, tags)
    data, unlabeled, _ = tagged(tmp_path, tags, drop_unlabeled=True)
    assert data["train"]["tokens"][:] == [words for i, words in enumerate(WORDS) if i % 3]
    assert unlabeled is None
    assert "a.jsonl: dropped 4 of 12 rows without a list of tags" in capsys.readouterr().out


def test_a_hub_test_split_without_tags_is_tagged_and_not_scored(tiny, tmp_path):
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-PER"]))})
    splits = {}
    for split in ("train", "validation", "test"):
        tags = [[-100] * 3 if split == "test" else [1, 0, 0] for _ in WORDS]
        splits[split] = Dataset.from_dict({"tokens": WORDS, "ner_tags": tags}, features)
    DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    more = ["--model_name_or_path", tiny, "--output_dir", str(tmp_path / "out"), *SHORT]
    metrics = ner.main(["--dataset_name", str(tmp_path / "saved"), *more])
    assert not [name for name in metrics if name.startswith("test_")]
    found = read_jsonl(tmp_path / "out" / "predictions_test.jsonl")
    assert [row["tokens"] for row in found] == WORDS
    assert all("entities" in row and "ner_tags" not in row for row in found)
    assert "predictions_test.jsonl" in json.loads((tmp_path / "out" / "run.json").read_text())["files"]


def test_splits_without_entities_and_rare_types_are_warned_of(tmp_path, capsys):
    none = write_jsonl(tmp_path / "none.jsonl", [{"tokens": words, "ner_tags": ["O"] * 3} for words in WORDS])
    rare = [{"tokens": words, "ner_tags": ["O", "O", "B-PER" if i else "B-Per"]} for i, words in enumerate(WORDS)]
    load_tagged(NerDataArguments(train_file=write_jsonl(tmp_path / "a.jsonl", rare), validation_file=none))
    warnings = capsys.readouterr().err
    assert "validation: none of the 12 rows has an entity" in warnings
    assert "entity types with fewer than 5 training rows, which are hard to learn: Per (1)" in warnings
    assert "'PER' (11 rows) and 'Per' (1 rows)" in warnings
