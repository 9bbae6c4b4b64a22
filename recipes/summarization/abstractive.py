"""Arguments of abstractive summarization, and how a model is prompted for it."""

from dataclasses import dataclass, field

from datasets import DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.args import DEFAULT_ENCODER
from common.data.language_codes import Direction, direction, language_codes
from common.errors import InputError, tell
from common.models.decoding import GenerationArguments, set_generation
from common.models.encoder_decoder import Seq2SeqModelArguments
from common.tuning import TuningArguments

from .arguments import SummarizationDataArguments


@dataclass
class AbstractiveModelArguments(Seq2SeqModelArguments):
    def __post_init__(self) -> None:
        if self.model_name_or_path in (None, DEFAULT_ENCODER) and self.from_scratch is None:
            self.warm_start = self.warm_start or "both"  # an encoder, which has no decoder
        super().__post_init__()


@dataclass
class AbstractiveDataArguments(SummarizationDataArguments):
    language: str | None = field(
        default=None, metadata={"help": "language of the texts, for models that need it, such as mBART: en, de"}
    )
    source_prefix: str | None = field(
        default=None, metadata={"help": "text in front of each document; that of T5 is known"}
    )


@dataclass
class AbstractiveGenerationArguments(GenerationArguments):
    max_source_length: int = field(
        default=512, metadata={"help": "tokens of a document that are read at once", "resume": "fixed"}
    )
    no_repeat_ngram_size: int = field(default=3, metadata={"help": "n-grams that no output may repeat; 0: any may"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_source_length < 16 or self.no_repeat_ngram_size < 0:
            raise InputError("--max_source_length must be at least 16, and --no_repeat_ngram_size at least 0")


#: arguments of a run, beside those of the training
GROUPS = (
    AbstractiveModelArguments,
    AbstractiveDataArguments,
    AbstractiveGenerationArguments,
    TuningArguments,
)


def direction_of(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, language: str | None, source_prefix: str | None
) -> Direction:
    """Return how `model` is prompted to summarize: T5 by the prefix "summarize: " (Raffel et al. 2020).

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


def set_search(model: PreTrainedModel, args: AbstractiveGenerationArguments) -> None:
    """Put the search that `args` asks for into the generation configuration of `model`."""
    set_generation(model, args)
    model.generation_config.no_repeat_ngram_size = args.no_repeat_ngram_size or None


def drop_cut_summaries(rows: DatasetDict) -> tuple[DatasetDict, dict[str, list[bool]]]:
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
