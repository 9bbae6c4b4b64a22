"""Set the source and target language of a translation model, as its model family requires, and encode its texts."""

from dataclasses import dataclass
from functools import cache
from typing import cast

from babel.core import Locale, UnknownLocaleError, get_global
from transformers import (
    ByT5Tokenizer,
    M2M100Tokenizer,
    MarianTokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB_CODES

from common.data.tokens import ends_of
from common.errors import InputError


@dataclass
class Direction:
    """A translation direction, saved in the model's configuration for inference.

    Attributes:
        source_lang: language of the sources, as the user names it.
        target_lang: language of the targets, as the user names it.
        source_code: code of the source language in the tokenizer; empty without codes.
        target_code: code of the target language in the tokenizer; empty without codes.
        source_prefix: text put before each source.
    """

    source_lang: str
    target_lang: str
    source_code: str = ""
    target_code: str = ""
    source_prefix: str = ""


def direction(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    source_lang: str,
    target_lang: str,
    source_code: str | None = None,
    target_code: str | None = None,
    source_prefix: str | None = None,
    tag: bool = False,
) -> Direction:
    """Return the codes and the prefix by which `model` translates from `source_lang` to `target_lang`.

    - mBART, mBART-50, NLLB, M2M100: language codes of the tokenizer (Tang et al. 2020, https://arxiv.org/abs/2008.00401;
      https://arxiv.org/abs/2207.04672; Fan et al. 2020, https://arxiv.org/abs/2010.11125)
    - Marian with several targets: the tag of the target before the source, such as `>>deu<<`
    - T5: "translate English to German: " before the source (Raffel et al. 2020, https://arxiv.org/abs/1910.10683)
    - other models, and mT5 and ByT5, which are not pretrained to translate: nothing, or with `tag` `<2de>` before the
      source (Johnson et al. 2017, https://aclanthology.org/Q17-1024)

    Args:
        tokenizer: the tokenizer of the model.
        model: the model.
        source_lang: language of the sources.
        target_lang: language of the targets.
        source_code: code to use instead of the detected one.
        target_code: code to use instead of the detected one.
        source_prefix: text to put before each source instead of the detected one.
        tag: the model learns several targets, and each source needs a tag.

    Raises:
        InputError: the model has no code, or several codes, for a language.
    """
    result = Direction(source_lang, target_lang, source_prefix=source_prefix or "")
    codes = language_codes(tokenizer)
    if isinstance(tokenizer, MarianTokenizer) and codes:
        if source_prefix is None:
            result.source_prefix = _code("target", target_lang, target_code, codes) + " "
    elif codes:
        result.source_code = _code("source", source_lang, source_code, codes)
        result.target_code = _code("target", target_lang, target_code, codes)
    elif source_prefix is not None:
        pass
    elif model.config.model_type == "t5" and not isinstance(tokenizer, ByT5Tokenizer):
        result.source_prefix = f"translate {_in_english(source_lang)} to {_in_english(target_lang)}: "
    elif tag:
        result.source_prefix = tag_of(target_lang) + " "
    return result


def tag_of(language: str) -> str:
    """Return the tag before a source whose target language is `language`."""
    return f"<2{language}>"


def tags_of(pairs: list[tuple[str, str]]) -> list[str]:
    """Return the tags by which a new model distinguishes the targets of `pairs`: none for one target."""
    targets = dict.fromkeys(target for _, target in pairs)
    return [tag_of(target) for target in targets] if len(targets) > 1 else []


def directions_of(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, directions: list[tuple[str, str]], **given: str | None
) -> dict[str, Direction]:
    """Return name -> direction of each pair, such as `en-de`; arguments and errors as for `direction`."""
    several = len({target for _, target in directions}) > 1
    return {
        f"{source}-{target}": direction(tokenizer, model, source, target, **given, tag=several)
        for source, target in directions
    }


def set_directions(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, directions: list[Direction]
) -> tuple[set[int], str | None]:
    """Prepare `model` to generate the targets of `directions`.

    Returns:
        The ids of the language tokens that outputs begin with, and the position of a row's language in the decoder
        input: `"start"`, `"first"` or None. `common.training.seq2seq.Seq2SeqTrainer` expects both.
    """
    set_direction(tokenizer, model, directions[0])
    if not directions[0].target_code:
        return set(), None
    codes = {target_id(tokenizer, direction.target_code) for direction in directions}
    several = len(codes) > 1
    if begins_with_language(tokenizer):
        return set(), "start" if several else None
    if several:
        model.generation_config.forced_bos_token_id = None
    return codes, "first" if several else None


def set_direction(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, direction: Direction) -> None:
    """Set the languages of `direction` in `tokenizer`, and the first token of the outputs of `model`."""
    if not direction.target_code:
        return
    mark_texts(tokenizer, direction)
    target = target_id(tokenizer, direction.target_code)
    if begins_with_language(tokenizer):
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = target
    else:
        model.generation_config.forced_bos_token_id = target


def mark_texts(tokenizer: PreTrainedTokenizerBase, direction: Direction) -> None:
    """Set the languages of `direction` in `tokenizer`, if the tokenizer has language codes."""
    if direction.target_code:
        tokenizer.src_lang, tokenizer.tgt_lang = direction.source_code, direction.target_code


def encode_sources(
    tokenizer: PreTrainedTokenizerBase, prefix: str, texts: list[str], max_length: int | None = None
) -> list[list[int]]:
    """Return the tokens of `prefix` with each text, and the special tokens around both.

    A special token in `prefix`, such as the tag `<2de>`, stays a special token, unlike one in a text.

    Args:
        tokenizer: the tokenizer, fast or slow.
        prefix: what precedes each text.
        texts: the texts.
        max_length: most tokens of a row; the end of a longer text is cut off. None for no limit.
    """
    if not texts:
        return []
    in_prefix = [token for token in tokenizer.all_special_tokens if token in prefix]
    end = max((prefix.rfind(token) + len(token) for token in in_prefix), default=0)
    head = tokenizer(prefix[:end], add_special_tokens=False, split_special_tokens=False)["input_ids"] if end else []
    rest = [prefix[end:] + text for text in (texts if prefix else without_codes(tokenizer, texts))]
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length - len(head)}
    rows = tokenizer(rest, verbose=False, **cut)["input_ids"]
    at = len(ends_of(tokenizer)[0]) if head else 0
    return [row[:at] + head + row[at:] for row in rows]


