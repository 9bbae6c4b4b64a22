"""Compute the layers of a model at the real tokens of a batch only, on a CPU, with attention in bins.

Results agree with the padded model to rounding. `tests/benchmarks/LOG.md` has the gains.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function

from common.errors import one_line, quiet
from common.models.structure import transformer_of
from common.models.trial import FAILURES, trial
from common.speed.dropout import quick_dropout

#: model types whose layers may leave out padding; a test compares each with plain transformers
PADDING_FREE = frozenset(
    {
        "bert", "biogpt", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "gpt2", "opt", "roberta",
        "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
    }
)  # fmt: skip
#: rows of at most this many tokens share bins of this length; attention computes one bin at a time
BIN = 64
#: scores that a head computes at a time; those of 12 heads, with gradients and dropout, fit into the cache
SCORES_TOGETHER = 2**17
#: up to this many tokens, attention in bfloat16 is faster in separate operations than by SDPA (`LOG.md`)
WRITTEN_OUT = 512
#: up to this many tokens, the softmax is in float32: it costs little, and its gradient is not rounded
EXACT = 128
#: the number of tokens, the length of bins and their number are rounded up to these multiples, because each new
#: shape of matrices costs time and memory
TOKEN_MULTIPLE, LENGTH_MULTIPLE, BIN_MULTIPLE = 64, 32, 4

#: bins that attention computes at a time: their length on each side, and the rows in each bin
Group = tuple[tuple[int, ...], list[list[int]]]


class _Rearrange(torch.autograd.Function):
    """Select rows of x by index. `back` is the index for the gradient; its rows from `real` on are set to 0."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, back: Tensor, real: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.real = real
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        (back,) = ctx.saved_tensors
        gradient = gradient.index_select(0, back)
        gradient[ctx.real :] = 0
        return gradient, None, None, None


