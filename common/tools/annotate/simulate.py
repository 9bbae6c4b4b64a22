"""Measure on labelled data how many labels a strategy saves.

    python -m common.tools.annotate simulate --recipe sentiment --strategies random margin badge --start 50 --add 50
    python -m common.tools.annotate simulate --recipe ner --train_file my.jsonl --validation_file dev.jsonl --rounds 4

The recipe is trained on `--start` random training rows. By each strategy the model, or chance, then chooses `--add` of
the other training rows; the recipe is trained anew, from the pretrained model, on all rows chosen so far; and so on for
`--rounds` rounds. `--seeds` repeats all of it with other first rows. Each run is an ordinary run of the recipe in a
process of its own; all other arguments go to it. Validation rows are labels too: name few by `--max_eval_samples`.

The same command, given again, resumes; finished runs are in `results.jsonl` of `outputs/annotate/RECIPE` and are not
repeated. The folder also gets the scores by number of labels: `simulation.md`, `simulation.json`, `simulation.png`.

Stop advice: a line is fitted to the last three scores of each seed. More labels are likely to help if its slope, the
gain of a round, is on average over the seeds above twice its standard error; else the curve is flat within the noise
(after Laws and Schuetze 2008, https://aclanthology.org/C08-1059, who stop where the gradient of the curve nears 0).
"""

import argparse
import hashlib
import importlib
import json
import shlex
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.cli import parse, training_module
from common.data.source import Row
from common.errors import InputError, tell, warn
from common.hardware import described
from common.run.fingerprint import differences
from common.tools.annotate.pool import Seen, Selection
from common.tools.annotate.select import module_of
from common.tools.annotate.strategies import STRATEGIES
from common.tools.compare import warn_of_changes
from common.tools.runner import (
    OWN,
    Child,
    Job,
    changed_results,
    check_arguments,
    check_seeds,
    greater_is_better,
    in_turn,
    keep,
    read_results,
    remove_weights,
    score_of,
    start,
)

#: arguments of the recipe that the simulation sets, or that would change the numbers of the training rows
TAKEN = (*OWN, "--train_rows", "--drop_unlabeled", "--skip_bad_rows")
#: scores to which the line of the stop advice is fitted
LAST = 3

#: a run: seed, strategy (`FIRST` for the run on the first rows), round
Key = tuple[str, str, int]
FIRST = "start"


