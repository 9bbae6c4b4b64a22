"""The parts of a model, found from how it is built and what it runs, not from names: layers, projections, head.

Depth runs from 0, the embeddings, over 1 to n, the layers (of an encoder-decoder those of the encoder first), to n + 1,
the head.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.pytorch_utils import Conv1D

from common.errors import InputError, quiet

LINEAR = (nn.Linear, Conv1D)


@dataclass
class Layer:
    """A layer and the names of its linear maps by what they do, as far as that could be seen.

    Of a layer with several attentions, to itself and to an encoder, those of all. Where one map makes queries, keys and
    values together it stands under all three.
    """

    name: str
    #: modules that call the attention kernel
    attention: list[str] = field(default_factory=list)
    query: list[str] = field(default_factory=list)
    key: list[str] = field(default_factory=list)
    value: list[str] = field(default_factory=list)
    #: what follows each attention
    attention_output: list[str] = field(default_factory=list)
    #: the last map of the layer, which ends its feed-forward part
    output: str | None = None
    linear: list[str] = field(default_factory=list)


def layer_names(model: nn.Module) -> list[str]:
    """List the layers of the Transformer in `model`, from input to output: its outermost module lists with weights."""
    found: list[str] = []
    inside = {id(module) for module in transformer_of(model).modules()}
    for name, module in model.named_modules():
        nested = id(module) not in inside or any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and not nested and any(True for _ in module.parameters()):
            found += [f"{name}.{i}" for i in range(len(module))]
    return found


def transformer_of(model: nn.Module) -> PreTrainedModel:
    """Return the Transformer without its head: the `base_model`, or the first one inside a module of your own.

    Raises:
        InputError: `model` contains no `PreTrainedModel`.
    """
    found = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    if found is None:
        raise InputError(f"{type(model).__name__}: contains no model of transformers; build it around one")
    return found.base_model


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the layer that scores the vocabulary; None in a model with another head."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def head_names(model: nn.Module) -> list[str]:
    """List the parameters of the head: none if the head is the input embeddings once more (tied)."""
    transformer = transformer_of(model)
    if transformer is not model:
        inside = {id(weight) for weight in transformer.parameters()}
        return [name for name, weight in model.named_parameters() if id(weight) not in inside]
    output, tied = model.get_output_embeddings(), model.get_input_embeddings().weight
    own = {id(weight) for weight in output.parameters() if weight is not tied} if output is not None else set()
    return [name for name, weight in model.named_parameters() if id(weight) in own]


def fresh_names(model: nn.Module, new_parameters: Collection[str]) -> list[str]:
    """List the parameters that every tuning method trains: the head of a task, and all `new_parameters`.

    The head of a language model is pretrained. It counts as new only if the checkpoint has none.
    """
    fresh = set(new_parameters)
    if output_embeddings(model) is None:
        fresh |= set(head_names(model))
    embeddings = transformer_of(model).get_input_embeddings().weight
    return [name for name, weight in model.named_parameters() if name in fresh and weight is not embeddings]


def depths(model: nn.Module, new_parameters: Collection[str]) -> dict[str, int]:
    """Return the depth of each parameter. One outside the layers and embeddings belongs to the layer before it."""
    layers, seen, found = layer_names(model), 0, {}
    top = set(head_names(model)) | set(fresh_names(model, new_parameters))
    for name, _ in model.named_parameters():
        at = next((i for i, layer in enumerate(layers, 1) if name.startswith(f"{layer}.")), None)
        seen = seen if at is None else at
        found[name] = len(layers) + 1 if name in top else at or (0 if "embed" in name else seen)
    return found


def norm_names(model: nn.Module) -> list[str]:
    """Parameters of layer normalisations, of whatever kind (LayerNorm, T5's, RMSNorm)."""
    norms = [n for n, m in model.named_modules() if type(m).__name__.endswith(("Norm", "LayerNorm")) and n]
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in norms]


def bias_names(model: nn.Module) -> list[str]:
    """Bias terms of the model."""
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]


#: what ran while `watch` looked, in order: ("linear", name), ("attention", its module), ("layer", name)
_seen: list[tuple[str, Any]] = []


def _watched(module, query, key, value, attention_mask, **kwargs):
    _seen.append(("attention", module))
    kwargs = {name: value for name, value in kwargs.items() if name in ("scaling", "is_causal")}  # it only has to run
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("watched", _watched)
AttentionMaskInterface.register("watched", sdpa_mask)


