"""Draw pictures of results: confusion matrices, and axes for pictures of a recipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import printable


def short_name(name: str) -> str:
    """Return the name of a class as matplotlib can show it: printable, at most 28 characters, no formulas."""
    shown = printable(name, 60)
    return (shown if len(shown) <= 28 else shown[:27] + "…").replace("$", r"\$")


@contextmanager
def picture(path: Path, width: float = 6.0, height: float = 5.0) -> Iterator[Any]:
    """Yield axes to draw on, then save the picture to `path`; sizes in inches."""
    import matplotlib  # imported here: other processes save its time and memory
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    with matplotlib.rc_context({"font.size": 10}):
        yield figure.add_subplot()
    figure.savefig(path, dpi=120)


def draw_confusion(path: Path, gold: np.ndarray, decided: np.ndarray, names: list[str]) -> None:
    """Draw how many rows of each class get each class.

    Args:
        path: the picture.
        gold: gold class numbers, (rows,).
        decided: predicted class numbers, (rows,).
        names: names of the classes, from `short_name`.
    """
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (gold, decided), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(4.5, 2.5 + 0.22 * len(names))
    with picture(path, side + 1, side) as axes:
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        size = 10 if len(names) <= 20 else 7
        axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 4 else 0, fontsize=size)
        axes.set_yticks(range(len(names)), names, fontsize=size)
        axes.set_xlabel("predicted")
        axes.set_ylabel("gold")
        for i, j in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(
                j, i, counts[i, j], ha="center", va="center", fontsize=size if len(names) <= 20 else 5, color=color
            )
        axes.figure.colorbar(image, label="share of the gold class", shrink=0.8)
