"""Score rankings of passages and similarities of pairs, beside BM25 and the encoder before training."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import torch
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score

from common.args import TrainingArguments
from common.data.source import Row
from common.data.words import words
from common.errors import tell
from common.run import bootstrap_p, print_table
from common.run.report import rows_named

from .losses import in_batch_losses
from .pairs import Identities
from .reading import Corpus
from .vectors import Reading

#: passages ranked for a query
DEPTH = 100
#: scores of a query, in the order of the columns of `Ranking.each`
RANKED = ("mrr@10", "ndcg@10", "recall@1", "recall@10", "recall@100", "map@100")
#: kind of rows -> score that selects the best checkpoint
MAIN = {"ranking": "ndcg@10", "score": "spearman", "label": "average_precision", "translation": "accuracy"}
#: resamples of the bootstrap, and the share of them in the interval
RESAMPLES, INSIDE = 1000, 0.95
#: queries whose similarities with all passages are in memory at a time
TOGETHER = 256


@dataclass
class Ranking:
    """The passages found for each query, best first.

    Attributes:
        found: numbers of passages in the corpus, (queries, depth); -1 after the last one.
        scores: their scores.
    """

    found: np.ndarray
    scores: np.ndarray

    def each(self, relevant: list[set[int]]) -> np.ndarray:
        """Return the scores `RANKED` of each query, (queries, scores).

        They are those of `InformationRetrievalEvaluator` of sentence-transformers: every relevant passage has the
        gain 1.

        Args:
            relevant: numbers of the relevant passages of each query.
        """
        hits = np.array([[int(i) in r for i in row] for row, r in zip(self.found, relevant, strict=True)], dtype=float)
        ranks, sizes = np.arange(1, hits.shape[1] + 1), np.array([len(r) for r in relevant])
        gains = 1 / np.log2(ranks + 1)
        best = np.array([(1 / np.log2(np.arange(2, min(size, 10) + 2))).sum() for size in sizes])
        reciprocal = (hits / ranks)[:, :10].max(1)
        precision = hits * hits.cumsum(1) / ranks
        columns = [reciprocal, (hits * gains)[:, :10].sum(1) / best]
        columns += [hits[:, :k].sum(1) / sizes for k in (1, 10, 100)]
        columns.append(precision[:, :DEPTH].sum(1) / np.minimum(sizes, DEPTH))
        return np.stack(columns, axis=1)


def rank(queries: np.ndarray, passages: np.ndarray, depth: int = DEPTH) -> Ranking:
    """Rank passages by the dot product with each query; the memory does not grow with the number of queries.

    Args:
        queries: (queries, width).
        passages: (passages, width).
        depth: passages of a query.
    """
    every = torch.from_numpy(passages).T
    depth = min(depth, len(passages))
    parts = [(torch.from_numpy(part) @ every).topk(depth) for part in np.array_split(queries, _parts(len(queries)))]
    return Ranking(
        np.concatenate([p.indices.numpy() for p in parts]), np.concatenate([p.values.numpy() for p in parts])
    )


def _parts(rows: int) -> int:
    return max(1, -(-rows // TOGETHER))


def rank_by_words(queries: list[str], passages: list[str], depth: int = DEPTH) -> Ranking:
    """Rank passages by BM25 (Robertson and Zaragoza 2009) of `bm25s`, with k1 = 1.5 and b = 0.75.

    Passages of equal score are in the order of their texts, so that a ranking does not depend on the order of the
    corpus. trec_eval orders them by their ids, which may be the numbers of rows here.
    """
    depth = min(depth, len(passages))
    ranking = Ranking(np.full((len(queries), depth), -1), np.zeros((len(queries), depth), dtype=np.float32))
    by_text = np.array(sorted(range(len(passages)), key=passages.__getitem__))
    of_passages = [words(passages[i].lower()) for i in by_text]
    if not any(of_passages):
        return ranking
    index = bm25s.BM25()
    index.index(of_passages, show_progress=False)
    for row, query in enumerate(queries):
        scores = index.get_scores_from_ids(index.get_tokens_ids(words(query.lower())))
        least = np.partition(scores, -depth)[-depth]
        found = np.flatnonzero((scores >= least) & (scores > 0))
        best = found[np.argsort(-scores[found], kind="stable")][:depth]
        ranking.found[row, : len(best)], ranking.scores[row, : len(best)] = by_text[best], scores[best]
    return ranking


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the interval of a mean by the percentiles of a bootstrap over its rows (Efron and Tibshirani 1993)."""
    random = np.random.default_rng(0)
    means = [values[random.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - INSIDE) / 2, (1 + INSIDE) / 2])
    return float(low), float(high)


