"""Define the arguments that all recipes share, with fast defaults.

The names follow the transformers example scripts. A recipe subclasses `TrainingArguments` to change defaults.
`common.cli` parses the command line over `--config` YAML over these defaults.

The key `resume` in a field's metadata says how resuming treats a changed value:

- `fixed`: the checkpoint does not fit another value; the run is rejected.
- `splits_step`: the value divides an optimizer step into parts; the rows of the step stay the same.
- `incidental`: the value changes no result.
- no key: the run resumes with a warning, because results will differ from the original run.
"""

from common.args.checks import FISHER, Resume, check_best_metric, check_together, resume_rules
from common.args.data import SPLITS, DataArguments, FileArguments, GroupedDataArguments, LabeledDataArguments
from common.args.model import DEFAULT_ENCODER, ClassifierArguments, HeadArguments, ModelArguments
from common.args.regularisation import RegularisationArguments
from common.args.scores import MEAN, WORST, score_of_rows
from common.args.training import SpeedArguments, TrainingArguments

__all__ = [
    "DEFAULT_ENCODER",
    "FISHER",
    "MEAN",
    "SPLITS",
    "WORST",
    "ClassifierArguments",
    "DataArguments",
    "FileArguments",
    "GroupedDataArguments",
    "HeadArguments",
    "LabeledDataArguments",
    "ModelArguments",
    "RegularisationArguments",
    "Resume",
    "SpeedArguments",
    "TrainingArguments",
    "check_best_metric",
    "check_together",
    "resume_rules",
    "score_of_rows",
]
