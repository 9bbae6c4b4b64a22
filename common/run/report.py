"""Write results: tables, predictions, a page of samples, curves, the model card."""

import html
import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from common.args import MEAN, WORST
from common.errors import is_main_process, printable, tell
from common.hardware import described

#: limits of a table on the terminal
ROWS_SHOWN, CHARACTERS_SHOWN = 60, 40
FILES_NAMED = 10  # on the model card
#: rows in each part of a page of samples, and characters of a text there
SAMPLED, SAMPLE_CHARACTERS = 20, 2000
STYLE = """body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; width: 100%; margin-bottom: 1.2em; }
th, td { text-align: left; vertical-align: top; padding: .2em .6em; border-top: 1px solid #ccc; }
th { width: 7em; font-weight: normal; color: #666; }
td { white-space: pre-wrap; overflow-wrap: anywhere; }"""


def print_table(header: list[str], rows: list[list[Any]], last: int = 0) -> None:
    """Print a table: first column left-aligned, others right-aligned, fractions with four digits.

    A table of more than `ROWS_SHOWN` rows shows the first rows and the `last` rows, which hold the totals.
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


def print_domains(metrics: dict[str, float], split: str) -> None:
    """Print the scores of the domains, their mean and the worst, if `metrics` has them."""
    score = next((name.removeprefix(f"{split}_{MEAN}") for name in metrics if name.startswith(f"{split}_{MEAN}")), None)
    if score is None:
        return
    begin, ends = f"{split}_domain_", (f"_{score}", "_rows")
    names = [name.removeprefix(begin).removesuffix(ends[1]) for name in metrics if name.endswith(ends[1])]
    names = [name for name in names if f"{begin}{name}{ends[0]}" in metrics]
    rows: list[list[Any]] = [[name, *(metrics[f"{begin}{name}{end}"] for end in ends)] for name in names]
    rows.sort(key=lambda row: row[1])
    rows += [["mean of the domains", metrics[f"{split}_{MEAN}{score}"], sum(row[2] for row in rows)]]
    tell(f"\n{rows_named(split)} scores of domains; the worst: {metrics[f'{split}_{WORST}{score}']:.4f}")
    print_table(["domain", score.replace("_", " "), "rows"], rows, last=1)
    if f"{split}_gate_accuracy" in metrics:
        tell(f"the gate tells the domain of {metrics[f'{split}_gate_accuracy']:.0%} of the rows")


def rows_named(split: str) -> str:
    """Return the name of a split for people: the Trainer calls the validation rows `eval`."""
    return {"eval": "validation"}.get(split, split)


def write_json_lines(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows to a JSON Lines file, from the main process only."""
    if is_main_process():
        with open(path, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_samples(
    path: str | Path, title: str, texts: dict[str, list[str]], scores: list[float], score: str, seed: int = 0
) -> None:
    """Write an HTML page (without scripts) of random rows, and the rows with the lowest and the highest scores.

    Args:
        path: the file.
        title: title of the page.
        texts: name of a text (source, reference, hypothesis) -> the text of each row, in the order on the page.
        scores: score of each row; higher is better.
        score: name of the score.
        seed: seed of the random rows; equal seeds show equal rows, which makes two runs comparable.
    """
    if not is_main_process():
        return
    order = np.argsort(scores, kind="stable")
    number = min(SAMPLED, len(scores))
    drawn = np.sort(np.random.default_rng(seed).choice(len(scores), number, replace=False))
    parts = {"At random": drawn, f"Lowest {score}": order[:number], f"Highest {score}": order[::-1][:number]}
    body = []
    for name, rows in parts.items():
        body.append(f"<h2>{html.escape(name)}</h2>")
        for row in rows:
            cells = [(f"row {row + 1}", f"{score} {scores[row]:.1f}"), *((k, v[row]) for k, v in texts.items())]
            # dir="auto": the letters of the text set the writing direction
            lines = [f'<tr><th>{html.escape(k)}</th><td dir="auto">{_shown(v)}</td></tr>' for k, v in cells]
            body.append("<table>" + "\n".join(lines) + "</table>")
    head = f'<!DOCTYPE html>\n<html><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    about = f"<p>{len(scores):,} rows, mean {html.escape(score)} of a row {np.mean(scores):.1f}</p>"
    page = [head, f"<style>{STYLE}</style></head><body>", f"<h1>{html.escape(title)}</h1>", about, *body]
    Path(path).write_text("\n".join(page) + "\n</body></html>\n", encoding="utf-8")


def _shown(text: str) -> str:
    """Return `text` as HTML, with unprintable characters escaped and long text cut."""
    lines = [html.escape(printable(line)) for line in text[:SAMPLE_CHARACTERS].split("\n")]
    cut = f"… ({len(text):,} characters)" if len(text) > SAMPLE_CHARACTERS else ""
    return "\n".join(lines) + cut


def draw_history(path: str | Path, history: list[dict[str, float]], score: str | None = None) -> None:
    """Draw the losses by step, and below them the score `eval_<score>` if evaluations have it.

    `history` is the log of the trainer. Its losses include label smoothing.
    """
    if not is_main_process():
        return
    from matplotlib.figure import Figure  # a slow import, not needed elsewhere

    parts = {"loss (nats a label)": {"loss": "training", "eval_loss": "validation"}}
    if score and any(f"eval_{score}" in entry for entry in history):
        parts[score] = {f"eval_{score}": "validation"}
    figure = Figure(figsize=(6.0, 3.5 * len(parts)), layout="constrained")
    for number, (name, curves) in enumerate(parts.items(), 1):
        axes = figure.add_subplot(len(parts), 1, number)
        axes.set(xlabel="step", ylabel=name)
        for key, label in curves.items():
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
                axes.legend()
    figure.savefig(path, dpi=120)


def write_model_card(
    folder: str | Path,
    task: str,
    base_model: str,
    scores: dict[str, float],
    split: str,
    record: dict[str, Any],
    usage: str,
) -> None:
    """Write the model card `README.md` into a folder, from the main process only.

    Metadata as in https://huggingface.co/docs/hub/model-cards#model-card-metadata.

    Args:
        folder: the folder of the model.
        task: a task of the hub, such as `token-classification`.
        base_model: the checkpoint that training started from.
        scores: the scores to show.
        split: the split of the scores.
        record: the record of `common.run.run.Run`.
        usage: instructions for the model, in Markdown.
    """
    if not is_main_process():
        return
    files = [printable(Path(f["file"]).name, 200) for f in record["data"].values()]
    if len(files) > FILES_NAMED:
        files[FILES_NAMED:] = [f"{len(files) - FILES_NAMED} more files"]
    data = record["arguments"].get("dataset_name") or ", ".join(files) or "the documentation of Python"
    name = printable(Path(folder).resolve().name, 200)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        base_model=base_model if base_model.count("/") == 1 and not Path(base_model).exists() else None,
        model_name=name,
        tags=["generated_from_trainer"],
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type="custom",
                dataset_name=data,
                dataset_split=rows_named(split),
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
        f"# {_markdown(name)}",
        "",
        f"{_markdown(base_model)} fine-tuned for {task} on {_markdown(data)}.",
        "",
        f"| score on the {rows_named(split)} rows | value |",
        "| --- | ---: |",
        *(f"| {_markdown(name)} | {value:.4f} |" for name, value in scores.items()),
        "",
        "## Use",
        "",
        usage,
        "",
        "## Training",
        "",
        "```",
        "python -m " + fenced(printable(shlex.join(record["command"]), 10_000)),
        "```",
        "",
        f"Trained on {record['started'][:10]} on {described(record['hardware'])}. `run.json` has the arguments, the "
        "versions and the SHA-256 of each data file.",
        "",
    ]
    ModelCard("\n".join(lines)).save(Path(folder) / "README.md")


