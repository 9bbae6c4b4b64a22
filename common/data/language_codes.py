"""Telling a model which language it reads and which it writes: each family of models has its own way."""

from dataclasses import dataclass
from functools import cache

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

from common.errors import InputError


@dataclass
class Direction:
    """From which language to which, in the names of a model. Saved in its configuration, and read by predict.

    `source_code` and `target_code` are the codes that its tokenizer knows, empty where it knows none; `source_prefix`
    is put in front of each source.
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
    """How `model` is told to translate from `source_lang` to `target_lang`.

    - mBART, mBART-50, NLLB, M2M100: codes that the tokenizer knows (Tang et al. 2020, https://arxiv.org/abs/2008.00401;
      https://arxiv.org/abs/2207.04672; Fan et al. 2020, https://arxiv.org/abs/2010.11125)
    - Marian for several targets: the target's tag in front of the source, as `>>deu<<`
    - T5: "translate English to German: " in front of the source (Raffel et al. 2020, https://arxiv.org/abs/1910.10683)
    - others, and mT5 and ByT5, which were not trained to translate: nothing, or with `tag`, where a model is to know
      several targets, `<2de>` in front of the source (Johnson et al. 2017, https://aclanthology.org/Q17-1024)

    What is given (not None) is taken as it is. Raises `InputError` for a language that the model does not know, or
    knows under several codes.
    """
    found = Direction(source_lang, target_lang, source_prefix=source_prefix or "")
    codes = language_codes(tokenizer)
    if isinstance(tokenizer, MarianTokenizer) and codes:
        if source_prefix is None:
            found.source_prefix = _code("target", target_lang, target_code, codes) + " "
    elif codes:
        found.source_code = _code("source", source_lang, source_code, codes)
        found.target_code = _code("target", target_lang, target_code, codes)
    elif source_prefix is not None:
        pass
    elif model.config.model_type == "t5" and not isinstance(tokenizer, ByT5Tokenizer):
        found.source_prefix = f"translate {_in_english(source_lang)} to {_in_english(target_lang)}: "
    elif tag:
        found.source_prefix = tag_of(target_lang) + " "
    return found


def tag_of(language: str) -> str:
    """What stands in front of a source that is to be translated to `language`."""
    return f"<2{language}>"


def tags_of(pairs: list[tuple[str, str]]) -> list[str]:
    """Return the tags that a new model needs to tell the targets of `pairs` apart: none for one target."""
    targets = dict.fromkeys(target for _, target in pairs)
    return [tag_of(target) for target in targets] if len(targets) > 1 else []


def directions_of(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, directions: list[tuple[str, str]], **given: str | None
) -> dict[str, Direction]:
    """Return the direction of each pair by its name, such as `en-de`; arguments and errors as for `direction`."""
    several = len({target for _, target in directions}) > 1
    return {
        f"{source}-{target}": direction(tokenizer, model, source, target, **given, tag=several)
        for source, target in directions
    }


def set_directions(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, directions: list[Direction]
) -> tuple[set[int], str | None]:
    """Prepare `model` to write the targets of `directions`: by `set_direction` where it is one.

    Returns the sub-tokens for languages that its outputs begin with, and where a row's language is told to the decoder,
    as `common.training.seq2seq.Seq2SeqTrainer` takes it.
    """
    set_direction(tokenizer, model, directions[0])
    if not directions[0].target_code:
        return set(), None
    codes = {target_id(tokenizer, way.target_code) for way in directions}
    several = len(codes) > 1
    if begins_with_language(tokenizer):
        return set(), "start" if several else None
    if several:
        model.generation_config.forced_bos_token_id = None
    return codes, "first" if several else None


def set_direction(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, way: Direction) -> None:
    """Have `tokenizer` mark texts by the languages of `way`, and `model` begin its outputs in the target language."""
    if not way.target_code:
        return
    mark_texts(tokenizer, way)
    target = target_id(tokenizer, way.target_code)
    if begins_with_language(tokenizer):
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = target
    else:
        model.generation_config.forced_bos_token_id = target


def mark_texts(tokenizer: PreTrainedTokenizerBase, way: Direction) -> None:
    """Have `tokenizer` mark texts by the languages of `way`, if it knows languages."""
    if way.target_code:
        tokenizer.src_lang, tokenizer.tgt_lang = way.source_code, way.target_code


def begins_with_language(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the decoder begins with the language itself: mBART's alone; others' outputs have it as the first."""
    return isinstance(tokenizer, MBartTokenizer)


def target_id(tokenizer: PreTrainedTokenizerBase, code: str) -> int:
    """The sub-token that stands for a language."""
    if isinstance(tokenizer, M2M100Tokenizer):
        return tokenizer.get_lang_id(code)
    return tokenizer.convert_tokens_to_ids(code)


def language_codes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The codes of languages that a tokenizer knows; none for one that knows nothing of languages."""
    if isinstance(tokenizer, MarianTokenizer):
        return tokenizer.supported_language_codes
    if isinstance(tokenizer, M2M100Tokenizer):
        return list(tokenizer.lang_code_to_token)
    if isinstance(tokenizer, (MBartTokenizer, MBart50Tokenizer)):
        return list(tokenizer.lang_code_to_id)
    return list(NLLB_CODES) if isinstance(tokenizer, NllbTokenizer) else []


def _code(side: str, language: str, given: str | None, codes: list[str]) -> str:
    """The one of `codes` that means `language`: `de` is `de`, `de_DE`, `deu_Latn` or `>>deu<<`."""
    if given is not None:
        found = [code for code in codes if code.strip("<>") == given.strip("<>")]
        language = given
    else:
        found = [code for code in codes if code.strip("<>") == language]
        found = found or [code for code in codes if two_letters(code) == two_letters(language)]
    if len(found) == 1:
        return found[0]
    near = ", ".join(found or sorted(codes)[:8]) + ("" if found else ", ...")
    raise InputError(
        f"--{side}_code: the model has {'several codes' if found else 'no code'} for {language!r}; give one of: {near}"
    )


@cache
def two_letters(code: str) -> str:
    """`de` for `de_DE`, `deu_Latn` or `>>deu<<`: the shortest code of the language in the CLDR."""
    language = code.strip("<>").replace("-", "_").split("_")[0].lower()
    found = get_global("language_aliases").get(language, language)
    return (found if isinstance(found, str) else language).split("_")[0]


def _in_english(language: str) -> str:
    try:
        return Locale.parse(two_letters(language)).get_language_name("en") or language
    except (UnknownLocaleError, ValueError):
        return language
