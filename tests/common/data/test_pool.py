"""Test unlabelled rows: which are read, which are dropped and counted, and what is refused."""

import json

import pytest
from datasets import Dataset, DatasetDict

from common.data.files import read_file
from common.data.pool import PoolArguments, key_of, read_pool
from common.data.tables import missing_columns
from common.errors import InputError
from tests.conftest import write_jsonl

DATA = DatasetDict({
    split: Dataset.from_list([{"text": text, "label": "a", "id": str(i)} for i, text in enumerate(texts)])
    for split, texts in {
        "train": ["one two", "both"], "validation": ["three"], "test": ["Four five", "six", "both"],
    }.items()
})  # fmt: skip


def read(*files: str, **more) -> Dataset:
    args = PoolArguments(semi="pseudo", unlabeled_file=list(files), **more)

    def convert(row):
        return {"text": row["text"], "label": "a"} if "text" in row else missing_columns(row, ["text"])

    def check(row):
        if not str(row["text"] or "").strip():
            yield "text is blank; needed: a text"

    return read_pool(
        args, lambda path: read_file(path, args=args), convert, check, lambda row: key_of(row["text"]), DATA
    )


def test_rows_of_several_formats_are_read_in_the_columns_of_training(tmp_path):
    lines = write_jsonl(tmp_path / "a.jsonl", [{"text": "new", "label": "ignored", "more": 1}, {"text": "newer"}])
    (tmp_path / "b.txt").write_text("newest\n\nlast\n")
    (tmp_path / "c.csv").write_text("n,text\n1,cell\n")
    rows = read(lines, str(tmp_path / "b.txt"), str(tmp_path / "c.csv"))
    assert rows["text"][:] == ["new", "newer", "newest", "last", "cell"]
    assert rows.features == DATA["train"].features
    assert set(rows["label"]) == {"a"}
    assert len(set(rows["id"])) == 5
    few = read(lines, str(tmp_path / "b.txt"), max_unlabeled_samples=2)
    assert len(few) == 2
    assert set(few["text"]) < set(rows["text"])


def test_rows_that_equal_labelled_rows_are_dropped_and_counted(tmp_path, capsys):
    texts = ["One  two", "three", "four\tfive", "SIX", "six", "both", "new"]
    rows = read(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts]))
    assert rows["text"][:] == ["new"]
    printed = capsys.readouterr()
    assert "dropped 2 rows that equal a training row" in printed.out  # both is of train and test
    assert "dropped 1 rows that equal a validation row" in printed.err
    assert "dropped 3 rows that equal a test row" in printed.err
    assert "1 of 7 rows are used" in printed.out
    with pytest.raises(InputError, match="all 1 rows are dropped"):
        read(write_jsonl(tmp_path / "b.jsonl", [{"text": "six"}]))


def test_bad_files_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.txt").write_text("\n \n")
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "new"}])
    for name in ("empty.jsonl", "blank.txt"):
        with pytest.raises(InputError, match=rf"{name}: contains no rows; add some"):
            read(good, str(tmp_path / name))
    (tmp_path / "other.csv").write_text("review,n\nnew,1\nnewer,2\n")
    with pytest.raises(InputError, match=r"other\.csv:1: no column text; columns here: review, n") as error:
        read(str(tmp_path / "other.csv"))
    assert len(str(error.value).splitlines()) == 1
    file = write_jsonl(tmp_path / "some.jsonl", [{"text": "new"}, {"text": " "}, {"text": None}, {"n": 1}])
    with pytest.raises(InputError) as error:
        read(file)
    assert [line.split(": ")[0][-1] for line in str(error.value).splitlines()] == ["2", "3", "4"]
    assert read(file, skip_bad_rows=3)["text"][:] == ["new"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"semi": "pseudo"}, "--semi pseudo: needs rows without labels; add --unlabeled_file"),
        ({"unlabeled_file": ["FILE"]}, "--unlabeled_file: has no effect without --semi; add --semi pseudo"),
        ({"semi_weight": 1.0}, "--semi_weight: needs --semi and --unlabeled_file"),
        ({"semi": "pseudo", "unlabeled_file": ["FILE"], "semi_noise": 0.1}, "--semi_noise: has no effect with --semi"),
        ({"semi": "fixmatch", "unlabeled_file": ["FILE"], "semi_rounds": 2}, "--semi_rounds: has no effect with"),
        ({"semi": "pseudo", "unlabeled_file": ["FILE"], "semi_threshold": 1.0}, "--semi_threshold 1.0: must be at"),
        ({"semi": "pseudo", "unlabeled_file": ["FILE"], "semi_weight": 0.0}, "--semi_weight 0.0: must be above 0"),
        ({"semi": "pseudo", "unlabeled_file": ["FILE"], "semi_rounds": 0}, "--semi_rounds 0: must be at least 1"),
        ({"semi": "pseudo", "unlabeled_file": ["FILEs"]}, "--unlabeled_file .*: no such file"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(tmp_path, given, message):
    (tmp_path / "pool.txt").write_text("text\n")
    text = json.dumps(given).replace("FILE", str(tmp_path / "pool.txt"))
    with pytest.raises(InputError, match=message):
        PoolArguments(**json.loads(text))


def test_the_files_are_in_the_record_of_the_run(tmp_path):
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for name in names:
        (tmp_path / name).write_text("text\n")
    args = PoolArguments(semi="noisy_student", unlabeled_file=names)
    assert args.files() == {"unlabeled_file_1": names[0], "unlabeled_file_2": names[1]}
    assert (args.semi_rounds, args.semi_noise) == (2, 0.15)
    assert PoolArguments(semi="pseudo", unlabeled_file=names[:1]).files() == {"unlabeled_file": names[0]}
