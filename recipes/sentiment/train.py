"""Sentiment, topic, intent: fine-tune a classifier of texts, or of pairs of texts, with one label or several each.

    make sentiment
    make sentiment ARGS="--train_file my.jsonl --validation_file dev.jsonl --test_file test.jsonl"
    make sentiment ARGS="--text_pair_column_name hypothesis --class_weights balanced --num_train_epochs 3"
    python -m recipes.sentiment.train --config my.yaml

The sample, all-MiniLM-L6-v2, 2 cores (AMD EPYC, bf16), 0.5 minutes: test accuracy 0.745, bag of words 0.625
(2026-11-28).
More in README.md.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import TaskType
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerFast,
    set_seed,
)

from common.args import DataArguments, ModelArguments, TrainingArguments, check_best_metric
from common.cli import command_line, parse
from common.data.rows import load_splits
from common.errors import InputError, tell
from common.models.load import load_model
from common.models.structure import set_dropout
from common.run.folder import Run
from common.run.report import write_json_lines, write_model_card
from common.training import Trainer
from common.tuning import TuningArguments, merge, tune

from .pictures import draw
from .scoring import bag_of_words, hardest, predictions, print_scores, probabilities, scores, tune_thresholds
from .texts import class_names, class_weights, cut, label_check, loss_with, one_hot

HERE = Path(__file__).resolve().parent
USAGE = """from transformers import pipeline

