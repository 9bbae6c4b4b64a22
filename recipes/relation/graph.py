"""Draw triples as a graph: mentions are nodes, relations are arrows."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from common.data.source import Row
from common.run.pictures import picture, short_name

#: most arrows of a picture
MOST = 60
#: room around each part of the graph for names, in lengths of an arrow
MARGIN = np.array([0.9, 0.5])
#: inches of an arrow, and the largest side of a picture
ARROW, LARGEST = 1.2, 30
Triple = tuple[str, str, str]


class Graph:
    """The most probable triples, each with its highest probability. Memory does not grow with the triples."""

    def __init__(self) -> None:
        self.triples: dict[Triple, float] = {}
        self.seen = 0

    def add(self, triples: Iterable[Row]) -> None:
        """Add the triples of a text; see `predict`."""
        for row in triples:
            self.seen += 1
            key = row["head"]["text"], row["relation"], row["tail"]["text"]
            self.triples[key] = max(row["probability"], self.triples.get(key, 0.0))
        if len(self.triples) > 10 * MOST:
            self.triples = dict(self._best())

    def _best(self) -> list[tuple[Triple, float]]:
        return sorted(self.triples.items(), key=lambda item: (-item[1], item[0]))[:MOST]

    def draw(self, path: str) -> int:
        """Write the picture; return the number of triples in it."""
        best = self._best()
        nodes = sorted({name for (head, _, tail), _ in best for name in (head, tail)})
        number = {name: i for i, name in enumerate(nodes)}
        edges = [(number[head], number[tail]) for (head, _, tail), _ in best]
        places = layout(len(nodes), edges)
        width, height = np.clip(ARROW * (np.ptp(places, axis=0) + 2 * MARGIN) if nodes else (3, 2), 2, LARGEST)
        with picture(Path(path), width, height) as axes:
            axes.set_axis_off()
            axes.scatter(*places.T, s=40, color="tab:blue", zorder=2)
            for (low, high), margin, limit in zip(_ends(places), MARGIN, (axes.set_xlim, axes.set_ylim), strict=True):
                limit(low - margin, high + margin)
            for ((_, relation, _), probability), (a, b) in zip(best, edges, strict=True):
                style = {
                    "arrowstyle": "-|>",
                    "color": "grey",
                    "shrinkA": 5,
                    "shrinkB": 5,
                    "alpha": 0.3 + 0.7 * probability,
                }
                style["connectionstyle"] = f"arc3,rad={0.2 if (b, a) in edges else 0}"
                axes.annotate("", places[b], places[a], arrowprops=style)
                middle = (2 * places[a] + 3 * places[b]) / 5  # nearer to the tail: two arrows of a pair have two labels
                axes.text(*middle, short_name(relation), fontsize=7, color="tab:red", ha="center", va="center")
            for name, place in zip(nodes, places, strict=True):
                style = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
                axes.annotate(short_name(name), place, (0, 6), **style)
        return len(best)


def _ends(places: np.ndarray) -> np.ndarray:
    """Return the lowest and the highest place in each direction, (2, 2)."""
    return np.stack([places.min(0), places.max(0)], 1) if len(places) else np.zeros((2, 2))


def layout(nodes: int, edges: list[tuple[int, int]]) -> np.ndarray:
    """Return a place for each node, (nodes, 2), in lengths of an arrow; the connected parts stand in rows.

    The result is always the same for the same graph.
    """
    if not nodes:
        return np.zeros((0, 2))
    links = np.array(edges).reshape(-1, 2)
    count, part = connected_components(coo_array((np.ones(len(links)), links.T), (nodes, nodes)), directed=False)
    parts = []
    for i in range(count):
        inside = np.flatnonzero(part == i)
        number = {node: k for k, node in enumerate(inside.tolist())}
        parts.append((inside, spread(len(inside), [(number[a], number[b]) for a, b in edges if a in number])))
    parts.sort(key=lambda item: -np.ptp(item[1], axis=0)[1])  # the highest first
    sizes = [np.ptp(places, axis=0) + 2 * MARGIN for _, places in parts]
    widest = max(1.3 * np.sqrt(sum(width * height for width, height in sizes)), max(width for width, _ in sizes))
    result, corner, highest = np.zeros((nodes, 2)), np.zeros(2), 0.0
    for (inside, places), size in zip(parts, sizes, strict=True):
        if corner[0] + size[0] > widest:
            corner, highest = np.array([0.0, corner[1] - highest]), 0.0
        result[inside] = places - [places[:, 0].min(), places[:, 1].max()] + corner + MARGIN * [1, -1]
        corner, highest = corner + np.array([size[0], 0.0]), max(highest, size[1])
    return result


def spread(nodes: int, edges: list[tuple[int, int]], rounds: int = 200) -> np.ndarray:
    """Return a place for each node of a connected graph, (nodes, 2); linked nodes are near, others apart.

    Forces of Fruchterman and Reingold 1991, Graph Drawing by Force-directed Placement, with an ideal distance of 1.
    """
    angles = 2 * np.pi * np.arange(nodes) / nodes
    places = np.stack([np.cos(angles), np.sin(angles)], 1) + np.random.default_rng(0).normal(0, 0.05, (nodes, 2))
    linked = np.zeros((nodes, nodes))
    for a, b in edges:
        linked[a, b] = linked[b, a] = a != b
    for step in range(rounds):
        apart = places[:, None] - places[None]
        distance = np.maximum(np.linalg.norm(apart, axis=-1), 1e-3)
        move = (apart * (1 / distance**2 - linked * distance)[..., None]).sum(1)
        length = np.maximum(np.linalg.norm(move, axis=1, keepdims=True), 1e-9)
        places = places + move / length * np.minimum(length, 0.3 * (1 - step / rounds))
    return places