def without_codes(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[str]:
    """Put a space, which has no token, before a language code of Marian that begins a text, such as `>>fra<<`."""
    if not isinstance(tokenizer, MarianTokenizer) or not tokenizer.split_special_tokens:
        return texts
    return [f" {text}" if text.startswith(">>") else text for text in texts]


def begins_with_language(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the language is the decoder's start token (mBART), not the first output token (others)."""
    return isinstance(tokenizer, MBartTokenizer)


def target_id(tokenizer: PreTrainedTokenizerBase, code: str) -> int:
    """Return the id of the token of a language."""
    if isinstance(tokenizer, M2M100Tokenizer):
        return tokenizer.get_lang_id(code)
    return cast(int, tokenizer.convert_tokens_to_ids(code))  # a list for a list of tokens


def language_codes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the language codes of a tokenizer; empty if the tokenizer has none."""
    if isinstance(tokenizer, MarianTokenizer):
        return tokenizer.supported_language_codes
    if isinstance(tokenizer, M2M100Tokenizer):
        return list(tokenizer.lang_code_to_token)
    if isinstance(tokenizer, (MBartTokenizer, MBart50Tokenizer)):
        return list(tokenizer.lang_code_to_id)
    return list(NLLB_CODES) if isinstance(tokenizer, NllbTokenizer) else []


def _code(side: str, language: str, given: str | None, codes: list[str]) -> str:
    """Return the one of `codes` that matches `language`: `de` matches `de`, `de_DE`, `deu_Latn` and `>>deu<<`."""
    if given is not None:
        matches = [code for code in codes if code.strip("<>") == given.strip("<>")]
        language = given
    else:
        matches = [code for code in codes if code.strip("<>") == language]
        matches = matches or [code for code in codes if two_letters(code) == two_letters(language)]
    if len(matches) == 1:
        return matches[0]
    choices = ", ".join(matches or sorted(codes)[:8]) + ("" if matches else ", ...")
    count = "several codes" if matches else "no code"
    raise InputError(f"--{side}_code: the model has {count} for {language!r}; give one of: {choices}")


@cache
def two_letters(code: str) -> str:
    """Return the shortest code of a language in the CLDR: `de` for `de_DE`, `deu_Latn` or `>>deu<<`."""
    language = code.strip("<>").replace("-", "_").split("_")[0].lower()
    alias = get_global("language_aliases").get(language, language)
    return (alias if isinstance(alias, str) else language).split("_")[0]


def _in_english(language: str) -> str:
    try:
        return Locale.parse(two_letters(language)).get_language_name("en") or language
    except (UnknownLocaleError, ValueError):
        return language
