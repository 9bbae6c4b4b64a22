"""Define what a recipe tells a run that trains several tasks on one encoder: rows, model, trainer and scores.

A recipe takes part by a module `multitask` with a subclass of `JointTask` named `Task`. It builds model and trainer as
the recipe's own `train.py` does. The run then lets the models of all tasks share the weights of their encoder, and
trains each batch of a task by the trainer of the task.
"""

from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel
from transformers.trainer_utils import PredictionOutput

from common.args import DataArguments, ModelArguments, TrainingArguments
from common.data.columns import SAVED, described
from common.errors import InputError
from common.models.load import LoadedModel
from common.training.trainer import Trainer
from common.tuning import TunedModel

#: most labels in a message
SHOWN = 5


class JointTask:
    """A task beside others in one run. The run calls the methods in their order here.

    Attributes:
        score: the score that counts in the mean over the tasks; between 0 and 1, greater is better.
        pipeline: the task on the hub, such as `token-classification`.
        headline: names of the scores on the model card.
        usage: lines of Python that use the saved model in `{folder}`.
        refused: arguments of the recipe that do not work beside other tasks.
        name: name of the task in the run.
        parsed: one instance of each dataclass of the recipe's arguments.
        data: the rows of each split, once they are loaded.
        rows: the encoded rows of each split, once the model is loaded.
    """

    score: str
    pipeline: ClassVar[str]
    headline: ClassVar[tuple[str, ...]]
    usage: ClassVar[str]
    refused: ClassVar[tuple[str, ...]] = ()
    data: DatasetDict
    rows: dict[str, Dataset]

    def __init__(self, name: str, parsed: tuple[Any, ...]):
        self.name, self.parsed = name, parsed
        self.args = next(part for part in parsed if isinstance(part, TrainingArguments))
        if self.args.num_train_epochs is None:
            self.args.num_train_epochs = self.args.usual_epochs
        self.model_args = next(part for part in parsed if isinstance(part, ModelArguments))
        data_args = next(part for part in parsed if isinstance(part, DataArguments))
        self.data_args: Any = data_args  # of the class of the recipe

    def load(self) -> None:
        """Load and check the rows, and set `data`. Raises `InputError` for invalid rows."""
        raise NotImplementedError

    def load_texts(self, texts: DatasetDict) -> None:
        """Set `data` to texts of other tasks, by split in column `text`; only a task that needs no labels can."""
        raise InputError("texts_of: this recipe needs labelled rows; leave it out, and name files")

    def texts(self, split: str) -> list[str]:
        """Return the texts of a split, for a task on the texts of this one."""
        raise NotImplementedError

    def labels_in(self, split: str) -> set[str]:
        """Return the labels in a split; empty for a task without labels."""
        return set()

    def check_labels(self) -> None:
        """Raise `InputError` if a split has no label of the training rows: files of different tasks."""
        known = self.labels_in("train")
        for split in self.data.keys() - {"train"}:
            labels = self.labels_in(split)
            if labels and not labels & known:
                raise InputError(
                    f"{split}_file: none of its labels ({listed(labels)}) is in the training rows ({listed(known)}); "
                    "name files of one task"
                )

    def model(self) -> LoadedModel:
        """Load the model with its head, and set `rows` to the encoded rows."""
        raise NotImplementedError

    def trainer(self, tuned: TunedModel) -> Trainer:
        """Return the trainer of the recipe for the model, with training rows, collator, loss and scores."""
        raise NotImplementedError

    def test(self, trainer: Trainer, folder: Path | None) -> dict[str, dict[str, float]]:
        """Return the scores of the validation rows as `eval`, and those of the test rows, if there are some, as `test`.

        Settings that the validation rows choose, such as thresholds, go into the configuration of the model. Without
        such settings, this method of the base class is enough.

        Args:
            trainer: the trainer of the task.
            folder: gets `predictions_test.jsonl`; None to write nothing.
        """
        names = {"validation": "eval", "test": "test"}
        outputs = {p: trainer.predict(self.rows[s], metric_key_prefix=p) for s, p in names.items() if s in self.rows}
        if folder and "test" in outputs:
            self.write(folder, outputs["test"])
        return {prefix: scores_of(output.metrics, prefix) for prefix, output in outputs.items()}

    def write(self, folder: Path, output: PredictionOutput) -> None:
        """Write `predictions_test.jsonl` from the output for the test rows; `test` calls it."""

    def finish(self) -> None:
        """Write further files, such as an index, into the folder of the saved model, `args.output_dir`."""

    def describe_columns(self, model: PreTrainedModel) -> None:
        """Save the names of the columns with the model; predict reads the same ones."""
        model.config.update({SAVED: described(self.data_args.columns(), self.data["train"])})


def listed(labels: set[str]) -> str:
    """Return the first labels for a message."""
    return ", ".join(sorted(labels)[:SHOWN]) + (", ..." if len(labels) > SHOWN else "")


def scores_of(metrics: dict[str, float] | None, prefix: str) -> dict[str, float]:
    """Return the scores in the metrics of a prediction without their prefix, and without its seconds."""
    scores = {name.removeprefix(f"{prefix}_"): value for name, value in (metrics or {}).items()}
    ends = ("runtime", "_per_second")
    return {name: value for name, value in scores.items() if not name.endswith(ends)}
