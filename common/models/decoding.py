"""Configure generation, and convert between texts, labels and generated tokens."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common.data.language_codes import without_codes
from common.errors import InputError
from common.models.generation_settings import unset_contradictions
from common.models.sizes import PAD_MULTIPLE
from common.models.structure import attention_by


@dataclass
class GenerationArguments:
    """Configure beam search. The settings are saved with the model for `generate` and predict."""

    _argument_group_name = "generation"

    num_beams: int = field(
        default=4, metadata={"help": "beams of the search; evaluations during training use 1 (greedy)"}
    )
    length_penalty: float = field(
        default=1.0,
        metadata={"help": "a beam's score is divided by its length to this power; above 1 favours long outputs"},
    )
    max_source_length: int = field(
        default=128, metadata={"help": "maximum tokens of a source; the rest is cut off", "resume": "fixed"}
    )
    max_target_length: int = field(
        default=128, metadata={"help": "maximum tokens of a generated text", "resume": "fixed"}
    )

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_source_length", "max_target_length"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")


def set_generation(model: PreTrainedModel, args: GenerationArguments) -> None:
    """Write the search settings of `args` into the generation configuration of `model`.

    Other settings of the checkpoint stay, such as special ids and suppressed words.

    Raises:
        InputError: the checkpoint names no start token of the decoder.
    """
    config = model.generation_config
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(model.config, name, None))
    if config.decoder_start_token_id is None and config.bos_token_id is None:
        raise InputError(f"{model.name_or_path}: config.json lacks decoder_start_token_id; set it before training")
    beams = args.num_beams > 1
    # not `config.update`, which refuses contradictions with other settings before they can be unset
    vars(config).update(
        num_beams=args.num_beams,
        length_penalty=args.length_penalty if beams else None,
        early_stopping=False if beams else None,
        max_new_tokens=args.max_target_length,
        max_length=None,
        min_length=None,
        min_new_tokens=None,
        num_return_sequences=None,
        return_dict_in_generate=None,
        forced_eos_token_id=None,  # else an output at the length limit would look complete
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
    )
    unset_contradictions(config)  # such as scores to return, without a dictionary for them


def label_ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], start: int | None, max_length: int | None = None
) -> list[list[int]]:
    """Tokenize target texts into labels.

    Args:
        tokenizer: the tokenizer of the model.
        texts: the targets.
        start: id of the start token of the decoder. A tokenizer that puts this token before each text, such as BERT's,
            would repeat it; the labels omit it.
        max_length: most tokens of a text; None for no limit.
    """
    repeated = tokenizer(text_target="a")["input_ids"][0] == start
    texts = without_codes(tokenizer, texts)
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length + repeated}
    return [row[int(repeated) :] for row in tokenizer(text_target=texts, verbose=False, **cut)["input_ids"]]


def shift_right(labels: Tensor, start: int, pad: int) -> Tensor:
    """Return the decoder inputs for `labels`: `start`, then all labels except the last.

    Args:
        labels: ids of shape (rows, length), with -100 at padding.
        start: id of the start token.
        pad: id that replaces -100.
    """
    ids = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return ids.masked_fill(ids == -100, pad)


def padded(rows: list[list[int]], value: int, multiple: int = PAD_MULTIPLE) -> Tensor:
    """Pad rows with `value` to a tensor of shape (rows, a multiple of `multiple`)."""
    width = -(-max(map(len, rows)) // multiple) * multiple
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


@contextmanager
def generating(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Generate under one autocast, instead of the one that accelerate puts around each forward pass.

    The autocast of accelerate casts the weights in each step of the search; this one casts them once. A CPU generates
    with SDPA if the model supports SDPA: without dropout and gradients it takes the least time and memory.

    Args:
        model: the model.
        dtype: type of the computation; None for the type of the weights.
    """
    wrapped = model.__dict__.pop("forward", None)
    device = next(model.parameters()).device.type
    try:
        with (
            torch.autocast(device, dtype=dtype, enabled=dtype is not None),
            attention_by(model, {"eager": "sdpa", "sdpa": "sdpa"}) if device == "cpu" else nullcontext(),
        ):
            yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


def finished_ids(row: np.ndarray, eos: int, forced: Collection[int] = ()) -> tuple[list[int], bool]:
    """Return the tokens of a generated row up to its end, without the start token, and whether the row is complete.

    Args:
        row: ids of shape (length,), possibly padded with -100.
        eos: id of the end token. A row without this token reached the length limit.
        forced: ids dropped from the start of the output, such as language tokens. Not every tokenizer treats them as
            special tokens.
    """
    row = row[1:]
    row = row[row != -100]
    if len(row) and row[0] in forced:
        row = row[1:]
    ends = np.flatnonzero(row == eos)
    return (row[: ends[0]].tolist(), True) if len(ends) else (row.tolist(), False)


def decoded(
    rows: Iterable[np.ndarray], tokenizer: PreTrainedTokenizerBase, forced: Collection[int] = ()
) -> tuple[list[str], list[int], list[bool]]:
    """Return text, number of tokens (end token included) and completeness of each row of `generate`."""
    finished = [finished_ids(row, tokenizer.eos_token_id, forced) for row in rows]
    texts = tokenizer.batch_decode(
        [ids for ids, _ in finished], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    lengths = [len(ids) + ended for ids, ended in finished]
    return [text.strip() for text in texts], lengths, [ended for _, ended in finished]


def forced_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Return the forced first tokens of the outputs of `model`, as `finished_ids` expects them."""
    forced = model.generation_config.forced_bos_token_id
    return () if forced is None else (forced,)


class BeginWith(LogitsProcessor):
    """Force the first token of each output; `forced_bos_token_id` forces the same token for all.

    Args:
        ids: first token of each row, shape (rows,).
    """

    def __init__(self, ids: Tensor):
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > 1:
            return scores
        beams = len(scores) // len(self.ids)
        return torch.full_like(scores, -torch.inf).scatter(1, self.ids.repeat_interleave(beams)[:, None], 0.0)
