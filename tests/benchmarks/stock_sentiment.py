"""Train the stock arm of `tests.benchmarks.bench sentiment`: text classification as in the library's run_glue.py.

See `tests.benchmarks.stock`. Texts are padded to 128 tokens. The logits of the whole split are concatenated.
"""

import numpy as np
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer

from tests.benchmarks.stock import arguments, keep, load, options_of


def main(argv: list[str] | None = None) -> None:
    options = options_of(argv, __doc__)
    data = load(options)
    labels = sorted({str(label) for split in data.values() for label in split["label"]})
    label2id = {label: i for i, label in enumerate(labels)}
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def preprocess(rows):
        encoded = tokenizer(rows["text"], padding="max_length", max_length=128, truncation=True)
        encoded["label"] = [label2id[str(label)] for label in rows["label"]]
        return encoded

    encoded = data.map(preprocess, batched=True, remove_columns=data["train"].column_names)

    def compute_metrics(prediction):
        return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}

    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            options.model, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id=label2id
        ),
        args=arguments(options),
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    trainer.evaluate()
    scores = trainer.predict(encoded["test"]).metrics
    trainer.save_model()
    keep(options, scores["test_accuracy"])


if __name__ == "__main__":
    main()
