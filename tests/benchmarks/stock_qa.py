"""Train the stock arm of `tests.benchmarks.bench qa`: question answering as in the library's run_qa.py.

See `tests.benchmarks.stock`. Windows are padded to 384 tokens with a stride of 128. The logits of all windows are
concatenated. Python loops select answers from the 20 best starts and ends, and no answer if that scores higher.
"""

from collections import defaultdict

import numpy as np
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, Trainer, default_data_collator
from transformers.trainer_utils import PredictionOutput

from recipes.qa.scoring import scores
from tests.benchmarks.stock import arguments, keep, load, options_of

LENGTH, STRIDE, N_BEST, LONGEST = 384, 128, 20, 30


def postprocess(examples, features, start_logits, end_logits, some_none: bool) -> list[str]:
    """Return the best answer of each example, with the Python loops over windows of run_qa.py."""
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


class AnsweringTrainer(Trainer):
    """Evaluate answers like the trainer of run_qa.py. `some_none`: whether rows may have no answer."""

    some_none = False

    def predict(self, features, examples, metric_key_prefix="test"):
        output = super().predict(features.remove_columns(["offset_mapping", "row"]))
        found = postprocess(examples, features[:], *output.predictions, self.some_none)
        gold = [answers["text"] for answers in examples["answers"]]
        metrics = scores(examples["question"][:], gold, found)
        return PredictionOutput(found, None, {f"{metric_key_prefix}_{k}": v for k, v in metrics.items()})

    def evaluate(self, features, examples):
        return self.predict(features, examples, metric_key_prefix="eval").metrics


def main(argv: list[str] | None = None) -> None:
    options = options_of(argv, __doc__)
    data = load(options)
    tokenizer = AutoTokenizer.from_pretrained(options.model)

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
    trainer = AnsweringTrainer(
        model=AutoModelForQuestionAnswering.from_pretrained(options.model),
        args=arguments(options),
        train_dataset=features["train"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.some_none = not all(answers["text"] for answers in data["train"]["answers"])
    trainer.train()
    trainer.evaluate(features["validation"], data["validation"])
    found = trainer.predict(features["test"], data["test"]).metrics
    trainer.save_model()
    keep(options, found["test_f1"])


if __name__ == "__main__":
    main()
