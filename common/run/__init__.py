"""Manage the output folder of a run: lock, record, results, model card."""

from common.run.report import (
    draw_curve,
    draw_history,
    print_perplexities,
    print_table,
    write_json_lines,
    write_samples,
)
from common.run.rescue import keep_trained_model
from common.run.rounds import Teacher, open_run
from common.run.run import Run
from common.run.significance import bootstrap_p, other_predictions

__all__ = [
    "Run",
    "Teacher",
    "bootstrap_p",
    "draw_curve",
    "draw_history",
    "keep_trained_model",
    "open_run",
    "other_predictions",
    "print_perplexities",
    "print_table",
    "write_json_lines",
    "write_samples",
]
