"""Train the stock arm of `tests.benchmarks.bench translation` and `summarization`, like the library's scripts.

See `tests.benchmarks.stock`. Evaluation generates in file order, with the generation configuration of the model.
"""

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from common.models.decoding import label_ids
from recipes.summarization.scoring import Rouge, means
from recipes.translation.scoring import bleu_of
from tests.benchmarks.stock import arguments, keep, load, options_of


def sides(rows: dict[str, list]) -> tuple[list[str], list[str]]:
    """Return sources and targets; a translation row has the source language first."""
    if "document" in rows:
        return rows["document"], rows["summary"]
    source, target = rows["translation"][0]
    return [row[source] for row in rows["translation"]], [row[target] for row in rows["translation"]]


def main(argv: list[str] | None = None) -> None:
    options = options_of(argv, __doc__)
    data = load(options)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(options.model)
    most = model.config.max_source_length, model.generation_config.max_new_tokens

    def preprocess(rows):
        sources, targets = sides(rows)
        encoded = tokenizer(sources, max_length=most[0], truncation=True)
        encoded["labels"] = label_ids(tokenizer, targets, model.generation_config.decoder_start_token_id, most[1])
        return encoded

    encoded = data.map(preprocess, batched=True, remove_columns=data["train"].column_names)

    def metrics_of(split: Dataset):
        gold = sides(split[:])[1]

        def compute_metrics(prediction):
            ids = np.where(prediction.predictions == -100, tokenizer.pad_token_id, prediction.predictions)
            found = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
            if "document" in split.column_names:
                return {"score": means(Rouge("english", gold)(found, [[text] for text in gold]))["rouge1"]}
            return {"score": bleu_of("de", "13a").corpus_score(found, [gold]).score}

        return compute_metrics

    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments(options, Seq2SeqTrainingArguments, predict_with_generate=True),
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=metrics_of(data["validation"]),
    )
    trainer.train()
    trainer.evaluate()
    trainer.compute_metrics = metrics_of(data["test"])
    scores = trainer.predict(encoded["test"]).metrics
    trainer.save_model()
    keep(options, scores["test_score"])


if __name__ == "__main__":
    main()
