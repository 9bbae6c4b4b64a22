"""Compare the recipes with the stock Trainer: speed, memory, start-up time and score.

    make bench                                  # every recipe, on its sample
    make bench RECIPE=ner ARGS="--rounds 3"
    make bench ARGS="--fp32"                    # ours in float32 too, as on a CPU without bfloat16
    make bench ARGS="--scaling"                 # cost against size: tests/benchmarks/scaling.py
    make bench ARGS="--busy"                    # beside other programs: tests/benchmarks/busy.py
    python -m tests.benchmarks.bench ner --data data/wnut17 --epochs 3 --rounds 3
    python -m tests.benchmarks.bench sentiment qa --table

The default is a part of the sample that takes about a minute per round. `--full` takes all of the sample and the
recipe's epochs. A data folder has train.jsonl, validation.jsonl and test.jsonl in the recipe's format, or .txt files
with one text per line. Both arms alternate, and have the same model, rows, epochs, batch and learning rate, and the
same seed in each round. The stock arm is `tests/benchmarks/stock*.py`. A finished run is added to
outputs/bench/runs.jsonl, and is reused while options and code stay the same; the same command therefore resumes a
stopped benchmark. The results are in outputs/bench/bench.md and bench.json. NOTES.md explains how each number is
measured.
"""

import argparse
import hashlib
import importlib
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

import common
from common.hardware import cores

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = Path("outputs/bench")
SPLITS = ("train", "validation", "test")
ARMS = ("ours", "stock")


@dataclass
class Job:
    """Number of sample rows and settings of a recipe's benchmark, for both arms."""

    stock: str
    rows: int
    test_rows: int  # rows of validation, and of test
    batch: int
    learning_rate: float
    full_epochs: float
    score: str
    baseline: str
    ours: list[str] = field(default_factory=list)
    stock_words: list[str] = field(default_factory=list)
    #: arguments of the recipe run that makes the initial model of both arms
    start: list[str] | None = None
    script: str = "train"
    predicts: bool = True  # whether the stock Trainer has a counterpart of predict


WRITES = ["--max_tokens_per_batch", "0", "--max_target_length", "64"]
FEW = ["--max_eval_samples", "8", "--save_strategy", "no", "--eval_strategy", "no"]
#: as the stock scripts train; other training can give outputs that never end, which take most of the time
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

#: quantity of a run, its title, and how to compare ours with stock: as rates, seconds or sizes
QUANTITIES = {
    "train_rows": ("training, examples per second", "rate"),
    "train_tokens": ("training, tokens per second", "rate"),
    "train_share": ("training, share of the matrix rate", "rate"),
    "eval_rows": ("evaluation, examples per second", "rate"),
    "eval_tokens": ("evaluation, tokens per second", "rate"),
    "predict_rows": ("predict, examples per second", "rate"),
    "predict_tokens": ("predict, tokens per second", "rate"),
    "first_step_cold": ("start to first step, cold, s", "seconds"),
    "first_step_cached": ("start to first step, cached, s", "seconds"),
    "preparation_cold": ("preprocessing, cold, s", "seconds"),
    "preparation_cached": ("preprocessing, cached, s", "seconds"),
    "job": ("start to saved model and scores, s", "seconds"),
    "peak_mib": ("peak memory, MiB", "size"),
    "peak_gpu_mib": ("peak memory of the GPU, MiB", "size"),
    "score": ("score", None),
    "rate": ("matrix rate, operations per second", None),
}


