"""Test the orders of the strategies against cases computed by hand, and k-means++ against its definition."""

import numpy as np
import pytest

from common.tools.annotate.strategies import cluster_order, entropies, margins, seeding_order


def test_margins_and_entropies_of_decisions_computed_by_hand():
    probs = np.array([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.1, 0.1, 0.8]])
    assert margins(probs) == pytest.approx([0.2, 1.0, 0.0, 0.7])
    half = (0.5 * np.log(2) + 0.3 * np.log(1 / 0.3) + 0.2 * np.log(5)) / np.log(3)
    assert entropies(probs)[:3] == pytest.approx([half, 0.0, 1.0])


def test_diverse_takes_the_row_next_to_the_centre_of_each_cluster_largest_first():
    angles = np.radians([0, 10, 26, 180, 184, 181, 178, 90])  # only the direction counts
    features = np.stack([np.cos(angles), np.sin(angles)], 1) * np.array([1, 5, 1, 3, 1, 1, 1, 9])[:, None]
    # clusters: rows 3 to 6 around 180.75 degrees, rows 0 to 2 around 12, row 7
    assert cluster_order(features, 3, seed=1) == [5, 1, 7]
    same = np.ones((4, 2))
    assert sorted(cluster_order(same, 3, seed=1)) == [0, 1, 2]
    assert sorted(cluster_order(features, 8, seed=1)) == list(range(8))
    assert cluster_order(np.zeros((2, 3)), 1, seed=1) == [0]


def by_definition(vectors: np.ndarray, count: int, seed: int) -> list[int]:
    """Seed k-means++ as its definition says, on explicit vectors, with the longest vector first."""
    generator = np.random.default_rng(seed)
    chosen = [int(np.linalg.norm(vectors, axis=1).argmax())]
    while len(chosen) < count:
        squared = ((vectors[:, None] - vectors[chosen][None]) ** 2).sum(-1).min(1)
        chosen.append(int(generator.choice(len(vectors), p=squared / squared.sum())))
    return chosen


def test_badge_is_k_means_seeding_on_the_outer_products():
    generator = np.random.default_rng(0)
    left, right = generator.normal(size=(40, 3)), generator.normal(size=(40, 5))
    vectors = np.einsum("ra,rb->rab", left, right).reshape(40, 15)
    for seed in range(5):
        assert seeding_order(left, right, 12, seed) == by_definition(vectors, 12, seed)


def test_badge_draws_in_proportion_to_squared_distances():
    # vectors 4, 3, 0 on a line: 4 is the longest; then 3 has the squared distance 1, and 0 has 16
    left, right = np.array([[4.0], [3.0], [0.0]]), np.ones((3, 1))
    seconds = [seeding_order(left, right, 2, seed) for seed in range(2000)]
    assert {order[0] for order in seconds} == {0}
    assert np.mean([order[1] == 2 for order in seconds]) == pytest.approx(16 / 17, abs=0.02)


def test_badge_takes_equal_rows_last():
    left, right = np.array([[1.0], [1.0], [2.0], [2.0], [0.5]]), np.ones((5, 1))
    order = seeding_order(left.astype(np.float32), right.astype(np.float32), 5, 3)
    assert order[0] == 2
    assert set(order[1:3]) == {4, 0} or set(order[1:3]) == {4, 1}
    assert order[3:] == [3, 1 if 0 in order[:3] else 0]
