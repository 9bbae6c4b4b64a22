"""Test streamed texts: order of rows, position in checkpoints, errors, and growing batches."""

import itertools
import json
import re
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from transformers import TrainerCallback, trainer

from common.data.blocks import encode
from common.data.corpus import CorpusArguments
from common.data.stream import Shard, TextStream, open_texts
from common.data.tokens import ends_of
from common.errors import InputError
from common.training.order import Repeated, StepBatches
from recipes.clm import train as clm
from recipes.mlm import train as mlm
from recipes.mlm.masking import word_marks
from tests.conftest import write_jsonl
from tests.faults import Job, difference, make_files, make_texts, words
from tests.recipes.test_mlm import TEXTS, settings

LENGTH = 32


@pytest.fixture
def folder(tmp_path):
    """Write three files of different lengths with distinct lines."""
    found = tmp_path / "texts"
    found.mkdir()
    for i in range(3):
        lines = [f"w{i} number {j} is here and {TEXTS[j]}" for j in range(12 + 7 * i)]
        (found / f"{i}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_jsonl(tmp_path / "held.jsonl", [{"text": text} for text in TEXTS[100:120]])
    return found


def arguments(path, **more) -> CorpusArguments:
    given = {"streaming": True, "shuffle_buffer": 8, "max_seq_length": LENGTH, "train_file": str(path)}
    return CorpusArguments(**(given | more))


@pytest.fixture
def stream(tokenizer, tmp_path):
    """Return a function that opens a stream as one of several processes."""
    opened = []

    def go(path, processes=1, rank=0, workers=0, texts=None, **more) -> TextStream:
        args = arguments(path, validation_file=str(tmp_path / "held.jsonl"), **more)
        training = SimpleNamespace(
            seed=1, data_seed=None, world_size=processes, process_index=rank, dataloader_num_workers=workers
        )
        encoded = partial(encode, tokenizer=tokenizer, marks=word_marks)
        found = TextStream(texts or open_texts(args), encoded, ends_of(tokenizer), 3, args, training)
        found.ahead = 1000
        opened.append(found)
        return found

    yield go
    for one in opened:
        one.close()


def read(stream: TextStream, until: int, start: int = 0) -> dict[int, list[int]]:
    """Return the rows of a process below `until`, by row number."""
    numbers = list(range(start + stream.rank, until, stream.processes))
    return {row["row"]: row["input_ids"].tolist() for row in stream.__getitems__(numbers)}


def sub_tokens(rows: dict[int, list[int]], tokenizer) -> list[int]:
    special = set(tokenizer.all_special_ids)
    return [i for _, row in sorted(rows.items()) for i in row if i not in special]


# Order


@pytest.mark.parametrize("shares", [2, 4])  # fewer processes than files, and more
def test_rows_do_not_depend_on_processes_and_workers(folder, stream, shares):
    one = read(stream(folder, stream_shares=shares), 90)
    assert read(stream(folder, workers=2, stream_shares=shares), 90) == one
    halves = [read(stream(folder, processes=2, rank=rank, stream_shares=shares), 90) for rank in (0, 1)]
    assert not halves[0].keys() & halves[1].keys()
    assert halves[0] | halves[1] == one


def test_a_pass_has_every_text_once_in_an_order_of_its_own(folder, stream, tokenizer):
    texts = [line for path in sorted(folder.iterdir()) for line in path.read_text(encoding="utf-8").splitlines()]
    ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts}
    found = sub_tokens(read(stream(folder), 300), tokenizer)
    total = sum(map(len, ids.values()))
    for start in (0, total):  # two passes: packing continues from the first pass to the second
        part = found[start : start + total]
        assert sorted(part) == sorted(i for row in ids.values() for i in row)
    assert found[:total] != found[total : 2 * total]
    assert found[:total] != [i for row in ids.values() for i in row]
    rows = read(stream(folder), 60)
    assert all(len(row) > LENGTH - 10 for row in rows.values())


@pytest.mark.parametrize("shares", [2, 4])
def test_a_stream_goes_on_from_any_row(folder, stream, tmp_path, shares):
    whole = read(stream(folder, stream_shares=shares), 120)
    for stop in (0, 2, 6, 40, 64, 98):
        first = stream(folder, stream_shares=shares)
        read(first, stop + 10)  # a data loader reads ahead
        first.save(tmp_path, stop)
        rest = {number: row for number, row in whole.items() if number >= stop}
        again = stream(folder, stream_shares=shares)
        again.go_to(str(tmp_path))
        assert read(again, 120, stop) == rest
    for path in tmp_path.glob("stream_*.json"):
        assert path.stat().st_size < 4000
    halves = [stream(folder, processes=2, rank=rank, stream_shares=shares) for rank in (0, 1)]
    for half in halves:
        half.go_to(str(tmp_path))
    assert read(halves[0], 120, stop) | read(halves[1], 120, stop) == rest
    with pytest.raises(InputError, match=f"its run had {shares} shares; give --stream_shares {shares}"):
        stream(folder, stream_shares=3).go_to(str(tmp_path))


