"""Compare the recipes with the stock Trainer: speed, memory, start-up and score, in alternating runs.

    make bench                                  # every recipe, on its sample
    make bench RECIPE=ner ARGS="--rounds 3"
    make bench ARGS="--fp32"                    # ours in float32 too, as on a CPU without bfloat16
    make bench ARGS="--scaling"                 # cost against size: tests/benchmarks/scaling.py
    python -m tests.benchmarks.bench ner --data data/wnut17 --epochs 3 --rounds 3
    python -m tests.benchmarks.bench sentiment qa --table

By default a round takes about a minute, on a part of the sample. `--full` takes all rows and the epochs of the
recipe. A data folder holds train.jsonl, validation.jsonl and test.jsonl in the recipe's format, or .txt files with a
text a line. Both arms have the same model, rows, epochs, batch, learning rate and, in each round, seed. The stock arm
is `tests/benchmarks/stock*.py`. Finished runs are kept in outputs/bench/runs.jsonl and repeated only if options or
code changed; a stopped benchmark continues with the same command. The results are outputs/bench/bench.md and
bench.json. NOTES.md defines each number.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from common.hardware import cores

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = Path("outputs/bench")
SPLITS = ("train", "validation", "test")
ARMS = ("ours", "stock")


@dataclass
class Job:
    """Define the run of a recipe in both arms: rows of the sample and settings."""

    stock: str
    rows: int
    test_rows: int  # of validation, and of test
    batch: int
    learning_rate: float
    full_epochs: float
    score: str
    baseline: str
    ours: list[str] = field(default_factory=list)
    stock_words: list[str] = field(default_factory=list)
    #: arguments of the run of the recipe that makes the initial model of both arms
    start: list[str] | None = None
    script: str = "train"
    predicts: bool = True  # false: the stock Trainer has no counterpart


WRITES = ["--max_tokens_per_batch", "0", "--max_target_length", "64"]
FEW = ["--max_eval_samples", "8", "--save_strategy", "no", "--eval_strategy", "no"]
#: the training of the stock scripts; other training may cause outputs without an end, which take most of the time
PLAIN = ["--label_smoothing_factor", "0", "--warmup_steps", "0"]
JOBS = {
    "sentiment": Job("sentiment", 512, 192, 32, 1e-4, 5, "test_accuracy", "test_bag_of_words_accuracy"),
    "ner": Job("ner", 600, 150, 32, 2e-4, 10, "test_f1", "test_gazetteer_f1"),
    "qa": Job("qa", 80, 48, 8, 2e-4, 6, "test_f1", "test_baseline_f1"),
    "mlm": Job(
        "language", 400, 120, 8, 1e-3, 1.5, "after_validation_perplexity", "before_validation_perplexity",
        ["--max_seq_length", "512"], ["--length", "512"], predicts=False,
    ),
    "clm": Job(
        "language", 2000, 200, 8, 1e-3, 10, "after_validation_perplexity", "before_validation_perplexity",
        start=["--max_steps", "1", *FEW], predicts=False,
    ),
    "translation": Job(
        "seq2seq", 1600, 192, 32, 1e-4, 6, "test_bleu", "test_copy_bleu",
        ["--max_tokens_per_batch", "0", "--source_lang", "en", "--target_lang", "de", *PLAIN],
        start=["--max_predict_samples", "8", *FEW],
    ),
    "summarization": Job(
        "seq2seq", 48, 24, 8, 5e-5, 10, "test_rouge1", "test_lead_rouge1", [*WRITES, *PLAIN],
        start=[*WRITES, "--num_train_epochs", "4", "--max_predict_samples", "8", *FEW], script="train_abstractive",
    ),
}  # fmt: skip

#: quantity of a run -> its title, and the kind of its ratio: rate, seconds, size, or none
QUANTITIES = {
    "train_rows": ("training, examples a second", "rate"),
    "train_tokens": ("training, tokens a second", "rate"),
    "train_share": ("training, share of the matrix rate", "rate"),
    "eval_rows": ("evaluation, examples a second", "rate"),
    "eval_tokens": ("evaluation, tokens a second", "rate"),
    "predict_rows": ("predict, examples a second", "rate"),
    "predict_tokens": ("predict, tokens a second", "rate"),
    "first_step_cold": ("start to first step, cold, s", "seconds"),
    "first_step_cached": ("start to first step, cached, s", "seconds"),
    "preparation_cold": ("preprocessing, cold, s", "seconds"),
    "preparation_cached": ("preprocessing, cached, s", "seconds"),
    "job": ("start to saved model and scores, s", "seconds"),
    "peak_mib": ("peak memory, MiB", "size"),
    "peak_gpu_mib": ("peak memory of the GPU, MiB", "size"),
    "score": ("score", None),
    "rate": ("matrix rate, operations a second", None),
}


class Kept:
    """Keep finished runs in a file, one a line."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.runs = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    def find(self, about: dict[str, Any]) -> dict[str, Any] | None:
        return next((run for run in self.runs if about.items() <= run.items()), None)

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        record |= {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        self.runs.append(record)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return record


# Data


@cache
def rows_of(recipe: str, folder: Path | None) -> dict[str, list[dict]]:
    """Return the rows of a data folder, or of the recipe's sample, by split."""
    if folder is not None:
        return {split: list(_rows_in(folder, split)) for split in SPLITS if any(folder.glob(f"{split}.*"))}
    if recipe in ("mlm", "clm"):
        from common.data.corpus import CorpusArguments, load_corpus

        rows = {split: texts.to_list() for split, texts in load_corpus(CorpusArguments()).items()}
        for texts in rows.values():  # they are sorted by module
            random.Random(0).shuffle(texts)
        return rows
    if recipe == "translation":
        from recipes.translation.localisation import sample

        return sample()
    here = ROOT / "recipes" / recipe / "sample"
    if recipe == "qa":
        from recipes.qa.squad import read_squad

        return {split: [row for _, row in read_squad(here / f"{split}.json")] for split in SPLITS}
    return {split: list(_rows_in(here, split)) for split in SPLITS}


def _file_of(folder: Path, split: str) -> Path:
    return next(folder / f"{split}{end}" for end in (".jsonl", ".txt") if (folder / f"{split}{end}").is_file())


def _rows_in(folder: Path, split: str) -> Iterator[dict]:
    path = _file_of(folder, split)
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            yield json.loads(line) if path.suffix == ".jsonl" else {"text": line}


def made_once(name: str, rows: Callable[[], dict[str, Iterable[dict]]]) -> Path:
    """Write a file for each split of `rows` into the data folder `name`, at once, unless the folder exists."""
    target = FOLDER / "data" / name
    if not target.is_dir():
        part = target.with_name(name + ".part")
        part.mkdir(parents=True, exist_ok=True)
        for split, of_split in rows().items():
            with open(part / f"{split}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in of_split)
        part.replace(target)
    return target


def digest_of(recipe: str, folder: Path | None = None) -> str:
    """Hash the files of the folder, or the rows of the sample."""
    digest = hashlib.sha256()
    if folder is None:
        digest.update(json.dumps(rows_of(recipe, None), sort_keys=True).encode())
    else:
        for split in SPLITS:
            if any(folder.glob(f"{split}.*")):
                with open(_file_of(folder, split), "rb") as file:
                    digest.update(split.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def written(recipe: str, folder: Path | None, counts: dict[str, int | None], digest: str) -> Path:
    """Write the rows that both arms take: of each split the first `counts`, or all. Return the folder."""
    parts = [recipe, folder.name if folder else "sample", *(str(count or "all") for count in counts.values()), digest]
    return made_once("-".join(parts), lambda: {s: rows[: counts[s]] for s, rows in rows_of(recipe, folder).items()})


# Runs


def watched(module: str, words: Iterable[Any], cache: Path, log: Path) -> dict[str, Any]:
    """Run a program under `tests.benchmarks.watched`; return its measurements and the time when it `started`."""
    measured = log.with_suffix(".measured")
    measured.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.benchmarks.watched", str(measured), module, *map(str, words)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache.resolve()), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        status = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    if status:
        last_lines = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        sys.exit(f"exit status {status}: {' '.join(command)}\n{last_lines}")
    return json.loads(measured.read_text(encoding="utf-8")) | {"started": start}


def start_of(recipe: str, job: Job) -> Path:
    """Return the initial model of both arms, for a recipe that makes a new model; train it unless it exists."""
    key = hashlib.sha256(json.dumps(job.start).encode()).hexdigest()[:8]
    folder = FOLDER / "start" / f"{recipe}-{key}"
    if not (folder / "model.safetensors").is_file():
        print(f"{recipe}: making the initial model of both arms", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = [*job.start, "--output_dir", str(folder), "--overwrite", "--disable_tqdm", "true"]
        with open(folder.with_suffix(".log"), "w", encoding="utf-8") as log:
            command = [sys.executable, "-m", f"recipes.{recipe}.{JOBS[recipe].script}", *words]
            status = subprocess.run(command, stdout=log, stderr=log).returncode
        if status:
            sys.exit(f"exit status {status}: {' '.join(command)}; see {log.name}")
    return folder


def ours(recipe: str, job: Job, about: dict, data: Path, model: str | None, cache: Path) -> dict[str, Any]:
    folder = FOLDER / f"{recipe}-ours"
    files = [word for s in SPLITS if (data / f"{s}.jsonl").is_file() for word in (f"--{s}_file", data / f"{s}.jsonl")]
    words = [
        *files, "--num_train_epochs", about["epochs"], "--per_device_train_batch_size", about["batch"],
        "--learning_rate", about["learning_rate"], "--seed", about["seed"], *job.ours, "--disable_tqdm", "true",
        "--output_dir", folder, "--overwrite",
    ]  # fmt: skip
    words += ["--model_name_or_path", model] if model else []
    words += ["--precision", "fp32"] if about["fp32"] else []
    measured = watched(f"recipes.{recipe}.{JOBS[recipe].script}", words, cache, folder.with_suffix(".log"))
    scores = json.loads((folder / "run.json").read_text(encoding="utf-8"))["scores"]
    record = record_of(measured) | {"score": scores[job.score], "baseline": scores[job.baseline]}
    test = data / "test.jsonl"
    if job.predicts and test.is_file():
        words = ["--model", folder, "--input", test, "--output", folder / "predicted.jsonl", "--overwrite"]
        words += ["--precision", "fp32"] if about["fp32"] else []
        predict = watched(f"recipes.{recipe}.predict", words, cache, FOLDER / f"{recipe}-predict.log")["predict"]
        record |= {
            "predict_rows": predict["rows"] / predict["seconds"],
            "predict_tokens": _evaluation(measured, "test")["tokens"] / predict["seconds"],
        }
    return record


def stock(recipe: str, job: Job, about: dict, data: Path, model: str | None, cache: Path) -> dict[str, Any]:
    folder = FOLDER / f"{recipe}-stock"
    shutil.rmtree(folder, ignore_errors=True)
    words = [word for name in ("epochs", "batch", "learning_rate", "seed") for word in (f"--{name}", about[name])]
    words += ["--data", data, "--output_dir", folder, *job.stock_words, *(["--model", model] if model else [])]
    measured = watched(f"tests.benchmarks.stock_{job.stock}", words, cache, folder.with_suffix(".log"))
    record = record_of(measured) | json.loads((folder / "stock.json").read_text(encoding="utf-8"))
    test = _evaluation(measured, "test")
    if job.predicts and test:
        record |= {
            "predict_rows": len(list(_rows_in(data, "test"))) / test["seconds"],
            "predict_tokens": test["tokens"] / test["seconds"],
        }
    return record


def _evaluation(measured: dict[str, Any], split: str) -> dict[str, Any] | None:
    """Return the last evaluation of a split after training, or None."""
    after = [e for e in measured["evaluations"] if split in e["prefix"] and not e["training"]]
    return after[-1] if after else None


def record_of(measured: dict[str, Any]) -> dict[str, Any]:
    """Compute the quantities of a training run from its measurements."""
    training = measured["training"]
    evaluation = _evaluation(measured, "eval") or _evaluation(measured, "validation")
    start = measured["started"]
    return {
        "train_rows": training["rows"] / training["seconds"],
        "train_tokens": training["tokens"] / training["seconds"],
        "train_share": training["operations"] / training["seconds"] / measured["rate"],
        "eval_rows": evaluation["rows"] / evaluation["seconds"],
        "eval_tokens": evaluation["tokens"] / evaluation["seconds"],
        "first_step": measured["first_step"] - start - measured["evaluated_before"],
        "preparation": measured["preparation"],
        "job": measured["ended"] - start,
        **{
            key: measured[key] for key in ("peak_mib", "peak_gpu_mib", "rate", "precision", "device") if key in measured
        },
    }


def code_of(recipe: str, *more: str) -> str:
    """Hash all code that a measurement depends on. `more` are further files of the benchmarks."""
    files = [
        *ROOT.glob("common/**/*.py"),
        *ROOT.glob(f"recipes/{recipe}/*.py"),
        *ROOT.glob("tests/benchmarks/stock*.py"),
    ]
    files += [ROOT / "tests" / "benchmarks" / f"{name}.py" for name in ("watched", "operations", *more)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def measure(recipe: str, folder: Path | None, options: argparse.Namespace, kept: Kept) -> list[dict]:
    """Return the records of a recipe for these options. Missing runs are made and kept, except under `--table`."""
    job = JOBS[recipe]
    whole = options.full or folder is not None
    counts = {
        "train": options.rows or (None if whole else job.rows),
        "validation": options.validation_rows or (None if whole else options.test_rows or job.test_rows),
        "test": options.test_rows or (None if whole else job.test_rows),
    }
    settings = {
        "recipe": recipe,
        "data": folder.name if folder else "sample",
        "digest": digest_of(recipe, folder),
        "rows": counts,
        "epochs": options.epochs or (job.full_epochs if options.full else 1),
        "batch": options.batch or job.batch,
        "learning_rate": options.learning_rate or job.learning_rate,
        "fp32": options.fp32,
        "model": options.model,
        "words": [job.ours, job.stock_words, job.start],
        "cores": cores(),
        "code": code_of(recipe),
    }
    orders = {seed: ARMS if seed % 2 else ARMS[::-1] for seed in range(1, options.rounds + 1)}
    records = []
    for about in (settings | {"seed": seed, "arm": arm} for seed, order in orders.items() for arm in order):
        record = kept.find(about)
        if record is None and not options.table:
            data = written(recipe, folder, counts, settings["digest"])
            model = options.model or (str(start_of(recipe, job)) if job.start else None)
            cache = FOLDER / "cache" / f"{recipe}-{about['arm']}"
            if about["seed"] % 2:
                shutil.rmtree(cache, ignore_errors=True)
            cold = not cache.is_dir()
            cache.mkdir(parents=True, exist_ok=True)
            arm = {"ours": ours, "stock": stock}[about["arm"]]
            made = arm(recipe, job, about, data, model, cache)
            if job.stock == "language":  # the arms cut texts into different rows
                made = {name: value for name, value in made.items() if not name.endswith("_rows")}
            record = kept.add(about | {"cold": cold} | made)
            speed = f"{record['train_tokens']:,.0f} tokens a second"
            print(
                f"{recipe}, round {about['seed']} of {options.rounds}, {about['arm']}: {speed}, "
                f"{record['job']:.0f} s, {record['peak_mib']:,} MiB, score {record['score']:.3f}",
                flush=True,
            )
        if record is not None:
            records.append(record)
    for arm in ARMS:
        shutil.rmtree(FOLDER / f"{recipe}-{arm}", ignore_errors=True)
    return records


# Results


def quantities(records: list[dict]) -> dict[str, dict[str, Any]]:
    """Collect each quantity of a recipe's runs: the values in each arm, and the ratios of rounds that both arms have.

    A ratio of rates or seconds is how many times as fast ours is. A ratio of sizes is ours over stock. First steps and
    preprocessing are separate for an empty and a filled cache.
    """
    runs = {arm: {r["seed"]: _by_cache(r) for r in records if r["arm"] == arm} for arm in ARMS}
    collected = {}
    for name, (_, kind) in QUANTITIES.items():
        values = {arm: {s: r[name] for s, r in runs[arm].items() if name in r} for arm in ARMS}
        if not any(values.values()):
            continue
        pairs = [(values["ours"][s], values["stock"][s]) for s in values["ours"] if s in values["stock"]]
        ratios = [(stock / ours if kind == "seconds" else ours / stock) for ours, stock in pairs] if kind else []
        collected[name] = {arm: list(values[arm].values()) for arm in ARMS} | {"ratio": ratios}
    return collected


def _by_cache(record: dict[str, Any]) -> dict[str, Any]:
    state = "cold" if record["cold"] else "cached"
    return record | {f"{name}_{state}": record[name] for name in ("first_step", "preparation")}


def shown(values: list[float], times: bool = False) -> str:
    """Format the median and, of several values, the least and the greatest."""
    if not values:
        return ""

    def number(value: float) -> str:
        if value >= 1e9:
            return f"{value / 1e9:,.0f}e9"
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 1 or times else f"{value:.3f}"

    ends = f" ({number(min(values))}–{number(max(values))})" if len(values) > 1 else ""
    return f"{number(statistics.median(values))}{'x' if times else ''}{ends}"


def title_of(records: list[dict], options: argparse.Namespace) -> str:
    precision = "/".join(sorted({r["precision"] for r in records if r["arm"] == "ours"}))
    days = sorted({r["date"][:10] for r in records})
    devices = "/".join(sorted({r["device"] for r in records}))
    return (
        f"{devices}, {records[0]['cores']} cores; ours in {precision}, stock in "
        f"float32; at most {options.rounds} rounds; {' to '.join(dict.fromkeys((days[0], days[-1])))}"
    )


def markdown(title: str, recipes: dict[str, list[dict]]) -> str:
    """Format a line of ratios for each recipe, and below each quantity with median, least and greatest."""
    lines = [
        title,
        "",
        "Medians of the rounds. Ratios: how many times as fast ours is; of memory: ours over stock.",
        "",
        "| recipe, data | rows, test rows | epochs, batch | training | evaluation | predict | job | memory "
        "| of the floor | score | stock | baseline | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for records in recipes.values():
        collected, about = quantities(records), records[0]
        middles = {
            name: f"{statistics.median(collected[name]['ratio']):.2g}x"
            for name in collected
            if collected[name]["ratio"]
        }
        scores = [_mean(collected["score"][arm]) for arm in ARMS]
        share, minutes = (statistics.median(collected[n]["ours"] or [0]) for n in ("train_share", "job"))
        baseline = [r["baseline"] for r in records if "baseline" in r]
        ratios = (middles.get(n, "") for n in ("train_tokens", "eval_tokens", "predict_tokens", "job", "peak_mib"))
        rows = ", ".join(str(about["rows"][split] or "all") for split in ("train", "test"))
        cells = [f"{about['recipe']}, {about['data']}", rows, f"{about['epochs']:g}, {about['batch']}", *ratios]
        cells += [f"{share:.0%}", *scores, f"{statistics.mean(baseline or [0]):.3f}", f"{minutes / 60:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| recipe | quantity | ours | stock | ratio |", "| --- | --- | ---: | ---: | ---: |"]
    for recipe, records in recipes.items():
        for name, values in quantities(records).items():
            cells = [shown(values["ours"]), shown(values["stock"]), shown(values["ratio"], times=True)]
            lines.append(f"| {recipe} | {QUANTITIES[name][0]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipes", nargs="*", help=f"default: all of {' '.join(JOBS)}")
    parser.add_argument("--data", type=Path, nargs="*", help="data folders of one recipe (default: its sample)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each arm; the seed is the round")
    parser.add_argument(
        "--rows", type=int, help="use only the first N training rows (default: all of --data, a part of a sample)"
    )
    parser.add_argument("--test_rows", type=int, help="use only the first N test rows")
    parser.add_argument(
        "--validation_rows", type=int, help="use only the first N validation rows (default for a sample: --test_rows)"
    )
    parser.add_argument("--epochs", type=float, help="passes over the training rows (default: 1)")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--full", action="store_true", help="all rows of the sample, epochs of the recipe")
    parser.add_argument("--fp32", action="store_true", help="ours in float32 as well")
    parser.add_argument("--model", help="folder with the initial model of both arms (default: the recipe's)")
    parser.add_argument(
        "--table", action="store_true", help="run nothing; print the table of the finished runs with these options"
    )
    options = parser.parse_args(argv)
    for recipe in options.recipes:
        if recipe not in JOBS:
            parser.error(f"{recipe}: no benchmark of this name; name one of: {' '.join(JOBS)}")
    if options.data and len(options.recipes) != 1:
        parser.error("--data: needs exactly one recipe; name the recipe before --data")
    return options


def main(argv: list[str] | None = None) -> None:
    options = read_options(argv)
    kept = Kept(FOLDER / "runs.jsonl")
    recipes = {}
    for recipe in options.recipes or JOBS:
        for folder in options.data or [None]:
            records = measure(recipe, folder, options, kept)
            if records:
                recipes[recipe if folder is None else f"{recipe}, {folder.name}"] = records
    if not recipes:
        sys.exit("--table: no finished run with these options and this code; run without --table")
    title = title_of([record for records in recipes.values() for record in records], options)
    table = markdown(title, recipes)
    (FOLDER / "bench.md").write_text(table, encoding="utf-8")
    results = {name: {"quantities": quantities(records), "runs": records} for name, records in recipes.items()}
    (FOLDER / "bench.json").write_text(json.dumps({"title": title, "recipes": results}, indent=1), encoding="utf-8")
    print(f"\n{table}\n{FOLDER}/bench.md, bench.json")


if __name__ == "__main__":
    if "--scaling" in sys.argv:
        from tests.benchmarks import scaling

        scaling.main([word for word in sys.argv[1:] if word != "--scaling"])
    else:
        main()
