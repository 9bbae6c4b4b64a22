"""Test the paired bootstrap against the exact distribution of few rows, and against its error rate."""

from itertools import product

import numpy as np

from common.run.significance import RESAMPLES, bootstrap_p


def test_the_p_value_is_that_of_all_resamples_of_few_rows():
    differences = np.array([2.0, -1.0, 3.0, 0.5, -0.5])
    means = np.array([np.mean(rows) for rows in product(differences, repeat=5)])
    exact = np.mean(np.abs(means - differences.mean()) >= abs(differences.mean()) - 1e-12)
    assert abs(bootstrap_p(np.zeros(5), differences) - exact) < 4 * (exact * (1 - exact) / RESAMPLES) ** 0.5
    assert bootstrap_p(np.zeros(5), differences) == bootstrap_p(differences, np.zeros(5))


def test_equal_runs_differ_by_chance_and_better_runs_do_not():
    random = np.random.default_rng(0)
    theirs = random.normal(30, 10, 200)
    assert bootstrap_p(theirs, theirs) == 1
    assert bootstrap_p(theirs, theirs + random.normal(3, 5, 200)) < 0.01


def test_runs_without_a_difference_are_called_different_as_often_as_promised():
    random = np.random.default_rng(0)
    found = [bootstrap_p(np.zeros(100), random.normal(0, 5, 100)) for _ in range(60)]
    assert np.mean(np.array(found) < 0.05) < 0.05 + 3 * (0.05 * 0.95 / 60) ** 0.5
