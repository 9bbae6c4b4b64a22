"""A recipe of a second: it counts what a start is worth, so that the scores of a plan are known."""

from pathlib import Path

TRAIN = '''
"""Toy."""
if __name__ == "__main__":
    import json, pathlib, random, sys
    words = sys.argv[1:]
    value = dict(zip(words[::2], words[1::2], strict=False))
    out = pathlib.Path(value["--output_dir"])
    started = pathlib.Path(value["--model_name_or_path"], "worth.json")
    worth = json.loads(started.read_text()) if started.exists() else 0
    if value.get("--fail") == value["--seed"]:
        sys.exit("error: it was told to fail")
    epochs = float(value.get("--num_train_epochs", 1))
    scored_only = value.get("--learning_rate") == "0"
    random = random.Random(value["--seed"] + value.get("--max_train_samples", "all"))
    share = 0.5 + 0.3 * worth + 0.01 * int(value["--seed"]) + (0.02 if epochs > 1 else 0)
    rows = [{"gold": 1, "hit": int((17 * i) % 400 < 400 * share)} for i in range(400)]
    (out / "predictions_test.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
    accuracy = sum(row["hit"] for row in rows) / 400
    (out / "worth.json").write_text(json.dumps(worth if scored_only else worth + float(value.get("--teaches", 0))))
    (out / "model.safetensors").write_text("weights")
    (out / "train_results.json").write_text(json.dumps({"trainable_parameters": 1}))
    record = {
        "scores": {"test_accuracy": accuracy}, "phases": {"train": {"seconds": 2.0 * epochs, "peak_memory_mib": 1}},
        "arguments": {"metric_for_best_model": "accuracy", "greater_is_better": True}, "code": "x",
        "rows": {"test": "0123456789abcdef"}, "finished": "now", "git_commit": None,
        "hardware": {"processes": 1, "precision": "fp32", "device": "cpu", "cores": 1, "cpu": "toy"},
    }
    (out / "run.json").write_text(json.dumps(record))
    sys.exit()

from dataclasses import dataclass
from common.args import DataArguments, ModelArguments, TrainingArguments

@dataclass
class ToyDataArguments(DataArguments):
    teaches: float = 0.0
    fail: int | None = None

@dataclass
class ToyTrainingArguments(TrainingArguments):
    num_train_epochs: float = 1
    metric_for_best_model: str | None = "accuracy"

ARGUMENTS = (ModelArguments, ToyDataArguments, ToyTrainingArguments)
'''
TRANSFER = """
from transformers import AutoModelForSequenceClassification
from common.run.transferable import TaskRows, of_mean

def training_rows(parsed):
    return TaskRows([["a text"]] * 50, [["a"]] * 50, AutoModelForSequenceClassification, (10, 400), frozenset("ab"))

def row_statistics(rows, score):
    return of_mean([row["hit"] for row in rows])
"""


def make(folder: Path) -> None:
    """Write the recipe into `recipes/toy` of a folder."""
    recipe = folder / "recipes" / "toy"
    recipe.mkdir(parents=True)
    (folder / "recipes" / "__init__.py").touch()
    (recipe / "__init__.py").touch()
    (recipe / "train.py").write_text(TRAIN, encoding="utf-8")
    (recipe / "transfer.py").write_text(TRANSFER, encoding="utf-8")