class Kept:
    """Store runs in a file, one per line; a stored run is not repeated."""

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
    """Return the rows of each split, from a data folder or the recipe's sample."""
    if folder is not None:
        return {split: list(_rows_in(folder, split)) for split in SPLITS if any(folder.glob(f"{split}.*"))}
    if recipe in ("mlm", "clm"):
        from common.data.corpus import CorpusArguments, load_corpus

        found = {split: texts.to_list() for split, texts in load_corpus(CorpusArguments()).items()}
        for texts in found.values():  # the sample is sorted by module
            random.Random(0).shuffle(texts)
        return found
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
    """Return the benchmark's data folder `name`, with a file for each split of `rows`; write it atomically."""
    target = FOLDER / "data" / name
    if not target.is_dir():
        part = target.with_name(name + ".part")
        part.mkdir(parents=True, exist_ok=True)
        for split, found in rows().items():
            with open(part / f"{split}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        part.replace(target)
    return target


def digest_of(recipe: str, folder: Path | None = None) -> str:
    """Return a hash of the folder's files, or of the sample's rows."""
    found = hashlib.sha256()
    if folder is None:
        found.update(json.dumps(rows_of(recipe, None), sort_keys=True).encode())
    else:
        for split in SPLITS:
            if any(folder.glob(f"{split}.*")):
                with open(_file_of(folder, split), "rb") as file:
                    found.update(split.encode() + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def written(recipe: str, folder: Path | None, counts: dict[str, int | None], digest: str) -> Path:
    """Return a folder with the rows for both arms: the first `counts` rows of each split, or all rows."""
    own = [recipe, folder.name if folder else "sample", *(str(count or "all") for count in counts.values()), digest]
    return made_once("-".join(own), lambda: {s: rows[: counts[s]] for s, rows in rows_of(recipe, folder).items()})


# Runs


def environment(module: str) -> dict[str, str]:
    """Return the environment of an arm: the stock arm spins as torch does by default, unless the user chose."""
    stock = not module.startswith("recipes.") and common.SPINNING_LIMITED
    return {name: value for name, value in os.environ.items() if not (stock and name == "GOMP_SPINCOUNT")}


def watched(module: str, words: Iterable[Any], cache: Path, log: Path) -> dict[str, Any]:
    """Run a program under `tests.benchmarks.watched`; return its measurements, and `started`, its start time."""
    measured = log.with_suffix(".measured")
    measured.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.benchmarks.watched", str(measured), module, *map(str, words)]
    settings = {"HF_DATASETS_CACHE": str(cache.resolve()), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        status = subprocess.run(command, stdout=file, stderr=file, env=environment(module) | settings).returncode
    if status:
        said = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        sys.exit(f"exit status {status}: {' '.join(command)}\n{said}")
    return json.loads(measured.read_text(encoding="utf-8")) | {"started": start}


def start_of(recipe: str, job: Job) -> Path:
    """Return the initial model of both arms if the recipe trains from scratch; train the model once."""
    key = hashlib.sha256(json.dumps(job.start).encode()).hexdigest()[:8]
    folder = FOLDER / "start" / f"{recipe}-{key}"
    if not (folder / "model.safetensors").is_file():
        print(f"{recipe}: trains the initial model of both arms", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = [*job.start, "--output_dir", str(folder), "--overwrite", "--disable_tqdm", "true"]
        with open(folder.with_suffix(".log"), "w", encoding="utf-8") as log:
            command = [sys.executable, "-m", f"recipes.{recipe}.{JOBS[recipe].script}", *words]
            status = subprocess.run(command, stdout=log, stderr=log).returncode
        if status:
            sys.exit(f"exit status {status}: {' '.join(command)}; see {log.name}")
    return folder


def training(
    arm: str, recipe: str, about: dict, data: Path, model: str | None, folder: Path
) -> tuple[str, list[str | Path]]:
    """Return the module and the words of arguments that train `arm` on the rows in `data`, into `folder`."""
    job = JOBS[recipe]
    if arm == "stock":
        words = [word for name in ("epochs", "batch", "learning_rate", "seed") for word in (f"--{name}", about[name])]
        words += ["--data", data, "--output_dir", folder, *job.stock_words, *(["--model", model] if model else [])]
        return f"tests.benchmarks.stock_{job.stock}", words
    files = [word for s in SPLITS if (data / f"{s}.jsonl").is_file() for word in (f"--{s}_file", data / f"{s}.jsonl")]
    words = [
        *files, "--num_train_epochs", about["epochs"], "--per_device_train_batch_size", about["batch"],
        "--learning_rate", about["learning_rate"], "--seed", about["seed"], *job.ours, "--disable_tqdm", "true",
        "--output_dir", folder, "--overwrite",
    ]  # fmt: skip
    words += ["--model_name_or_path", model] if model else []
    words += ["--precision", "fp32"] if about["fp32"] else []
    return f"recipes.{recipe}.{job.script}", words


def ours(recipe: str, job: Job, about: dict, data: Path, model: str | None, cache: Path) -> dict[str, Any]:
    folder = FOLDER / f"{recipe}-ours"
    found = watched(*training("ours", recipe, about, data, model, folder), cache, folder.with_suffix(".log"))
    scores = json.loads((folder / "run.json").read_text(encoding="utf-8"))["scores"]
    record = record_of(found) | {"score": scores[job.score], "baseline": scores[job.baseline]}
    test = data / "test.jsonl"
    if job.predicts and test.is_file():
        words = ["--model", folder, "--input", test, "--output", folder / "predicted.jsonl", "--overwrite"]
        words += ["--precision", "fp32"] if about["fp32"] else []
        predict = watched(f"recipes.{recipe}.predict", words, cache, FOLDER / f"{recipe}-predict.log")["predict"]
        record |= {
            "predict_rows": predict["rows"] / predict["seconds"],
            "predict_tokens": _evaluation(found, "test")["sub_tokens"] / predict["seconds"],
        }
    return record


def stock(recipe: str, job: Job, about: dict, data: Path, model: str | None, cache: Path) -> dict[str, Any]:
    folder = FOLDER / f"{recipe}-stock"
    shutil.rmtree(folder, ignore_errors=True)
    found = watched(*training("stock", recipe, about, data, model, folder), cache, folder.with_suffix(".log"))
    record = record_of(found) | json.loads((folder / "stock.json").read_text(encoding="utf-8"))
    test = _evaluation(found, "test")
    if job.predicts and test:
        record |= {
            "predict_rows": len(list(_rows_in(data, "test"))) / test["seconds"],
            "predict_tokens": test["sub_tokens"] / test["seconds"],
        }
    return record


def _evaluation(found: dict[str, Any], split: str) -> dict[str, Any] | None:
    """Return the last evaluation of a split after training."""
    own = [e for e in found["evaluations"] if split in e["prefix"] and not e["training"]]
    return own[-1] if own else None


def record_of(found: dict[str, Any]) -> dict[str, Any]:
    """Compute the quantities of a training run from its measurements."""
    training, evaluation = found["training"], _evaluation(found, "eval") or _evaluation(found, "validation")
    start = found["started"]
    return {
        "train_rows": training["rows"] / training["seconds"],
        "train_tokens": training["sub_tokens"] / training["seconds"],
        "train_share": training["operations"] / training["seconds"] / found["rate"],
        "eval_rows": evaluation["rows"] / evaluation["seconds"],
        "eval_tokens": evaluation["sub_tokens"] / evaluation["seconds"],
        "first_step": found["first_step"] - start - found["evaluated_before"],
        "preparation": found["preparation"],
        "job": found["ended"] - start,
        **{key: found[key] for key in ("peak_mib", "peak_gpu_mib", "rate", "precision", "device") if key in found},
    }


def code_of(recipe: str, *more: str) -> str:
    """Hash all code that a measurement depends on, with the benchmark files in `more`."""
    files = [
        *ROOT.glob("common/**/*.py"),
        *ROOT.glob(f"recipes/{recipe}/*.py"),
        *ROOT.glob("tests/benchmarks/stock*.py"),
    ]
    files += [ROOT / "tests" / "benchmarks" / f"{name}.py" for name in ("watched", "operations", *more)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def settings_of(recipe: str, folder: Path | None, options: argparse.Namespace) -> dict[str, Any]:
    """Return all that a measurement depends on, except seed and arm."""
    job = JOBS[recipe]
    whole = options.full or folder is not None
    counts = {
        "train": options.rows or (None if whole else job.rows),
        "validation": options.validation_rows or (None if whole else options.test_rows or job.test_rows),
        "test": options.test_rows or (None if whole else job.test_rows),
    }
    return {
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


def measure(recipe: str, folder: Path | None, options: argparse.Namespace, kept: Kept) -> list[dict]:
    """Return the records of a recipe for these options; run and store missing records."""
    job, settings = JOBS[recipe], settings_of(recipe, folder, options)
    orders = {seed: ARMS if seed % 2 else ARMS[::-1] for seed in range(1, options.rounds + 1)}
    found = []
    for about in (settings | {"seed": seed, "arm": arm} for seed, order in orders.items() for arm in order):
        record = kept.find(about)
        if record is None and not options.table:
            data = written(recipe, folder, settings["rows"], settings["digest"])
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
            speed = f"{record['train_tokens']:,.0f} tokens per second"
            print(
                f"{recipe}, round {about['seed']} of {options.rounds}, {about['arm']}: {speed}, "
                f"{record['job']:.0f} s, {record['peak_mib']:,} MiB, score {record['score']:.3f}",
                flush=True,
            )
        if record is not None:
            found.append(record)
    for arm in ARMS:
        shutil.rmtree(FOLDER / f"{recipe}-{arm}", ignore_errors=True)
    return found


# Results


def quantities(records: list[dict]) -> dict[str, dict[str, Any]]:
    """Return the values of each quantity in both arms, and the ratios of the rounds that both arms have.

    A ratio is ours as a multiple of the stock speed, or for sizes as a share of the stock size. First steps and
    preprocessing are separate for an empty and a filled cache.
    """
    runs = {arm: {r["seed"]: _by_cache(r) for r in records if r["arm"] == arm} for arm in ARMS}
    found = {}
    for name, (_, kind) in QUANTITIES.items():
        values = {arm: {s: r[name] for s, r in runs[arm].items() if name in r} for arm in ARMS}
        if not any(values.values()):
            continue
        pairs = [(values["ours"][s], values["stock"][s]) for s in values["ours"] if s in values["stock"]]
        ratios = [(theirs / own if kind == "seconds" else own / theirs) for own, theirs in pairs] if kind else []
        found[name] = {arm: list(values[arm].values()) for arm in ARMS} | {"ratio": ratios}
    return found


def _by_cache(record: dict[str, Any]) -> dict[str, Any]:
    state = "cold" if record["cold"] else "cached"
    return record | {f"{name}_{state}": record[name] for name in ("first_step", "preparation")}


def shown(values: list[float], times: bool = False) -> str:
    """Format the median and, of several values, the minimum and maximum."""
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
    """Format one line per recipe with ours relative to stock, then the median, minimum and maximum of each quantity."""
    lines = [
        title,
        "",
        "Medians of the rounds. Ratios: how many times as fast ours is; of memory, the share that ours takes.",
        "",
        "| recipe, data | rows, test rows | epochs, batch | training | evaluation | predict | job | memory "
        "| of the floor | score | stock | baseline | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for records in recipes.values():
        found, about = quantities(records), records[0]
        middles = {name: f"{statistics.median(found[name]['ratio']):.2g}x" for name in found if found[name]["ratio"]}
        scores = [_mean(found["score"][arm]) for arm in ARMS]
        share, minutes = (statistics.median(found[n]["ours"] or [0]) for n in ("train_share", "job"))
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
    parser.add_argument("recipes", nargs="*", help=f"default: all ({' '.join(JOBS)})")
    parser.add_argument("--data", type=Path, nargs="*", help="folders, for one recipe; default: its sample")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each arm; the seed is the number of the round")
    parser.add_argument("--rows", type=int, help="use only the first N training rows; default with --data: all")
    parser.add_argument("--test_rows", type=int, help="use only the first N test rows")
    parser.add_argument(
        "--validation_rows", type=int, help="use only the first N validation rows; sample: as --test_rows"
    )
    parser.add_argument("--epochs", type=float, help="default: 1")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--full", action="store_true", help="all rows of the sample, epochs of the recipe")
    parser.add_argument("--fp32", action="store_true", help="ours in float32 as well")
    parser.add_argument("--model", help="folder of the initial model; default: the recipe's model")
    parser.add_argument(
        "--table", action="store_true", help="only print the results of earlier runs with these options"
    )
    options = parser.parse_args(argv)
    for recipe in options.recipes:
        if recipe not in JOBS:
            parser.error(f"{recipe}: no such recipe; known: {' '.join(JOBS)}")
    if options.data and len(options.recipes) != 1:
        parser.error("--data: needs one recipe; name the recipe, such as ner")
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
        sys.exit("no results for these options and this code; leave --table out to run")
    title = title_of([record for records in recipes.values() for record in records], options)
    table = markdown(title, recipes)
    (FOLDER / "bench.md").write_text(table, encoding="utf-8")
    found = {name: {"quantities": quantities(records), "runs": records} for name, records in recipes.items()}
    (FOLDER / "bench.json").write_text(json.dumps({"title": title, "recipes": found}, indent=1), encoding="utf-8")
    print(f"\n{table}\n{FOLDER}/bench.md, bench.json")


if __name__ == "__main__":
    other = next((name for name in ("scaling", "busy") if f"--{name}" in sys.argv), None)
    if other:
        importlib.import_module(f"tests.benchmarks.{other}").main([w for w in sys.argv[1:] if w != f"--{other}"])
    else:
        main()
