"""Results for people: a table on the terminal, rows of predictions, a model card."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from common.errors import is_main_process, tell


def print_table(header: list[str], rows: list[list[Any]]) -> None:
    """Print rows under a header: the first column to the left, numbers to the right, fractions with four digits."""
    cells = [header] + [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
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
    data = record["arguments"].get("dataset_name") or ", ".join(Path(f["file"]).name for f in record["data"].values())
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        base_model=base_model if base_model.count("/") == 1 and not Path(base_model).exists() else None,
        model_name=Path(folder).resolve().name,
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
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        "",
        f"# {metadata.model_name}",
        "",
        f"`{base_model}` fine-tuned for {task} on {data}.",
        "",
        f"| score on the {split} rows | value |",
        "| --- | ---: |",
        *(f"| {name} | {value:.4f} |" for name, value in scores.items()),
        "",
        "## Use",
        "",
        "```python",
        usage,
        "```",
        "",
        "## Training",
        "",
        "```",
        f"python -m {shlex.join(record['command'])}",
        "```",
        "",
        f"Run on {record['started'][:10]} on {_hardware(record)}; arguments, versions and the sha256 of each data file "
        "are in `run.json`.",
        "",
    ]
    ModelCard("\n".join(lines)).save(Path(folder) / "README.md")


def _hardware(record: dict[str, Any]) -> str:
    hardware = record["hardware"]
    return (
        ", ".join(hardware.get("gpus", [f"{hardware['cpu']}, {hardware['cores']} cores"]))
        + f", {hardware['precision']}"
    )
