"""Define the arguments of abstractive summarization, and prompt the model."""

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
            self.warm_start = self.warm_start or "both"  # the default is an encoder without decoder
        super().__post_init__()


@dataclass
class AbstractiveDataArguments(SummarizationDataArguments):
    language: str | None = field(
        default=None,
        metadata={"help": "language of the texts, such as en; required by multilingual models such as mBART"},
    )
    source_prefix: str | None = field(
        default=None, metadata={"help": "text in front of each document; default: the prefix of T5"}
    )


@dataclass
class AbstractiveGenerationArguments(GenerationArguments):
    max_source_length: int = field(
        default=512, metadata={"help": "maximum tokens of a document in one input", "resume": "fixed"}
    )
    no_repeat_ngram_size: int = field(
        default=3, metadata={"help": "length of n-grams that an output may not repeat; 0: no limit"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_source_length < 16 or self.no_repeat_ngram_size < 0:
            raise InputError("--max_source_length must be at least 16, and --no_repeat_ngram_size at least 0")


#: arguments of a run, without the training arguments
GROUPS = (
    AbstractiveModelArguments,
    AbstractiveDataArguments,
    AbstractiveGenerationArguments,
    TuningArguments,
)


def direction_of(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, language: str | None, source_prefix: str | None
) -> Direction:
    """Return the prompt that makes `model` summarize.

    T5 gets the prefix "summarize: " (Raffel et al. 2020). Multilingual models (mBART, NLLB, M2M100) get `language` on
    both sides.

    Raises:
        InputError: a multilingual model gets no language, or an unknown one.
    """
    if source_prefix is None:
        source_prefix = "summarize: " if model.config.model_type == "t5" else ""
    if language is None:
        if language_codes(tokenizer):
            raise InputError(f"--language: {model.name_or_path} needs the language of the texts; add --language en")
        return Direction("", "", source_prefix=source_prefix)
    return direction(tokenizer, model, language, language, source_prefix=source_prefix)


def set_search(model: PreTrainedModel, args: AbstractiveGenerationArguments) -> None:
    """Set the generation configuration of `model` from `args`."""
    set_generation(model, args)
    model.generation_config.no_repeat_ngram_size = args.no_repeat_ngram_size or None


def drop_cut_summaries(rows: DatasetDict) -> tuple[DatasetDict, dict[str, list[bool]]]:
    """Remove the training rows with a cut summary, because cut summaries teach the model to stop anywhere.

    Returns:
        The remaining rows, and for each split whether each document is cut.

    Raises:
        InputError: every training summary is cut.
    """
    for name, encoded in rows.items():
        for column, problem in (("cut", "documents exceed --max_source_length and are cut"),
                                ("summary_cut", "summaries exceed --max_target_length")):  # fmt: skip
            count = sum(encoded[column])
            action = " and are not used for training" if (name, column) == ("train", "summary_cut") else ""
            if count:
                tell(f"{name}: {count:,} of {len(encoded):,} {problem}{action}")
    rows["train"] = rows["train"].select([i for i, cut in enumerate(rows["train"]["summary_cut"]) if not cut])
    if len(rows["train"]) == 0:
        raise InputError("every training summary exceeds --max_target_length; raise this limit")
    return rows.remove_columns(["cut", "summary_cut"]), {name: encoded["cut"][:] for name, encoded in rows.items()}
