"""Train the stock arm of `tests.benchmarks.bench mlm` and `clm`, like the library's run_mlm.py and run_clm.py.

See `tests.benchmarks.stock`. A model with a mask token learns masked tokens, any other model the next token. Texts are
joined and cut into blocks; the head scores the vocabulary at every position. The score is the perplexity on the
recipe's validation rows and masks, computed after the job.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain

import torch
from datasets import DatasetDict
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    default_data_collator,
)

from common.data.blocks import to_blocks
from common.data.corpus import CorpusArguments, load_texts
from common.hardware import native_bf16
from common.speed.head import losses_at_labels
from recipes.clm.texts import NextTokenCollator, to_rows
from recipes.mlm.masking import MaskedBatches, Masker, mask_once, word_marks
from tests.benchmarks.stock import arguments, keep, load, options_of


def batches_of_the_recipe(
    texts: str, tokenizer: PreTrainedTokenizerFast, length: int, most: int | None = None
) -> list[dict[str, Tensor]]:
    """Return batches of 16 rows from the first `most` validation texts, encoded as in the recipe's evaluation."""
    corpus = CorpusArguments(train_file=texts, max_seq_length=length)
    found = load_texts(texts, corpus)
    found = DatasetDict(validation=found.select(range(min(most or len(found), len(found)))))
    if tokenizer.mask_token is None:
        rows, collate = (
            to_rows(found, tokenizer, corpus, "all")["validation"],
            NextTokenCollator(tokenizer.pad_token_id),
        )
    else:
        masker = Masker(tokenizer, "token", 0.15)
        rows = to_blocks(found, tokenizer, corpus, word_marks)["validation"]
        rows = rows.map(mask_once, batched=True, fn_kwargs={"masker": masker})
        collate = MaskedBatches(masker, tokenizer.pad_token_id, 0)
    return [collate(list(rows.select(range(i, min(i + 16, len(rows)))))) for i in range(0, len(rows), 16)]


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> float:
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        batch = {name: values.to(model.device) for name, values in batch.items()}
        with torch.autocast(model.device.type, torch.bfloat16, native_bf16(model.device.type == "cpu")):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total += losses_at_labels(logits, batch["labels"]).sum(dtype=torch.float64).item()
        count += int((batch["labels"] != -100).sum())
    model.train()
    return math.exp(total / count)


def joined(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> list[list[int]]:
    """Join the texts and cut them into blocks of `length` tokens; drop the remainder."""
    ids = list(chain.from_iterable(tokenizer(texts)["input_ids"]))
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def main(argv: list[str] | None = None) -> Callable[[], None]:
    options = options_of(argv, __doc__)
    data = load(options)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    masked = tokenizer.mask_token is not None

    def group_texts(rows):
        blocks = joined(tokenizer, rows["text"], options.length)
        columns = {"input_ids": blocks, "attention_mask": [[1] * options.length] * len(blocks)}
        return columns if masked else columns | {"labels": blocks}

    blocks = data.map(group_texts, batched=True, remove_columns=data["train"].column_names)
    trainer = Trainer(
        model=(AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_pretrained(options.model),
        args=arguments(options),
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer) if masked else default_data_collator,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=accuracy,
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return partial(score, options, trainer.model, tokenizer)


def accuracy(prediction) -> dict[str, float]:
    at = prediction.label_ids != -100
    return {"accuracy": float((prediction.predictions[at] == prediction.label_ids[at]).mean())}


def score(options: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    batches = batches_of_the_recipe(f"{options.data}/validation.jsonl", tokenizer, options.length)
    keep(options, perplexity(model, batches))


if __name__ == "__main__":
    main()()
