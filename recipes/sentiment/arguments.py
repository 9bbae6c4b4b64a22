"""Arguments of text classification: data, and training on few rows."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from common.args import SPLITS
from common.data.augment import AugmentedDataArguments
from common.data.pool import PoolArguments
from common.errors import InputError, nearest_file


@dataclass
class SentimentDataArguments(PoolArguments, AugmentedDataArguments):
    sample: ClassVar[Path | None] = Path(__file__).resolve().parent / "sample"
    augmentations = ("synonym", "eda", "contextual", "back_translation")

    text_column_name: str = field(default="text", metadata={"help": "column with the text"})
    text_pair_column_name: str | None = field(default=None, metadata={"help": "column with a second text"})
    label_column_name: str = field(
        default="label",
        metadata={"help": "column with the label or list of labels; or columns of 0 and 1, such as toxic,insult"},
    )
    label_file: list[str] | None = field(
        default=None,
        metadata={"help": "for .txt files: a file with a label a line for each given train, validation and test file"},
    )
    label_separator: str | None = field(
        default=None, metadata={"help": "character between several labels in a text, such as | in rude|threat"}
    )
    label_names: list[str] | None = field(
        default=None, metadata={"help": "names of labels that are numbers from 0, such as negative,positive"}
    )
    multi_label: str = field(
        default="auto",
        metadata={"help": "true: a row may have several labels; false: it has one; auto: several if any row has them"},
    )
    max_seq_length: int = field(
        default=128, metadata={"help": "tokens of a row; see --long_texts for longer texts", "resume": "fixed"}
    )
    long_texts: str = field(
        default="truncate",
        metadata={
            "help": "truncate: cut longer texts; windows: read all of them, and average the predictions of the windows",
            "resume": "fixed",
        },
    )
    doc_stride: int | None = field(
        default=None,
        metadata={
            "help": "with --long_texts windows: tokens that neighbouring windows share; default: a quarter of a window",
            "resume": "fixed",
        },
    )
    keep_part: str = field(
        default="head", metadata={"help": "part of a longer text that is read: head, tail, head+tail"}
    )

    def __post_init__(self) -> None:
        if self.label_file is not None and not self.train_file:
            raise InputError("--label_file: needs the texts; add --train_file")
        super().__post_init__()
        for file in self.label_files().values():
            if not Path(file).is_file():
                raise InputError(f"--label_file {file}: no such file{nearest_file(file)}")
        self.multi_label = self.multi_label.lower()
        if self.label_names is not None:
            self.label_names = [name.strip() for names in self.label_names for name in names.split(",")]
        if self.multi_label not in ("auto", "true", "false"):
            raise InputError(f"--multi_label {self.multi_label}: must be auto, true or false")
        if self.label_separator and (self.multi_label == "false" or "," in self.label_column_name):
            other = "--multi_label false" if self.multi_label == "false" else "several --label_column_name"
            raise InputError(f"--label_separator: contradicts {other}; leave one of them out")
        if self.keep_part not in ("head", "tail", "head+tail"):
            raise InputError(f"--keep_part {self.keep_part}: must be head, tail or head+tail")
        if self.long_texts not in ("truncate", "windows"):
            raise InputError(f"--long_texts {self.long_texts}: must be truncate or windows")
        if self.long_texts == "truncate":
            if self.doc_stride is not None:
                raise InputError(f"--doc_stride {self.doc_stride}: needs --long_texts windows; add it")
        elif self.keep_part != "head":
            raise InputError(
                f"--keep_part {self.keep_part}: has no effect with --long_texts windows; leave one of them out"
            )
        elif self.doc_stride is None:
            self.doc_stride = self.max_seq_length // 4
        elif not 0 <= self.doc_stride <= self.max_seq_length // 2:
            raise InputError(
                f"--doc_stride {self.doc_stride}: must be between 0 and half of --max_seq_length "
                f"{self.max_seq_length}; give at most {self.max_seq_length // 2}"
            )

    def label_files(self) -> dict[str, str]:
        """Return split -> file of its labels.

        Raises:
            InputError: the number of label files differs from that of the text files.
        """
        splits = [split for split in SPLITS if getattr(self, f"{split}_file")]
        if self.label_file is None:
            return {}
        if len(self.label_file) != len(splits):
            needed = ", ".join(f"--{split}_file" for split in splits)
            raise InputError(f"--label_file: {len(self.label_file)} files; needed: one each for {needed}")
        return dict(zip(splits, self.label_file, strict=True))

    def check_path(self, name: str, path: str) -> None:
        """Raise `InputError` unless `path` is a file, or a folder with folders of classes."""
        if Path(path).is_dir() and not any(inner.is_dir() for inner in Path(path).iterdir()):
            raise InputError(
                f"--{name} {path}: has no folder for each class, such as {Path(path, 'good')}; name a file, or add "
                "folders"
            )
        if not Path(path).is_dir():
            super().check_path(name, path)

    def files(self) -> dict[str, str]:
        """Return argument -> file for the files of the run."""
        return super().files() | {f"{split}_label_file": file for split, file in self.label_files().items()}

    def reading(self) -> dict[str, int | str | None]:
        """Return the arguments of `windows.read`, which the saved configuration keeps for predict."""
        names = "max_seq_length", "long_texts", "doc_stride"
        return {"keep": self.keep_part} | {name: getattr(self, name) for name in names}


@dataclass
class FewShotArguments:
    """Choose the training on few rows, which comes before the fit of the head."""

    _argument_group_name = "few shots"

    shots: int | None = field(
        default=None,
        metadata={
            "help": "train on N rows of each class, drawn by --seed; the other rows are not used",
            "resume": "fixed",
        },
    )
    few_shot: Literal["contrastive", "prompt"] | None = field(
        default=None,
        metadata={
            "help": "first train the encoder: contrastive (vectors of a class become similar), or prompt (fill in the "
            "word of the class; needs an encoder with an MLM head)",
            "resume": "fixed",
        },
    )
    few_shot_steps: int | None = field(
        default=None, metadata={"help": "steps of --few_shot; default: by the number of rows", "resume": "fixed"}
    )
    few_shot_learning_rate: float | None = field(
        default=None,
        metadata={"help": "learning rate of --few_shot; default: 2e-5 contrastive, 1e-4 prompt", "resume": "fixed"},
    )
    pattern: str | None = field(
        default=None,
        metadata={"help": 'pattern of --few_shot prompt; default: "{text} It was [MASK]."', "resume": "fixed"},
    )
    verbalizer: list[str] | None = field(
        default=None,
        metadata={
            "help": "word of each class for prompt, such as positive=great negative=terrible; default: the labels",
            "resume": "fixed",
        },
    )

    def __post_init__(self) -> None:
        if self.shots is not None and self.shots < 1:
            raise InputError(f"--shots {self.shots}: must be at least 1")
        if self.shots == 1 and self.few_shot == "contrastive":
            raise InputError("--shots 1: contrastive training compares rows of a class; give --shots 2 or more")
        for name in ("few_shot_steps", "few_shot_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name} {value}: must be above 0")
            if value is not None and self.few_shot is None:
                raise InputError(f"--{name}: needs --few_shot contrastive or prompt; add it")
        for name in ("pattern", "verbalizer"):
            if getattr(self, name) is not None and self.few_shot != "prompt":
                raise InputError(f"--{name}: needs --few_shot prompt; add it")

    @property
    def strengths(self) -> tuple[float, ...] | None:
        """Return the strengths of the head's logistic regression: one, as few validation rows choose none reliably."""
        return (0.01,) if self.few_shot else None

    def epochs(self, given: float | None, data: SentimentDataArguments, default: float) -> float:
        """Return the epochs of fine-tuning: those `given`, else none after `--few_shot`, else `default`.

        Raises:
            InputError: `data` has an argument that acts during fine-tuning only, and there is none.
        """
        epochs = given if given is not None else 0 if self.few_shot else default
        for name in ("augment", "semi"):
            if self.few_shot and epochs == 0 and getattr(data, name):
                raise InputError(
                    f"--{name}: --few_shot {self.few_shot} trains on the rows as they are; leave it out, or give "
                    "--num_train_epochs 5"
                )
        return epochs