def test_no_more_is_read_than_is_shuffled_together(folder, stream):
    count = 0

    def endless():
        nonlocal count
        for count in itertools.count(1):
            yield f"endless, row {count}", {"text": TEXTS[count % 100]}

    texts = open_texts(arguments(folder, max_eval_samples=5))
    texts.shards = [Shard("endless", endless)]
    found = stream(folder, texts=texts)
    found.ahead = 10
    read(found, 400)
    assert 200 < count < 1000
    assert len(found._windows[0]) < 20  # the stream drops past windows


# Positions


def test_files_of_all_kinds_and_hub_data_are_streamed(folder, stream, tokenizer, tmp_path):
    lines = (folder / "2.txt").read_text(encoding="utf-8").splitlines()
    write_jsonl(tmp_path / "a.jsonl", [{"text": line} for line in lines])
    Dataset.from_dict({"text": lines}).to_parquet(tmp_path / "a.parquet")
    expected = read(stream(folder / "2.txt"), 40)
    assert read(stream(tmp_path / "a.jsonl"), 40) == expected
    assert read(stream(tmp_path / "a.parquet"), 40) == expected
    (tmp_path / "hub").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "hub" / "train.jsonl")
    args = arguments(folder, train_file=None, dataset_name=str(tmp_path / "hub"), max_eval_samples=5)
    texts = open_texts(args)
    assert texts.splits["validation"]["text"][:] == lines[:5]
    kept = sub_tokens(read(stream(folder, texts=texts), 60), tokenizer)
    total = sum(len(tokenizer(line, add_special_tokens=False)["input_ids"]) for line in lines[5:])
    assert sorted(kept[:total]) == sorted(
        i for line in lines[5:] for i in tokenizer(line, add_special_tokens=False)["input_ids"]
    )
    opened = stream(folder, texts=texts)
    (tmp_path / "hub" / "train.jsonl").unlink()
    with pytest.raises(InputError, match=r"hub \[train\], part 0, row 1: the stream ended early"):
        read(opened, 4)


def test_each_process_has_the_splits_of_a_hub_data_set_in_one_order(folder):
    rows = Dataset.from_dict({"text": (folder / "2.txt").read_text(encoding="utf-8").splitlines()})
    DatasetDict(dict.fromkeys(("test", "train", "validation"), rows)).save_to_disk(str(folder / "saved"))
    args = arguments(folder, train_file=None, dataset_name=str(folder / "saved"))
    assert list(open_texts(args).splits) == ["validation", "test"]  # not in the order of a set, which differs


def test_held_out_texts_are_the_first_and_are_not_trained_on(folder, capsys):
    texts = open_texts(arguments(folder, max_eval_samples=15))
    assert "the first 15 texts of the stream are held out" in capsys.readouterr().out
    assert [shard.held_out for shard in texts.shards] == [3, 0]  # no row of the first file is left
    args = arguments(folder)
    held = set(texts.splits["validation"]["text"])
    rest = {text for shard in texts.shards for text in itertools.islice(shard.texts(args), shard.held_out, None)}
    assert len(held) == 15
    assert len(rest) == 12 + 19 + 26 - 15
    assert not held & rest
    assert set(texts.sample(args)["text"]) == rest


def test_a_stream_that_validation_would_take_whole_is_refused(folder):
    with pytest.raises(InputError, match="all 57 texts of the stream would be held out for validation"):
        open_texts(arguments(folder))
    assert len(open_texts(arguments(folder, max_eval_samples=56)).splits["validation"]) == 56


# Errors


def test_a_shard_that_vanishes_or_is_cut_off_is_told(folder, stream):
    for damage, message in (
        (lambda path: path.unlink(), "1.txt: no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "1.txt: changed to 200 bytes during the run, from"),
    ):
        before = (folder / "1.txt").read_bytes()
        found = stream(folder)
        damage(folder / "1.txt")
        with pytest.raises(InputError, match=re.escape(message)):
            read(found, 200)
        (folder / "1.txt").write_bytes(before)
    args = arguments(folder, max_eval_samples=5)
    shard = next(s for s in open_texts(args).shards if s.name.endswith("1.txt"))
    texts = shard.texts(args)
    next(texts)
    (folder / "1.txt").unlink()  # while it is open
    with pytest.raises(InputError, match=r"1\.txt: deleted during the run, from [\d,]+ bytes"):
        list(texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("1.txt", b"", "1.txt: contains no rows"),
        ("1.txt", bytes(range(256)) * 9, "1.txt:1: contains zero bytes"),
        ("1.txt", b"\xff\xfe bad\n", "1.txt: not UTF-16 text, although its byte order mark says so"),
        ("1.jsonl", b'{"txt": "a"}\n', "1.jsonl:1: no column text; columns here: txt"),
        ("1.parquet", b"PAR1 and no more", "1.parquet: not a Parquet file"),
        ("1.json", b"[]", "1.json: a .json file cannot be streamed; convert it to .jsonl"),
    ],
)
def test_the_beginning_of_each_file_is_looked_at_before_training(folder, name, content, message):
    (folder / "1.txt").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        open_texts(arguments(folder))


