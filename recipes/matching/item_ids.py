"""Recommend the next item by the ids of a history: SASRec (Kang and McAuley 2018, https://arxiv.org/abs/1808.09781).

A causal Transformer reads the items of a user in order. The score of an item is the product of its embedding with the
last state. It is the rival of an encoder that reads texts; it knows no item that training lacks.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.hardware import native_bf16

#: items of a history that are read
LENGTH = 50
#: layers, heads, and dropout
LAYERS, HEADS, DROPOUT = 2, 6, 0.3
#: rows of a step, learning rate, most passes, and passes without a better validation score
BATCH, RATE, PASSES, PATIENCE = 32, 1e-3, 40, 5
#: number that fills a history
PADDING = 0


class ItemModel(nn.Module):
    """SASRec over the items 1 to `items`; 0 is padding.

    Args:
        items: number of items.
        width: width of embeddings and states.
    """

    def __init__(self, items: int, width: int):
        super().__init__()
        self.items = nn.Embedding(items + 1, width, padding_idx=PADDING)
        self.places = nn.Embedding(LENGTH, width)
        nn.init.normal_(self.items.weight, std=width**-0.5)
        nn.init.normal_(self.places.weight, std=width**-0.5)
        heads = HEADS if width % HEADS == 0 else 1
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, DROPOUT, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, LAYERS, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, histories: Tensor) -> Tensor:
        """Return the state after each place, (rows, length, width).

        Args:
            histories: items, oldest first, padded on the right, (rows, length).
        """
        length = histories.shape[1]
        states = self.dropout(self.items(histories) + self.places.weight[:length])
        future = torch.triu(torch.ones(length, length, dtype=torch.bool, device=histories.device), 1)
        with torch.autocast("cpu", torch.bfloat16, native_bf16(True)):
            return self.body(states, mask=future, is_causal=True).float()

    def scores(self, states: Tensor) -> Tensor:
        """Return the score of each item after states (..., width), (..., items + 1)."""
        with torch.autocast("cpu", torch.bfloat16, native_bf16(True)):
            return (states @ self.items.weight.T).float()


def padded(histories: Sequence[Sequence[int]]) -> Tensor:
    """Return the last `LENGTH` items of each history, padded on the right, (rows, longest)."""
    longest = max(1, min(LENGTH, max(map(len, histories))))
    rows = torch.full((len(histories), longest), PADDING)
    for row, history in zip(rows, histories, strict=True):
        last = torch.tensor(list(history[-LENGTH:]), dtype=torch.int64)
        row[: len(last)] = last
    return rows


def windows(histories: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Cut histories into stretches of `LENGTH` + 1 items; the next one begins with the last item of the one before."""
    return [h[i : i + LENGTH + 1] for h in histories for i in range(0, max(1, len(h) - 1), LENGTH) if len(h) > 1]


@torch.no_grad()
def scores(model: ItemModel, histories: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the score of each item after each history, (histories, items + 1)."""
    model.eval()
    rows = padded(histories)
    last = torch.tensor([max(0, min(LENGTH, len(history)) - 1) for history in histories])
    return model.scores(model(rows)[torch.arange(len(rows)), last]).numpy()


def train(
    histories: Sequence[Sequence[int]], items: int, width: int, seed: int, validate: Callable[[ItemModel], float]
) -> ItemModel:
    """Train a model to name the next item at each place; the weights with the best validation score are returned.

    Args:
        histories: items of each user in the time of training, oldest first, from 1 on.
        items: number of items.
        width: width of the model.
        seed: seed of weights, dropout and order.
        validate: returns the validation score of a model.
    """
    torch.manual_seed(seed)
    model, rows = ItemModel(items, width), windows(histories)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    best, kept, since = -1.0, copy.deepcopy(model.state_dict()), 0
    for _ in range(PASSES):
        model.train()
        for numbers in torch.randperm(len(rows)).split(BATCH):
            read = [rows[i] for i in numbers.tolist()]
            inputs, gold = padded([row[:-1] for row in read]), padded([row[1:] for row in read])
            real = gold != PADDING
            loss = F.cross_entropy(model.scores(model(inputs)[real]), gold[real])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        score = validate(model)
        best, since = (score, 0) if score > best else (best, since + 1)
        if since == 0:
            kept = copy.deepcopy(model.state_dict())
        if since == PATIENCE:
            break
    model.load_state_dict(kept)
    return model
