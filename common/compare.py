"""Ways of tuning a recipe, or other settings, side by side: each under the same budget, with several seeds.

    make compare RECIPE=ner METHODS="full head lora dora adapter ia3 bias"
    make compare RECIPE=ner METHODS="full lora" ARGS="--train_file my.jsonl --num_train_epochs 3" SEEDS="1 2 3 4 5"
    make compare RECIPE=sentiment SETTINGS=common/regularisers.yaml
    python -m common.compare ner --settings my_settings.yaml --max_train_samples 1000

A method is a value of `--tuning`. A file of settings maps names to arguments of the recipe, such as `twice the rate:
--learning_rate 4e-4`. All other arguments are the recipe's, and those of every run. The runs are made one after the
other. Each that is done is added to `outputs/compare/RECIPE/results.jsonl` and not made again, and one that was stopped
goes on (its seconds are then left out): give the same command again. What comes out lies beside that file:
`comparison.md`, `comparison.json` and `comparison.png`, of the runs that the command asks for.

(The recipes against the stock Trainer: `make bench`.)
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from common.errors import InputError, RunStopped, command_line, one_line, tell, warn

#: arguments that a comparison sets itself
OWN = ("--seed", "--output_dir", "--overwrite", "--resume_from_checkpoint")
#: reads the arguments of all runs as their recipe would, so that a mistake in the last is told before the first
CHECK = """
import importlib, json, sys
from common.args import parse
from common.errors import command_line
arguments = importlib.import_module(sys.argv[1]).ARGUMENTS
command_line(lambda: [parse(arguments, words) for words in json.load(sys.stdin)])
"""


def read_settings(path: str) -> dict[str, list[str]]:
    """Names and words of arguments from a YAML file; raises `InputError` for one that is something else."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--settings {path}: {one_line(error)}") from None
    if not isinstance(found, dict) or not all(isinstance(value, str | None) for value in found.values()):
        raise InputError(f"--settings {path}: must hold lines of `name: --argument value ...`, or `name:` for none")
    try:
        return {str(name): shlex.split(value or "") for name, value in found.items()}
    except ValueError as error:
        raise InputError(f"--settings {path}: {error}") from None


def configurations(methods: list[str], settings: str | None, common: list[str]) -> dict[str, list[str]]:
    """Name -> words of its arguments, `common` first; each method, then each of the file's settings."""
    found = {method: ["--tuning", method] for method in methods}
    for name, words in (read_settings(settings) if settings else {}).items():
        if name in found:
            raise InputError(f"--settings {settings}: {name} is the name of a method as well")
        found[name] = words
    if not found:
        raise InputError("nothing to compare: give --methods or --settings")
    for name, words in found.items():
        taken = [word for word in [*common, *words] if word.split("=")[0] in OWN]
        if taken:
            raise InputError(f"{name}: {taken[0]}: a comparison sets it itself; seeds are given by --seeds")
    return {name: [*common, *words] for name, words in found.items()}


def check_arguments(recipe: str, all_words: list[list[str]]) -> None:
    """Raise `InputError` for arguments that the recipe does not take."""
    if not Path("recipes", recipe, "train.py").is_file():
        raise InputError(f"{recipe}: no such recipe here; run it where the folder recipes/ is")
    done = subprocess.run(
        [sys.executable, "-c", CHECK, f"recipes.{recipe}.train"],
        input=json.dumps(all_words),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise InputError(done.stderr.strip().removeprefix("error: ") or done.stdout.strip())


# A run


def launcher(gpus: int | None) -> list[str]:
    """What runs a module in `gpus` processes, as the Makefile does; None: in one, which takes what there is."""
    if gpus is None:
        return [sys.executable, "-m"]
    several = ["--multi_gpu"] if gpus > 1 else []
    return [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(gpus), "-m"]


def run(recipe: str, words: list[str], folder: Path, gpus: int | None) -> dict[str, Any]:
    """Train in a process of its own, or go on with what was stopped; what was measured, or `error`.

    Ctrl-C and SIGTERM are handed on: the run saves a checkpoint, and `RunStopped` is raised.
    """
    started = any(folder.glob("checkpoint-*"))
    again = ["--resume_from_checkpoint", "true"] if started else ["--overwrite"]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    command = [*launcher(gpus), f"recipes.{recipe}.train", *words, "--output_dir", str(folder), *again]
    stopped: list[int] = []
    with open(log, "a", encoding="utf-8") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

        def hand_on(number: int, frame: Any) -> None:
            stopped.append(number)
            os.killpg(child.pid, number)

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if stopped and code:
        raise RunStopped(f"{signal.Signals(stopped[0]).name}; the same command goes on", code=128 + stopped[0])
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if line.startswith(("error: ", "stopped: "))] or lines or [f"exit status {code}"]
        return {"error": said[-1].removeprefix("error: ").removeprefix("stopped: ")}
    return measured(folder) | ({"train_seconds": None} if started else {})  # else those since it went on


