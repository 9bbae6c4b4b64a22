"""Weights of the tasks in the loss of a step: fixed, or learned during training.

The state of a weighting is plain numbers, which a checkpoint keeps exactly. Losses and norms are those of whole steps,
equal on all processes, so accumulation and processes change no weight.
"""

import numpy as np

from .arguments import SharingArguments

#: parameters of Adam
BETAS, EPSILON = (0.9, 0.999), 1e-8
#: least loss, in nats, by which another one is divided: a head that starts at a probe may have none
LEAST_LOSS = 0.01
#: least weight of gradnorm, before the weights are scaled to their sum; least share of the mean norm in equal_norms
LEAST = 0.01


class Weighting:
    """Weights that do not change: `share` times the number of tasks under `sampling`, 1 under `sum`.

    Args:
        tasks: number of tasks.
        args: name and settings of the weighting.
        window: steps of a window of `dwa`.
    """

    def __init__(self, tasks: int, args: SharingArguments, window: int = 1):
        self.tasks, self.args, self.window = tasks, args, window

    def weights(self, share: np.ndarray) -> np.ndarray:
        """Return the weight of each task in the present step; `share` is its share of the rows."""
        by_share = self.args.weighting == "sampling" and self.args.batches == "mixed"
        return share * self.tasks if by_share else np.ones(self.tasks)

    def update(self, losses: np.ndarray, norms: np.ndarray) -> None:
        """Learn from a step.

        Args:
            losses: mean loss of each task, NaN for a task without rows in the step.
            norms: norm of the gradient of each loss without weight, in the last shared layer (`gradnorm`) or in all
                shared weights (`equal_norms`).
        """

    def state(self) -> dict[str, list]:
        """Return what a checkpoint keeps."""
        return {name: np.asarray(value).tolist() for name, value in vars(self).items() if name in self.KEPT}

    def load(self, state: dict[str, list]) -> None:
        """Go on from a state."""
        for name, value in state.items():
            setattr(self, name, np.array(value))

    KEPT: tuple[str, ...] = ()


class Learned(Weighting):
    """Weights that Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1) trains."""

    KEPT = ("values", "means", "squares", "counts")
    start = 0.0

    def __init__(self, tasks: int, args: SharingArguments, window: int = 1):
        super().__init__(tasks, args, window)
        self.values = np.full(tasks, self.start)
        self.means, self.squares, self.counts = np.zeros(tasks), np.zeros(tasks), np.zeros(tasks)

    def descend(self, gradients: np.ndarray) -> None:
        """Take a step against `gradients`; a task with NaN keeps its value."""
        seen = np.isfinite(gradients)
        gradient = np.where(seen, gradients, 0)
        counts = self.counts + seen
        means = BETAS[0] * self.means + (1 - BETAS[0]) * gradient
        squares = BETAS[1] * self.squares + (1 - BETAS[1]) * gradient**2
        times = np.maximum(counts, 1)
        step = (means / (1 - BETAS[0] ** times)) / (np.sqrt(squares / (1 - BETAS[1] ** times)) + EPSILON)
        self.values = np.where(seen, self.values - self.args.weighting_learning_rate * step, self.values)
        self.means, self.squares = np.where(seen, means, self.means), np.where(seen, squares, self.squares)
        self.counts = counts


class Uncertainty(Learned):
    """Weigh a task by its uncertainty (Kendall et al. 2018, https://arxiv.org/abs/1705.07115).

    The loss of a step is the sum of exp(-s) L + s / 2 over the tasks, with s = log sigma^2 learned (section 3.2, for
    cross-entropies).
    """

    def weights(self, share: np.ndarray) -> np.ndarray:
        """Return exp(-s)."""
        return np.exp(-self.values)

    def update(self, losses: np.ndarray, norms: np.ndarray) -> None:
        """Take a step against the gradient of the loss by s."""
        self.descend(0.5 - np.exp(-self.values) * losses)


