"""Choose regularisation, and how an earlier task is kept."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from common.errors import InputError


@dataclass
class RegularisationArguments:
    """Choose regularisation besides weight decay, off by default; see `common.training.regularisation`.

    Attributes:
        ewc_strength: weight of the penalty of `--keep ewc` if `keep_strength` is None.
    """

    ewc_strength: ClassVar[float] = 10_000.0

    dropout: float | None = field(
        default=None, metadata={"help": "rate of every dropout, attention included; default: as in the checkpoint"}
    )
    r_drop: float = field(
        default=0.0,
        metadata={"help": "weight of R-Drop: penalises the difference between two dropout passes"},
    )
    adversarial: Literal["fgm", "freelb"] | None = field(
        default=None,
        metadata={
            "help": "train on embeddings shifted to raise the loss: fgm in 2 passes, freelb in --adversarial_steps"
        },
    )
    adversarial_epsilon: float | None = field(
        default=None,
        metadata={"help": "maximum L2 norm of the shift of a row; default: fgm 0.1, freelb 1"},
    )
    adversarial_steps: int | None = field(default=None, metadata={"help": "passes of freelb; default: 3"})
    adversarial_step_size: float | None = field(
        default=None, metadata={"help": "L2 norm of the shift that freelb adds in each pass; default: 0.1"}
    )
    mixout: float = field(
        default=0.0, metadata={"help": "share of weights replaced by their pretrained values in each step"}
    )
    l2_sp: float = field(
        default=0.0, metadata={"help": "weight decay toward the pretrained weights instead of toward 0"}
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "evaluate and save a moving average of the weights with this decay, such as 0.99",
            "resume": "fixed",
        },
    )
    swa_start: float | None = field(
        default=None,
        metadata={
            "help": "evaluate and save the mean of the weights from this step on; below 1: share of all steps",
            "resume": "fixed",
        },
    )

    keep: Literal["none", "ewc", "lwf", "replay"] = field(
        default="none",
        metadata={
            "help": "how to keep the task of the model in --after: ewc (penalise changes of weights that it needs), "
            "lwf (also learn the outputs of that model), replay (also train on rows of --replay_file)",
            "resume": "fixed",
        },
    )
    keep_strength: float | None = field(
        default=None,
        metadata={"help": "weight of the penalty of --keep; default: ewc 10000 (language models 100), lwf 1"},
    )
    keep_temperature: float | None = field(
        default=None, metadata={"help": "temperature that divides the logits under --keep lwf; default: 2"}
    )
    replay_rows: float | None = field(
        default=None,
        metadata={
            "help": "earlier rows in each epoch of --keep replay; below 1: share of these rows; default: all, up to "
            "the number of new rows",
            "resume": "fixed",
        },
    )
    save_fisher: bool = field(
        default=False,
        metadata={"help": "save the Fisher information of the training rows, which --keep ewc of a later run needs"},
    )

    def check_keeping(self) -> None:
        """Set the defaults that depend on `--keep`.

        Raises:
            InputError: a value is out of range, or belongs to another `--keep`.
        """
        used = {"keep_strength": ("ewc", "lwf"), "keep_temperature": ("lwf",), "replay_rows": ("replay",)}
        for name, methods in used.items():
            value = getattr(self, name)
            if value is not None and self.keep not in methods:
                raise InputError(f"--{name}: needs --keep {' or '.join(methods)}; add it, or leave --{name} out")
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"--{name} {value}: must be above 0, and finite")
        if self.keep in used["keep_strength"] and self.keep_strength is None:
            self.keep_strength = self.ewc_strength if self.keep == "ewc" else 1.0
        if self.keep == "lwf" and self.keep_temperature is None:
            self.keep_temperature = 2.0
        for name in ("r_drop", "adversarial") if self.keep == "lwf" else ():
            if getattr(self, name):
                raise InputError(f"--{name}: cannot be combined with --keep lwf; leave one of them out")

    def check_regularisation(self) -> None:
        """Set the defaults that depend on `--adversarial`.

        Raises:
            InputError: a value is out of range, or two arguments contradict each other.
        """
        for name, value in (("dropout", self.dropout), ("mixout", self.mixout), ("ema_decay", self.ema_decay)):
            if value is not None and not 0 <= value < 1:
                raise InputError(f"--{name} {value}: must be at least 0 and below 1")
        for name in ("r_drop", "l2_sp"):
            if not getattr(self, name) >= 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 0")
        if self.swa_start is not None and not self.swa_start >= 0:
            raise InputError(
                f"--swa_start {self.swa_start}: must be at least 0; give a step, or below 1 a share of all steps"
            )
        if self.ema_decay is not None and self.swa_start is not None:
            raise InputError("--ema_decay and --swa_start exclude each other; give one of them")
        if self.r_drop and self.adversarial:
            raise InputError("--r_drop and --adversarial exclude each other; give one of them")
        if self.r_drop and self.dropout == 0:
            raise InputError("--r_drop: without dropout the two passes are the same; set --dropout above 0")
        freelb = {"adversarial_steps": 3, "adversarial_step_size": 0.1}
        for name, value in ({"adversarial_epsilon": 0.1 if self.adversarial == "fgm" else 1.0} | freelb).items():
            if getattr(self, name) is None:
                if self.adversarial == "freelb" or (self.adversarial and name not in freelb):
                    setattr(self, name, value)
            elif self.adversarial is None or (self.adversarial == "fgm" and name in freelb):
                raise InputError(f"--{name}: needs --adversarial {'freelb' if name in freelb else 'fgm or freelb'}")
            elif not getattr(self, name) > 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be above 0")
