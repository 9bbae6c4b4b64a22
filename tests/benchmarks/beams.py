"""Measure BLEU and seconds of a saved translation model for several beam counts and length penalties.

    python -m tests.benchmarks.beams --model outputs/translation --beams 1 2 4 8 --length_penalty 0.6 1.0 1.4

Reads `predictions_validation.jsonl` in the model folder: defaults are chosen on validation rows, not on test rows.
"""

import argparse
import time
from pathlib import Path

from recipes.translation.predict import Translator
from recipes.translation.scoring import bleu_of, scores
from tests.conftest import read_jsonl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/translation")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--length_penalty", type=float, nargs="+", default=[0.6, 1.0, 1.4])
    args = parser.parse_args()
    rows = read_jsonl(Path(args.model, "predictions_validation.jsonl"))
    gold = [row["target"] for row in rows]
    print("beams  penalty    BLEU    chrF  length  seconds")
    for beams in args.beams:
        for penalty in args.length_penalty if beams > 1 else [1.0]:
            translate = Translator(args.model, beams=beams, length_penalty=penalty)
            start = time.perf_counter()
            predicted = [best[0]["predicted"] for best in translate([row["source"] for row in rows])]
            seconds = time.perf_counter() - start
            found = scores(bleu_of(translate.way.target_lang, "auto"), predicted, gold, fast=True)
            numbers = f"{found['bleu']:8.2f}{found['chrf']:8.2f}{found['length_ratio']:8.3f}{seconds:9.1f}"
            print(f"{beams:5}{penalty:9.1f}{numbers}", flush=True)


if __name__ == "__main__":
    main()