class Averaging(Weighting):
    """Dynamic weight averaging: weigh a task by how slowly its loss falls (Liu et al. 2019, arXiv:1803.10704).

    With the mean loss L(t) of window t, the weight is K exp(r / T) / sum(exp(r / T)), r = L(t - 1) / L(t - 2), for K
    tasks and temperature T (equation 7). A window is an epoch, or a twentieth of the run if that is shorter.
    """

    KEPT = ("sums", "counts", "means", "steps")

    def __init__(self, tasks: int, args: SharingArguments, window: int = 1):
        super().__init__(tasks, args, window)
        self.sums, self.counts = np.zeros(tasks), np.zeros(tasks)
        self.means = np.full((2, tasks), np.nan)
        self.steps = np.array(0)

    def weights(self, share: np.ndarray) -> np.ndarray:
        """Return 1 in the first two windows, and then the weights of the equation."""
        means = np.maximum(self.means, LEAST_LOSS)
        rates = np.where(np.isfinite(means).all(0), means[1] / means[0], 1.0)
        scores = np.exp((rates - rates.max()) / self.args.dwa_temperature)
        return self.tasks * scores / scores.sum()

    def update(self, losses: np.ndarray, norms: np.ndarray) -> None:
        """Add the losses to the present window, and close it if it is full."""
        self.sums, self.counts = self.sums + np.nan_to_num(losses), self.counts + np.isfinite(losses)
        self.steps = self.steps + 1
        if self.steps % self.window == 0:
            last = np.where(self.counts > 0, self.sums / np.maximum(self.counts, 1), self.means[1])
            self.means = np.stack([self.means[1], last])
            self.sums, self.counts = np.zeros(self.tasks), np.zeros(self.tasks)

    def state(self) -> dict[str, list]:
        """Return what a checkpoint keeps; JSON has no NaN."""
        kept = super().state()
        return kept | {"means": [[None if np.isnan(x) else x for x in row] for row in self.means.tolist()]}

    def load(self, state: dict[str, list]) -> None:
        """Go on from a state."""
        super().load(state)
        self.means = self.means.astype(float)


class GradNorm(Learned):
    """Balance the norms of the gradients (Chen et al. 2018, https://arxiv.org/abs/1711.02257, algorithm 1).

    With the norm G = w |gradient of L| in the last shared layer, and the rate r = (L / L of the first step) over its
    mean, the weights w descend the sum of |G - mean(G) r^alpha|, whose second part is constant. Their sum is the number
    of tasks.
    """

    KEPT = (*Learned.KEPT, "first")
    start = 1.0

    def __init__(self, tasks: int, args: SharingArguments, window: int = 1):
        super().__init__(tasks, args, window)
        self.first = np.zeros(0)

    def weights(self, share: np.ndarray) -> np.ndarray:
        """Return w."""
        return self.values

    def update(self, losses: np.ndarray, norms: np.ndarray) -> None:
        """Take a step, and scale the weights to their sum."""
        if not len(self.first):
            self.first = np.maximum(losses, LEAST_LOSS)
        rates = losses / self.first
        weighted = self.values * norms
        target = weighted.mean() * (rates / max(rates.mean(), EPSILON)) ** self.args.gradnorm_alpha
        self.descend(np.sign(weighted - target) * norms)
        self.values = np.maximum(self.values, LEAST)
        self.values = self.values * self.tasks / self.values.sum()


class EqualNorms(Weighting):
    """Give the gradients of all tasks the same norm in the shared weights, on average over the run so far.

    This is the balance that gradnorm with alpha 0 learns slowly; Malkiel and Wolf (2021,
    https://arxiv.org/abs/2006.14683) set it layer by layer. The sum of the norms stays what it is with weights of 1,
    which the first step has.
    """

    KEPT = ("sums", "counts")

    def __init__(self, tasks: int, args: SharingArguments, window: int = 1):
        super().__init__(tasks, args, window)
        self.sums, self.counts = np.zeros(tasks), np.zeros(tasks)

    def weights(self, share: np.ndarray) -> np.ndarray:
        """Return the mean norm divided by that of each task; at most 1 / `LEAST`, and 1 without gradient."""
        known = self.counts > 0
        if not known.any():
            return np.ones(self.tasks)
        norms = self.sums / np.maximum(self.counts, 1)
        mean = norms[known].mean()
        return np.where(known, mean / np.maximum(norms, LEAST * mean), 1.0)

    def update(self, losses: np.ndarray, norms: np.ndarray) -> None:
        """Add the norms of a step."""
        self.sums, self.counts = self.sums + norms, self.counts + (norms > 0)


def without_conflicts(gram: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the weights by which PCGrad sums the gradients (Yu et al. 2020, arXiv:2001.06782, algorithm 1).

    The gradient of a task that points against that of another one (in random order) loses its part along the other.

    Args:
        gram: inner products of the gradients of the tasks, (tasks, tasks).
        random: draws the orders.
    """
    tasks = len(gram)
    total = np.zeros(tasks)
    for i in range(tasks):
        weights = np.eye(tasks)[i]
        for j in random.permutation(tasks):
            product = gram[j] @ weights
            if j != i and product < 0:
                weights[j] -= product / gram[j, j]
        total += weights
    return total


KINDS: dict[str, type[Weighting]] = {
    "uncertainty": Uncertainty,
    "dwa": Averaging,
    "gradnorm": GradNorm,
    "equal_norms": EqualNorms,
}


def weighting_of(tasks: int, args: SharingArguments, window: int) -> Weighting:
    """Return the weighting that `args` names."""
    return KINDS.get(args.weighting, Weighting)(tasks, args, window)
