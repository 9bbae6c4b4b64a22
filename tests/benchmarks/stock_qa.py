"""The yardstick of `tests.benchmarks.against_stock qa`: question answering on the stock Trainer as it comes.

As in the library's run_qa.py: float32, random order, windows padded to 384 sub-tokens with a stride of 128, logits of
all windows gathered and joined, answers picked by Python loops over the 20 best starts and ends, no answer where that
scores higher, no warm-up, the last weights kept. Model, rows, epochs, batch size and learning rate are given.
"""

import argparse
import json
import time
from collections import defaultdict

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from common.args import DEFAULT_ENCODER
from common.models import resolve_model
from recipes.qa.scoring import scores

LENGTH, STRIDE, N_BEST, LONGEST = 384, 128, 20, 30


def postprocess(examples, features, start_logits, end_logits, some_none: bool) -> list[str]:
    """The best answer of each example, in plain Python over the windows of each, as run_qa.py does it."""
    of_example = defaultdict(list)
    for i, example in enumerate(features["row"]):
        of_example[example].append(i)
    offsets_of, found = features["offset_mapping"], []
    for number, context in enumerate(examples["context"]):
        null, candidates = None, []
        for i in of_example[number]:
            starts, ends, offsets = start_logits[i], end_logits[i], offsets_of[i]
            if null is None or starts[0] + ends[0] < null:
                null = starts[0] + ends[0]
            for start in np.argsort(starts)[-1 : -N_BEST - 1 : -1].tolist():
                for end in np.argsort(ends)[-1 : -N_BEST - 1 : -1].tolist():
                    if start >= len(offsets) or end >= len(offsets) or offsets[start] is None or offsets[end] is None:
                        continue
                    if end < start or end - start + 1 > LONGEST:
                        continue
                    candidates.append((starts[start] + ends[end], offsets[start][0], offsets[end][1]))
        best = max(candidates, default=(-np.inf, 0, 0))
        found.append("" if some_none and null > best[0] else context[best[1] : best[2]])
    return found


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in (("data", str), ("output_dir", str), ("epochs", float), ("batch", int), ("learning_rate", float)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--train_rows", type=int, default=None)
    parser.add_argument("--test_rows", type=int, default=None)
    options = parser.parse_args()
    set_seed(options.seed)

    data = load_dataset("json", data_files={s: f"{options.data}/{s}.jsonl" for s in ("train", "validation", "test")})
    for split, rows in (("train", options.train_rows), ("test", options.test_rows)):
        if rows:
            data[split] = data[split].select(range(min(rows, len(data[split]))))
    path = resolve_model(DEFAULT_ENCODER)
    tokenizer = AutoTokenizer.from_pretrained(path)

    def preprocess(rows, indices):
        encoded = tokenizer(
            [question.lstrip() for question in rows["question"]],
            rows["context"],
            truncation="only_second",
            max_length=LENGTH,
            stride=STRIDE,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding="max_length",
        )
        encoded["row"] = [indices[i] for i in encoded["overflow_to_sample_mapping"]]
        encoded["start_positions"], encoded["end_positions"] = [], []
        for i, row in enumerate(encoded.pop("overflow_to_sample_mapping")):
            parts = encoded.sequence_ids(i)
            offsets = [o if part == 1 else None for o, part in zip(encoded["offset_mapping"][i], parts, strict=True)]
            encoded["offset_mapping"][i] = offsets
            inside = [k for k, o in enumerate(offsets) if o is not None]
            answers, position = rows["answers"][row], (0, 0)
            if answers["text"]:
                first = answers["answer_start"][0]
                last = first + len(answers["text"][0])
                if offsets[inside[0]][0] <= first and offsets[inside[-1]][1] >= last:
                    begins = max(k for k in inside if offsets[k][0] <= first)
                    ends = min(k for k in inside if offsets[k][1] >= last)
                    position = (begins, ends)
            encoded["start_positions"].append(position[0])
            encoded["end_positions"].append(position[1])
        return encoded

    features = data.map(preprocess, batched=True, with_indices=True, remove_columns=data["train"].column_names)
    trainer = Trainer(
        model=AutoModelForQuestionAnswering.from_pretrained(path),
        args=TrainingArguments(
            output_dir=options.output_dir,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            learning_rate=options.learning_rate,
            seed=options.seed,
            use_cpu=True,
        ),
        train_dataset=features["train"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trained = trainer.train()
    predictions = trainer.predict(features["test"].remove_columns(["offset_mapping", "row"])).predictions
    gold = [answers["text"] for answers in data["test"]["answers"]]
    some_none = not all(answers["text"] for answers in data["train"]["answers"])
    found = postprocess(data["test"], features["test"][:], *predictions, some_none)
    trainer.save_model()
    seconds = {"train_seconds": trained.metrics["train_runtime"], "total_seconds": time.perf_counter() - start}
    with open(f"{options.output_dir}/stock.json", "w", encoding="utf-8") as file:
        json.dump({"score": scores(data["test"]["question"][:], gold, found)["f1"]} | seconds, file)


if __name__ == "__main__":
    main()
