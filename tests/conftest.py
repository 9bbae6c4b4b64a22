"""Provide tiny models from a config, tiny data, and a way to run the recipes as a user does."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FunctionType

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and parallel tests share the cores

import pytest
import torch
from datasets.fingerprint import Hasher
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

from common.hardware import configure_allocator

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "recipes" / "ner" / "sample"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a small WordPiece tokenizer like BERT's on the sample; many words have several tokens."""
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=False)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [" ".join(row["tokens"]) for row in read_jsonl(SAMPLE / "train.jsonl")]
    wordpiece.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL))
    ends = [(token, wordpiece.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    wordpiece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=wordpiece, model_max_length=128, **{f"{k}_token": v for k, v in names.items()}
    )


def pytest_addoption(parser):
    parser.addoption("--order-seed", type=int, help="run the tests in the random order of this seed")
    parser.addoption("--soak", action="store_true", help="run only the long tests, which `make soak` runs")


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: too long for `make test`; runs under --soak")


def pytest_collection_modifyitems(config, items):
    soak = config.getoption("--soak")
    left_out = [item for item in items if (item.get_closest_marker("soak") is not None) != soak]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    if config.getoption("--order-seed") is not None:
        random.Random(config.getoption("--order-seed")).shuffle(items)


def pytest_collection_finish():
    configure_allocator()  # as `command_line` does


@pytest.fixture(autouse=True)
def no_function_is_hashed(monkeypatch) -> Iterator[None]:
    """Fail if `datasets` hashes a function of this project, which takes seconds in a script."""
    hashed: list[str] = []
    update = Hasher.update

    def watched(self: Hasher, value: object) -> None:
        function = value.func if isinstance(value, partial) else value
        module = function.__module__ if isinstance(function, FunctionType) else ""
        if module.startswith(("common.", "recipes.")):
            hashed.append(f"{module}.{function.__qualname__}")
        update(self, value)

    monkeypatch.setattr(Hasher, "update", watched)
    yield
    assert not hashed, f"map these by `Splits.map` or `map_rows` of common/data/mapping.py: {hashed}"


@pytest.fixture(autouse=True)
def _seed():
    """Reset the random seed: each test draws the same numbers, alone or after other tests."""
    set_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer) -> str:
    """Return the folder of a random BERT of two layers, without dropout for exact comparison of runs."""
    folder = tmp_path_factory.mktemp("tiny")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def small(tmp_path) -> dict[str, str]:
    """Return the first rows of the sample as files: 48 for training, 20 for validation, 20 for test."""
    sizes = {"train": 48, "validation": 20, "test": 20}
    return {
        split: write_jsonl(tmp_path / f"{split}.jsonl", read_jsonl(SAMPLE / f"{split}.jsonl")[:size])
        for split, size in sizes.items()
    }


@pytest.fixture
def arguments(tiny, small, tmp_path) -> list[str]:
    """Return arguments of a training run of seconds: tiny model, small files, fp32."""
    files = [word for split, file in small.items() for word in (f"--{split}_file", file)]
    return [
        *files,
        *("--model_name_or_path", tiny, "--output_dir", str(tmp_path / "out"), "--max_seq_length", "64"),
        *("--doc_stride", "16", "--precision", "fp32", "--num_train_epochs", "2", "--learning_rate", "1e-3"),
        *("--per_device_train_batch_size", "16", "--save_min_seconds", "0", "--disable_tqdm", "true"),
    ]


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run `python ...` from the repository root with one thread per process, and return its output."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=env | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
