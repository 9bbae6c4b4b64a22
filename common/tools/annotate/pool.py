"""Choose the rows of a pool to label next, with memory that does not grow with the pool."""

import hashlib
import heapq
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np

from common.data.source import Row
from common.tools.annotate.strategies import cluster_order, seeding_order

#: most bytes of the gradients that are kept for badge
MOST_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Guess:
    """What a model says of a row of the pool.

    Attributes:
        labels: the predicted labels, in a form of the recipe.
        margin: mean margin of the decisions (see `strategies`).
        entropy: mean entropy of the decisions.
        features: mean input of the last layer, (width,).
        gradient: two vectors whose outer product is the gradient of the loss in the weights of the last layer, if the
            guess were the label.
    """

    labels: Any
    margin: float
    entropy: float
    features: np.ndarray | None = None
    gradient: tuple[np.ndarray, np.ndarray] | None = None


class Annotator(Protocol):
    """What `recipes/NAME/annotate.py` defines as `Annotator`: a saved model that guesses labels.

    The module also defines `ARGUMENTS`, a tuple of a subclass of `AnnotateArguments`; `open_pool(args)`, which checks
    the pool and returns its rows; and `training_rows(parsed)`, which returns the valid training rows of a run.
    """

    def check_format(self, name: str) -> None:
        """Raise `InputError` if the labels of the model cannot be written in a format."""

    def labeled_texts(self, path: str, args: Any) -> Iterator[str]:
        """Yield the text of each row of a file of labelled rows."""

    def text(self, row: Row) -> str:
        """Return the text of a row, by which equal rows are found."""

    def has_label(self, row: Row) -> bool:
        """Return whether a row of the pool has a label already."""

    def guesses(self, rows: list[Row], gradients: bool) -> Iterable[Guess]:
        """Return a guess for each row, with `gradient` if asked for."""

    def written(self, row: Row, guess: Guess, name: str, more: Row) -> Row:
        """Return a row or a task with the guess as label in a format, with the values in `more`."""

    def interface(self) -> str:
        """Return the labelling interface of Label Studio."""


@dataclass(frozen=True)
class Chosen:
    """A row of the pool: its number from 0, the row, and the guess of the model."""

    number: int
    row: Row
    guess: Guess


class Seen:
    """The texts seen so far, as hashes in a temporary file: memory does not grow with the number of texts.

    Texts that differ only in white space or in the composition of their characters (NFC) are equal.
    """

    def __init__(self) -> None:
        self._table = sqlite3.connect("")  # a file without a name, which is deleted when it is closed
        self._table.execute("CREATE TABLE seen (text INTEGER PRIMARY KEY)")

    def add(self, text: str) -> bool:
        """Add a text; return whether it is new."""
        key = (digest(text) - 2**63,)  # a signed integer
        return self._table.execute("INSERT OR IGNORE INTO seen VALUES (?)", key).rowcount == 1

    def __contains__(self, text: str) -> bool:
        """Return whether a text was added."""
        key = (digest(text) - 2**63,)
        return self._table.execute("SELECT 1 FROM seen WHERE text = ?", key).fetchone() is not None


def digest(text: str, seed: int = 0) -> int:
    """Return a hash of 64 bits of a text without white space."""
    bare = "".join(unicodedata.normalize("NFC", text).split())
    key = seed.to_bytes(8, "big")
    return int.from_bytes(hashlib.blake2b(bare.encode(errors="surrogatepass"), digest_size=8, key=key).digest(), "big")


