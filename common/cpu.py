"""What a CPU computes faster: layers and head on the sub-tokens that matter, and dropout from cheap random bits.

None changes what is computed: layers and head agree with the padded model to rounding, which is checked on each model
before they are used, and the dropout drops with the same probability (to 1e-5) from other random numbers.
`tests/benchmarks/NOTES.md` has the gains.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function

from common.errors import quiet
from common.layers import watch

#: rows of up to so many sub-tokens lie end to end in bins of this length, which attention takes one by one
BIN = 64
#: and so many scores a head at a time: those of 12 heads, their gradients and dropout stay in the cache then
SCORES_TOGETHER = 2**17
#: up to this many sub-tokens attention in bfloat16 is faster written out than by SDPA's kernel, which knows AMX
#: (`NOTES.md`)
WRITTEN_OUT = 256 if torch.cpu.get_capabilities().get("amx_bf16") else 512
#: labels whose scores of the vocabulary exist at a time: so many stay in the cache
LABELS_TOGETHER = 128
#: the number of sub-tokens is filled up to a multiple of this: each new matrix shape costs time and memory
TOKEN_MULTIPLE = 64


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


def _up_to_8(length: int) -> int:
    return -(-max(length, 1) // 8) * 8


def _in_bins(lengths: list[int]) -> list[tuple[int, list[list[int]]]]:
    """Groups of bins for rows of `lengths`: the length of a group's bins, and which rows lie in each, end to end.

    A bin is as long as the longest row that is left, or `BIN`. Into each goes the longest row that still fits, until
    none does (first-fit decreasing). A group has as many bins as `SCORES_TOGETHER` allows.
    """
    left = sorted(range(len(lengths)), key=lengths.__getitem__)
    sizes = [lengths[row] for row in left]
    groups = []
    while left:
        length = max(BIN, _up_to_8(sizes[-1]))
        bins: list[list[int]] = []
        while left and (not bins or (len(bins) + 1) * length**2 <= SCORES_TOGETHER):
            bins.append([])
            space = length
            while fits := bisect_right(sizes, space):
                space -= sizes.pop(fits - 1)
                bins[-1].append(left.pop(fits - 1))
        groups.append((length, bins))
    return groups


@dataclass
class _Group:
    """Bins that attention takes at a time, all of one `length`, in which rows lie end to end."""

    length: int
    bins: int
    #: of each place in a bin the row that it belongs to, -1 for none: (bins, length)
    owners: Tensor
    #: whether no bin has two rows
    alone: bool
    #: where in `sorted_firsts` the rows of each bin stand, the first one again where a bin has fewer: (bins, most rows)
    firsts: Tensor
    #: where those of the rows, in order, stand in `firsts`
    found: Tensor
    #: what is added to the scores, by their type and whether they are of first sub-tokens only; made when first needed
    biases: dict[tuple[torch.dtype, bool], Tensor] = field(default_factory=dict)

    def hidden(self, queries: Tensor | None = None, causal: bool = False) -> Tensor:
        """True where a query, of shape (bins, n) all places or the rows `queries`, does not see a key: (bins, 1, n, length)."""
        queries = self.owners if queries is None else queries
        hidden = queries[:, :, None] != self.owners[:, None]
        if causal:
            hidden |= torch.ones(self.length, self.length, dtype=torch.bool).triu_(1)
        return hidden[:, None]


class PackedBatch:
    """Where the sub-tokens of a padded batch lie when its padding is left out. Stands in for the attention mask.

    `mask` has shape (rows, length), True at real sub-tokens; with `causal` a sub-token attends to none after it. Three
    arrangements of vectors:
    - padded: rows x length, as the model's embeddings give and its head takes them;
    - packed: the real sub-tokens one after the other, in the order of the slots, then at least one filler. The filler's
      gradient is always 0, and so it may stand wherever a place has no sub-token;
    - slots: for attention, bins in which rows lie end to end, and see nothing of one another (`_in_bins`).
    """

    def __init__(self, mask: Tensor, causal: bool = False):
        self.causal = causal
        rows, length = mask.shape
        lengths = mask.sum(1).tolist()
        order: list[int] = []
        starts: list[int] = []
        self.groups: list[_Group] = []
        size = 0
        for longest, bins in _in_bins(lengths):
            most = max(map(len, bins))
            owners = torch.full((len(bins), longest), -1)
            firsts, found = [], []
            for i, members in enumerate(bins):
                firsts.append([])
                at = 0
                for row in members:
                    owners[i, at : at + lengths[row]] = len(order)
                    starts.append(size + i * longest + at)
                    found.append(i * most + len(firsts[-1]))
                    firsts[-1].append(len(order))
                    order.append(row)
                    at += lengths[row]
                firsts[-1] += firsts[-1][:1] * (most - len(members))
            size += len(bins) * longest
            self.groups.append(_Group(longest, len(bins), owners, most == 1, torch.tensor(firsts), torch.tensor(found)))
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

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
        """Attention within each row. From (1, heads, packed, width) each to (1, packed, heads, width).

        With `firsts_only` that of each row's first sub-token, and 0 elsewhere.
        """
        _, heads, packed, width = query.shape
        scaling = width**-0.5 if scaling is None else scaling
        query, key, value = (x.transpose(1, 2).reshape(packed, heads * width) for x in (query, key, value))
        flat = torch.cat([key, value] if self.firsts_only else [query, key, value], dim=-1)
        slots = _Rearrange.apply(flat, self.packed_of_slot, self.slot_of_packed, self.real)
        results = []
        for part, group in zip(slots.split([g.bins * g.length for g in self.groups]), self.groups, strict=True):
            *q, k, v = part.view(group.bins, group.length, -1, heads, width).permute(2, 0, 3, 1, 4)
            if self.firsts_only:
                at = self.sorted_firsts[group.firsts.flatten()]
                q = [query.index_select(0, at).view(group.bins, -1, heads, width).transpose(1, 2)]
            result = self._attend(group, q[0], k, v, dropout, scaling).transpose(1, 2).reshape(-1, heads * width)
            results.append(result.index_select(0, group.found) if self.firsts_only else result)
        flat = torch.cat(results)
        if self.firsts_only:
            flat = flat.new_zeros(packed, heads * width).index_copy(0, self.sorted_firsts, flat)
            return flat.view(1, packed, heads, width)
        flat = _Rearrange.apply(flat, self.slot_of_packed, self.packed_of_slot, len(flat))
        return flat.view(1, packed, heads, width)

    def _attend(self, group: _Group, q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float) -> Tensor:
        """Attention in the bins of a group: q of shape (bins, heads, n, width), k and v of (bins, heads, length, width)."""
        if not dropout and (q.dtype != torch.bfloat16 or group.length > WRITTEN_OUT):
            if self.causal and group.alone:  # what is padding comes after all that is real
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(group, q.dtype), scale=scaling)
        scores = (q * scaling) @ k.transpose(-1, -2)
        scores += self._bias(group, q.dtype)
        weights = scores.softmax(-1)
        return (quick_dropout(weights, dropout) if dropout else weights) @ v

    def _bias(self, group: _Group, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of a group: the least number where a query does not see a key, else 0."""
        key = (dtype, self.firsts_only)
        if key not in group.biases:
            hidden = group.hidden(group.firsts if self.firsts_only else None, self.causal)
            group.biases[key] = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
        return group.biases[key]