def fenced(text: str) -> str:
    """Return a text that cannot end its code block."""
    return text.replace("```", "` ` `")


def _markdown(text: str) -> str:
    """Escape `text` for Markdown: no markup, links or HTML."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~-])", r"\\\1", printable(text))


WHEN = ("before", "after")


def print_perplexities(metrics: dict[str, float]) -> None:
    """Print the scores of `LanguageTrainer.scores` before and after training, also by domain, as a table."""
    splits = [
        k.removeprefix("before_").removesuffix("_perplexity") for k in metrics if re.match("before_.*perplexity", k)
    ]
    rows = [
        [
            split.replace("_domain_", ": ").replace("_mean_domain", ": mean").replace("_worst_domain", ": worst"),
            *(metrics[f"{when}_{split}_{name}"] for name in ("perplexity", "accuracy") for when in WHEN),
        ]
        for split in splits
    ]
    tell("")
    print_table(["texts", "perplexity before", "after", "accuracy before", "after"], rows)


def draw_curve(path: str | Path, history: list[dict], before: float) -> None:
    """Draw the losses by tokens seen, from the log of the trainer and the validation loss `before` training."""
    if not is_main_process():
        return
    from matplotlib.figure import Figure  # a slow import, not needed elsewhere

    figure = Figure(figsize=(6.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label, start in (("loss", "training", []), ("eval_loss", "validation", [(0, before)])):
        points = start + [(entry["num_input_tokens_seen"] / 1e6, entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats a label)")
    axes.legend()
    figure.savefig(path, dpi=120)
