"""Remove virtual tokens before the task head."""

import warnings

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn

from common.errors import InputError
from common.models.structure import transformer_of
from common.models.trial import FAILURES, trial


def hide_virtual_tokens(model: PeftModel) -> None:
    """Remove the vectors of virtual tokens before the head, which would score them as text.

    Logits then have the length of the labels, spans have the positions of the text, and a pooler reads the first token
    of the text. An encoder-decoder keeps the vectors, because its decoder attends to them.

    Raises:
        InputError: the model takes no virtual tokens; its head still reads them; or its head reads padding, as a head
            does that finds the last token by its id.
    """
    warnings.filterwarnings("ignore", message="(Token type|Position) ids are not supported")
    config, base = model.active_peft_config, model.get_base_model()
    transformer = transformer_of(base)
    if transformer.config.is_encoder_decoder:
        return
    if config.peft_type not in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE):  # these add keys and values only
        _hide(model, transformer, config.num_virtual_tokens)
    ids = torch.randint(0, transformer.config.vocab_size, (1, 5), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.full((1, 3), transformer.config.pad_token_id or 0)], 1)
    device = model.device
    try:
        with trial(model):
            without_padding = model(input_ids=ids.to(device), attention_mask=torch.ones_like(ids).to(device))
            with_padding = model(
                input_ids=padded.to(device), attention_mask=(torch.arange(8) < 5).long()[None].to(device)
            )
    except FAILURES:
        kind = config.peft_type.value.lower()
        raise InputError(
            f"--tuning: a {transformer.config.model_type} model takes no virtual tokens of {kind}; give --tuning lora"
        ) from None
    if any(
        isinstance(v, Tensor) and v.shape[1:2] == (5 + config.num_virtual_tokens,) for v in without_padding.values()
    ):
        raise InputError(
            f"--tuning: the head of {type(base).__name__} would read virtual tokens as text; give --tuning lora, or "
            "another method without virtual tokens"
        )
    for expected, output in zip(without_padding.values(), with_padding.values(), strict=True):
        if isinstance(expected, Tensor) and not torch.allclose(
            expected, output[:, : expected.shape[1]], rtol=1e-3, atol=1e-4
        ):
            raise InputError(
                f"--tuning: {type(base).__name__} reads padding when virtual tokens precede the text; give --tuning "
                "lora, or another method without virtual tokens"
            )


def _hide(model: PeftModel, body: nn.Module, count: int) -> None:
    inside = False  # generation calls the base model directly and needs no cut

    def enter(*_) -> None:
        nonlocal inside
        inside = True

    def leave(*_) -> None:
        nonlocal inside
        inside = False

    def pool(module: nn.Module, args: tuple) -> tuple:
        return (args[0][:, count:], *args[1:]) if inside else args

    def cut(module: nn.Module, args: tuple, output):
        if inside:
            output[next(iter(output))] = output[0][:, count:].contiguous()
        return output

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)
    body.register_forward_hook(cut, prepend=True)  # before hooks that choose positions of the text
    for name, module in body.named_children():
        if name == "pooler":
            module.register_forward_pre_hook(pool)
