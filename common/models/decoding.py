"""Settings of generation, and the conversion between texts, labels and generated tokens."""

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

from common.errors import InputError
from common.models.structure import attention_by

PAD_MULTIPLE = 8


@dataclass
class GenerationArguments:
    """How outputs are searched for. Saved with the model, so that `generate` and predict search in the same way."""

    _argument_group_name = "generation"

    num_beams: int = field(default=4, metadata={"help": "hypotheses kept at each step; during training 1 (greedy)"})
    length_penalty: float = field(
        default=1.0, metadata={"help": "power of the length that a beam's score is divided by; above 1 favours long"}
    )
    max_source_length: int = field(
        default=128, metadata={"help": "sub-tokens of a source that are read", "resume": "fixed"}
    )
    max_target_length: int = field(
        default=128, metadata={"help": "sub-tokens that are generated at most", "resume": "fixed"}
    )

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_source_length", "max_target_length"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1")


def set_generation(model: PreTrainedModel, args: GenerationArguments) -> None:
    """Put the search that `args` asks for into the generation configuration of `model`.

    What else the checkpoint sets stays: its special ids, words never to generate, and the like. Raises `InputError`
    where no id says what the decoder begins with.
    """
    config = model.generation_config
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(model.config, name, None))
    if config.decoder_start_token_id is None and config.bos_token_id is None:
        raise InputError(f"{model.name_or_path}: its config.json has no decoder_start_token_id, so nothing can begin")
    beams = args.num_beams > 1
    config.update(
        num_beams=args.num_beams,
        length_penalty=args.length_penalty if beams else None,
        early_stopping=False if beams else None,
        max_new_tokens=args.max_target_length,
        max_length=None,
        min_length=None,
        forced_eos_token_id=None,  # or an output that is cut off would look as if it had come to its end
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
    )


def label_ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], start: int | None, max_length: int | None = None
) -> list[list[int]]:
    """Labels of target texts, cut to `max_length` if given.

    `start` is what the decoder begins with. A tokenizer that puts it in front of each text, as BERT's does, would have
    the decoder begin twice, so there it is left out.
    """
    twice = tokenizer(text_target="a")["input_ids"][0] == start
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length + twice}
    return [row[int(twice) :] for row in tokenizer(text_target=texts, verbose=False, **cut)["input_ids"]]


def shift_right(labels: Tensor, start: int, pad: int) -> Tensor:
    """What a decoder reads to predict `labels`, of shape (rows, length): `start`, then all labels but the last."""
    ids = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return ids.masked_fill(ids == -100, pad)


def padded(rows: list[list[int]], value: int) -> Tensor:
    """Rows of different length as one tensor of shape (rows, multiple of 8), filled up with `value`."""
    width = -(-max(map(len, rows)) // PAD_MULTIPLE) * PAD_MULTIPLE
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


@contextmanager
def generating(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Generate without the autocast that accelerate wraps a model's forward in, in `dtype`; None: in its weights'.

    That one casts the weights at each step of the search; this one once. A CPU generates by SDPA where the model has
    it, which is slow at dropout and gradients, but takes less time and memory than other kernels without.
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
    """The sub-tokens of a generated row, without the one that the decoder began with and without what follows the end.

    Also whether the end came: a row without it hit the greatest length. `row` has shape (length,), and may be padded
    with -100, which no tokenizer may meet. One of `forced`, such as languages, is left out where the output begins with
    it: not every tokenizer takes it for special.
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
    """Text, number of sub-tokens (its end included) and whether the end came, of each row that `generate` gave."""
    found = [finished_ids(row, tokenizer.eos_token_id, forced) for row in rows]
    texts = tokenizer.batch_decode(
        [ids for ids, _ in found], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [text.strip() for text in texts], [len(ids) + ended for ids, ended in found], [ended for _, ended in found]


def forced_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """What every output of `model` begins with by its generation configuration, as `finished_ids` takes it."""
    forced = model.generation_config.forced_bos_token_id
    return () if forced is None else (forced,)


class BeginWith(LogitsProcessor):
    """Makes each output begin with a sub-token of its own, as `forced_bos_token_id` does with one for all.

    `ids` has shape (rows,).
    """

    def __init__(self, ids: Tensor):
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > 1:
            return scores
        beams = len(scores) // len(self.ids)
        return torch.full_like(scores, -torch.inf).scatter(1, self.ids.repeat_interleave(beams)[:, None], 0.0)
