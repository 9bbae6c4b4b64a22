"""The head of language models at labels only and in chunks, against the whole: seconds a step, and peak memory.

    python -m tests.benchmarks.language head   # MLM: a step with the head at 15 % of the positions, and at all
    python -m tests.benchmarks.language loss   # CLM: the loss in chunks, and that of transformers; each in a process

Batches are of 32 rows of 256 sub-tokens drawn at random, in bfloat16 where the CPU computes it natively.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, GPT2Config

from common.args import ModelArguments, native_bf16
from common.language import Selection, chunked_losses, losses_at_labels
from common.models import load_model, ready_for_training
from common.regularisation import set_dropout

ROWS, LENGTH = 32, 256


def head(rounds: int = 7) -> None:
    model = load_model(AutoModelForMaskedLM, ModelArguments(), None, LENGTH).train()
    set_dropout(model, 0.0)
    selection = Selection(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    seconds: dict[str, list[float]] = {"masked": [], "all": []}
    for _ in range(rounds):
        ids = torch.randint(1000, 30_000, (ROWS, LENGTH))
        masked = torch.where(torch.rand(ROWS, LENGTH) < 0.15, ids, -100)
        for name in seconds:
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, native_bf16(True)):
                if name == "masked":
                    with selection.at(masked):
                        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                else:
                    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            losses_at_labels(logits, masked).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            del logits
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print(
        f"all {medians['all']:.2f} s, masked {medians['masked']:.2f} s: {medians['all'] / medians['masked']:.2f} times"
    )


def loss(kind: str, vocabulary: int) -> None:
    config = GPT2Config(n_embd=128, n_layer=2, n_head=2, n_positions=LENGTH, vocab_size=vocabulary, use_cache=False)
    model = ready_for_training(AutoModelForCausalLM.from_config(config), ModelArguments()).train()
    selection = Selection(model, 1024 if kind == "chunks" else None)
    ids = torch.randint(0, vocabulary, (ROWS, LENGTH))
    shifted = torch.cat([ids[:, 1:], torch.full((ROWS, 1), -100)], 1)
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, native_bf16(True)):
            if kind == "chunks":
                with selection.at(shifted):
                    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
                found = chunked_losses(output.logits, shifted).sum() / (shifted != -100).sum()
            else:
                found = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        found.backward()
        model.zero_grad()
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
    seconds = time.perf_counter() - start
    print(f"{vocabulary:6} sub-tokens, {kind:6}: peak {peak} MiB, {seconds:.2f} s a step", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "head":
        head()
    elif len(sys.argv) == 2:
        for size in ("8000", "50257"):
            for name in ("stock", "chunks"):
                subprocess.run([sys.executable, "-m", "tests.benchmarks.language", "loss", name, size], check=True)
    else:
        loss(sys.argv[2], int(sys.argv[3]))
