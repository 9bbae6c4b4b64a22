"""Score recommendations on the rows of `histories`: an encoder beside popularity, neighbours and a model of item ids.

    python -m recipes.matching.recommend --histories outputs/films --model outputs/films-model
    python -m recipes.matching.recommend --histories outputs/films --model outputs/films-model --output best.jsonl

Each test row ranks all items that the user has not rated before; none is sampled. A cold row has an item that nobody
liked in the time of training. `--output` gets the best new items of each user.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.sparse import csr_matrix

from common.args import DEFAULT_ENCODER, SpeedArguments
from common.cli import command_line, parse
from common.data import read_file
from common.data.files import check_output, fresh_file
from common.data.source import Row
from common.errors import InputError, tell
from common.run import print_table

from . import item_ids
from .encoder import Embedder
from .histories import FILES, seen_in_training
from .scoring import INSIDE, RESAMPLES

#: scores of a row, and rows that are scored at a time
SCORES, TOGETHER = ("hit@10", "ndcg@10"), 256
#: random validation rows that stop the model of item ids
VALIDATED = 1000


@dataclass
class RecommendArguments(SpeedArguments):
    histories: str = field(default="", metadata={"help": "folder that recipes.matching.histories wrote"})
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder of an encoder that train saved, or a hub id"},
    )
    frozen: str | None = field(
        default=DEFAULT_ENCODER, metadata={"help": "encoder before training, to compare with; none: leave it out"}
    )
    temperature: float = field(
        default=0.05,
        metadata={"help": "temperature of the training; cosines are divided by it before popularity is added"},
    )
    popularity: float = field(
        default=1.0, metadata={"help": "weight of popularity; lower: more items that few users liked"}
    )
    id_model: bool = field(default=True, metadata={"help": "also train a model of item ids (SASRec), to compare with"})
    seed: int = field(default=42, metadata={"help": "seed of the model of item ids"})
    max_predict_samples: int | None = field(default=None, metadata={"help": "score only N random test rows"})
    output: str | None = field(default=None, metadata={"help": "JSON Lines file for the best new items of each user"})
    top_k: int = field(default=10, metadata={"help": "items of a user in --output"})
    overwrite: bool = field(default=False, metadata={"help": "replace an existing output file"})
    batch_tokens: int = field(default=4096, metadata={"help": "tokens in a batch, padding included"})
    precision: Literal["auto", "bf16", "fp32"] = field(
        default="auto", metadata={"help": "auto: bf16 if the hardware computes it natively, else fp32"}
    )

    def __post_init__(self) -> None:
        for name in FILES.values():
            if not Path(self.histories, name).is_file():
                raise InputError(
                    f"--histories {self.histories}: has no {name}; write it with recipes.matching.histories"
                )
        if self.frozen == "none":
            self.frozen = None
        if not self.temperature > 0 or not self.popularity >= 0:
            raise InputError("--temperature and --popularity: must be above 0, and at least 0")
        for name in ("top_k", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.output is not None:
            check_output(self.output, self.overwrite)


ARGUMENTS = (RecommendArguments,)


@dataclass(frozen=True)
class Case:
    """A row to rank: the numbers of the item, and of the items that the user rated and liked before, oldest first."""

    user: str
    query: str
    item: int
    rated: list[int]
    liked: list[int]


#: returns the score of each item for cases, (cases, items)
Recommender = Callable[[Sequence[Case]], np.ndarray]


class Log:
    """The ratings in a folder of `histories`.

    Attributes:
        ids: id of each item.
        texts: text of each item.
        known: numbers of the items that a user liked in the time of training.
        train: items that each user liked in that time, oldest first.
    """

    def __init__(self, folder: str):
        self.folder = folder
        corpus, ratings = self.read("corpus"), self.read("ratings")
        self.ids, self.texts = [row["id"] for row in corpus], [row["text"] for row in corpus]
        self.number = {name: i for i, name in enumerate(self.ids)}
        self.known = sorted(self.number[name] for name in seen_in_training(ratings))
        self.of_user: dict[str, list[tuple[int, int, bool]]] = defaultdict(list)  # place, item, liked
        train: dict[str, list[int]] = defaultdict(list)
        for place, row in enumerate(ratings):
            item = self.number[row["item"]]
            self.of_user[row["user"]].append((place, item, row["liked"]))
            if row["liked"] and row["split"] == "train":
                train[row["user"]].append(item)
        self.train = list(train.values())

    def read(self, name: str) -> list[Row]:
        """Return the rows of a file."""
        path = Path(self.folder, FILES[name])
        found = []
        for where, row in read_file(path):
            if isinstance(row, str):
                raise InputError(f"{where}: {row}")
            found.append(row)
        return found

    def cases(self, split: str, most: int | None = None) -> list[Case]:
        """Return the rows of a split, or `most` random ones, the same in each call."""
        rows = self.read(split)
        drawn = np.sort(np.random.default_rng(0).permutation(len(rows))[:most])
        return [self.case(r["user"], r["query"], self.number[r["item"]], r["place"]) for r in (rows[i] for i in drawn)]

    def case(self, user: str, query: str, item: int, place: int) -> Case:
        """Return a case after the ratings before `place`."""
        before = [(i, liked) for at, i, liked in self.of_user[user] if at < place]
        return Case(user, query, item, [i for i, _ in before], [i for i, liked in before if liked])


# Recommenders


def popularity(log: Log) -> Recommender:
    """Score an item by the number of users who liked it in the time of training."""
    counts = np.bincount([item for items in log.train for item in items], minlength=len(log.ids))
    return lambda cases: np.tile(counts.astype(np.float32), (len(cases), 1))


def neighbours(log: Log) -> Recommender:
    """Score an item by the cosine of its users with those of the last liked item; equal cosines by popularity."""
    users = np.repeat(np.arange(len(log.train)), [len(items) for items in log.train])
    items = np.concatenate(log.train)
    shape = (len(log.train), len(log.ids))
    liked = csr_matrix((np.ones(len(items), dtype=np.float32), (users, items)), shape=shape)
    counts = np.asarray(liked.sum(0)).ravel()
    scaled = (liked.multiply(1 / np.sqrt(np.maximum(counts, 1)))).tocsr().astype(np.float32)

    def score(cases: Sequence[Case]) -> np.ndarray:
        last = scaled[:, [case.liked[-1] for case in cases]]
        return np.asarray((last.T @ scaled).todense()) + 1e-7 * counts

    return score


def by_ids(log: Log, width: int, seed: int) -> Recommender:
    """Train `item_ids` on the histories; items that training lacks have no score."""
    number = np.zeros(len(log.ids), dtype=np.int64)  # 0: unknown
    number[log.known] = np.arange(1, len(log.known) + 1)

    def known(items: Sequence[int]) -> list[int]:
        return [int(i) for i in number[list(items)] if i]

    def scores_by(model: item_ids.ItemModel) -> Recommender:
        def score(cases: Sequence[Case]) -> np.ndarray:
            found = np.full((len(cases), len(log.ids)), -np.inf, dtype=np.float32)
            found[:, log.known] = item_ids.scores(model, [known(case.liked) for case in cases])[:, 1:]
            return found

        return score

    held_out = log.cases("validation", VALIDATED)
    model = item_ids.train(
        [known(items) for items in log.train], len(log.known), width, seed,
        lambda trained: float(scores_of(ranks(scores_by(trained), held_out))[:, 1].mean()),
    )  # fmt: skip
    return scores_by(model)


def by_texts(log: Log, embedder: Embedder) -> Recommender:
    """Score an item by the cosine of its text with that of the history."""
    items = embedder.passages(log.texts)
    known: dict[str, np.ndarray] = {}

    def score(cases: Sequence[Case]) -> np.ndarray:
        new = list(dict.fromkeys(case.query for case in cases if case.query not in known))
        if new:
            known.update(zip(new, embedder.queries(new), strict=True))
        return np.stack([known[case.query] for case in cases]) @ items.T

    return score


def with_popularity(recommender: Recommender, log: Log, temperature: float, weight: float = 1.0) -> Recommender:
    """Add `weight` times the logarithm of the likes in the time of training to cosines divided by `temperature`.

    Training against the other passages of a batch meets popular items often as negatives, and so learns log p(item |
    history) - log p(item) (Yi et al. 2019, https://doi.org/10.1145/3298689.3346996); this adds log p(item) again.
    """
    likes = popularity(log)
    return lambda cases: recommender(cases) / temperature + weight * np.log1p(likes(cases))


def both(log: Log, name: str, embedder: Embedder, args: RecommendArguments) -> dict[str, Recommender]:
    """Return the recommenders of an encoder: with popularity, and by its texts alone."""
    alone = by_texts(log, embedder)
    return {f"{name}, with popularity": with_popularity(alone, log, args.temperature, args.popularity), name: alone}


# Scores


def ranks(recommender: Recommender, cases: Sequence[Case]) -> np.ndarray:
    """Return the rank of the item of each case among the items that its user has not rated; ties count against it."""
    found = []
    for begin in range(0, len(cases), TOGETHER):
        some = cases[begin : begin + TOGETHER]
        for case, scores in zip(some, recommender(some), strict=True):
            wanted = scores[case.item]
            others = np.ones(len(scores), dtype=bool)
            others[[*case.rated, case.item]] = False
            found.append(1 + int((scores[others] >= wanted).sum()))
    return np.array(found)


def scores_of(rank: np.ndarray) -> np.ndarray:
    """Return `SCORES` of each rank, (rows, scores)."""
    hits = rank <= 10
    return np.stack([hits, hits / np.log2(rank + 1)], axis=1).astype(float)


def user_interval(values: np.ndarray, users: Sequence[str]) -> tuple[float, float]:
    """Return the interval of a mean over rows by a bootstrap over the users, whose rows stay together."""
    _, codes = np.unique(list(users), return_inverse=True)
    sums, counts = np.bincount(codes, weights=values), np.bincount(codes)
    drawn = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [(1 - INSIDE) / 2, (1 + INSIDE) / 2])
    return float(low), float(high)


def compare(log: Log, recommenders: dict[str, Recommender], most: int | None = None) -> dict[str, float]:
    """Print the scores of recommenders, the first of which is compared to the others; return them.

    Args:
        log: the ratings.
        recommenders: by name.
        most: number of random test rows; None for all.
    """
    cases, known = log.cases("test", most), set(log.known)
    cold = np.array([case.item not in known for case in cases])
    parts = {"all": np.ones(len(cases), dtype=bool), "known": ~cold, "cold": cold}
    users = [case.user for case in cases]
    each = {name: scores_of(ranks(recommender, cases)) for name, recommender in recommenders.items()}
    results, lines, first = {}, [], next(iter(each.values()))[:, 1]
    for name, values in each.items():
        means = {
            part: values[rows].mean(0).tolist() if rows.any() else [float("nan")] * 2 for part, rows in parts.items()
        }
        results |= {f"{name}_{part}_{s}": m for part, of in means.items() for s, m in zip(SCORES, of, strict=True)}
        low, high = user_interval(values[:, 1], users)
        less, more = user_interval(first - values[:, 1], users)
        difference = f"{less:+.4f} to {more:+.4f}" if lines else ""
        lines.append([name, *means["all"], f"{low:.4f} to {high:.4f}", difference, *means["known"], *means["cold"]])
    tell(f"\ntest: {len(cases):,} rows of {len(set(users)):,} users, {len(log.ids):,} items; cold: {cold.sum():,} rows")
    span = f"ndcg@10, {INSIDE:.0%} over users"
    print_table(["", *SCORES, span, "first minus this", *(f"{part} {s}" for part in ("known", "cold") for s in SCORES)],
                lines)  # fmt: skip
    return results


def best_items(log: Log, recommender: Recommender, top_k: int) -> list[Row]:
    """Return the best items of each user that the user has not rated."""
    rows = []
    cases = [log.case(row["user"], row["query"], 0, len(log.ids) + 10**12) for row in log.read("users")]
    for begin in range(0, len(cases), TOGETHER):
        some = cases[begin : begin + TOGETHER]
        for case, scores in zip(some, recommender(some), strict=True):
            scores = scores.copy()
            scores[case.rated] = -np.inf
            found = [
                {"id": log.ids[i], "text": log.texts[i], "score": round(float(scores[i]), 4)}
                for i in np.argsort(-scores, kind="stable")[:top_k]
                if np.isfinite(scores[i])
            ]
            rows.append({"user": case.user, "query": case.query, "found": found})
    return rows


def main(argv: list[str] | None = None) -> dict[str, float]:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    log = Log(args.histories)
    settings = {"batch_tokens": args.batch_tokens, "precision": args.precision, "speed": args.speed}
    embedder = Embedder(args.model, **settings)
    recommenders = both(log, "this model", embedder, args)
    best = next(iter(recommenders.values()))
    if args.frozen:
        recommenders |= both(log, "before training", Embedder(args.frozen, **settings), args)
    recommenders |= {"popularity": popularity(log), "last item's neighbours": neighbours(log)}
    if args.id_model:
        recommenders["item ids (SASRec)"] = by_ids(log, embedder.width, args.seed)
    results = compare(log, recommenders, args.max_predict_samples)
    if args.output:
        with fresh_file(args.output, args.overwrite) as file:
            for row in best_items(log, best, args.top_k):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return results


if __name__ == "__main__":
    command_line(main)
