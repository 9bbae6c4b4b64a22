"""Results for people: a table on the terminal, rows of predictions, a model card."""

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from common.errors import is_main_process, printable, tell
from common.methods import METHODS

#: what a table on the terminal shows at most
ROWS_SHOWN, CHARACTERS_SHOWN = 60, 40
FILES_NAMED = 10  # by a model card
NOT_MERGED = """Tuned by `{tuning}`, which cannot be merged into the weights: `base/` is the model without it,
`adapter/` what was trained. The recipe's `predict` takes this folder as a whole, and so does
`common.inference.load_saved`."""


def print_table(header: list[str], rows: list[list[Any]], last: int = 0) -> None:
    """Print rows under a header: the first column to the left, numbers to the right, fractions with four digits.

    Of more than `ROWS_SHOWN` rows the first ones are shown, and the `last` ones, which hold the totals.
    """
    left_out = len(rows) - ROWS_SHOWN
    if left_out > 0:
        rest = [f"... {left_out} more", *[""] * (len(header) - 1)]
        rows = [*rows[: ROWS_SHOWN - last], rest, *(rows[-last:] if last else [])]
    cells = [header] + [
        [f"{cell:.4f}" if isinstance(cell, float) else printable(str(cell), CHARACTERS_SHOWN) for cell in row]
        for row in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        tell("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))


def write_json_lines(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows to a JSON Lines file, from the main process only."""
    if is_main_process():
        with open(path, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_model_card(
    folder: str | Path,
    task: str,
    base_model: str,
    scores: dict[str, float],
    split: str,
    record: dict[str, Any],
    usage: str,
) -> None:
    """Write the model card `README.md` into `folder`: scores, data, command and how to load the model.

    `task` is a hub task such as `token-classification`, `base_model` the checkpoint it came from, `scores` those of
    `split`, `record` that of `common.outputs.Run`, `usage` lines of Python. Metadata as in
    https://huggingface.co/docs/hub/model-cards#model-card-metadata.
    """
    if not is_main_process():
        return
    files = [printable(Path(f["file"]).name, 200) for f in record["data"].values()]
    if len(files) > FILES_NAMED:
        files[FILES_NAMED:] = [f"{len(files) - FILES_NAMED} more files"]
    data = record["arguments"].get("dataset_name") or ", ".join(files) or "the documentation of Python"
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        base_model=base_model if base_model.count("/") == 1 and not Path(base_model).exists() else None,
        model_name=printable(Path(folder).resolve().name, 200),
        tags=["generated_from_trainer"],
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type="custom",
                dataset_name=data,
                dataset_split=split,
                metric_type=name,
                metric_value=round(v, 4),
            )
            for name, v in scores.items()
        ],
    )
    tuning = record["arguments"].get("tuning")
    apart = tuning in METHODS and METHODS[tuning].saved == "apart"
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        "",
        f"# {_markdown(metadata.model_name)}",
        "",
        f"{_markdown(base_model)} fine-tuned for {task} on {_markdown(data)}.",
        "",
        f"| score on the {split} rows | value |",
        "| --- | ---: |",
        *(f"| {_markdown(name)} | {value:.4f} |" for name, value in scores.items()),
        "",
        "## Use",
        "",
        *(
            NOT_MERGED.format(tuning=tuning).split("\n")
            if apart
            else ["```python", usage.replace("```", "` ` `"), "```"]
        ),
        "",
        "## Training",
        "",
        "```",
        "python -m " + printable(shlex.join(record["command"]), 10_000).replace("```", "` ` `"),
        "```",
        "",
        f"Run on {record['started'][:10]} on {_hardware(record)}; arguments, versions and the sha256 of each data file "
        "are in `run.json`.",
        "",
    ]
    ModelCard("\n".join(lines)).save(Path(folder) / "README.md")


def _markdown(text: str) -> str:
    """`text` as itself in Markdown: no markup, link or HTML."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~-])", r"\\\1", printable(text))


def _hardware(record: dict[str, Any]) -> str:
    hardware = record["hardware"]
    return (
        ", ".join(hardware.get("gpus", [f"{hardware['cpu']}, {hardware['cores']} cores"]))
        + f", {hardware['precision']}"
    )