def measured(folder: Path) -> dict[str, Any]:
    """What a finished run left on record: scores, seconds and memory of its training, sizes."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    trained = json.loads((folder / "train_results.json").read_text(encoding="utf-8"))
    phase = record["phases"]["train"]
    adapter = folder / "adapter"
    saved = sum(path.stat().st_size for path in (adapter if adapter.is_dir() else folder).glob("*.safetensors"))
    name = (record["arguments"]["metric_for_best_model"] or "loss").removeprefix("eval_")
    return {
        "metric": name,
        "greater_is_better": record["arguments"]["greater_is_better"],
        "scores": {k: v for k, v in record["scores"].items() if isinstance(v, (int, float))},
        "trainable_parameters": trained["trainable_parameters"],
        "train_seconds": phase["seconds"],
        "peak_memory_mib": phase.get("peak_gpu_memory_mib", phase["peak_memory_mib"]),
        "saved_bytes": saved,
        **{key: record[key] for key in ("code", "rows", "hardware", "finished", "git_commit")},
    }


def score_of(record: dict[str, Any], name: str | None = None) -> tuple[str, float]:
    """The name and value of a run's score: `name`, or that which picked its checkpoint, on the test rows if it can."""
    scores, name = record["scores"], name or record["metric"]
    for prefix in ("test_", "after_test_", "eval_", "after_validation_", ""):
        if prefix + name in scores:
            return prefix + name, scores[prefix + name]
    raise InputError(f"--score {name}: not among the scores of the recipe: {', '.join(sorted(scores))}")


# What comes out


