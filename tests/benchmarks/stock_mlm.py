"""What the stock Trainer makes of an MLM run: the texts joined and cut into blocks, its own collator, head and loss.

    python -m tests.benchmarks.stock_mlm --data wikitext2 --max_steps 100 --out outputs/stock
    python -m recipes.mlm.train --model_name_or_path outputs/stock --train_file wikitext2/train.txt \
        --validation_file wikitext2/validation.txt --max_steps 1 --learning_rate 0

The first trains as the example script of transformers does, with the batch, learning rate, schedule, warm-up and blocks
of the recipe, in bfloat16, and prints seconds and sub-tokens a second. The second evaluates it as the recipe does: its
figures before training are those of the stock run.
"""

import argparse
import time
from itertools import chain
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from common.args import DEFAULT_ENCODER, native_bf16
from common.models import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train.txt, a text a line")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    set_seed(42)
    folder = resolve_model(DEFAULT_ENCODER)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [line for line in Path(args.data, "train.txt").read_text(encoding="utf-8").split("\n") if line.strip()]
    ids = list(chain.from_iterable(tokenizer(texts, return_special_tokens_mask=False)["input_ids"]))
    blocks = Dataset.from_dict({"input_ids": [ids[i : i + 256] for i in range(0, len(ids) - 255, 256)]})
    trainer = Trainer(
        model=AutoModelForMaskedLM.from_pretrained(folder),
        args=TrainingArguments(
            args.out, max_steps=args.max_steps, learning_rate=args.learning_rate, warmup_steps=0.06, weight_decay=0.01,
            per_device_train_batch_size=32, save_strategy="no", use_cpu=True, bf16=native_bf16(True), logging_steps=20,
            disable_tqdm=True, remove_unused_columns=False,
        ),
        train_dataset=blocks,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    print(
        f"{args.max_steps} steps of 8192 sub-tokens in {seconds:.1f} s: {args.max_steps * 8192 / seconds:.0f} a second"
    )
    trainer.save_model()
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