def watch(model: nn.Module) -> list[Layer]:
    """Run `model` on a few sub-tokens and see which linear maps it calls in which layer, before and after attention.

    Attention that does not go through transformers' `AttentionInterface` cannot be seen; `query` and its like are empty
    then.
    """
    layers, names = layer_names(model), {id(module): name for name, module in model.named_modules()}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, LINEAR):
            hooks.append(module.register_forward_hook(lambda *_, n=name: _seen.append(("linear", n))))
        if name in layers:
            hooks.append(module.register_forward_hook(lambda *_, n=name: _seen.append(("layer", n))))
    _seen.clear()
    try:
        _run(model, "watched")
    finally:
        for hook in hooks:
            hook.remove()
    events = list(_seen)
    found: dict[str, Layer] = {}
    started = 0
    for i, (kind, name) in enumerate(events):
        if kind == "layer" and name not in found:
            found[name] = _read(Layer(name), [e for e in events[started:i] if e[0] != "layer"], names)
        started = i + 1 if kind == "layer" else started
    return [found[name] for name in layers if name in found]


@contextmanager
def attention_by(model: nn.Module, kernels: Mapping[str, str]) -> Iterator[bool]:
    """Within it each part of `model` takes, instead of its kernel of attention, that which `kernels` has for it.

    Gives whether that can be: not where a part has another kernel, attention that does not go through transformers'
    `AttentionInterface`, or no SDPA where that is what it should take. Then nothing is changed.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    can = all(part._can_set_attn_implementation() for part in parts)
    if "sdpa" in kernels.values():
        can = can and all(part._supports_sdpa for part in parts)
    configs = {id(part.config): part.config for part in parts}.values()
    before = [config._attn_implementation for config in configs]
    if not can or not kernels.keys() >= set(before):
        yield False
        return
    try:
        for config, kernel in zip(configs, before, strict=True):
            config._attn_implementation = kernels[kernel]
        yield True
    finally:
        for config, kernel in zip(configs, before, strict=True):
            config._attn_implementation = kernel


def _run(model: nn.Module, attention: str | None = None) -> None:
    """Run the Transformer of `model` without its head on a few tokens, with this attention kernel if one is named."""
    model = transformer_of(model)
    before, training = model.config._attn_implementation, model.training
    ids = torch.ones(2, 4, dtype=torch.int64, device=model.device)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    try:
        with quiet(), torch.no_grad():
            if attention:
                model.set_attn_implementation(attention)
            model.eval()
            model(**inputs)
    finally:
        if attention:
            model.set_attn_implementation(before)
        model.train(training)


def _read(layer: Layer, events: list[tuple[str, Any]], names: dict[int, str]) -> Layer:
    layer.linear = [n for kind, n in events if kind == "linear" and n.startswith(f"{layer.name}.")]
    layer.output = layer.linear[-1] if layer.linear else None
    pending: list[str] = []
    after = False
    for kind, what in events:
        if kind == "attention":
            layer.attention.append(names[id(what)])
            inside = [n for n in pending if n.startswith(f"{names[id(what)]}.")]
            if len(inside) in (1, 3):  # queries, keys and values, in this order in all of transformers; or one for all
                layer.query.append(inside[0])
                layer.key.append(inside[len(inside) // 2])
                layer.value.append(inside[-1])
            pending, after = [], True
            continue
        if after:
            layer.attention_output.append(what)
            after = False
        else:
            pending.append(what)
    return layer


def set_dropout(model: PreTrainedModel, share: float | None, attention: float | None = None) -> None:
    """Drop `share` in every dropout of `model` while it trains; None leaves them as they are.

    Its configuration keeps its own, by which the model is fine-tuned later. Call it before matrices with a dropout of
    their own, such as LoRA's, are added. Raises `InputError` where the model has no dropout, and where `attention`, the
    value of `--attention_dropout`, contradicts.
    """
    if share is None:
        return
    if attention not in (None, share):
        raise InputError(f"--attention_dropout {attention}: --dropout {share} is of attention too; give one of them")
    found = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p, found = share, True
        for name in ("attention_dropout", "dropout", "activation_dropout"):  # some hold plain numbers
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, share)
                found = True
    if share and not found:
        raise InputError(f"--dropout: a {model.config.model_type} model has none")
