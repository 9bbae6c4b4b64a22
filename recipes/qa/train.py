"""Extractive question answering: fine-tune a model to find the answer to a question in a text, or "no answer".

    make qa
    make qa ARGS="--train_file train-v2.0.json --validation_file dev-v2.0.json --output_dir outputs/squad"
    make qa ARGS="--train_file my.jsonl --max_seq_length 256 --doc_stride 64 --lora_r 16 --output_dir outputs/mine"
    python -m recipes.qa.train --config my.yaml

The sample, all-MiniLM-L6-v2, 2 cores (AMD EPYC, bf16), 3.2 minutes: test F1 0.442, exact match 0.375; word overlap F1
0.052 (2026-11-23). More in README.md.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import TaskType
from transformers import AutoModelForQuestionAnswering, EvalPrediction, PreTrainedTokenizerFast, set_seed

from common.args import ModelArguments, TrainingArguments, check_best_metric
from common.cli import command_line, parse
from common.data.domains import carry
from common.models import load_model
from common.run import Run, keep_trained_model, write_json_lines
from common.training import Trainer
from common.tuning import TuningArguments, tune

from . import spans
from .arguments import QaDataArguments
from .augmenting import augmented
from .scoring import SquadScorer, print_scores, unit_of
from .squad import load_questions

USAGE = """from recipes.qa.predict import Reader

reader = Reader("{folder}")
reader(["Who met Charles Babbage?"], ["Ada Lovelace met Charles Babbage in London."])"""
HEADLINE = ("exact_match", "f1", "HasAns_f1", "NoAns_f1")


@dataclass
class QaTrainingArguments(TrainingArguments):
    learning_rate: float | None = field(
        default=None, metadata={"help": "default: 2e-4 for full fine-tuning, 4e-3 for LoRA, ..."}
    )
    usual_epochs, least_steps = 6, 100
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "passes over the rows; default: 6, for few rows 100 steps"}
    )
    warmup_steps: float = field(default=0.1, metadata={"help": "warm-up steps; below 1: share of all steps"})
    metric_for_best_model: str | None = field(default="f1", metadata={"help": "score that selects the best checkpoint"})
    remove_unused_columns: bool = field(default=False)  # the collator needs `begin` and `starts`


ARGUMENTS = (ModelArguments, QaDataArguments, TuningArguments, QaTrainingArguments)


def encode(
    rows: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerFast,
    max_seq_length: int,
    doc_stride: int,
    max_question_length: int,
) -> dict[str, list]:
    """Encode questions with windows of their contexts, with `labels`: first and last token of the first answer.

    See `label_windows` for windows without an answer.
    """
    windows = spans.cut_windows(
        rows["question"], rows["context"], tokenizer, max_seq_length, doc_stride, max_question_length
    )
    return spans.label_windows(carry(windows, rows, windows["row"]), rows["answers"], indices)


@keep_trained_model
def main(argv: list[str] | None = None) -> dict[str, float]:
    # Arguments
    model_args, data_args, tuning_args, args = parse(ARGUMENTS, argv, __doc__)
    if args.learning_rate is None:
        args.learning_rate = tuning_args.rate(full=2e-4)
    set_seed(args.seed)

    # Data
    data, unlabeled = load_questions(data_args)
    run = Run(args, data_args, model_args, tuning_args, rows=data)

    # Model
    length, options = data_args.max_seq_length, {"quantize": tuning_args.quantize, "dropout": args.dropout}
    labels = ["LABEL_0", "LABEL_1"]  # start and end
    loaded = load_model(AutoModelForQuestionAnswering, model_args, labels, length, **options)
    config = loaded.model.config
    cut = {name: getattr(data_args, name) for name in ("max_seq_length", "doc_stride", "max_question_length")}
    config.update(cut | {"max_answer_length": data_args.max_answer_length})  # predict reads them
    how = {"tokenizer": loaded.tokenizer, **cut}
    columns = data["train"].column_names
    windows = data.map(encode, batched=True, with_indices=True, remove_columns=columns, fn_kwargs=how)
    spans.print_limits(windows["train"], len(data["train"]), data_args.max_answer_length)
    spans.answer_in_context(loaded.model)
    tuned = tune(loaded, tuning_args, TaskType.QUESTION_ANS)

    # Trainer
    unit = unit_of(data_args.f1_unit, data["train"]["context"][:])
    scorers = {name: SquadScorer(rows, unit, args) for name, rows in data.items()}

    def spans_of(prediction: EvalPrediction, windows: Dataset) -> spans.Spans:
        return spans.best_spans(np.stack(prediction.predictions), windows, data_args.max_answer_length)

    def score(prediction: EvalPrediction, windows: Dataset) -> dict[str, float]:
        scorer, best = scorers["validation"], spans_of(prediction, windows)
        return scorer(best, scorer.best_threshold(best))

    check_best_metric(args, scorers["validation"].names())
    trainer = Trainer(
        model=tuned,
        args=args,
        train_dataset=augmented(windows["train"], data["train"], encode, how, data_args, args),
        eval_dataset=windows["validation"],
        data_collator=spans.SpanCollator(loaded.tokenizer, loaded.pad_multiple),
        losses=spans.span_losses,
        preprocess_logits_for_metrics=spans.best_positions,
        compute_metrics=score,
    )

    # Train
    run.train(trainer)
    with run.phase("eval"):
        output = trainer.predict(windows["validation"], metric_key_prefix="eval")
    metrics = output.metrics
    trainer.save_metrics("eval", metrics)
    # tuned on the validation rows; test and predict use it
    config.no_answer_threshold = scorers["validation"].best_threshold(spans_of(output, windows["validation"]))

    # Test
    scored = "test" if "test" in windows else "eval"
    if scored == "test":
        trainer.compute_metrics = None  # scored below, with the tuned threshold
        with run.phase("test"):
            output = trainer.predict(windows["test"], metric_key_prefix="test")
        scorer, best = scorers["test"], spans_of(output, windows["test"])
        test_scores = scorer(best, config.no_answer_threshold) | scorer.baseline()
        metrics |= run.save_scores(trainer, "test", output.metrics, test_scores)
        predicted = scorer.predictions(best, config.no_answer_threshold)
        write_json_lines(Path(args.output_dir, "predictions_test.jsonl"), predicted)
    print_scores(metrics, scored)

    # Save
    run.publish(
        trainer,
        task="question-answering",
        scores=HEADLINE,
        split=scored,
        metrics=metrics,
        usage=USAGE.format(folder=args.output_dir),
    )
    run.predict_unlabeled(unlabeled)
    return metrics


if __name__ == "__main__":
    command_line(main)
