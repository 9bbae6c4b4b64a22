"""Measure which attention kernel trains fastest on this machine.

    python -m tests.benchmarks.attention --rounds 7

Prints, for each precision and batch shape, the median seconds of a training step (forward, backward, AdamW), and the
ratio to the first kernel. The model is the embedded encoder with a token classification head. The kernels alternate
step by step, which spreads the noise of the machine. `p=0` turns attention dropout off. `packed` computes real tokens
only (`common/speed/padding_free.py`), with SDPA or with attention as explicit matrix products.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForTokenClassification

from common.models.load import resolve_model
from common.speed import padding_free

#: kernel, attention dropout, and the maximum length for attention as explicit matrix products
ARMS = [
    ("sdpa", 0.1, 0),
    ("eager", 0.1, 0),
    ("sdpa", 0.0, 0),
    ("eager", 0.0, 0),
    ("packed", 0.0, 0),
    ("packed", 0.0, 512),
]


def build(kernel: str, dropout: float, device: str):
    path = resolve_model("sentence-transformers/all-MiniLM-L6-v2")
    config = AutoConfig.from_pretrained(path, num_labels=9, attention_probs_dropout_prob=dropout)
    model = AutoModelForTokenClassification.from_pretrained(
        path, config=config, attn_implementation="sdpa" if kernel == "packed" else kernel, dtype=torch.float32
    )
    if kernel == "packed":
        assert padding_free.leave_out_padding(model) is None
    return model.to(device).train()


def step_seconds(model, optimizer, rows: int, length: int, bf16: bool, device: str) -> float:
    ids = torch.randint(1000, 30000, (rows, length), device=device)
    mask = torch.ones_like(ids)
    mask[1::2, length * 3 // 4 :] = 0  # padding as in real batches; a mask excludes some kernels
    start = time.perf_counter()
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=bf16):
        loss = model(input_ids=ids, attention_mask=mask, labels=ids % 9).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--shapes", default="32x32,32x64,32x128,8x256,8x512", help="rows x padded length, comma separated"
    )
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [build(kernel, dropout, device) for kernel, dropout, _ in ARMS]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True) for m in models]
    print(f"{device}, {torch.get_num_threads()} threads, median of {args.rounds} rounds (s per step, ratio to sdpa)")
    print(
        f"{'precision':10}{'shape':>9}"
        + "".join(f"{f'{kernel} p={p:g}' + ' written' * bool(w):>18}" for kernel, p, w in ARMS)
    )
    for bf16 in (True, False):
        for shape in args.shapes.split(","):
            rows, length = map(int, shape.split("x"))
            times = [[] for _ in ARMS]
            for round_ in range(args.rounds + 1):
                for arm, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                    padding_free.WRITTEN_OUT = ARMS[arm][2]
                    seconds = step_seconds(model, optimizer, rows, length, bf16, device)
                    if round_:  # the first round is warm-up
                        times[arm].append(seconds)
            ratios = [statistics.median(a / b for a, b in zip(t, times[0], strict=True)) for t in times]
            cells = "".join(f"{statistics.median(t):>11.3f}{r:>7.2f}" for t, r in zip(times, ratios, strict=True))
            print(f"{'bf16' if bf16 else 'fp32':10}{shape:>9}{cells}", flush=True)


if __name__ == "__main__":
    main()
