"""A recipe against the stock Trainer on your data: score over seeds, speed and memory, in alternating runs.

    python -m tests.benchmarks.compare ner --data path/to/wnut17 --epochs 5 --batch 32
    python -m tests.benchmarks.compare sentiment --data path/to/sst2 --epochs 2 --learning_rate 5e-5
    python -m tests.benchmarks.compare ner --table

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
#: for each recipe its score and the score of its baseline, both on the test rows
SCORES = {"ner": ("f1", "gazetteer_f1"), "sentiment": ("accuracy", "bag_of_words_accuracy")}


def run(command: list[str]) -> dict[str, float]:
    """Wall seconds and peak resident memory (MiB) of a command, which must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"exit status {os.waitstatus_to_exitcode(status)}: {' '.join(command)}")
    return {"job_seconds": time.perf_counter() - start, "peak_mib": usage.ru_maxrss / 1024}


def ours(
    recipe: str, data: Path, epochs: str, batch: str, learning_rate: str, seed: str, folder: Path
) -> dict[str, float]:
    files = [word for s in ("train", "validation", "test") for word in (f"--{s}_file", str(data / f"{s}.jsonl"))]
    measured = run(
        [
            *(sys.executable, "-m", f"recipes.{recipe}.train", *files, "--num_train_epochs", epochs, "--seed", seed),
            *("--per_device_train_batch_size", batch, "--learning_rate", learning_rate),
            *("--output_dir", str(folder), "--overwrite"),
        ]
    )
    results = json.loads((folder / "all_results.json").read_text())
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    evaluation = sum(entry.get("eval_runtime", 0) for entry in history)
    score, baseline = (results[f"test_{name}"] for name in SCORES[recipe])
    scores = {"score": score, "baseline": baseline}
    return measured | scores | {"train_seconds": results["train_runtime"] - evaluation}


def stock(
    recipe: str, data: Path, epochs: str, batch: str, learning_rate: str, seed: str, folder: Path
) -> dict[str, float]:
    measured = run(
        [
            *(
                sys.executable,
                "-m",
                f"tests.benchmarks.stock_{recipe}",
                "--data",
                str(data),
                "--output_dir",
                str(folder),
            ),
            *("--epochs", epochs, "--batch", batch, "--learning_rate", learning_rate, "--seed", seed),
        ]
    )
    results = json.loads((folder / "stock.json").read_text())
    return measured | {"score": results["score"], "train_seconds": results["train_seconds"]}


def rows(path: Path) -> int:
    with open(path, encoding="utf-8") as file:
        return sum(1 for line in file if line.strip())


def table(records: list[dict]) -> None:
    print("| data | train / test rows | epochs, batch | ours | stock | baseline | minutes | train | job | memory |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for key in dict.fromkeys((r["data"], r["epochs"], r["batch"], r["learning_rate"]) for r in records):
        runs = [r for r in records if (r["data"], r["epochs"], r["batch"], r["learning_rate"]) == key]
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
            f"| {key[0]} | {runs[0]['train_rows']:,} / {runs[0]['test_rows']:,} | {key[1]}, {key[2]} | {score(0)} "
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
                about = {"data": data.name, "arm": arm.__name__, "seed": seed} | settings
                if any(about.items() <= record.items() for record in records):
                    continue
                folder = FOLDER / f"{options.recipe}-{arm.__name__}"
                record = about | arm(options.recipe, data, *settings.values(), seed, folder)
                record |= {"train_rows": rows(data / "train.jsonl"), "test_rows": rows(data / "test.jsonl")}
                record |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "cores": os.cpu_count()}
                records.append(record)
                with open(results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                found = f"{SCORES[options.recipe][0]} {record['score']:.4f}, {record['job_seconds']:.0f} s"
                print(f"{data.name} seed {seed} {arm.__name__}: {found}", flush=True)
    table(records)


if __name__ == "__main__":
    main()
