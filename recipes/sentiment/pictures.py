"""Plot a classifier's results: confusion matrix, ROC, precision-recall, reliability and learning curves."""

from pathlib import Path

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from common.errors import is_main_process
from common.run.pictures import draw_confusion, picture, short_name

from .scoring import BINS, decide

# a legend above the axes hides no curve
ABOVE = {"fontsize": 8, "loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3}
NAMED = 12  # maximum classes with a legend entry each; with more classes only the mean gets one


def draw(
    folder: str | Path,
    probs: np.ndarray,
    gold: np.ndarray,
    names: list[str],
    thresholds: list[float] | None,
    history: list[dict],
    metric: str,
) -> None:
    """Write the pictures to `folder/pictures`.

    Args:
        folder: the run's output folder.
        probs, gold, names, thresholds: as for `scoring.scores`.
        history: the Trainer's `log_history`.
        metric: score of the learning curve.
    """
    if not is_main_process():
        return
    folder = Path(folder, "pictures")
    folder.mkdir(exist_ok=True)
    names = [short_name(name) for name in names]
    hits = gold.astype(int) if thresholds is not None else np.eye(len(names), dtype=int)[gold]
    if thresholds is None:
        draw_confusion(folder / "confusion.png", gold, decide(probs, None), names)
    _curves(folder / "roc.png", probs, hits, names, "false positive rate", "true positive rate", _roc)
    _curves(folder / "precision_recall.png", probs, hits, names, "recall", "precision", _precision_recall)
    _reliability(folder / "reliability.png", probs, gold, hits, thresholds)
    _learning(folder / "learning.png", history, metric)


def _roc(hits: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return roc_curve(hits, probs)[:2]


def _precision_recall(hits: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    precision, recall, _ = precision_recall_curve(hits, probs)
    return recall[::-1], precision[::-1]


def _curves(path: Path, probs: np.ndarray, hits: np.ndarray, names: list[str], x: str, y: str, curve) -> None:
    both = [i for i in range(len(names)) if 0 < hits[:, i].sum() < len(hits)]
    with picture(path) as axes:
        grid = np.linspace(0, 1, 201)
        lines = []
        for i in both:
            points = curve(hits[:, i], probs[:, i])
            lines.append(np.interp(grid, *points))
            if len(both) <= NAMED:
                axes.plot(*points, label=names[i], linewidth=1.2)
            else:
                axes.plot(*points, color="grey", alpha=0.25, linewidth=0.6)
        if len(both) > 2:
            axes.plot(grid, np.mean(lines, 0), color="black", linewidth=2, label=f"mean of {len(both)} classes")
        if both:
            axes.legend(fontsize=8)
        axes.set(xlabel=x, ylabel=y, xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))


def _reliability(path: Path, probs: np.ndarray, gold: np.ndarray, hits: np.ndarray, thresholds) -> None:
    decided = decide(probs, thresholds)
    correct = decided == gold if thresholds is None else hits == decided
    confidence = probs.max(-1) if thresholds is None else np.where(decided == 1, probs, 1 - probs)
    bins = np.minimum((confidence.ravel() * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    shares = np.bincount(bins, weights=correct.ravel().astype(float), minlength=BINS) / np.maximum(counts, 1)
    with picture(path) as axes:
        middles = (np.arange(BINS) + 0.5) / BINS
        axes.bar(middles, np.where(counts, shares, np.nan), width=0.9 / BINS, label="correct")
        axes.plot([0, 1], [0, 1], "k--", linewidth=1, label="perfectly calibrated")
        for middle, count, share in zip(middles, counts, shares, strict=True):
            if count:
                axes.text(middle, min(share, 0.96) + 0.01, count, ha="center", fontsize=7)
        axes.set(
            xlabel="probability of the prediction", ylabel="share of correct predictions", xlim=(0, 1), ylim=(0, 1.05)
        )
        axes.legend(**ABOVE)


def _learning(path: Path, history: list[dict], metric: str) -> None:
    metric = f"eval_{metric.removeprefix('eval_')}"
    with picture(path) as axes:
        for key, label in (("loss", "training loss"), ("eval_loss", "validation loss")):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axes.set(xlabel="step", ylabel="loss")
        points = [(entry["step"], entry[metric]) for entry in history if metric in entry]
        right = axes.twinx()
        if points:
            right.plot(*zip(*points, strict=True), marker="s", markersize=3, color="tab:green", label=metric[5:])
        right.set_ylabel(metric[5:].replace("_", " "))
        lines = axes.get_lines() + right.get_lines()
        axes.legend(lines, [line.get_label() for line in lines], **ABOVE)
