"""How much of the model is trained: `tune` before training, `merge` after it. `common.tuning.methods` has the methods.

Which weights those are is found from the model (`common.models.structure`). `common.training.trainer` steps what has to be stepped while
it trains (`callbacks`, `layer_rates`), and writes checkpoints of what is trained alone.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel, TaskType
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D

from common.errors import InputError, tell
from common.models.structure import bias_names, depths, fresh_names, head_names, layer_names, norm_names
from common.tuning.adapters import MARK, Shape, insert_adapters, save_adapters
from common.tuning.methods import TuningArguments
from common.tuning.peft_methods import RankSchedule, is_adalora, save_alone, wrap

#: folders in the output of what cannot be merged
BASE, ADAPTER = "base", "adapter"


def tune(model: PreTrainedModel, args: TuningArguments, task_type: TaskType | None) -> PreTrainedModel | PeftModel:
    """`model` with what `--tuning` trains, and nothing else, trainable. `task_type` is what peft calls the task.

    Raises `InputError` where the method cannot go with this model, or this way of launching.
    """
    for name in ("FSDP", "DEEPSPEED"):  # they shard the weights that an adapter is merged into
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" and args.method != "full":
            raise InputError(f"{args.asked}: cannot be merged and saved under {name}; launch with multi_gpu.yaml")
    model.task_type = task_type
    if args.method == "adapter":
        fresh = fresh_names(model)
        trained = fresh + insert_adapters(model, Shape(args.adapter_placement, args.adapter_reduction))
        _train_only(model, trained)
    elif args.method in IN_PLACE:
        _train_only(model, IN_PLACE[args.method](model, args))
    elif args.method not in ("full", "gradual"):
        model = wrap(model, args, task_type)
    elif args.method == "gradual" and not layer_names(model):
        raise InputError(f"{args.asked}: no layers were found in a {model.config.model_type} model")
    model.tuning = args
    if args.method != "full":
        weights = list(model.parameters())
        count = sum(weight.numel() for weight in weights if weight.requires_grad)
        tell(f"{args.tuning}: {count:,} of {sum(weight.numel() for weight in weights):,} parameters are trained")
    return model


def _train_only(model: nn.Module, names: Iterable[str]) -> None:
    names = set(names)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in names)


def _head(model: PreTrainedModel, args: TuningArguments) -> list[str]:
    found = head_names(model) + fresh_names(model)
    if not found:
        raise InputError(
            f"{args.asked}: the head of {type(model).__name__} is its input embeddings once more (tied), so nothing "
            "would be trained; take top:1, or lora"
        )
    return found


def _top(model: PreTrainedModel, args: TuningArguments) -> list[str]:
    last = len(layer_names(model))
    if args.top > last:
        raise InputError(f"{args.asked}: the model has {last} layers")
    return [name for name, depth in depths(model).items() if depth > last - args.top]


def _bias(model: PreTrainedModel, args: TuningArguments) -> list[str]:
    if not any(depth <= len(layer_names(model)) for n, depth in depths(model).items() if n in bias_names(model)):
        raise InputError(f"{args.asked}: a {model.config.model_type} model has no biases; take layernorm, or lora")
    return bias_names(model) + fresh_names(model)


def _norm(model: PreTrainedModel, args: TuningArguments) -> list[str]:
    return norm_names(model) + fresh_names(model)


IN_PLACE = {"head": _head, "top": _top, "bias": _bias, "layernorm": _norm}


# While it trains


class GradualUnfreezing(TrainerCallback):
    """Trains the head in the first epoch, and a layer more from the top in each after it; the embeddings come last.

    Howard and Ruder 2018, https://arxiv.org/abs/1801.06146, section 3.3.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.depth, self.last = model, depths(model), len(layer_names(model))
        if not head_names(model) + fresh_names(model):
            self.last -= 1  # no head of its own: it begins with the last layer

    def on_epoch_begin(self, args, state, control, **kwargs):
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(self.depth[name] > self.last - int(state.epoch))
            if not weight.requires_grad:
                weight.grad = None


