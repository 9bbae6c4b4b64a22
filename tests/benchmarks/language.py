"""Measure seconds per step and peak memory of the language model head: at labels and in chunks, or on all tokens.

    python -m tests.benchmarks.language head   # MLM: a step with the head at 15 % of the positions, and the stock loss
    python -m tests.benchmarks.language loss   # CLM: the loss in chunks, and the stock loss; each in a process

A batch has 32 rows of 256 random tokens, in bfloat16 if the CPU computes bfloat16 natively. `--rows` changes the batch,
`--rounds` the number of steps; the first step does not count. `head` alternates the steps of both arms and prints the
median of each. The layers are the same in both arms, and the ratio is therefore the ratio of head and loss.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, GPT2Config

from common.args import ModelArguments
from common.hardware import native_bf16
from common.models.load import load_model
from common.models.structure import set_dropout
from common.speed.head import HeadAtLabels, losses_at_labels

LENGTH = 256


def head(rows: int, rounds: int) -> None:
    model = load_model(AutoModelForMaskedLM, ModelArguments(), None, LENGTH).model.train()
    set_dropout(model, 0.0)
    head_at_labels = HeadAtLabels(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    seconds: dict[str, list[float]] = {"masked": [], "stock": []}
    for _ in range(rounds + 1):
        ids = torch.randint(1000, 30_000, (rows, LENGTH))
        masked = torch.where(torch.rand(rows, LENGTH) < 0.15, ids, -100)
        for name in seconds:
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, native_bf16(True)):
                if name == "masked":
                    with head_at_labels.at(masked):
                        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                    found = losses_at_labels(logits, masked).sum() / (masked != -100).sum()
                    del logits
                else:
                    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=masked).loss
            found.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - start)
    stock, ours = (statistics.median(seconds[name][1:]) for name in ("stock", "masked"))
    print(f"stock head and loss {stock:.2f} s per step, at masked positions {ours:.2f} s: {stock / ours:.2f} times")


def loss(kind: str, vocabulary: int, rows: int, rounds: int) -> None:
    config = GPT2Config(n_embd=128, n_layer=2, n_head=2, n_positions=LENGTH, vocab_size=vocabulary, use_cache=False)
    model = AutoModelForCausalLM.from_config(config).train()
    head_at_labels = HeadAtLabels(model, kind == "chunks", 1024)
    ids = torch.randint(0, vocabulary, (rows, LENGTH))
    shifted = torch.cat([ids[:, 1:], torch.full((rows, 1), -100)], 1)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, native_bf16(True)):
            if kind == "chunks":
                with head_at_labels.at(shifted):
                    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
                found = losses_at_labels(output.logits, shifted).sum() / (shifted != -100).sum()
            else:
                found = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        found.backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - start)
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
    median = statistics.median(seconds[1:])
    print(f"{vocabulary:6} tokens, {kind:6}: peak {peak:5} MiB, {median:.2f} s per step", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["head", "loss"])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kind", choices=["stock", "chunks"], help="measure only this kind, in this process")
    parser.add_argument("--vocabulary", type=int, nargs="*", default=[8000, 50257])
    options = parser.parse_args()
    if options.what == "head":
        head(options.rows, options.rounds)
    elif options.kind:
        loss(options.kind, options.vocabulary[0], options.rows, options.rounds)
    else:
        for size in options.vocabulary:
            for kind in ("stock", "chunks"):
                words = ["loss", "--kind", kind, "--vocabulary", size, "--rows", options.rows]
                words += ["--rounds", options.rounds]
                subprocess.run([sys.executable, "-m", "tests.benchmarks.language", *map(str, words)], check=True)


if __name__ == "__main__":
    main()
