"""Arguments of `make annotate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.data.files import check_output
from common.errors import InputError, check_file_exists
from common.inference.predictor import PredictArguments


@dataclass
class AnnotateArguments(PredictArguments):
    """Choose the rows of a pool to label next. Recipes subclass this together with their arguments of predict."""

    input: str | None = field(default=None, metadata={"help": "pool of rows without labels, in a format of predict"})
    output: str | None = field(
        default=None, metadata={"help": "file to write: the rows to label, the most useful first"}
    )
    n: int = field(default=50, metadata={"help": "number of rows to label"})
    strategy: Literal["margin", "entropy", "diverse", "badge", "random"] = field(
        default="margin",
        metadata={
            "help": "margin, entropy: rows of which the model is unsure; diverse: rows unlike each other; badge: both; "
            "random: a random sample, such as for test rows"
        },
    )
    labeled: list[str] | None = field(
        default=None,
        metadata={"help": "files of labelled rows, such as train and test; equal rows are left out"},
    )
    format: Literal["jsonl", "label_studio", "doccano"] = field(
        default="jsonl", metadata={"help": "jsonl: what train reads; or tasks to import into Label Studio or doccano"}
    )
    relabel: bool = field(default=False, metadata={"help": "also choose rows of the pool that have a label"})
    candidates: int = field(
        default=10_000,
        metadata={"help": "rows among which diverse (drawn at random) and badge (the most uncertain) choose"},
    )
    seed: int = field(default=0, metadata={"help": "seed of the draws of diverse, badge and random"})
    buffer_rows: int = field(default=1024, metadata={"help": "rows read and sorted by length at a time"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.n, self.candidates) < 1:
            raise InputError("--n and --candidates must be at least 1 (with make: N=50)")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed}: must be at least 0 and below 2**32")
        for path in self.labeled or []:
            if not Path(path).is_dir():
                check_file_exists("labeled", path)
        if self.format == "label_studio":
            if Path(self.output or "").suffix.lower() != ".json":
                raise InputError(f"--output {self.output}: Label Studio imports .json; end the name in .json")
            check_output(self.interface, self.overwrite)

    @property
    def interface(self) -> Path:
        """Return the file of the labelling interface of Label Studio, beside the output."""
        return Path(self.output or "").with_suffix(".xml")
