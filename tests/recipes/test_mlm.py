"""Test masked language modelling: masks, packing, the head at labels, and complete runs from text to other recipes."""

import copy
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AlbertConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
    pipeline,
)

from common.data.blocks import blocks_of, pieces, to_blocks
from common.data.corpus import CorpusArguments, load_corpus
from common.data.documentation import python_documentation
from common.data.packing import find_blocks, to_batch
from common.data.tokens import ends_of
from common.errors import InputError
from common.models.new import ScratchArguments, train_tokenizer
from recipes.mlm import predict, train
from recipes.mlm.masking import INSIDE, START, MaskedBatches, Masker, word_marks
from recipes.mlm.pairs import segments
from recipes.ner import train as ner
from recipes.sentiment import train as sentiment
from tests.bad_inputs import tried, variants
from tests.conftest import ROOT, build_tokenizer, read_jsonl, write_jsonl
from tests.faults import Job

TEXTS = [" ".join(row["tokens"]) for row in read_jsonl(ROOT / "recipes" / "ner" / "sample" / "train.jsonl")]
HARD = [
    "Unbelievable, naïve thoughtfulness: it's O'Neill's co-operation (1,000.5 €)…",
    "日本語 and ไทย and Ελληνικά, é as e\u0301, \u00a0two  spaces\tand a tab",
    "👍🏽 emoji👩‍👩‍👧 inside, snake_case_names and CamelCaseNames()",
]
WORD = re.compile(r"(?:(?![\u3040-\u30ff\u4e00-\u9fff])[^\W_])+")


def few(folder: Path) -> list[str]:
    """Return arguments for `test_every_recipe.py`; the sample, the Python documentation, takes seconds to read."""
    files = {split: folder / f"{split}.txt" for split in ("train", "validation", "test")}
    for number, file in enumerate(files.values()):
        file.write_text("\n".join(TEXTS[60 * number : 60 * number + 60]) + "\n", encoding="utf-8")
    return [word for split, file in files.items() for word in (f"--{split}_file", str(file))]


