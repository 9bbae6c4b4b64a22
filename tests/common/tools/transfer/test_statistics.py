"""Test the statistics of transfer against scipy, scikit-learn and hand-computed cases, and on simulated matrices."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score

from common.errors import InputError
from common.run.transferable import RowStatistics, of_classes, of_mean, of_spans
from common.tools.transfer.statistics import (
    DRAWS,
    Arm,
    difference,
    holm,
    rank_correlation,
    regret,
    row_draws,
    row_weights,
    rows_needed,
)


def arm(rows: list[np.ndarray], stream: int = 0) -> Arm:
    """Return the arm of runs with these scores of their test rows."""
    statistics = [of_mean(values) for values in rows]
    draws = np.stack([row_draws(one, stream) for one in statistics])
    return Arm(np.array([one.of_all() for one in statistics]), draws, len(rows[0]))


def labels(random: np.random.Generator, size: int) -> list[list[str]]:
    return [[str(name)] for name in random.choice(["a", "b", "c", "rare"], size, p=[0.5, 0.3, 0.19, 0.01])]


@pytest.mark.parametrize("name", ["accuracy", "macro_f1", "micro_f1", "weighted_f1"])
def test_scores_from_sums_are_those_of_sklearn_on_each_resample(name):
    random = np.random.default_rng(0)
    gold, predicted = labels(random, 80), labels(random, 80)
    statistics = of_classes(gold, predicted, name)
    drawn, weights = row_draws(statistics), row_weights(80)
    for draw in range(3):
        rows = np.repeat(np.arange(80), weights[draw].astype(int))
        theirs, ours = ([side[i][0] for i in rows] for side in (gold, predicted))
        average = name.removesuffix("_f1")
        present = sorted({*theirs, *ours})
        expected = (
            accuracy_score(theirs, ours)
            if name == "accuracy"
            else f1_score(theirs, ours, labels=present, average=average, zero_division=0)
        )
        assert drawn[draw] == pytest.approx(expected)


def test_statistics_of_spans_and_several_labels():
    statistics = of_spans([(1, 2, 1), (0, 0, 0), (2, 2, 4)])
    assert statistics.of_all() == pytest.approx(2 * 3 / (4 + 5))
    assert of_spans([(1, 2, 1), (2, 2, 4)], "precision").of_all() == pytest.approx(3 / 4)
    assert of_spans([(1, 2, 1), (2, 2, 4)], "recall").of_all() == pytest.approx(3 / 5)
    assert of_spans([(0, 0, 0)]).of_all() == 0
    several = of_classes([["a", "b"], ["a"], []], [["a"], ["a"], []], "micro_f1")
    assert several.of_all() == pytest.approx(2 * 2 / (2 + 3))
    assert of_classes([["a", "b"], ["a"], []], [["a"], ["a"], []], "accuracy").of_all() == pytest.approx(2 / 3)
    left_out = of_classes([["none"], ["a"], ["none"]], [["a"], ["a"], ["none"]], "micro_f1", ignored=["none"])
    assert left_out.of_all() == pytest.approx(2 * 1 / (2 + 1))
    with pytest.raises(InputError, match="score mcc: no statistics of rows for it; choose one of accuracy, macro_f1"):
        of_classes([["a"]], [["a"]], "mcc")
    with pytest.raises(InputError, match="score accuracy: no statistics of rows for it"):
        of_spans([(1, 1, 1)], "accuracy")


def test_draws_have_the_standard_error_of_the_mean_and_are_paired_by_their_rows():
    values = np.random.default_rng(1).random(500)
    assert row_draws(of_mean(values)).std() == pytest.approx(values.std() / np.sqrt(500), rel=0.08)
    assert row_weights(500).shape == (DRAWS, 500)
    assert (row_weights(500).sum(1) == 500).all()
    assert np.array_equal(row_draws(of_mean(values)), row_draws(of_mean(values)))
    assert not np.array_equal(row_draws(of_mean(values)), row_draws(of_mean(values), stream=7))
    # the same errors on other rows cancel if the rows are paired
    noise = np.random.default_rng(2).normal(0, 0.01, (2, 3, 500))
    ours, theirs = [values + 0.01 + n for n in noise[0]], [values + n for n in noise[1]]
    paired, apart = difference(arm(ours), arm(theirs)), difference(arm(ours), arm(theirs, stream=7))
    assert paired.mean == pytest.approx(apart.mean) == pytest.approx(0.01, abs=0.002)
    assert paired.half_width < apart.half_width / 8


def test_with_one_test_row_that_never_varies_the_interval_is_that_of_welch():
    ours, theirs = np.array([0.61, 0.65, 0.72, 0.66]), np.array([0.55, 0.60, 0.53])
    runs = [Arm(scores, np.repeat(scores[:, None], DRAWS, 1), 1000) for scores in (ours, theirs)]
    found, expected = difference(*runs), stats.ttest_ind(ours, theirs, equal_var=False)
    interval = expected.confidence_interval()
    assert found.mean == pytest.approx(ours.mean() - theirs.mean())
    assert found.p == pytest.approx(expected.pvalue, rel=0.4)  # the standard error is that of 1,000 draws
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.012)
    alone = difference(runs[0])
    exact = stats.t.interval(0.95, 3, ours.mean(), stats.sem(ours))
    assert (alone.low, alone.high) == pytest.approx(exact, abs=0.008)


def test_one_seed_has_an_interval_over_rows_and_no_p_value():
    values = np.random.default_rng(1).random(400)
    found = difference(arm([values + 0.1]), arm([values[::-1]]))
    assert found.p is None
    assert found.low < found.mean < found.high


def test_equal_runs_do_not_differ():
    values = np.random.default_rng(1).random(50)
    found = difference(arm([values, values]), arm([values, values]))
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_holm_is_that_of_a_case_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_rows_needed_are_interpolated_over_the_logarithm():
    rows, scores = [9, 99, 999], np.array([0.1, 0.5, 0.6])
    assert rows_needed(rows, scores, np.array(0.3)) == pytest.approx(10**1.5 - 1)
    assert rows_needed(rows, scores, np.array(0.5)) == pytest.approx(99)
    assert rows_needed(rows, scores, np.array(0.05)) == 9
    assert rows_needed(rows, scores, np.array(0.7)) == np.inf
    several = np.array([[0.1, 0.5, 0.6], [0.4, 0.3, 0.6]])  # the second falls and rises
    assert rows_needed(rows, several, np.array([0.3, 0.35])) == pytest.approx([10**1.5 - 1, 9])


def test_predictions_are_judged_by_rank_and_by_what_the_first_choice_loses():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert regret([0.2, 0.9, 0.1], [0.5, 0.4, 0.3]) == pytest.approx(0.2)
    assert regret([0.9, 0.2], [0.5, 0.4]) == 0
    assert regret([1, 2], [0, 0]) is None


def matrices(number: int, effect: float, seeds: int = 3, rows: int = 60) -> tuple[float, float]:
    """Return the shares of simulated matrices with a false discovery, and of those that find the true effect.

    A matrix has 4 sources and 2 targets. Test rows differ in difficulty, seeds in skill. The first source of each
    target has a true effect.
    """
    random = np.random.default_rng(0)
    false = true = 0

    def runs(easy: np.ndarray, gain: float) -> Arm:
        skill = gain + random.normal(0, 0.02, (seeds, 1))
        return arm(list((random.random((seeds, rows)) < np.clip(easy + skill, 0, 1)).astype(float)))

    for _ in range(number):
        p_values = []
        for _ in range(2):
            easy = random.choice([0.05, 0.4, 0.6], rows)
            baseline = runs(easy, 0.0)
            p_values += [difference(runs(easy, effect if k == 0 else 0.0), baseline).p for k in range(4)]
        adjusted = np.array(holm(p_values)).reshape(2, 4)
        first = 1 if effect else 0
        false += bool((adjusted[:, first:] < 0.05).any())
        true += bool((adjusted[:, 0] < 0.05).all())
    return false / number, true / number


def test_simulated_matrices_have_few_false_discoveries_and_a_large_effect_is_found():
    assert matrices(40, 0.0)[0] <= 0.05
    assert matrices(20, 0.35, rows=200)[1] >= 0.9


@pytest.mark.soak
def test_a_null_effect_is_called_significant_in_under_5_percent_of_1000_matrices():
    assert matrices(1000, 0.0)[0] < 0.05
    assert matrices(1000, 0.0, seeds=2)[0] < 0.05
    false, true = matrices(200, 0.35, rows=200)
    assert false < 0.05
    assert true > 0.9


def test_a_sum_of_rows_gives_the_score():
    statistics = RowStatistics(np.array([[1.0, 2.0], [3.0, 4.0]]), lambda sums: sums[..., 0] / sums[..., 1])
    assert statistics.of_all() == pytest.approx(4 / 6)
