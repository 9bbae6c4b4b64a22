"""Compute the layers of an encoder-decoder at the real tokens of a training batch only, on a CPU.

Sources and targets of a row lie in corresponding bins (`common.speed.padding_free`). Results agree with the padded
model to rounding. `tests/benchmarks/LOG.md` has the gains.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from common.errors import one_line
from common.models.structure import attention_by, input_embeddings, layer_names
from common.models.trial import FAILURES, trial
from common.speed.padding_free import (
    PackedBatch,
    bias_of,
    in_bins,
    pack_input,
    packed_attention,
    unpack_output,
    untested,
    weighed,
)

#: model types whose training may leave out padding on both sides; a test compares each with plain transformers
PADDING_FREE = frozenset({"bart", "bert", "encoder-decoder", "m2m_100", "marian", "mbart", "pegasus"})
#: kernels of attention that `packed_pairs` may replace
KERNELS = {"eager": "packed_pairs", "sdpa": "packed_pairs"}


class PackedPairs:
    """The positions of the sources and targets of a batch without padding, with equal rows in the bins of both sides.

    It replaces the mask of attention from targets to sources. `source` and `target` have shape (rows, length), True at
    real tokens.
    """

    def __init__(self, source: Tensor, target: Tensor):
        groups = in_bins(list(zip(source.sum(1).tolist(), target.sum(1).tolist(), strict=True)))
        self.source = PackedBatch(source, groups=groups, side=0)
        self.target = PackedBatch(target, causal=True, groups=groups, side=1)
        self._biases: dict[tuple[int, torch.dtype], Tensor | None] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
        """Compute attention from targets to sources, as `PackedBatch.attend`: (1, packed targets, heads, width)."""
        results = []
        sides = zip(self.target.to_bins(query), self.source.to_bins(key, value), strict=True)
        for i, ((q,), (k, v)) in enumerate(sides):
            results.append(weighed(q, k, v, dropout, scaling, partial(self._bias, i)))
        return self.target.from_bins(results)

    def _bias(self, group: int, dtype: torch.dtype) -> Tensor | None:
        key = group, dtype
        if key not in self._biases:
            self._biases[key] = bias_of(self.target.groups[group][1], self.source.groups[group][1], dtype)
        return self._biases[key]


class PaddingFreePairs:
    """Let the layers of an encoder-decoder compute real tokens only: of sources, of targets, and between them.

    Outside of `at` the model is unchanged. On a test batch the scores must agree with those of the plain model;
    otherwise the model gets no hooks.

    Attributes:
        reason: why the layers compute padding; None if `at` leaves it out.
    """

    #: the instance whose batch is being computed; the mask function reads it
    current: "PaddingFreePairs | None" = None

    def __init__(self, model: nn.Module):
        self._pairs: PackedPairs | None = None
        self._sources: tuple[Tensor, Tensor] | None = None  # encoder output, padded and packed
        self.reason = untested(model, PADDING_FREE)
        if self.reason is not None:
            return
        assert isinstance(model, PreTrainedModel)  # `untested` gives a reason for others
        self._model = model
        encoder, decoder = model.get_encoder(), model.get_decoder()
        if any(getattr(part, "layerdrop", 0.0) for part in (encoder, decoder)):
            self.reason = "layerdrop leaves out layers"
            return
        with attention_by(model, KERNELS) as supported:
            if not supported:
                self.reason = "attention by another kernel"
                return
        if pack_input in self._layers(encoder)[0]._forward_pre_hooks.values():
            self.reason = "an earlier trainer of this model leaves it out"
            return
        self.reason = self._try()
        if self.reason is None:
            self._install()

    @staticmethod
    def _layers(part: PreTrainedModel) -> list[nn.Module]:
        return [part.get_submodule(name) for name in layer_names(part)]

    def _install(self) -> None:
        encoder, decoder = self._model.get_encoder(), self._model.get_decoder()
        sources, targets = self._layers(encoder), self._layers(decoder)
        sources[0].register_forward_pre_hook(pack_input, with_kwargs=True)
        sources[-1].register_forward_hook(unpack_output, with_kwargs=True)
        decoder.register_forward_pre_hook(self._begin_decoder, with_kwargs=True)
        targets[0].register_forward_pre_hook(pack_input, with_kwargs=True)
        targets[-1].register_forward_hook(unpack_output, with_kwargs=True)
        for layer in targets:
            layer.register_forward_pre_hook(self._give_sources, with_kwargs=True)

    @contextmanager
    def at(self, attention_mask: Tensor, labels: Tensor) -> Iterator[None]:
        """Run the model without padding within a `with` block; mask of sources and labels have shape (rows, length)."""
        real = (labels != -100).flip(1).cumsum(1).flip(1) > 0  # up to the last label of a row
        self._pairs = PackedPairs(attention_mask.bool(), real)
        PaddingFreePairs.current = self
        try:
            with attention_by(self._model, KERNELS):
                yield
        finally:
            PaddingFreePairs.current = self._pairs = self._sources = None

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
        """Return the object that replaces the mask of the encoder, the decoder, or attention between them."""
        assert self._pairs is not None  # the model runs within `at`
        if self._sources is None:
            return self._pairs.source
        return self._pairs.target if mask_function is causal_mask_function else self._pairs

    def _try(self) -> str | None:
        """Return why the layers must compute padding, from a trial on a test batch; None if the scores agree."""
        random = torch.Generator().manual_seed(0)
        size = input_embeddings(self._model).num_embeddings
        ids = torch.randint(0, size, (2, 4, 13), generator=random)
        places = torch.arange(13)
        mask = (places < torch.tensor([[5], [13], [2], [9]])).long()
        labels = ids[1].masked_fill(places >= torch.tensor([[7], [1], [13], [4]]), -100)
        inputs = {"input_ids": ids[0], "attention_mask": mask, "decoder_input_ids": ids[1], "use_cache": False}
        try:
            with trial(self._model):
                expected = self._model(**inputs).logits[labels != -100]
                self._install()
                with self.at(mask, labels):
                    logits = self._model(**inputs).logits[labels != -100]
        except FAILURES as error:
            return f"fails on a test batch: {one_line(error)[:100]}"
        return None if torch.allclose(logits, expected, rtol=1e-3, atol=1e-4) else "results differ on a test batch"


def _mask(mask_function, **kwargs) -> PackedBatch | PackedPairs:
    assert PaddingFreePairs.current is not None  # the kernel is in use within `at` only
    return PaddingFreePairs.current.mask(mask_function)


AttentionInterface.register("packed_pairs", packed_attention)
AttentionMaskInterface.register("packed_pairs", _mask)
