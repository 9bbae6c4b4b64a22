"""Find the layers, projections and head of a model from its modules and forward pass, not from names.

Depth 0 is the embeddings, depths 1 to n are the layers (encoder before decoder), and depth n + 1 is the head.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.pytorch_utils import Conv1D

from common.errors import InputError
from common.models.trial import trial

LINEAR = (nn.Linear, Conv1D)


@dataclass
class Layer:
    """A layer, and the names of its linear modules by function.

    A layer with self-attention and cross-attention lists the modules of both. A module that computes query, key and
    value together appears in all three lists.

    Attributes:
        name: name of the layer.
        attention: modules that call the attention kernel.
        query: query projections.
        key: key projections.
        value: value projections.
        attention_output: linear module after each attention.
        linear: all linear modules, in order of execution.
    """

    name: str
    attention: list[str] = field(default_factory=list)
    query: list[str] = field(default_factory=list)
    key: list[str] = field(default_factory=list)
    value: list[str] = field(default_factory=list)
    attention_output: list[str] = field(default_factory=list)
    linear: list[str] = field(default_factory=list)

    @property
    def output(self) -> str:
        """Return the last linear module, the end of the feed-forward part."""
        return self.linear[-1]


#: model types whose code in transformers fails in bfloat16 at some length (BigBird: its block-sparse attention)
NEEDS_FP32 = frozenset({"big_bird"})


def check_bf16(config: PretrainedConfig, bf16: bool) -> None:
    """Raise `InputError` if a model of this configuration cannot be computed in bfloat16, as `bf16` asks."""
    if bf16 and config.model_type in NEEDS_FP32:
        raise InputError(f"--precision: a {config.model_type} model fails in bf16 on long rows; give --precision fp32")


def layer_names(model: nn.Module, pooling: bool = False) -> list[str]:
    """List the layers of the Transformer in `model`, in order: the items of outermost module lists with weights.

    Args:
        model: the model.
        pooling: also list a pooling layer (`common.models.pooling`), which is last.
    """
    names: list[str] = []
    inside = {id(module) for module in transformer_of(model).modules()}
    for name, module in model.named_modules():
        nested = id(module) not in inside or any(name.startswith(f"{other}.") for other in names)
        if isinstance(module, nn.ModuleList) and not nested and any(True for _ in module.parameters()):
            names += [f"{name}.{i}" for i in range(len(module))]
    return names[:-1] if has_pooling_layer(model) and not pooling else names


def has_pooling_layer(model: nn.Module) -> bool:
    """Return whether the last layer of `model` only pools: it is never trained (`common.models.pooling`)."""
    return getattr(transformer_of(model).config, "pooling_layer", False)


def pooling_names(model: nn.Module) -> list[str]:
    """List the parameters of the pooling layer; empty if there is none."""
    if not has_pooling_layer(model):
        return []
    layer = layer_names(model, pooling=True)[-1]
    return [name for name, _ in model.named_parameters() if name.startswith(f"{layer}.")]


def without_pooling_layer(config: PretrainedConfig) -> None:
    """Leave the pooling layer of a saved classifier out of a configuration: other heads read each token."""
    if getattr(config, "pooling_layer", False):
        config.num_hidden_layers -= 1
        del config.pooling_layer


def transformer_of(model: nn.Module) -> PreTrainedModel:
    """Return the Transformer without its head: the `base_model`, or the first one inside a custom module.

    Raises:
        InputError: `model` contains no `PreTrainedModel`.
    """
    pretrained = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    if pretrained is None:
        raise InputError(f"{type(model).__name__}: contains no PreTrainedModel of transformers; add one as a submodule")
    return cast(PreTrainedModel, pretrained.base_model)


def input_embeddings(model: PreTrainedModel) -> nn.Embedding:
    """Return the layer that embeds the tokens."""
    return cast(nn.Embedding, model.get_input_embeddings())


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the layer that scores the vocabulary; None in a model with another head."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def head_names(model: nn.Module) -> list[str]:
    """List the parameters of the head; empty if the head is tied to the input embeddings."""
    transformer = transformer_of(model)
    if transformer is not model:
        inside = {id(weight) for weight in transformer.parameters()}
        return [name for name, weight in model.named_parameters() if id(weight) not in inside]
    output, tied = transformer.get_output_embeddings(), input_embeddings(transformer).weight
    head = {id(weight) for weight in output.parameters() if weight is not tied} if output is not None else set()
    return [name for name, weight in model.named_parameters() if id(weight) in head]


def fresh_names(model: nn.Module, new_parameters: Collection[str]) -> list[str]:
    """List the parameters that every tuning method trains: the head of a task, and all `new_parameters`.

    The head of a language model is pretrained, and counts as new only if the checkpoint lacks a head.
    """
    fresh = set(new_parameters)
    if output_embeddings(model) is None:
        fresh |= set(head_names(model))
    embeddings = input_embeddings(transformer_of(model)).weight
    return [name for name, weight in model.named_parameters() if name in fresh and weight is not embeddings]


def depths(model: nn.Module, new_parameters: Collection[str]) -> dict[str, int]:
    """Return parameter -> depth. A parameter between layers has the depth of the layer before it."""
    layers, last, result = layer_names(model), 0, {}
    top = set(head_names(model)) | set(fresh_names(model, new_parameters))
    for name, _ in model.named_parameters():
        at = next((i for i, layer in enumerate(layers, 1) if name.startswith(f"{layer}.")), None)
        last = last if at is None else at
        result[name] = len(layers) + 1 if name in top else at or (0 if "embed" in name else last)
    return result


def norm_names(model: nn.Module) -> list[str]:
    """List the parameters of layer normalisations (LayerNorm, RMSNorm and variants)."""
    norms = [n for n, m in model.named_modules() if type(m).__name__.endswith(("Norm", "LayerNorm")) and n]
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in norms]


def bias_names(model: nn.Module) -> list[str]:
    """List the bias parameters of the model."""
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]


#: events of `watch`, in order of execution: ("linear", name), ("attention", module), ("layer", name)
_events: list[tuple[str, Any]] = []


def _watched(module, query, key, value, attention_mask, **kwargs):
    _events.append(("attention", module))
    kwargs = {
        name: value for name, value in kwargs.items() if name in ("scaling", "is_causal")
    }  # the result is not used
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("watched", _watched)
AttentionMaskInterface.register("watched", sdpa_mask)


def watch(model: nn.Module, pooling: bool = False) -> list[Layer]:
    """Run `model` on a few tokens and record the linear modules of each layer before and after attention.

    `pooling` also records a pooling layer.

    Attention outside the `AttentionInterface` of transformers cannot be recorded. The lists `attention`, `query`, `key`
    and `value` are empty then.
    """
    layers = layer_names(model, pooling)
    names = {id(module): name for name, module in model.named_modules()}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, LINEAR):
            hooks.append(module.register_forward_hook(lambda *_, n=name: _events.append(("linear", n))))
        if name in layers:
            hooks.append(module.register_forward_hook(lambda *_, n=name: _events.append(("layer", n))))
    _events.clear()
    try:
        _run(model, "watched")
    finally:
        for hook in hooks:
            hook.remove()
    events = list(_events)
    recorded: dict[str, Layer] = {}
    started = 0
    for i, (kind, name) in enumerate(events):
        if kind == "layer" and name not in recorded:
            recorded[name] = _sort_events(Layer(name), [e for e in events[started:i] if e[0] != "layer"], names)
        started = i + 1 if kind == "layer" else started
    return [recorded[name] for name in layers if name in recorded]


@contextmanager
def attention_by(model: nn.Module, kernels: Mapping[str, str]) -> Iterator[bool]:
    """Replace the attention kernel of each part of `model` inside the block.

    Args:
        model: the model.
        kernels: current kernel -> kernel inside the block.

    Yields:
        Whether the kernels are replaced. Nothing changes if `model` has no part with a kernel, or if a part has a
        kernel outside `kernels`, uses attention outside the `AttentionInterface` of transformers, or lacks SDPA when
        SDPA is a replacement.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    can = bool(parts) and all(part._can_set_attn_implementation() for part in parts)
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
    """Run the Transformer of `model` without its head on a few tokens, with the kernel `attention` if given."""
    model = transformer_of(model)
    ids = torch.ones(2, 4, dtype=torch.int64, device=model.device)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with trial(model):
        if attention:
            model.set_attn_implementation(attention)
        model(**inputs)


