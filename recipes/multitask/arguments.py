"""Arguments of training several tasks on one encoder."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from common.args import DataArguments, TrainingArguments
from common.errors import InputError, check_file_exists

Sampling = Literal["temperature", "proportional", "equal", "annealed", "fixed"]
Weighting = Literal["sampling", "sum", "uncertainty", "dwa", "gradnorm", "equal_norms", "pcgrad"]
#: arguments that name the rows of one task
OF_A_TASK = ("train_file", "validation_file", "test_file", "dataset_name", "dataset_config_name", "train_rows")
#: weightings that compare the gradients of all tasks in each step
BY_GRADIENTS = ("gradnorm", "pcgrad")
#: arguments of training that do not know tasks
WITHOUT = ("r_drop", "adversarial", "auto_find_batch_size")
SAMPLE = Path(__file__).resolve().parent / "sample" / "tasks.yaml"


@dataclass
class MultitaskDataArguments(DataArguments):
    """Choose the tasks. The other arguments of this group are the defaults of each task."""

    sample: ClassVar[Path | None] = None

    tasks: str | None = field(
        default=None, metadata={"help": "YAML file of the tasks: recipe, files and columns; default: the sample"}
    )

    #: content of the file; the record of the run keeps it, and resuming warns of a change
    tasks_content: str = field(default="", init=False)

    def __post_init__(self) -> None:
        for name in OF_A_TASK:
            if getattr(self, name) is not None:
                raise InputError(f"--{name}: belongs to one task; write it into the file of --tasks")
        self.tasks = str(SAMPLE) if self.tasks is None else self.tasks
        check_file_exists("tasks", self.tasks)
        self.tasks_content = Path(self.tasks).read_text(encoding="utf-8", errors="replace")
        super().__post_init__()

    def has_source(self) -> bool:
        """Return whether training data are named: --tasks names them."""
        return True

    def files(self) -> dict[str, str]:
        """Return argument -> file for the files of the run: that of the tasks, and those that it names."""
        assert self.tasks is not None
        try:
            content: Any = yaml.safe_load(Path(self.tasks).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return {"tasks": self.tasks}  # `read_tasks` reports the problem
        named = {
            f"{task} {key}": value
            for task, settings in (content.items() if isinstance(content, dict) else ())
            if isinstance(settings, dict)
            for key, value in settings.items()
            if isinstance(value, str) and key.endswith("_file") and Path(value).expanduser().exists()
        }
        return {"tasks": self.tasks} | named


@dataclass
class SharingArguments:
    """Choose the weights that the tasks share, how often each task is trained, and how much it counts."""

    _argument_group_name = "tasks"

    sharing: str = field(
        default="full",
        metadata={
            "help": "weights that all tasks train: full (the encoder), adapter (also an adapter for each task), top:k "
            "(all but the last k layers)",
            "resume": "fixed",
        },
    )
    batches: Literal["mixed", "homogeneous"] = field(
        default="mixed",
        metadata={"help": "mixed: each step has rows of all tasks; homogeneous: of one task", "resume": "fixed"},
    )
    sampling: Sampling = field(
        default="temperature",
        metadata={
            "help": "share of each task in the rows: proportional to its rows; temperature: to their power of 1/T; "
            "equal; annealed: from temperature to equal; fixed: `share` in the file of --tasks",
            "resume": "fixed",
        },
    )
    sampling_temperature: float = field(
        default=2.0, metadata={"help": "T of --sampling temperature and annealed; 1: proportional", "resume": "fixed"}
    )
    weighting: Weighting = field(
        default="equal_norms",
        metadata={
            "help": "weight of a task in the loss: equal_norms (gradients of one norm), sampling (its share), sum (1), "
            "learned by uncertainty, dwa or gradnorm; pcgrad: 1, without conflicting gradients",
            "resume": "fixed",
        },
    )
    weighting_learning_rate: float = field(
        default=0.025, metadata={"help": "learning rate of the weights of uncertainty and gradnorm", "resume": "fixed"}
    )
    gradnorm_alpha: float = field(
        default=1.5, metadata={"help": "how strongly gradnorm evens out the training rates", "resume": "fixed"}
    )
    dwa_temperature: float = field(
        default=2.0, metadata={"help": "temperature of dwa; higher: more even weights", "resume": "fixed"}
    )
    compare_single: bool = field(
        default=False,
        metadata={
            "help": "also train each task alone, for equal updates and for equal minutes",
            "resume": "incidental",
        },
    )

    def __post_init__(self) -> None:
        if self.own_layers is None and self.sharing not in ("full", "adapter"):
            raise InputError(f"--sharing {self.sharing}: must be full, adapter or top:k, such as top:2")
        if self.batches == "homogeneous" and self.weighting in (*BY_GRADIENTS, "sum"):
            raise InputError(
                f"--weighting {self.weighting}: needs all tasks in each step; remove --batches homogeneous"
            )
        for name in ("sampling_temperature", "dwa_temperature", "weighting_learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be above 0")
        if not self.gradnorm_alpha >= 0:
            raise InputError(f"--gradnorm_alpha {self.gradnorm_alpha}: must be at least 0")

    @property
    def own_layers(self) -> int | None:
        """Return k of `top:k`; None for other ways of sharing."""
        kind, _, number = self.sharing.partition(":")
        return int(number) if kind == "top" and number.isdecimal() and int(number) > 0 else None


@dataclass
class MultitaskTrainingArguments(TrainingArguments):
    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate"})
    num_train_epochs: float = field(default=2, metadata={"help": "passes over the rows of all tasks together"})
    warmup_steps: float = field(default=0.1, metadata={"help": "warm-up steps; below 1: share of all steps"})
    metric_for_best_model: str | None = field(
        default="mean",
        metadata={
            "help": "score that selects the best checkpoint: mean or worst over the tasks, the name of a task, or loss"
        },
    )
    logging_steps: float = field(default=10)
    remove_unused_columns: bool = field(default=False)  # the collator of each task removes them

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in WITHOUT:
            if getattr(self, name) != defaults[name]:
                raise InputError(f"--{name}: does not work with several tasks in a step; leave it out")
