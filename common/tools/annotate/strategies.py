"""Measure how uncertain a model is, and order rows by what their labels would teach.

- margin: the difference between the two most probable options of a decision (Scheffer et al. 2001, "Active hidden
  Markov models for information extraction"). Smallest first.
- entropy: the entropy of a decision, as a share of its maximum. Largest first.
- diverse: k-means on the features, with a cluster for each row to label. The row next to the centre of each cluster
  is chosen, largest cluster first (Zhdanov 2019, https://arxiv.org/abs/1901.05954, without weights).
- badge: k-means++ seeding (Arthur and Vassilvitskii 2007) on the gradients that the guessed labels give in the last
  layer (Ash et al. 2020, https://arxiv.org/abs/1906.03671): uncertain rows have long gradients, unlike rows far ones.
- random: each row has the same chance.

A row with several decisions, such as a sentence with a tag for each word, has the mean of its decisions: the token
entropy, normalised by length, of Settles and Craven 2008 (https://aclanthology.org/D08-1112). A sum would prefer long
sentences, which take longer to label.
"""

import warnings

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

STRATEGIES = ("margin", "entropy", "diverse", "badge", "random")


def margins(probs: np.ndarray) -> np.ndarray:
    """Return the difference between the two highest probabilities: (decisions, options) -> (decisions,)."""
    second, first = np.partition(probs, -2, axis=-1)[..., -2:].T
    return first - second


def entropies(probs: np.ndarray) -> np.ndarray:
    """Return the entropy of each decision, 0 to 1: (decisions, options) -> (decisions,)."""
    logs = np.log(probs, out=np.zeros_like(probs), where=probs > 0)
    return -(probs * logs).sum(-1) / np.log(probs.shape[-1])


def cluster_order(features: np.ndarray, count: int, seed: int) -> list[int]:
    """Return `count` rows: of each cluster of k-means the row nearest to its centre, the largest cluster first.

    Args:
        features: a vector for each row, (rows, width); only its direction counts.
        count: number of clusters, and of rows.
        seed: seed of the first centres.
    """
    length = np.linalg.norm(features, axis=1, keepdims=True)
    features = features / np.where(length > 0, length, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than clusters: filled up below
        found = KMeans(count, n_init=1, max_iter=50, random_state=seed).fit(features)
    distance = ((features - found.cluster_centers_[found.labels_]) ** 2).sum(1)
    members = [np.flatnonzero(found.labels_ == cluster) for cluster in range(count)]
    members = sorted((rows for rows in members if len(rows)), key=lambda rows: (-len(rows), rows[0]))
    chosen = [int(rows[distance[rows].argmin()]) for rows in members]
    rest = [row for row in range(len(features)) if row not in set(chosen)]
    return (chosen + rest)[:count]


def seeding_order(left: np.ndarray, right: np.ndarray, count: int, seed: int) -> list[int]:
    """Return `count` rows by k-means++ seeding on the outer products of `left` and `right`, without computing them.

    The first row has the longest vector, as in the code of Ash et al. Each further row is drawn with a probability
    proportional to its squared distance to the nearest row drawn before. Rows at distance 0 come last, longest first.

    Args:
        left: (rows, a).
        right: (rows, b); row i stands for the vector of a times b products `left[i] x right[i]`.
        count: number of rows to draw.
        seed: seed of the draws.
    """
    generator = np.random.default_rng(seed)
    norms = (left**2).sum(1, dtype=np.float64) * (right**2).sum(1, dtype=np.float64)
    chosen: list[int] = []
    nearest = np.full(len(norms), np.inf)
    row = int(norms.argmax())
    while len(chosen) < count:
        chosen.append(row)
        products = (left @ left[row]).astype(np.float64) * (right @ right[row])
        distances = norms + norms[row] - 2 * products
        distances[distances < 1e-9 * (norms + norms[row])] = 0  # equal rows differ by rounding
        nearest = np.minimum(nearest, distances)
        nearest[chosen] = 0
        if not nearest.any():
            rest = [int(other) for other in np.argsort(-norms, kind="stable") if other not in set(chosen)]
            return (chosen + rest)[:count]
        row = int(generator.choice(len(norms), p=nearest / nearest.sum()))
    return chosen
