"""How many floating-point operations a model needs for a batch, and how many a second the machine does at best.

Only matrix products count, two operations for each multiplication and addition, and only of real sub-tokens: padding,
and scores of the vocabulary where there is no label, are work that need not be done. The share of the floor is this
number a second over `matrix_rate`. As usual (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B)
attention counts as if each sub-token of a text saw all others, under a causal mask too.
"""

import time
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.speed.head import first_tokens, take_chosen

#: layers by the parts of their names: what stands behind the body of a model, what reads the encoder from a decoder
HEADS = {"cls", "lm_head", "classifier", "pre_classifier", "score", "qa_outputs"}
CROSS = {"encoder_attn", "crossattention", "EncDecAttention"}
QUERIES = {"query", "q_proj", "q", "q_lin", "c_attn"}
KEYS_AND_VALUES = {"key", "value", "k_proj", "v_proj", "k", "v"}


def sizes(inputs: dict[str, Tensor], encoder_decoder: bool) -> Tensor:
    """What the operations of a batch depend on; the sum over batches tells those of all.

    Rows, sub-tokens of sources, and of targets, their squares, their products, and labels: float64 of shape (7,), on
    the batch's device, so that a GPU is not waited for. The targets of an encoder-decoder are its labels. Of a batch
    under a block mask (`common.data.packing`) each sub-token counts as if it saw its whole row.
    """
    source = inputs.get("real", inputs["attention_mask"]).sum(1).double()
    labels = inputs.get("labels")
    labelled = source * 0 if labels is None else (labels.view(len(labels), -1) != -100).sum(1).double()
    target = labelled if encoder_decoder else source * 0
    sums = [source * 0 + 1, source, target, source * source, target * target, source * target, labelled]
    return torch.stack(sums).sum(1)


def operations(model: nn.Module, size: Tensor) -> float:
    """Operations of the training steps, forward and backward, of batches whose `sizes` are `size` in sum.

    A product costs as much again backward for the gradient of its input, and once more for that of its weight where
    that is trained; two of attention cost three times their forward.
    """
    rows, sources, targets, source_squares, target_squares, crossed, labels = size.tolist()
    plain: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind, both_sides = type(plain).__name__, plain.config.is_encoder_decoder
    of_head = labels if kind.endswith(("MaskedLM", "PreTraining", "LMHeadModel", "CausalLM")) or both_sides else sources
    if kind.endswith("SequenceClassification"):
        of_head = rows
    cut, first_only = _cut(plain)
    total = 0.0
    for name, layer in plain.named_modules():
        if not isinstance(layer, nn.Linear | Conv1D):
            continue
        parts = name.removesuffix(".base_layer").split(".")  # under LoRA
        side = next((part for part in parts if part in ("encoder", "decoder")), None)
        decoding, crossing = both_sides and side != "encoder", not CROSS.isdisjoint(parts)
        if not HEADS.isdisjoint(parts):
            seen = of_head
        elif "pooler" in parts:
            seen = 0 if both_sides else rows
        elif decoding and not (crossing and parts[-1] in KEYS_AND_VALUES):
            seen = targets
        else:
            seen = sources
        chosen = cut is not None and name.startswith(f"{cut}.")
        if chosen and parts[-1] not in QUERIES | KEYS_AND_VALUES:
            seen = rows if first_only else labels
        total += 2 * layer.weight.numel() * seen * (2 + layer.weight.requires_grad)
        if parts[-1] in QUERIES:
            pairs = crossed if crossing else target_squares if decoding else source_squares
            if chosen and first_only:
                pairs = sources
            width = layer.nf // 3 if isinstance(layer, Conv1D) else layer.out_features
            total += 3 * 2 * 2 * pairs * width
    return total


def _cut(model: nn.Module) -> tuple[str | None, bool]:
    """The layer that computes chosen sub-tokens only, if any, and whether these are the first of each row."""
    for name, layer in model.named_modules():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, partial) and hook.func is take_chosen:
                return name, hook.args[0] is first_tokens
    return None, False


def matrix_rate(dtype: torch.dtype, device: torch.device, size: int | None = None, tries: int = 10) -> float:
    """Operations a second of the product of two square matrices: the fastest of `tries`, after two more.

    `size` is 2,048 when not given, and 8,192 on a GPU, which is not busy with less.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(tries + 2):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[2:])
