"""Data arguments of a task whose training rows can be augmented."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from common.args import LabeledDataArguments
from common.errors import InputError

Kind = Literal["synonym", "eda", "mention", "contextual", "back_translation"]
#: augmentation -> reason why a task cannot carry it
_NOT_CARRIED = {
    "mention": "the rows have no mentions with labels",
    "back_translation": "a translated text loses the places of words and answers",
}


@dataclass
class AugmentedDataArguments(LabeledDataArguments):
    """Choose the rows, and how copies of the training rows are augmented in each epoch.

    Attributes:
        augmentations: the augmentations that the task can carry.
    """

    augmentations: ClassVar[tuple[Kind, ...]] = ("synonym", "eda", "contextual")

    augment: Kind | None = field(
        default=None,
        metadata={
            "help": "also train on augmented copies: synonym (English), eda, mention, contextual, back_translation",
            "resume": "fixed",
        },
    )
    augment_copies: int = field(
        default=1, metadata={"help": "augmented copies of each training row in an epoch", "resume": "fixed"}
    )
    augment_share: float | None = field(
        default=None,
        metadata={
            "help": "share of the words (default: 0.1) or, for mention, of the mentions (0.5) that change",
            "resume": "fixed",
        },
    )
    augment_model: str | None = field(
        default=None, metadata={"help": "folder of a masked language model, for --augment contextual"}
    )
    augment_models: list[str] | None = field(
        default=None,
        metadata={"help": "two models that translate to another language and back, for --augment back_translation"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augment_copies < 1:
            raise InputError(f"--augment_copies {self.augment_copies}: must be at least 1; give 1 or more")
        if self.augment_share is not None:
            if not 0 < self.augment_share <= 1:
                raise InputError(f"--augment_share {self.augment_share}: must be above 0 and at most 1")
            if self.augment in (None, "back_translation"):
                raise InputError("--augment_share: needs --augment synonym, eda, mention or contextual; add one")
        if self.augment is not None and self.augment not in self.augmentations:
            raise InputError(
                f"--augment {self.augment}: {_NOT_CARRIED[self.augment]}; give {' or '.join(self.augmentations)}"
            )
        needed = {"augment_model": "contextual", "augment_models": "back_translation"}
        for name, kind in needed.items():
            if getattr(self, name) is not None and self.augment != kind:
                raise InputError(f"--{name}: needs --augment {kind}; add it")
        if self.augment == "contextual" and self.augment_model is None:
            raise InputError("--augment contextual: needs --augment_model, the folder of a masked language model")
        if self.augment == "back_translation" and len(self.augment_models or []) != 2:
            raise InputError("--augment back_translation: needs two folders, --augment_models THERE BACK")
