"""Rows of several texts as a batch in which no text sees another: each a row of its own, or under a block mask."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.data.corpus import padded, pieces
from common.errors import tell

#: model types that take a block mask, and number positions from 0; a test compares each with its texts alone
FROM_ZERO = frozenset(
    {
        "albert", "bert", "biogpt", "distilbert", "electra", "ernie", "eurobert", "gemma", "gpt2", "gpt_neox", "llama",
        "olmo2", "phi", "qwen2", "qwen3", "smollm3",
    }
)  # fmt: skip
#: the same, of model types that number positions from behind the id of padding
FROM_PADDING = frozenset(
    {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"}
)


@dataclass
class Blocks:
    """How a model takes rows that hold several texts.

    Attributes:
        first: the number of the first position of a text.
        causal: whether a token sees no token after it.
    """

    first: int
    causal: bool


def find_blocks(model: PreTrainedModel, pack_as: Literal["auto", "pieces", "blocks"], causal: bool) -> Blocks | None:
    """Return how rows of several texts go through `model` under a block mask; None where each text is to be a row.

    On a CPU each text is a row, whose padding `common.speed.padding_free` leaves out. On an accelerator rows stay
    whole, hold no padding, and go through SDPA under a mask of blocks. Positions begin again in each text.
    """
    if pack_as == "pieces" or (pack_as == "auto" and not torch.accelerator.is_available()):
        return None
    config = model.config
    whole = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    if config.model_type not in FROM_ZERO | FROM_PADDING:
        reason = f"not tested with {config.model_type}"
    elif not whole:
        reason = "attention sees only a part of the row"
    elif config._attn_implementation != "sdpa":
        reason = f"attn_implementation is {config._attn_implementation}"
    else:
        return Blocks(config.pad_token_id + 1 if config.model_type in FROM_PADDING else 0, causal)
    tell(f"no mask of blocks ({reason}): each text becomes a row of the batch, with padding")
    return None


def to_batch(
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], pad_id: int, blocks: Blocks | None = None
) -> dict[str, Tensor]:
    """Make a batch from rows of tokens, labels and the lengths of their pieces. Without `blocks`

        input_ids attention_mask labels                   of shape (pieces, longest)
        owner                                             which row a piece is from, of shape (pieces,)

    and with `blocks`

        input_ids position_ids labels real                of shape (rows, longest); `real` is 0 at padding
        attention_mask                                    of shape (rows, 1, longest, longest), True where a token
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
