"""Draw the training throughput against the stock Trainer, the picture of the front page.

    python -m tests.benchmarks.picture
    python -m tests.benchmarks.picture --add outputs/bench/bench.json --machine "AMD EPYC, AVX512_BF16"

Reads `results.json` in this folder: the minimum, median and maximum ratio of the rounds for each machine. `--add` first
adds the results of `make bench`. Writes `throughput.png`.
"""

import argparse
import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent
RESULTS, PICTURE = FOLDER / "results.json", FOLDER / "throughput.png"
#: colours for readers with a colour vision deficiency (Okabe and Ito 2008)
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


def ratios(bench: Path) -> dict[str, list[float]]:
    """Return the minimum, median and maximum ratio of training throughput of each recipe in a bench.json."""
    found = json.loads(bench.read_text(encoding="utf-8"))["recipes"]
    values = {name: recipe["quantities"]["train_tokens"]["ratio"] for name, recipe in found.items()}
    return {name: [min(v), statistics.median(v), max(v)] for name, v in values.items() if v}


def draw(machines: dict[str, dict], path: Path) -> None:
    """Draw a group of bars for each recipe and a bar for each machine."""
    recipes = list(dict.fromkeys(name for machine in machines.values() for name in machine["training"]))
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(machines)
    for i, (name, machine) in enumerate(machines.items()):
        places = [recipes.index(recipe) + (i - (len(machines) - 1) / 2) * width for recipe in machine["training"]]
        low, middle, high = zip(*machine["training"].values(), strict=True)
        spread = [[m - x for m, x in zip(middle, low, strict=True)], [x - m for m, x in zip(middle, high, strict=True)]]
        bars = axes.bar(places, middle, width, yerr=spread, capsize=2, color=COLOURS[i], label=f"2 cores of {name}")
        axes.bar_label(bars, [f"{m:.2g}x" for m in middle], padding=3, fontsize=8)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(recipes)), recipes)
    axes.set_ylabel("training throughput,\nstock Trainer = 1")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.picture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--add", type=Path, help="a bench.json of make bench")
    parser.add_argument("--machine", help="name of the machine that ran it")
    parser.add_argument("--date", help="day of the run, such as 2026-11-28")
    parser.add_argument("--command", default="make bench", help="the command that ran")
    options = parser.parse_args(argv)
    machines = json.loads(RESULTS.read_text(encoding="utf-8"))
    if options.add:
        if not (options.machine and options.date):
            parser.error("--add: give --machine and --date as well")
        machines[options.machine] = {
            "date": options.date,
            "command": options.command,
            "training": ratios(options.add),
        }
        RESULTS.write_text(json.dumps(machines, indent=1) + "\n", encoding="utf-8")
    draw(machines, PICTURE)
    print(PICTURE)


if __name__ == "__main__":
    main()
