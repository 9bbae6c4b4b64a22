"""Choose what to label next: from a saved model and a pool of rows, the rows whose labels would teach it most.

    make annotate RECIPE=sentiment MODEL=outputs/sentiment INPUT=pool.jsonl OUTPUT=to_label.jsonl N=50 STRATEGY=margin
    make annotate RECIPE=ner INPUT=pool.txt OUTPUT=tasks.json ARGS="--format label_studio --labeled train.jsonl"
    python -m common.tools.annotate ner --model outputs/ner --input pool.jsonl --output to_label.jsonl --strategy badge
    python -m common.tools.annotate simulate --recipe sentiment --strategies random margin badge --start 50 --add 50

The output has the rows in the format that `train` reads, with the guess of the model as label, the most useful row
first: correct the labels, and train on the file. `--format label_studio` and `--format doccano` write tasks with the
guesses for these tools; `train` reads their exports. Rows that repeat another row, equal a row of `--labeled` or have a
label are left out and counted. `common.tools.annotate.strategies` describes the strategies. Memory does not grow with
the pool.

`simulate` measures on labelled data what a strategy saves: it trains the recipe on `--start` random rows, lets each
strategy choose `--add` more of the training rows, trains again, and so on (see `common.tools.annotate.simulate`).
"""

import sys

from common.cli import command_line
from common.tools.annotate import select, simulate


def main(argv: list[str] | None = None) -> object:
    """Run the selection, or under `simulate` the simulation."""
    argv = sys.argv[1:] if argv is None else argv
    return simulate.main(argv[1:]) if argv[:1] == ["simulate"] else select.main(argv, __doc__ or "")


if __name__ == "__main__":
    command_line(main)
