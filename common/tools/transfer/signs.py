"""Predict how much a source helps a target, from signs that need no training.

- similarity: cosine of the mean embeddings of the training texts (Vu et al. 2020, arXiv:2005.00770)
- vocabulary: share of the target's most frequent words that are among those of the source (Gururangan et al. 2020,
  arXiv:2004.10964)
- labels: labels in common, of all labels of both
- size: logarithm of the number of source rows
- LogME: evidence of the target's labels (You et al. 2021, arXiv:2102.11005)
- probe: macro F1 of a linear probe on the target's training rows, by cross-validation

The features of LogME and of the probe are the embeddings of the source's own checkpoint, if it has one. For a source
that is still to be trained they are the outputs of a linear classifier of the source's labels on the embeddings of the
common checkpoint: what a head of the source would say of the target's rows.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import f1_score
from sklearn.model_selection import KFold, cross_val_predict
from transformers import AutoModel

from common.args import DEFAULT_ENCODER
from common.data.words import words
from common.errors import quiet
from common.hardware import accelerator
from common.models import load_tokenizer, resolve_model
from common.models.load import load_config
from common.run.transferable import TaskRows
from common.tools.transfer.chains import Chains
from common.tools.transfer.plan import TRAINED_FIRST

SIGNS = ("similarity", "vocabulary", "labels", "size", "LogME", "probe")
#: most rows and most pieces (words, texts) that are embedded, longest text, and most words of a vocabulary
ROWS, PIECES, TOKENS, WORDS = 1000, 3000, 128, 10_000


@dataclass(frozen=True)
class Features:
    """Embeddings of the rows of a task.

    Attributes:
        mean: mean embedding of its texts, of shape (width,).
        pieces: embedding of each piece, of shape (pieces, width).
        classes: class of each piece; None without classes.
    """

    mean: np.ndarray
    pieces: np.ndarray
    classes: list[str] | None


class Embedder:
    """Embed rows by a checkpoint, with the mean of the last states."""

    def __init__(self, name: str):
        path = resolve_model(name)
        self.tokenizer = load_tokenizer(path)
        self.device = accelerator()
        with quiet():
            model = AutoModel.from_pretrained(path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
        self.model = (model.get_encoder() if load_config(path).is_encoder_decoder else model).to(self.device).eval()

    @torch.no_grad()
    def __call__(self, rows: TaskRows) -> Features:
        """Return the features of up to `ROWS` random rows."""
        drawn = np.random.default_rng(0).permutation(len(rows.pieces))[:ROWS]
        texts: list[np.ndarray] = []
        pieces: list[np.ndarray] = []
        classes: list[str] = []
        for begin in range(0, len(drawn), 32):
            batch = [rows.pieces[i] for i in drawn[begin : begin + 32]]
            encoded = self.tokenizer(
                batch, is_split_into_words=True, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
            )
            states = self.model(**encoded.to(self.device)).last_hidden_state.float().cpu().numpy()
            for i, row in enumerate(drawn[begin : begin + 32]):
                mask = encoded["attention_mask"][i].bool().cpu().numpy()
                texts.append(states[i][mask].mean(0))
                numbers = np.array([-1 if n is None else n for n in encoded.word_ids(i)])
                for number in range(len(batch[i]) if len(pieces) < PIECES else 0):
                    inside = numbers == number
                    if inside.any():
                        pieces.append(states[i][inside].mean(0))
                        classes.append(rows.classes[row][number] if rows.classes else "")
        return Features(np.mean(texts, 0), np.stack(pieces), classes if rows.classes else None)


def log_evidence(features: np.ndarray, classes: Sequence[str]) -> float:
    """Return LogME: the mean over the classes of the log evidence of a row's label given its features.

    A Bayesian linear model predicts a 0 or 1 for each class, with weights of precision alpha and noise of precision
    beta; both maximise the evidence, by fixed-point iteration over the singular values (You et al. 2021, algorithm 1).

    Args:
        features: shape (rows, width).
        classes: class of each row.
    """
    rows, width = features.shape
    left, values, _ = np.linalg.svd(features.astype(np.float64), full_matrices=False)
    squares = values**2
    evidence = []
    for name in sorted(set(classes)):
        label = np.array([float(one == name) for one in classes])
        shares = (left.T @ label) ** 2
        outside = max(float(label @ label - shares.sum()), 0.0)
        alpha = beta = 1.0
        for _ in range(100):
            ratio = alpha / beta
            gamma = (squares / (squares + ratio)).sum()
            weights = (squares * shares / (squares + ratio) ** 2).sum()
            residual = (shares * (ratio / (squares + ratio)) ** 2).sum() + outside
            alpha, beta = gamma / (weights + 1e-9), (rows - gamma) / (residual + 1e-9)
            if abs(alpha / beta - ratio) <= 1e-4 * ratio:
                break
        ratio = alpha / beta
        weights = (squares * shares / (squares + ratio) ** 2).sum()
        residual = (shares * (ratio / (squares + ratio)) ** 2).sum() + outside
        determinant = np.log(alpha + beta * squares).sum() + (width - len(squares)) * np.log(alpha)
        total = width * np.log(alpha) + rows * np.log(beta) - determinant - rows * np.log(2 * np.pi)
        evidence.append((total - beta * residual - alpha * weights) / 2 / rows)
    return float(np.mean(evidence))


def probe_score(features: np.ndarray, classes: Sequence[str]) -> float | None:
    """Return macro F1 of a linear classifier, by five-fold cross-validation; None for too few rows or one class."""
    if len(set(classes)) < 2 or len(classes) < 10:
        return None
    predicted = cross_val_predict(RidgeClassifier(), features, classes, cv=KFold(5, shuffle=True, random_state=0))
    return float(f1_score(classes, predicted, average="macro"))


def source_outputs(source: Features, target: Features) -> np.ndarray | None:
    """Return the outputs of a linear classifier of the source's classes for the target's pieces, (pieces, classes)."""
    if source.classes is None or len(set(source.classes)) < 2:
        return None
    outputs = RidgeClassifier().fit(source.pieces, source.classes).decision_function(target.pieces)
    outputs = outputs[:, None] if outputs.ndim == 1 else outputs
    return np.concatenate([outputs, np.ones((len(outputs), 1))], axis=1)


def vocabulary(texts: Iterable[str]) -> frozenset[str]:
    """Return the most frequent words of texts."""
    counts = Counter(word for text in texts for word in words(text.lower()))
    return frozenset(word for word, _ in counts.most_common(WORDS))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of two vectors."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def predict(chains: Chains) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the signs of each source that trains something first or has a checkpoint of its own, for each target.

    Returns:
        Target -> source -> sign -> value (higher promises more; None if the source or the target has no such sign), and
        `rank`, the mean of its relative ranks from 0 (last) to 1 (first).
    """
    common = chains.plan.model or DEFAULT_ENCODER
    embedder = Embedder(common)
    features: dict[tuple[str, int], Features] = {}
    vocabularies: dict[int, frozenset[str]] = {}

    def embedded(model: str, rows: TaskRows) -> Features:
        if (model, id(rows)) not in features:
            features[model, id(rows)] = (embedder if model == common else Embedder(model))(rows)
        return features[model, id(rows)]

    def words_of(rows: TaskRows) -> frozenset[str]:
        if id(rows) not in vocabularies:
            vocabularies[id(rows)] = vocabulary(rows.texts[: 10 * ROWS])
        return vocabularies[id(rows)]

    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for target in chains.plan.targets:
        rows = chains.tasks[target.name].rows
        ours = embedded(common, rows)
        for source in chains.plan.sources:
            if not any(place[:2] == (target.name, source.name) for place in chains.cells):
                continue
            signs: dict[str, float | None] = dict.fromkeys(SIGNS)
            outputs = None
            if source.kind in TRAINED_FIRST:
                theirs = chains.first_tasks[target.name, source.name].rows
                signs["similarity"] = cosine(embedded(common, theirs).mean, ours.mean)
                signs["vocabulary"] = len(words_of(theirs) & words_of(rows)) / max(1, len(words_of(rows)))
                if theirs.types and rows.types:
                    signs["labels"] = len(theirs.types & rows.types) / len(theirs.types | rows.types)
                signs["size"] = float(np.log10(len(theirs.pieces)))
                outputs = source_outputs(embedded(common, theirs), ours)
            if source.model:
                own = embedded(source.model, rows)
                outputs = own.pieces
            elif source.kind not in TRAINED_FIRST:
                continue
            if outputs is not None and ours.classes is not None:
                signs["LogME"], signs["probe"] = log_evidence(outputs, ours.classes), probe_score(outputs, ours.classes)
            found.setdefault(target.name, {})[source.name] = signs
    for of_target in found.values():
        _add_ranks(of_target)
    return found


def _add_ranks(sources: dict[str, dict[str, float | None]]) -> None:
    """Add to each source the mean of its relative ranks over the signs that it has."""
    ranks: dict[str, list[float]] = {name: [] for name in sources}
    for sign in SIGNS:
        having = [(name, value) for name, signs in sources.items() if (value := signs[sign]) is not None]
        if len(having) < 2:
            continue
        for (name, _), rank in zip(having, rankdata([value for _, value in having]), strict=True):
            ranks[name].append((rank - 1) / (len(having) - 1))
    for name, signs in sources.items():
        signs["rank"] = float(np.mean(ranks[name])) if ranks[name] else None
