"""Let the models of several tasks share the weights of one encoder.

Each task keeps a whole model of transformers with its head, so that it trains, predicts and is saved as in its own
recipe. The shared weights of these models are the same tensors.
"""

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForTokenClassification, PreTrainedModel

from common.errors import InputError, quiet, tell
from common.models import LoadedModel
from common.models.load import check_head
from common.models.pooling import fix_pooling
from common.models.structure import (
    depths,
    input_embeddings,
    layer_names,
    transformer_of,
    without_pooling_layer,
)
from common.tuning import TunedModel, TuningArguments
from common.tuning.adapters import Shape, insert_adapters, is_adapter

from .arguments import SharingArguments


class SharedModel(nn.Module):
    """The models of all tasks. `task` selects the model of a forward pass."""

    def __init__(self, models: dict[str, PreTrainedModel], own_layers: int):
        super().__init__()
        self.tasks = nn.ModuleDict(models)
        self.own_layers = own_layers
        first = next(iter(models.values()))
        self.config = copy.deepcopy(first.config)
        without_pooling_layer(self.config)

    def forward(self, task: str, **inputs):
        return self.tasks[task](**inputs)

    def activation_checkpointing_enable(self, **settings) -> None:
        """Compute activations again in the backward pass, in the model of each task."""
        for model in self.tasks.values():
            model.activation_checkpointing_enable(**settings)

    def shared_names(self) -> dict[str, str]:
        """Return the shared parameters: name in the encoder -> name in this module."""
        first = next(iter(self.tasks))
        model = self.tasks[first]
        inside = shared_parameters(model, self.own_layers)
        ours = {id(value): name for name, value in model.named_parameters()}
        return {name: f"tasks.{first}.{ours[id(value)]}" for name, value in inside.items()}

    def save(self, folder: Path) -> None:
        """Save the shared encoder under its plain names, and what a task has of its own under `heads.TASK.`.

        `AutoModel` loads the encoder, without the layers that are a task's own.
        """
        state, names = self.state_dict(), self.shared_names()
        weights = {name: state[ours] for name, ours in names.items()}
        kept = {value.data_ptr() for value in weights.values()}
        for name, value in state.items():
            if value.data_ptr() not in kept:
                kept.add(value.data_ptr())
                weights[f"heads.{name.removeprefix('tasks.')}"] = value
        config = copy.deepcopy(self.config)
        config.num_hidden_layers -= self.own_layers
        with torch.device("meta"):
            config.architectures = [type(AutoModel.from_config(config)).__name__]
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shared_parameters(model: PreTrainedModel, own_layers: int) -> dict[str, nn.Parameter]:
    """Return the parameters of the encoder that every task can share, by their name in the encoder.

    These are the parameters that the encoder of a token classifier has: no pooler, whose output only some heads read.

    Args:
        model: the model of a task.
        own_layers: number of last layers that are not shared, nor what follows them.

    Raises:
        InputError: the architecture is no encoder with layers, or has too few layers.
    """
    config = copy.deepcopy(model.config)
    check_head(AutoModelForTokenClassification, config, model.name_or_path)
    without_pooling_layer(config)
    with torch.device("meta"), quiet():
        plain = AutoModelForTokenClassification.from_config(config)
    common = {name for name, _ in transformer_of(plain).named_parameters()}
    layers, at = len(layer_names(model)), depths(model, ())
    if own_layers >= layers:
        raise InputError(f"--sharing top:{own_layers}: the model has {layers} layers; give top:{layers - 1} or less")
    names = {id(value): name for name, value in model.named_parameters()}
    return {
        name: value
        for name, value in transformer_of(model).named_parameters()
        if name in common and at[names[id(value)]] <= layers - own_layers
    }


def widest(models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    """Give all models as many embeddings as the one with the most, and return it: a task may add tokens.

    Raises:
        InputError: several tasks add tokens, which would get the same embeddings.
    """
    sizes = {name: input_embeddings(transformer_of(model)).num_embeddings for name, model in models.items()}
    wider = [name for name, size in sizes.items() if size > min(sizes.values())]
    if len(wider) > 1:
        raise InputError(f"tasks {' and '.join(wider)}: both add tokens, such as markers; train one of them alone")
    for name, model in models.items():
        if wider and name not in wider:
            model.resize_token_embeddings(sizes[wider[0]], mean_resizing=False)
    return models[wider[0]] if wider else next(iter(models.values()))


def share(models: dict[str, PreTrainedModel], own_layers: int) -> None:
    """Let all models have the shared parameters of one of them."""
    first = widest(models)
    ours = shared_parameters(first, own_layers)
    for model in (model for model in models.values() if model is not first):
        theirs = shared_parameters(model, own_layers)
        if theirs.keys() != ours.keys():
            raise InputError(
                f"{type(model).__name__}: its encoder has other parameters than that of {type(first).__name__}; choose "
                "another --model_name_or_path"
            )
        replaced = {id(value): ours[name] for name, value in theirs.items()}
        for module in model.modules():
            for name, value in module._parameters.items():
                if id(value) in replaced:  # also a decoder that is tied to the embeddings
                    module._parameters[name] = replaced[id(value)]


def combine(loaded: dict[str, LoadedModel], sharing: SharingArguments) -> tuple[dict[str, TunedModel], TunedModel]:
    """Return the model of each task, and the model of all, whose encoder they share.

    Args:
        loaded: the model of each task, with the same encoder.
        sharing: what is shared.
    """
    adapters = TuningArguments(tuning="adapter") if sharing.sharing == "adapter" else None
    share({name: one.model for name, one in loaded.items()}, sharing.own_layers or 0)
    tuned = {}
    for name, one in loaded.items():
        if adapters:
            insert_adapters(one.model, Shape(adapters.adapter_placement, adapters.adapter_reduction))
        fix_pooling(one.model)
        tuned[name] = TunedModel(**vars(one), tuning=adapters or TuningArguments())
    model = SharedModel({name: one.model for name, one in tuned.items()}, sharing.own_layers or 0)
    new = {f"tasks.{name}.{weight}" for name, one in loaded.items() for weight in one.new_parameters}
    new |= {name for name, _ in model.named_parameters() if is_adapter(name)}
    any_of = next(iter(loaded.values()))
    every = sum(value.numel() for value in model.parameters())
    names = model.shared_names()
    shared = sum(model.get_parameter(name).numel() for name in names.values())
    tell(f"{every:,} parameters, of which all {len(tuned)} tasks share {shared:,} (--sharing {sharing.sharing})")
    lengths = [one.read_length for one in loaded.values() if one.read_length]
    together = TunedModel(
        model, any_of.tokenizer, frozenset(new), any_of.source, max(lengths, default=None), any_of.attn_implementation
    )
    return tuned, together


def freeze(model: PreTrainedModel) -> None:
    """Freeze all but the adapters, so that a model with adapters is saved apart from them."""
    for name, value in model.named_parameters():
        value.requires_grad_(is_adapter(name))
