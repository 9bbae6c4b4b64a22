"""Define the data arguments that extractive and abstractive training share."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from datasets import Dataset, DatasetDict

from common.args import LabeledDataArguments
from common.data.files import TEXT_CELLS, read_file
from common.data.json_files import parse_cell
from common.data.mapping import map_rows
from common.data.rows import UNLABELED, Gold, load_splits
from common.data.source import Located, ending_of

from .articles import as_text, check_document, check_row, check_splits, flatten, lacks_summary, of_cell

WORDS = ("auto", "english", "unicode")


@dataclass
class SummarizationDataArguments(LabeledDataArguments):
    """Arguments for the source of the rows, their columns and their scores."""

    sample: ClassVar[Path] = Path(__file__).resolve().parent / "sample"

    document_column_name: str = field(
        default="document", metadata={"help": "column with the document: a text or a list of turns"}
    )
    summary_column_name: str = field(default="summary", metadata={"help": "column with the summary"})
    references_column_name: str = field(
        default="references", metadata={"help": "optional column with a list of summaries; the best match counts"}
    )
    group_column_name: str | None = field(
        default=None, metadata={"help": "column with the domain of a row; each domain also gets its own scores"}
    )
    rouge_words: Literal[WORDS] = field(
        default="auto", metadata={"help": "words of ROUGE: english (with stemmer), unicode, or auto (by alphabet)"}
    )
    compare_to: str | None = field(
        default=None, metadata={"help": "predictions_test.jsonl of another run, for a significance test of ROUGE"}
    )

    def __post_init__(self) -> None:
        if not (self.train_file or self.dataset_name):
            self.group_column_name = "domain"
        super().__post_init__()

    def load(self) -> tuple[DatasetDict, Dataset | None]:
        """Load and check the splits; the columns are `document`, `summary`, `references` and optionally `group`.

        Returns:
            The splits; the test rows if they have no summaries, else None.
        """
        columns = {"document": self.document_column_name, "summary": self.summary_column_name}
        if self.group_column_name:
            columns["group"] = self.group_column_name
        optional = {"references": self.references_column_name}
        gold = Gold("summary", ("summary",), lacks_summary, check_document, drop=bool(self.drop_unlabeled))
        options = {"optional": optional, "gold": gold, "carve_by": "document", "convert": flatten}
        data = load_splits(self, columns, check_row, read=self.read, **options)
        unlabeled = data.pop(UNLABELED, None)
        check_splits(data)
        if unlabeled is not None:
            unlabeled = map_rows(
                unlabeled.remove_columns("references"), lambda row: {"document": as_text(row["document"])}
            )
        return data, unlabeled

    def read(self, path: str) -> Iterator[Located]:
        """Yield the rows of a file, with turns joined as lines and references in CSV cells parsed as lists."""
        in_cells = ending_of(Path(path)) in TEXT_CELLS
        for where, row in read_file(path, args=self):
            if isinstance(row, dict):
                text = as_text(of_cell(row, row.get(self.document_column_name)))
                row = row | ({} if text is None else {self.document_column_name: text})
                cell = row.get(self.references_column_name)
                if in_cells and isinstance(cell, str):  # an empty cell means no references
                    row = row | {self.references_column_name: _parse_cell(cell) if cell.strip() else None}
            yield where, row


def _parse_cell(cell: str) -> Any:
    """Parse the list in a cell; return another cell unchanged, because `check_row` reports the cell."""
    try:
        return parse_cell(cell)
    except ValueError:
        return cell
