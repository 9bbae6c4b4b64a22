"""Compute what the runs of a plan show: gains, label efficiency, equal cost, forgetting, the worth of predictions."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from common.errors import InputError, warn
from common.hardware import described
from common.run.transferable import RowStatistics
from common.tools.runner import score_of
from common.tools.transfer.chains import Chains, Place, Run
from common.tools.transfer.plan import Rows
from common.tools.transfer.sequence import learned_by
from common.tools.transfer.signs import SIGNS
from common.tools.transfer.statistics import (
    LEVEL,
    Arm,
    Effect,
    difference,
    holm,
    rank_correlation,
    regret,
    row_draws,
    rows_needed,
)
from common.tools.transfer.tasks import Task, read_predictions, statistics_of
from common.tools.transfer.work import Store

#: adjusted p-value below which an effect is called sure
SURE = 0.05
#: relative difference of a score from its rows to that of the run, from rounding
ROUNDING = 2e-3


@dataclass
class Comparison:
    """An effect and its place in the family of comparisons that Holm's correction is over.

    Attributes:
        effect: the effect, in points.
        p_adjusted: p-value after the correction; None with one seed.
    """

    effect: Effect
    p_adjusted: float | None = None

    @property
    def sure(self) -> bool:
        """Return whether the effect differs from 0 after the correction."""
        return self.p_adjusted is not None and self.p_adjusted < SURE

    def plain(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return asdict(self.effect) | {"p_holm": self.p_adjusted, "sure": self.sure}


@dataclass
class Cell:
    """A source at a target with a number of rows.

    Attributes:
        place: target, source, rows.
        scores: the score of each seed, in points.
        score: the mean score with its interval.
        gain: the gain over the baseline; None for the baseline, and without one.
        over_scratch: the gain over random weights; None without them.
        longer: the gain of the baseline trained for the same minutes over the baseline.
        net: the gain over the baseline trained for the same minutes.
        seconds: median seconds of training, of the stages before and of the target.
        longer_seconds: median seconds of the longer training.
        error: why the cell has no score.
    """

    place: Place
    scores: list[float] = field(default_factory=list)
    score: Effect | None = None
    gain: Comparison | None = None
    over_scratch: Comparison | None = None
    longer: Comparison | None = None
    net: Comparison | None = None
    seconds: float | None = None
    longer_seconds: float | None = None
    error: str | None = None


@dataclass
class Forgetting:
    """The score of a source's task before and after a target was learned, in points."""

    target: str
    source: str
    score: str
    rows: Rows
    before: float
    after: float
    change: Comparison


