"""Rows of several texts as a batch in which none sees the others: each a row of its own, or under a block mask."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.data.corpus import padded, pieces
from common.errors import quiet, tell


@dataclass
class Blocks:
    """How a model takes rows that hold several texts.

    `first` is the number of a text's first position, and `causal` whether a sub-token sees none after it.
    """

    first: int
    causal: bool


def find_blocks(model: PreTrainedModel, pack_as: Literal["auto", "pieces", "blocks"], causal: bool) -> Blocks | None:
    """How rows of several texts go through `model` under a block mask; None where each text is to be a row.

    On a CPU pieces are rows, whose padding `common.speed.padding_free` leaves out. On an accelerator rows stay whole, hold no
    padding, and go through SDPA under a mask of blocks, with positions that begin anew in each text. Used only where a
    test row gives the scores that its texts give alone; some architectures number positions from another number than
    0, and some take no such mask.
    """
    if pack_as == "pieces" or (pack_as == "auto" and not torch.accelerator.is_available()):
        return None
    for first in (0, (model.config.pad_token_id or 0) + 1):  # RoBERTa and its kin count from behind the padding's
        blocks = Blocks(first, causal)
        if _gives_the_same(model, blocks):
            return blocks
    tell("this model takes no mask of blocks: each text becomes a row of the batch, with padding")
    return None


def _gives_the_same(model: PreTrainedModel, blocks: Blocks) -> bool:
    names = ("sliding_window", "local_attention", "attention_window", "layer_types")
    if any(getattr(model.config, name, None) for name in names):
        return False  # attention over part of a row, which a given mask would undo
    vocabulary, pad = model.config.vocab_size, model.config.pad_token_id or 0
    lengths = np.array([7, 12, 5])
    ids = np.random.default_rng(0).integers(0, vocabulary, lengths.sum())
    ids[ids == pad] = (pad + 1) % vocabulary
    row = ids, np.full(len(ids), -100), lengths
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), quiet():
            batch = {
                k: v.to(model.device) for k, v in to_batch([row], pad, blocks).items() if k not in ("labels", "real")
            }
            found = _scores(model(**batch))[0, : len(ids)]
            alone = [torch.tensor(piece, device=model.device)[None] for piece in pieces(ids, lengths)]
            expected = torch.cat([_scores(model(input_ids=p, attention_mask=torch.ones_like(p)))[0] for p in alone])
        return torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    except Exception:  # whatever it is, this architecture cannot
        return False
    finally:
        model.train(training)


def _scores(output) -> Tensor:
    return output.prediction_logits if "prediction_logits" in output else output.logits


def to_batch(
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], pad_id: int, blocks: Blocks | None = None
) -> dict[str, Tensor]:
    """A batch from rows of sub-tokens, labels and the lengths of their pieces. Without `blocks`

        input_ids attention_mask labels                   of shape (pieces, longest)
        owner                                             which row a piece is from, of shape (pieces,)

    and with `blocks`

        input_ids position_ids labels real                of shape (rows, longest); `real` is 0 at padding
        attention_mask                                    of shape (rows, 1, longest, longest), True where a sub-token
                                                          sees another; padding is a piece of its own
    """
    if blocks is None:
        parts = [(pieces(ids, lengths), pieces(labels, lengths)) for ids, labels, lengths in rows]
        owner = torch.tensor([i for i, row in enumerate(rows) for _ in row[2]])
        ids = [piece for of_row, _ in parts for piece in of_row]
        labels = [piece for _, of_row in parts for piece in of_row]
    else:
        ids, labels = [row[0] for row in rows], [row[1] for row in rows]
    sizes = torch.tensor([len(row) for row in ids])
    longest = -(-int(sizes.max()) // 8) * 8
    real = (torch.arange(longest) < sizes[:, None]).long()
    batch = {"input_ids": padded(ids, longest, pad_id), "labels": padded(labels, longest, -100)}
    if blocks is None:
        return batch | {"attention_mask": real, "owner": owner}
    numbers = padded([np.repeat(np.arange(len(row[2])), row[2]) for row in rows], longest, -1)
    places = padded([np.concatenate([np.arange(n) for n in row[2]]) for row in rows], longest, 0)
    mask = numbers[:, :, None] == numbers[:, None, :]
    if blocks.causal:
        mask &= torch.ones(longest, longest, dtype=torch.bool).tril()
    return batch | {"attention_mask": mask[:, None], "position_ids": places + blocks.first, "real": real}
