"""Choose what to label next: from a saved model and a pool of rows, the rows whose labels would teach it most.

    make annotate RECIPE=sentiment MODEL=outputs/sentiment INPUT=pool.jsonl OUTPUT=to_label.jsonl N=50 STRATEGY=margin
    make annotate RECIPE=ner INPUT=pool.txt OUTPUT=tasks.json ARGS="--format label_studio --labeled train.jsonl"
    python -m common.tools.annotate ner --model outputs/ner --input pool.jsonl --output to_label.jsonl --strategy badge

The output has the rows in the format that `train` reads, with the guess of the model as label, the most useful row
first: correct the labels, and train on the file. `--format label_studio` and `--format doccano` write tasks with the
guesses for these tools; `train` reads their exports. Rows that repeat another row, equal a row of `--labeled` or have a
label are left out and counted. `common.tools.annotate.strategies` describes the strategies. Memory does not grow with
the pool.
"""

import sys

from common.cli import command_line
from common.tools.annotate import select


def main(argv: list[str] | None = None) -> object:
    """Run the selection with the words of the command line."""
    return select.main(sys.argv[1:] if argv is None else argv, __doc__ or "")


if __name__ == "__main__":
    command_line(main)
