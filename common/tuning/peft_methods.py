"""The methods that peft has, set up so that they train, resume and save right: targets, heads, prompts, ranks."""

import difflib
import math
import warnings
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import peft
import torch
import yaml
from peft import PeftConfig, PeftModel, PeftType, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D

from common.errors import InputError, one_line
from common.models.load import LoadedModel
from common.models.structure import Layer, fresh_names, norm_names, output_embeddings, transformer_of, watch
from common.tuning.methods import TuningArguments
from common.tuning.virtual_tokens import let_heads_see_the_text_only

#: rank of the matrices where --lora_r is not given; that of VeRA is cheap
RANK = {"vera": 256}
#: kinds that cannot be had by --peft_config, and why
REFUSED = {
    "POLY": "needs a task number in each row",
    "XLORA": "mixes adapters that were trained before",
    "MULTITASK_PROMPT_TUNING": "needs a task number in each row",
    "ADAPTION_PROMPT": "is made for LLaMA alone and is not saved with its head",
    "CPT": "needs the kind of each sub-token, of input, label or template, in each row",
    "LILY": "cannot be merged into the weights",
    "SHADOW": "cannot be merged into the weights",
}
#: what of AdaLoRA follows from the steps of a run
SCHEDULE = {"total_step", "tinit", "tfinal", "deltaT"}


