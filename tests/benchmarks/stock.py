"""Share code between the stock arms of `tests.benchmarks.bench`, which follow the library's example scripts.

Each arm takes a folder with train.jsonl, validation.jsonl and test.jsonl. It trains in float32, in random order and
without warm-up, evaluates on the validation rows, predicts the test rows, and keeps the last weights. It writes
`stock.json` with its score. The command gives model, epochs, batch size, learning rate and seed; all other settings are
the Trainer's defaults.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import DatasetDict, load_dataset
from transformers import TrainingArguments, set_seed

from common.args import DEFAULT_ENCODER
from common.models.load import resolve_model


def options_of(argv: list[str] | None, description: str) -> argparse.Namespace:
    """Return the common options, and set the seed. `model` becomes a local folder."""
    parser = argparse.ArgumentParser(description=description)
    for name, kind in (("data", str), ("output_dir", str), ("epochs", float), ("batch", int), ("learning_rate", float)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--model", default=DEFAULT_ENCODER)
    parser.add_argument("--length", type=int, default=256, help="tokens in a block of a language model")
    options = parser.parse_args(argv)
    options.model = resolve_model(options.model)
    set_seed(options.seed)
    return options


def load(options: argparse.Namespace) -> DatasetDict:
    there = {path.stem: str(path) for path in Path(options.data).glob("*.jsonl")}
    return load_dataset("json", data_files={s: there[s] for s in ("train", "validation", "test") if s in there})


def arguments(options: argparse.Namespace, kind: type = TrainingArguments, **more) -> TrainingArguments:
    return kind(
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        learning_rate=options.learning_rate,
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        **more,
    )


def keep(options: argparse.Namespace, score: float) -> None:
    Path(options.output_dir, "stock.json").write_text(json.dumps({"score": score}), encoding="utf-8")
