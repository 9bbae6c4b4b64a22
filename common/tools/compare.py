"""Compare tuning methods or other settings of a recipe under the same budget, with several seeds.

    make compare RECIPE=ner METHODS="full head lora dora adapter ia3 bias"
    make compare RECIPE=ner METHODS="full lora" ARGS="--train_file my.jsonl --num_train_epochs 3" SEEDS="1 2 3 4 5"
    make compare RECIPE=sentiment SETTINGS=common/tools/regularisers.yaml
    make compare RECIPE=ner METHODS="full lora" ARGS="--over max_train_samples 100 1000 all --steps 300 600 2000"
    make compare RECIPE=ner METHODS="lora dora" ARGS="--over learning_rate 5e-4 2e-3 5e-3 --score eval_f1" SEEDS=1
    python -m common.tools.compare ner --settings my_settings.yaml --max_train_samples 1000 --at_once 2

A method is a value of `--tuning`. A settings file maps names to arguments of the recipe, such as `twice the rate:
--learning_rate 4e-4`. All other arguments go to every run of the recipe. `--over` trains each method or setting at
several values of one more argument (`all`: without the argument). `--steps` sets the number of steps, for all values or
for each; a run then has ten evaluations.

The runs follow one another; `--at_once n` starts n at a time, each with its share of the cores. The same command, given
again, skips the finished runs in `outputs/compare/RECIPE/results.jsonl` and resumes a stopped run, whose seconds are
then left out. A warning says if code, files, arguments, packages or machine changed since; `--fresh` runs all again.
The results are in the same folder: `comparison.md`, `comparison.json` and `comparison.png`. With `--over ARGUMENT` the
table starts with the score at each value, drawn in `ARGUMENT.png`; the rest shows the last value.

(`make bench` compares the recipes with the stock Trainer.)
"""

import argparse
import hashlib
import json
import shlex
import shutil
import statistics
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from common.cli import command_line
from common.data import yaml_text
from common.errors import InputError, one_line, tell, warn
from common.hardware import described
from common.run.fingerprint import NAMES, differences
from common.tools.runner import (
    OWN,
    Child,
    changed_results,
    check_arguments,
    check_at_once,
    check_seeds,
    greater_is_better,
    in_turn,
    read_results,
    remove_weights,
    score_of,
    start,
)

#: arguments of the number of steps, which `--steps` decides
STEPS = ("max_steps", "num_train_epochs")
#: number of evaluations under `--steps`
EVALUATIONS = 10


def read_settings(path: str) -> dict[str, list[str]]:
    """Read a settings file: name -> words of arguments. Raises `InputError` for any other content."""
    try:
        settings = yaml_text.load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--settings {path}: {one_line(error)}") from None
    if not isinstance(settings, dict) or not all(isinstance(value, str | None) for value in settings.values()):
        raise InputError(f"--settings {path}: write lines of `name: --argument value ...`, or `name:` for no argument")
    try:
        return {str(name): shlex.split(value or "") for name, value in settings.items()}
    except ValueError as error:
        raise InputError(f"--settings {path}: {error}") from None


def configurations(methods: list[str], settings: str | None, common: list[str]) -> dict[str, list[str]]:
    """Return name -> words of arguments, `common` first: the methods, then the settings of the file."""
    chosen = {method: ["--tuning", method] for method in methods}
    for name, words in (read_settings(settings) if settings else {}).items():
        if name in chosen:
            raise InputError(f"--settings {settings}: {name} is also in --methods; rename one of them")
        chosen[name] = words
    if not chosen:
        raise InputError("nothing to compare: give --methods or --settings")
    for name, words in chosen.items():
        taken = [word for word in [*common, *words] if word.split("=")[0] in OWN]
        if taken:
            raise InputError(f"{name}: {taken[0]}: is set by the comparison; leave it out (seeds: --seeds)")
    return {name: [*common, *words] for name, words in chosen.items()}