class Findings:
    """What the finished runs of a plan show.

    Attributes:
        cells: the cells with all runs, by place.
        forgetting: the source tasks that were scored again.
        score_names: the score of each target.
        needed: for each target and source, and each number of rows of the baseline: rows that reach its score, with
            the ends of their interval.
        sequence: what each method and bound of the sequence has learned.
        worth: for each target and number of rows, sign -> rank correlation and regret at 1.
    """

    def __init__(self, chains: Chains, store: Store, signs: dict[str, dict[str, dict[str, float | None]]]):
        self.chains, self.store, self.signs = chains, store, signs
        self._statistics: dict[tuple[str, str], tuple[float, np.ndarray, int]] = {}
        self._warned: set[str] = set()
        self.score_names = {t.name: t.score or chains.tasks[t.name].score for t in chains.plan.targets}
        self.units = {name: points_of(chains.tasks[name], score) for name, score in self.score_names.items()}
        self.cells = {place: self._cell(place, runs) for place, runs in chains.cells.items()}
        self._compare()
        self.forgetting = self._forgotten()
        self.sequence = learned_by(chains, self._in_points)
        self.needed = self._efficiency()
        self.worth = self._worth()

    # Scores

    def _arm(self, runs: Sequence[Run], score: str) -> Arm | None:
        """Return the runs as an arm; None unless all have ended well."""
        found = [self._run(run, score) for run in runs]
        if not found or any(one is None for one in found):
            return None
        whole = [one for one in found if one is not None]
        return Arm(np.array([s for s, _, _ in whole]), np.stack([draws for _, draws, _ in whole]), whole[0][2])

    def _in_points(self, runs: Sequence[Run], target: str) -> Arm | None:
        """Return the runs as an arm on the test rows of a target, in points."""
        arm, unit = self._arm(runs, self.score_names[target]), self.units[target]
        return arm and Arm(unit * arm.scores, unit * arm.draws, arm.rows)

    def _run(self, run: Run, score: str) -> tuple[float, np.ndarray, int] | None:
        result = self.store.result(run)
        if result is None or "error" in result:
            return None
        if (run.key, score) not in self._statistics:
            try:
                rows = read_predictions(self.store.output(run) / "predictions_test.jsonl")
            except FileNotFoundError:
                return None  # it is trained again, as its model is needed
            statistics = statistics_of(run.task.recipe)(rows, score)
            self._check(run, statistics, score, result)
            stream = int(result["rows"]["test"][:8], 16)  # runs on the same test rows share their resamples
            self._statistics[run.key, score] = (statistics.of_all(), row_draws(statistics, stream), len(rows))
        return self._statistics[run.key, score]

    def _check(self, run: Run, statistics: RowStatistics, score: str, result: dict[str, Any]) -> None:
        """Warn if the rows do not give the score that the run has recorded."""
        name, recorded = score_of(result, score)
        ours = statistics.of_all()
        if name.startswith("test_") and abs(ours - recorded) > ROUNDING * max(1.0, abs(recorded)):
            if run.task.recipe not in self._warned:
                warn(f"{run.label}: {name} is {recorded:.4f} in its record, and {ours:.4f} by its rows, used here")
            self._warned.add(run.task.recipe)

    def _cell(self, place: Place, runs: tuple[Run, ...]) -> Cell:
        cell = Cell(place)
        results = [self.store.result(run) for run in runs]
        needed = [self.store.result(need) for run in runs for need in run.chain()]
        errors = [result["error"] for result in (*needed, *results) if result and "error" in result]
        arm = self._arm(runs, self.score_names[place[0]])
        if arm is None:
            cell.error = errors[0] if errors else "not trained yet"
            return cell
        cell.scores = arm.scores.tolist()
        cell.seconds = self._seconds(runs)
        return cell

    def _seconds(self, runs: Sequence[Run]) -> float | None:
        each = [[(self.store.result(run) or {}).get("train_seconds") for run in last.chain()] for last in runs]
        known = [sum(filter(None, seconds)) for seconds in each if None not in seconds]
        return float(np.median(known)) if known else None

    # Comparisons

    def _difference(self, target: str, ours: Arm | None, theirs: Arm | None) -> Comparison | None:
        if ours is None or theirs is None:
            return None
        return Comparison(scaled(difference(ours, theirs), self.units[target]))

    def _compare(self) -> None:
        plan = self.chains.plan
        scratch = next((source.name for source in plan.sources if source.kind == "scratch"), None)
        for place, runs in self.chains.cells.items():
            target, source, rows = place
            cell, score = self.cells[place], self.score_names[target]
            arm = self._arm(runs, score)
            if arm is None:
                continue
            unit = self.units[target]
            cell.scores = [value * unit for value in cell.scores]
            cell.score = scaled(difference(arm), unit)
            arms = {
                name: self._arm(self.chains.cells.get((target, name, rows), ()), score)
                for name in (plan.baseline, scratch)
                if name is not None and name != source
            }
            baseline = arms.get(plan.baseline)
            cell.gain = self._difference(target, arm, baseline)
            cell.over_scratch = self._difference(target, arm, arms.get(scratch) if scratch else None)
            if place in self.chains.longer:
                longer = self.chains.longer[place]
                same = self._arm(longer, score)
                cell.longer, cell.net = self._difference(target, same, baseline), self._difference(target, arm, same)
                cell.longer_seconds = self._seconds(longer)
        for family in ("gain", "over_scratch", "longer", "net"):
            correct([getattr(cell, family) for cell in self.cells.values()])

    def _forgotten(self) -> list[Forgetting]:
        found = []
        for (target, source), runs in self.chains.forgetting.items():
            task, score = self.chains.first_tasks[target, source], self.chains.first_scores[target, source]
            before, after = self._arm(self.chains.first[target, source], score), self._arm(runs, score)
            if before is None or after is None:
                continue
            unit = points_of(task, score)
            rows = [place[2] for place in self.chains.cells if place[:2] == (target, source)][-1]
            change = Comparison(scaled(difference(after, before), unit))
            found.append(Forgetting(target, source, score, rows, before.mean * unit, after.mean * unit, change))
        correct([one.change for one in found])
        return found

    def size(self, target: str, rows: Rows) -> int:
        """Return a number of rows, that of all rows for None."""
        return len(self.chains.tasks[target].rows.pieces) if rows is None else rows

    def _efficiency(self) -> dict[tuple[str, str], dict[int, tuple[float, float, float]]]:
        found: dict[tuple[str, str], dict[int, tuple[float, float, float]]] = {}
        for target in self.score_names:
            score = self.score_names[target]
            arms: dict[str, dict[int, Arm]] = {}
            for place, runs in self.chains.cells.items():
                if place[0] == target and (arm := self._arm(runs, score)) is not None:
                    arms.setdefault(place[1], {})[self.size(target, place[2])] = arm
            baseline = arms.get(self.chains.plan.baseline, {})
            for source, points in arms.items():
                rows = sorted(points)
                if source == self.chains.plan.baseline or len(rows) < 2:
                    continue
                curve = [points[n] for n in rows]
                means = np.array([arm.mean for arm in curve])
                random = np.random.default_rng(0)
                draws = np.stack([arm.resampled(random) for arm in curve], -1)
                for level, arm in sorted(baseline.items()):
                    needed = float(rows_needed(rows, means, np.array(arm.mean)))
                    drawn = rows_needed(rows, draws, arm.resampled(random))
                    tail = (1 - LEVEL) / 2
                    low, high = np.quantile(drawn, [tail, 1 - tail], method="nearest")
                    found.setdefault((target, source), {})[level] = needed, float(low), float(high)
        return found

    def _worth(self) -> dict[tuple[str, Rows], dict[str, tuple[float | None, float | None]]]:
        """Return rank correlation and regret of each sign with the measured scores of the sources."""
        found: dict[tuple[str, Rows], dict[str, tuple[float | None, float | None]]] = {}
        for target in self.chains.plan.targets:
            for rows in target.rows:
                measured = {
                    name: cell.score.mean
                    for name in self.signs.get(target.name, {})
                    if (cell := self.cells.get((target.name, name, rows))) is not None and cell.score is not None
                }
                for sign in (*SIGNS, "rank"):
                    values = {name: self.signs[target.name][name].get(sign) for name in measured}
                    pairs = [(value, measured[name]) for name, value in values.items() if value is not None]
                    if len(pairs) > 1:
                        predicted, actual = zip(*pairs, strict=True)
                        of_sign = rank_correlation(predicted, actual), regret(predicted, actual)
                        found.setdefault((target.name, rows), {})[sign] = of_sign
        return found

    def machines(self) -> list[str]:
        """Return the machines of the runs, described."""
        results = [self.store.result(run) for run in self.chains.runs()]
        return sorted({described(result["hardware"]) for result in results if result and "hardware" in result})

    def check_any(self) -> None:
        """Raise `InputError` with the reasons if no cell has a score."""
        if not any(cell.scores for cell in self.cells.values()):
            raise InputError(*dict.fromkeys(f"{place[1]} at {place[0]}: {c.error}" for place, c in self.cells.items()))


def points_of(task: Task, score: str) -> float:
    """Return what a score of 1 is in points."""
    return statistics_of(task.recipe)([], score).points


def scaled(effect: Effect, unit: float) -> Effect:
    """Return an effect in points."""
    return Effect(effect.mean * unit, effect.low * unit, effect.high * unit, effect.p)


def correct(family: Sequence[Comparison | None]) -> None:
    """Set the p-values of a family of comparisons, adjusted for their number."""
    tested = [one for one in family if one is not None and one.effect.p is not None]
    adjusted = holm([one.effect.p for one in tested if one.effect.p is not None])
    for one, p in zip(tested, adjusted, strict=True):
        one.p_adjusted = p
