"""Arguments on the texts and masks of masked language modelling."""

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
    masking: Masking = field(default="token", metadata={"help": "what is masked as one: token, whole_word, span"})
    mlm_probability: float = field(default=0.15, metadata={"help": "share of the tokens that are masked"})
    eval_mlm_probability: float = field(default=0.15, metadata={"help": "the same in evaluations, always of tokens"})
    mask_replaced: float = field(default=0.8, metadata={"help": "share of the masked that becomes the mask token"})
    mask_random: float = field(default=0.1, metadata={"help": "share of the masked that becomes a random token"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming and self.objective != "mlm":
            raise InputError(f"--objective {self.objective}: pairs are made of all texts, so not with --streaming")
        for name in ("mlm_probability", "eval_mlm_probability"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must lie between 0 and 1")
        if min(self.mask_replaced, self.mask_random) < 0 or self.mask_replaced + self.mask_random > 1:
            raise InputError("--mask_replaced and --mask_random: shares of at least 0 that together are at most 1")
