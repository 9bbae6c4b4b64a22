"""What `recipes/NAME/annotate.py` needs; see `__main__.py` for the command."""

from common.tools.annotate.arguments import AnnotateArguments
from common.tools.annotate.formats import choices_interface, choices_task, doccano_row, spans_interface, spans_task
from common.tools.annotate.pool import Guess
from common.tools.annotate.strategies import entropies, margins

__all__ = [
    "AnnotateArguments",
    "Guess",
    "choices_interface",
    "choices_task",
    "doccano_row",
    "entropies",
    "margins",
    "spans_interface",
    "spans_task",
]