def wrap(loaded: LoadedModel, args: TuningArguments, task_type: TaskType | None) -> PeftModel:
    """The model frozen, with the trainable parts of peft's method `args.method` and its fresh weights trainable.

    Those, the head of a task or what the checkpoint did not have, are trained where they are: peft would copy them, and
    a copy of a tied head is no longer tied. Raises `InputError` where the method cannot go with the model.
    """
    asked = "--peft_config" if args.peft_config else "--lora_target_modules" if args.lora_target_modules else args.asked
    model, transformer = loaded.model, transformer_of(loaded.model)
    layers = watch(model)
    fresh = [dict(model.named_parameters())[name] for name in fresh_names(model, loaded.new_parameters)]
    config = _from_file(args.peft_config) if args.peft_config else _config(model, args, layers)
    if config.is_prompt_learning:
        _check_room(loaded, args, config.num_virtual_tokens)
        only_keys = config.peft_type in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
        width = transformer.config.hidden_size if only_keys else transformer.get_input_embeddings().embedding_dim
        config.token_dim = config.token_dim or width
        config.num_attention_heads = config.num_attention_heads or transformer.config.num_attention_heads
        lm = task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
        config.task_type = task_type if lm else TaskType.FEATURE_EXTRACTION  # whose head peft leaves alone
        if config.peft_type in (PeftType.PROMPT_TUNING, PeftType.P_TUNING):
            config.num_transformer_submodules = 1  # the encoder's; one for the decoder would be left unused
    else:
        if args.peft_config and getattr(config, "target_modules", "") is None:
            _aim(config, model, args, layers)
        config.task_type = task_type if output_embeddings(model) is not None else None
    holders = Counter(id(module.weight) for module in model.modules() if hasattr(module, "weight"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(model, config)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise InputError(f"{asked}: {one_line(error)}") from None
    if not any(weight.requires_grad for weight in wrapped.parameters()):
        raise InputError(f"{asked}: found nothing to train in a {transformer.config.model_type} model")
    if config.peft_type != PeftType.TRAINABLE_TOKENS:  # which changes them all alike
        _check_ties(wrapped, holders, asked)
    for weight in fresh:
        weight.requires_grad_(True)
    if config.is_prompt_learning:
        let_heads_see_the_text_only(wrapped)
    return wrapped


def _config(model: PreTrainedModel, args: TuningArguments, layers: list[Layer]) -> PeftConfig:
    method, rank = args.method, args.lora_r or RANK.get(args.method, 8)
    if method in ("prefix", "prompt", "ptuning"):
        tokens = {"num_virtual_tokens": args.num_virtual_tokens}
        if method == "prefix":
            return peft.PrefixTuningConfig(**tokens)
        if method == "prompt":  # Lester et al. 2021 find embeddings of sub-tokens the better beginning
            return peft.PromptTuningConfig(**tokens, prompt_tuning_init=peft.PromptTuningInit.SAMPLE_VOCAB)
        width = transformer_of(model).get_input_embeddings().embedding_dim
        return peft.PromptEncoderConfig(**tokens, encoder_hidden_size=width)
    targets: Any = args.lora_target_modules
    if targets == ["all-linear"]:
        targets = _all(layers)
    elif targets is None:
        targets = _all(layers) if method == "adalora" else _attention(layers) or _all(layers)
    if method == "ia3":
        return _ia3(model, args, layers)
    transposed = any(isinstance(m, Conv1D) and n in targets for n, m in model.named_modules())
    common = {"target_modules": targets}
    if method == "vera":
        return peft.VeraConfig(**common, r=rank, vera_dropout=args.lora_dropout, fan_in_fan_out=transposed)
    alpha = args.lora_alpha
    common |= {"lora_dropout": args.lora_dropout, "fan_in_fan_out": transposed}
    if method == "adalora":  # the schedule is put in once the number of steps is known, by RankSchedule
        first = math.ceil(1.5 * rank)
        return peft.AdaLoraConfig(
            **common, target_r=rank, init_r=first, lora_alpha=alpha or 2 * first, total_step=1_000_000, tfinal=0
        )
    more: dict[str, Any] = {"lora_alpha": alpha or 2 * rank}
    if method == "rslora":  # scales by alpha / sqrt(r); at rank 16 as LoRA's default
        more = {"lora_alpha": alpha or 8, "use_rslora": True}
    elif method == "dora":
        more["use_dora"] = True
    elif method == "pissa":  # as in the paper; the exact decomposition, so that a resumed run begins with the same
        more = {"lora_alpha": alpha or rank, "init_lora_weights": "pissa"}
    return peft.LoraConfig(**common, r=rank, **more)


def _aim(config: PeftConfig, model: PreTrainedModel, args: TuningArguments, layers: list[Layer]) -> None:
    """Set the targets of a `--peft_config` that names none."""
    if config.peft_type == PeftType.LN_TUNING:
        config.target_modules = [*dict.fromkeys(name.rpartition(".")[0] for name in norm_names(model))]
    elif config.peft_type == PeftType.IA3:
        ours = _ia3(model, args, layers)
        config.target_modules, config.feedforward_modules = ours.target_modules, ours.feedforward_modules
    elif config.peft_type != PeftType.TRAINABLE_TOKENS:  # which finds the embeddings itself
        config.target_modules = _attention(layers) or _all(layers)


def _ia3(model: PreTrainedModel, args: TuningArguments, layers: list[Layer]) -> PeftConfig:
    scaled = [name for layer in layers for name in [*layer.key, *layer.value]]
    if not scaled:
        raise InputError(
            f"--tuning ia3: finds no keys and values in a {transformer_of(model).config.model_type} model; name the "
            "linear layers by --peft_config"
        )
    forward = [layer.output for layer in layers]
    transposed = any(isinstance(m, Conv1D) and n in scaled for n, m in model.named_modules())
    targets = [*dict.fromkeys(scaled), *forward]
    return peft.IA3Config(target_modules=targets, feedforward_modules=forward, fan_in_fan_out=transposed)


def _attention(layers: list[Layer]) -> list[str]:
    """The maps to queries and values, which Hu et al. 2021 adapt (section 7.1)."""
    return [*dict.fromkeys(name for layer in layers for name in [*layer.query, *layer.value])]


def _all(layers: list[Layer]) -> list[str]:
    return [*dict.fromkeys(name for layer in layers for name in layer.linear)]


def _from_file(path: str) -> PeftConfig:
    """The configuration in YAML file `path`: `peft_type`, and whatever the class that peft has for it takes."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
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
        raise InputError(f"--peft_config {path}: {kind} {REFUSED[kind]}, so it cannot be trained here")
    fields = kinds[kind].__dataclass_fields__.keys() - {"peft_type", "task_type", "inference_mode", "modules_to_save"}
    for name in values.keys() - fields:
        nearest = difflib.get_close_matches(str(name), fields, n=1)
        more = f"; did you mean {nearest[0]}?" if nearest else f"; known: {', '.join(sorted(fields))}"
        raise InputError(f"--peft_config {path}: {kind} has no {name}{more}")
    needed = {"num_virtual_tokens"} & fields | ({"token_indices"} if kind == "TRAINABLE_TOKENS" else set())
    for name in needed:
        if not values.get(name):
            raise InputError(f"--peft_config {path}: {kind} needs {name}")
    if kind == "ADALORA":
        for name in values.keys() & SCHEDULE:
            raise InputError(f"--peft_config {path}: {name} of ADALORA follows from the steps of the run; leave it out")
        values |= {"total_step": 1_000_000, "tfinal": 0}  # put in by RankSchedule
    try:
        return kinds[kind](**values)
    except (ValueError, TypeError) as error:
        raise InputError(f"--peft_config {path}: {one_line(error)}") from None


def _check_ties(model: PeftModel, holders: Counter[int], asked: str) -> None:
    """Raise `InputError` where weights that several layers hold are adapted in one: merged, the others would change."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and holders[id(getattr(module.get_base_layer(), "weight", None))] > 1:
            raise InputError(
                f"{asked}: the weights of {name.removeprefix('base_model.model.')} are those of another layer as well "
                "(tied), so what is trained beside them cannot be merged into them; leave it out"
            )


def _check_room(loaded: LoadedModel, args: TuningArguments, tokens: int) -> None:
    """Raise `InputError` if virtual tokens and text together exceed the positions of the model."""
    positions = getattr(transformer_of(loaded.model).config, "max_position_embeddings", None)
    if positions and loaded.read_length and loaded.read_length + tokens > positions:
        raise InputError(
            f"{args.asked}: {tokens} virtual tokens and {loaded.read_length} of text are more than the {positions} "
            "positions of the model; lower --num_virtual_tokens or the length of the text"
        )


# Saving


def save_alone(model: PeftModel, folder: Path, task_type: TaskType | None, new_parameters: Collection[str]) -> None:
    """Write what `model` has beyond its base, fresh weights included, so that peft puts it on that base again."""
    if not model.active_peft_config.is_prompt_learning:  # there the task decides where the virtual tokens go
        model.peft_config["default"].task_type = task_type
    model.save_pretrained(str(folder))
    base, prefix = (
        model.get_base_model(),
        "base_model." if model.active_peft_config.is_prompt_learning else "base_model.model.",
    )
    names = set(fresh_names(base, new_parameters))
    own = {name: weight for name, weight in base.named_parameters(remove_duplicate=False) if name in names}
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {f"{prefix}{n}": w.detach().cpu().contiguous() for n, w in own.items()}, path)


# AdaLoRA


class RankSchedule(TrainerCallback):
    """Steps AdaLoRA's rank allocation (Zhang et al. 2023, https://arxiv.org/abs/2303.10512), which nobody else does.

    From one and a half times `--lora_r` a matrix, over the steps from a tenth to seven tenths of the run, down to
    `--lora_r` on average. The last three tenths train with the ranks found.
    """

    def __init__(self, model: PeftModel):
        self.model, self.config = model, model.peft_config["default"]

    def on_train_begin(self, args, state, control, **kwargs):
        steps = state.max_steps
        self.config.total_step, self.config.tinit, self.config.tfinal = steps, steps // 10, 3 * steps // 10
        self.config.deltaT = max(1, steps // 200)
        if steps - self.config.tfinal - self.config.tinit < 2:
            raise InputError(f"--tuning adalora: {steps} steps are too few to choose ranks in; train longer")
        if state.global_step == 0:
            self.model.base_model.rankallocator.reset_ipt()
            self.config.rank_pattern = None

    def on_optimizer_step(self, args, state, control, **kwargs):
        for name, weight in self.model.named_parameters():
            if "lora_" in name and weight.requires_grad and weight.grad is None:  # of a layer that this step left out
                weight.grad = torch.zeros_like(weight)
        self.model.base_model.update_and_allocate(state.global_step + 1)


def allocation(model: PeftModel) -> dict[str, Tensor]:
    """What AdaLoRA's allocation has gathered so far, without which a resumed run would choose other ranks."""
    allocator, pattern = model.base_model.rankallocator, model.peft_config["default"].rank_pattern
    kept = {f"{kind}:{n}": t for kind in ("exp_avg_ipt", "exp_avg_unc") for n, t in getattr(allocator, kind).items()}
    kept |= {f"rank_pattern:{name}": torch.tensor(mask) for name, mask in (pattern or {}).items()}
    return {name: value.detach().cpu().contiguous() for name, value in kept.items()}


def restore_allocation(model: PeftModel, kept: dict[str, Tensor]) -> None:
    """Put back what `allocation` gave."""
    allocator, pattern = model.base_model.rankallocator, {}
    allocator.reset_ipt()
    for key, value in kept.items():
        kind, _, name = key.partition(":")
        if kind == "rank_pattern":
            pattern[name] = value.tolist()
        else:
            getattr(allocator, kind)[name] = value.to(model.device)
            allocator.ipt[name] = torch.zeros_like(value)
    model.peft_config["default"].rank_pattern = pattern or None


def orthogonality(model: PeftModel) -> Tensor:
    """AdaLoRA's regularizer: how far its matrices are from orthogonal ones, weighted (equation 4 of the paper)."""
    parts = []
    for name, weight in model.named_parameters():
        if "lora_A.default" in name or "lora_B.default" in name:
            product = weight @ weight.T if "lora_A" in name else weight.T @ weight
            parts.append(torch.linalg.norm(product - torch.eye(len(product), device=product.device)))
    return model.peft_config["default"].orth_reg_weight * torch.stack(parts).mean()


def is_adalora(model: nn.Module) -> bool:
    return isinstance(model, PeftModel) and model.peft_type == PeftType.ADALORA
