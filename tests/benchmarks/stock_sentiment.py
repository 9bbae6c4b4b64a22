"""The yardstick of `tests.benchmarks.against_stock sentiment`: text classification on the stock Trainer as it comes.

As in the library's run_glue.py: float32, random order, padding to 128 sub-tokens, logits of the whole split gathered
and joined, no warm-up, the last weights kept. Model, epochs, batch size and learning rate are given.
"""

import argparse
import json
import time

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from common.args import DEFAULT_ENCODER
from common.models import resolve_model


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--epochs", type=float, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--train_rows", type=int, default=None)
    parser.add_argument("--test_rows", type=int, default=None)
    options = parser.parse_args()
    set_seed(options.seed)

    data = load_dataset("json", data_files={s: f"{options.data}/{s}.jsonl" for s in ("train", "validation", "test")})
    for split, rows in (("train", options.train_rows), ("test", options.test_rows)):
        if rows:
            data[split] = data[split].select(range(min(rows, len(data[split]))))
    labels = sorted({str(label) for split in data.values() for label in split["label"]})
    label2id = {label: i for i, label in enumerate(labels)}
    path = resolve_model(DEFAULT_ENCODER)
    tokenizer = AutoTokenizer.from_pretrained(path)

    def preprocess(rows):
        encoded = tokenizer(rows["text"], padding="max_length", max_length=128, truncation=True)
        encoded["label"] = [label2id[str(label)] for label in rows["label"]]
        return encoded

    encoded = data.map(preprocess, batched=True, remove_columns=data["train"].column_names)

    def compute_metrics(prediction):
        return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}

    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id=label2id
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output_dir,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            learning_rate=options.learning_rate,
            seed=options.seed,
            use_cpu=True,
        ),
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    trained = trainer.train()
    scores = trainer.predict(encoded["test"], metric_key_prefix="test").metrics
    trainer.save_model()
    seconds = {"train_seconds": trained.metrics["train_runtime"], "total_seconds": time.perf_counter() - start}
    with open(f"{options.output_dir}/stock.json", "w", encoding="utf-8") as file:
        json.dump({"score": scores["test_accuracy"]} | seconds, file)


if __name__ == "__main__":
    main()