classify = pipeline("text-classification", model="{folder}")
classify("Not a minute too long, and not a note out of place.")"""
HEADLINE = ("accuracy", "macro_f1", "micro_f1", "mcc", "roc_auc", "calibration_error")
SPEED = ("test_runtime", "test_samples_per_second", "test_steps_per_second", "test_loss")


@dataclass
class SentimentDataArguments(DataArguments):
    text_column_name: str = field(default="text", metadata={"help": "column with the text"})
    text_pair_column_name: str | None = field(default=None, metadata={"help": "column with a second text"})
    label_column_name: str = field(
        default="label", metadata={"help": "column with the label: text, integer, or a list of labels"}
    )
    max_seq_length: int = field(default=128, metadata={"help": "sub-tokens of a text that are read"})
    keep: str = field(default="head", metadata={"help": "which part of a longer text: head, tail, head+tail"})

    def __post_init__(self) -> None:
        if not (self.train_file or self.dataset_name):
            if self.validation_file or self.test_file:
                raise InputError("--validation_file and --test_file need --train_file beside them")
            for split in ("train", "validation", "test"):
                setattr(self, f"{split}_file", str(HERE / "sample" / f"{split}.jsonl"))
        super().__post_init__()
        if self.keep not in ("head", "tail", "head+tail"):
            raise InputError(f"--keep {self.keep}: must be head, tail or head+tail")


@dataclass
class SentimentTrainingArguments(TrainingArguments):
    output_dir: str | None = field(default=f"outputs/{HERE.name}", metadata={"help": "where model and results go"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "1e-4 in full, 1e-3 under LoRA, ... when not given"}
    )
    num_train_epochs: float = field(default=5, metadata={"help": "passes over the training rows"})
    metric_for_best_model: str | None = field(
        default="macro_f1", metadata={"help": "score that picks the best checkpoint"}
    )
    class_weights: list[str] | None = field(
        default=None, metadata={"help": "balanced, or a weight for each class in the order of the labels"}
    )


ARGUMENTS = (ModelArguments, SentimentDataArguments, TuningArguments, SentimentTrainingArguments)


def encode(
    rows: dict[str, list],
    tokenizer: PreTrainedTokenizerFast,
    label2id: dict[str, int],
    several: bool,
    max_seq_length: int,
    keep: str,
) -> dict[str, list]:
    """Sub-tokens of each text or pair, cut to `max_seq_length`, and `labels`: a class number, or a 0 or 1 a class."""
    columns = cut(tokenizer, rows["text"], rows.get("text_pair"), max_seq_length, keep)
    if several:
        columns["labels"] = [one_hot(labels, label2id) for labels in rows["label"]]
    else:
        columns["labels"] = [label2id[label] for label in rows["label"]]
    return columns


def main(argv: list[str] | None = None) -> dict[str, float]:
    # Arguments
    model_args, data_args, tuning_args, args = parse(ARGUMENTS, argv, __doc__)
    if args.learning_rate is None:
        args.learning_rate = tuning_args.rate(full=1e-4)
    set_seed(args.seed)

    # Data
    columns = {"text": data_args.text_column_name, "label": data_args.label_column_name}
    if data_args.text_pair_column_name:
        columns["text_pair"] = data_args.text_pair_column_name
    check = label_check()
    data = load_splits(data_args, columns, check, txt="none")
    several, labels = class_names(data)
    run = Run(args, data_args, model_args, tuning_args, rows=data)

    # Model
    length = data_args.max_seq_length
    loaded = load_model(AutoModelForSequenceClassification, model_args, labels, length, quantize=tuning_args.quantize)
    model, tokenizer = loaded.model, loaded.tokenizer
    labels = list(model.config.id2label.values())
    model.config.problem_type = "multi_label_classification" if several else "single_label_classification"
    reading = {"max_seq_length": data_args.max_seq_length, "keep": data_args.keep}
    model.config.update(reading)  # saved with the model, so that predict reads the same part of a text
    rows = data.map(
        encode,
        batched=True,
        remove_columns=data["train"].column_names,
        fn_kwargs={"tokenizer": tokenizer, "label2id": model.config.label2id, "several": several, **reading},
    )
    tell(f"longer than --max_seq_length, so only their {data_args.keep} is read: {np.mean(rows['train']['cut']):.1%}")
    set_dropout(model, args.dropout, model_args.attention_dropout)
    weights = class_weights(args.class_weights, rows["train"]["labels"][:], labels, several)
    tuned = tune(loaded, tuning_args, TaskType.SEQ_CLS)

    # Trainer
    def score(prediction: EvalPrediction, _: Dataset) -> dict[str, float]:
        found, gold = probabilities(prediction.predictions, several), np.array(prediction.label_ids)
        return scores(found, gold, labels, tune_thresholds(found, gold) if several else None)

    gold = np.array(rows["validation"]["labels"][:])
    chance = np.full((len(gold), len(labels)), 1 / len(labels))
    check_best_metric(args, scores(chance, gold, labels, [0.5] * len(labels) if several else None))
    trainer = Trainer(
        model=tuned,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        preprocess_logits_for_metrics=lambda logits, labels: logits.float(),
        compute_metrics=score,
        losses=loss_with(weights, several),
    )

    # Train
    run.start()
    with run.phase("train"):
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    with run.phase("eval"):
        output = trainer.predict(rows["validation"], metric_key_prefix="eval")
    metrics, scored = output.metrics, "eval"
    trainer.save_metrics("eval", metrics)
    found, gold = probabilities(output.predictions, several), np.array(output.label_ids)
    thresholds = None
    if several:  # tuned on the validation rows, and used on the test rows and by predict
        thresholds = tune_thresholds(found, gold)
        model.config.thresholds = thresholds

    # Test
    if "test" in rows:
        scored = "test"
        with run.phase("test"):
            output = trainer.predict(rows["test"], metric_key_prefix="test")
        found, gold = probabilities(output.predictions, several), np.array(output.label_ids)
        own = scores(found, gold, labels, thresholds) | bag_of_words(data["train"][:], data["test"][:], labels, several)
        speed = {k: v for k, v in output.metrics.items() if k in SPEED}
        test_metrics = {f"test_{name}": value for name, value in own.items()} | speed
        trainer.save_metrics("test", test_metrics)
        metrics |= test_metrics
        shown = data["test"].select_columns(["id", *columns])
        predicted = list(predictions(shown.to_list(), found, labels, thresholds))
        write_json_lines(Path(args.output_dir, "predictions_test.jsonl"), predicted)
        write_json_lines(Path(args.output_dir, "hardest_test.jsonl"), hardest(predicted, found, gold, several))
    draw(
        args.output_dir,
        found,
        gold,
        labels,
        thresholds,
        trainer.state.log_history,
        args.metric_for_best_model or "loss",
    )
    print_scores(metrics, scored, labels)

    # Save
    trainer.model = merge(tuned, args.output_dir, save=args.should_save)
    headline = {name: metrics[f"{scored}_{name}"] for name in HEADLINE if f"{scored}_{name}" in metrics}
    write_model_card(
        args.output_dir,
        task="text-classification",
        base_model=model_args.model_name_or_path,
        scores=headline,
        split=scored,
        record=run.record,
        usage=USAGE.format(folder=args.output_dir),
    )
    trainer.save_model(_internal_call=True)  # which leaves the push for when all is there
    run.finish(scores=metrics)
    if args.push_to_hub:
        trainer.push_to_hub()
    return metrics


if __name__ == "__main__":
    command_line(main)
