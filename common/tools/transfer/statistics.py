"""Compare the scores of runs: a hierarchical bootstrap over seeds and test rows, and Holm's correction.

A score of a run is a function of sums over its test rows (`common.run.transferable.RowStatistics`), so a resample of
the rows needs no second scoring. Two levels vary: the seeds of the runs, and the test rows.

- Resamples of the rows are shared by all runs on the same test rows (paired); other runs get resamples of their own.
- Of n seeds, n - 1 are drawn: the variance of their mean is then s^2 / n without bias, where n of n drawn seeds give
  (n - 1) / n of it, a third too little with three seeds (Rao and Wu 1988, doi.org/10.2307/2288945).
- The 95 % interval and the p-value take the standard error of the resamples, and Student's t with the degrees of
  freedom of Welch and Satterthwaite over the variances of the seeds of both sides and of the rows. The percentiles of
  the resamples alone would be too narrow with few seeds.

Resampling rows and seeds counts the noise of single rows twice, so the intervals are rather too wide than too narrow
(McCullagh 2000, doi.org/10.2307/3318578).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

from common.run.transferable import RowStatistics

DRAWS = 1000
#: level of the intervals
LEVEL = 0.95


@lru_cache(maxsize=32)
def row_weights(rows: int, stream: int = 0) -> np.ndarray:
    """Return how often each draw has each test row, of shape (DRAWS, rows); equal for equal arguments."""
    random = np.random.default_rng([rows, stream])
    return random.multinomial(rows, np.full(rows, 1 / rows), size=DRAWS).astype(np.float32)


def row_draws(statistics: RowStatistics, stream: int = 0) -> np.ndarray:
    """Return the score of each resample of the test rows, of shape (DRAWS,); `stream` numbers the set of rows."""
    sums = row_weights(len(statistics.values), stream) @ statistics.values.astype(np.float32)
    return statistics.score(sums.astype(np.float64))


@dataclass(frozen=True)
class Arm:
    """The runs of one cell, one for each seed.

    Attributes:
        scores: the score of each run, of shape (seeds,).
        draws: the score of each run on each resample of the rows, of shape (seeds, DRAWS).
        rows: number of test rows.
    """

    scores: np.ndarray
    draws: np.ndarray
    rows: int

    @property
    def mean(self) -> float:
        """Return the mean score over the seeds."""
        return float(self.scores.mean())

    @property
    def seed_variance(self) -> float:
        """Return the variance of the mean over the seeds; 0 for one seed."""
        return float(self.scores.var(ddof=1)) / len(self.scores) if len(self.scores) > 1 else 0.0

    def resampled(self, random: np.random.Generator) -> np.ndarray:
        """Return the mean over drawn seeds on each resample of the rows, of shape (DRAWS,)."""
        seeds = len(self.scores)
        drawn = random.integers(seeds, size=(max(1, seeds - 1), DRAWS))
        return np.take_along_axis(self.draws, drawn, axis=0).mean(0)


@dataclass(frozen=True)
class Effect:
    """A difference of two cells, or the score of one.

    Attributes:
        mean: the difference of the means over the seeds.
        low: lower end of the interval.
        high: upper end of the interval.
        p: two-sided p-value of the hypothesis of no difference; None with one seed, whose spread is unknown.
    """

    mean: float
    low: float
    high: float
    p: float | None

    @property
    def half_width(self) -> float:
        """Return half the width of the interval."""
        return (self.high - self.low) / 2


def difference(ours: Arm, theirs: Arm | None = None) -> Effect:
    """Return the score of `ours` minus that of `theirs`, or the score of `ours` alone, with interval and p-value."""
    random = np.random.default_rng(0)
    arms = [ours] if theirs is None else [ours, theirs]
    signs = (1, -1)
    mean = sum(sign * arm.mean for sign, arm in zip(signs, arms, strict=False))
    resampled = sum(sign * arm.resampled(random) for sign, arm in zip(signs, arms, strict=False))
    of_rows = sum(sign * arm.draws.mean(0) for sign, arm in zip(signs, arms, strict=False))
    error = float(np.std(resampled, ddof=1))
    parts = [(arm.seed_variance, len(arm.scores) - 1) for arm in arms if len(arm.scores) > 1]
    parts.append((float(np.var(of_rows, ddof=1)), min(arm.rows for arm in arms) - 1))
    total = sum(variance for variance, _ in parts)
    squares = sum(variance**2 / max(freedom, 1) for variance, freedom in parts)
    freedom = total**2 / squares if squares > 0 else float(min(arm.rows for arm in arms))
    width = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    p: float | None = None
    if all(len(arm.scores) > 1 for arm in arms):
        p = float(2 * stats.t.sf(abs(mean) / error, freedom)) if error > 0 else 1.0 if mean == 0 else 0.0
    return Effect(mean, mean - width, mean + width, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for the number of comparisons (Holm 1979, jstor.org/stable/4615733).

    The k-th smallest of m p-values is multiplied by m - k + 1; no adjusted value is below an earlier one.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(order))
    largest = 0.0
    for k, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - k) * p_values[place]))
        adjusted[place] = largest
    return adjusted.tolist()


# Label efficiency


def rows_needed(rows: Sequence[int], scores: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Return the number of rows at which a curve first reaches a score, by interpolation over the logarithm.

    Args:
        rows: numbers of rows, increasing.
        scores: score at each of them, of shape (..., len(rows)).
        level: score to reach, of shape (...).

    Returns:
        Numbers of rows, of shape (...): the first of `rows` if its score suffices, infinity if no score does.
    """
    scale = np.log1p(np.asarray(rows, dtype=np.float64))
    reached = scores >= level[..., None]
    last = np.where(reached.any(-1), reached.argmax(-1), 0)
    before = np.maximum(last - 1, 0)
    above = np.take_along_axis(scores, last[..., None], -1)[..., 0]
    below = np.take_along_axis(scores, before[..., None], -1)[..., 0]
    share = np.divide(level - below, above - below, out=np.ones_like(above), where=above > below)
    needed = np.expm1(scale[before] + share * (scale[last] - scale[before]))
    needed = np.where(last == 0, rows[0], needed)
    return np.where(reached.any(-1), needed, np.inf)


# Predictions


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; None for fewer than three pairs, or if all values of a side are equal."""
    if len(predicted) < 3 or len(set(predicted)) < 2 or len(set(measured)) < 2:
        return None
    return float(stats.spearmanr(predicted, measured).statistic)


def regret(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Return the regret at 1: the share of the best measured score that the source ranked first by the sign misses.

    Poth et al. 2021, https://aclanthology.org/2021.emnlp-main.827, section 4.2. None if the best score is not positive.
    """
    best = max(measured)
    return float((best - measured[int(np.argmax(predicted))]) / best) if best > 0 else None
