"""Make batches from rows of several texts that do not attend to each other."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.data.blocks import padded, pieces
from common.errors import tell

#: model types that accept a block mask and count positions from 0; a test compares each with separate texts
FROM_ZERO = frozenset(
    {
        "albert", "bert", "biogpt", "distilbert", "electra", "ernie", "eurobert", "gemma", "gpt2", "gpt_neox", "llama",
        "olmo2", "phi", "qwen2", "qwen3", "smollm3",
    }
)  # fmt: skip
#: the same for model types that count positions from the id of padding plus 1
FROM_PADDING = frozenset(
    {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"}
)


@dataclass
class Blocks:
    """Settings of the block mask for rows of several texts.

    Attributes:
        first: number of the first position of a text.
        causal: whether a token attends only to earlier tokens and itself.
    """

    first: int
    causal: bool


def find_blocks(model: PreTrainedModel, pack_as: Literal["auto", "pieces", "blocks"], causal: bool) -> Blocks | None:
    """Return the settings of a block mask for `model`, or None if each text becomes a row of the batch.

    On a CPU each text is a row, and `common.speed.padding_free` skips the padding. On an accelerator a row keeps its
    texts and needs no padding. SDPA separates the texts by a block mask. Positions restart in each text.

    Args:
        model: the model.
        pack_as: `--pack_as`; auto selects by hardware.
        causal: whether a token attends only to earlier tokens and itself.
    """
    if pack_as == "pieces" or (pack_as == "auto" and not torch.accelerator.is_available()):
        return None
    config = model.config
    whole = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    if config.model_type not in FROM_ZERO | FROM_PADDING:
        reason = f"not tested with {config.model_type}"
    elif not whole:
        reason = "attention is not full in all layers"
    elif config._attn_implementation != "sdpa":
        reason = f"attn_implementation is {config._attn_implementation}"
    else:
        return Blocks(config.pad_token_id + 1 if config.model_type in FROM_PADDING else 0, causal)
    tell(f"no block mask ({reason}): each text becomes a row of the batch, with padding")
    return None


def to_batch(
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], pad_id: int, blocks: Blocks | None = None, multiple: int = 8
) -> dict[str, Tensor]:
    """Make a batch from rows.

    Args:
        rows: tokens, labels and the lengths of the pieces of each row.
        pad_id: id of the padding token.
        blocks: settings of the block mask; None to make each piece a row of the batch.
        multiple: rows are padded to a multiple of this length.

    Returns:
        Without `blocks`:
            input_ids, attention_mask, labels: shape (pieces, longest).
            owner: row that a piece belongs to, shape (pieces,).
        With `blocks`:
            input_ids, position_ids, labels, real: shape (rows, longest); `real` is 0 at padding.
            attention_mask: shape (rows, 1, longest, longest), True where a token attends to another. Padding forms a
                separate piece.
    """
    if blocks is None:
        parts = [(pieces(ids, lengths), pieces(labels, lengths)) for ids, labels, lengths in rows]
        owner = torch.tensor([i for i, row in enumerate(rows) for _ in row[2]])
        ids = [piece for of_row, _ in parts for piece in of_row]
        labels = [piece for _, of_row in parts for piece in of_row]
    else:
        ids, labels = [row[0] for row in rows], [row[1] for row in rows]
    sizes = torch.tensor([len(row) for row in ids])
    longest = -(-int(sizes.max()) // multiple) * multiple
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