def summary(names: list[str], records: list[dict[str, Any]], score: str | None) -> list[dict[str, Any]]:
    """One row a configuration: mean and standard deviation of the score over seeds, medians of the rest."""
    rows = []
    for name in names:
        own = [record for record in records if record["name"] == name]
        done = [record for record in own if "error" not in record]
        row: dict[str, Any] = {"name": name, "seeds": [record["seed"] for record in done]}
        if done:
            values = [score_of(record, score)[1] for record in done]
            row |= {
                "score": score_of(done[0], score)[0],
                "mean": statistics.mean(values),
                "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
                "values": values,
            }
            for key in ("trainable_parameters", "train_seconds", "peak_memory_mib", "saved_bytes"):
                values = [record[key] for record in done if record[key] is not None]
                row[key] = statistics.median(values) if values else None
        if len(done) < len(own):
            row["errors"] = sorted({record["error"] for record in own if "error" in record})
        rows.append(row)
    return rows


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    """The table of a comparison."""
    score = next((row["score"] for row in rows if row["seeds"]), "score")
    lines = [
        title,
        "",
        f"| | {score} | trained parameters | seconds | peak memory, MiB | saved, MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        name = row["name"].replace("|", "\\|")
        if not row["seeds"]:
            lines.append(f"| {name} | {' '.join(row['errors'])[:200]} | | | | |".replace("\n", " "))
            continue
        spread = "" if row["standard_deviation"] is None else f" ± {row['standard_deviation']:.4f}"
        seconds = "" if row["train_seconds"] is None else f"{row['train_seconds']:.1f}"
        lines.append(
            f"| {name} | {row['mean']:.4f}{spread} | {row['trainable_parameters']:,.0f} | {seconds} "
            f"| {row['peak_memory_mib']:,.0f} | {row['saved_bytes'] / 2**20:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(path: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """Score against trained parameters, one point a configuration, beside bars of seconds, memory and saved size.

    Where all train as many parameters, the scores stand below one another.
    """
    rows = [row for row in rows if row["seeds"]]
    figure = Figure(figsize=(11.0, 5.5), layout="constrained")
    figure.suptitle(title.split(";")[0])
    grid = figure.add_gridspec(3, 2, width_ratios=[3, 2])
    axes = figure.add_subplot(grid[:, 0])
    colours = [f"C{i % 10}" for i in range(len(rows))]
    label = f"{rows[0]['score']}, mean and standard deviation"
    if len({row["trainable_parameters"] for row in rows}) > 1:
        for row, colour in zip(rows, colours, strict=True):
            x = row["trainable_parameters"]
            axes.errorbar(x, row["mean"], yerr=row["standard_deviation"] or 0, fmt="o", capsize=3, color=colour)
            axes.annotate(row["name"], (x, row["mean"]), xytext=(6, 4), textcoords="offset points", color=colour)
        axes.set(xscale="log", xlabel="trained parameters", ylabel=label)
    else:
        for i, (row, colour) in enumerate(zip(rows, colours, strict=True)):
            axes.errorbar(row["mean"], i, xerr=row["standard_deviation"] or 0, fmt="o", capsize=3, color=colour)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel(label)
    bars = {"train_seconds": ("seconds", 1), "peak_memory_mib": ("peak memory (MiB)", 1)}
    bars["saved_bytes"] = "saved (MiB)", 2**20
    for i, (key, (label, unit)) in enumerate(bars.items()):
        beside = figure.add_subplot(grid[i, 1])
        beside.barh([row["name"] for row in rows], [(row[key] or 0) / unit for row in rows], color=colours)
        beside.invert_yaxis()
        beside.set_xlabel(label)
    figure.savefig(path, dpi=120)


def tell_differences(records: list[dict[str, Any]]) -> None:
    """Warn where runs that stand side by side were not made on the same code, rows or machine."""
    for key, what in (("code", "code of the repository"), ("rows", "rows"), ("hardware", "hardware")):
        if len({json.dumps(record[key], sort_keys=True) for record in records}) > 1:
            warn(f"not all runs were made on the same {what}; to make all anew remove results.jsonl")


def read_options(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options of a comparison, and the words that are arguments of all its runs."""
    parser = argparse.ArgumentParser(
        prog="python -m common.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe")
    parser.add_argument("--methods", nargs="*", default=[], help="values of --tuning")
    parser.add_argument("--settings", help="YAML file of names and arguments")
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--score", help="the score to show; what picks the best checkpoint when not given")
    parser.add_argument("--gpus", type=int, help="hand each run to accelerate launch with so many processes")
    parser.add_argument("--folder", type=Path, help="where results go; outputs/compare/RECIPE when not given")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    options, common = read_options(argv)
    asked = configurations(options.methods, options.settings, common)
    folder = options.folder or Path("outputs", "compare", options.recipe)
    results = folder / "results.jsonl"
    there = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []

    def of(name: str, seed: str) -> dict[str, Any] | None:
        about = {"recipe": options.recipe, "name": name, "seed": seed, "gpus": options.gpus, "arguments": asked[name]}
        return next((r for r in reversed(there) if about.items() <= r.items() and "error" not in r), None)

    runs = [(name, seed) for seed in options.seeds for name in asked]
    if any(of(*each) is None for each in runs):
        check_arguments(options.recipe, list(asked.values()))
    records = []
    for i, (name, seed) in enumerate(runs, 1):
        record = of(name, seed)
        if record is None:
            words = asked[name]
            about = {"recipe": options.recipe, "name": name, "seed": seed, "gpus": options.gpus, "arguments": words}
            key = hashlib.sha256(json.dumps([words, options.gpus]).encode()).hexdigest()[:8]
            own = folder / "runs" / f"{''.join(c if c.isalnum() else '_' for c in name)}-{key}-{seed}"
            record = about | run(options.recipe, [*words, "--seed", seed], own, options.gpus)
            there.append(record)
            new = results.with_suffix(".new")  # whole or not at all, whenever this is killed
            new.write_text("".join(json.dumps(one) + "\n" for one in there), encoding="utf-8")
            new.replace(results)
            for path in [*own.rglob("*.safetensors"), *own.glob("checkpoint-*")]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        records.append(record)
        if "error" in record:
            found = record["error"]
        else:
            score, value = score_of(record, options.score)
            seconds = "went on" if record["train_seconds"] is None else f"{record['train_seconds']:.0f} s"
            found = f"{score} {value:.4f}, {seconds}, {record['peak_memory_mib']:,} MiB"
        tell(f"{i} of {len(runs)}: {name}, seed {seed}: {found}")

    # Table and picture
    done = [record for record in records if "error" not in record]
    rows = summary(list(asked), records, options.score)
    if not done:
        raise InputError(*(f"{row['name']}: {error}" for row in rows for error in row["errors"]))
    tell_differences(done)
    hardware = done[0]["hardware"]
    machine = ", ".join(hardware.get("gpus", [f"{hardware['cpu']}, {hardware['cores']} cores"]))
    title = f"{options.recipe} {shlex.join(common)}; {len(options.seeds)} seeds; {machine}, {hardware['precision']}"
    title += f"; {datetime.now(UTC):%Y-%m-%d}"
    (folder / "comparison.md").write_text(markdown(title, rows), encoding="utf-8")
    (folder / "comparison.json").write_text(json.dumps({"title": title, "rows": rows}, indent=2), encoding="utf-8")
    draw(folder / "comparison.png", title, rows)
    tell("\n" + markdown(title, rows))
    tell(f"{folder}/comparison.md, comparison.json, comparison.png")
    return rows


if __name__ == "__main__":
    command_line(main)
