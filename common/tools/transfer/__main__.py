"""Measure what pretraining, a domain, a language or a neighbouring task brings on your task, and how sure that is.

    make transfer
    make transfer PLAN=my_plan.yaml
    make transfer PLAN=my_plan.yaml PREDICT=only
    make transfer PLAN=my_plan.yaml SEEDS="1 2 3 4 5" ARGS="--at_once 2"
    make transfer PLAN=my_plan.yaml ARGS="--targets reviews --most_rows 100"
    python -m common.tools.transfer --plan my_plan.yaml --folder /shared/transfer

A plan names targets, sources, seeds and a budget; common/tools/transfer/reading.py lists its keys, and
common/tools/plans/sample.yaml, the default, is one. A source is trained first (or not at all), and then the target,
with each seed and each number of rows. The runs are in `--folder`, by default outputs/transfer, where plans and
machines share them: each run is trained once. The same command resumes a stopped plan.

The report is in FOLDER/NAME_OF_THE_PLAN: `transfer.md`, `transfer.json` and `transfer.html` with gains over the
baseline and over random weights, label efficiency, equal cost, forgetting, and the ranking of the sources by signs that
need no training, beside what the training showed. `--predict only` ranks without training, `--predict off` trains
without ranking.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common.cli import command_line
from common.errors import InputError, tell, warn
from common.run.fingerprint import NAMES, fingerprint
from common.run.report import print_table
from common.tools.runner import check_at_once, check_seeds, score_of
from common.tools.transfer import report
from common.tools.transfer.chains import Chains, Run, add_longer, build, time_factors, warn_of_notes
from common.tools.transfer.estimate import Estimate, minutes
from common.tools.transfer.findings import Findings
from common.tools.transfer.reading import read_plan
from common.tools.transfer.sequence import add_sequence
from common.tools.transfer.signs import SIGNS, predict
from common.tools.transfer.tasks import Tasks
from common.tools.transfer.work import Store, Work

DEFAULT_PLAN = Path("common", "tools", "plans", "sample.yaml")


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m common.tools.transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--plan", type=Path, default=DEFAULT_PLAN, help="YAML file of targets and sources")
    parser.add_argument("--predict", choices=("also", "only", "off"), default="also", help="rank the sources by signs")
    parser.add_argument("--seeds", nargs="+", help="seeds, instead of those of the plan")
    parser.add_argument("--targets", nargs="+", help="names of the targets to train; default: all targets of the plan")
    parser.add_argument("--most_rows", type=int, help="train only on numbers of rows up to N; leaves out all rows")
    parser.add_argument("--folder", type=Path, default=Path("outputs", "transfer"), help="folder of runs and reports")
    parser.add_argument("--at_once", type=int, default=1, help="number of runs at a time; they share the cores")
    parser.add_argument("--gpus", type=int, help="start each run by accelerate launch with this number of processes")
    parser.add_argument(
        "--budget", type=float, help="maximum minutes of training in this call, instead of the budget of the plan"
    )
    parser.add_argument("--fresh", action="store_true", help="train all runs of the plan again")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Findings:
    """Carry out a plan, and return what it shows."""
    options = read_options(argv)
    check_at_once(options.at_once, options.gpus)
    plan = read_plan(options.plan)
    if options.seeds:
        check_seeds(options.seeds)
        plan = plan.with_seeds(tuple(map(int, options.seeds)))
    plan = plan.part(options.targets, options.most_rows)
    tasks = Tasks()
    chains = build(plan, tasks, options.folder, options.gpus)
    add_sequence(chains, tasks, options.folder, options.gpus)
    warn_of_notes(chains)
    store, out = Store(options.folder), options.folder / plan.path.stem
    words = shlex.join(["python", "-m", "common.tools.transfer", *(sys.argv[1:] if argv is None else argv)])
    signs = {}
    if options.predict != "off":
        signs = predict(chains)
        print_signs(signs)
    if options.predict == "only":
        return finish(Findings(chains, store, signs), out, words)

    # Runs
    estimate, limit = Estimate(options.at_once), options.budget or plan.budget
    made_with = {key: shared_fingerprint(run) for key, run in {run.identity: run for run in chains.runs()}.items()}
    work = Work(store, chains, estimate, options.at_once, limit and 60 * limit, options.fresh)
    work.report = lambda run, result: outcome(chains, run, result)
    begin(work, made_with)
    if options.fresh:
        work.forget()
    work.run(made_with)
    if plan.equal_cost:
        factors = time_factors(chains, lambda run: (store.result(run) or {}).get("train_seconds"), alike(store))
        if factors:
            add_longer(chains, factors)
            for runs in chains.longer.values() if options.fresh else ():
                for run in runs:
                    store.forget(run)
            work = work.next_phase()
            work.run(made_with)
    left, failed = work.left(), work.failed()
    if left or failed:
        why = [f"the budget of {limit:g} minutes is spent"] if work.exhausted() else []
        why += [f"failed runs: {len(failed)}"] if failed else []
        why += [f"runs left: {len(left)}"] if left else []
        warn(f"{', '.join(why)}; run the same command again for them")
    findings = Findings(chains, store, signs)
    findings.check_any()
    return finish(findings, out, words)


def shared_fingerprint(run: Run) -> dict:
    """Return the fingerprint of the arguments of a run, without the machine: machines share the runs."""
    found = fingerprint(run.task.parsed)
    del found["hardware"]
    return found


def alike(store: Store) -> Callable[[Sequence[Run]], bool]:
    """Return a function that tells whether the seconds of runs can be compared."""

    def made_alike(runs: Sequence[Run]) -> bool:
        results = [store.result(run) or {} for run in runs]
        machines = [{k: v for k, v in one.get("hardware", {}).items() if k != "precision"} for one in results]
        about = [machine | {"at_once": one.get("at_once")} for machine, one in zip(machines, results, strict=True)]
        return all(one == about[0] for one in about)

    return made_alike


def begin(work: Work, made_with: dict[str, dict]) -> None:
    """Print what is to be done, and check the budget.

    Raises:
        InputError: the budget is too small for the runs that are left.
    """
    runs, left = work.runs, work.left()
    changes = [changed for changed in work.changes(made_with) if changed]
    if changes:
        names = [name for name in NAMES.values() if any(name in changed for changed in changes)]
        warn(
            f"{len(changes)} finished runs were made with other {', '.join(names)}; their results are taken as they "
            "are; --fresh trains all again"
        )
    longer = work.longer_seconds()
    seconds = sum(map(work.estimate.seconds, left)) / work.at_once + longer
    if left or longer:
        more = f", and {minutes(longer)} for equal cost" if longer else ""
        tell(f"{len(left)} of {len(runs)} runs are left: about {minutes(seconds)}{more and f' ({more[2:]} included)'}")
    if work.budget is not None and seconds > work.budget:
        raise InputError(
            f"budget: {work.budget / 60:g} minutes, but the {len(left)} runs that are left take about "
            f"{minutes(seconds)} on this machine; raise budget in the plan (or by --budget), or plan fewer "
            "seeds, rows or sources, or equal_cost: false"
        )


def outcome(chains: Chains, run: Run, result: dict) -> str:
    """Return the score of a run and its seconds, for its progress line."""
    target = next((name for name, task in chains.tasks.items() if task is run.task), None)
    score = chains.plan.target(target).score if target else None
    name, value = score_of(result, score)
    seconds = "resumed" if result["train_seconds"] is None else f"{result['train_seconds']:.0f} s"
    return f"{name} {value:.4f}, {seconds}"


def print_signs(signs: dict[str, dict[str, dict[str, float | None]]]) -> None:
    """Print the ranking of the sources for each target."""
    for target, sources in signs.items():
        ordered = sorted(sources, key=lambda name: -(sources[name].get("rank") or 0.0))
        tell(f"\nsources for {target}, by signs that need no training")
        values = [[sources[name].get(sign) for sign in (*SIGNS, "rank")] for name in ordered]
        rows = [[name, *("" if v is None else v for v in of)] for name, of in zip(ordered, values, strict=True)]
        print_table(["source", *SIGNS, "rank"], rows)
    tell("" if signs else "no source trains anything first or has a checkpoint of its own, so there is none to rank")


def finish(findings: Findings, folder: Path, words: str) -> Findings:
    """Write the report, and print the sentences."""
    paths = report.write(findings, folder, words)
    for section in report.sections(findings)[:1]:
        if section.title == "In words":
            tell("\n" + "\n".join(section.text))
    tell(f"\n{', '.join(map(str, paths))}")
    return findings


if __name__ == "__main__":
    command_line(main)
