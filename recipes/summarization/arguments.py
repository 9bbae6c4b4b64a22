"""What a run of summarization is told of its data, its model and its outputs, and what is of one method only."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from common.args import DEFAULT_ENCODER, DataArguments
from common.data.files import Located, parse_json, read_file
from common.errors import InputError
from common.models.decoding import GenerationArguments
from common.models.encoder_decoder import Seq2SeqModelArguments

from .articles import as_text

WORDS = ("auto", "english", "unicode")
#: arguments that one of the two methods has no use for, by the method that takes them
FOR_ONE = {
    "extractive": ("summary_sentences",),
    "abstractive": (
        *("from_scratch", "warm_start", "language", "source_prefix", "max_tokens_per_batch"),
        *("eval_generate_samples", "average_checkpoints", "r_drop", "predict_with_generate"),
        *("num_beams", "length_penalty", "max_target_length", "no_repeat_ngram_size"),
    ),
}


@dataclass
class SummarizationDataArguments(DataArguments):
    """Where the rows come from, which columns hold what, and how they are scored."""

    sample: ClassVar[Path | None] = Path(__file__).resolve().parent / "sample"

    document_column_name: str = field(
        default="document", metadata={"help": "column with the text to summarize, or with a list of turns"}
    )
    summary_column_name: str = field(default="summary", metadata={"help": "column with its summary"})
    references_column_name: str = field(
        default="references", metadata={"help": "column with a list of summaries; the best counts; may be missing"}
    )
    group_column_name: str | None = field(
        default=None, metadata={"help": "column with the domain of a row; each is scored for itself too"}
    )
    summary_sentences: int | None = field(
        default=None, metadata={"help": "sentences of an extractive summary; the validation rows choose when not given"}
    )
    language: str | None = field(
        default=None, metadata={"help": "language of the texts, for models that must be told, such as mBART: en, de"}
    )
    source_prefix: str | None = field(
        default=None, metadata={"help": "text in front of each document; that of T5 is known"}
    )
    rouge_words: Literal[WORDS] = field(
        default="auto", metadata={"help": "words of ROUGE: english (with stemmer), unicode, or by the letters"}
    )
    compare_to: str | None = field(
        default=None, metadata={"help": "predictions_test.jsonl of another run: is the difference in ROUGE chance?"}
    )

    def __post_init__(self) -> None:
        if not self.has_source():
            self.group_column_name = "domain"  # of the sample
        super().__post_init__()
        if self.summary_sentences is not None and self.summary_sentences < 1:
            raise InputError("--summary_sentences must be at least 1")

    def columns(self) -> dict[str, str]:
        """What `load_splits` is to read."""
        group = {"group": self.group_column_name} if self.group_column_name else {}
        return {"document": self.document_column_name, "summary": self.summary_column_name} | group

    def read(self, path: str) -> Iterator[Located]:
        """Rows of a file, turns as lines of one text; in CSV cells references are a JSON list."""
        in_cells = Path(path).suffix.lower() in (".csv", ".tsv")
        for where, row in read_file(path):
            if isinstance(row, dict):
                text = as_text(row.get(self.document_column_name))
                row = row | ({} if text is None else {self.document_column_name: text})
                cell = row.get(self.references_column_name)
                if in_cells and isinstance(cell, str):  # an empty one is how CSV says that there are none
                    row = row | {self.references_column_name: _json(cell) if cell.strip() else None}
            yield where, row


def _json(cell: str) -> Any:
    try:
        return parse_json(cell)
    except (ValueError, RecursionError):
        return cell


@dataclass
class SummarizationModelArguments(Seq2SeqModelArguments):
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "local folder or hub id of an encoder, or of an encoder-decoder that writes"}
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is None and self.from_scratch is None:
            self.model_name_or_path = DEFAULT_ENCODER
        super().__post_init__()


@dataclass
class SummaryGenerationArguments(GenerationArguments):
    max_source_length: int = field(default=512, metadata={"help": "sub-tokens of a document that are read at once"})
    no_repeat_ngram_size: int = field(default=3, metadata={"help": "n-grams that no output may repeat; 0: any may"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_source_length < 16 or self.no_repeat_ngram_size < 0:
            raise InputError("--max_source_length must be at least 16, and --no_repeat_ngram_size at least 0")


def check_method(method: str, *groups: Any) -> None:
    """Raise `InputError` for what of the arguments in `groups` only the other method than `method` takes."""
    other = "abstractive" if method == "extractive" else "extractive"
    defaults = {f.name: f.default for group in groups for f in fields(group)}
    own = {name: getattr(group, name) for group in groups for name in FOR_ONE[other] if hasattr(group, name)}
    given = [name for name in FOR_ONE[other] if (own[name] or 0) != (defaults[name] or 0)]
    if given:
        raise InputError(f"{', '.join(f'--{name}' for name in given)}: for --method {other} only")
