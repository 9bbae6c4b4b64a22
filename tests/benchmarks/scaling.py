"""Measure the cost of our recipes against size: rows, tokens in a row, LoRA and full fine-tuning.

    make bench ARGS="--scaling"
    python -m tests.benchmarks.scaling --rows 1000 10000 --lengths 32 128 512

Rows: sentiment trains one epoch on repeated sample rows, and evaluates on as many. A number at the end of each row
makes the rows differ. Lengths: mlm trains 6 steps of 8,192 tokens each, on texts longer than every row; once in full
and once with LoRA. A finished run is added to outputs/bench/scaling.jsonl, and is reused while options and code stay
the same. The results are in outputs/bench/scaling.md, scaling.json and scaling.png.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.hardware import cores
from tests.benchmarks.bench import FOLDER, Kept, code_of, digest_of, made_once, rows_of, watched

STEPS, STEP_TOKENS = 6, 8192


def repeated(count: int) -> Path:
    """Return a folder with `count` rows of the sentiment sample for training, and as many for validation."""

    def rows() -> dict[str, Iterator[dict]]:
        sample = rows_of("sentiment", None)
        return {split: numbered(sample[split]) for split in ("train", "validation")}

    def numbered(own: list[dict]) -> Iterator[dict]:
        for i, row in enumerate(islice(cycle(own), count)):
            yield row | {"text": f"{row['text']} {i}"}

    return made_once(f"sentiment-{count}-repeated-{digest_of('sentiment')}", rows)


def long_texts() -> Path:
    """Return a folder with texts of about ten thousand tokens, from the documents of the summarization sample."""

    def rows() -> dict[str, list[dict]]:
        return {
            split: [{"text": " ".join(row["document"] for row in own[i : i + 40])} for i in range(0, len(own), 40)]
            for split, own in rows_of("summarization", None).items()
        }

    return made_once(f"long-texts-{digest_of('summarization')}", rows)


def run(recipe: str, words: list[Any]) -> dict[str, float]:
    """Return seconds, training tokens per second, and peak memory of training and of evaluation."""
    folder = FOLDER / "scaling"
    words += ["--output_dir", folder, "--overwrite", "--eval_strategy", "no", "--save_strategy", "no"]
    words += ["--disable_tqdm", "true", "--num_train_epochs", 1]
    found = watched(f"recipes.{recipe}.train", words, FOLDER / "cache" / "scaling", folder.with_suffix(".log"))
    phases = json.loads((folder / "run.json").read_text(encoding="utf-8"))["phases"]
    shutil.rmtree(folder)
    shutil.rmtree(FOLDER / "cache" / "scaling", ignore_errors=True)
    after = "eval" if "eval" in phases else "after"
    return {
        "job": found["ended"] - found["started"],
        "preparation": found["preparation"],
        "train_seconds": phases["train"]["seconds"],
        "eval_seconds": phases[after]["seconds"],
        "train_tokens": found["training"]["sub_tokens"] / found["training"]["seconds"],
        "train_share": found["training"]["operations"] / found["training"]["seconds"] / found["rate"],
        "peak_mib": found["peak_mib"],
        "train_mib": phases["train"]["peak_memory_mib"],
        "eval_mib": phases[after]["peak_memory_mib"],
        "eval_grown_mib": phases[after]["peak_memory_mib"] - found["resident_mib"][list(phases).index(after)],
        "device": found["device"],
        "precision": found["precision"],
    }


def rows_words(count: int) -> list[Any]:
    folder = repeated(count)
    return ["--train_file", folder / "train.jsonl", "--validation_file", folder / "validation.jsonl"]


def length_words(length: int, tuning: str) -> list[Any]:
    folder = long_texts()
    return [
        "--train_file", folder / "train.jsonl", "--validation_file", folder / "validation.jsonl", "--tuning", tuning,
        "--max_seq_length", length, "--per_device_train_batch_size", STEP_TOKENS // length, "--max_steps", STEPS,
    ]  # fmt: skip


COLUMNS = {
    "job": ("job, s", "{:.1f}"), "preparation": ("preprocessing, s", "{:.1f}"),
    "train_seconds": ("training, s", "{:.1f}"), "eval_seconds": ("evaluation, s", "{:.1f}"),
    "train_tokens": ("tokens per second", "{:,.0f}"), "train_share": ("of the matrix rate", "{:.0%}"),
    "train_mib": ("peak of training, MiB", "{:,.0f}"), "eval_mib": ("peak of evaluation, MiB", "{:,.0f}"),
    "eval_grown_mib": ("grown in it, MiB", "{:,.0f}"),
}  # fmt: skip


def markdown(title: str, runs: list[dict[str, Any]]) -> str:
    lines = [title, "", f"| | | {' | '.join(name for name, _ in COLUMNS.values())} |"]
    lines.append(f"| --- | ---: |{' ---: |' * len(COLUMNS)}")
    for r in runs:
        cells = " | ".join(form.format(r[name]) for name, (_, form) in COLUMNS.items())
        lines.append(f"| {r['what']} | {r['size']:,} | {cells} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, title: str, runs: list[dict[str, Any]]) -> None:
    """Plot seconds and memory against rows, with a proportional line, and speed and memory against length."""
    figure = Figure(figsize=(11.0, 8.0), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 2)
    by_rows = [r for r in runs if r["what"] == "rows"]
    if by_rows:
        sizes = [r["size"] for r in by_rows]
        for name, label in (("job", "whole job"), ("train_seconds", "training"), ("eval_seconds", "evaluation")):
            axes[0, 0].plot(sizes, [r[name] for r in by_rows], marker="o", label=label)
        axes[0, 0].plot(sizes, [by_rows[0]["job"] * n / sizes[0] for n in sizes], "k:", label="in proportion")
        axes[0, 0].set(xscale="log", yscale="log", xlabel="rows", ylabel="seconds")
        for name, label in (("train_mib", "training"), ("eval_mib", "evaluation")):
            axes[0, 1].plot(sizes, [r[name] for r in by_rows], marker="o", label=label)
        axes[0, 1].set(xscale="log", xlabel="rows", ylabel="peak memory (MiB)")
    lengths = sorted({r["size"] for r in runs if r["what"] != "rows"})
    for what in ("full", "lora"):
        own = [r for r in runs if r["what"] == what]
        for axis, name in ((axes[1, 0], "train_tokens"), (axes[1, 1], "train_mib")):
            axis.plot([r["size"] for r in own], [r[name] for r in own], marker="o", label=what)
    axes[1, 0].set(xscale="log", xlabel="tokens in a row", ylabel="tokens per second")
    axes[1, 1].set(xscale="log", xlabel="tokens in a row", ylabel="peak memory (MiB)")
    for axis in axes[1]:
        axis.set_xticks(lengths, lengths)
        axis.minorticks_off()
    for axis in axes.flat:
        if axis is not axes[0, 0]:
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--lengths", type=int, nargs="*", default=[32, 64, 128, 256, 512])
    options = parser.parse_args(argv)
    kept = Kept(FOLDER / "scaling.jsonl")
    jobs = [("sentiment", "rows", count, rows_words(count)) for count in options.rows]
    jobs += [("mlm", what, n, length_words(n, what)) for what in ("full", "lora") for n in options.lengths]
    runs = []
    for recipe, what, size, words in jobs:
        data = Path(words[words.index("--train_file") + 1]).parent.name
        about = {"what": what, "size": size, "data": data, "code": code_of(recipe, "scaling"), "cores": cores()}
        record = kept.find(about) or kept.add(about | run(recipe, words))
        runs.append(record)
        print(
            f"{what} {size:,}: {record['job']:.1f} s, {record['train_tokens']:,.0f} tokens per second, peak "
            f"{record['peak_mib']:,} MiB",
            flush=True,
        )
    device, precision, date = (runs[0][name] for name in ("device", "precision", "date"))
    title = f"{device}, {cores()} cores, {precision}, {date[:10]}"
    table = markdown(title, runs)
    (FOLDER / "scaling.md").write_text(table, encoding="utf-8")
    (FOLDER / "scaling.json").write_text(json.dumps({"title": title, "runs": runs}, indent=1), encoding="utf-8")
    draw(FOLDER / "scaling.png", title, runs)
    print(f"\n{table}\n{FOLDER}/scaling.md, scaling.json, scaling.png")


if __name__ == "__main__":
    main()
