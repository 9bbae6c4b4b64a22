"""Test augmentation in the recipes: tags stay valid IOB2, answers stay at their offsets, runs resume exactly."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.data.augment import eda, mentions_of, replace_mentions, synonym
from common.errors import InputError
from recipes.ner import augmenting as ner
from recipes.ner import train as ner_train
from recipes.ner.schemes import invalid_tags
from recipes.ner.tagging import entity_spans
from recipes.qa import augmenting as qa
from recipes.qa import train as qa_train
from recipes.sentiment import augmenting as sentiment
from recipes.sentiment import train as sentiment_train
from tests.conftest import ROOT, read_jsonl, write_jsonl
from tests.faults import Job

WORDS = ["film", "buys", "quickly", "the", "New York", "北京", "don't", "U.S.", "…", ",", "\u200b.", "start"]


def tagged(rng: np.random.Generator) -> dict:
    """Return a row of random words with random mentions, some of them side by side."""
    words, tags = [], []
    while len(words) < 10:
        size = int(rng.integers(1, 4))
        words += [WORDS[i] for i in rng.integers(len(WORDS), size=size)]
        label = (None, "PER", "LOC")[rng.integers(3)]
        tags += ["O"] * size if label is None else [f"B-{label}", *[f"I-{label}"] * (size - 1)]
    return {"id": "1", "tokens": words, "ner_tags": tags}


def mentions(row: dict) -> list[tuple[str, tuple[str, ...]]]:
    return [(label, tuple(row["tokens"][a:b])) for label, a, b in entity_spans(row["ner_tags"])]


def test_tags_stay_valid_and_mentions_keep_words_and_labels():
    rows = [tagged(np.random.default_rng(seed)) for seed in range(300)]
    pool = mentions_of(text for row in rows for text in ner.texts_of(row))
    known = {mention for row in rows for mention in mentions(row)}
    for seed, row in enumerate(rows):
        assert ner.with_texts(row, ner.texts_of(row)) == row
        for change in (synonym, eda):
            new = ner.with_texts(row, [change(t, 0.3, np.random.default_rng(seed)) for t in ner.texts_of(row)])
            assert len(new["tokens"]) == len(new["ner_tags"])
            assert invalid_tags(new["ner_tags"]) == []
            assert mentions(new) == mentions(row)
            assert all(word.strip() for word in new["tokens"])
        (text,) = ner.texts_of(row)
        new = ner.with_texts(row, [replace_mentions(text, pool, 0.5, np.random.default_rng(seed))])
        assert invalid_tags(new["ner_tags"]) == []
        assert [label for label, _ in mentions(new)] == [label for label, _ in mentions(row)]
        assert set(mentions(new)) <= known
        outside = [[w for w, t in zip(r["tokens"], r["ner_tags"], strict=True) if t == "O"] for r in (row, new)]
        assert outside[0] == outside[1]
        assert mentions(row) == [] or mentions(new) != mentions(row)


def test_the_answers_stay_at_their_offsets():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        context = " ".join(tagged(rng)["tokens"])
        spans = [sorted(rng.choice(len(context) + 1, 2, replace=False).tolist()) for _ in range(rng.integers(3))]
        answers = {"text": [context[a:b] for a, b in spans], "answer_start": [a for a, _ in spans]}
        row = {"question": "who?", "context": context, "answers": answers}
        for change in (synonym, eda):
            new = qa.with_texts(row, [change(text, 0.3, np.random.default_rng(seed)) for text in qa.texts_of(row)])
            assert new["answers"]["text"] == answers["text"]
            assert new["question"] == "who?"
            for text, start in zip(new["answers"]["text"], new["answers"]["answer_start"], strict=True):
                assert new["context"][start : start + len(text)] == text


def test_both_texts_of_a_pair_change():
    row = {"text": "film", "text_pair": "film", "label": "x"}
    new = sentiment.with_texts(row, [synonym(text, 1.0, np.random.default_rng(0)) for text in sentiment.texts_of(row)])
    assert new == {"text": "movie", "text_pair": "movie", "label": "x"}
    assert len(sentiment.texts_of({"text": "film", "label": "x"})) == 1


# Runs


@pytest.fixture
def words(tiny, tmp_path):
    """Return a function that returns the arguments of a run on 24 rows of NER with long sentences in windows."""
    rows = read_jsonl(ROOT / "recipes" / "ner" / "sample" / "train.jsonl")[:24]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)

    def of(out: str, *more: str) -> list[str]:
        return [
            "--train_file", file, "--validation_file", file, "--model_name_or_path", tiny, "--output_dir",
            str(tmp_path / out), "--max_seq_length", "16", "--precision", "fp32", "--num_train_epochs", "2",
            "--learning_rate", "1e-3", "--eval_strategy", "no", "--disable_tqdm", "true", *more,
        ]  # fmt: skip

    return of


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["eda", pytest.param("mention", marks=pytest.mark.soak)])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(words, tmp_path, kind, capsys):
    steps = ("--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "20")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ner_train.main(words("whole", "--augment", kind, "--augment_copies", "2", *steps))
    assert f"--augment {kind}: 2 augmented copies of each training row" in capsys.readouterr().out
    shutil.copytree(whole, cut)
    checkpoints = sorted(cut.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in checkpoints[len(checkpoints) // 2 :]:  # resumes in the middle of the second epoch
        shutil.rmtree(path)
    (cut / ".lock").unlink()
    record = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps(record | {"finished": None}))
    ner_train.main(words("cut", "--augment", kind, "--augment_copies", "2", *steps, "--resume_from_checkpoint", "true"))
    one, other = weights(whole), weights(cut)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_batches_that_make_the_same_steps_see_the_same_copies(words, tmp_path):
    augment = ("--augment", "eda", "--save_strategy", "no", "--num_train_epochs", "1", "--dropout", "0")
    ner_train.main(words("one", *augment, "--per_device_train_batch_size", "16"))
    parts = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4")
    ner_train.main(words("four", *augment, *parts))
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    assert all(torch.allclose(one[name], four[name], atol=1e-5) for name in one)


@pytest.mark.soak
def test_two_processes_see_the_same_copies(words, tmp_path):
    augment = (
        "--augment",
        "eda",
        "--save_strategy",
        "no",
        "--num_train_epochs",
        "1",
        "--dropout",
        "0",
        "--use_cpu",
        "true",
    )
    for processes in (1, 2):
        given = words(str(processes), *augment, "--per_device_train_batch_size", str(16 // processes))
        Job(given, tmp_path / "log", processes=processes, main=ner_train.main).succeeds()
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


@pytest.mark.parametrize(
    ("train", "arguments", "message"),
    [
        (sentiment_train, "--augment mention", "the rows have no mentions with labels; give synonym or eda or"),
        (ner_train, "--augment back_translation", "a translated text loses the places of words and answers; give"),
        (qa_train, "--augment mention", "the rows have no mentions with labels; give synonym or eda or contextual"),
        (ner_train, "--augment eda --augment_copies 0", "--augment_copies 0: must be at least 1"),
        (ner_train, "--augment eda --augment_share 1.5", "must be above 0 and at most 1"),
        (ner_train, "--augment_share 0.2", "--augment_share: needs --augment"),
        (ner_train, "--augment contextual", "--augment contextual: needs --augment_model"),
        (ner_train, "--augment eda --augment_model x", "--augment_model: needs --augment contextual; add it"),
        (sentiment_train, "--augment back_translation --augment_models x", "needs two folders, --augment_models THERE"),
        (qa_train, "--augment contextual --augment_model no/such/folder", "no/such/folder: no such folder"),
    ],
)
def test_bad_arguments_are_errors_before_training(train, arguments, message, tmp_path):
    with pytest.raises(InputError) as error:
        train.main([*arguments.split(), "--output_dir", str(tmp_path / "out"), "--max_train_samples", "8"])
    assert message in str(error.value)
    assert (
        not json.loads((tmp_path / "out" / "run.json").read_text())["finished"] if (tmp_path / "out").exists() else True
    )


def test_tags_of_single_words_cannot_be_augmented(tmp_path):
    rows = [{"tokens": ["a", "dog"], "ner_tags": ["DET", "NOUN"]}] * 20
    file = write_jsonl(tmp_path / "pos.jsonl", rows)
    with pytest.raises(InputError, match="which no augmentation carries; leave it out"):
        ner_train.main(["--train_file", file, "--augment", "eda", "--output_dir", str(tmp_path / "out")])