def callbacks(model: PreTrainedModel | PeftModel) -> list[TrainerCallback]:
    """What the trainer of a tuned model has to call."""
    if is_gradual(model):
        return [GradualUnfreezing(model)]
    return [RankSchedule(model)] if is_adalora(model) else []


def is_gradual(model: nn.Module) -> bool:
    """Whether other weights are trained in other epochs."""
    return _tuning_of(model) is not None and _tuning_of(model).method == "gradual"


def _tuning_of(model: nn.Module) -> TuningArguments | None:
    return getattr(model, "tuning", None)  # a model that went through no `tune` has none


def is_beside(model: nn.Module) -> bool:
    """Whether what is trained is kept beside the model's own weights."""
    return isinstance(model, PeftModel) or any(f".{MARK}." in name for name, _ in model.named_parameters())


def layer_rates(model: PreTrainedModel) -> dict[str, float] | None:
    """Under `--layerwise_lr_decay` the share of the learning rate for each parameter; None without.

    The head has all of it, each layer below the given share of the one above it (Howard and Ruder 2018; for BERT
    Sun et al. 2019, https://arxiv.org/abs/1905.05583, section 5.3.4).
    """
    args = _tuning_of(model)
    if args is None or args.layerwise_lr_decay is None:
        return None
    top = len(layer_names(model)) + 1
    return {name: args.layerwise_lr_decay ** (top - depth) for name, depth in depths(model).items()}


# After it


def merge(model: PreTrainedModel | PeftModel, output_dir: str, save: bool) -> PreTrainedModel:
    """The plain model that `model` amounts to: what was trained beside its weights added into them, wrapper gone.

    It computes what `model` computes, to rounding, and loads like any other checkpoint. With `save`, what was trained
    is kept alone in `output_dir/adapter` as well. Where nothing can be added, a model is returned that saves itself
    into `base/` of the folder it is given, which with `adapter/` makes the whole (`common.inference.predictor.load_saved`): so
    no one loads it by itself and takes it for what was trained.
    """
    folder = Path(output_dir, ADAPTER)
    if isinstance(model, PeftModel):
        if save:
            save_alone(model, folder, model.task_type)
        base = model.get_base_model()
        if model.active_peft_config.is_prompt_learning:
            return _saved_apart(base)
        if model.tuning.quantize:
            return _merge_quantized(model)
        return model.merge_and_unload()
    if is_beside(model):
        if save:
            save_adapters(model, Shape(model.tuning.adapter_placement, model.tuning.adapter_reduction), folder)
        return _saved_apart(model)
    return model


def _merge_quantized(model: PeftModel) -> PreTrainedModel:
    """In full precision: added to the quantized weights, what was learnt would be rounded away."""
    learnt = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").float().cpu()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    quantized = model.unload().dequantize()
    weights = {name: weight.float().cpu() for name, weight in quantized.state_dict().items()}
    for name, delta in learnt.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + delta
    plain = type(quantized)._from_config(quantized.config, dtype=torch.float32)
    for name, module in plain.named_modules():
        if isinstance(module, Conv1D):  # which bitsandbytes holds the other way round, as a linear layer
            weights[f"{name}.weight"] = weights[f"{name}.weight"].T
    plain.load_state_dict(weights)
    if plain.can_generate():
        plain.generation_config = quantized.generation_config
    return plain.to(quantized.device)


def _saved_apart(model: PreTrainedModel) -> PreTrainedModel:
    def save(folder: str, state_dict: dict | None = None, **more) -> None:
        weights = {n: w for n, w in (state_dict or model.state_dict()).items() if f".{MARK}." not in n}
        type(model).save_pretrained(model, str(Path(folder, BASE)), state_dict=weights, **more)
        model.config.save_pretrained(folder)

    model.save_pretrained = save
    return model