def in_bins(lengths: list[tuple[int, ...]]) -> list[Group]:
    """Return groups of bins for rows of `lengths`, with one length a row, or two (source and target).

    A bin is as long as the longest remaining row, or `BIN`, on each side. Rows go, longest first, into the first bin
    with room on all sides (first-fit decreasing). A group has as many bins as `SCORES_TOGETHER` allows; some
    may be empty.
    """
    left = sorted(range(len(lengths)), key=lambda row: max(lengths[row]), reverse=True)
    groups: list[Group] = []
    while left:
        by_side = list(zip(*(lengths[row] for row in left), strict=True))
        sides = tuple(max(BIN, _multiple(LENGTH_MULTIPLE, max(of_side))) for of_side in by_side)
        least = [min(of_side) for of_side in by_side]
        most = max(1, SCORES_TOGETHER // max(sides) ** 2)
        bins: list[list[int]] = []
        open_bins: list[tuple[list[int], list[int]]] = []  # rows of a bin, and free room on each side
        later = []
        for row in left:
            needed = lengths[row]
            fitting = next((b for b in open_bins if all(map(int.__ge__, b[1], needed))), None)
            if fitting is None and len(bins) == most:
                later.append(row)
                continue
            if fitting is None:
                fitting = [], list(sides)
                bins.append(fitting[0])
                open_bins.append(fitting)
            fitting[0].append(row)
            fitting[1][:] = map(int.__sub__, fitting[1], needed)
            if not all(map(int.__ge__, fitting[1], least)):
                open_bins.remove(fitting)
        bins += [[] for _ in range(min(most, _multiple(BIN_MULTIPLE, len(bins))) - len(bins))]
        groups.append((sides, bins))
        left = later
    return groups


def _multiple(of: int, number: int) -> int:
    """Round `number` up to a multiple of `of`."""
    return -(-number // of) * of


class PackedBatch:
    """The positions of the tokens of a padded batch without its padding. It takes the place of the attention mask.

    `mask` has shape (rows, length), True at real tokens. With `causal` a token attends to no later token. Vectors have
    three arrangements:
    - padded: rows x length, as in the output of the embeddings and the input of the head;
    - packed: the real tokens in the order of the slots, then at least one filler. The gradient of the filler is always
      0, and the filler may take any place without a token;
    - slots: for attention, bins that hold several rows; rows do not attend to each other (`in_bins`).
    """

    def __init__(self, mask: Tensor, causal: bool = False, groups: list[Group] | None = None, side: int = 0):
        self.causal = causal
        rows, length = mask.shape
        lengths = mask.sum(1).tolist()
        #: for each group the length of its bins, and the row at each place of a bin: (bins, length). Rows are numbered
        #: in packed order; -1 is an empty place
        self.groups: list[tuple[int, Tensor]] = []
        #: for each group the greatest number of rows in a bin, and the places of its rows if each bin had this number
        self._places: list[tuple[int, Tensor]] = []
        rows_in_order: list[int] = []
        starts_in_order: list[int] = []
        size = 0
        for sides, bins in in_bins([(n,) for n in lengths]) if groups is None else groups:
            owners = torch.full((len(bins), sides[side]), -1)
            most = max(map(len, bins))
            places = []
            for i, members in enumerate(bins):
                at = 0
                for k, member in enumerate(members):
                    owners[i, at : at + lengths[member]] = len(rows_in_order)
                    starts_in_order.append(size + at)
                    places.append(i * most + k)
                    rows_in_order.append(member)
                    at += lengths[member]
                size += sides[side]
            self.groups.append((sides[side], owners))
            self._places.append((most, torch.tensor(places)))
        order, starts = torch.tensor(rows_in_order), torch.tensor(starts_in_order)
        row, column = mask[order].nonzero(as_tuple=True)
        self.real = len(row)
        packed = (self.real // TOKEN_MULTIPLE + 1) * TOKEN_MULTIPLE
        self.padded_of_packed = torch.zeros(packed, dtype=torch.int64)
        self.padded_of_packed[: self.real] = order[row] * length + column
        self.packed_of_padded = self._inverse(self.padded_of_packed, rows * length)

        lengths_in_order = mask.sum(1)[order]
        starts_of_rows = lengths_in_order.cumsum(0) - lengths_in_order
        within = torch.arange(self.real) - starts_of_rows[row]
        self.slot_of_packed = torch.zeros(packed, dtype=torch.int64)
        self.slot_of_packed[: self.real] = starts[row] + within
        self.packed_of_slot = self._inverse(self.slot_of_packed, size)
        #: packed position of the first token of each row: in packed order, and in the order of the rows
        self.sorted_firsts = starts_of_rows.masked_fill(lengths_in_order == 0, self.real)  # an empty row has the filler
        self.firsts = torch.empty_like(order).scatter_(0, order, self.sorted_firsts)
        #: for the last layer: packed positions that it computes (None: all); its whole input; whether it attends from
        #: first tokens only
        self.chosen: Tensor | None = None
        self.whole: Tensor | None = None
        self.firsts_only = False
        self._biases: dict[tuple, Tensor | None] = {}

    def _inverse(self, index: Tensor, size: int) -> Tensor:
        inverse = torch.full((size,), self.real)
        inverse[index[: self.real]] = torch.arange(self.real)
        return inverse

    def pack(self, x: Tensor) -> Tensor:
        """Convert (rows, length, width) to (1, packed, width)."""
        self.shape = x.shape
        x = x.flatten(0, 1)
        return _Rearrange.apply(x, self.padded_of_packed, self.packed_of_padded, len(x))[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Convert (1, packed, width) to (rows, length, width), with arbitrary values at padding.

        With `chosen` tokens convert (1, n, width) to (n, 1, width).
        """
        if self.chosen is not None:
            return x.transpose(0, 1)
        return _Rearrange.apply(x[0], self.packed_of_padded, self.padded_of_packed, self.real).view(self.shape)

    def to_bins(self, *vectors: Tensor) -> list[Tensor]:
        """Convert vectors of (1, heads, packed, width) to (vectors, bins, heads, length, width) for each group."""
        _, heads, packed, width = vectors[0].shape
        flat = torch.cat([x.transpose(1, 2).reshape(packed, heads * width) for x in vectors], dim=-1)
        slots = _Rearrange.apply(flat, self.packed_of_slot, self.slot_of_packed, self.real)
        return [
            part.view(len(owners), length, len(vectors), heads, width).permute(2, 0, 3, 1, 4)
            for part, (length, owners) in zip(
                slots.split([owners.numel() for _, owners in self.groups]), self.groups, strict=True
            )
        ]

    def from_bins(self, results: list[Tensor]) -> Tensor:
        """Convert (bins, heads, length, width) of each group to (1, packed, heads, width)."""
        heads, width = results[0].shape[1], results[0].shape[3]
        flat = torch.cat([result.transpose(1, 2).reshape(-1, heads * width) for result in results])
        flat = _Rearrange.apply(flat, self.slot_of_packed, self.packed_of_slot, len(flat))
        return flat.view(1, -1, heads, width)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
        """Compute attention within each row, from (1, heads, packed, width) each to (1, packed, heads, width).

        With `firsts_only` only the first token of each row attends; the output is 0 elsewhere.
        """
        if self.firsts_only:
            return self._attend_firsts(query, key, value, dropout, scaling)
        results = []
        for i, (q, k, v) in enumerate(self.to_bins(query, key, value)):
            alone = self._places[i][0] == 1  # one row a bin: empty places come after all tokens
            bias = partial(self._bias, i, self.groups[i][1])
            results.append(weighed(q, k, v, dropout, scaling, bias, is_causal=self.causal and alone))
        return self.from_bins(results)

    def _attend_firsts(
        self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None
    ) -> Tensor:
        _, heads, packed, width = query.shape
        firsts = query[0].index_select(1, self.sorted_firsts)  # (heads, rows, width)
        outputs, start = [], 0
        for i, (k, v) in enumerate(self.to_bins(key, value)):
            most, places = self._places[i]
            # the first row of the group fills up bins with fewer rows
            rows = torch.full((len(k) * most,), start)
            rows[places] = torch.arange(start, start + len(places))
            q = firsts.index_select(1, rows).view(heads, len(k), most, width).transpose(0, 1)
            bias = partial(self._bias, i, rows.view(-1, most))
            result = weighed(q, k, v, dropout, scaling, bias)
            outputs.append(result.transpose(1, 2).flatten(0, 1).index_select(0, places))
            start += len(places)
        output = torch.cat(outputs)
        return output.new_zeros(packed, heads, width).index_copy(0, self.sorted_firsts, output)[None]

    def _bias(self, group: int, queries: Tensor, dtype: torch.dtype) -> Tensor | None:
        key = group, dtype, self.firsts_only
        if key not in self._biases:
            owners = self.groups[group][1]
            self._biases[key] = bias_of(queries, owners, dtype, self.causal and not self.firsts_only)
        return self._biases[key]


def weighed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    scaling: float | None,
    bias: Callable[[torch.dtype], Tensor | None],
    is_causal: bool = False,
) -> Tensor:
    """Compute attention in bins: q has shape (bins, heads, n, width), k and v (bins, heads, length, width).

    `bias` returns the values to add to the scores, or None. With `is_causal` SDPA needs no bias.
    """
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    if not dropout and (q.dtype != torch.bfloat16 or k.shape[2] > WRITTEN_OUT):
        mask = None if is_causal else bias(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scaling)
    scores = (q * scaling) @ k.transpose(-1, -2)
    if k.shape[2] <= EXACT:
        scores = scores.float()
    mask = bias(q.dtype)
    if mask is not None:
        scores += mask
    weights = scores.softmax(-1).to(q.dtype)
    return (quick_dropout(weights, dropout) if dropout else weights) @ v


def bias_of(queries: Tensor, keys: Tensor, dtype: torch.dtype, causal: bool = False) -> Tensor | None:
    """Return the attention bias (bins, 1, n, length): the least number at keys that a query does not see, else 0.

    `queries` and `keys` hold row numbers. Returns None if each query sees each key, as in blocks without padding.
    """
    hidden = queries[:, :, None] != keys[:, None]
    if causal:
        hidden |= torch.ones(hidden.shape[1:], dtype=torch.bool).triu_(1)
    if not hidden.any():
        return None
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)[:, None]


def packed_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Compute attention by the packed batch in place of the mask, or by SDPA with a mask or none."""
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        return attention_mask.attend(query, key, value, dropout, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _mask(mask_function, attention_mask: Tensor | None = None, **kwargs) -> PackedBatch | None:
    if mask_function not in (bidirectional_mask_function, causal_mask_function):
        raise NotImplementedError("attention over part of the row")
    causal = mask_function is causal_mask_function
    return None if attention_mask is None else PackedBatch(attention_mask.bool(), causal)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", _mask)


def packed_batch(args: tuple, kwargs: dict) -> PackedBatch | None:
    """Return the `PackedBatch` among the arguments of a module; None in a padded batch."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, PackedBatch)), None)


def pack_input(layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
    """Pack the input of the first layer: a forward pre-hook."""
    batch = packed_batch(args, kwargs)
    return None if batch is None else ((batch.pack(args[0]), *args[1:]), kwargs)


def unpack_output(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> Tensor | tuple:
    """Unpack the output of the last layer: a forward hook."""
    batch = packed_batch(args, kwargs)
    if batch is None:
        return output
    return batch.unpack(output) if isinstance(output, Tensor) else (batch.unpack(output[0]), *output[1:])


def model_types(model: PreTrainedModel) -> set[str]:
    """Return the model type of `model`, and those of the two sides of a warm-started encoder-decoder."""
    config = model.config
    sides = (config.encoder, config.decoder) if config.model_type == "encoder-decoder" else ()
    return {config.model_type, *(side.model_type for side in sides)}


def untested(model: nn.Module, tested: frozenset[str]) -> str | None:
    """Return why `model` is not one of the `tested` model types with a head of transformers; None if it is."""
    if not isinstance(model, PreTrainedModel) or not type(model).__module__.startswith("transformers."):
        return f"not tested with {type(model).__name__}"
    unknown = sorted(model_types(model) - tested)
    return f"not tested with {', '.join(unknown)}" if unknown else None


def leave_out_padding(model: nn.Module) -> str | None:
    """Let the layers of an encoder or decoder compute real tokens only.

    Attention goes through `PackedBatch.attend`. The first layer packs its input and the last layer unpacks its output,
    so that embeddings and head see padded batches. On a test batch the output must agree with the plain model at every
    real token; otherwise the model is left unchanged.

    Returns:
        Why the layers compute padding; None if they compute real tokens only.
    """
    reason = untested(model, PADDING_FREE)
    if reason is not None or leaves_out_padding(model):  # an earlier trainer of this model changed it
        return reason
    assert isinstance(model, PreTrainedModel)  # `untested` gives a reason for others
    if set(getattr(model.config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "attention covers only part of the row"
    if getattr(model.config, "layerdrop", 0.0):
        return "layerdrop leaves out layers"
    reason = _differs(model)
    if reason is None:
        _pack_layers(model)
    return reason


def _pack_layers(model: PreTrainedModel) -> None:
    depth = model.config.num_hidden_layers
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    layers[0].register_forward_pre_hook(pack_input, with_kwargs=True)
    layers[-1].register_forward_hook(unpack_output, with_kwargs=True)
    with quiet():
        model.set_attn_implementation("packed")


def _differs(model: PreTrainedModel) -> str | None:
    """Return why the layers must compute padding, from a trial on a test batch; None if the outputs agree."""
    ids = torch.randint(0, model.config.vocab_size, (3, 13), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(13) < torch.tensor([[5], [13], [2]])).long()
    try:
        with trial(model):
            expected = model.base_model(input_ids=ids, attention_mask=mask)[0][mask.bool()]
            _pack_layers(model)
            output = model.base_model(input_ids=ids, attention_mask=mask)[0][mask.bool()]
    except FAILURES as error:
        return f"fails on a test batch: {one_line(error)[:100]}"
    return None if torch.allclose(output, expected, rtol=1e-3, atol=1e-4) else "results differ on a test batch"


def leaves_out_padding(model: nn.Module) -> bool:
    """Return whether `leave_out_padding` has changed this model, with or without LoRA."""
    return transformer_of(model).config._attn_implementation == "packed"
