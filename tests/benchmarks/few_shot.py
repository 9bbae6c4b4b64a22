"""Compare `--few_shot contrastive` of the classification recipe with the setfit library on the same few rows.

    python -m tests.benchmarks.few_shot --data data/ag_news data/sst5 --shots 8 16 64 --seeds 10
    python -m tests.benchmarks.few_shot --table

A data folder has train.jsonl and test.jsonl with `text` and `label`. Each cell is one data set, number of shots, seed
and arm. All arms of a seed train the same encoder on the same rows, and are scored on the first `--test_rows` test
rows. No arm sees the other rows: the validation file of the recipe is its training rows.

The setfit arm has the settings of Tunstall et al. 2022 (https://arxiv.org/abs/2209.11055) and the defaults of the
library: 20 positive and 20 negative pairs a row, one epoch, batches of 16 pairs, float32. `--setfit_steps` limits its
steps, because many rows take hours on a CPU; the record keeps its steps. The frozen arm is the library without its
contrastive training: its logistic regression on the vectors of the encoder as it is.

Seconds are those of the whole job after the imports: reading, training, scoring, and for the recipe saving and pictures
too. A finished cell is a line of outputs/few_shot/cells.jsonl and is not repeated, so the same command resumes.
"""

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import set_seed

from common.args import DEFAULT_ENCODER
from common.hardware import hardware
from common.models.load import resolve_model
from recipes.sentiment import train
from recipes.sentiment.few_shot import draw
from tests.conftest import read_jsonl, write_jsonl

FOLDER = Path("outputs/few_shot")
RECORD = FOLDER / "cells.jsonl"
ARMS = ("contrastive", "frozen", "setfit")
KEY = ("data", "shots", "seed", "arm", "setfit_steps")


def by_setfit(rows: list[dict], test: list[dict], seed: int, most_steps: int, frozen: bool) -> dict[str, float]:
    """Train and score with the setfit library, or its head alone; return the accuracy and the steps."""
    from setfit import SetFitModel, Trainer, TrainingArguments

    set_seed(seed)
    model = SetFitModel.from_pretrained(resolve_model(DEFAULT_ENCODER), labels=sorted({row["label"] for row in rows}))
    args = TrainingArguments(
        num_iterations=20, max_steps=most_steps, seed=seed, output_dir=str(FOLDER / "setfit"), save_strategy="no",
        report_to="none", show_progress_bar=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=Dataset.from_list(rows))
    if frozen:
        trainer.train_classifier([row["text"] for row in rows], [row["label"] for row in rows])
    else:
        trainer.train()
    predicted = model.predict([row["text"] for row in test], show_progress_bar=False)
    hits = [str(one) == row["label"] for one, row in zip(predicted, test, strict=True)]
    return {"accuracy": float(np.mean(hits)), "steps": trainer.st_trainer.state.global_step}


def by_recipe(files: dict[str, str], seed: int) -> dict[str, float]:
    """Train and score with the recipe; return its accuracy."""
    words = [word for split, file in files.items() for word in (f"--{split}_file", file)]
    metrics = train.main([
        *words, "--few_shot", "contrastive", "--seed", str(seed), "--output_dir", str(FOLDER / "contrastive"),
        "--overwrite", "true", "--disable_tqdm", "true",
    ])  # fmt: skip
    return {"accuracy": metrics["test_accuracy"]}


def run_cell(folder: Path, shots: int, seed: int, arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one cell; return its line of the record."""
    rows = [{"text": row["text"], "label": str(row["label"])} for row in read_jsonl(folder / "train.jsonl")]
    test = [{"text": row["text"], "label": str(row["label"])} for row in read_jsonl(folder / "test.jsonl")]
    drawn, test = draw(Dataset.from_list(rows), shots, seed).to_list(), test[: options.test_rows]
    files = {"train": write_jsonl(FOLDER / "train.jsonl", drawn), "test": write_jsonl(FOLDER / "test.jsonl", test)}
    files["validation"] = files["train"]
    start, cpu = time.perf_counter(), time.process_time()
    if arm == "contrastive":
        scores = by_recipe(files, seed)
    else:
        scores = by_setfit(drawn, test, seed, options.setfit_steps, frozen=arm == "frozen")
    return {
        "data": folder.name, "shots": shots, "seed": seed, "arm": arm, "setfit_steps": options.setfit_steps, **scores,
        "seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1),
        "test_rows": len(test), "threads": torch.get_num_threads(), "machine": hardware()["cpu"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def print_table(cells: list[dict[str, Any]]) -> None:
    """Print mean accuracy with its standard deviation over the seeds that all arms of a row have, and seconds."""
    groups: dict[tuple, dict[str, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
    for cell in cells:
        groups[cell["data"], cell["shots"]][cell["arm"]][cell["seed"]] = cell
    arms = [arm for arm in ARMS if any(arm in of_group for of_group in groups.values())]
    print("| data | shots | seeds |", " | ".join(arms), "| setfit - its standard error | seconds, same order | CPU s |")
    print("| --- | ---: | ---: |", " ---: |" * (len(arms) + 3))
    for (data, shots), of_group in groups.items():
        seeds = sorted(set.intersection(*(set(of_group[arm]) for arm in of_group)))
        texts, seconds, cpu = [], [], []
        bar = "-"
        for arm in arms:
            found = [of_group[arm][seed] for seed in seeds] if arm in of_group else []
            scores = [cell["accuracy"] for cell in found]
            if not scores:
                texts.append("-")
                continue
            spread = statistics.stdev(scores) if len(scores) > 1 else math.nan
            texts.append(f"{statistics.mean(scores):.3f} ± {spread:.3f}")
            seconds.append(f"{statistics.median(cell['seconds'] for cell in found):.0f}")
            cpu.append(f"{statistics.median(cell['cpu_seconds'] for cell in found):.0f}")
            if arm == "setfit":
                bar = f"{statistics.mean(scores) - spread / math.sqrt(len(scores)):.3f}"
        line = [data, str(shots), str(len(seeds)), *texts, bar, " / ".join(seconds), " / ".join(cpu)]
        print("|", " | ".join(line), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, default=[], help="folders with train.jsonl and test.jsonl")
    parser.add_argument("--shots", nargs="+", type=int, default=[8, 16, 64], help="rows of each class")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds, from 1")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--setfit_steps", type=int, default=-1, help="most steps of setfit; -1: all of its pairs")
    parser.add_argument("--test_rows", type=int, default=1000, help="first rows of the test file that are scored")
    parser.add_argument("--table", action="store_true", help="print the table of the finished cells only")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    cells = read_jsonl(RECORD) if RECORD.exists() else []
    for shots in options.shots if not options.table else []:
        for seed in range(1, options.seeds + 1):
            for folder in options.data:
                for arm in options.arms:
                    key = folder.name, shots, seed, arm, options.setfit_steps
                    if any(tuple(cell[name] for name in KEY) == key for cell in cells):
                        continue
                    cells.append(run_cell(folder, shots, seed, arm, options))
                    with open(RECORD, "a", encoding="utf-8") as file:
                        file.write(json.dumps(cells[-1]) + "\n")
                    print(json.dumps(cells[-1]), flush=True)
    print_table(cells)


if __name__ == "__main__":
    main()
