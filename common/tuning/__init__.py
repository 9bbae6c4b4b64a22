"""Choose which weights are trained, and save them."""

from common.tuning.methods import TuningArguments
from common.tuning.tune import TunedModel, merge, tune

__all__ = ["TunedModel", "TuningArguments", "merge", "tune"]
