"""Compare `recipes.mlm` with the stock Trainer: held-out perplexity after the same number of tokens.

    python -m tests.benchmarks.stock_mlm --data wikitext2 --max_steps 120 --eval_steps 20

The folder has train.txt and validation.txt, with one text per line. The stock run follows the example script of
transformers: joined texts cut into blocks, and the stock collator, head and loss. Batch, learning rate, schedule and
warm-up are those of the recipe, with bfloat16 if the CPU computes bfloat16 natively. Both runs are evaluated every
`--eval_steps` steps, on the recipe's rows and masks. `--stock_learning_rates 2e-4 1e-3` sets other learning rates for
the stock run, whose new head is random. The command prints one table. Runs are kept in outputs/bench/mlm/ and are not
repeated.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from common.args import DEFAULT_ENCODER
from common.hardware import native_bf16
from common.models.load import resolve_model
from tests.benchmarks.stock_language import batches_of_the_recipe, joined, perplexity

LENGTH, ROWS, LEARNING_RATE = 256, 32, 1e-3
FOLDER = Path("outputs/bench/mlm")


class Evaluation(TrainerCallback):
    """Evaluate held-out perplexity on the recipe's rows and masks every few steps, and record the seconds spent."""

    def __init__(self, batches: list[dict[str, Tensor]], every: int):
        self.batches, self.every, self.points, self.seconds = batches, every, [], 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._evaluate(model, 0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self._evaluate(model, state.global_step * ROWS * LENGTH)

    def _evaluate(self, model, tokens: int) -> None:
        start = time.perf_counter()
        self.points.append([tokens, perplexity(model, self.batches)])
        self.seconds += time.perf_counter() - start


def stock(options: argparse.Namespace, learning_rate: float) -> dict:
    set_seed(42)
    folder = resolve_model(DEFAULT_ENCODER)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [line for line in Path(options.data, "train.txt").read_text(encoding="utf-8").split("\n") if line.strip()]
    blocks = Dataset.from_dict({"input_ids": joined(tokenizer, texts, LENGTH)})
    held_out = batches_of_the_recipe(f"{options.data}/validation.txt", tokenizer, LENGTH, options.max_eval_samples)
    evaluation = Evaluation(held_out, options.eval_steps)
    trainer = Trainer(
        model=AutoModelForMaskedLM.from_pretrained(folder),
        args=TrainingArguments(
            str(FOLDER / "stock"), max_steps=options.max_steps, learning_rate=learning_rate, warmup_steps=0.06,
            weight_decay=0.01, per_device_train_batch_size=ROWS, save_strategy="no", use_cpu=True,
            bf16=native_bf16(True), disable_tqdm=True, remove_unused_columns=False,
        ),
        train_dataset=blocks,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        callbacks=[evaluation],
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    return {"points": evaluation.points, "seconds": time.perf_counter() - start - evaluation.seconds}


def ours(options: argparse.Namespace, learning_rate: float) -> dict:
    folder = FOLDER / "ours"
    words = [
        "--train_file", f"{options.data}/train.txt", "--validation_file", f"{options.data}/validation.txt",
        "--max_eval_samples", options.max_eval_samples, "--max_steps", options.max_steps, "--max_seq_length", LENGTH,
        "--per_device_train_batch_size", ROWS, "--learning_rate", learning_rate, "--eval_strategy", "steps",
        "--eval_steps", options.eval_steps, "--save_strategy", "no", "--disable_tqdm", "true",
        "--output_dir", folder, "--overwrite", "true",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "recipes.mlm.train", *map(str, words)], check=True)
    results = json.loads((folder / "all_results.json").read_text())
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    found = [entry for entry in history if "eval_loss" in entry]
    points = [[0, results["before_validation_perplexity"]]]
    points += [[entry["num_input_tokens_seen"], entry["eval_perplexity"]] for entry in found]
    return {
        "points": points,
        "seconds": results["train_runtime"] - sum(entry["eval_runtime"] for entry in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--max_steps", type=int, default=120)
    parser.add_argument("--eval_steps", type=int, default=20)
    parser.add_argument("--max_eval_samples", type=int, default=600)
    parser.add_argument("--stock_learning_rates", type=float, nargs="+", default=[LEARNING_RATE])
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = []
    for arm, rate in [(ours, LEARNING_RATE), *((stock, rate) for rate in options.stock_learning_rates)]:
        name = f"{arm.__name__}_{rate:g}_{options.max_steps}_{options.eval_steps}_{options.max_eval_samples}.json"
        file = FOLDER / name
        if not file.exists():
            file.write_text(json.dumps(arm(options, rate)))
        found.append((f"{arm.__name__}, {rate:g}", json.loads(file.read_text())))
    print("| step |" + "".join(f" {name}: tokens | perplexity |" for name, _ in found))
    print("| ---: |" + " ---: | ---: |" * len(found))
    for step, points in enumerate(zip(*(result["points"] for _, result in found), strict=True)):
        cells = (f" {tokens:,} | {perplexity:,.1f} |" for tokens, perplexity in points)
        print(f"| {step * options.eval_steps} |" + "".join(cells))
    rates = (f"{name} {result['points'][-1][0] / result['seconds']:,.0f}" for name, result in found)
    print("tokens per second, without evaluations: " + ", ".join(rates))


if __name__ == "__main__":
    main()
