"""Configure the methods of peft: target layers, heads, virtual tokens and ranks; save and resume them."""

import difflib
import math
import warnings
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeGuard

import peft
import torch
import yaml
from peft import PeftConfig, PeftModel, PeftType, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from common.data import yaml_text
from common.errors import InputError, one_line
from common.models.load import LoadedModel
from common.models.sizes import positions_of
from common.models.structure import (
    Layer,
    fresh_names,
    input_embeddings,
    norm_names,
    output_embeddings,
    transformer_of,
    watch,
)
from common.tuning.methods import TuningArguments
from common.tuning.virtual_tokens import hide_virtual_tokens

#: default rank where it is not 8; a high rank costs VeRA little
RANK = {"vera": 256}
#: unsupported values of `peft_type` -> the reason
REFUSED = {
    "POLY": "needs a task number in each row",
    "XLORA": "mixes adapters that are already trained",
    "MULTITASK_PROMPT_TUNING": "needs a task number in each row",
    "ADAPTION_PROMPT": "supports LLaMA only and does not save the head",
    "CPT": "needs the type of each token (input, label or template) in each row",
    "LILY": "cannot be merged into the weights",
    "SHADOW": "cannot be merged into the weights",
}
#: values of AdaLoRA that follow from the number of steps
SCHEDULE = {"total_step", "tinit", "tfinal", "deltaT"}


