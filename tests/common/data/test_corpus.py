"""Test texts of several domains, and old texts: rows of one group each, and problems that are named."""

import numpy as np
import pytest

from common.args import TrainingArguments
from common.data.blocks import rows_of
from common.data.corpus import CorpusArguments, load_corpus
from common.data.domains import groups_of
from common.data.stream import check_streaming
from common.errors import InputError
from tests.conftest import write_jsonl

WORDS = {"a": 20, "b": 30}


def corpus_arguments(folder, texts, old=None, **settings) -> CorpusArguments:
    """Return the arguments for texts of (domain, text), and for old ones."""
    files = {"train_file": texts, "validation_file": texts} | ({"replay_file": old} if old else {})
    for name, some in files.items():
        rows = [{"text": text, "topic": topic} for topic, text in some]
        files[name] = write_jsonl(folder / f"{name}.jsonl", rows)
    return CorpusArguments(**files | settings)


def encode(rows: dict[str, list]) -> list[tuple[list[int], list[int]]]:
    """Return a token for each word, whose id tells the domain of the text."""
    return [([WORDS[text[0]]] * len(text.split()), [1] * len(text.split())) for text in rows["text"]]


def test_a_row_has_texts_of_one_domain_and_of_old_or_new_ones(tmp_path):
    texts = [("a", "a " * n) for n in range(3, 9)] + [("b", "b " * n) for n in range(3, 7)]
    args = corpus_arguments(tmp_path, texts[::-1], [("a", "a " * 5), ("b", "b " * 40)], domain_column="topic")
    data = load_corpus(args)
    assert len(data["train"]) == 12
    args.max_seq_length = 16
    rows = rows_of(data, encode, ([1], [2]), args)
    for row in rows["train"]:
        inside = row["input_ids"][row["marks"] == 1]
        assert set(inside.tolist()) == {WORDS[str(row["domain"])]}
    kept = [
        (v["domain"], v["old"], sum(sum(row["marks"]) for row in some))
        for v, some in groups_of(rows["train"].with_format(None))
    ]
    assert kept == [("a", False, 33), ("a", True, 5), ("b", False, 18), ("b", True, 40)]
    assert rows["train"]["row"][:].tolist() == list(range(len(rows["train"])))
    assert not np.asarray(rows["validation"]["old"][:]).any()
    plain = rows_of(load_corpus(corpus_arguments(tmp_path, texts)), encode, ([1], [2]), args)
    assert plain["train"].column_names == ["input_ids", "marks", "lengths", "row"]


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ([("a", " ")], "--replay_file: every text is blank; give texts"),
        ([("a", "a")], "--replay_file: every text has fewer than 3 tokens; give longer texts"),
    ],
)
def test_old_texts_of_which_none_is_left_are_an_error(tmp_path, old, message):
    args = corpus_arguments(tmp_path, [("a", "a a a a")], old)
    with pytest.raises(InputError, match=message):
        rows_of(load_corpus(args), encode, ([1], [2]), args)


def test_texts_without_columns_have_no_domain(tmp_path):
    (tmp_path / "old.txt").write_text("a text\n")
    named = "--domain_column topic: .*old.txt has no columns; convert it to .jsonl or .csv, with this column"
    for settings in ({"replay_file": str(tmp_path / "old.txt")}, {"test_file": str(tmp_path / "*.txt")}):
        with pytest.raises(InputError, match=named):
            corpus_arguments(tmp_path, [("a", "a a a a")], domain_column="topic", **settings)
    with pytest.raises(
        InputError, match="--domain_column topic: the documentation of Python has no domains; give --tr"
    ):
        CorpusArguments(domain_column="topic")
    args = corpus_arguments(tmp_path, [("a", "a a a a")], domain_column="source")
    with pytest.raises(InputError, match=r"train_file.jsonl:1: no column source; .* name yours with --domain_column"):
        load_corpus(args)
    for name in ("domain_column", "replay_file"):
        args = corpus_arguments(tmp_path, [("a", "a a a a")], streaming=True)
        setattr(args, name, "x")
        with pytest.raises(InputError, match=f"--{name}: needs all texts in memory; leave --streaming out"):
            check_streaming(args, TrainingArguments(output_dir="unused", max_steps=1))


def test_a_carved_validation_split_shares_no_text(tmp_path):
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": f"line {n // 3}"} for n in range(60)])
    data = load_corpus(CorpusArguments(train_file=file))
    assert len(data["validation"]) == 6
    assert not {*data["validation"]["text"]} & {*data["train"]["text"]}


def test_rows_with_one_text_are_split_with_a_warning(tmp_path, capsys):
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": "again"}] * 20)
    data = load_corpus(CorpusArguments(train_file=file))
    assert [len(data[split]) for split in ("train", "validation")] == [18, 2]
    assert "t.jsonl: all training rows have the same text, question or context" in capsys.readouterr().err


def test_a_text_of_most_rows_stays_in_train(tmp_path):
    often, rare = [{"text": "the same line"}] * 90, [{"text": f"line {n}"} for n in range(10)]
    for place in range(10):
        file = write_jsonl(tmp_path / "t.jsonl", rare[:place] + often + rare[place:])
        data = load_corpus(CorpusArguments(train_file=file))
        assert [len(data[split]) for split in ("train", "validation")] == [99, 1]
