"""A recipe against the stock Trainer on your data: score over seeds, speed and memory, in alternating runs.

    python -m tests.benchmarks.against_stock ner --data path/to/wnut17 --epochs 5 --batch 32
    python -m tests.benchmarks.against_stock sentiment --data path/to/sst2 --epochs 2 --learning_rate 5e-5
    python -m tests.benchmarks.against_stock qa --data path/to/qamr --epochs 2 --train_rows 1000 --test_rows 1000
    python -m tests.benchmarks.against_stock ner --table

A data folder holds train.jsonl, validation.jsonl and test.jsonl in the recipe's format. Each run is added to
outputs/bench/RECIPE.jsonl when it is done; runs that stand there are not made again, so a stopped benchmark goes on.
`train` is the time of the training loop without evaluation, `job` that of the whole process, each as the median over
seeds of stock's seconds over ours; memory is the peak resident set, ours over stock's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

FOLDER = Path("outputs/bench")
SCORED = ("train", "test")
#: for each recipe its score and the score of its baseline, both on the test rows
SCORES = {
    "ner": ("f1", "gazetteer_f1"),
    "sentiment": ("accuracy", "bag_of_words_accuracy"),
    "qa": ("f1", "baseline_f1"),
}


def run(command: list[str]) -> dict[str, float]:
    """Wall seconds and peak resident memory (MiB) of a command, which must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"exit status {os.waitstatus_to_exitcode(status)}: {' '.join(command)}")
    return {"job_seconds": time.perf_counter() - start, "peak_mib": usage.ru_maxrss / 1024}


def ours(recipe: str, data: Path, settings: dict[str, str], folder: Path) -> dict[str, float]:
    files = [word for s in ("train", "validation", "test") for word in (f"--{s}_file", str(data / f"{s}.jsonl"))]
    names = {
        **{"epochs": "num_train_epochs", "batch": "per_device_train_batch_size", "learning_rate": "learning_rate"},
        **{"seed": "seed", "train_rows": "max_train_samples", "test_rows": "max_predict_samples"},
    }
    words = [word for name, value in settings.items() for word in (f"--{names[name]}", value)]
    command = [sys.executable, "-m", f"recipes.{recipe}.train", *files, *words]
    measured = run([*command, "--output_dir", str(folder), "--overwrite"])
    results = json.loads((folder / "all_results.json").read_text())
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    evaluation = sum(entry.get("eval_runtime", 0) for entry in history)
    score, baseline = (results[f"test_{name}"] for name in SCORES[recipe])
    scores = {"score": score, "baseline": baseline}
    return measured | scores | {"train_seconds": results["train_runtime"] - evaluation}


def stock(recipe: str, data: Path, settings: dict[str, str], folder: Path) -> dict[str, float]:
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", f"tests.benchmarks.stock_{recipe}", "--data", str(data), *words]
    measured = run([*command, "--output_dir", str(folder)])
    results = json.loads((folder / "stock.json").read_text())
    return measured | {"score": results["score"], "train_seconds": results["train_seconds"]}


def rows(path: Path, limit: str | None) -> int:
    """Rows of a file that a run takes."""
    with open(path, encoding="utf-8") as file:
        there = sum(1 for line in file if line.strip())
    return min(there, int(limit)) if limit else there


def table(records: list[dict]) -> None:
    print("| data | train / test rows | epochs, batch | ours | stock | baseline | minutes | train | job | memory |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")

    def settings(record: dict) -> tuple:
        return tuple(record.get(n) for n in ("data", "epochs", "batch", "learning_rate", "train_rows", "test_rows"))

    for key in dict.fromkeys(map(settings, records)):
        runs = [r for r in records if settings(r) == key]
        arms = {arm: {r["seed"]: r for r in runs if r["arm"] == arm} for arm in ("ours", "stock")}
        pairs = [(arms["ours"][s], arms["stock"][s]) for s in arms["ours"] if s in arms["stock"]]
        if not pairs:
            continue

        def score(arm: int, pairs=pairs) -> str:
            scores = [pair[arm]["score"] for pair in pairs]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            return f"{statistics.mean(scores):.3f} ± {spread:.3f}"

        def ratio(name: str, pairs=pairs) -> float:
            return statistics.median(b[name] / a[name] for a, b in pairs)

        minutes = statistics.median(a["job_seconds"] for a, _ in pairs) / 60
        print(
            f"| {key[0]} | {int(key[4]):,} / {int(key[5]):,} | {key[1]}, {key[2]} | {score(0)} "
            f"| {score(1)} | {pairs[0][0]['baseline']:.3f} | {minutes:.1f} | {ratio('train_seconds'):.1f}x "
            f"| {ratio('job_seconds'):.1f}x | {1 / ratio('peak_mib'):.2f}x |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=list(SCORES))
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="folders")
    parser.add_argument("--epochs", default="5")
    parser.add_argument("--batch", default="32")
    parser.add_argument("--learning_rate", default="2e-4")
    parser.add_argument("--train_rows", help="only the first so many rows, for both; all when not given")
    parser.add_argument("--test_rows", help="the same for test")
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--table", action="store_true", help="only print the table of what has been run")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    results = FOLDER / f"{options.recipe}.jsonl"
    records = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    settings = {"epochs": options.epochs, "batch": options.batch, "learning_rate": options.learning_rate}
    for data in [] if options.table else options.data:
        for seed in options.seeds:
            for arm in (ours, stock):
                sizes = {f"{s}_rows": str(rows(data / f"{s}.jsonl", getattr(options, f"{s}_rows"))) for s in SCORED}
                run_settings = settings | {"seed": seed} | sizes
                about = {"data": data.name, "arm": arm.__name__} | run_settings
                if any(about.items() <= record.items() for record in records):
                    continue
                folder = FOLDER / f"{options.recipe}-{arm.__name__}"
                record = about | arm(options.recipe, data, run_settings, folder)
                record |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "cores": os.cpu_count()}
                records.append(record)
                with open(results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                found = f"{SCORES[options.recipe][0]} {record['score']:.4f}, {record['job_seconds']:.0f} s"
                print(f"{data.name} seed {seed} {arm.__name__}: {found}", flush=True)
    table(records)


if __name__ == "__main__":
    main()
