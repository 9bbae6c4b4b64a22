"""Data arguments of masked language modelling: texts and masks."""

from dataclasses import dataclass, field
from typing import Literal

from common.data.corpus import CorpusArguments
from common.errors import InputError

from .masking import Masking


@dataclass
class MlmDataArguments(CorpusArguments):
    objective: Literal["mlm", "mlm+nsp", "mlm+sop"] = field(
        default="mlm",
        metadata={"help": "mlm, plus next-sentence (nsp) or sentence-order (sop) prediction", "resume": "fixed"},
    )
    masking: Masking = field(default="token", metadata={"help": "unit of masking: token, whole_word, span"})
    mlm_probability: float = field(default=0.15, metadata={"help": "share of the training tokens to mask"})
    eval_mlm_probability: float = field(
        default=0.15, metadata={"help": "share of the evaluation tokens to mask, as single tokens"}
    )
    mask_replaced: float = field(
        default=0.8, metadata={"help": "share of the chosen tokens that become the mask token"}
    )
    mask_random: float = field(default=0.1, metadata={"help": "share of the chosen tokens that become a random token"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming and self.objective != "mlm":
            raise InputError(f"--objective {self.objective}: pairs need all texts in memory; remove --streaming")
        for name in ("mlm_probability", "eval_mlm_probability"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be between 0 and 1")
        if min(self.mask_replaced, self.mask_random) < 0 or self.mask_replaced + self.mask_random > 1:
            raise InputError("--mask_replaced and --mask_random: must be at least 0, with a sum of at most 1")
