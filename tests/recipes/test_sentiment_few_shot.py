"""Test training on few rows: the draw, pairs and patterns, errors before training, and complete runs."""

from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForMaskedLM, pipeline

from common.args import TrainingArguments
from common.errors import InputError
from common.models.load import load_tokenizer
from recipes.sentiment import train
from recipes.sentiment.contrastive import batches, pair_loss
from recipes.sentiment.few_shot import draw
from recipes.sentiment.prompt import with_pattern, words_of
from recipes.sentiment.steps import train_steps
from recipes.sentiment.windows import read
from tests.conftest import ROOT, read_jsonl, write_jsonl

SAMPLE = ROOT / "recipes" / "sentiment" / "sample"
WORDS = ["--verbalizer", "negative=The", "positive=a"]


@pytest.fixture
def start(tiny, tmp_path):
    """Return a function that trains with `more` arguments on 40, 16 and 16 rows; `model` is the checkpoint."""
    sizes = {"train": 40, "validation": 16, "test": 16}
    files = [
        word
        for split, size in sizes.items()
        for word in (
            f"--{split}_file",
            write_jsonl(tmp_path / f"{split}.jsonl", read_jsonl(SAMPLE / f"{split}.jsonl")[:size]),
        )
    ]

    def go(*more: str, model: str = tiny) -> dict[str, float]:
        return train.main([
            *files, "--model_name_or_path", model, "--output_dir", str(tmp_path / "out"), "--overwrite", "true",
            "--max_seq_length", "48", "--precision", "fp32", "--disable_tqdm", "true", *more,
        ])  # fmt: skip

    return go


@pytest.fixture
def with_head(tokenizer, tmp_path) -> str:
    """Return the folder of a random BERT with an MLM head."""
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "mlm")
    tokenizer.save_pretrained(tmp_path / "mlm")
    return str(tmp_path / "mlm")


def check_saved(folder) -> None:
    """Check that the plain classes compute the saved predictions."""
    found = read_jsonl(folder / "predictions_test.jsonl")
    texts = [row["text"] for row in found]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
        probs = model.eval()(**batch).logits.softmax(-1).max(-1).values
    assert probs.tolist() == pytest.approx([row["probability"] for row in found], abs=2e-4)
    answers = pipeline("text-classification", model=str(folder))(texts, truncation=True, max_length=48)
    assert [answer["label"] for answer in answers] == [row["predicted"] for row in found]


# Draw


def test_each_class_gets_its_shots_by_seed():
    rows = Dataset.from_dict({"label": ["a", "b", "b", "c", "a", "c", "b"] * 3, "text": [str(i) for i in range(21)]})
    drawn = draw(rows, 4, seed=1)
    assert [drawn["label"][:].count(name) for name in "abc"] == [4, 4, 4]
    assert draw(rows, 4, seed=1)["text"][:] == drawn["text"][:]
    assert draw(rows, 4, seed=2)["text"][:] != drawn["text"][:]
    assert draw(rows, None, seed=1) is rows
    with pytest.raises(InputError, match=r"--shots 7: classes with fewer training rows: a \(6\), c \(6\); .*--shots 6"):
        draw(rows, 7, seed=1)


def test_rows_with_several_labels_count_for_each():
    rows = Dataset.from_dict({"label": [["a", "b"], ["a"], [], ["b", "c"], ["c"]] * 4})
    drawn = draw(rows, 3, seed=1)["label"][:]
    assert min(sum(name in labels for labels in drawn) for name in "abc") == 3
    assert [] not in drawn


# Steps


def test_gradients_are_not_clipped_at_norm_0(tmp_path):
    model = torch.nn.Linear(2, 1, bias=False)
    before, args = model.weight.detach().clone(), TrainingArguments(str(tmp_path), max_grad_norm=0, precision="fp32")
    train_steps(model, [np.arange(2)] * 3, lambda rows: model(torch.ones(2, 2)).sum(), 3, 0.1, args)
    assert (model.weight - before < -0.1).all()  # AdamW moves each weight by the rate; weight decay alone by 0.001


# Contrastive


