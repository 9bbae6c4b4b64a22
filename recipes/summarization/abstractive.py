"""Documents and summaries as an encoder-decoder reads and writes them."""

from datasets import DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.data.language_codes import Direction, direction, language_codes
from common.errors import InputError, tell
from common.models.decoding import label_ids, set_generation

from .arguments import SummaryGenerationArguments


def language_of(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, language: str | None, source_prefix: str | None
) -> Direction:
    """How `model` is told to summarize: T5 by "summarize: " in front (Raffel et al. 2020, see `common.data.language_codes`).

    Models of many languages (mBART, NLLB, M2M100) are told `language` on both sides. Raises `InputError` where they are
    not, or do not know it.
    """
    if source_prefix is None:
        source_prefix = "summarize: " if model.config.model_type == "t5" else ""
    if language is None:
        if language_codes(tokenizer):
            raise InputError(f"--language: {model.name_or_path} must be told that of the texts, such as en")
        return Direction("", "", source_prefix=source_prefix)
    return direction(tokenizer, model, language, language, source_prefix=source_prefix)


def set_search(model: PreTrainedModel, args: SummaryGenerationArguments) -> None:
    """Put the search that `args` asks for into the generation configuration of `model`."""
    set_generation(model, args)
    model.generation_config.no_repeat_ngram_size = args.no_repeat_ngram_size or None


def encode(
    rows: dict[str, list],
    tokenizer: PreTrainedTokenizerBase,
    source_prefix: str,
    max_source_length: int,
    max_target_length: int,
    start: int | None = None,
) -> dict[str, list]:
    """`input_ids` of the documents and `labels` of the summaries, both cut to the greatest lengths.

    `cut` and `summary_cut` say of which something was taken off; `start` is what the model's decoder begins with.
    """
    sources = [source_prefix + text for text in rows["document"]]
    whole = tokenizer(sources, verbose=False)["input_ids"]
    labels = label_ids(tokenizer, rows["summary"], start)
    return {
        "input_ids": tokenizer(sources, truncation=True, max_length=max_source_length)["input_ids"],
        "labels": label_ids(tokenizer, rows["summary"], start, max_target_length),
        "cut": [len(ids) > max_source_length for ids in whole],
        "summary_cut": [len(ids) > max_target_length for ids in labels],
    }


def whole_rows(rows: DatasetDict) -> tuple[DatasetDict, dict[str, list[bool]]]:
    """`rows` without the training rows whose summary is cut, as it would teach to stop anywhere; which documents are.

    Raises `InputError` where no training row is left.
    """
    for name, encoded in rows.items():
        for column, what in (("cut", "documents exceed --max_source_length, and only their beginning is read"),
                             ("summary_cut", "summaries exceed --max_target_length")):  # fmt: skip
            count = sum(encoded[column])
            left = ", and are left out of training" if (name, column) == ("train", "summary_cut") else ""
            if count:
                tell(f"{name}: {count:,} of {len(encoded):,} {what}{left}")
    rows["train"] = rows["train"].filter(lambda cut: not cut, input_columns="summary_cut")
    if len(rows["train"]) == 0:
        raise InputError("every training summary exceeds --max_target_length; allow more")
    return rows.remove_columns(["cut", "summary_cut"]), {name: encoded["cut"][:] for name, encoded in rows.items()}