class Highest:
    """The `size` items with the highest keys; of equal keys the first ones."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._heap: list[tuple[float, int, Any]] = []
        self._count = 0

    def offer(self, key: float, item: Any) -> None:
        """Keep an item if its key is high enough."""
        self._count += 1
        entry = (key, -self._count, item)
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, entry)
        elif entry[:2] > self._heap[0][:2]:
            heapq.heapreplace(self._heap, entry)

    def items(self) -> list[Any]:
        """Return the items, highest key first."""
        return [item for _, _, item in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


@dataclass
class Selection:
    """How rows are selected.

    Attributes:
        strategy: one of `strategies.STRATEGIES`.
        count: number of rows.
        seed: seed of random draws.
        candidates: most rows among which diverse and badge choose.
        buffer_rows: rows that the model gets at a time.
        relabel: choose rows that have a label too.
        counts: number of rows read, and of rows left out by reason, after the selection.
    """

    strategy: str
    count: int
    seed: int = 0
    candidates: int = 10_000
    buffer_rows: int = 1024
    relabel: bool = False

    def __post_init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def choose(self, rows: Iterable[Row], annotator: Annotator, labeled: Seen) -> list[Chosen]:
        """Return the rows to label, the most useful one first; fewer than `count` if the pool has fewer.

        Args:
            rows: the pool.
            annotator: the model.
            labeled: texts of labelled rows, which are left out.
        """
        fresh = self._fresh(rows, annotator, labeled)
        if self.strategy in ("random", "diverse"):
            kept = list(self._guessed(self._drawn(fresh, annotator), annotator))
        else:
            kept = self._most_uncertain(fresh, annotator)
        if self.strategy == "diverse" and kept:
            features = np.stack([chosen.guess.features for chosen in kept if chosen.guess.features is not None])
            kept = [kept[i] for i in cluster_order(features, min(self.count, len(kept)), self.seed)]
        elif self.strategy == "badge" and kept:
            factors = [chosen.guess.gradient for chosen in kept if chosen.guess.gradient is not None]
            left, right = (np.stack(side) for side in zip(*factors, strict=True))
            kept = [kept[i] for i in seeding_order(left, right, min(self.count, len(kept)), self.seed)]
        return kept

    def _fresh(self, rows: Iterable[Row], annotator: Annotator, labeled: Seen) -> Iterator[tuple[int, Row]]:
        """Yield the rows that can be labelled, with their numbers; count the others."""
        seen = Seen()
        for number, row in enumerate(rows):
            self.counts["rows"] += 1
            text = annotator.text(row)
            if not self.relabel and annotator.has_label(row):
                self.counts["have a label"] += 1
            elif text in labeled:
                self.counts["equal a labelled row"] += 1
            elif not seen.add(text):
                self.counts["repeat another row"] += 1
            else:
                self.counts["fresh"] += 1
                yield number, row

    def _drawn(self, fresh: Iterable[tuple[int, Row]], annotator: Annotator) -> list[tuple[int, Row]]:
        """Draw rows at random, by the hash of their texts: their order in the file does not matter."""
        size = self.count if self.strategy == "random" else max(self.count, self.candidates)
        drawn = Highest(size)
        for number, row in fresh:
            drawn.offer(digest(annotator.text(row), self.seed), (number, row))
        self.counts["candidates"] = len(drawn.items())
        return drawn.items()

    def _guessed(self, rows: Iterable[tuple[int, Row]], annotator: Annotator) -> Iterator[Chosen]:
        """Yield the rows with the guesses of the model, without vectors that the strategy does not read."""
        remaining = iter(rows)
        while buffer := list(islice(remaining, self.buffer_rows)):
            guesses = annotator.guesses([row for _, row in buffer], self.strategy == "badge")
            for (number, row), guess in zip(buffer, guesses, strict=True):
                yield Chosen(number, row, guess if self.strategy == "diverse" else replace(guess, features=None))

    def _most_uncertain(self, fresh: Iterable[tuple[int, Row]], annotator: Annotator) -> list[Chosen]:
        """Return the most uncertain rows: `count`, or the candidates of badge."""
        kept = Highest(self.count)
        for chosen in self._guessed(fresh, annotator):
            if chosen.guess.gradient is not None:
                bytes_of_row = sum(factor.nbytes for factor in chosen.guess.gradient)
                kept.size = max(self.count, min(self.candidates, MOST_BYTES // bytes_of_row))
            key = chosen.guess.entropy if self.strategy == "entropy" else -chosen.guess.margin
            kept.offer(key, chosen)
        self.counts["candidates"] = len(kept.items())
        return kept.items()
