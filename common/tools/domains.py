"""Leave out one domain at a time: how well does a model do on a domain that it was not trained on?

    make domains RECIPE=sentiment ARGS="--domain_column topic --train_file my.jsonl --test_file test.jsonl"
    python -m common.tools.domains ner --domain_column source --train_file a.jsonl --test_file b.jsonl --seeds 1 2 3 4 5

For each seed, one run trains on all domains, and one run for each domain trains without the training and validation
rows of this domain (`--leave_out DOMAIN`). Each run is scored on all test rows. The table has, for each domain, the
score of its test rows by the model that never saw the domain, and by the model that was trained on it too, with 95 %
intervals over seeds and test rows.

The same command, given again, skips finished runs and resumes a stopped one; `--fresh` runs all again. The results are
in `outputs/domains/RECIPE`: `leave_one_out.md` and `leave_one_out.json`.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.args import score_of_rows
from common.cli import command_line
from common.errors import InputError, tell
from common.hardware import described
from common.run.fingerprint import differences
from common.run.report import print_table
from common.tools.compare import warn_of_changes
from common.tools.runner import (
    OWN,
    Child,
    changed_results,
    check_arguments,
    check_at_once,
    check_seeds,
    in_turn,
    keep,
    read_results,
    remove_weights,
    score_of,
    start,
)
from common.tools.transfer.statistics import Arm, Effect, difference, row_draws
from common.tools.transfer.tasks import read_predictions, statistics_of

#: a domain that is left out, or None; and a seed
Which = tuple[str | None, str]


@dataclass
class Runs:
    """The runs of a recipe with all domains and without one, and their results.

    Attributes:
        recipe: name of the recipe.
        words: the arguments of all runs.
        seeds: the seeds.
        folder: the folder of the results.
        gpus, at_once: see `common.tools.runner.start`.
        fresh: run all again, finished and stopped runs too.
        records: the results of the finished runs.
    """

    recipe: str
    words: list[str]
    seeds: list[str]
    folder: Path
    gpus: int | None = None
    at_once: int = 1
    fresh: bool = False
    records: dict[Which, dict[str, Any]] = field(default_factory=dict)

    def about(self, which: Which) -> dict[str, Any]:
        """Return what identifies a run in the results."""
        return {"left_out": which[0], "seed": which[1]} | self._of_all()

    def _of_all(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "gpus": self.gpus, "arguments": self.words}

    def output(self, which: Which) -> Path:
        """Return the output folder of a run."""
        return self.folder / "runs" / hashlib.sha256(json.dumps(self.about(which)).encode()).hexdigest()[:16]

    @property
    def results(self) -> Path:
        """Return the file of the results."""
        return self.folder / "results.jsonl"

    def forget(self) -> None:
        """Remove the results of these arguments."""
        if self.results.exists():
            with changed_results(self.results) as results:
                results[:] = [record for record in results if not self._of_all().items() <= record.items()]

    def train(self, domains: list[str | None], made_with: dict[str, Any]) -> None:
        """Train the runs without each of `domains` (None: with all) that are not finished yet.

        Raises:
            InputError: a run failed.
        """
        wanted: list[Which] = [(domain, seed) for seed in self.seeds for domain in domains]
        known = read_results(self.results)
        for which in wanted:
            about = self.about(which).items()
            if (record := next((r for r in reversed(known) if about <= r.items()), None)) is not None:
                self.records[which] = record
        warn_of_changes([differences(r["made_with"], made_with) for w, r in self.records.items() if w in wanted])
        jobs = iter([(which, partial(self._begin, which)) for which in wanted if which not in self.records])
        failed = []
        for which, child in in_turn(jobs, self.at_once):
            outcome = child.outcome()
            named = "all domains" if which[0] is None else f"without {which[0]}"
            if "error" in outcome:
                failed.append(f"{named}, seed {which[1]}: {outcome['error']}")
                continue
            self.records[which] = self.about(which) | {"made_with": made_with} | outcome
            with changed_results(self.results) as results:
                results.append(self.records[which])
            remove_weights(child.folder)
            name, value = score_of(outcome)
            tell(f"{named}, seed {which[1]}: {name} {value:.4f}")
        if failed:
            raise InputError(*failed)

    def _begin(self, which: Which, slot: int) -> Child:
        domain, seed = which
        if self.fresh:
            shutil.rmtree(self.output(which), ignore_errors=True)
        words = [*self.words, "--seed", seed, *(() if domain is None else ("--leave_out", domain))]
        return start(self.recipe, words, self.output(which), self.gpus, self.at_once, slot)

    def domains(self) -> dict[str, dict[str, int]]:
        """Return split -> domain -> rows, from the record of a run with all domains.

        Raises:
            InputError: fewer than two domains have training rows and test rows.
        """
        record = json.loads((self.output((None, self.seeds[0])) / "run.json").read_text(encoding="utf-8"))
        found = record["domains"]
        both = found["train"].keys() & found.get("test", {}).keys()
        if len(both) < 2:
            raise InputError(
                f"--domain_column: {len(both)} domains have training rows and test rows, and 2 are needed; give "
                "--test_file with rows of all domains"
            )
        return found

    def arm(self, trained: str | None, tested: str, score: str, stream: int) -> Arm:
        """Return the runs without domain `trained` (None: with all), scored on the test rows of domain `tested`."""
        scores, draws = [], []
        for seed in self.seeds:
            lines = read_predictions(self.output((trained, seed)) / "predictions_test.jsonl")
            rows = [row for row in lines if row["domain"] == tested]
            statistics = statistics_of(self.recipe)(rows, score)
            scores.append(statistics.of_all())
            draws.append(row_draws(statistics, stream))
        return Arm(np.array(scores), np.stack(draws), len(rows))


def mean_of(arms: Sequence[Arm]) -> Arm:
    """Return the mean over domains, whose test rows are resampled independently of each other."""
    scores, draws = (np.mean([getattr(arm, name) for arm in arms], axis=0) for name in ("scores", "draws"))
    return Arm(scores, draws, sum(arm.rows for arm in arms))


def compared(runs: Runs, score: str) -> list[dict[str, Any]]:
    """Return for each domain, and for their mean, the score when it is left out, when it is trained, and the loss."""
    found = runs.domains()
    names = [name for name in sorted(found["train"]) if name in found["test"]]
    pairs = [(runs.arm(name, name, score, i), runs.arm(None, name, score, i)) for i, name in enumerate(names, 1)]
    held, inside = zip(*pairs, strict=True)
    every = [*zip(names, pairs, strict=True), ("mean of the domains", (mean_of(held), mean_of(inside)))]
    return [
        {"domain": name, "train_rows": found["train"].get(name), "test_rows": held.rows}
        | {"left_out": difference(held), "trained": difference(inside), "difference": difference(held, inside)}
        for name, (held, inside) in every
    ]


def lines_of(rows: list[dict[str, Any]], unit: float) -> Iterator[list[str]]:
    """Yield the cells of each line of the table, with scores in points."""
    for row in rows:
        effects = [_shown(row[name], unit, name == "difference") for name in ("left_out", "trained", "difference")]
        yield [
            row["domain"],
            "" if row["train_rows"] is None else f"{row['train_rows']:,}",
            f"{row['test_rows']:,}",
            *effects,
        ]


def _shown(effect: Effect, unit: float, signed: bool) -> str:
    return f"{unit * effect.mean:{'+' if signed else ''}.1f} ± {unit * effect.half_width:.1f}"


def read_options(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of the command, and the arguments of all runs."""
    parser = argparse.ArgumentParser(
        prog="python -m common.tools.domains",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe")
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--score", help="score to show; default: the score that selects the best checkpoint")
    parser.add_argument("--at_once", type=int, default=1, help="number of runs at a time; they share the cores")
    parser.add_argument("--gpus", type=int, help="start each run by accelerate launch with this number of processes")
    parser.add_argument("--fresh", action="store_true", help="run all again, finished and stopped runs too")
    parser.add_argument("--folder", type=Path, help="folder of the results; default: outputs/domains/RECIPE")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Train and score all runs, and return the rows of the table."""
    options, words = read_options(argv)
    check_at_once(options.at_once, options.gpus)
    check_seeds(options.seeds)
    for word in words:
        if (name := word.split("=")[0]) in (*OWN, "--leave_out"):
            raise InputError(f"{name}: is set by this command; leave it out (seeds: --seeds)")
    if not any(word.split("=")[0] == "--domain_column" for word in words):
        raise InputError("--domain_column: is missing; name the column with the domain of a row")
    statistics = statistics_of(options.recipe)  # refuses a recipe without them
    made_with = check_arguments(options.recipe, [words])[0]
    folder = options.folder or Path("outputs", "domains", options.recipe)
    runs = Runs(options.recipe, words, options.seeds, folder, options.gpus, options.at_once, options.fresh)
    if options.score:
        statistics([], options.score)  # refuses a score without statistics, before the first run
    if options.fresh:
        runs.forget()

    # Runs
    runs.train([None], made_with)
    score = options.score or score_of_rows(runs.records[None, options.seeds[0]]["metric"])
    found = runs.domains()
    runs.train([name for name in sorted(found["train"]) if name in found["test"]], made_with)

    # Table
    rows = compared(runs, score)
    unit = statistics([], score).points
    header = ["domain", "training rows", "test rows", "left out", "trained on", "difference"]
    hardware = runs.records[None, options.seeds[0]]["hardware"]
    title = f"{options.recipe}: {score.replace('_', ' ')} of each domain, left out of training and trained on"
    about = f"In points; seeds: {', '.join(options.seeds)}; 95 % intervals over seeds and test rows"
    about += f"; {described(hardware)}; {datetime.now(UTC):%Y-%m-%d}"
    tell(f"\n{title}\n{about}")
    lines = list(lines_of(rows, unit))
    print_table(header, lines)
    table = ["| " + " | ".join(cells) + " |" for cells in (header, ["---", *["---:"] * 5], *lines)]
    keep(folder / "leave_one_out.md", "\n".join([f"# {title}", "", about, "", *table, ""]))
    plain = [row | {name: vars(row[name]) for name in ("left_out", "trained", "difference")} for row in rows]
    keep(folder / "leave_one_out.json", json.dumps({"score": score, "arguments": words, "rows": plain}, indent=1))
    tell(f"\n{folder}/leave_one_out.md, leave_one_out.json")
    return rows


if __name__ == "__main__":
    command_line(main)
