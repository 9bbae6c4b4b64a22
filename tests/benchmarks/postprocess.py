"""Compare windows per second from logits to answers: the loops of run_qa.py and `recipes.qa.spans`.

python -m tests.benchmarks.postprocess
"""

import argparse
import time

import numpy as np
import torch
from datasets import Dataset

from recipes.qa.scoring import answers
from recipes.qa.spans import best_positions, best_spans
from tests.benchmarks.stock_qa import LENGTH, LONGEST, postprocess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=6000, help="number of windows, two per question")
    parser.add_argument("--tries", type=int, default=5)
    options = parser.parse_args()

    chance = np.random.default_rng(0)
    count, begin = options.windows // 2 * 2, 16
    tokens = LENGTH - begin - 1
    starts = np.cumsum(chance.integers(2, 8, (count, tokens)), axis=1)
    ends = starts + 2
    row = np.arange(count) // 2
    contexts = ["x" * int(ends.max())] * (count // 2)
    logits = [torch.from_numpy(chance.normal(size=(count, LENGTH)).astype(np.float32) * 3) for _ in range(2)]
    for part in logits:
        part[:, 1:begin] = part[:, begin + tokens :] = float("-inf")
    windows = Dataset.from_dict(
        {"row": row, "begin": [begin] * count, "starts": starts.tolist(), "ends": ends.tolist()}
    )
    offsets = [
        [None] * begin + list(zip(s, e, strict=True)) + [None]
        for s, e in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    features = {"row": row.tolist(), "offset_mapping": offsets}

    def loops() -> list[str]:
        plain = [part.numpy() for part in logits]
        return postprocess({"context": contexts}, features, *plain, some_none=False)

    def ours() -> list[str]:
        batches = zip(*(part.split(64) for part in logits), strict=True)
        found = np.concatenate([best_positions(batch).numpy() for batch in batches])
        spans = best_spans(found, windows, LONGEST)
        return [context[s:e] for context, (s, e) in zip(contexts, answers(contexts, spans, None), strict=True)]

    assert loops() == ours()
    print("windows per second; ours includes the selection of the best starts and ends")
    print("try  loops    ours  ratio")
    for i in range(options.tries):
        rates = []
        for function in (loops, ours):
            start = time.perf_counter()
            function()
            rates.append(count / (time.perf_counter() - start))
        print(f"{i + 1:3}  {rates[0]:6,.0f}  {rates[1]:6,.0f}  {rates[1] / rates[0]:4.1f}x")


if __name__ == "__main__":
    main()
