"""Choose which weights are trained: `tune` before training, `merge` after it.

`common.tuning.methods` lists the methods. `common.models.structure` finds the weights by the structure of the model,
not by names.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, TaskType
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D

from common.errors import InputError, tell
from common.hardware import sharding
from common.models.load import LoadedModel
from common.models.pooling import fix_pooling
from common.models.structure import (
    bias_names,
    depths,
    fresh_names,
    head_names,
    layer_names,
    norm_names,
    pooling_names,
    transformer_of,
)
from common.tuning.adapters import Shape, gate_of, insert_adapters, is_adapter, save_adapters
from common.tuning.methods import TuningArguments
from common.tuning.peft_methods import RankSchedule, is_adalora, save_alone, wrap

#: factor on the learning rate of the adapters of domains (common/tools/RESULTS.md, "Networks of domains")
DOMAIN_RATE = 5.0
#: folders of a saved model whose trained parameters cannot be merged
BASE, ADAPTER = "base", "adapter"


@dataclass
class TunedModel(LoadedModel):
    """A loaded model whose trainable parameters `--tuning` chose.

    Attributes:
        model: the model; a `PeftModel` around it for a method of peft.
        tuning: the method and its arguments.
        task_type: the task in the terms of peft.
    """

    tuning: TuningArguments = field(default_factory=TuningArguments)
    task_type: TaskType | None = None

    @property
    def pretrained(self) -> set[str]:
        """Return the names of the parameters from the checkpoint; none in a `PeftModel`, which freezes them."""
        return set() if isinstance(self.model, PeftModel) else super().pretrained


def tune(loaded: LoadedModel, args: TuningArguments, task_type: TaskType | None) -> TunedModel:
    """Freeze all parameters except those that `--tuning` chooses.

    Args:
        loaded: the model; it is changed, and must not be used on its own afterwards.
        args: the method and its arguments.
        task_type: the task in the terms of peft; None if peft has no name for the task.

    Raises:
        InputError: the method does not work with this model or under this launcher.
    """
    model = loaded.model
    if sharding() and args.method != "full":  # the weights that an adapter is merged into are sharded
        raise InputError(f"{args.asked}: cannot be merged under {sharding()}; launch with common/launch/multi_gpu.yaml")
    if args.method == "adapter":
        fresh = fresh_names(model, loaded.new_parameters)
        trained = fresh + insert_adapters(model, Shape(args.adapter_placement, args.adapter_reduction))
        _train_only(model, trained)
    elif args.method in IN_PLACE:
        _train_only(model, IN_PLACE[args.method](loaded, args))
    elif args.method not in ("full", "gradual", "domains"):
        model = wrap(loaded, args, task_type)
    elif args.method == "gradual" and not layer_names(model):
        raise InputError(
            f"{args.asked}: finds no layers in a {transformer_of(model).config.model_type} model; give --tuning full"
        )
    fix_pooling(model)
    if args.method not in ("full", "domains"):
        weights = list(model.parameters())
        count = sum(weight.numel() for weight in weights if weight.requires_grad)
        tell(f"{args.tuning}: trains {count:,} of {sum(weight.numel() for weight in weights):,} parameters")
    return TunedModel(**vars(loaded) | {"model": model}, tuning=args, task_type=task_type)


def give_domains(tuned: TunedModel, domains: Sequence[str]) -> None:
    """Insert an adapter for each domain, under `--tuning domains`.

    Raises:
        InputError: the model is an encoder-decoder.
    """
    names = insert_adapters(tuned.model, Shape("pfeiffer", tuned.tuning.adapter_reduction, domains))
    tuned.new_parameters |= frozenset(names)
    count = sum(tuned.model.get_parameter(name).numel() for name in names)
    every = sum(value.numel() for value in tuned.model.parameters())
    tell(f"domains: {len(domains)} adapters and a gate, {count:,} of {every:,} parameters: {', '.join(domains)}")


def _train_only(model: nn.Module, names: Iterable[str]) -> None:
    names = set(names)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in names)


def _head(loaded: LoadedModel, args: TuningArguments) -> list[str]:
    names = head_names(loaded.model) + fresh_names(loaded.model, loaded.new_parameters)
    if not names:
        raise InputError(
            f"{args.asked}: the head of {type(loaded.model).__name__} is tied to its input embeddings; nothing would "
            "be trained; give --tuning top:1 or lora"
        )
    return names


def _top(loaded: LoadedModel, args: TuningArguments) -> list[str]:
    last = len(layer_names(loaded.model))
    if args.top > last:
        raise InputError(f"{args.asked}: the model has {last} layers; give --tuning top:{last} or less")
    return [name for name, depth in depths(loaded.model, loaded.new_parameters).items() if depth > last - args.top]


def _bias(loaded: LoadedModel, args: TuningArguments) -> list[str]:
    biases, last = bias_names(loaded.model), len(layer_names(loaded.model))
    if not any(depth <= last for n, depth in depths(loaded.model, loaded.new_parameters).items() if n in biases):
        kind = transformer_of(loaded.model).config.model_type
        raise InputError(f"{args.asked}: a {kind} model has no biases; give --tuning layernorm or lora")
    return biases + fresh_names(loaded.model, loaded.new_parameters)


def _norm(loaded: LoadedModel, args: TuningArguments) -> list[str]:
    return norm_names(loaded.model) + fresh_names(loaded.model, loaded.new_parameters)


IN_PLACE = {"head": _head, "top": _top, "bias": _bias, "layernorm": _norm}


# During training


class GradualUnfreezing(TrainerCallback):
    """Train the head in the first epoch, and one more layer from the top in each later epoch; embeddings come last.

    Howard and Ruder 2018, https://arxiv.org/abs/1801.06146, section 3.3.
    """

    def __init__(self, tuned: TunedModel):
        self.model, self.last = tuned.model, len(layer_names(tuned.model))
        fixed = pooling_names(tuned.model)
        self.depth = {n: d for n, d in depths(tuned.model, tuned.new_parameters).items() if n not in fixed}
        if not head_names(tuned.model) + fresh_names(tuned.model, tuned.new_parameters):
            self.last -= 1  # the head is tied: begin with the last layer

    def on_epoch_begin(self, args, state, control, **kwargs):
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(self.depth.get(name, 0) > self.last - int(state.epoch))
            if not weight.requires_grad:
                weight.grad = None


def callbacks(tuned: TunedModel) -> list[TrainerCallback]:
    """Return the callbacks that the trainer of a tuned model needs."""
    if is_gradual(tuned):
        return [GradualUnfreezing(tuned)]
    return [RankSchedule(tuned.model)] if is_adalora(tuned.model) else []


def is_gradual(tuned: TunedModel) -> bool:
    """Return whether the trained parameters change with the epoch."""
    return tuned.tuning.method == "gradual"


def is_beside(model: nn.Module) -> bool:
    """Return whether the trained parameters are separate from the weights of the model."""
    return isinstance(model, PeftModel) or any(is_adapter(name) for name, _ in model.named_parameters())


def layer_rates(tuned: TunedModel) -> dict[str, float] | None:
    """Return the factor on the learning rate of each parameter; None if all have the same rate.

    - `--layerwise_lr_decay`: the head has factor 1. Each layer has the factor of the layer above times the decay
      (Howard and Ruder 2018; for BERT Sun et al. 2019, https://arxiv.org/abs/1905.05583, section 5.3.4).
    - `--tuning domains`: the adapters and the gate have `DOMAIN_RATE`.
    """
    if tuned.tuning.method == "domains":
        return {n: DOMAIN_RATE if is_adapter(n) else 1 for n, _ in tuned.model.named_parameters()}
    decay = tuned.tuning.layerwise_lr_decay
    if decay is None:
        return None
    top = len(layer_names(tuned.model)) + 1
    return {name: decay ** (top - depth) for name, depth in depths(tuned.model, tuned.new_parameters).items()}


# After training


def merge(tuned: TunedModel, output_dir: str, save: bool) -> nn.Module:
    """Merge the trained parameters into the weights, and return the plain model.

    The outputs agree with those of `tuned.model` to rounding, and the model loads like any other checkpoint. A method
    that cannot be merged returns a model that saves itself into `base/` of its folder, so that nobody loads the model
    without `adapter/` (`common.inference.predictor.load_saved` loads both).

    Args:
        tuned: the model after training.
        output_dir: folder that gets `adapter/`, with the trained parameters alone.
        save: whether this process writes `adapter/`.
    """
    folder, model, args = Path(output_dir, ADAPTER), tuned.model, tuned.tuning
    if isinstance(model, PeftModel):
        if save:
            save_alone(model, folder, tuned.task_type, tuned.new_parameters)
        base = model.get_base_model()
        if model.active_peft_config.is_prompt_learning:
            return _saved_apart(base)
        if args.quantize:
            return _merge_quantized(model)
        return model.merge_and_unload()
    if is_beside(model):
        if save:
            gate = gate_of(model)
            shape = Shape(args.adapter_placement, args.adapter_reduction, gate.domains if gate else ())
            save_adapters(model, shape, folder)
        # `common.training.saving` saves a module that is none of transformers in the same way
        return _saved_apart(model) if isinstance(model, PreTrainedModel) else model
    return model


def _merge_quantized(model: PeftModel) -> PreTrainedModel:
    """Merge in float32: the quantised weights would round the update away."""
    learnt = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").float().cpu()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.merge()  # the embeddings of tokens are not quantised
    quantized = model.unload().dequantize()
    weights = {name: weight.float().cpu() for name, weight in quantized.state_dict().items()}
    for name, delta in learnt.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + delta
    plain = type(quantized)._from_config(quantized.config, dtype=torch.float32)
    for name, module in plain.named_modules():
        if isinstance(module, Conv1D):  # bitsandbytes stores it transposed, as a linear layer
            weights[f"{name}.weight"] = weights[f"{name}.weight"].T
    plain.load_state_dict(weights)
    if plain.can_generate():
        plain.generation_config = quantized.generation_config
    return plain.to(quantized.device)


def _saved_apart(model: Any) -> nn.Module:
    """Make `save_pretrained` of a model write the weights into `base/`, without those of adapters."""

    def save(folder: str, state_dict: dict | None = None, **more) -> None:
        weights = {n: w for n, w in (state_dict or model.state_dict()).items() if not is_adapter(n)}
        type(model).save_pretrained(model, str(Path(folder, BASE)), state_dict=weights, **more)
        model.config.save_pretrained(folder)

    vars(model)["save_pretrained"] = save
    return model
