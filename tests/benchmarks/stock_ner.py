"""Train the stock arm of `tests.benchmarks.bench ner`: token classification as in the library's tutorial.

See `tests.benchmarks.stock`. Rows are padded to the longest of the batch. The logits of the whole split are
concatenated.
"""

import numpy as np
from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification, Trainer

from recipes.ner.scoring import StrictSeqeval
from tests.benchmarks.stock import arguments, keep, load, options_of


def main(argv: list[str] | None = None) -> None:
    options = options_of(argv, __doc__)
    data = load(options)
    labels = sorted({tag for split in data.values() for tags in split["ner_tags"] for tag in tags})
    label2id = {label: i for i, label in enumerate(labels)}
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def tokenize_and_align_labels(rows):
        encoded = tokenizer(rows["tokens"], truncation=True, is_split_into_words=True)
        encoded["labels"] = []
        for i, tags in enumerate(rows["ner_tags"]):
            words = encoded.word_ids(i)
            encoded["labels"].append(
                [
                    -100 if word is None or (p and word == words[p - 1]) else label2id[tags[word]]
                    for p, word in enumerate(words)
                ]
            )
        return encoded

    encoded = data.map(tokenize_and_align_labels, batched=True, remove_columns=data["train"].column_names)
    metric = StrictSeqeval(keep_in_memory=True)

    def compute_metrics(prediction):
        logits, gold = prediction
        best = np.argmax(logits, axis=2)
        kept = [row != -100 for row in gold]
        return metric.compute(
            predictions=[[labels[i] for i in row[k]] for row, k in zip(best, kept, strict=True)],
            references=[[labels[i] for i in row[k]] for row, k in zip(gold, kept, strict=True)],
        )

    trainer = Trainer(
        model=AutoModelForTokenClassification.from_pretrained(
            options.model, num_labels=len(labels), id2label=dict(enumerate(labels)), label2id=label2id
        ),
        args=arguments(options),
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    trainer.evaluate()
    scores = trainer.predict(encoded["test"]).metrics
    trainer.save_model()
    keep(options, scores["test_f1"])


if __name__ == "__main__":
    main()
