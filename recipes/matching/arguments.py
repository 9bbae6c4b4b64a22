"""Data arguments of matching."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from common.args import LabeledDataArguments
from common.errors import InputError

#: what rows teach: a query and its passage, a pair with a similarity, one with a label of 0 or 1, or a translation
Kind = Literal["ranking", "score", "label", "translation"]
#: kind -> recipe's names of its columns
COLUMNS: dict[str, tuple[str, ...]] = {
    "ranking": ("query", "positive"),
    "score": ("text", "text_pair", "score"),
    "label": ("text", "text_pair", "label"),
    "translation": ("text", "text_pair"),
}


@dataclass
class MatchingDataArguments(LabeledDataArguments):
    sample: ClassVar[Path | None] = Path(__file__).resolve().parent / "sample"

    rows: Literal["auto", "ranking", "score", "label"] = field(
        default="auto",
        metadata={
            "help": "ranking: queries with passages; score or label: pairs of texts with it; auto: by the columns"
        },
    )
    query_column_name: str = field(default="query", metadata={"help": "column with the query"})
    positive_column_name: str = field(default="positive", metadata={"help": "column with a passage that answers it"})
    positive_id_column_name: str | None = field(
        default=None, metadata={"help": "column with the id of that passage in --corpus_file, instead of its text"}
    )
    negatives_column_name: str = field(
        default="negatives", metadata={"help": "optional column with a list of passages that do not answer it"}
    )
    text_column_name: str = field(default="text", metadata={"help": "column with the first text of a scored pair"})
    text_pair_column_name: str = field(default="text_pair", metadata={"help": "column with the second text"})
    score_column_name: str | None = field(
        default=None, metadata={"help": "column with the score of a pair; default: score"}
    )
    label_column_name: str = field(
        default="label", metadata={"help": "column with 1 for a pair that belongs together, 0 for another"}
    )
    corpus_file: str | None = field(
        default=None,
        metadata={"help": "passages to search, rows of {id, text}; default: all passages of the rows"},
    )
    passage_column_name: str = field(default="text", metadata={"help": "column of --corpus_file with the passage"})
    max_negatives: int = field(default=5, metadata={"help": "negatives of a row to train on, the first N"})
    max_seq_length: int = field(
        default=256, metadata={"help": "tokens of a text; longer ones are cut", "resume": "fixed"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.score_column_name = self.score_column_name or "score"
        if self.domain_column is not None:
            raise InputError("--domain_column: a search is over all passages and has no domains; leave it out")
        if self.replay_file is not None:
            raise InputError("--replay_file: reads rows of labels and texts; add the old pairs to --train_file instead")
        if self.corpus_file is not None:
            self.check_path("corpus_file", self.corpus_file)
        elif self.positive_id_column_name is not None:
            raise InputError("--positive_id_column_name: names passages of a corpus; add --corpus_file")
        if self.max_negatives < 0:
            raise InputError(f"--max_negatives {self.max_negatives}: must be at least 0")

    def columns(self) -> dict[str, str]:
        """Return the recipe's name of each column of a row -> its name in the user's data, for the kind of the rows."""
        named = {ours: getattr(self, f"{ours}_column_name") for ours in COLUMNS.get(self.rows, COLUMNS["ranking"])}
        if self.positive_id_column_name is not None and "positive" in named:
            named["positive"] = self.positive_id_column_name
        return named

    def files(self) -> dict[str, str]:
        """Return argument -> file for the files of the run."""
        return super().files() | ({"corpus_file": self.corpus_file} if self.corpus_file else {})