def _sort_events(layer: Layer, events: list[tuple[str, Any]], names: dict[int, str]) -> Layer:
    """Fill the lists of `layer` from the events of its forward pass; `names` maps module ids to names."""
    layer.linear = [n for kind, n in events if kind == "linear" and n.startswith(f"{layer.name}.")]
    pending: list[str] = []
    after = False
    for kind, item in events:
        if kind == "attention":
            layer.attention.append(names[id(item)])
            inside = [n for n in pending if n.startswith(f"{names[id(item)]}.")]
            if len(inside) in (1, 3):  # transformers computes query, key and value in this order, or all in one
                layer.query.append(inside[0])
                layer.key.append(inside[len(inside) // 2])
                layer.value.append(inside[-1])
            pending, after = [], True
            continue
        if after:
            layer.attention_output.append(item)
            after = False
        else:
            pending.append(item)
    return layer


def set_dropout(model: nn.Module, share: float | None, attention: float | None = None) -> None:
    """Set the rate of every dropout in `model`; None changes nothing.

    The configuration keeps its rates for later fine-tuning. Call this before adding modules with a different dropout,
    such as LoRA's.

    Args:
        model: the model.
        share: rate of dropout, from 0 to below 1.
        attention: value of `--attention_dropout`.

    Raises:
        InputError: the model has no dropout, or `attention` contradicts `share`.
    """
    if share is None:
        return
    if attention not in (None, share):
        raise InputError(f"--attention_dropout {attention}: --dropout {share} includes attention; give one of them")
    changed = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p, changed = share, True
        for name in ("attention_dropout", "dropout", "activation_dropout"):  # some modules store the rate as a number
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, share)
                changed = True
    if share and not changed:
        raise InputError(f"--dropout: a {transformer_of(model).config.model_type} model has no dropout; remove it")
