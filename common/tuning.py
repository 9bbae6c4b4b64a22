"""How much of the model is trained: all of it, or low-rank matrices beside it (LoRA)."""

import os
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from common.args import LoraArguments
from common.cpu import quicken_dropout
from common.errors import InputError, tell


def add_lora(
    model: PreTrainedModel, args: LoraArguments, task_type: str | None, trained: list[str] | None = None
) -> PreTrainedModel | PeftModel:
    """`model` itself, or under `--lora_r` the same with LoRA matrices (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    `task_type` is one of `peft.TaskType`: by it peft knows the head, which is trained in full and saved. Where peft has
    none for the task it is None, and `trained` names the modules that are.
    """
    if args.lora_r is None:
        return model
    for name in ("FSDP", "DEEPSPEED"):  # they shard the weights that the adapter is merged into
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise InputError(f"--lora_r: cannot be merged and saved under {name}; launch with multi_gpu.yaml")
    config = LoraConfig(
        task_type=task_type,
        r=args.lora_r,
        lora_alpha=2 * args.lora_r if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        modules_to_save=trained,
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:  # names the modules it does not find, or asks for some
        raise InputError(f"--lora_target_modules: {error}") from None
    if not torch.accelerator.is_available():
        quicken_dropout(wrapped)
    trained, total = wrapped.get_nb_trainable_parameters()
    tell(f"LoRA: {trained:,} of {total:,} parameters are trained")
    return wrapped


def merge_lora(model: PreTrainedModel | PeftModel, output_dir: str, save: bool) -> PreTrainedModel:
    """The plain model that `model` amounts to: LoRA matrices added into the weights, wrapper gone.

    With `save`, the adapter alone is kept in `output_dir/adapter`. The result computes what `model` computes, to
    rounding, and loads like any other checkpoint.
    """
    if not isinstance(model, PeftModel):
        return model
    if save:
        model.save_pretrained(str(Path(output_dir) / "adapter"))
    return model.merge_and_unload()