@pytest.mark.parametrize(("sizes", "size"), [([3, 40], 8), ([5] * 20, 16), ([1, 6, 6], 12)])
def test_batches_are_balanced_streams(sizes, size):
    numbers = np.repeat(np.arange(len(sizes)), sizes)
    found = list(islice(batches(np.eye(len(sizes))[numbers], size, seed=1), 60))
    again = islice(batches(np.eye(len(sizes))[numbers], size, seed=1), 60)
    assert all((one == other).all() for one, other in zip(found, again, strict=True))
    classes = min(len(sizes), size // 2)
    for rows in found:
        assert len(set(rows.tolist())) == len(rows) <= size
        counts = np.bincount(numbers[rows], minlength=len(sizes))
        assert (counts > 0).sum() <= classes
        assert counts.max() <= 2 * (size // classes)
    assert {row for rows in found for row in rows.tolist()} == set(range(len(numbers)))
    drawn = np.sum([np.bincount(numbers[rows], minlength=len(sizes)) > 0 for rows in found], axis=0)
    assert drawn.max() - drawn.min() <= 3


def test_the_loss_is_the_mean_over_pairs_of_each_kind():
    vectors, labels = torch.randn(6, 4), torch.eye(3)[[0, 0, 1, 1, 1, 2]]
    labels[0, 2] = 1  # shares a class with the last row
    errors: dict[bool, list[float]] = {True: [], False: []}
    for i in range(6):
        for j in range(i):
            alike = bool((labels[i] * labels[j]).any())
            errors[alike].append(float(torch.cosine_similarity(vectors[i], vectors[j], dim=0) - int(alike)) ** 2)
    expected = np.mean([np.mean(of_kind) for of_kind in errors.values()])
    assert float(pair_loss(vectors, labels)) == pytest.approx(expected, rel=1e-5)


def test_a_contrastive_run_is_repeatable_and_saves_an_ordinary_classifier(start, tiny, tmp_path):
    few = ["--few_shot", "contrastive", "--shots", "8", "--few_shot_steps", "5", "--few_shot_learning_rate", "1e-3"]
    start(*few)
    check_saved(tmp_path / "out")
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    start(*few)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    before = AutoModelForSequenceClassification.from_pretrained(tiny).state_dict()
    name = "bert.encoder.layer.0.output.dense.weight"
    assert (trained[name] - before[name]).abs().max() > 1e-4


# Prompt


def test_the_tokenizer_keeps_the_pattern(tiny, tmp_path):
    tokenizer = with_pattern(load_tokenizer(tiny), "In short: [MASK]. {text}", pair=False)
    tokenizer.save_pretrained(tmp_path)
    text = "A long walk. " * 30
    ids = read(tokenizer, [text, "Good"], None, 24)["input_ids"]
    assert len(ids[0]) == 24
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded([text, "Good"], truncation=True, max_length=24)["input_ids"] == ids
    words = "".join(loaded.convert_ids_to_tokens(ids[1])).replace("##", "")
    assert words == "[CLS]Inshort:[MASK].Good[SEP]"
    pairs = with_pattern(load_tokenizer(tiny), None, pair=True)
    words = "".join(pairs.convert_ids_to_tokens(read(pairs, ["Good"], ["Walk"], 24)["input_ids"][0])).replace("##", "")
    assert words == "[CLS]Good?[MASK],Walk[SEP]"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{text} It was good.", r"has 0 times \[MASK\]"),
        ("[MASK]", r"has 0 times \{text\}"),
        ("{text} [MASK] [MASK]", r"has 2 times \[MASK\]"),
        ("{text} {title} [MASK]", r"\{title\}.* is no column"),
    ],
)
def test_wrong_patterns(tiny, pattern, message):
    with pytest.raises(InputError, match=f"--pattern .*{message}"):
        with_pattern(load_tokenizer(tiny), pattern, pair=False)


def test_words_are_single_known_tokens(tiny):
    tokenizer = load_tokenizer(tiny)
    ids = words_of(["x", "y"], ["x=The", "y=a"], tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["The", "a"]
    for given, message in (
        (["x=The", "y=The"], "'The' is the word of two classes"),
        (["x=The", "y=unmistakable"], r"class y, 'unmistakable', is \d+ tokens"),
        (["z=The"], "no class 'z'; the classes: x, y"),
        (["The"], "must be label=word"),
    ):
        with pytest.raises(InputError, match=f"--verbalizer.*{message}"):
            words_of(["x", "y"], given, tokenizer)


def test_a_prompt_run_saves_an_ordinary_classifier(start, with_head, tmp_path, capsys):
    start("--few_shot", "prompt", "--shots", "8", "--few_shot_steps", "5", *WORDS, model=with_head)
    assert "the right word for" in capsys.readouterr().out
    check_saved(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Good")["input_ids"].count(4) == 1  # [MASK]


# Errors before training


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shots", "0"], "--shots 0: must be at least 1"),
        (["--few_shot", "contrastive", "--shots", "1"], "give --shots 2 or more"),
        (["--shots", "500"], r"--shots 500: classes with fewer training rows: negative \(\d+\), positive \(\d+\)"),
        (["--few_shot", "contrastive", "--lora_r", "8"], "trains all weights; leave --lora_r out"),
        (
            ["--few_shot", "contrastive", "--augment", "eda"],
            "--augment: --few_shot contrastive trains on the rows as they",
        ),
        (["--few_shot", "contrastive", "--head_init", "random"], "leaves the head at random weights"),
        (["--few_shot_steps", "5"], "--few_shot_steps: needs --few_shot"),
        (["--few_shot", "contrastive", "--pattern", "{text} [MASK]"], "--pattern: needs --few_shot prompt"),
        (["--few_shot", "prompt", *WORDS], r"has no MLM head; make one from texts by: make mlm ARGS="),
        (["--few_shot", "prompt"], r"class \w+, '\w+', is \d tokens .*--verbalizer"),
        (["--few_shot", "contrastive", "--few_shot_learning_rate", "0"], "--few_shot_learning_rate 0.0: must be above"),
    ],
)
def test_bad_arguments(start, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        start(*more)
    assert not (tmp_path / "out" / "run.json").exists()