@pytest.fixture
def start(tiny, tmp_path):
    """Return a function that trains on texts by split and returns the metrics; `more` extends the command line."""

    def go(texts: dict[str, list[str]], *more: str) -> dict[str, float]:
        words = []
        for split, lines in texts.items():
            (tmp_path / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            words += [f"--{split}_file", str(tmp_path / f"{split}.txt")]
        return train.main([*words, *settings(tiny, tmp_path), *more])

    return go


def settings(model: str, folder) -> list[str]:
    return [
        "--model_name_or_path", model, "--output_dir", str(folder / "out"), "--overwrite", "true",
        "--max_seq_length", "64", "--precision", "fp32", "--num_train_epochs", "2", "--learning_rate", "1e-3",
        "--per_device_train_batch_size", "8", "--disable_tqdm", "true",
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["wordpiece", "bpe", "unigram"])
def trained(request):
    """Return a small tokenizer of each kind; many words have several tokens."""
    args = ScratchArguments(tokenizer_train=request.param, vocab_size=600)
    return train_tokenizer(args, Dataset.from_dict({"text": TEXTS + HARD}), train.SPECIAL)


# Words


def test_no_word_is_masked_in_part_whatever_the_tokenizer(trained):
    for text in [*TEXTS[:50], *HARD]:
        encoding = trained.backend_tokenizer.encode(text, add_special_tokens=False)
        marks = word_marks(text, encoding)
        assert marks[0] == START
        unit = np.cumsum(np.array(marks) == START)
        units_of_words = []
        for word in WORD.finditer(text):
            here = {
                int(u) for u, (a, b) in zip(unit, encoding.offsets, strict=True) if a < word.end() and b > word.start()
            }
            assert len(here) == 1, (text, word.group())
            units_of_words.append((here.pop(), word))
        for (one, a), (other, b) in pairwise(units_of_words):
            if any(c.isspace() for c in text[a.end() : b.start()]):
                assert one != other, (text, a.group(), b.group())


def test_word_marks_by_hand(trained):
    text = "thoughtfulness, and"
    encoding = trained.backend_tokenizer.encode(text, add_special_tokens=False)
    marks = word_marks(text, encoding)
    starts = [i for i, mark in enumerate(marks) if mark == START]
    assert len(starts) == 3
    assert len(marks) > 3
    assert set(marks) == {START, INSIDE}


# Masks


def row_of(words: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return a row of words with these numbers of tokens between special tokens; 0 is two special tokens."""
    marks = [0]
    for size in words:
        marks += [0, 0] if size == 0 else [START] + [INSIDE] * (size - 1)
    marks = np.array([*marks, 0])
    return np.arange(100, 100 + len(marks)), marks


@pytest.mark.parametrize("masking", ["token", "whole_word", "span"])
@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_masks_have_their_rate_and_keep_their_rules(tokenizer, masking, probability):
    chance = np.random.default_rng(0)
    masker = Masker(tokenizer, masking, probability)
    masked, total, kept, randomized = 0, 0, 0, 0
    for _ in range(800):
        ids, marks = row_of([*chance.integers(1, 5, 40), 0, *chance.integers(1, 5, 40)])
        found, labels = masker(ids, marks, chance)
        at = labels != -100
        assert at.any()
        assert (labels[at] == ids[at]).all()
        assert (found[~at] == ids[~at]).all()
        assert not at[marks == 0].any()
        if masking != "token":
            starts = np.flatnonzero(marks == START)
            for begin, end in zip(starts, [*starts[1:], len(marks)], strict=True):
                word = at[begin:end][marks[begin:end] > 0]
                assert word.all() or not word.any()
        if masking == "span":
            fates = np.where(found == masker.mask_id, 0, np.where(found == ids, 1, 2))
            for i in range(len(ids) - 1):  # inside a word, and therefore inside a span
                if at[i] and marks[i + 1] == INSIDE:
                    assert fates[i] == fates[i + 1] or 2 in (fates[i], fates[i + 1])
        masked, total = masked + at.sum(), total + (marks > 0).sum()
        kept += (found[at] == ids[at]).sum()
        randomized += ((found[at] != ids[at]) & (found[at] != masker.mask_id)).sum()
    assert masked / total == pytest.approx(probability, abs=0.01)
    assert kept / masked == pytest.approx(0.1, abs=0.02)
    assert randomized / masked == pytest.approx(0.1, abs=0.02)


def test_spans_have_spanberts_lengths(tokenizer):
    chance = np.random.default_rng(0)
    masker = Masker(tokenizer, "span", 0.02)  # few masks, which rarely touch
    lengths = []
    for _ in range(1500):
        _, labels = masker(*row_of([1] * 400), chance)
        at = np.flatnonzero(labels != -100)
        lengths += [len(part) for part in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)][:1]
    expected = sum((k + 1) * 0.2 * 0.8**k for k in range(10)) / sum(0.2 * 0.8**k for k in range(10))
    assert np.mean(lengths) == pytest.approx(expected, rel=0.12)


def test_shares_of_mask_random_and_kept_can_be_set(tokenizer):
    ids, marks = row_of([1] * 2000)
    for shares in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.2), (0.0, 0.0)):
        found, labels = Masker(tokenizer, "token", 0.5, *shares)(ids, marks, np.random.default_rng(0))
        at = labels != -100
        replaced = (found[at] == tokenizer.mask_token_id).mean()
        assert replaced == pytest.approx(shares[0], abs=0.06)
        assert (found[at] == ids[at]).mean() == pytest.approx(1 - sum(shares), abs=0.06)


def test_masks_follow_from_seed_epoch_and_row_alone(tokenizer):
    ids, marks = row_of([2] * 30)
    rows = [{"input_ids": ids, "marks": marks, "lengths": np.array([len(ids)]), "row": i} for i in range(6)]

    def labels(seed: int, epoch: int, order: list[int]) -> dict[int, list[int]]:
        batches = MaskedBatches(Masker(tokenizer, "whole_word", 0.3), 0, seed)
        batches.set_epoch(epoch)
        return dict(zip(order, batches([rows[i] for i in order])["labels"].tolist(), strict=True))

    one = labels(1, 0, [0, 1, 2, 3])
    other = labels(1, 0, [3, 1])
    assert other == {i: one[i] for i in other}
    assert one[0] != one[1]
    assert labels(1, 1, [0])[0] != one[0]
    assert labels(2, 0, [0])[0] != one[0]


# Blocks


@pytest.mark.parametrize("pack", [True, False])
def test_blocks_hold_every_sub_token_once_and_in_order(pack):
    chance = np.random.default_rng(0)
    texts = [([int(i)] * n, [1] * n) for i, n in enumerate(chance.integers(3, 200, 300), 10)]
    blocks = list(blocks_of(texts, ([1], [2]), 64, pack))
    found = [
        i for block in blocks for piece in pieces(np.array(block["input_ids"]), block["lengths"]) for i in piece[1:-1]
    ]
    assert found == [i for ids, _ in texts for i in ids]
    for block in blocks:
        assert len(block["input_ids"]) == len(block["marks"]) == sum(block["lengths"]) <= 64
        for piece, marks in zip(
            *(pieces(np.array(block[k]), block["lengths"]) for k in ("input_ids", "marks")), strict=True
        ):
            assert (piece[0], piece[-1]) == (1, 2)
            assert len(set(piece[1:-1])) == 1  # one text
            assert len(piece) >= 5
            assert marks.tolist() == [0] + [1] * (len(piece) - 2) + [0]
    assert all(len(block["lengths"]) == 1 for block in blocks) == (not pack)
    if pack:
        assert np.mean([len(block["input_ids"]) for block in blocks[:-1]]) > 60


def test_special_tokens_around_a_text(tokenizer, trained):
    assert ends_of(tokenizer) == ([tokenizer.cls_token_id], [tokenizer.sep_token_id])
    assert ends_of(trained) == ([trained.cls_token_id], [trained.sep_token_id])


def test_a_text_in_a_block_does_not_see_its_neighbours(start, tiny, tokenizer, tmp_path):
    start({"train": TEXTS[:40], "validation": TEXTS[40:60]}, "--max_steps", "2")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    args = CorpusArguments(train_file=str(tmp_path / "validation.txt"), max_seq_length=64)
    texts = load_corpus(args)
    blocks = to_blocks(texts, tokenizer, args, word_marks)["train"]
    row = next(row for row in blocks if len(row["lengths"]) > 2)
    batch = MaskedBatches(Masker(tokenizer, "token", 0.15), tokenizer.pad_token_id, 0)([row])
    together = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for i, length in enumerate(row["lengths"]):
        alone = model(input_ids=batch["input_ids"][i : i + 1, :length]).logits
        assert torch.allclose(together[i, :length], alone[0], atol=1e-4)


# Rows under a block mask


def packed_rows(chance: np.random.Generator) -> list[tuple[np.ndarray, ...]]:
    """Return rows of several texts with labels at some positions, and a row of a single text."""
    rows = []
    for lengths in ([5, 9, 3], [12, 4], [7]):
        ids = chance.integers(5, 90, sum(lengths))
        rows.append((ids, np.where(chance.random(len(ids)) < 0.4, ids, -100), np.array(lengths)))
    return rows


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "albert", "distilbert"])
def test_texts_under_a_block_mask_have_the_scores_that_each_has_alone(name):
    torch.manual_seed(0)
    config = next(config for config in CONFIGS if config.model_type == name)
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa").eval()
    blocks = find_blocks(model, "blocks", causal=False)
    assert blocks is not None
    rows = packed_rows(np.random.default_rng(0))
    batch = to_batch(rows, config.pad_token_id, blocks)
    assert batch["input_ids"].shape == (3, 24)
    assert batch["real"].sum() == sum(len(row[0]) for row in rows)
    with torch.no_grad():
        together = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}).logits
        for row, (ids, labels, lengths) in enumerate(rows):
            assert batch["labels"][row, : len(ids)].tolist() == labels.tolist()
            start = 0
            for piece in pieces(ids, lengths):
                alone = model(input_ids=torch.from_numpy(piece)[None]).logits[0]
                assert torch.allclose(together[row, start : start + len(piece)], alone, atol=1e-5)
                start += len(piece)


def test_a_model_that_takes_no_block_mask_gets_pieces(capsys):
    config = next(config for config in CONFIGS if config.model_type == "modernbert")
    assert find_blocks(AutoModelForMaskedLM.from_config(config), "blocks", causal=False) is None
    eager = AutoModelForMaskedLM.from_config(CONFIGS[0], attn_implementation="eager")
    assert find_blocks(eager, "auto", causal=False) is None or torch.accelerator.is_available()
    assert "no block mask (not tested with modernbert)" in capsys.readouterr().out


def test_a_run_under_a_block_mask_is_the_run_of_pieces(start):
    texts = {"train": TEXTS[:60], "validation": TEXTS[60:90]}
    more = ["--optim", "sgd", "--learning_rate", "0.1"]
    one = start(texts, *more, "--pack_as", "pieces")
    other = start(texts, *more, "--pack_as", "blocks")
    for name in ("before_validation_loss", "after_validation_loss", "after_validation_accuracy"):
        assert other[name] == pytest.approx(one[name], rel=1e-5)


# LoRA


def test_lora_trains_the_matrices_and_the_new_head(start, tiny, tmp_path):
    few = TEXTS[:12]
    metrics = start(
        {"train": few, "validation": few}, "--model_name_or_path", tiny, "--lora_r", "8", "--lora_dropout", "0",
        "--num_train_epochs", "100", "--learning_rate", "1e-2", "--eval_strategy", "no", "--save_strategy", "no",
    )  # fmt: skip
    assert metrics["after_validation_loss"] < metrics["before_validation_loss"] - 0.2
    out = tmp_path / "out"
    before, after = (AutoModelForMaskedLM.from_pretrained(path) for path in (tiny, out))
    words = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(before.state_dict()[words], after.state_dict()[words])
    assert after.cls.predictions.decoder.weight is after.bert.embeddings.word_embeddings.weight
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(before.state_dict()[query], after.state_dict()[query])
    kept = load_file(out / "adapter" / "adapter_model.safetensors")
    assert any("transform.dense" in name for name in kept)
    assert not any("embeddings" in name or "decoder" in name for name in kept)
    fills = read_jsonl(out / "fill_ins.jsonl")
    expected = [best["token_str"] for best in pipeline("fill-mask", model=str(out))(fills[0]["text"])]
    assert [word for word, _ in fills[0]["after"]] == expected


# Models


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 90}
CONFIGS = [
    BertConfig(**SIZES),
    RobertaConfig(**SIZES),
    ElectraConfig(**SIZES, embedding_size=16),
    AlbertConfig(**SIZES, embedding_size=16),
    DebertaV2Config(**SIZES),
    MPNetConfig(**SIZES),
    ModernBertConfig(**SIZES, pad_token_id=0, eos_token_id=1, bos_token_id=2, cls_token_id=2, sep_token_id=1),
    DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=90),
]


# Complete runs


def test_a_run_leaves_model_results_curve_and_fills(start, tmp_path, capsys):
    metrics = start({"train": TEXTS[:120], "validation": TEXTS[120:160], "test": TEXTS[160:200]})
    printed = capsys.readouterr().out
    assert "the checkpoint has no MLM head: training starts with a new head, decoder tied to the embeddings" in printed
    assert "perplexity before" in printed
    out = tmp_path / "out"
    for split in ("validation", "test"):
        assert metrics[f"after_{split}_perplexity"] < metrics[f"before_{split}_perplexity"]
        assert metrics[f"after_{split}_perplexity"] == pytest.approx(math.exp(metrics[f"after_{split}_loss"]))
    with Image.open(out / "curve.png") as image:
        image.verify()
    fills = read_jsonl(out / "fill_ins.jsonl")
    assert len(fills) == 5
    assert all(len(row["before"]) == len(row["after"]) == 5 and "[MASK]" in row["text"] for row in fills)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["num_input_tokens_seen"] > 1000
    fill = pipeline("fill-mask", model=str(out))
    expected = [best["token_str"] for best in fill(fills[0]["text"])]
    assert [word for word, _ in fills[0]["after"]] == expected
    assert "perplexity" in (out / "README.md").read_text()
    file = write_jsonl(tmp_path / "in.jsonl", [{"text": row["text"], "n": i} for i, row in enumerate(fills)])
    predict.main(["--model", str(out), "--input", file, "--output", str(tmp_path / "o.jsonl"), "--precision", "fp32"])
    found = read_jsonl(tmp_path / "o.jsonl")
    assert [row["n"] for row in found] == list(range(5))
    for row, gap in zip(found, fills, strict=True):
        assert [fill["token"] for fill in row["fills"][0]] == [word for word, _ in gap["after"]]


def test_predict_fills_every_mask_of_texts_of_any_length(start, tmp_path):
    start({"train": TEXTS[:40]}, "--max_steps", "1")
    rows = [
        {"text": "no mask here"},
        {"text": "[MASK] and [MASK] ."},
        {"text": "a long text " * 60 + "[MASK] with " + "more words " * 60 + "[MASK]"},
    ]
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    predict.main(
        ["--model", str(tmp_path / "out"), "--input", file, "--output", str(tmp_path / "o.jsonl"), "--top", "3"]
    )
    found = read_jsonl(tmp_path / "o.jsonl")
    assert [[len(fills) for fills in row["fills"]] for row in found] == [[], [3, 3], [3, 3]]
    for row in found:
        for fills in row["fills"]:
            chances = [fill["probability"] for fill in fills]
            assert chances == sorted(chances, reverse=True)
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "x"}, {"texts": "x"}])
    with pytest.raises(InputError, match=r"bad.jsonl:2: needs \"text\""):
        predict.main(["--model", str(tmp_path / "out"), "--input", bad, "--output", str(tmp_path / "b.jsonl")])


@pytest.mark.parametrize(
    "masking", ["token", *(pytest.param(name, marks=pytest.mark.soak) for name in ("whole_word", "span"))]
)
def test_it_overfits(start, masking):
    few = TEXTS[:4]
    metrics = start(
        {"train": few, "validation": few}, "--masking", masking, "--num_train_epochs", "150", "--learning_rate", "5e-3",
        "--eval_strategy", "no", "--save_strategy", "no", "--mlm_probability", "0.3",
    )  # fmt: skip
    assert metrics["after_validation_accuracy"] > 0.7  # of 16 masked tokens; 0.06 before training
    assert metrics["after_validation_perplexity"] < 3  # 600 before


def test_evaluation_does_not_depend_on_batches_seed_or_training_masks(start):
    texts = {"train": TEXTS[:40], "validation": TEXTS[40:80]}
    one = start(texts, "--max_steps", "1")
    other = start(
        texts, "--max_steps", "1", "--per_device_eval_batch_size", "3", "--seed", "7", "--masking", "span",
        "--mlm_probability", "0.4",
    )  # fmt: skip
    assert len({k for k in one if k.startswith("before")}) == 3
    trunk = start(texts, "--max_steps", "1", "--per_device_eval_batch_size", "3")
    for name in ("before_validation_loss", "before_validation_accuracy", "after_validation_loss"):
        assert trunk[name] == pytest.approx(one[name], rel=1e-5)
    # another seed changes only the new weights of the head
    assert other["before_validation_loss"] == pytest.approx(one["before_validation_loss"], rel=1e-5)


def test_one_text_a_row_and_packed_rows_have_the_same_evaluation(start):
    short = [text for text in TEXTS[:80] if len(text) < 100]
    packed = start({"train": short, "validation": short}, "--max_steps", "1", "--max_seq_length", "128")
    alone = start({"train": short, "validation": short}, "--max_steps", "1", "--pack", "false")
    assert packed["before_validation_loss"] == pytest.approx(
        alone["before_validation_loss"], rel=0.05
    )  # the masks differ


def test_forgetting_is_evaluated_before_and_after(start, tmp_path, capsys):
    file = tmp_path / "general.txt"
    file.write_text("\n".join(TEXTS[200:230]))
    metrics = start({"train": TEXTS[:40]}, "--forgetting_file", str(file), "--max_steps", "2")
    assert {"before_forgetting_perplexity", "after_forgetting_perplexity"} <= metrics.keys()
    printed = capsys.readouterr()
    assert "forgetting" in printed.out
    assert "warning" not in printed.err
    file.write_bytes(b"good text here\n\xff\n")
    with pytest.raises(InputError, match=r"general\.txt:2: not UTF-8 text"):
        start({"train": TEXTS[:40]}, "--forgetting_file", str(file), "--max_steps", "2")


def test_the_model_goes_on_to_ner_and_sentiment(start, arguments, tmp_path, capsys):
    start({"train": TEXTS[:60]}, "--max_steps", "3")
    encoder = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").bert.state_dict()
    arguments[arguments.index("--model_name_or_path") + 1] = str(tmp_path / "out")
    arguments[arguments.index("--output_dir") + 1] = str(tmp_path / "ner")
    capsys.readouterr()
    ner.main([*arguments, "--max_steps", "1", "--learning_rate", "0"])
    assert "encoder" not in capsys.readouterr().out.split("new weights, which training sets")[1].split("\n")[0]
    tagger = AutoModelForTokenClassification.from_pretrained(tmp_path / "ner").bert.state_dict()
    assert all(torch.equal(encoder[name], tagger[name]) for name in encoder)
    rows = [{"text": text, "label": "long" if len(text) > 90 else "short"} for text in TEXTS[:40]]
    sentiment.main([
        "--train_file", write_jsonl(tmp_path / "s.jsonl", rows), "--model_name_or_path", str(tmp_path / "out"),
        "--output_dir", str(tmp_path / "sentiment"), "--max_seq_length", "64", "--precision", "fp32",
        "--max_steps", "1", "--learning_rate", "0", "--disable_tqdm", "true",
    ])  # fmt: skip
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sentiment").bert.state_dict()
    assert all(torch.equal(encoder[name], classifier[name]) for name in encoder)


@pytest.mark.soak
def test_two_processes_give_what_one_gives(start, tiny, tmp_path):
    texts = {"train": TEXTS[:60], "validation": TEXTS[60:97]}
    more = ["--optim", "sgd", "--learning_rate", "0.1", "--per_device_eval_batch_size", "3"]
    one = start(texts, *more)
    words = [w for split in texts for w in (f"--{split}_file", str(tmp_path / f"{split}.txt"))]
    words += [*settings(tiny, tmp_path), *more, "--per_device_train_batch_size", "4", "--use_cpu", "true"]
    words[words.index("--output_dir") + 1] = str(tmp_path / "two")
    Job(words, tmp_path / "log", processes=2, main=train.main).succeeds()
    two = json.loads((tmp_path / "two" / "all_results.json").read_text())
    for when in ("before", "after"):
        for score in ("loss", "perplexity", "accuracy"):
            assert two[f"{when}_validation_{score}"] == pytest.approx(one[f"{when}_validation_{score}"], rel=1e-4)


# Pairs


PARAGRAPHS = [" ".join(TEXTS[i : i + 4]) for i in range(0, 240, 4)]


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop"])
def test_segments_are_next_random_or_exchanged(objective):
    # a token is a number that identifies text and position
    chance = np.random.default_rng(1)
    texts = []
    for text in range(200):
        sizes = chance.integers(1, 20, chance.integers(2, 9))
        numbers = iter(range(1000 * text, 1000 * text + 1000))
        texts.append([[(next(numbers), START) for _ in range(size)] for size in sizes])
    sentence_of = {number: at for text in texts for at, some in enumerate(text) for number, _ in some}
    changed, seen = [], set()
    for first, second, pair in segments(texts, 40, objective):
        assert first
        assert second
        assert len(first) + len(second) <= 40
        (a, b), (c, d) = ((part[0][0], part[-1][0]) for part in (first, second))
        assert b - a == len(first) - 1
        changed.append(pair)
        if pair == 0:
            assert c == b + 1
            assert c // 1000 == b // 1000
        elif objective == "mlm+sop":
            assert a == d + 1
        else:
            assert c // 1000 != b // 1000
            # else a full row or half a sentence at its end would tell a random segment without reading it
            assert sentence_of.get(d + 1) != sentence_of[d] or sentence_of[c] == sentence_of[d]
        seen |= {token for token, _ in first}
    assert np.mean(changed) == pytest.approx(0.5, abs=0.06)
    assert len(seen) > 1000
    assert list(segments(texts, 40, objective)) == list(segments(texts, 40, objective))


@pytest.mark.soak
@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm+sop"])
def test_a_run_with_pairs_learns_both_and_fills_masks(start, tmp_path, tokenizer, objective, monkeypatch):
    monkeypatch.setattr("common.training.evaluation.EVALUATED_TOGETHER", 64)  # several parts
    few = PARAGRAPHS[:8]
    metrics = start(
        {"train": few, "validation": few}, "--objective", objective, "--num_train_epochs", "120", "--learning_rate",
        "3e-3", "--eval_strategy", "no", "--save_strategy", "no",
    )  # fmt: skip
    assert metrics["after_validation_pair_accuracy"] > 0.95
    assert metrics["after_validation_accuracy"] > metrics["before_validation_accuracy"] + 0.15
    out = tmp_path / "out"
    assert json.loads((out / "config.json").read_text())["architectures"] == ["BertForPreTraining"]
    assert len(pipeline("fill-mask", model=str(out))("the [MASK] is")) == 5
    file = write_jsonl(tmp_path / "in.jsonl", [{"text": "the [MASK] is"}])
    assert predict.main(["--model", str(out), "--input", file, "--output", str(tmp_path / "o.jsonl")]) == 1


@pytest.mark.soak
def test_pairs_accumulated_and_on_two_processes_take_the_same_steps(start, tiny, tmp_path):
    texts = {"train": PARAGRAPHS[:40], "validation": PARAGRAPHS[40:]}
    more = ["--objective", "mlm+nsp", "--optim", "sgd", "--learning_rate", "0.1"]
    one = start(texts, *more)
    names = [name for name in one if name.startswith("after")]
    assert len(names) == 4
    parts = start(texts, *more, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4")
    assert [parts[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-4)
    words = [w for split in texts for w in (f"--{split}_file", str(tmp_path / f"{split}.txt"))]
    words += [*settings(tiny, tmp_path), *more, "--per_device_train_batch_size", "4", "--use_cpu", "true"]
    words[words.index("--output_dir") + 1] = str(tmp_path / "two")
    Job(words, tmp_path / "log", processes=2, main=train.main).succeeds()
    two = json.loads((tmp_path / "two" / "all_results.json").read_text())
    assert [two[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-4)


def test_texts_of_one_sentence_make_no_pairs_and_some_models_have_no_head_for_them(start, tmp_path):
    with pytest.raises(InputError, match="texts of two sentences or more"):
        start({"train": ["one sentence here"] * 30}, "--objective", "mlm+sop")
    folder = tmp_path / "distilbert"
    tokenizer = build_tokenizer()
    config = copy.deepcopy(CONFIGS[-1])
    config.vocab_size = len(tokenizer)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="DistilBertForMaskedLM has no head for pairs"):
        start({"train": PARAGRAPHS[:30]}, "--objective", "mlm+sop", "--model_name_or_path", str(folder))


# From scratch


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_from_scratch_with_a_tokenizer_of_its_own(start, tmp_path, kind, capsys):
    metrics = start(
        {"train": TEXTS[:150], "validation": TEXTS[150:180]}, "--tokenizer_train", kind, "--vocab_size", "500",
        "--model_size", "tiny", "--config_overrides", "num_hidden_layers=1,hidden_dropout_prob=0.0",
        "--masking", "whole_word",
    )  # fmt: skip
    assert "new bert model: 0.3 million parameters" in capsys.readouterr().out
    assert metrics["before_validation_perplexity"] == pytest.approx(500, rel=0.3)
    assert metrics["after_validation_perplexity"] < metrics["before_validation_perplexity"]
    out = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == 500
    assert tokenizer.decode(tokenizer("Ann left Oslo.")["input_ids"], skip_special_tokens=True).strip() in (
        "Ann left Oslo.", "Ann left Oslo .",
    )  # fmt: skip
    assert AutoModelForMaskedLM.from_pretrained(out).config.num_hidden_layers == 1
    assert len(pipeline("fill-mask", model=str(out))("Ann [MASK] Oslo.")) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--config_overrides", "layers=3"), "--config_overrides layers=3: unknown; give NAME=VALUE of a bert config"),
        (("--config_overrides", "hidden_size=big"), "hidden_size=big: must have the type of 64"),
        (("--config_overrides", "hidden_size=63"), "--config_overrides: invalid model configuration"),
        (("--vocab_size", "10"), "--vocab_size 10: must be at least 300"),
        (("--mlm_probability", "1.5"), "--mlm_probability 1.5: must be between 0 and 1"),
        (("--mask_replaced", "0.95"), "--mask_replaced and --mask_random"),
        (("--metric_for_best_model", "perplexty"), "did you mean perplexity"),
        (("--max_seq_length", "300"), "reads at most 128 tokens"),
        (("--forgetting_file", "none.txt"), "--forgetting_file none.txt: no such file"),
    ],
)
def test_wrong_arguments_are_told(start, tmp_path, words, message):
    with pytest.raises(InputError, match=re.escape(message)):
        start({"train": TEXTS[:30]}, *words)
    assert not (tmp_path / "out" / "model.safetensors").exists()


# Texts of users


def test_files_folders_and_patterns(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one.txt").write_text("first line\n\nsecond line\nthird\n")
    write_jsonl(tmp_path / "a" / "b" / "two.jsonl", [{"text": "from JSON"}, {"text": " "}])
    (tmp_path / "a" / "b" / "notes.md").write_text("not read")
    Dataset.from_dict({"text": ["from Parquet"]}).to_parquet(tmp_path / "a" / "b" / "three.parquet")

    def texts(path: str, **more) -> list[str]:
        args = CorpusArguments(train_file=path, validation_file=path, **more)
        return load_corpus(args)["train"]["text"][:]

    lines = ["first line", "second line", "third"]
    assert texts(str(tmp_path / "a")) == ["from Parquet", "from JSON", *lines]
    assert texts(str(tmp_path / "a" / "*.txt")) == lines
    assert texts(str(tmp_path / "a" / "**" / "t*.*")) == ["from Parquet", "from JSON"]
    one = str(tmp_path / "a" / "one.txt")
    assert texts(one, text_unit="paragraph") == ["first line", "second line\nthird"]
    assert texts(one, text_unit="document") == ["first line\n\nsecond line\nthird"]
    assert set(CorpusArguments(train_file=str(tmp_path / "a")).files()) == {f"train_file {i}" for i in (1, 2, 3)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no rows"),
        (b"\n \n\t\n", "contains no rows"),
        (b"good line here\nbad \xff\xfe line\n", "train.txt:2: not UTF-8 text"),
        ("good line\n".encode("utf-16-le"), "train.txt:1: contains zero bytes; likely utf-16-le, by its zero bytes"),
        (bytes(range(256)) * 50, "contains zero bytes"),
        (b"ok ok ok\n" + b"x" * 6_000_000, "train.txt:2: more than --max_chars 1,000,000 characters in one line"),
        (b"ok ok ok\n" + b"x" * 1_500_000, "train.txt:2: 1,500,000 characters in one row"),
        (b"a\nb\nI\n" * 20, "every text has fewer than 3 tokens; give longer texts"),
    ],
)
def test_bad_text_files_are_told(tiny, tmp_path, content, message):
    (tmp_path / "train.txt").write_bytes(content)
    (tmp_path / "good.txt").write_text("\n".join(TEXTS[:20]))
    files = ["--train_file", str(tmp_path / "train.txt"), "--validation_file", str(tmp_path / "good.txt")]
    with pytest.raises(InputError, match=re.escape(message)):
        train.main([*files, *settings(tiny, tmp_path)])
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.txt", "no such file; did you mean"),
        ("*.md", "no file matches this pattern"),
        ("empty", "no text file in this folder"),
        ("nine.doc", "unknown file type '.doc'"),
    ],
)
def test_paths_without_texts_are_told(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "nine.txt").write_text("one text here")
    (tmp_path / "nine.doc").write_text("one text here")
    with pytest.raises(InputError, match=re.escape(message)):
        load_corpus(CorpusArguments(train_file=str(tmp_path / path), validation_file=str(tmp_path / "nine.txt")))


def test_texts_that_are_too_short_are_counted(start, capsys):
    start({"train": ["a", *TEXTS[:30]], "validation": TEXTS[30:50]}, "--max_steps", "1")
    assert "train: dropped 1 of 31 texts with fewer than 3 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("every", [24, pytest.param(1, marks=pytest.mark.soak)])
def test_corrupted_files_are_refused_or_train_as_they_stand(tiny, tmp_path, capsys, every):
    good = [{"text": text} for text in TEXTS[:12]]
    found = list(variants(good))
    assert len(found) >= 150
    found = found[::every]
    whole = write_jsonl(tmp_path / "good.jsonl", good)
    file = tmp_path / "bad.jsonl"
    words = [
        "--train_file", str(file), "--validation_file", whole, *settings(tiny, tmp_path), "--max_steps", "1",
        "--save_strategy", "no", "--eval_strategy", "no",
    ]  # fmt: skip
    trained, refused = tried(found, file, lambda: train.main(words))
    capsys.readouterr()
    assert trained > 30 // every
    assert refused > 60 // every


@pytest.mark.soak
def test_the_documentation_of_python_is_split_by_module():
    data = python_documentation()
    names = {split: set(rows["id"]) for split, rows in data.items()}
    assert not names["train"] & names["validation"]
    assert 0.03 < len(data["validation"]) / len(data["train"]) < 0.3
    assert len(data["train"]) > 4000
    assert any(name.startswith("topics/") for name in names["validation"])
    texts = {split: set(rows["text"]) for split, rows in data.items()}
    assert len(texts["train"] & texts["validation"]) < 0.02 * len(texts["validation"])
    again = python_documentation()
    assert again["train"]["text"][:] == data["train"]["text"][:]
