"""Run greedy and beam search of encoder-decoders without computing finished rows.

The search of transformers computes all rows of a batch until the last row ends. Here a row leaves the batch when it
ends. The beams of a row share the keys and values of their source, if a trial shows that the model allows it; in
transformers each beam has a copy. Outputs agree with transformers to rounding.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    EncoderDecoderCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers._typing import GenerativePreTrainedModel
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.utils import ModelOutput

from common.errors import one_line
from common.models.structure import attention_by, input_embeddings
from common.models.trial import FAILURES, trial

#: processors that hold the source of every row, and need finished rows too
OF_ALL_ROWS = (EncoderNoRepeatNGramLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor)
#: arguments of the model with one entry a source
OF_SOURCES = ("encoder_outputs", "attention_mask")


def shrinking_search(
    model: Any,  # `PreTrainedModel` does not declare the methods of `GenerationMixin`
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs,
) -> Tensor:
    """Search as `model.generate(..., custom_generate=shrinking_search)`.

    With one beam a row is finished when it ends. With several beams a row is finished when its worst output has a
    better score than the best beam would have if it ended now (`early_stopping=False`), as in
    `GenerationMixin._beam_search`. Other settings (sampling, no encoder-decoder cache) use the search of transformers.

    Returns:
        Tokens of shape (rows x outputs, length).
    """
    config = generation_config
    beams = config.num_beams
    if (
        config.do_sample
        or config.return_dict_in_generate
        or config._eos_token_tensor is None
        or (beams > 1 and config.early_stopping is not False)
        or not isinstance(model_kwargs.get("past_key_values"), EncoderDecoderCache)
        or any(isinstance(processor, OF_ALL_ROWS) for processor in logits_processor)
    ):
        whole = model._beam_search if beams > 1 else model._sample
        return whole(input_ids, logits_processor, stopping_criteria, config, **model_kwargs)
    shares = beams > 1 and why_not_shared(model) is None
    with attention_by(model.get_decoder(), SHARED) if shares else nullcontext(False) as shared:
        return _search(model, input_ids, logits_processor, stopping_criteria, config, model_kwargs, shared)


#: model -> kernel of its decoder -> why beams cannot share their source, from a trial; None if they can
_reasons: WeakKeyDictionary[PreTrainedModel, dict[str, str | None]] = WeakKeyDictionary()


def why_not_shared(model: PreTrainedModel) -> str | None:
    """Return why the beams of a row cannot share their source in `model`; None if they can.

    The first call for a kernel of attention compares two steps of a test batch with plain transformers. UMT5 and FSMT
    compute attention themselves although they accept another kernel.
    """
    parts = [part for part in model.get_decoder().modules() if isinstance(part, PreTrainedModel)]
    kernel = " ".join(part.config._attn_implementation for part in parts)
    reasons = _reasons.setdefault(model, {})
    if kernel not in reasons:
        reasons[kernel] = _try_shared(model)
    return reasons[kernel]


def _try_shared(model: PreTrainedModel) -> str | None:
    with attention_by(model.get_decoder(), SHARED) as supported:
        if not supported:
            return "attention by another kernel"
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, input_embeddings(model).num_embeddings, (2, 5), generator=random).to(model.device)
    targets = torch.randint(0, input_embeddings(model.get_decoder()).num_embeddings, (4, 3), generator=random)
    targets = targets.to(model.device)
    mask = (torch.arange(5, device=model.device) < torch.tensor([[5], [3]], device=model.device)).long()
    each, beams = torch.arange(2, device=model.device), torch.arange(2, device=model.device).repeat_interleave(2)

    def scores(sources: Tensor) -> Tensor:
        """Return the scores of two steps, where the source of each sequence is one of `sources`."""
        steps, cache = [], None
        for step in (targets[:, :2], targets[:, 2:]):
            output = model(
                encoder_outputs=type(encoded)(last_hidden_state=encoded.last_hidden_state[sources]),
                attention_mask=mask[sources],
                decoder_input_ids=step,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            steps.append(output.logits)
        return torch.cat(steps, 1)

    try:
        with trial(model):
            encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
            expected = scores(beams)
            with attention_by(model.get_decoder(), SHARED):
                agree = torch.allclose(scores(each), expected, rtol=1e-3, atol=1e-4)
    except FAILURES as error:
        return f"fails on a test batch: {one_line(error)[:100]}"
    return None if agree else "results differ on a test batch"


def _search(
    model: GenerativePreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    shared: bool,
) -> Tensor:
    """Search without finished rows. With `shared` the beams of a row share one source."""
    beams, device = config.num_beams, input_ids.device
    rows, prompt = len(input_ids) // beams, input_ids.shape[1]
    each = torch.arange(beams, device=device)
    penalty = config.length_penalty if beams > 1 else 0.0
    # every beam may end with every end token, and as many beams must remain
    assert config._eos_token_tensor is not None
    candidates = beams * (1 + config._eos_token_tensor.numel()) if beams > 1 else 1
    live = torch.arange(rows, device=device)
    sequences = input_ids.view(rows, beams, prompt)
    scores = torch.zeros(rows, beams, device=device)
    scores[:, 1:] = -torch.inf  # the beams are equal at first: only one continues
    ended, ended_scores = torch.full_like(sequences, -1), torch.full_like(scores, -torch.inf)
    results = input_ids.new_full((rows, config.num_return_sequences, config.max_length), -1)
    if shared:
        model_kwargs = _select_rows(model_kwargs, torch.arange(len(input_ids), device=device), live * beams)
    outputs = model._prefill(input_ids, config, model_kwargs)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=True)
        logits = outputs.logits[:, -1].float()
        # processors take logits in greedy search, and log-probabilities in beam search
        logits = logits if beams == 1 else logits.log_softmax(-1)
        logits = logits_processor(sequences.flatten(0, 1), logits)  # type: ignore[arg-type]  # see `_select_rows`
        vocabulary = logits.shape[-1]
        totals = (scores[:, :, None] + logits.view(len(live), beams, -1)).flatten(1)
        # greedy search takes the first of equal scores
        best, place = totals.max(1, keepdim=True) if beams == 1 else totals.topk(candidates)
        beam, token = place // vocabulary, place % vocabulary
        tried = torch.cat([_gather(sequences, beam), token[..., None]], dim=2)
        ends = stopping_criteria(tried.flatten(0, 1), None).view(len(live), candidates)

        length = tried.shape[2] - prompt
        final = (best / length**penalty).masked_fill(~ends, -torch.inf)
        ended = torch.cat([F.pad(ended, (0, 1), value=-1), tried[:, :beams]], dim=1)
        ended_scores, chosen = torch.cat([ended_scores, final[:, :beams]], dim=1).topk(beams)
        ended = _gather(ended, chosen)
        scores, chosen = best.masked_fill(ends, -torch.inf).topk(beams)
        sequences, beam = _gather(tried, chosen), beam.gather(1, chosen)

        worst = ended_scores[:, -1]
        if beams == 1:  # scores of different lengths are not compared
            done = worst > -torch.inf
            scores = torch.zeros_like(scores)
        else:
            done = scores[:, 0] / length**penalty <= worst
        done |= ends.all(1)
        if done.any():
            results[live[done], :, : tried.shape[2]] = ended[done, : config.num_return_sequences]
            going = (~done).nonzero()[:, 0]
            live, sequences, scores, beam, ended, ended_scores = (
                x[going] for x in (live, sequences, scores, beam, ended, ended_scores)
            )
            if not len(live):
                break
            index = (going[:, None] * beams + each).flatten()
            model_kwargs = _select_rows(model_kwargs, index, going if shared else index)
        if beams > 1:
            first = torch.arange(len(live), device=device)[:, None] * beams
            model_kwargs["past_key_values"].self_attention_cache.reorder_cache((first + beam).flatten())
        outputs = model(
            **model.prepare_inputs_for_generation(sequences.flatten(0, 1), next_sequence_length=1, **model_kwargs),
            return_dict=True,
        )
    longest = int((results != -1).any(1).any(0).sum())
    results = results[:, :, :longest].flatten(0, 1)
    assert config._pad_token_tensor is not None  # transformers takes an end token if there is none
    return results.masked_fill(results == -1, config._pad_token_tensor)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Select sequences of `x` (rows, n, length) by `index` (rows, m): (rows, m, length)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def _select_rows(model_kwargs: dict[str, Any], index: Tensor, of_sources: Tensor) -> dict[str, Any]:
    """Return the arguments of the model for the sequences in `index` and the sources in `of_sources`.

    The cache is changed in place.
    """
    kept = {}
    for name, value in model_kwargs.items():
        selected = of_sources if name in OF_SOURCES else index
        if isinstance(value, EncoderDecoderCache):
            # transformers asks for a LongTensor, a type that no function of torch returns
            value.self_attention_cache.reorder_cache(index)  # type: ignore[arg-type]
            value.cross_attention_cache.reorder_cache(of_sources)  # type: ignore[arg-type]
        elif isinstance(value, ModelOutput):
            rows = {key: x.index_select(0, selected) for key, x in value.items() if isinstance(x, Tensor)}
            value = type(value)(**value | rows)
        elif isinstance(value, Tensor):
            value = value.index_select(0, selected)
        kept[name] = value
    return kept


def _attention(kernel: Callable | None, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, **kwargs):
    """Compute attention where sequences may share the keys and values of their source.

    Queries have shape (sequences, heads, n, width), keys and values (sources, heads, length, width). `kernel` None is
    the eager kernel of the model. Mask and position bias are equal for all queries of a source, because a target
    attends to the whole source.
    """
    kernel = kernel or sys.modules[type(module).__module__].eager_attention_forward
    sequences, heads, n, width = query.shape
    sources = len(key)
    if sources == sequences:
        return kernel(module, query, key, value, mask, **kwargs)
    query = query.view(sources, -1, heads, n, width).transpose(1, 2).reshape(sources, heads, -1, width)
    mask = None if mask is None else mask[:, :, :1]
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = kwargs["position_bias"][:, :, :1]
    output, weights = kernel(module, query, key, value, mask, **kwargs | {"is_causal": False})
    return output.reshape(sequences, n, heads, width), weights


#: kernels of attention -> their names where beams share a source
SHARED = {"eager": "eager_shared", "sdpa": "sdpa_shared"}
for _name, _kernel, _mask in (("eager", None, eager_mask), ("sdpa", sdpa_attention_forward, sdpa_mask)):
    AttentionInterface.register(SHARED[_name], partial(_attention, _kernel))
    AttentionMaskInterface.register(SHARED[_name], _mask)