def test_texts_that_are_too_short_or_too_few_end_the_run(folder, stream):
    (folder / "short.txt").write_text("a\n" * 20)
    with pytest.raises(InputError, match="share 1 of 1 has no text of 3 or more tokens"):
        read(stream(folder / "short.txt"), 1)
    (folder / "two.txt").write_text("one text here\nand another one\n")
    with pytest.raises(InputError, match="share 3 of 3 has no text"):
        read(stream(folder / "two.txt", stream_shares=3), 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--streaming", "true"), "--streaming: the length of a stream is unknown; give --max_steps"),
        (("--streaming", "true", "--max_steps", "2", "--objective", "mlm+nsp"), "--objective mlm+nsp: pairs"),
        (("--stream_shares", "2"), "--stream_shares: needs --streaming true"),
        (("--shuffle_buffer", "0"), "--shuffle_buffer 0: must be at least 1"),
        (("--batch_ramp_start", "2"), "--batch_ramp_start and --batch_ramp_steps: give both"),
        (("--batch_ramp_start", "8", "--batch_ramp_steps", "3"), "must be at least 1 (processes times accumulation)"),
    ],
)
def test_wrong_arguments_are_told(folder, tiny, tmp_path, words, message):
    with pytest.raises(InputError, match=re.escape(message)):
        mlm.main(["--train_file", str(folder), *settings(tiny, tmp_path), *words])


def test_a_bad_line_far_in_loses_nothing(folder, tiny, tmp_path, capsys):
    file = folder / "0.txt"
    lines = [f"line {i}: {text}".encode() for i, text in enumerate(TEXTS[:60])]
    good, bad = b"\n".join(lines), b"\n".join([*lines[:40], b"\xff" + lines[40][1:], *lines[41:]])
    words = [
        "--train_file", str(file), "--validation_file", str(tmp_path / "held.jsonl"), "--streaming", "true",
        "--max_steps", "24", "--shuffle_buffer", "8", *settings(tiny, tmp_path), "--max_seq_length", "64",
        "--per_device_train_batch_size", "2",
    ]  # fmt: skip
    words[words.index("--overwrite") + 1] = "false"
    file.write_bytes(good)
    words[words.index("--output_dir") + 1] = str(tmp_path / "whole")
    whole = mlm.main(words)
    words[words.index("--output_dir") + 1] = str(tmp_path / "out")
    file.write_bytes(bad)
    with pytest.raises(
        InputError, match=r"0\.txt:41: not UTF-8 text(.|\n)*checkpoint-\d+ is complete; correct the texts"
    ):
        mlm.main(words)
    file.write_bytes(good)
    again = mlm.main([*words, "--resume_from_checkpoint", "true"])
    assert again["after_validation_loss"] == whole["after_validation_loss"]
    folders = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("whole", "out")]
    assert folders[0]["num_input_tokens_seen"] == folders[1]["num_input_tokens_seen"]


# Batches that grow


def test_a_ramp_takes_every_row_once_and_ends_at_the_whole_batch():
    for processes, accumulation in ((1, 1), (2, 1), (1, 2), (2, 2)):
        parts = [list(StepBatches(9, 16, (4, 5), accumulation, processes, rank)) for rank in range(processes)]
        assert all(len(part) == 9 * accumulation for part in parts)
        steps = [
            sorted(i for part in parts for batch in part[s * accumulation : (s + 1) * accumulation] for i in batch)
            for s in range(9)
        ]
        assert [i for step in steps for i in step] == list(range(sum(map(len, steps))))
        assert [len(step) for step in steps][:1] == [4]
        assert [len(step) for step in steps][5:] == [16] * 4
        assert [len(step) for step in steps] == sorted(len(step) for step in steps)
        assert [len(step) for step in steps] == [4, 6, 8, 11, 13, *[16] * 4]  # on any number of processes
    rows = Repeated(Dataset.from_dict({"a": list(range(7))}), seed=3)
    passes = [[row["a"] for row in rows.__getitems__(list(range(k, k + 7)))] for k in (0, 7)]
    assert [sorted(found) for found in passes] == [list(range(7))] * 2
    assert passes[0] != passes[1]
    assert [row["row"] for row in rows.__getitems__([5, 8])] == [5, 8]