def wrap(loaded: LoadedModel, args: TuningArguments, task_type: TaskType | None) -> PeftModel:
    """Freeze the model, and add the trainable parameters of method `args.method` of peft.

    The new parameters (a task head, and all else that the checkpoint lacks) are trained in place. peft would copy them,
    and a copy of a tied head is no longer tied. Raises `InputError` if the method does not work with the model.
    """
    asked = "--peft_config" if args.peft_config else "--lora_target_modules" if args.lora_target_modules else args.asked
    model, transformer = loaded.model, transformer_of(loaded.model)
    layers = watch(model)
    fresh = [dict(model.named_parameters())[name] for name in fresh_names(model, loaded.new_parameters)]
    config = _from_file(args.peft_config) if args.peft_config else _config(model, args, layers)
    if isinstance(config, peft.PromptLearningConfig):
        _check_room(loaded, args, config.num_virtual_tokens)
        only_keys = config.peft_type in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
        width = transformer.config.hidden_size if only_keys else input_embeddings(transformer).embedding_dim
        config.token_dim = config.token_dim or width
        config.num_attention_heads = config.num_attention_heads or transformer.config.num_attention_heads
        lm = task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
        config.task_type = task_type if lm else TaskType.FEATURE_EXTRACTION  # with which peft does not touch the head
        if config.peft_type in (PeftType.PROMPT_TUNING, PeftType.P_TUNING):
            config.num_transformer_submodules = 1  # of the encoder; one for the decoder would stay unused
    else:
        if args.peft_config and getattr(config, "target_modules", "") is None:
            _aim(config, model, args, layers)
        if isinstance(config, peft.LoraConfig) and loaded.trained_tokens and not config.trainable_token_indices:
            config.trainable_token_indices = list(loaded.trained_tokens)
        config.task_type = task_type if output_embeddings(model) is not None else None
    holders = Counter(id(module.weight) for module in model.modules() if hasattr(module, "weight"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(model, config)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise InputError(f"{asked}: {one_line(error)}") from None
    if not any(weight.requires_grad for weight in wrapped.parameters()):
        raise InputError(f"{asked}: adapts no weights of a {transformer.config.model_type} model; name others")
    if config.peft_type != PeftType.TRAINABLE_TOKENS:  # changes all copies of tied weights alike
        _check_ties(wrapped, holders, asked)
    for weight in fresh:
        weight.requires_grad_(True)
    if config.is_prompt_learning:
        hide_virtual_tokens(wrapped)
    return wrapped


def _config(model: nn.Module, args: TuningArguments, layers: list[Layer]) -> PeftConfig:
    method, rank = args.method, args.lora_r or RANK.get(args.method, 8)
    if method in ("prefix", "prompt", "ptuning"):
        tokens: dict[str, Any] = {"num_virtual_tokens": args.num_virtual_tokens}
        if method == "prefix":
            return peft.PrefixTuningConfig(**tokens)
        if method == "prompt":  # embeddings of tokens are the better initialisation (Lester et al. 2021)
            return peft.PromptTuningConfig(**tokens, prompt_tuning_init=peft.PromptTuningInit.SAMPLE_VOCAB)
        width = input_embeddings(transformer_of(model)).embedding_dim
        return peft.PromptEncoderConfig(**tokens, encoder_hidden_size=width)
    targets: Any = args.lora_target_modules
    if targets == ["all-linear"]:
        targets = _all(layers)
    elif targets is None:
        targets = _all(layers) if method == "adalora" else _attention(layers) or _all(layers)
    if method == "ia3":
        return _ia3(model, args, layers)
    transposed = any(isinstance(m, Conv1D) and n in targets for n, m in model.named_modules())
    common: dict[str, Any] = {"target_modules": targets}
    if method == "vera":
        return peft.VeraConfig(**common, r=rank, vera_dropout=args.lora_dropout, fan_in_fan_out=transposed)
    alpha = args.lora_alpha
    common |= {"lora_dropout": args.lora_dropout, "fan_in_fan_out": transposed}
    if method == "adalora":  # RankSchedule sets the schedule once the number of steps is known
        first = math.ceil(1.5 * rank)
        common["lora_alpha"] = alpha or 2 * first
        return peft.AdaLoraConfig(**common, target_r=rank, init_r=first, total_step=1_000_000, tfinal=0)
    more: dict[str, Any] = {"lora_alpha": alpha or 2 * rank}
    if method == "rslora":  # scales by alpha / sqrt(r); equals the default of LoRA at rank 16
        more = {"lora_alpha": alpha or 8, "use_rslora": True}
    elif method == "dora":
        more["use_dora"] = True
    elif method == "pissa":  # as in the paper; the exact decomposition, because a resumed run must start equal
        more = {"lora_alpha": alpha or rank, "init_lora_weights": "pissa"}
    return peft.LoraConfig(**common, r=rank, **more)


def _aim(config: Any, model: nn.Module, args: TuningArguments, layers: list[Layer]) -> None:
    """Set the target layers of a `--peft_config` that names none."""
    if config.peft_type == PeftType.LN_TUNING:
        config.target_modules = [*dict.fromkeys(name.rpartition(".")[0] for name in norm_names(model))]
    elif config.peft_type == PeftType.IA3:
        ours = _ia3(model, args, layers)
        config.target_modules, config.feedforward_modules = ours.target_modules, ours.feedforward_modules
    elif config.peft_type != PeftType.TRAINABLE_TOKENS:  # finds the embeddings itself
        config.target_modules = _attention(layers) or _all(layers)


def _ia3(model: nn.Module, args: TuningArguments, layers: list[Layer]) -> peft.IA3Config:
    scaled = [name for layer in layers for name in [*layer.key, *layer.value]]
    if not scaled:
        raise InputError(
            f"--tuning ia3: finds no keys and values in a {transformer_of(model).config.model_type} model; name the "
            "linear layers in a file for --peft_config"
        )
    forward = [layer.output for layer in layers]
    transposed = any(isinstance(m, Conv1D) and n in scaled for n, m in model.named_modules())
    targets = [*dict.fromkeys(scaled), *forward]
    return peft.IA3Config(target_modules=targets, feedforward_modules=forward, fan_in_fan_out=transposed)


def _attention(layers: list[Layer]) -> list[str]:
    """Return the query and value projections, which Hu et al. 2021 adapt (section 7.1)."""
    return [*dict.fromkeys(name for layer in layers for name in [*layer.query, *layer.value])]


def _all(layers: list[Layer]) -> list[str]:
    return [*dict.fromkeys(name for layer in layers for name in layer.linear)]


def _from_file(path: str) -> PeftConfig:
    """Read a configuration of peft from a YAML file: `peft_type`, and the arguments of its class in peft."""
    try:
        values = yaml_text.load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise InputError(f"--peft_config {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise InputError(f"--peft_config {path}: {one_line(error)}") from None
    kinds = {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if not isinstance(values, dict) or str(values.get("peft_type")).upper() not in kinds:
        known = ", ".join(sorted(kinds.keys() - REFUSED.keys()))
        raise InputError(f"--peft_config {path}: needs `peft_type`, one of: {known}")
    kind = str(values.pop("peft_type")).upper()
    if kind in REFUSED:
        raise InputError(f"--peft_config {path}: {kind} {REFUSED[kind]}; choose another peft_type")
    fields = kinds[kind].__dataclass_fields__.keys() - {"peft_type", "task_type", "inference_mode", "modules_to_save"}
    for name in values.keys() - fields:
        nearest = difflib.get_close_matches(str(name), fields, n=1)
        more = f"; did you mean {nearest[0]}?" if nearest else f"; choose from {', '.join(sorted(fields))}"
        raise InputError(f"--peft_config {path}: {kind} has no {name}{more}")
    needed = {"num_virtual_tokens"} & fields | ({"token_indices"} if kind == "TRAINABLE_TOKENS" else set())
    for name in needed:
        if not values.get(name):
            raise InputError(f"--peft_config {path}: {kind} needs {name}")
    if kind == "ADALORA":
        for name in values.keys() & SCHEDULE:
            raise InputError(f"--peft_config {path}: {name} of ADALORA follows from the steps of the run; leave it out")
        values |= {"total_step": 1_000_000, "tfinal": 0}  # set by RankSchedule
    try:
        return kinds[kind](**values)
    except (ValueError, TypeError) as error:
        raise InputError(f"--peft_config {path}: {one_line(error)}") from None


def _check_ties(model: PeftModel, holders: Counter[int], asked: str) -> None:
    """Raise `InputError` if tied weights are adapted in one layer: merging would change the other layers."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and holders[id(getattr(module.get_base_layer(), "weight", None))] > 1:
            raise InputError(
                f"{asked}: the weights of {name.removeprefix('base_model.model.')} are tied to another layer, and an "
                "update of one layer cannot be merged into both; leave this layer out"
            )


def _check_room(loaded: LoadedModel, args: TuningArguments, tokens: int) -> None:
    """Raise `InputError` if virtual tokens and text together exceed the positions of the model."""
    sides = ("source", "target") if transformer_of(loaded.model).config.is_encoder_decoder else ("source",)
    positions = min((limit for side in sides if (limit := positions_of(loaded.model, side))), default=None)
    if positions and loaded.read_length and loaded.read_length + tokens > positions:
        raise InputError(
            f"{args.asked}: {tokens} virtual tokens and {loaded.read_length} tokens of text exceed the {positions} "
            "positions of the model; lower --num_virtual_tokens or the length of the text"
        )


# Saving


def save_alone(model: PeftModel, folder: Path, task_type: TaskType | None, new_parameters: Collection[str]) -> None:
    """Save the parameters that `model` has beyond its base, new ones included, in the format of peft."""
    if not model.active_peft_config.is_prompt_learning:  # for prompts the task type places the virtual tokens
        model.peft_config["default"].task_type = task_type
    model.save_pretrained(str(folder))
    base, prefix = (
        model.get_base_model(),
        "base_model." if model.active_peft_config.is_prompt_learning else "base_model.model.",
    )
    names = set(fresh_names(base, new_parameters))
    new = {name: weight for name, weight in base.named_parameters(remove_duplicate=False) if name in names}
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {f"{prefix}{n}": w.detach().cpu().contiguous() for n, w in new.items()}, path)


# AdaLoRA


class RankSchedule(TrainerCallback):
    """Run the rank allocation of AdaLoRA, which peft leaves to the caller (Zhang et al. 2023, arXiv:2303.10512).

    The rank of a matrix starts at 1.5 times `--lora_r`. From 10 % to 70 % of the steps the mean rank falls to
    `--lora_r`. The last 30 % of the steps train with fixed ranks.
    """

    def __init__(self, model: PeftModel):
        self.model = model
        self.tuner, self.config = _adalora(model)

    def on_train_begin(self, args, state, control, **kwargs):
        steps = state.max_steps
        self.config.total_step, self.config.tinit, self.config.tfinal = steps, steps // 10, 3 * steps // 10
        self.config.deltaT = max(1, steps // 200)
        if steps - self.config.tfinal - self.config.tinit < 2:
            raise InputError(f"--tuning adalora: {steps} steps are too few to choose ranks; raise --num_train_epochs")
        if state.global_step == 0:
            self.tuner.rankallocator.reset_ipt()
            self.config.rank_pattern = None

    def on_optimizer_step(self, args, state, control, **kwargs):
        for name, weight in self.model.named_parameters():
            if "lora_" in name and weight.requires_grad and weight.grad is None:  # its layer was left out of this step
                weight.grad = torch.zeros_like(weight)
        self.tuner.update_and_allocate(state.global_step + 1)


def allocation(model: PeftModel) -> dict[str, Tensor]:
    """Return the state of the rank allocation of AdaLoRA, which a resumed run needs to choose the same ranks."""
    tuner, config = _adalora(model)
    allocator, pattern = tuner.rankallocator, config.rank_pattern
    kept = {f"{kind}:{n}": t for kind in ("exp_avg_ipt", "exp_avg_unc") for n, t in getattr(allocator, kind).items()}
    kept |= {f"rank_pattern:{name}": torch.tensor(mask) for name, mask in (pattern or {}).items()}
    return {name: value.detach().cpu().contiguous() for name, value in kept.items()}


def restore_allocation(model: PeftModel, kept: dict[str, Tensor]) -> None:
    """Restore the state that `allocation` returned."""
    tuner, config = _adalora(model)
    allocator, pattern = tuner.rankallocator, {}
    allocator.reset_ipt()
    for key, value in kept.items():
        kind, _, name = key.partition(":")
        if kind == "rank_pattern":
            pattern[name] = value.tolist()
        else:
            getattr(allocator, kind)[name] = value.to(model.device)
            allocator.ipt[name] = torch.zeros_like(value)
    config.rank_pattern = pattern or None


def orthogonality(model: PeftModel) -> Tensor:
    """Return the weighted orthogonality penalty of AdaLoRA (equation 4 of the paper)."""
    parts = []
    for name, weight in model.named_parameters():
        if "lora_A.default" in name or "lora_B.default" in name:
            product = weight @ weight.T if "lora_A" in name else weight.T @ weight
            parts.append(torch.linalg.norm(product - torch.eye(len(product), device=product.device)))
    return _adalora(model)[1].orth_reg_weight * torch.stack(parts).mean()


def is_adalora(model: nn.Module) -> TypeGuard[PeftModel]:
    """Return whether `model` is tuned by AdaLoRA."""
    return isinstance(model, PeftModel) and model.peft_type == PeftType.ADALORA


def _adalora(model: PeftModel) -> tuple[peft.AdaLoraModel, peft.AdaLoraConfig]:
    """Return the layers of AdaLoRA and their configuration."""
    tuner, config = model.base_model, model.peft_config["default"]
    assert isinstance(tuner, peft.AdaLoraModel)
    assert isinstance(config, peft.AdaLoraConfig)
    return tuner, config
