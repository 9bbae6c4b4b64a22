"""Which weights are trained, and how they are saved."""

from common.tuning.methods import TuningArguments
from common.tuning.tune import TunedModel, merge, tune

__all__ = ["TunedModel", "TuningArguments", "merge", "tune"]
