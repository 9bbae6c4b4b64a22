"""Test causal language modelling: labels, chunked loss, completions, baselines, and complete runs."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

from common.data.columns import Columns
from common.data.corpus import CorpusArguments
from common.data.packing import find_blocks
from common.errors import InputError
from common.models.new import ScratchArguments, train_tokenizer
from recipes.clm import predict, train
from recipes.clm.completing import Completer
from recipes.clm.texts import FiveGrams, NextTokenCollator, to_rows
from tests.bad_inputs import tried, variants
from tests.conftest import read_jsonl, write_jsonl
from tests.faults import Job
from tests.recipes.test_mlm import TEXTS

DIALOGUES = [{"prompt": f"Q: how many are {n} and one?\nA:", "completion": f" {n + 1} apples"} for n in range(40)]


@pytest.fixture(scope="module")
def spelling() -> PreTrainedTokenizerFast:
    args = ScratchArguments(tokenizer_train="bpe", vocab_size=500)
    rows = Dataset.from_dict({"text": TEXTS + [row["prompt"] + row["completion"] for row in DIALOGUES]})
    return train_tokenizer(args, rows, train.SPECIAL)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, spelling) -> str:
    """Return the folder of a GPT of two layers without dropout."""
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(spelling), n_embd=64, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0, attn_pdrop=0,
        embd_pdrop=0, bos_token_id=spelling.bos_token_id, eos_token_id=spelling.eos_token_id,
        pad_token_id=spelling.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    spelling.save_pretrained(folder)
    return str(folder)


def few(folder: Path) -> list[str]:
    """Return arguments for `test_every_recipe.py`; the sample, the Python documentation, takes seconds to read."""
    files = {split: folder / f"{split}.txt" for split in ("train", "validation", "test")}
    for number, file in enumerate(files.values()):
        file.write_text("\n".join(TEXTS[60 * number : 60 * number + 60]) + "\n", encoding="utf-8")
    return [word for split, file in files.items() for word in (f"--{split}_file", str(file))]


@pytest.fixture
def start(decoder, tmp_path):
    """Return a function that trains on texts or rows by split and returns the metrics; `more` are extra arguments."""

    def go(data: dict[str, list], *more: str) -> dict[str, float]:
        words = []
        for split, rows in data.items():
            if isinstance(rows[0], dict):
                file = write_jsonl(tmp_path / f"{split}.jsonl", rows)
            else:
                file = str(tmp_path / f"{split}.txt")
                (tmp_path / f"{split}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
            words += [f"--{split}_file", file]
        return train.main([*words, *settings(decoder, tmp_path), *more])

    return go


def settings(model: str, folder) -> list[str]:
    return [
        "--model_name_or_path", model, "--output_dir", str(folder / "out"), "--overwrite", "true",
        "--max_seq_length", "64", "--precision", "fp32", "--num_train_epochs", "2", "--learning_rate", "1e-3",
        "--per_device_train_batch_size", "8", "--disable_tqdm", "true",
    ]  # fmt: skip


# Rows and labels


def test_each_sub_token_is_labelled_by_the_next_in_its_own_text(spelling):
    data = DatasetDict(train=Dataset.from_dict({"text": TEXTS[:30]}))
    rows = to_rows(data, spelling, CorpusArguments(max_seq_length=64), "all")["train"]
    batch = NextTokenCollator(0)(list(rows))
    found = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        real = int(mask.sum())
        assert ids[0] == spelling.bos_token_id
        assert labels[: real - 1].tolist() == ids[1:real].tolist()
        assert (labels[real - 1 :] == -100).all()
        found += ids[1:real].tolist()
    encoded = [spelling(text, add_special_tokens=False)["input_ids"] for text in TEXTS[:30]]
    assert found == [i for ids in encoded for i in [*ids, spelling.eos_token_id]]
    assert batch["owner"].tolist() == sorted(batch["owner"].tolist())


def test_only_completions_are_labelled_and_rows_stay_whole(spelling, capsys):
    long = {"prompt": "many words " * 60, "completion": " the end"}
    endless = {"prompt": "short", "completion": " goes on" * 80}
    data = DatasetDict(train=Dataset.from_list([*DIALOGUES, long, endless]))
    rows = to_rows(data, spelling, CorpusArguments(max_seq_length=64), "completion")["train"]
    assert any(len(row["lengths"]) > 1 for row in rows)
    batch = NextTokenCollator(0)(list(rows))
    assert len(batch["input_ids"]) == len(DIALOGUES) + 2
    eos = spelling.eos_token_id
    for row, labels in zip(DIALOGUES, batch["labels"], strict=False):
        expected = spelling(row["completion"], add_special_tokens=False)["input_ids"]
        assert labels[labels != -100].tolist() == [*expected, eos]
    expected = [*spelling(" the end", add_special_tokens=False)["input_ids"], eos]
    assert batch["labels"][-2][batch["labels"][-2] != -100].tolist() == expected
    assert (batch["labels"][-1] != -100).sum() == 63
    printed = capsys.readouterr().out
    assert "2 rows exceed --max_seq_length: their prompt is cut" in printed
    assert "1 rows exceed --max_seq_length: their completion is cut" in printed


# Texts under a block mask


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 90}
CONFIGS = [GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=90), LlamaConfig(**SIZES), GPTNeoXConfig(**SIZES)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_texts_under_a_block_mask_have_the_scores_that_each_has_alone(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    blocks = find_blocks(model, "blocks", causal=True)
    assert blocks is not None
    chance = np.random.default_rng(0)
    rows = []
    for lengths in ([5, 9, 3], [12, 4], [7]):
        ids = chance.integers(5, 90, sum(lengths))
        rows.append({"input_ids": ids, "marks": np.ones(len(ids)), "lengths": np.array(lengths)})
    packed, alone = NextTokenCollator(0, blocks)(rows), NextTokenCollator(0)(rows)
    assert (packed["labels"] != -100).sum() == (alone["labels"] != -100).sum()
    names = ["input_ids", "attention_mask", "position_ids"]
    with torch.no_grad():
        logits = [model(**{name: batch[name] for name in names if name in batch}).logits for batch in (packed, alone)]
    scores = [one[batch["labels"] != -100] for one, batch in zip(logits, (packed, alone), strict=True)]
    assert torch.allclose(*scores, atol=1e-5)


# Baseline


def test_five_grams_by_hand_and_as_a_distribution():
    chance = np.random.default_rng(0)
    rows = [chance.choice(6, 40, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05]) for _ in range(30)]
    model = FiveGrams(rows, 6)

    def probability(context: list[int], token: int) -> float:
        found = 1 / 6
        for size in range(5):
            if size > len(context):
                break
            before = context[len(context) - size :]
            counts = Counter(
                int(row[i]) for row in rows for i in range(max(1, size), len(row)) if list(row[i - size : i]) == before
            )
            if not counts:
                break
            found = (counts[token] + len(counts) * found) / (sum(counts.values()) + len(counts))
        return found

    test = [np.array([0, 1, 2, 3, 4, 5, 0, 0]), np.array([5, 5, 5, 5])]
    expected = [-math.log(probability(row[:i].tolist(), int(row[i]))) for row in test for i in range(1, len(row))]
    assert model.loss(test) == pytest.approx(np.mean(expected))
    assert sum(probability([0, 1, 0, 0], token) for token in range(6)) == pytest.approx(1)


# Complete runs


def test_a_run_leaves_model_results_curve_and_completions(start, tmp_path, capsys):
    metrics = start({"train": TEXTS[:120], "validation": TEXTS[120:160], "test": TEXTS[160:200]})
    assert "bits per byte of the test texts: before" in capsys.readouterr().out
    out = tmp_path / "out"
    for split in ("validation", "test"):
        assert metrics[f"after_{split}_perplexity"] < metrics[f"before_{split}_perplexity"]
    assert metrics["after_test_bits_per_byte"] < metrics["before_test_bits_per_byte"]
    assert 1 < metrics["five_grams_test_bits_per_byte"] < 8
    with Image.open(out / "curve.png") as image:
        image.verify()
    rows = read_jsonl(out / "completions.jsonl")
    assert len(rows) == 5
    write = pipeline("text-generation", model=str(out))
    assert write("The", max_new_tokens=5)[0]["generated_text"].startswith("The")
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": row["prompt"], "n": i} for i, row in enumerate(rows)])
    words = ["--model", str(out), "--input", file, "--output", str(tmp_path / "o.jsonl"), "--max_new_tokens", "24"]
    predict.main(words)
    found = read_jsonl(tmp_path / "o.jsonl")
    assert [row["n"] for row in found] == list(range(5))
    assert [row["completion"] for row in found] == [row["after"] for row in rows]


def test_the_loss_of_a_run_is_that_of_the_stock_head(start, tmp_path):
    short = [text for text in TEXTS if len(text) < 80][:30]  # each is one row
    metrics = start({"train": TEXTS[:30], "validation": short}, "--max_steps", "1", "--pack", "false")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    total, count = 0.0, 0
    for text in short:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert len(ids) <= 64
        with torch.no_grad():
            total += model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() * (len(ids) - 1)
        count += len(ids) - 1
    assert metrics["after_validation_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_it_overfits_on_completions(start, tmp_path, lora):
    more = ["--lora_r", "16", "--lora_dropout", "0", "--learning_rate", "1e-2"] if lora else ["--learning_rate", "3e-3"]
    few = DIALOGUES[:8]
    metrics = start(
        {"train": few, "validation": few}, "--loss_on", "completion", "--num_train_epochs", "150", *more,
        "--eval_strategy", "no", "--save_strategy", "no",
    )  # fmt: skip
    if lora:
        assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
        assert metrics["after_validation_loss"] < metrics["before_validation_loss"] - 0.5
        return
    assert metrics["after_validation_accuracy"] > 0.95
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": row["prompt"]} for row in few])
    predict.main(["--model", str(tmp_path / "out"), "--input", file, "--output", str(tmp_path / "o.jsonl")])
    found = [row["completion"].strip() for row in read_jsonl(tmp_path / "o.jsonl")]
    right = sum(one == row["completion"].strip() for one, row in zip(found, few, strict=True))
    assert right >= 7, found


def test_completions_do_not_depend_on_their_batch(decoder):
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    model = AutoModelForCausalLM.from_pretrained(decoder)
    completer = Completer(model, tokenizer, 128)
    short = Completer(model, tokenizer, 16)
    assert short(["Return the"], 16) == short(["Return the"], 8)  # the prompt keeps its half
    prompts = ["The", *[" ".join(text.split()[:n]) for n, text in enumerate(TEXTS[:12], 1)], "", "long " * 300]
    together = completer(prompts, 12)
    assert together == [completer([prompt], 12)[0] for prompt in prompts]
    torch.manual_seed(1)
    drawn = completer(prompts, 12, temperature=1.5)
    assert drawn != together
    assert not completer([], 5)


def test_from_nothing_by_default(tmp_path, capsys):
    (tmp_path / "train.txt").write_text("\n".join(TEXTS[:150]))
    metrics = train.main([
        "--train_file", str(tmp_path / "train.txt"), "--output_dir", str(tmp_path / "out"), "--vocab_size", "500",
        "--max_seq_length", "64", "--config_overrides", "n_layer=1", "--disable_tqdm", "true", "--precision", "fp32",
        "--per_device_train_batch_size", "8",
    ])  # fmt: skip
    assert "new gpt2 model: 0.3 million parameters" in capsys.readouterr().out
    assert metrics["before_validation_perplexity"] == pytest.approx(500, rel=0.3)
    assert metrics["after_validation_perplexity"] < 400
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.n_layer == 1


@pytest.mark.soak
def test_two_processes_give_what_one_gives(start, decoder, tmp_path):
    texts = {"train": TEXTS[:60], "validation": TEXTS[60:97]}
    more = ["--optim", "sgd", "--learning_rate", "0.1", "--per_device_eval_batch_size", "3"]
    one = start(texts, *more)
    parts = start(texts, *more, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4")
    words = [w for split in texts for w in (f"--{split}_file", str(tmp_path / f"{split}.txt"))]
    words += [*settings(decoder, tmp_path), *more, "--per_device_train_batch_size", "4", "--use_cpu", "true"]
    words[words.index("--output_dir") + 1] = str(tmp_path / "two")
    Job(words, tmp_path / "log", processes=2, main=train.main).succeeds()
    two = json.loads((tmp_path / "two" / "all_results.json").read_text())
    for name in ("before_validation_loss", "after_validation_loss", "after_validation_accuracy"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)
        assert parts[name] == pytest.approx(one[name], rel=1e-4)


# Input of users


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (DIALOGUES, ("--lora_r", "4", "--model_size", "tiny"), "--lora_r: a new model has no pretrained weights"),
        (TEXTS[:30], ("--loss_chunk", "0"), "--loss_chunk must be at least 1"),
        (TEXTS[:30], ("--loss_on", "completion"), "train.txt: unknown file type '.txt'"),
        ([{"prompt": "a"}] * 9, ("--loss_on", "completion"), "train.jsonl:1: no column completion"),
        ([{"prompt": "a", "completion": " "}] * 9, ("--loss_on", "completion"), "train.jsonl:1: completion is blank"),
        ([{"prompt": 3, "completion": "b"}] * 9, ("--loss_on", "completion"), "train.jsonl:1: prompt is 3"),
    ],
)
def test_wrong_arguments_and_rows_are_told(start, tmp_path, rows, words, message):
    with pytest.raises(InputError, match=re.escape(message)):
        start({"train": rows}, *words)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_earlier_predictions_are_not_overwritten():
    columns = Columns(GPT2Config(), **predict.COLUMNS)
    row = {"prompt": "a", "completion": "b"}
    assert list(predict.check_row(row, columns)) == []
    (message,) = predict.check_row(row | {"predicted_completion": "c"}, columns)
    assert message.startswith('already has "predicted_completion"')


def test_an_encoder_is_told(tiny, start):
    with pytest.raises(InputError, match="BertLMHeadModel: sees the tokens after each token; choose a decoder"):
        start({"train": TEXTS[:30]}, "--model_name_or_path", tiny)


@pytest.mark.parametrize("every", [24, pytest.param(1, marks=pytest.mark.soak)])
def test_corrupted_files_are_refused_or_train_as_they_stand(decoder, tmp_path, capsys, every):
    good = DIALOGUES[:12]
    found = list(variants(good))
    assert len(found) >= 150
    found = found[::every]
    whole = write_jsonl(tmp_path / "good.jsonl", good)
    file = tmp_path / "bad.jsonl"
    words = [
        "--train_file", str(file), "--validation_file", whole, *settings(decoder, tmp_path), "--max_steps", "1",
        "--save_strategy", "no", "--eval_strategy", "no", "--loss_on", "completion", "--max_eval_samples", "1",
    ]  # fmt: skip
    trained, refused = tried(found, file, lambda: train.main(words))
    capsys.readouterr()
    assert trained > 30 // every
    assert refused > 60 // every