def along(over: list[str], steps: list[int]) -> dict[str, tuple[list[str], list[str]]]:
    """Return the additional words of arguments at each value of `--over`.

    Args:
        over: the argument and its values; empty without `--over`.
        steps: one number of steps for all values, or one for each.

    Returns:
        Value (`""` without `--over`) -> words before all others, which later words override; words after them.

    Raises:
        InputError: a value is missing or repeated, or the numbers of steps do not match the values.
    """
    argument, values = (over[0].removeprefix("--"), over[1:]) if over else ("", [""])
    if f"--{argument}" in OWN:
        raise InputError(f"--over {argument}: is set by the comparison; leave it out (seeds: --seeds)")
    if steps and argument in STEPS:
        raise InputError(f"--over {argument}: is also set by --steps; leave one of them out")
    if len(set(values)) < len(values) or (over and len(values) < 2):
        raise InputError("--over: give an argument and at least two values, such as: max_train_samples 100 all")
    if len(steps) not in (0, 1, len(values)):
        raise InputError(f"--steps: give one number, or one for each of {' '.join(values)}")
    if steps and min(steps) < 1:
        raise InputError("--steps must be at least 1")
    words = {}
    numbers = steps if len(steps) > 1 else (steps or [0]) * len(values)
    for value, number in zip(values, numbers, strict=True):
        each = str(max(1, number // EVALUATIONS))
        budget = ["--max_steps", str(number), "--eval_strategy", "steps", "--save_strategy", "steps"]
        budget += ["--eval_steps", each, "--save_steps", each]
        point = [f"--{argument}", value] if over and value != "all" else []
        words[value] = budget if number else [], point
    return words


# Results


def summary(names: list[str], records: list[dict[str, Any]], score: str | None) -> list[dict[str, Any]]:
    """Return a row for each configuration: mean and standard deviation of the score over seeds, medians of the rest."""
    rows = []
    for name in names:
        runs = [record for record in records if record["name"] == name]
        done = [record for record in runs if "error" not in record]
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
        if len(done) < len(runs):
            row["errors"] = sorted({record["error"] for record in runs if "error" in record})
        rows.append(row)
    return rows


def best(rows: dict[Any, dict[str, Any]], record: dict[str, Any]) -> Any:
    """Return the key of the row with the best mean; None unless `record` knows whether greater is better."""
    rows = {key: row for key, row in rows.items() if row["seeds"]}
    greater = greater_is_better(record, next(iter(rows.values()))["score"]) if rows else None
    if greater is None:
        return None
    return (max if greater else min)(rows, key=lambda key: rows[key]["mean"])


def markdown_over(argument: str, by_value: dict[str, list[dict[str, Any]]], record: dict[str, Any]) -> str:
    """Return the table of scores by value of `argument`, best ones in bold. `by_value` has the rows at each value."""
    score = next(row["score"] for rows in by_value.values() for row in rows if row["seeds"])
    lines = [f"| {score} by {argument} | {' | '.join(by_value)} | best at |"]
    lines += [f"| --- |{' ---: |' * (len(by_value) + 1)}"]
    winners = {value: best(dict(enumerate(rows)), record) for value, rows in by_value.items()}
    for i, row in enumerate(next(iter(by_value.values()))):
        scores = {value: _score(rows[i]) for value, rows in by_value.items()}
        cells = [f"**{text}**" if winners[value] == i else text for value, text in scores.items()]
        at = best({value: rows[i] for value, rows in by_value.items()}, record) or ""
        lines.append(f"| {_cell(row['name'])} | {' | '.join(cells)} | {at} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _score(row: dict[str, Any]) -> str:
    if not row["seeds"]:
        return "failed"
    deviation = "" if row["standard_deviation"] is None else f" ± {row['standard_deviation']:.4f}"
    without = f" (seeds {', '.join(row['seeds'])} only)" if "errors" in row else ""
    return f"{row['mean']:.4f}{deviation}{without}"


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    """Return the table of a comparison."""
    score = next((row["score"] for row in rows if row["seeds"]), "score")
    lines = [
        title,
        "",
        f"| | {score} | trained parameters | seconds | peak memory, MiB | saved, MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        name = _cell(row["name"])
        if not row["seeds"]:
            lines.append(f"| {name} | {_cell(' '.join(row['errors'])[:200])} | | | | |")
            continue
        seconds = "" if row["train_seconds"] is None else f"{row['train_seconds']:.1f}"
        lines.append(
            f"| {name} | {_score(row)} | {row['trainable_parameters']:,.0f} | {seconds} "
            f"| {row['peak_memory_mib']:,.0f} | {row['saved_bytes'] / 2**20:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(path: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """Draw the score over trained parameters, one point a configuration, and bars of seconds, memory and saved size.

    If all configurations train the same number of parameters, the scores are listed vertically.
    """
    rows = [row for row in rows if row["seeds"]]
    figure = Figure(figsize=(11.0, 5.5), layout="constrained")
    figure.suptitle(title)
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


def draw_over(path: Path, title: str, argument: str, by_value: dict[str, list[dict[str, Any]]]) -> None:
    """Draw the score by value of `argument`, one line a configuration, with evenly spaced values."""
    figure = Figure(figsize=(8.0, 5.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.add_subplot()
    for i, rows in enumerate(zip(*by_value.values(), strict=True)):
        points = [(x, row["mean"], row["standard_deviation"] or 0) for x, row in enumerate(rows) if row["seeds"]]
        if points:
            x, mean, spread = zip(*points, strict=True)
            style = {"fmt": "os^v"[i // 10 % 4] + "-", "color": f"C{i % 10}", "label": rows[0]["name"]}
            axes.errorbar(x, mean, yerr=spread, capsize=3, **style)
    axes.set_xticks(range(len(by_value)), list(by_value))
    score = next(row["score"] for rows in by_value.values() for row in rows if row["seeds"])
    axes.set(xlabel=argument, ylabel=f"{score}, mean and standard deviation")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


def warn_of_changes(changes: list[list[str]]) -> None:
    """Warn of finished runs that would not be made in the same way now; `changes` names the differences of each."""
    names = [name for name in NAMES.values() if any(name in of_run for of_run in changes)]
    if names:
        warn(
            f"{sum(map(bool, changes))} of {len(changes)} finished runs were made with other {', '.join(names)}; their "
            "results are taken as they are; --fresh runs all again"
        )


def tell_differences(groups: list[list[dict[str, Any]]]) -> None:
    """Warn if code or machine differ between runs, or rows differ within a group."""
    together = [record for group in groups for record in group]
    for key, name in (("code", "code"), ("rows", "rows"), ("hardware", "hardware")):
        for records in groups if key == "rows" else [together]:
            if len({json.dumps(record[key], sort_keys=True) for record in records}) > 1:
                warn(f"the runs differ in their {name}; --fresh runs all of them again")
                break
    if len({record.get("at_once", 1) for record in together}) > 1:
        warn("the runs differ in --at_once; their seconds cannot be compared")


def read_options(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of a comparison, and the words of arguments for all runs."""
    parser = argparse.ArgumentParser(
        prog="python -m common.tools.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe")
    parser.add_argument("--methods", nargs="*", default=[], help="values of --tuning")
    parser.add_argument("--settings", help="YAML file of names and arguments")
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--score", help="score to show; default: the score that selects the best checkpoint")
    parser.add_argument(
        "--over", nargs="+", default=[], help="an argument of the recipe and its values; all: without the argument"
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        type=int,
        default=[],
        help="steps of each run: one number, or one for each value of --over",
    )
    parser.add_argument("--at_once", type=int, default=1, help="number of runs at a time; they share the cores")
    parser.add_argument("--gpus", type=int, help="start each run by accelerate launch with this number of processes")
    parser.add_argument("--fresh", action="store_true", help="run all again, finished and stopped runs too")
    parser.add_argument("--folder", type=Path, help="folder of the results; default: outputs/compare/RECIPE")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run a comparison, and return the rows of its table."""
    options, common = read_options(argv)
    check_at_once(options.at_once, options.gpus)
    check_seeds(options.seeds)
    argument, points = options.over[0].removeprefix("--") if options.over else "", along(options.over, options.steps)
    names = configurations(options.methods, options.settings, common)
    asked: dict[tuple[str, str], list[str]] = {}
    for name, words in names.items():
        for taken in ([argument] if argument else []) + ([*STEPS] if options.steps else []):
            if any(word.split("=")[0] == f"--{taken}" for word in words):
                by = "--over" if taken == argument else "--steps"
                raise InputError(f"{name}: --{taken}: is also set by {by}; leave one of them out")
        asked |= {(name, value): [*before, *words, *behind] for value, (before, behind) in points.items()}
    folder = options.folder or Path("outputs", "compare", options.recipe)
    results = folder / "results.jsonl"
    known = read_results(results)
    runs = [(name, value, seed) for seed in options.seeds for value in points for name in names]

    def about(name: str, value: str, seed: str) -> dict[str, Any]:
        words = asked[name, value]
        return {"recipe": options.recipe, "name": name, "seed": seed, "gpus": options.gpus, "arguments": words}

    def finished(which: tuple[str, str, str]) -> dict[str, Any] | None:
        asked_for = about(*which)
        return next((r for r in reversed(known) if asked_for.items() <= r.items() and "error" not in r), None)

    def output_of(name: str, value: str, seed: str) -> Path:
        key = hashlib.sha256(json.dumps([asked[name, value], options.gpus]).encode()).hexdigest()[:8]
        return folder / "runs" / f"{''.join(c if c.isalnum() else '_' for c in name)}-{key}-{seed}"

    def begin(name: str, value: str, seed: str, slot: int) -> Child:
        words = [*asked[name, value], "--seed", seed]
        return start(options.recipe, words, output_of(name, value, seed), options.gpus, options.at_once, slot)

    def report(which: tuple[str, str, str], record: dict[str, Any]) -> None:
        name, value, seed = which
        if "error" in record:
            outcome = record["error"]
        else:
            score, number = score_of(record, options.score)
            seconds = "resumed" if record["train_seconds"] is None else f"{record['train_seconds']:.0f} s"
            outcome = f"{score} {number:.4f}, {seconds}, {record['peak_memory_mib']:,} MiB"
        at = f", {argument} {value}" if argument else ""
        tell(f"{len(records)} of {len(runs)}: {name}{at}, seed {seed}: {outcome}")

    # Runs
    now = dict(zip(asked, check_arguments(options.recipe, list(asked.values())), strict=True))
    if options.fresh:
        known = [r for r in known if not any(about(*which).items() <= r.items() for which in runs)]
        for which in runs:
            shutil.rmtree(output_of(*which), ignore_errors=True)
        if results.exists():
            with changed_results(results) as saved:
                saved[:] = [r for r in saved if not any(about(*which).items() <= r.items() for which in runs)]
    records: dict[tuple[str, str, str], dict[str, Any]] = {
        which: record for which in runs if (record := finished(which)) is not None
    }
    warn_of_changes([differences(r.get("made_with", {}), now[which[:2]]) for which, r in records.items()])
    for which, record in list(records.items()):
        report(which, record)
    jobs = iter([(which, partial(begin, *which)) for which in runs if which not in records])
    for which, child in in_turn(jobs, options.at_once):
        record = about(*which) | {"made_with": now[which[:2]]} | child.outcome()
        record |= {"at_once": options.at_once} if options.at_once > 1 else {}
        with changed_results(results) as saved:
            saved.append(record)
        if "error" not in record:  # a failed run keeps its checkpoints for the next call
            remove_weights(child.folder)
        records[which] = record
        report(which, record)

    # Tables and pictures
    at = {value: [records[which] for which in runs if which[1] == value] for value in points}
    by_value = {value: summary(list(names), group, options.score) for value, group in at.items()}
    groups = [[record for record in group if "error" not in record] for group in at.values()]
    done = [record for group in groups for record in group]
    if not done:
        raise InputError(
            *dict.fromkeys(f"{r['name']}: {e}" for rows in by_value.values() for r in rows for e in r["errors"])
        )
    tell_differences(groups)
    made = f"seeds: {', '.join(options.seeds)}; {described(done[0]['hardware'])}"
    caption = f"{options.recipe}; {made}"  # the picture has no room for the arguments
    title = f"{options.recipe} {shlex.join(common)}; {made}"
    if options.steps:
        title += f"; {', '.join(map(str, options.steps))} steps"
    together = max(record.get("at_once", 1) for record in done)
    title += f"; {together} runs at once" if together > 1 else ""
    title += f"; {datetime.now(UTC):%Y-%m-%d}"
    last = [value for value, group in zip(by_value, groups, strict=True) if group][-1]
    rows, table = by_value[last], markdown(title, by_value[last])
    draw(folder / "comparison.png", caption, rows)
    written = f"{folder}/comparison.md, comparison.json, comparison.png"
    if argument:
        table = f"{title}\n\n{markdown_over(argument, by_value, done[0])}\n{markdown(f'{argument} {last}:', rows)}"
        draw_over(folder / f"{argument}.png", caption, argument, by_value)
        rows = [{argument: value} | row for value, group in by_value.items() for row in group]
        written += f", {argument}.png"
    (folder / "comparison.md").write_text(table, encoding="utf-8")
    (folder / "comparison.json").write_text(json.dumps({"title": title, "rows": rows}, indent=2), encoding="utf-8")
    tell("\n" + table)
    tell(written)
    return rows


if __name__ == "__main__":
    command_line(main)
