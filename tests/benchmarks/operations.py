"""Count the floating-point operations of a model for a batch, and measure the machine's best rate.

Only matrix products count, with two operations for each multiplication and addition, and only for real tokens. Padding,
and vocabulary scores without a label, are avoidable work. The share of the floor is the number of operations per second
divided by `matrix_rate`. Attention counts as if each token sees all tokens of its text, also under a causal mask
(Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B).
"""

import time
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.speed.head import first_tokens, take_chosen

#: layers by parts of their names: heads, and decoder layers that read the encoder
HEADS = {"cls", "lm_head", "classifier", "pre_classifier", "score", "qa_outputs"}
CROSS = {"encoder_attn", "crossattention", "EncDecAttention"}
QUERIES = {"query", "q_proj", "q", "q_lin", "c_attn"}
KEYS_AND_VALUES = {"key", "value", "k_proj", "v_proj", "k", "v"}


def sizes(inputs: dict[str, Tensor], encoder_decoder: bool) -> Tensor:
    """Return the sizes that determine the operations of a batch; the sizes of several batches can be added.

    The sizes are rows, source tokens, target tokens, their squares, their products, and labels: float64 of shape (7,).
    They stay on the batch's device to avoid a GPU synchronisation. The targets of an encoder-decoder are its labels.
    Under a block mask (`common.data.packing`) each token counts as if it sees its whole row.
    """
    source = inputs.get("real", inputs["attention_mask"]).sum(1).double()
    labels = inputs.get("labels")
    labelled = source * 0 if labels is None else (labels.view(len(labels), -1) != -100).sum(1).double()
    target = labelled if encoder_decoder else source * 0
    sums = [source * 0 + 1, source, target, source * source, target * target, source * target, labelled]
    return torch.stack(sums).sum(1)


def operations(model: nn.Module, size: Tensor) -> float:
    """Return the operations of training steps, forward and backward, for batches whose summed `sizes` are `size`.

    The backward pass of a product costs one more product for the gradient of the input, and one for the gradient of a
    trained weight. The two products of attention cost three times their forward pass.
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
        parts = name.removesuffix(".base_layer").split(".")  # LoRA adds this suffix
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
    """Return the layer that computes selected tokens only, or None, and whether these are the first of each row."""
    for name, layer in model.named_modules():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, partial) and hook.func is take_chosen:
                return name, hook.args[0] is first_tokens
    return None, False


def matrix_rate(dtype: torch.dtype, device: torch.device, size: int | None = None, tries: int = 10) -> float:
    """Return operations per second of a product of two square matrices: the best of `tries`, after two warm-ups.

    `size` defaults to 2,048, and to 8,192 on a GPU, because smaller products do not keep a GPU busy.
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
