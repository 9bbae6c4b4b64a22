"""Measure training and predict of our recipes and of the stock Trainer on a busy machine.

    make bench ARGS="--busy"
    python -m tests.benchmarks.busy ner qa --rounds 5
    GOMP_SPINCOUNT=10000 python -m tests.benchmarks.busy --rounds 1

Each arm runs alone, beside one and two endless loops, and beside a second training of the same arm. The rows, options
and arms are those of `tests.benchmarks.bench`. A finished run is added to outputs/bench/busy.jsonl, and is reused while
options and code stay the same. The results are in outputs/bench/busy.md. Run nothing else at the same time.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks import bench
from tests.benchmarks.bench import ARMS, FOLDER, JOBS, Kept, code_of, settings_of, shown, title_of, training, written

#: name of a situation -> number of endless loops beside the run; None: a second training
SITUATIONS: dict[str, int | None] = {"idle": 0, "one busy loop": 1, "two busy loops": 2, "another training": None}
#: quantity -> title
RATES = {"train_tokens": "training", "predict_tokens": "predict"}
#: variables of the environment that change how threads share the cores
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
#: epochs of the second training, which is killed when the measured run ends
ENDLESS = 100_000


@contextmanager
def neighbours(commands: list[tuple[list[str], dict[str, str]]]) -> Iterator[None]:
    """Run commands, each with its environment, while the block runs; raise `SystemExit` if one of them ends before."""
    running = []
    with open(FOLDER / "neighbours.log", "w", encoding="utf-8") as log:
        try:
            for words, environment in commands:
                running.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
            yield
            if any(process.poll() is not None for process in running):
                sys.exit(f"a program beside the measured run has ended; see {log.name}")
        finally:
            for process in running:
                process.kill()
                process.wait()


def beside(situation: str, arm: str, recipe: str, about: dict[str, Any], data: Path, model: str | None) -> list:
    """Return the commands to run beside an arm, each with its environment."""
    loops = SITUATIONS[situation]
    if loops is not None:
        return [([sys.executable, "-c", "while True: pass"], dict(os.environ))] * loops
    module, words = training(arm, recipe, about | {"epochs": ENDLESS}, data, model, FOLDER / f"{recipe}-beside")
    return [([sys.executable, "-m", module, *map(str, words)], bench.environment(module))]


def measure(recipe: str, options: argparse.Namespace, kept: Kept) -> list[dict[str, Any]]:
    """Return the records of a recipe in each situation; run and store missing records."""
    job = JOBS[recipe]
    sizes = {name: vars(options)[name] for name in ("rows", "test_rows")}
    whole = argparse.Namespace(**vars(bench.read_options([recipe])) | sizes)
    settings = settings_of(recipe, None, whole) | {"code": code_of(recipe, "busy")}
    settings["environment"] = {name: os.environ.get(name) for name in VARIABLES}
    cache = FOLDER / "cache" / f"{recipe}-busy"
    found = []
    for seed in range(1, options.rounds + 1):
        for situation in SITUATIONS:
            for arm in ARMS if seed % 2 else ARMS[::-1]:
                about = settings | {"seed": seed, "arm": arm, "situation": situation}
                record = kept.find(about)
                if record is None:
                    data = written(recipe, None, settings["rows"], settings["digest"])
                    model = str(bench.start_of(recipe, job)) if job.start else None
                    cache.mkdir(parents=True, exist_ok=True)
                    with neighbours(beside(situation, arm, recipe, about, data, model)):
                        made = {"ours": bench.ours, "stock": bench.stock}[arm](recipe, job, about, data, model, cache)
                    record = kept.add(about | made)
                    rate = f"{record['train_tokens']:,.0f} tokens per second"
                    print(f"{recipe}, round {seed} of {options.rounds}, {situation}, {arm}: {rate}", flush=True)
                found.append(record)
    for folder in (*(FOLDER / f"{recipe}-{name}" for name in (*ARMS, "beside")), cache):
        shutil.rmtree(folder, ignore_errors=True)
    return found


def times_idle(records: list[dict[str, Any]], arm: str, rate: str, situation: str) -> list[float]:
    """Return the time in a situation over the time of the same round on an idle machine, for each round."""
    rates = {(r["situation"], r["seed"]): r[rate] for r in records if r["arm"] == arm and rate in r}
    return [rates["idle", seed] / value for (where, seed), value in rates.items() if where == situation]


def markdown(title: str, recipes: dict[str, list[dict[str, Any]]]) -> str:
    """Format one line for each recipe and situation: times of both arms over their idle times, and their ratio."""
    columns = [f"{arm}: {name}, times as long as idle" for name in RATES.values() for arm in ARMS]
    lines = [title, "", f"| recipe | beside | {' | '.join(columns)} | training, ours over stock |"]
    lines += [f"| --- | --- |{' ---: |' * (len(columns) + 1)}"]
    for recipe, records in recipes.items():
        for situation in SITUATIONS:
            cells = [shown(times_idle(records, arm, rate, situation), times=True) for rate in RATES for arm in ARMS]
            speeds = [
                statistics.median(r["train_tokens"] for r in records if (r["arm"], r["situation"]) == (arm, situation))
                for arm in ARMS
            ]
            lines.append(f"| {recipe} | {situation} | {' | '.join(cells)} | {speeds[0] / speeds[1]:.2g}x |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.busy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipes", nargs="*", metavar="recipe", help=f"of {' '.join(JOBS)}; default: ner")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each arm in each situation")
    parser.add_argument("--rows", type=int, help="use only the first N training rows")
    parser.add_argument("--test_rows", type=int, help="use only the first N validation rows and test rows")
    options = parser.parse_args(argv)
    kept, recipes = Kept(FOLDER / "busy.jsonl"), options.recipes or ["ner"]
    if unknown := [recipe for recipe in recipes if recipe not in JOBS]:
        parser.error(f"{unknown[0]}: no such recipe; known: {' '.join(JOBS)}")
    found = {recipe: measure(recipe, options, kept) for recipe in recipes}
    title = title_of([record for records in found.values() for record in records], options)
    table = markdown(title, found)
    (FOLDER / "busy.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\n{FOLDER}/busy.md")


if __name__ == "__main__":
    main()