def read_options(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of a simulation, and the words of arguments for all runs."""
    parser = argparse.ArgumentParser(
        prog="python -m common.tools.annotate simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=["random", "margin", "badge"])
    parser.add_argument("--start", type=int, default=50, help="random rows of the first run")
    parser.add_argument("--add", type=int, default=50, help="rows that a strategy adds in a round")
    parser.add_argument("--rounds", type=int, default=6, help="number of times that rows are added")
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--score", help="score to show; default: the score that selects the best checkpoint")
    parser.add_argument("--at_once", type=int, default=1, help="number of runs at a time; they share the cores")
    parser.add_argument("--fresh", action="store_true", help="run all again, finished and stopped runs too")
    parser.add_argument("--folder", type=Path, help="folder of the results; default: outputs/annotate/RECIPE")
    return parser.parse_known_args(argv)


@dataclass
class Simulation:
    """The runs of a simulation, finished and to come.

    Attributes:
        options: see `read_options`.
        words: arguments for all runs.
        rows: all training rows.
        folder: folder of the results.
        made_with: fingerprint of code, files and arguments.
    """

    options: argparse.Namespace
    words: list[str]
    rows: list[Row]
    folder: Path
    made_with: dict[str, Any]

    def __post_init__(self) -> None:
        self.results = self.folder / "results.jsonl"
        self.records: dict[Key, dict[str, Any]] = {}

    def keys(self) -> list[Key]:
        """Return all runs, earlier rounds first."""
        options = self.options
        later = [
            (s, name, r) for r in range(1, options.rounds + 1) for s in options.seeds for name in options.strategies
        ]
        return [*((seed, FIRST, 0) for seed in options.seeds), *later]

    def chosen(self, key: Key) -> list[int] | None:
        """Return the numbers of the rows of a run in the order of their choice; None before they are chosen."""
        seed, name, number = key
        if name == FIRST:
            return self._shuffled(seed)[: self.options.start]
        if name == "random":
            return self._shuffled(seed)[: self.options.start + number * self.options.add]
        before = (seed, name, number - 1) if number > 1 else (seed, FIRST, 0)
        record, rows = self.records.get(before), self.chosen(before)
        if record is None or rows is None or name not in record.get("next", {}):
            return None
        return [*rows, *record["next"][name]]

    def _shuffled(self, seed: str) -> list[int]:
        return np.random.default_rng(int(seed)).permutation(len(self.rows)).tolist()

    def about(self, key: Key, rows: list[int]) -> dict[str, Any]:
        """Return what makes two runs the same."""
        seed, name, _ = key
        return {"recipe": self.options.recipe, "arguments": self.words, "seed": seed, "strategy": name, "chosen": rows}

    def asks(self, key: Key) -> list[str]:
        """Return the strategies that choose rows with the model of a run."""
        _, name, number = key
        names = [] if number == self.options.rounds else self.options.strategies if name == FIRST else [name]
        return [name for name in names if name != "random"]

    def find_finished(self) -> None:
        """Take up the runs that earlier calls finished, with the rows that their models chose."""
        known = [record for record in read_results(self.results) if "error" not in record]
        for key in self.keys():
            rows = self.chosen(key)
            if rows is None:
                continue
            about = self.about(key, rows)
            for record in reversed(known):
                chose = {name for name, further in record["next"].items() if len(further) == self.options.add}
                if about.items() <= record.items() and {*self.asks(key)} <= chose:
                    self.records[key] = record
                    break

    def forget(self) -> None:
        """Remove the results of the recipe with these arguments and seeds."""
        if self.results.exists():
            ours = {"recipe": self.options.recipe, "arguments": self.words}.items()
            with changed_results(self.results) as results:
                results[:] = [r for r in results if not (ours <= r.items() and r["seed"] in self.options.seeds)]

    def jobs(self) -> Iterator[Job | None]:
        """Yield each run that is not finished, once its rows are chosen; None while the others must wait."""
        begun: set[Key] = set()
        while True:
            left = [key for key in self.keys() if key not in self.records and key not in begun]
            ready = [(key, rows) for key in left if (rows := self.chosen(key)) is not None]
            if ready:
                key, rows = ready[0]
                begun.add(key)
                yield key, partial(self._begin, key, rows)
            elif begun - self.records.keys():
                yield None
            else:
                return  # the others need the rows of a failed run

    def _begin(self, key: Key, rows: list[int], slot: int) -> Child:
        seed, name, number = key
        code = hashlib.sha256(json.dumps(self.about(key, rows)).encode()).hexdigest()[:8]
        folder = self.folder / "runs" / f"{name}-{seed}-{number}-{code}"
        if self.options.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        numbers = folder.with_suffix(".txt")
        numbers.parent.mkdir(parents=True, exist_ok=True)
        keep(numbers, "".join(f"{row + 1}\n" for row in rows))
        words = [*self.words, "--train_rows", str(numbers), "--seed", seed]
        return start(self.options.recipe, words, folder, None, self.options.at_once, slot)

    def finish(self, key: Key, child: Child) -> None:
        """Record an ended run and the rows that its model chooses, and remove its weights."""
        rows = self.chosen(key) or []
        record = self.about(key, rows) | {"made_with": self.made_with} | child.outcome()
        if "error" not in record:
            record["next"] = {name: self._choose(child.folder, name, key, rows) for name in self.asks(key)}
            remove_weights(child.folder)
        self.records[key] = record
        with changed_results(self.results) as results:
            results.append(record)

    def _choose(self, folder: Path, name: str, key: Key, rows: list[int]) -> list[int]:
        """Return the numbers of the next rows that a strategy chooses with a trained model."""
        taken = set(rows)
        left = [number for number in range(len(self.rows)) if number not in taken]
        annotator = module_of(self.options.recipe).Annotator(str(folder))
        selection = Selection(name, self.options.add, seed=int(key[0]) % 2**32, relabel=True)
        chosen = selection.choose((self.rows[i] for i in left), annotator, Seen())
        if len(chosen) < self.options.add:
            raise InputError(
                f"--add {self.options.add}: {name} finds only {len(chosen)} different rows to add to {len(rows)}, as "
                "training rows repeat each other; give fewer --rounds, or a smaller --add"
            )
        return [left[one.number] for one in chosen]

    def report(self, key: Key) -> None:
        """Print the outcome of a run."""
        seed, name, _ = key
        record = self.records[key]
        outcome = record.get("error") or "{} {:.4f}".format(*score_of(record, self.options.score))
        done = f"{len(self.records)} of {len(self.keys())}"
        tell(f"{done}: {name}, {len(record['chosen'])} labels, seed {seed}: {outcome}")


# Results


def curves(simulation: Simulation) -> dict[str, np.ndarray]:
    """Return the scores of each strategy, (seeds, rounds + 1); NaN for failed runs."""
    options = simulation.options

    def score(key: Key) -> float:
        record = simulation.records.get(key, {"error": ""})
        return float("nan") if "error" in record else score_of(record, options.score)[1]

    return {
        name: np.array(
            [[score((seed, name if r else FIRST, r)) for r in range(options.rounds + 1)] for seed in options.seeds]
        )
        for name in options.strategies
    }


def gain(scores: np.ndarray) -> tuple[float, float | None]:
    """Return the slope of the last scores, as gain a round: mean over the seeds, and standard error.

    Args:
        scores: (seeds, rounds + 1).
    """
    last = scores[~np.isnan(scores).any(1), -LAST:]
    if not len(last) or last.shape[1] < 2:
        return float("nan"), None
    slopes = np.polyfit(np.arange(last.shape[1]), last.T, 1)[0]
    return float(slopes.mean()), float(slopes.std(ddof=1) / len(slopes) ** 0.5) if len(slopes) > 1 else None


def advice(scores: np.ndarray, add: int, greater: bool | None = True) -> str:
    """Say whether more labels are likely to improve the score.

    Args:
        scores: (seeds, rounds + 1).
        add: labels of a round.
        greater: whether greater scores are better; None if unknown.
    """
    if greater is None:
        return "no stop advice: it needs the score that picks checkpoints (--metric_for_best_model)"
    mean, error = gain(scores if greater else -scores)
    if error is None:
        return "no stop advice: it needs two seeds and two sizes"
    measured = f"the last sizes brought {mean:+.4f} ± {error:.4f} for {add} labels"
    if mean > 2 * error:
        return f"label on: {measured}"
    return f"stop, or add many more labels at once: {measured}, which is within twice its standard error"


def table(simulation: Simulation, scores: dict[str, np.ndarray], title: str, score: str, greater: bool | None) -> str:
    """Return the scores by number of labels, the difference to random, and the stop advice."""
    options = simulation.options
    sizes = [options.start + r * options.add for r in range(options.rounds + 1)]
    lines = [title, "", f"| labels | {' | '.join(scores)} |", f"| ---: |{' ---: |' * len(scores)}"]
    for r, size in enumerate(sizes):
        lines.append(f"| {size} | {' | '.join(spread(of_name[:, r]) for of_name in scores.values())} |")
    lines.append(f"| mean | {' | '.join(spread(np.nanmean(of_name, 1)) for of_name in scores.values())} |")
    lines += ["", f"{score}: mean ± standard deviation over the seeds; the last row is the mean over all sizes.", ""]
    for name, of_name in scores.items():
        line = f"- {name}: {advice(of_name, options.add, greater)}."
        if name != "random" and "random" in scores:
            line += f" Against random, mean over the sizes: {spread(np.nanmean(of_name - scores['random'], 1), '+')}."
        lines.append(line)
    return "\n".join(lines) + "\n"


def spread(values: np.ndarray, sign: str = "") -> str:
    """Return mean and standard deviation of the values that are no NaN."""
    found = [float(value) for value in values if not np.isnan(value)]
    if not found:
        return "failed"
    return f"{statistics.mean(found):{sign}.4f}" + (f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else "")


def draw(path: Path, title: str, score: str, sizes: list[int], scores: dict[str, np.ndarray]) -> None:
    """Draw the mean score by number of labels, a line for each strategy, with its standard deviation as a band."""
    figure = Figure(figsize=(8.0, 5.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.add_subplot()
    for i, (name, of_name) in enumerate(scores.items()):
        mean, deviation = np.nanmean(of_name, 0), np.nanstd(of_name, 0, ddof=1 if len(of_name) > 1 else 0)
        axes.plot(sizes, mean, "o-", color=f"C{i}", label=name)
        axes.fill_between(sizes, mean - deviation, mean + deviation, color=f"C{i}", alpha=0.15, linewidth=0)
    axes.set(xlabel="labels", ylabel=f"{score}, mean and standard deviation")
    axes.set_xticks(sizes)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def check(options: argparse.Namespace, words: list[str]) -> None:
    """Raise `InputError` if options are out of range or words set what the simulation sets."""
    for name, least in (("start", 1), ("add", 1), ("rounds", 1), ("at_once", 1)):
        if getattr(options, name) < least:
            raise InputError(f"--{name} {getattr(options, name)}: must be at least {least}")
    check_seeds(options.seeds)
    if len(set(options.strategies)) < len(options.strategies):
        raise InputError("--strategies: a strategy is repeated; name each once")
    taken = [word for word in words if word.split("=")[0] in TAKEN]
    if taken:
        raise InputError(f"{taken[0]}: cannot be given to a simulation; leave it out (seeds: --seeds)")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run a simulation, and return its results as in `simulation.json`."""
    options, words = read_options(argv)
    check(options, words)
    module = module_of(options.recipe)
    made_with = check_arguments(options.recipe, [words])[0]
    arguments = importlib.import_module(training_module(options.recipe)).ARGUMENTS
    rows = list(module.training_rows(parse(arguments, words)))
    needed = options.start + options.rounds * options.add
    if needed >= len(rows):
        raise InputError(
            f"--start {options.start} --add {options.add} --rounds {options.rounds}: need more than {needed:,} "
            f"training rows to choose from; there are {len(rows):,}; give fewer"
        )
    folder = options.folder or Path("outputs", "annotate", options.recipe)
    simulation = Simulation(options, words, rows, folder, made_with)
    if options.fresh:
        simulation.forget()
    else:
        simulation.find_finished()
    warn_of_changes([differences(r.get("made_with", {}), made_with) for r in simulation.records.values()])
    for key in list(simulation.records):
        simulation.report(key)
    for key, child in in_turn(simulation.jobs(), options.at_once):
        simulation.finish(key, child)
        simulation.report(key)
    return write(simulation)


def write(simulation: Simulation) -> dict[str, Any]:
    """Write table, picture and JSON of a simulation, and return its results."""
    options, folder = simulation.options, simulation.folder
    done = [record for record in simulation.records.values() if "error" not in record]
    if not done:
        raise InputError(*dict.fromkeys(record["error"] for record in simulation.records.values()))
    if len(done) < len(simulation.keys()):
        warn(
            f"{len(simulation.keys()) - len(done)} of {len(simulation.keys())} runs are missing; run the command again"
        )
    score = score_of(done[0], options.score)[0]
    greater = greater_is_better(done[0], score)
    scores = curves(simulation)
    sizes = [options.start + r * options.add for r in range(options.rounds + 1)]
    made = f"seeds: {', '.join(options.seeds)}; {described(done[0]['hardware'])}"
    caption = f"{options.recipe}; {made}"
    given = f"{options.recipe} {shlex.join(simulation.words)}".strip()
    title = f"{given}; {made}; {datetime.now(UTC):%Y-%m-%d}"
    found = {
        "title": title,
        "score": score,
        "labels": sizes,
        "scores": {
            name: [[None if np.isnan(x) else float(x) for x in of_seed] for of_seed in s] for name, s in scores.items()
        },
        "advice": {name: advice(s, options.add, greater) for name, s in scores.items()},
    }
    text = table(simulation, scores, title, score, greater)
    draw(folder / "simulation.png", caption, score, sizes, scores)
    keep(folder / "simulation.md", text)
    keep(folder / "simulation.json", json.dumps(found, indent=2))
    tell("\n" + text)
    tell(f"{folder}/simulation.md, simulation.json, simulation.png")
    return found