def _attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    if isinstance(attention_mask, PackedBatch):
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
        attention = model.get_submodule(part.query[-1].rpartition(".")[0])
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


def quick_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout of `x` with probability `p`, from 8 random bits an element; torch's draws a double for each.

    Of so few bits a share can only be a multiple of 1/256: each call drops one of the two beside `p`, drawn so that an
    element is dropped with probability `p`.
    """
    return _Dropout.apply(x, p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        drawn = torch.empty(x.numel() // 8 + 2, dtype=torch.int64).random_(-(2**63), None)
        dropped = min(int(p * 2**8 + int(drawn[-1] & 0xFFFF) / 2**16), 255)  # of 256
        # int8 is as good as bool, and made and read several times as fast
        keep = torch.empty(x.shape, dtype=torch.int8)
        torch.ge(drawn.view(torch.int8)[: x.numel()].view(x.shape), dropped - 2**7, out=keep)
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - p)
        return _scaled(x, keep, ctx.scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _scaled(gradient, keep, ctx.scale), None


def _scaled(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """x * keep * scale in one pass, but for the conversion."""
    return torch.addcmul(x.new_zeros(()), x, keep.to(x.dtype), value=scale)


class QuickDropout(nn.Dropout):
    """`nn.Dropout` by `quick_dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return quick_dropout(x, self.p) if self.training and 0 < self.p < 1 else super().forward(x)


def quicken_dropout(model: nn.Module) -> None:
    """Make every `nn.Dropout` in `model` a `QuickDropout`."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = QuickDropout


class QuickFunctionalDropout(TorchFunctionMode):
    """Within it `torch.nn.functional.dropout`, which BART and its kin call by themselves, is `quick_dropout`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout:
            return _functional_dropout(*args, **kwargs)
        return function(*args, **kwargs)


def _functional_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return quick_dropout(input, p) if training and 0 < p < 1 else F.dropout(input, p, training, inplace)


class HeadLosses:
    """Lets the last layer of an encoder-decoder, which scores the vocabulary, give the losses of labels instead.

    Of `LABELS_TOGETHER` labels at a time, none at padding: of all labels of a batch the scores, their logarithms and
    the gradients of both, in float32, take several times as long to write and read as to compute. `works` tells whether
    that gives the losses of a test batch that the model's scores give, and so whether `at` may be used.
    """

    def __init__(self, model: PreTrainedModel):
        self.labels: Tensor | None = None
        self.label_smoothing = 0.0
        layer = model.get_output_embeddings()
        self.works = type(layer) is nn.Linear and layer.in_features < layer.out_features
        if self.works:
            self._layer, self._scores = layer, layer.forward
            layer.forward = self._forward
            self.works = self._gives_the_same(model)
            if not self.works:
                layer.forward = self._scores

    @contextmanager
    def at(self, labels: Tensor, label_smoothing: float = 0.0) -> Iterator[None]:
        """Within it the model's logits are the losses of `labels` (rows, length), of shape (rows, length, 1)."""
        self.labels, self.label_smoothing = labels, label_smoothing
        try:
            yield
        finally:
            self.labels = None

    def _forward(self, vectors: Tensor) -> Tensor:
        if self.labels is None:
            return self._scores(vectors)
        chosen = (self.labels != -100).flatten().nonzero()[:, 0]
        labels = self.labels.flatten()[chosen]
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else vectors.dtype
        picked = vectors.flatten(0, 1).index_select(0, chosen)
        found = _HeadLosses.apply(picked, self._layer.weight, self._layer.bias, labels, self.label_smoothing, kind)
        losses = found.new_zeros(self.labels.numel()).index_copy(0, chosen, found)
        return losses.view(*self.labels.shape, 1)

    def _gives_the_same(self, model: PreTrainedModel) -> bool:
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.get_output_embeddings().out_features, (3, 2, 9), generator=random)
        labels = ids[2].masked_fill(torch.arange(9) > torch.tensor([[8], [4]]), -100)
        inputs = {"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0]), "decoder_input_ids": ids[1]}
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                scores = model(**inputs, use_cache=False).logits.flatten(0, 1)
                with self.at(labels, 0.1):
                    found = model(**inputs, use_cache=False).logits
            expected = F.cross_entropy(scores.float(), labels.flatten(), reduction="none", label_smoothing=0.1)
            return found.shape == (*labels.shape, 1) and torch.allclose(found.flatten(), expected, 1e-4, 1e-4)
        except Exception:  # whatever it is, this architecture cannot
            return False
        finally:
            model.train(training)


class _HeadLosses(torch.autograd.Function):
    """Cross-entropy of labels (n,) from vectors (n, width), the weight (classes, width) and bias of the last layer.

    Products are of type `kind`, the rest is float32. The gradients of the scores are found on the way forth, while
    these are at hand, and kept in `kind`.
    """

    @staticmethod
    def forward(
        ctx, vectors: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float, kind: torch.dtype
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            cast, turned = vectors.to(kind), weight.to(kind).t()
            gradients = torch.empty(len(labels), len(weight), dtype=kind)
            losses = []
            for start in range(0, len(labels), LABELS_TOGETHER):
                part = slice(start, start + LABELS_TOGETHER)
                scores = cast[part] @ turned
                if bias is not None:
                    scores = scores + bias.to(kind)
                logs = scores.float().log_softmax(-1)
                wanted = labels[part, None]
                own = logs.gather(1, wanted)[:, 0]
                losses.append(-(1 - smoothing) * own - smoothing * logs.mean(-1))
                logs.exp_()
                if smoothing:
                    logs.sub_(smoothing / len(weight))
                logs.scatter_add_(1, wanted, torch.full_like(wanted, smoothing - 1, dtype=logs.dtype))
                gradients[part] = logs
        ctx.save_for_backward(cast, weight, gradients)
        ctx.has_bias, ctx.kind = bias is not None, kind
        return torch.cat(losses) if losses else vectors.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        cast, weight, gradients = ctx.saved_tensors
        scale = gradient[:, None]
        of_vectors = (gradients @ weight.to(ctx.kind)).float() * scale
        scale = scale.to(ctx.kind)
        of_weight = (gradients.t() @ (cast * scale)).to(weight.dtype)
        of_bias = (gradients.t() @ scale)[:, 0].to(weight.dtype) if ctx.has_bias else None
        return of_vectors, of_weight, of_bias, None, None, None
