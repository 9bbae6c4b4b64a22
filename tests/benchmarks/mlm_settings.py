"""Compare settings of `recipes.mlm` after the same seconds of training, by held-out perplexity.

    python -m tests.benchmarks.mlm_settings --data wikitext2 --seconds 240
    python -m tests.benchmarks.mlm_settings --table

The folder has train.txt and validation.txt, with one text per line. For each setting, a run of 12 steps measures the
seconds per step. The number of steps then fits `--seconds`, which completes the schedule. The table has the real
seconds of training. All evaluations mask the same 15 % of the tokens. A finished run is added to
outputs/bench/mlm_settings.jsonl and is not repeated; the same command resumes a stopped benchmark. `--seeds 1 2 3` runs
each setting with three seeds. `--only END ...` selects settings by the end of their names.
"""

import argparse
import json
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from common.hardware import cores

RESULTS = Path("outputs/bench/mlm_settings.jsonl")
ROWS, RAMP_START = 32, 8
#: name -> arguments; the default is `ROWS` rows per step
#: `ramp` grows the batch from `RAMP_START` rows over the first half of the steps
SETTINGS = {
    "15 %, dropout 0.1, linear": {"mlm_probability": 0.15, "dropout": 0.1},
    "15 %, no dropout, linear": {"mlm_probability": 0.15},
    "30 %, no dropout, linear": {"mlm_probability": 0.3},
    "40 %, no dropout, linear": {"mlm_probability": 0.4},
    "15 %, no dropout, cosine": {"mlm_probability": 0.15, "lr_scheduler_type": "cosine"},
    "30 %, no dropout, cosine": {"mlm_probability": 0.3, "lr_scheduler_type": "cosine"},
    "15 %, no dropout, linear, 16 rows": {"mlm_probability": 0.15, "per_device_train_batch_size": 16},
    "30 %, no dropout, linear, 16 rows": {"mlm_probability": 0.3, "per_device_train_batch_size": 16},
    "15 %, no dropout, linear, 8 rows": {"mlm_probability": 0.15, "per_device_train_batch_size": 8},
    "15 %, no dropout, linear, ramp": {"mlm_probability": 0.15, "ramp": True},
    "30 %, no dropout, linear, ramp": {"mlm_probability": 0.3, "ramp": True},
}


def train(data: str, folder: str, **arguments) -> dict:
    """Run the recipe; return its results, the number of tokens, and the mean seconds of a step after the first 4."""
    words = [
        *("--train_file", f"{data}/train.txt", "--validation_file", f"{data}/validation.txt", "--output_dir", folder),
        *("--overwrite", "true", "--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true"),
        *("--per_device_train_batch_size", ROWS, "--logging_steps", 4),
        *(word for name, value in arguments.items() for word in (f"--{name}", value)),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "recipes.mlm.train", *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if done.returncode:
        sys.exit(done.stderr.decode()[-2000:])
    results = json.loads(Path(folder, "all_results.json").read_text())
    history = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    times = [(entry["step"], entry["train_runtime"]) for entry in history if "loss" in entry]
    (first, start), (last, end) = times[0], times[-1]
    return results | {
        "step_seconds": (end - start) / max(1, last - first),
        "tokens": history[-1]["num_input_tokens_seen"],
    }


def run(options: argparse.Namespace, setting: dict, seed: int) -> dict:
    arguments = {name: value for name, value in setting.items() if name != "ramp"} | {"seed": seed}
    folder = "outputs/bench/mlm_settings"
    short = train(options.data, folder, max_steps=12, max_eval_samples=8, **arguments)
    steps = options.seconds / short["step_seconds"]
    if setting.get("ramp"):
        ramp = steps / (
            1.5 + 0.5 * RAMP_START / ROWS
        )  # half of all steps; the run then takes as long as `steps` full steps
        steps = 2 * ramp
        arguments |= {"batch_ramp_start": RAMP_START, "batch_ramp_steps": max(1, round(ramp))}
    steps = max(4, round(steps))
    found = train(options.data, folder, max_steps=steps, max_eval_samples=options.max_eval_samples, **arguments)
    return {
        "steps": steps,
        "tokens": found["tokens"],
        "train_seconds": found["train_runtime"],
        "perplexity": found["after_validation_perplexity"],
        "accuracy": found["after_validation_accuracy"],
    }


def table(records: list[dict]) -> None:
    print("| setting | seconds | steps | tokens | perplexity | accuracy |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for key in dict.fromkeys((r["data"], r["seconds"], r["name"]) for r in records):
        runs = [r for r in records if (r["data"], r["seconds"], r["name"]) == key]

        def mean(name: str, runs=runs) -> float:
            return statistics.mean(r[name] for r in runs)

        spread = f" ± {statistics.stdev(r['perplexity'] for r in runs):.2f}" if len(runs) > 1 else ""
        print(
            f"| {key[2]} | {mean('train_seconds'):.0f} | {mean('steps'):.0f} | {mean('tokens'):,.0f} "
            f"| {mean('perplexity'):.2f}{spread} | {mean('accuracy'):.3f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with train.txt and validation.txt")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--max_eval_samples", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", default=[""], help="run only settings whose name has this end")
    parser.add_argument("--table", action="store_true", help="only print the results of earlier runs")
    options = parser.parse_args()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if not options.table and not options.data:
        parser.error("--data: is required; name a folder")
    for seed in [] if options.table else options.seeds:
        for name, setting in SETTINGS.items():
            about = {"data": Path(options.data).name, "seconds": options.seconds, "name": name, "seed": seed}
            about |= {"max_eval_samples": options.max_eval_samples}
            if not name.endswith(tuple(options.only)) or any(about.items() <= record.items() for record in records):
                continue
            record = about | run(options, setting, seed)
            record |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "cores": cores()}
            records.append(record)
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{name}, seed {seed}: perplexity {record['perplexity']:.2f}", flush=True)
    table(records)


if __name__ == "__main__":
    main()
