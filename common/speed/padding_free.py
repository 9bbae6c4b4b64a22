"""Layers that compute the real sub-tokens of a batch only, as a CPU is quicker for: no padding, and attention in bins.

What is computed agrees with the padded model to rounding, which is checked on each model before it is used.
`tests/benchmarks/NOTES.md` has the gains.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function

from common.errors import quiet
from common.models.structure import attention_by, layer_names, watch
from common.speed.dropout import quick_dropout

#: rows of up to so many sub-tokens lie end to end in bins of this length, which attention takes one by one
BIN = 64
#: and so many scores a head at a time: those of 12 heads, their gradients and dropout stay in the cache then
SCORES_TOGETHER = 2**17
#: up to this many sub-tokens attention in bfloat16 is faster written out than by SDPA's kernel (`NOTES.md`)
WRITTEN_OUT = 512
#: up to this many the softmax is computed in float32, which costs little there, and its gradient is not rounded
EXACT = 128
#: each new shape of matrices costs time and memory, so that the number of sub-tokens, the length of bins and their
#: number are filled up to multiples of these
TOKEN_MULTIPLE, LENGTH_MULTIPLE, BIN_MULTIPLE = 64, 32, 4

#: bins that attention takes at a time: their length on each side, and which rows lie in each, end to end
Group = tuple[tuple[int, ...], list[list[int]]]


class _Rearrange(torch.autograd.Function):
    """Rows of x by index. `back` is the way back for the gradient, in which rows from `real` on are set to 0."""

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
    """Groups of bins for rows of `lengths`, of one side each or of several, such as a source and a target.

    A bin is on each side as long as the longest row that is left, or `BIN`. Longest rows first, each goes into the
    first bin where all its sides fit (first-fit decreasing). A group has as many bins as `SCORES_TOGETHER` allows; some
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
        open_bins: list[tuple[list[int], list[int]]] = []  # which rows, and the room that is left on each side
        later = []
        for row in left:
            own = lengths[row]
            found = next((b for b in open_bins if all(map(int.__ge__, b[1], own))), None)
            if found is None and len(bins) == most:
                later.append(row)
                continue
            if found is None:
                found = [], list(sides)
                bins.append(found[0])
                open_bins.append(found)
            found[0].append(row)
            found[1][:] = map(int.__sub__, found[1], own)
            if not all(map(int.__ge__, found[1], least)):
                open_bins.remove(found)
        bins += [[] for _ in range(min(most, _multiple(BIN_MULTIPLE, len(bins))) - len(bins))]
        groups.append((sides, bins))
        left = later
    return groups