class _Batches(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.num_input_tokens_seen)


def test_a_batch_grows_and_its_sub_tokens_are_counted(tiny, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("\n".join(TEXTS[:80]))
    batches = _Batches()
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, batches])
    words = ["--train_file", str(tmp_path / "t.txt"), *settings(tiny, tmp_path), "--optim", "sgd"]
    ramp = ["--batch_ramp_start", "2", "--batch_ramp_steps", "4", "--num_train_epochs", "3"]
    one = mlm.main([*words, *ramp])
    tokens = np.diff([0, *batches.seen])
    assert tokens[0] <= 2 * 64 < tokens[3] < 7 * 64 < tokens[5] <= 8 * 64
    parts = mlm.main([*words, *ramp, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"])
    assert parts["after_validation_loss"] == pytest.approx(one["after_validation_loss"], rel=1e-5)


def test_clm_streams_from_nothing(folder, tmp_path):
    metrics = clm.main([
        "--train_file", str(folder), "--validation_file", str(tmp_path / "held.jsonl"), "--output_dir",
        str(tmp_path / "out"), "--streaming", "true", "--max_steps", "20", "--vocab_size", "400", "--config_overrides",
        "n_layer=1", "--max_seq_length", "64", "--precision", "fp32", "--disable_tqdm", "true",
        "--per_device_train_batch_size", "8", "--learning_rate", "3e-3",
    ])  # fmt: skip
    assert metrics["after_validation_perplexity"] < 0.8 * metrics["before_validation_perplexity"]
    assert "five_grams_validation_bits_per_byte" not in metrics


# Whole runs that are killed


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a model with dropout, and texts."""
    folder = tmp_path_factory.mktemp("files")
    return make_texts(make_files(folder), folder)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(
            {"streaming": True, "shuffle_buffer": 10, "dataloader_num_workers": 2, "masking": "whole_word"},
            marks=pytest.mark.soak,
        ),
        pytest.param(
            {
                "streaming": True,
                "shuffle_buffer": 10,
                "batch_ramp_start": 2,
                "batch_ramp_steps": 9,
                "pack_as": "blocks",
            },
            marks=pytest.mark.soak,
        ),
        pytest.param(
            {"batch_ramp_start": 2, "batch_ramp_steps": 9, "gradient_accumulation_steps": 2}, marks=pytest.mark.soak
        ),
    ],
    ids=["workers", "ramp-blocks", "ramp-in-memory"],
)
def test_a_run_that_is_killed_and_goes_on_ends_with_the_same_weights(files, tmp_path, more):
    settings = {"metric_for_best_model": "loss", "max_seq_length": 32, "max_steps": 18} | more
    Job(words(files, tmp_path / "whole", **settings), tmp_path / "log", main=mlm.main).succeeds()
    out = words(files, tmp_path / "out", **settings)
    assert Job(out, tmp_path / "log", kill_at=9, main=mlm.main).ends() == [-signal.SIGKILL]
    Job([*out, "--resume_from_checkpoint", "true"], tmp_path / "log", main=mlm.main).succeeds()
    assert difference(tmp_path / "whole", tmp_path / "out") == 0


@pytest.mark.soak
def test_two_processes_take_the_steps_of_one_and_a_killed_rank_loses_nothing(files, tmp_path):
    del (texts := dict(files))["model_name_or_path"]
    settings = {"metric_for_best_model": "loss", "max_seq_length": 32, "max_steps": 8, "streaming": True}
    settings |= {"vocab_size": 400, "stream_shares": 2, "shuffle_buffer": 10}
    Job(words(texts, tmp_path / "one", **settings), tmp_path / "log", main=clm.main).succeeds()
    tokenizer = json.loads((tmp_path / "one" / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) == 400
    settings |= {"model_name_or_path": str(tmp_path / "one"), "dropout": 0, "optim": "sgd", "learning_rate": 0.1}
    Job(words(texts, tmp_path / "again", **settings), tmp_path / "log", main=clm.main).succeeds()
    settings["per_device_train_batch_size"] = 4
    two = words(texts, tmp_path / "two", **settings)
    Job(two, tmp_path / "log", kill_at=5, processes=2, main=clm.main).ends()
    Job([*two, "--resume_from_checkpoint", "true"], tmp_path / "log", processes=2, main=clm.main).succeeds()
    one, other = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("again", "two"))
    for name in ("before_validation_loss", "after_validation_loss", "after_validation_accuracy"):
        assert other[name] == pytest.approx(one[name], rel=1e-4)
    states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("again", "two")]
    assert states[0]["num_input_tokens_seen"] == states[1]["num_input_tokens_seen"]
