"""Let a classifier read the mean of all tokens, as its encoder was trained, in the plain class of transformers."""

import copy
from typing import cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from common.args import ClassifierArguments
from common.errors import InputError, tell
from common.models.load import LoadedModel, resolve_model, trained_pooling
from common.models.structure import (
    Layer,
    has_pooling_layer,
    layer_names,
    pooling_names,
    set_dropout,
    transformer_of,
    watch,
)
from common.models.trial import FAILURES, trial

#: weight of the mean in a pooling layer; its first token also enters, with weight 1
MEAN_WEIGHT = 30.0
#: least cosine similarity of a pooling layer's output and the mean
LEAST_SIMILARITY = 0.99


def pool_mean(model: PreTrainedModel) -> str | None:
    """Let the head of a sequence classifier read the mean of all tokens instead of the first token.

    ModernBERT's head has a setting for this. Other encoders get one more layer, the pooling layer. Its attention weighs
    all tokens alike, and its other parts are the identity, so that the first token of its output is the normalised mean
    of the last layer's outputs. The saved model loads with its plain class. The layer is never trained.

    Returns:
        Why the head still reads the first token; None if it reads the mean.
    """
    config = model.config
    if hasattr(config, "classifier_pooling"):
        config.classifier_pooling = "mean"
        return None
    if has_pooling_layer(model):
        return None
    layers = watch(model)
    if len(layers) != len(layer_names(model)) or not layers[-1].query or not layers[-1].attention_output:
        return f"the layers of a {config.model_type} model share weights or compute attention in their own way"
    stack = model.get_submodule(layers[-1].name.rpartition(".")[0])
    assert isinstance(stack, nn.ModuleList)
    stack.append(_pooling_layer(stack[-1], layers[-1], config))
    config.num_hidden_layers, config.pooling_layer = config.num_hidden_layers + 1, True
    if _averages(model):
        return None
    del stack[-1], config.pooling_layer
    config.num_hidden_layers -= 1
    return f"the attention of a {config.model_type} model cannot weigh all tokens alike"


def pool(loaded: LoadedModel, args: ClassifierArguments) -> None:
    """Choose which outputs of the encoder the head of a sequence classifier reads.

    Args:
        loaded: the classifier.
        args: name its checkpoint; `pooling` is "mean" of all tokens; "first": what the class reads, in most the first
            token; "auto": as the encoder was trained, if sentence-transformers or a run of this project that began
            with such an encoder trained it, otherwise "first".

    Raises:
        InputError: the model cannot read what is asked for.
    """
    model, asked = cast(PreTrainedModel, loaded.model), args.pooling
    wanted = trained_pooling(resolve_model(args.model_name_or_path, args.model_revision)) if asked == "auto" else asked
    if wanted == "first" and has_pooling_layer(model):
        raise InputError(f"--pooling first: {args.model_name_or_path} was trained with --pooling mean; leave it out")
    if wanted is not None:
        model.config.trained_pooling = wanted
    if wanted != "mean":
        return
    reason = pool_mean(model)
    if reason and asked == "mean":
        raise InputError(f"--pooling mean: {reason}; give --pooling first")
    if reason:
        tell(f"pooling: the first token, although the encoder was trained for the mean of all: {reason}")
    else:
        how = ", as the encoder was trained" if asked == "auto" else ""
        tell(f"pooling: the mean of all tokens{how} (--pooling first: the first token)")


def fix_pooling(model: nn.Module) -> None:
    """Exclude the pooling layer of `model`, if it has one, from training and dropout."""
    names = set(pooling_names(model))
    for name, weight in model.named_parameters():
        if name in names:
            weight.requires_grad_(False)
    if names:
        set_dropout(model.get_submodule(layer_names(model, pooling=True)[-1]), 0.0)


def _pooling_layer(layer: nn.Module, parts: Layer, config: PretrainedConfig) -> nn.Module:
    """Return a copy of a layer that adds `MEAN_WEIGHT` times the mean of all tokens, and normalises."""
    pooling = copy.deepcopy(layer, {id(config): config})  # the layers share their configuration
    identity = {name.removeprefix(f"{parts.name}."): MEAN_WEIGHT for name in parts.value}
    identity |= {name.removeprefix(f"{parts.name}."): 1.0 for name in parts.attention_output}
    with torch.no_grad():
        for name, module in pooling.named_modules():
            weights = dict(module.named_parameters(recurse=False))
            for weight in weights.values():
                weight.zero_()
            if "Norm" in type(module).__name__:
                module.weight.fill_(1.0)
            elif name in identity and weights["weight"].shape[0] == weights["weight"].shape[1]:
                weights["weight"].fill_diagonal_(identity[name])
    return pooling


def _averages(model: PreTrainedModel) -> bool:
    """Return whether the first token of the last layer is the mean of the outputs of the layer before it."""
    ids = torch.randint(3, model.config.vocab_size, (3, 13), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(13) < torch.tensor([[5], [13], [7]])).long()
    try:
        with trial(model):
            states = transformer_of(model)(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), output_hidden_states=True
            ).hidden_states
    except FAILURES:
        return False
    weights = mask.to(model.device)[..., None] / mask.sum(1).to(model.device)[:, None, None]
    mean = (states[-2] * weights).sum(1)
    return bool((torch.cosine_similarity(states[-1][:, 0], mean) > LEAST_SIMILARITY).all())