def _multiple(of: int, number: int) -> int:
    """The least multiple that is no less than `number`."""
    return -(-number // of) * of


class PackedBatch:
    """Where the sub-tokens of a padded batch lie when its padding is left out. Stands in for the attention mask.

    `mask` has shape (rows, length), True at real sub-tokens; with `causal` a sub-token attends to none after it. Three
    arrangements of vectors:
    - padded: rows x length, as the model's embeddings give and its head takes them;
    - packed: the real sub-tokens one after the other, in the order of the slots, then at least one filler. The filler's
      gradient is always 0, and so it may stand wherever a place has no sub-token;
    - slots: for attention, bins in which rows lie end to end, and see nothing of one another (`in_bins`).
    """

    def __init__(self, mask: Tensor, causal: bool = False, groups: list[Group] | None = None, side: int = 0):
        self.causal = causal
        rows, length = mask.shape
        lengths = mask.sum(1).tolist()
        #: of each group the length of its bins, and of each place in a bin the row that is there: (bins, length), where
        #: rows are numbered in the order of the packed, and -1 is none
        self.groups: list[tuple[int, Tensor]] = []
        #: of each group where the first sub-tokens of its rows stand among those of all bins, which have as many each
        self._places: list[tuple[int, Tensor]] = []
        order: list[int] = []
        starts: list[int] = []
        size = 0
        for sides, bins in in_bins([(n,) for n in lengths]) if groups is None else groups:
            owners = torch.full((len(bins), sides[side]), -1)
            most = max(map(len, bins))
            places = []
            for i, members in enumerate(bins):
                at = 0
                for k, row in enumerate(members):
                    owners[i, at : at + lengths[row]] = len(order)
                    starts.append(size + at)
                    places.append(i * most + k)
                    order.append(row)
                    at += lengths[row]
                size += sides[side]
            self.groups.append((sides[side], owners))
            self._places.append((most, torch.tensor(places)))
        order, starts = torch.tensor(order), torch.tensor(starts)
        row, column = mask[order].nonzero(as_tuple=True)
        self.real = len(row)
        packed = (self.real // TOKEN_MULTIPLE + 1) * TOKEN_MULTIPLE
        self.padded_of_packed = torch.zeros(packed, dtype=torch.int64)
        self.padded_of_packed[: self.real] = order[row] * length + column
        self.packed_of_padded = self._inverse(self.padded_of_packed, rows * length)

        lengths = mask.sum(1)[order]
        starts_of_rows = lengths.cumsum(0) - lengths
        within = torch.arange(self.real) - starts_of_rows[row]
        self.slot_of_packed = torch.zeros(packed, dtype=torch.int64)
        self.slot_of_packed[: self.real] = starts[row] + within
        self.packed_of_slot = self._inverse(self.slot_of_packed, size)
        #: the first sub-token of each row among the packed, in the order of the packed, and in that of the rows
        self.sorted_firsts = starts_of_rows.masked_fill(lengths == 0, self.real)  # of rows with none: the filler
        self.firsts = torch.empty_like(order).scatter_(0, order, self.sorted_firsts)
        #: of the last layer: which of the packed it computes, None for all; its whole input; what it attends for now
        self.chosen: Tensor | None = None
        self.whole: Tensor | None = None
        self.firsts_only = False
        self._biases: dict[tuple, Tensor | None] = {}

    def _inverse(self, index: Tensor, size: int) -> Tensor:
        inverse = torch.full((size,), self.real)
        inverse[index[: self.real]] = torch.arange(self.real)
        return inverse

    def pack(self, x: Tensor) -> Tensor:
        """(rows, length, width) -> (1, packed, width)."""
        self.shape = x.shape
        x = x.flatten(0, 1)
        return _Rearrange.apply(x, self.padded_of_packed, self.packed_of_padded, len(x))[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, packed, width) -> (rows, length, width); what stands at padding has no meaning.

        Of `chosen` sub-tokens (1, n, width) -> (n, 1, width).
        """
        if self.chosen is not None:
            return x.transpose(0, 1)
        return _Rearrange.apply(x[0], self.packed_of_padded, self.padded_of_packed, self.real).view(self.shape)

    def to_bins(self, *vectors: Tensor) -> list[Tensor]:
        """Several of (1, heads, packed, width) to one (vectors, bins, heads, length, width) for each group."""
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
        """(bins, heads, length, width) of each group to (1, packed, heads, width)."""
        heads, width = results[0].shape[1], results[0].shape[3]
        flat = torch.cat([result.transpose(1, 2).reshape(-1, heads * width) for result in results])
        flat = _Rearrange.apply(flat, self.slot_of_packed, self.packed_of_slot, len(flat))
        return flat.view(1, -1, heads, width)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
        """Attention within each row. From (1, heads, packed, width) each to (1, packed, heads, width).

        With `firsts_only` that of each row's first sub-token, and 0 elsewhere.
        """
        if self.firsts_only:
            return self._attend_firsts(query, key, value, dropout, scaling)
        results = []
        for i, (q, k, v) in enumerate(self.to_bins(query, key, value)):
            alone = self._places[i][0] == 1  # a row a bin: what is padding comes after all that is real
            bias = partial(self._bias, i, self.groups[i][1])
            results.append(_weighed(q, k, v, dropout, scaling, bias, is_causal=self.causal and alone))
        return self.from_bins(results)

    def _attend_firsts(
        self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None
    ) -> Tensor:
        _, heads, packed, width = query.shape
        firsts = query[0].index_select(1, self.sorted_firsts)  # (heads, rows, width)
        found, begun = [], 0
        for i, (k, v) in enumerate(self.to_bins(key, value)):
            most, places = self._places[i]
            # a bin with fewer rows has the first one of its group in their place
            rows = torch.full((len(k) * most,), begun)
            rows[places] = torch.arange(begun, begun + len(places))
            q = firsts.index_select(1, rows).view(heads, len(k), most, width).transpose(0, 1)
            bias = partial(self._bias, i, rows.view(-1, most))
            result = _weighed(q, k, v, dropout, scaling, bias)
            found.append(result.transpose(1, 2).flatten(0, 1).index_select(0, places))
            begun += len(places)
        found = torch.cat(found)
        return found.new_zeros(packed, heads, width).index_copy(0, self.sorted_firsts, found)[None]

    def _bias(self, group: int, queries: Tensor, dtype: torch.dtype) -> Tensor | None:
        key = group, dtype, self.firsts_only
        if key not in self._biases:
            owners = self.groups[group][1]
            self._biases[key] = _bias_of(queries, owners, dtype, self.causal and not self.firsts_only)
        return self._biases[key]


class PackedPairs:
    """Where sources and targets of an encoder-decoder lie when their padding is left out: the same rows in each bin.

    Stands in for the mask of attention from targets to sources. `source` and `target` have shape (rows, length), True
    at real sub-tokens.
    """

    def __init__(self, source: Tensor, target: Tensor):
        groups = in_bins(list(zip(source.sum(1).tolist(), target.sum(1).tolist(), strict=True)))
        self.source = PackedBatch(source, groups=groups, side=0)
        self.target = PackedBatch(target, causal=True, groups=groups, side=1)
        self._biases: dict[tuple[int, torch.dtype], Tensor | None] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
        """Attention of each row's target to its source, as `PackedBatch.attend`: (1, packed targets, heads, width)."""
        results = []
        sides = zip(self.target.to_bins(query), self.source.to_bins(key, value), strict=True)
        for i, ((q,), (k, v)) in enumerate(sides):
            results.append(_weighed(q, k, v, dropout, scaling, partial(self._bias, i)))
        return self.target.from_bins(results)

    def _bias(self, group: int, dtype: torch.dtype) -> Tensor | None:
        key = group, dtype
        if key not in self._biases:
            self._biases[key] = _bias_of(self.target.groups[group][1], self.source.groups[group][1], dtype)
        return self._biases[key]


def _weighed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float,
    scaling: float | None,
    bias: Callable[[torch.dtype], Tensor | None],
    is_causal: bool = False,
) -> Tensor:
    """Attention in bins: q of shape (bins, heads, n, width), k and v of (bins, heads, length, width).

    `bias` gives what is added to the scores, if anything. With `is_causal` a kernel that knows what comes after a place
    needs none.
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


def _bias_of(queries: Tensor, keys: Tensor, dtype: torch.dtype, causal: bool = False) -> Tensor | None:
    """The least number where a query does not see a key, else 0: of the rows that they are of, (bins, 1, n, length).

    None where each query sees each key, as in blocks of text without padding.
    """
    hidden = queries[:, :, None] != keys[:, None]
    if causal:
        hidden |= torch.ones(hidden.shape[1:], dtype=torch.bool).triu_(1)
    if not hidden.any():
        return None
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)[:, None]


def _attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    if isinstance(attention_mask, PackedBatch | PackedPairs):
        return attention_mask.attend(query, key, value, dropout, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _mask(mask_function, attention_mask: Tensor | None = None, **kwargs) -> PackedBatch | None:
    if mask_function not in (bidirectional_mask_function, causal_mask_function):
        raise NotImplementedError("attention over part of the row")
    causal = mask_function is causal_mask_function
    return None if attention_mask is None else PackedBatch(attention_mask.bool(), causal)


AttentionInterface.register("packed", _attention)
AttentionMaskInterface.register("packed", _mask)


def _batch(args: tuple, kwargs: dict) -> PackedBatch | None:
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, PackedBatch)), None)


def _pack(layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
    batch = _batch(args, kwargs)
    return None if batch is None else ((batch.pack(args[0]), *args[1:]), kwargs)


def _unpack(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> Tensor | tuple:
    batch = _batch(args, kwargs)
    if batch is None:
        return output
    return batch.unpack(output) if isinstance(output, Tensor) else (batch.unpack(output[0]), *output[1:])


def leave_out_padding(model: PreTrainedModel) -> bool:
    """Let the layers of an encoder or decoder compute real sub-tokens only. Returns whether this model can.

    Attention goes through `PackedBatch.attend`, the first layer packs its input and the last unpacks its output, so
    that embeddings and head see what they always do. Where the head reads the first sub-token of each row alone, as
    BERT's classifier does, the last layer computes only that, and gives the head rows of one sub-token. Each is used
    only where a test batch gives the same as before: the layers at every real sub-token, the head for every row; else
    the model is left as it was.
    """
    depth = getattr(model.config, "num_hidden_layers", None)
    layers = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(layers) != 1 or model.config.is_encoder_decoder:
        return False
    before, training = model.config._attn_implementation, model.training
    ids = torch.randint(0, model.config.vocab_size, (3, 13), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(13) < torch.tensor([[5], [13], [2]])).long()
    model.eval()
    with torch.no_grad():
        expected = model.base_model(input_ids=ids, attention_mask=mask)[0]
    hooks = [
        layers[0][0].register_forward_pre_hook(_pack, with_kwargs=True),
        layers[0][-1].register_forward_hook(_unpack, with_kwargs=True),
    ]
    try:
        with quiet():
            model.set_attn_implementation("packed")
        with torch.no_grad():
            found = model.base_model(input_ids=ids, attention_mask=mask)[0]
        same = leaves_out_padding(model) and torch.allclose(
            found[mask.bool()], expected[mask.bool()], rtol=1e-3, atol=1e-4
        )
    except Exception:  # whatever it is, this architecture cannot
        same = False
    if same:
        compute_chosen_only(model, _firsts_of, lambda: [model(input_ids=ids, attention_mask=mask)[0]])
    else:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)
    model.train(training)
    return same


def _firsts_of(batch: PackedBatch) -> Tensor:
    return batch.firsts


def compute_chosen_only(
    model: PreTrainedModel, choose: Callable[[PackedBatch], Tensor | None], run: Callable[[], list[Tensor]]
) -> None:
    """Let the last layer of a packed model compute only the sub-tokens that the head reads. Keys and values are of all.

    `choose` gives their places among the packed, None for all. The head then gets them as rows of one sub-token, of
    shape (n, 1, width). Used only where `run`, what the model makes of a test batch, gives the same as before.
    """
    hooks: list[RemovableHandle] = []
    training = model.training
    model.eval()
    try:
        part = watch(model)[-1]
        layer = model.get_submodule(part.name)
        attention = model.get_submodule(part.attention[-1])
        with torch.no_grad():
            expected = run()
            hooks = [
                layer.register_forward_pre_hook(partial(_take_chosen, choose), with_kwargs=True),
                attention.register_forward_pre_hook(_attend_to_whole, with_kwargs=True),
                attention.register_forward_hook(_keep_chosen, with_kwargs=True),
            ]
            same = all(
                one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)
                for one, other in zip(expected, run(), strict=True)
            )
    except Exception:  # attention cannot be seen, or the head reads other sub-tokens
        same = False
    if not same:
        for hook in hooks:
            hook.remove()
    model.train(training)


def _take_chosen(
    choose: Callable[[PackedBatch], Tensor | None], layer: nn.Module, args: tuple, kwargs: dict
) -> tuple | None:
    batch = _batch(args, kwargs)
    if batch is None:
        return None
    batch.chosen = choose(batch)
    if batch.chosen is None:
        return None
    batch.whole = args[0]
    return (args[0].index_select(1, batch.chosen), *args[1:]), kwargs


# Where activations are checkpointed, the attention runs again in the backward pass, but no hook of the layer: so the
# batch keeps the whole input.


def _attend_to_whole(attention: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
    batch = _batch(args, kwargs)
    if batch is None or batch.chosen is None:
        return None
    batch.firsts_only = batch.chosen is batch.firsts
    return (batch.whole, *args[1:]), kwargs


def _keep_chosen(attention: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple:
    batch = _batch(args, kwargs)
    if batch is None or batch.chosen is None:
        return output
    batch.firsts_only = False
    return output[0].index_select(1, batch.chosen), *output[1:]


def leaves_out_padding(model: nn.Module) -> bool:
    """Whether `leave_out_padding` has changed this model, under LoRA or not."""
    return model.config._attn_implementation == "packed"


class UnpaddedPairs:
    """Lets the layers of an encoder-decoder compute real sub-tokens only: of sources, of targets, and between them.

    `works` tells whether a test batch then gives the scores that it gave before, and so whether `at` may be used.
    Outside of it the model is as it was, and generates as ever.
    """

    #: the one whose batch is being computed, which the kernel's function for masks asks
    current: "UnpaddedPairs | None" = None

    def __init__(self, model: PreTrainedModel):
        self._pairs: PackedPairs | None = None
        self._sources: tuple[Tensor, Tensor] | None = None  # what the decoder is given, padded and packed
        self._model = model
        self._hooks: list[RemovableHandle] = []
        training = model.training
        model.eval()
        try:
            self._sides = model.get_encoder(), model.get_decoder()
            self._hook(*self._sides)
            self.works = self._gives_the_same(model)
        except Exception:  # whatever it is, this architecture cannot
            self.works = False
        model.train(training)
        if not self.works:
            for hook in self._hooks:
                hook.remove()

    def _hook(self, encoder: nn.Module, decoder: nn.Module) -> None:
        sources, targets = ([part.get_submodule(n) for n in layer_names(part)] for part in (encoder, decoder))
        self._hooks = [
            sources[0].register_forward_pre_hook(_pack, with_kwargs=True),
            sources[-1].register_forward_hook(_unpack, with_kwargs=True),
            decoder.register_forward_pre_hook(self._begin_decoder, with_kwargs=True),
            targets[0].register_forward_pre_hook(_pack, with_kwargs=True),
            targets[-1].register_forward_hook(_unpack, with_kwargs=True),
            *(layer.register_forward_pre_hook(self._give_sources, with_kwargs=True) for layer in targets),
        ]

    @contextmanager
    def at(self, attention_mask: Tensor, labels: Tensor) -> Iterator[None]:
        """Within it the model takes sources of this mask and targets of these labels, of shape (rows, length) each.

        Where steps leave layers out (layerdrop), which may be the first or the last, it computes padding as well.
        """
        if any(getattr(part, "layerdrop", 0.0) for part in self._sides):
            yield
            return
        real = (labels != -100).flip(1).cumsum(1).flip(1) > 0  # up to the last label of a row
        self._pairs = PackedPairs(attention_mask.bool(), real)
        UnpaddedPairs.current = self
        try:
            with attention_by(self._model, {"eager": "packed_pairs", "sdpa": "packed_pairs"}) as can:
                if not can:
                    raise NotImplementedError("attention by another kernel")
                yield
        finally:
            UnpaddedPairs.current = self._pairs = self._sources = None

    def _begin_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._pairs is not None:
            padded = kwargs["encoder_hidden_states"]
            self._sources = padded, self._pairs.source.pack(padded)

    def _give_sources(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if self._sources is None:
            return None
        padded, packed = self._sources
        return (
            tuple(packed if x is padded else x for x in args),
            {name: packed if x is padded else x for name, x in kwargs.items()},
        )

    def mask(self, mask_function: Callable) -> PackedBatch | PackedPairs:
        if self._sources is None and mask_function is bidirectional_mask_function:
            return self._pairs.source
        if self._sources is not None and mask_function is causal_mask_function:
            return self._pairs.target
        if mask_function is bidirectional_mask_function:
            return self._pairs
        raise NotImplementedError("attention over part of the row")

    def _gives_the_same(self, model: PreTrainedModel) -> bool:
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.get_input_embeddings().num_embeddings, (2, 4, 13), generator=random)
        places = torch.arange(13)
        mask = (places < torch.tensor([[5], [13], [2], [9]])).long()
        labels = ids[1].masked_fill(places >= torch.tensor([[7], [1], [13], [4]]), -100)
        inputs = {"input_ids": ids[0], "attention_mask": mask, "decoder_input_ids": ids[1], "use_cache": False}
        with torch.no_grad():
            expected = model(**inputs).logits
            with self.at(mask, labels):
                found = model(**inputs).logits
        return torch.allclose(found[labels != -100], expected[labels != -100], rtol=1e-3, atol=1e-4)


def _pairs_mask(mask_function, **kwargs) -> PackedBatch | PackedPairs:
    return UnpaddedPairs.current.mask(mask_function)


AttentionInterface.register("packed_pairs", _attention)
AttentionMaskInterface.register("packed_pairs", _pairs_mask)