class Search:
    """The queries of a split, the passages of the corpus, and which passages are relevant.

    Attributes:
        queries: the distinct queries, in the order of the rows.
        relevant: numbers of the relevant passages of each query.
        texts: rows of one text each, for the trainer to encode: first the queries, then the passages.
        labels: the number of each row.
        names: names of the scores.
    """

    names = RANKED

    def __init__(self, rows: Dataset, corpus: Corpus, reading: Reading, temperature: float, together: int):
        """Prepare a split.

        Args:
            rows: rows of queries.
            corpus: the passages; the positives of the rows are among them.
            reading: has the prefixes of queries and passages.
            temperature: see `in_batch_losses`.
            together: rows in a batch of the loss.
        """
        self.rows, self.corpus, self.temperature, self.together = rows, corpus, temperature, together
        asked, positives = rows["query"][:], rows["positive"][:]
        numbers = {text: i for i, text in enumerate(corpus.texts)}
        answers: dict[str, set[int]] = {}
        for query, positive in zip(asked, positives, strict=True):
            answers.setdefault(query, set()).add(numbers[positive])
        self.queries, self.relevant = list(answers), list(answers.values())
        self.texts = [[reading.query_prefix + text] for text in self.queries]
        self.texts += [[reading.passage_prefix + text] for text in corpus.texts]
        self.labels = range(len(self.texts))
        self.number = {query: i for i, query in enumerate(self.queries)}
        # places in `texts` of the query and the positive of each row, (rows, 2)
        first = len(self.queries)
        pairs = zip(asked, positives, strict=True)
        self.places = np.array([(self.number[query], first + numbers[positive]) for query, positive in pairs])
        self.identities = Identities(asked, positives, [[]] * len(asked))

    def __call__(self, predictions: list[np.ndarray], gold: object = None) -> dict[str, float]:
        """Return the mean of each score over the queries, and the loss, from the vectors of `texts`."""
        means = self.ranking(predictions).each(self.relevant).mean(0)
        return {"loss": self.loss(np.stack(predictions))} | dict(zip(RANKED, means.tolist(), strict=True))

    def ranking(self, predictions: list[np.ndarray]) -> Ranking:
        """Rank the passages for each query by the vectors of `texts`."""
        vectors = np.stack(predictions)
        return rank(vectors[: len(self.queries)], vectors[len(self.queries) :])

    def loss(self, vectors: np.ndarray) -> float:
        """Return the mean loss of the rows, in batches in their order."""
        losses = []
        for rows in np.array_split(np.arange(len(self.places)), max(1, len(self.places) // self.together)):
            texts = torch.from_numpy(vectors[self.places[rows].T.ravel()])
            losses.append(in_batch_losses(texts, torch.from_numpy(rows), 0.0, self.identities, self.temperature))
        return float(torch.cat(losses).mean())

    def beside(self, predictions: list[np.ndarray], before: list[np.ndarray]) -> dict[str, float]:
        """Return the interval of nDCG, and the scores of the encoder before training and of BM25, with p-values."""
        rivals = {"frozen": self.ranking(before), "bm25": rank_by_words(self.queries, self.corpus.texts)}
        at = RANKED.index("ndcg@10")
        ours = self.ranking(predictions).each(self.relevant)[:, at]
        low, high = interval(ours)
        results = {"ndcg@10_low": low, "ndcg@10_high": high}
        for name, ranking in rivals.items():
            theirs = ranking.each(self.relevant)
            results |= {f"{name}_{score}": float(theirs[:, i].mean()) for i, score in enumerate(RANKED)}
            results[f"{name}_ndcg@10_p"] = bootstrap_p(theirs[:, at], ours)
        return results

    def report(self, predictions: list[np.ndarray], best: int = 5) -> Iterator[Row]:
        """Yield the rows with the `best` passages, their scores, and the rank of the first relevant passage.

        The rank is null if it exceeds `DEPTH`.
        """
        ranking = self.ranking(predictions)
        each = ranking.each(self.relevant)
        for row in self.rows:
            number = self.number[row["query"]]
            relevant = self.relevant[number]
            found = list(zip(ranking.found[number].tolist(), ranking.scores[number].tolist(), strict=True))
            hits = [place for place, (passage, _) in enumerate(found, 1) if passage in relevant]
            passages = [
                {"id": self.corpus.ids[i], "text": self.corpus.texts[i], "score": round(score, 4)}
                for i, score in found[:best]
            ]
            asked = {name: row[name] for name in ("id", "query", "positive")}
            scores = {name: float(each[number, RANKED.index(name)]) for name in ("mrr@10", "ndcg@10")}
            yield asked | {"rank": hits[0] if hits else None, **scores, "found": passages}

    def show(self, metrics: dict[str, float], split: str) -> None:
        """Print the scores of a split beside its rivals."""
        tell(f"\n{rows_named(split)}: {len(self.queries):,} queries over {len(self.corpus.texts):,} passages")
        rivals = {"this model": "", "before training": "frozen_", "BM25": "bm25_"}
        rows: list[list[Any]] = [
            [name, *(metrics[f"{split}_{prefix}{score}"] for score in RANKED)]
            for name, prefix in rivals.items()
            if f"{split}_{prefix}{RANKED[0]}" in metrics
        ]
        print_table(["", *RANKED], rows)
        if f"{split}_ndcg@10_low" in metrics:
            low, high, p = (metrics[f"{split}_{name}"] for name in ("ndcg@10_low", "ndcg@10_high", "frozen_ndcg@10_p"))
            tell(f"ndcg@10: {INSIDE:.0%} interval {low:.4f} to {high:.4f}; against before training p = {p:.3f}")


# Scored pairs


def pair_scores(similarity: np.ndarray, gold: np.ndarray, kind: str) -> dict[str, float]:
    """Return the scores of pairs.

    Args:
        similarity: cosine of each pair.
        gold: score or label of each pair.
        kind: score: Spearman's and Pearson's correlation (`EmbeddingSimilarityEvaluator` of sentence-transformers).
            label: average precision, and the best accuracy and F1 of all thresholds (`BinaryClassificationEvaluator`).
    """
    if kind == "score":
        varied = len(set(gold.tolist())) > 1 and len(set(similarity.tolist())) > 1
        both = (spearmanr, pearsonr) if varied else ()
        names = ("spearman", "pearson")
        return dict.fromkeys(names, 0.0) | {
            name: float(correlation(similarity, gold)[0]) for name, correlation in zip(names, both, strict=False)
        }
    order, positives = np.argsort(-similarity, kind="stable"), gold.sum()
    # a threshold lies between two different similarities, above all, or below all
    cuts = np.append(np.flatnonzero(np.diff(similarity[order])) + 1, [0, len(gold)])
    right, counts = np.append(0, gold[order].cumsum())[cuts], cuts
    accuracy = (right + (len(gold) - positives) - (counts - right)) / len(gold)
    f1 = 2 * right / np.maximum(counts + positives, 1)
    precision = float(average_precision_score(gold, similarity)) if positives else 0.0
    return {"average_precision": precision, "accuracy": float(accuracy.max()), "f1": float(f1.max())}


class Similarity:
    """The scored pairs of a split; see `Search` for the attributes."""

    def __init__(self, rows: Dataset, kind: str):
        self.rows, self.kind = rows, kind
        self.texts = [list(pair) for pair in zip(rows["text"][:], rows["text_pair"][:], strict=True)]
        self.labels = rows[kind][:]
        self.names = ("spearman", "pearson") if kind == "score" else ("average_precision", "accuracy", "f1")

    def __call__(self, predictions: list[np.ndarray], gold: object = None) -> dict[str, float]:
        """Return the scores of the cosines of the pairs."""
        return pair_scores(np.array(predictions, dtype=float), np.array(self.labels), self.kind)

    def beside(self, predictions: list[np.ndarray], before: list[np.ndarray]) -> dict[str, float]:
        """Return the scores of the encoder before training."""
        return {f"frozen_{name}": value for name, value in self(before).items()}

    def report(self, predictions: list[np.ndarray]) -> Iterator[Row]:
        """Yield the rows with the cosine of their texts."""
        for row, similarity in zip(self.rows, predictions, strict=True):
            yield dict(row) | {"similarity": round(float(similarity), 4)}

    def show(self, metrics: dict[str, float], split: str) -> None:
        """Print the scores of a split beside those before training."""
        tell(f"\n{rows_named(split)}: {len(self.rows):,} pairs")
        rows = [
            [name, *(metrics[f"{split}_{prefix}{score}"] for score in self.names)]
            for name, prefix in {"this model": "", "before training": "frozen_"}.items()
            if f"{split}_{prefix}{self.names[0]}" in metrics
        ]
        print_table(["", *self.names], rows)


def judge_of(
    kind: str, rows: Dataset, corpus: Corpus, reading: Reading, args: TrainingArguments
) -> Search | Similarity:
    """Return what scores the rows of a split; the loss of queries has batches of the size of a training step."""
    if kind != "ranking":
        return Similarity(rows, kind)
    together = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return Search(rows, corpus, reading, args.temperature, together)


def picture(output_dir: str) -> Path:
    """Return the file of the learning curve; its folder exists."""
    folder = Path(output_dir, "pictures")
    folder.mkdir(exist_ok=True)
    return folder / "learning.png"
