"""Count the tokens of a row that are left for texts."""

from transformers import PreTrainedTokenizerBase

from common.errors import InputError


def room_of(
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    pair: bool = False,
    least: int = 1,
    argument: str = "max_seq_length",
) -> int:
    """Return the tokens of a row of `max_length` tokens that are not special.

    Args:
        tokenizer: the tokenizer.
        max_length: longest row, in tokens.
        pair: whether a row has two texts.
        least: fewest tokens that the recipe needs.
        argument: name of the argument that sets `max_length`, for messages.

    Raises:
        InputError: fewer than `least` tokens are left.
    """
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length < special + least:
        raise InputError(
            f"--{argument} {max_length}: a row has {special} special tokens and needs {least} or more others; give at "
            f"least {special + least}"
        )
    return max_length - special
