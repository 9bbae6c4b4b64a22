"""Sentiment, topic, intent: fine-tune a classifier of texts or text pairs, with one or several labels per row.

    make sentiment
    make sentiment ARGS="--train_file my.jsonl --validation_file dev.jsonl --test_file test.jsonl"
    make sentiment ARGS="--train_file nli.jsonl --text_column_name premise --text_pair_column_name hypothesis"
    python -m recipes.sentiment.train --config my.yaml

The sample, all-MiniLM-L6-v2, 2 cores (AMD EPYC, bf16), 1.1 minutes: test accuracy 0.708, linear
probe 0.667, bag of words 0.625 (2026-11-30). More in README.md.
"""

from dataclasses import dataclass, field

from datasets import Dataset
from peft import TaskType
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerFast,
    set_seed,
)

from common.args import ClassifierArguments, TrainingArguments, check_best_metric
from common.cli import command_line, parse
from common.models import load_model
from common.models.pooling import pool
from common.run import keep_trained_model, open_run
from common.training.probe import start_at_probe
from common.tuning import TuningArguments, tune

from . import few_shot, scoring, texts, windows
from .arguments import FewShotArguments, SentimentDataArguments
from .augmenting import augmented
from .labels import load_labeled
from .pictures import draw

USAGE = """from transformers import pipeline

classify = pipeline("text-classification", model="{folder}")
classify("Not a minute too long, and not a note out of place.")"""
HEADLINE = ("accuracy", "macro_f1", "micro_f1", "mcc", "roc_auc", "calibration_error")


@dataclass
class SentimentTrainingArguments(TrainingArguments):
    lower_is_better = ("calibration_error",)
    usual_epochs = 5

    learning_rate: float | None = field(
        default=None, metadata={"help": "default: 1e-4 for full fine-tuning, 2e-3 for LoRA, ..."}
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "passes over the training rows; default: 5, with --few_shot 0"}
    )
    metric_for_best_model: str | None = field(
        default="macro_f1", metadata={"help": "score that selects the best checkpoint"}
    )
    class_weights: list[str] | None = field(
        default=None, metadata={"help": "balanced, or one weight per class in the order of the labels"}
    )


ARGUMENTS = (
    ClassifierArguments, SentimentDataArguments, FewShotArguments, TuningArguments, SentimentTrainingArguments,
)  # fmt: skip


def encode(
    rows: dict[str, list],
    tokenizer: PreTrainedTokenizerFast,
    label2id: dict[str, int],
    multi_label: bool,
    reading: dict[str, int | str | None],
) -> dict[str, list]:
    """Encode texts or pairs as `windows.read`, with `labels`: a class number, or a 0 or 1 for each class."""
    columns = windows.read(tokenizer, rows["text"], rows.get("text_pair"), **reading)
    labels = [rows["label"][i] for i in windows.text_numbers(columns["first_window"])]
    columns["labels"] = [texts.one_hot(label, label2id) if multi_label else label2id[label] for label in labels]
    return windows.with_domain(columns, rows)


@keep_trained_model
def main(argv: list[str] | None = None) -> dict[str, float]:
    # Arguments
    model_args, data_args, few_args, tuning_args, args = parse(ARGUMENTS, argv, __doc__)
    args.num_train_epochs = few_args.epochs(args.num_train_epochs, data_args, args.usual_epochs)
    if args.learning_rate is None:
        args.learning_rate = tuning_args.rate(full=1e-4)
    set_seed(args.seed)

    # Data
    data, unlabeled, multi_label, labels = load_labeled(data_args)
    data["train"] = few_shot.draw(data["train"], few_args.shots, args.seed)
    run, teacher = open_run(main, argv, args, data_args, model_args, few_args, tuning_args, rows=data)

    # Model
    length, options = data_args.max_seq_length, {"quantize": tuning_args.quantize, "dropout": args.dropout}
    loaded = load_model(AutoModelForSequenceClassification, model_args, labels, length, **options)
    pool(loaded, model_args)
    config = loaded.model.config
    labels = list(config.id2label.values())
    config.problem_type = "multi_label_classification" if multi_label else "single_label_classification"
    reading = data_args.reading()
    config.update(reading)  # saved with the model: predict reads texts in the same way
    train_encoder = few_shot.prepare(loaded, run, few_args, model_args, data_args, tuning_args, args)
    more = {"tokenizer": loaded.tokenizer, "label2id": config.label2id, "multi_label": multi_label, "reading": reading}
    rows = data.map(encode, batched=True, remove_columns=data["train"].column_names, fn_kwargs=more)
    windows.report_long(rows, **reading)
    weights = texts.class_weights(args.class_weights, rows["train"]["labels"][:], labels, multi_label)
    scorer = scoring.Scorer(labels, multi_label, args)
    check_best_metric(args, scorer.names(rows["validation"]["labels"][:]))
    train_encoder(rows)
    probed = start_at_probe(loaded, rows, model_args, args, weights, multi_label, few_args.strengths)
    tuned = tune(loaded, tuning_args, TaskType.SEQ_CLS)

    # Trainer
    def score(prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        return scorer.by_domain(rows, prediction, scorer.thresholds(prediction))

    trainer = windows.Trainer(
        model=tuned,
        args=args,
        train_dataset=augmented(rows["train"], data["train"], encode, more, data_args, args),
        eval_dataset=rows["validation"],
        data_collator=DataCollatorWithPadding(loaded.tokenizer, pad_to_multiple_of=loaded.pad_multiple),
        losses=texts.loss_with(weights, multi_label),
        preprocess_logits_for_metrics=lambda logits, labels: logits.float(),
        compute_metrics=score,
        unlabeled=teacher and teacher.labels(rows, AutoModelForSequenceClassification),
        multi_label=multi_label,
    )

    # Train
    baselines = scorer.probe(trainer, rows) if probed and not few_args.few_shot else {}
    run.train(trainer)
    with run.phase("eval"):
        output = trainer.predict(rows["validation"], metric_key_prefix="eval")
    metrics = output.metrics
    trainer.save_metrics("eval", metrics)
    thresholds = scorer.thresholds(output)  # test and predict use them
    config.update({"thresholds": thresholds} if multi_label else {})

    # Test
    scored = "test" if "test" in rows else "eval"
    if scored == "test":
        with run.phase("test"):
            output = trainer.predict(rows["test"], metric_key_prefix="test")
        baselines |= scoring.bag_of_words(data["train"][:], data["test"][:], labels, multi_label)
        found = scorer.by_domain(rows["test"], output, thresholds)
        metrics |= run.save_scores(trainer, "test", output.metrics, found | baselines)
        scorer.write(args.output_dir, data["test"], output, thresholds)
    history, selected_by = trainer.state.log_history, args.metric_for_best_model or "loss"
    draw(args.output_dir, *scorer.read(output), labels, thresholds, history, selected_by)
    scoring.print_scores(metrics, scored, labels)
    metrics |= teacher.compare(trainer, metrics, ("accuracy", "macro_f1")) if teacher else {}

    # Save
    usage = USAGE.format(folder=args.output_dir)
    run.publish(trainer, task="text-classification", scores=HEADLINE, split=scored, metrics=metrics, usage=usage)
    run.predict_unlabeled(unlabeled)
    return metrics


if __name__ == "__main__":
    command_line(main)
