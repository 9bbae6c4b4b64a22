"""Check that the sizes of tokenizer, embeddings, positions and arguments agree, before training."""

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.errors import InputError
from common.models.structure import input_embeddings, transformer_of

#: rows are padded to a multiple of this many tokens, because each new shape of matrices costs time
PAD_MULTIPLE = 8
#: model types whose sinusoidal positions grow with the text
ANY_LENGTH = frozenset({"fsmt", "m2m_100", "nllb-moe"})


def pad_multiple(length: int | None) -> int:
    """Return the multiple to pad rows to, so that no padding exceeds the longest row of `length` tokens."""
    return 1 if length and length % PAD_MULTIPLE else PAD_MULTIPLE


def positions_of(model: nn.Module, side: str = "source") -> int | None:
    """Return the most tokens that `model` reads, or that one side of an encoder-decoder reads; None without a limit.

    A table of position embeddings may reserve its first rows: RoBERTa and similar models count positions from the
    padding id plus 1 (514 positions hold 512 tokens), BART from 2.

    Args:
        model: the model.
        side: source or target, for an encoder-decoder.
    """
    transformer = transformer_of(model)
    config, part, name = transformer.config, transformer, "max_position_embeddings"
    if config.model_type in ANY_LENGTH:
        return None
    if config.is_encoder_decoder:
        part = transformer.get_encoder() if side == "source" else transformer.get_decoder()
        config = getattr(part, "config", config)
        own = f"max_{'encoder' if side == 'source' else 'decoder'}_position_embeddings"  # LED
        name = own if hasattr(config, own) else name
    limits = [getattr(config, name, None)]
    for key, module in part.named_modules():
        table = getattr(module, "weight", None)
        key = key.rpartition(".")[2]
        if ("position" in key or key == "wpe") and isinstance(table, Tensor) and table.dim() == 2:
            padding = getattr(module, "padding_idx", None)
            reserved = getattr(module, "offset", 0) if padding is None else padding + 1
            limits.append(len(table) - reserved)
    return min((limit for limit in limits if limit), default=None)


def check_length(model: nn.Module, name: str, argument: str, length: int, side: str = "source") -> None:
    """Raise `InputError` if `model` reads fewer than `length` tokens, the value of `argument`."""
    positions = positions_of(model, side)
    if positions and length > positions:
        what = f"a {side} has" if transformer_of(model).config.is_encoder_decoder else f"{name} reads"
        raise InputError(f"--{argument} {length}: {what} at most {positions} tokens; lower --{argument} to {positions}")


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise `InputError` if the tokenizer has an id without an embedding; training would fail at its first use."""
    rows = len(input_embeddings(transformer_of(model)).weight)
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= rows:
        raise InputError(
            f"{name}: the tokenizer has ids up to {last} ({token!r}), and the model has {rows} embeddings; copy the "
            "tokenizer files of the checkpoint again, or choose another --model_name_or_path"
        )
