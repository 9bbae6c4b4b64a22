"""Losses of texts that match, with one loss for each row; they agree with those of sentence-transformers."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import Identities

#: largest distance at which a pair that does not match is still pushed apart (Hadsell et al. 2006)
MARGIN = 0.5


def in_batch_losses(
    embeddings: Tensor, rows: Tensor, label_smoothing: float, identities: Identities, temperature: float
) -> Tensor:
    """Compute the loss of each query: cross-entropy of its positive among all passages of the batch.

    `MultipleNegativesRankingLoss` of sentence-transformers (Henderson et al. 2017, https://arxiv.org/abs/1705.00652),
    except that a passage known to answer the query, of another row, is no negative: it is left out of the softmax.

    Args:
        embeddings: of unit length: all queries, then all positives, then the negatives of all rows, (texts, width). Or
            single texts, one a row, as in an evaluation; their losses are 0.
        rows: numbers of the rows in `identities`, (rows,).
        label_smoothing: weight that is spread over the passages of the softmax.
        identities: says which text stands where, and which passages answer a query.
        temperature: divides the similarities.

    Returns:
        Losses of shape (rows,).
    """
    if len(embeddings) == len(rows):
        return embeddings.new_zeros(len(rows))
    queries, passages = embeddings[: len(rows)].float(), embeddings[len(rows) :].float()
    scores = queries @ passages.T / temperature
    answers = torch.from_numpy(identities.also_answers(rows.cpu().numpy())).to(scores.device)
    own = torch.arange(len(rows), device=scores.device)
    answers[own, own] = False
    scores = scores.masked_fill(answers, -torch.inf)
    logs = scores.log_softmax(-1)
    losses = -logs[own, own]
    if label_smoothing:
        spread = -logs.masked_fill(answers, 0).sum(-1) / (~answers).sum(-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * spread
    return losses


def cosine_losses(embeddings: Tensor, scores: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute (cosine - score)^2 for each pair: `CosineSimilarityLoss` of sentence-transformers.

    Args:
        embeddings: all first texts, then all second texts, (2 * pairs, width).
        scores: similarity of each pair, from 0 to 1; -100 for a pair that does not count.
        label_smoothing: not used.
    """
    one, other = embeddings.float().chunk(2)
    return (torch.cosine_similarity(one, other) - scores).square().masked_fill(scores == -100, 0)


def contrastive_losses(embeddings: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the contrastive loss of each pair: `ContrastiveLoss` of sentence-transformers (Hadsell et al. 2006).

    With the distance d = 1 - cosine: d^2 / 2 for a pair that matches, max(0, `MARGIN` - d)^2 / 2 for any other.

    Args:
        embeddings: all first texts, then all second texts, (2 * pairs, width).
        labels: 1 for a pair that matches, else 0; -100 for a pair that does not count.
        label_smoothing: not used.
    """
    one, other = embeddings.float().chunk(2)
    distance = 1 - torch.cosine_similarity(one, other)
    losses = torch.where(labels > 0, distance.square(), F.relu(MARGIN - distance).square()) / 2
    return losses.masked_fill(labels == -100, 0)


def translation_losses(embeddings: Tensor, rows: Tensor, label_smoothing: float, targets: np.ndarray) -> Tensor:
    """Compute |s(text) - t(text)|^2 + |s(translation) - t(text)|^2 of each row, for a student s and a teacher t.

    Equation 1 of Reimers and Gurevych 2020 (https://arxiv.org/abs/2004.09813). `MSELoss` of sentence-transformers
    divides it by the number of values in both vectors.

    Args:
        embeddings: all first texts, then all translations, (2 * rows, width). Or single texts, one a row, as in an
            evaluation; their losses are 0.
        rows: numbers of the rows in `targets`, (rows,); -100 for a row that does not count.
        label_smoothing: not used.
        targets: the teacher's vectors of the first texts of all rows.
    """
    if len(embeddings) == len(rows):
        return embeddings.new_zeros(len(rows))
    gold = torch.from_numpy(targets[rows.clamp(min=0).cpu().numpy()]).to(embeddings.device)
    one, other = embeddings.float().chunk(2)
    return ((one - gold).square().sum(-1) + (other - gold).square().sum(-1)).masked_fill(rows == -100, 0)


def loss_of(kind: str, known: Identities | np.ndarray | None, temperature: float) -> Callable[..., Tensor]:
    """Return the loss for a kind of rows.

    Args:
        kind: see `Kind`.
        known: identities of the texts in rows of queries; the teacher's vectors for translations; else None.
        temperature: see `in_batch_losses`.
    """
    if kind == "ranking":
        return partial(in_batch_losses, identities=known, temperature=temperature)
    if kind == "translation":
        return partial(translation_losses, targets=known)
    return cosine_losses if kind == "score" else contrastive_losses


def similarities(embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the cosine of each pair in a batch of `cosine_losses`: what the scores need of a batch."""
    one, other = embeddings.float().chunk(2)
    return torch.cosine_similarity(one, other)


def reduced_for(kind: str) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return the function that keeps of a batch what the scores need: vectors, or the cosine of each pair."""
    return similarities if kind in ("score", "label") else lambda logits, labels: logits.float()
