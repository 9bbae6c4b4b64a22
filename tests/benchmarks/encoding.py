"""Compare encoding by the matching recipe with `SentenceTransformer.encode`, on the same texts in one process.

    python -m tests.benchmarks.encoding --texts recipes/matching/sample/corpus.jsonl
    python -m tests.benchmarks.encoding --texts banking77/train.jsonl --rows 4000 --rounds 5

Both read the same model and the same texts, in alternating rounds; the first round is not counted. The table has texts
a second, the median ratio of a round, and the lowest cosine to the vectors of sentence-transformers in float32.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from common.args import DEFAULT_ENCODER
from common.data import read_file
from common.hardware import configure_allocator, hardware
from common.models import resolve_model
from recipes.matching.encoder import Embedder


def texts_of(path: str, rows: int) -> list[str]:
    """Return the first text column of the first rows of a file."""
    found = [next(value for value in row.values() if isinstance(value, str)) for _, row in read_file(path)]
    return found[:rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", required=True, help="file of rows with a text")
    parser.add_argument("--rows", type=int, default=4000, help="first rows that are encoded")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are counted")
    parser.add_argument("--model", default=DEFAULT_ENCODER, help="folder or hub id")
    args = parser.parse_args()
    configure_allocator()
    texts = texts_of(args.texts, args.rows)
    theirs = SentenceTransformer(resolve_model(args.model), device="cpu")
    theirs.max_seq_length = 256
    ours = {name: Embedder(args.model, precision=name) for name in ("fp32", "bf16")}
    for embedder in ours.values():
        embedder.max_length = 256
    ways = {"SentenceTransformer.encode": partial(theirs.encode, show_progress_bar=False)} | ours
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    vectors = {}
    for number in range(args.rounds + 1):
        for name, encode in ways.items():
            start = time.perf_counter()
            vectors[name] = encode(texts)
            if number:
                seconds[name].append(time.perf_counter() - start)
    machine = hardware()["cpu"]
    reference = vectors["SentenceTransformer.encode"]
    print(f"{len(texts):,} texts of {Path(args.texts).name}, {torch.get_num_threads()} threads, {machine}")
    for name, times in seconds.items():
        ratio = np.median(np.array(seconds["SentenceTransformer.encode"]) / times)
        cosine = np.einsum("ij,ij->i", reference, vectors[name]).min()
        print(f"{name:28}{len(texts) / np.median(times):8.0f} texts/s  {ratio:5.2f}x  cosine >= {cosine:.5f}")


if __name__ == "__main__":
    main()
