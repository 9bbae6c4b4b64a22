"""Virtual tokens in front of a text, hidden again from the head."""

import warnings

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn

from common.errors import InputError


def let_heads_see_the_text_only(model: PeftModel) -> None:
    """Take the vectors of virtual tokens away before the head, which would else score them as if they were text.

    Logits are then as long as labels, spans stand where they are looked for, and a pooler reads the first sub-token of
    the text. Of an encoder-decoder the decoder attends to them, so nothing is taken away. Raises `InputError` where
    padding then has a share in what the model says, as with heads that look for the last sub-token by its id; where the
    model takes no virtual tokens; and where they cannot be taken away.
    """
    warnings.filterwarnings("ignore", message="(Token type|Position) ids are not supported")
    config, base = model.active_peft_config, model.get_base_model()
    if base.config.is_encoder_decoder:
        return
    if config.peft_type not in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE):  # they put in keys and values alone
        _hide(model, base.base_model, config.num_virtual_tokens)
    ids = torch.randint(0, base.config.vocab_size, (1, 5), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.full((1, 3), base.config.pad_token_id or 0)], 1)
    training, device = model.training, model.device
    model.eval()
    try:
        with torch.no_grad():
            alone = model(input_ids=ids.to(device), attention_mask=torch.ones_like(ids).to(device))
            beside = model(input_ids=padded.to(device), attention_mask=(torch.arange(8) < 5).long()[None].to(device))
    except (RuntimeError, TypeError, ValueError):
        raise InputError(
            f"--tuning: a {base.config.model_type} model does not take what {config.peft_type.value.lower()} puts in "
            "front of its text; take lora, or another method"
        ) from None
    model.train(training)
    if any(isinstance(v, Tensor) and v.shape[1:2] == (5 + config.num_virtual_tokens,) for v in alone.values()):
        raise InputError(
            f"--tuning: the head of {type(base).__name__} cannot be kept from reading virtual tokens; take lora, or "
            "another method without them"
        )
    for one, other in zip(alone.values(), beside.values(), strict=True):
        if isinstance(one, Tensor) and not torch.allclose(one, other[:, : one.shape[1]], rtol=1e-3, atol=1e-4):
            raise InputError(
                f"--tuning: {type(base).__name__} reads padding when virtual tokens stand in front of its text; take "
                "lora, or another method without them"
            )


def _hide(model: PeftModel, body: nn.Module, count: int) -> None:
    inside = False  # during generation the base model is called by itself, and needs no cut

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
    body.register_forward_hook(cut, prepend=True)  # in front of what chooses positions of the text
    for name, module in body.named_children():
        if name == "pooler":
            module.register_forward_pre_hook(pool)
