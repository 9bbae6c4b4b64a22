"""Summarization: train an encoder to select the sentences of a summary.

    make summarization
    make summarization ARGS="--train_file train.jsonl --validation_file dev.jsonl --output_dir outputs/mine"
    make summarization ARGS="--train_file train.jsonl --summary_sentences 2 --output_dir outputs/two"
    python -m recipes.summarization.train --config my.yaml

For generated summaries, run make summarization-abstractive (train_abstractive.py).

The sample, all-MiniLM-L6-v2, 2 cores (AMD EPYC, bf16), 0.9 minutes: test ROUGE-1 41.6, ROUGE-Lsum 33.4; baseline (the
first two sentences) 33.9 and 25.4 (2026-11-28). More in README.md.
"""

from dataclasses import dataclass, field
from functools import partial

from datasets import Dataset
from peft import TaskType
from transformers import AutoModelForTokenClassification, EvalPrediction, set_seed

from common.args import ModelArguments, TrainingArguments, check_best_metric
from common.cli import command_line, parse
from common.errors import InputError
from common.models import load_model
from common.run import Run, draw_history, keep_trained_model, other_predictions
from common.training import Trainer
from common.tuning import TuningArguments, tune

from . import extractive, scoring
from .arguments import SummarizationDataArguments

USAGE = """from recipes.summarization.predict import load

summarize = load("{folder}")
summarize(["A document of any length."])"""


@dataclass
class ExtractiveDataArguments(SummarizationDataArguments):
    max_source_length: int = field(default=512, metadata={"help": "maximum tokens in a window", "resume": "fixed"})
    summary_sentences: int | None = field(
        default=None, metadata={"help": "sentences of a summary; default: best number on validation, 1 to 5"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_source_length < 16:
            raise InputError("--max_source_length must be at least 16")
        if self.summary_sentences is not None and self.summary_sentences < 1:
            raise InputError("--summary_sentences must be at least 1")


@dataclass
class ExtractiveTrainingArguments(TrainingArguments):
    learning_rate: float | None = field(
        default=None, metadata={"help": "default: 2e-4 for full fine-tuning, 4e-3 for LoRA, ..."}
    )
    num_train_epochs: float = field(default=6, metadata={"help": "passes over the training rows"})
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "windows in a batch on each device", "resume": "splits_step"}
    )
    warmup_steps: float = field(default=0.1, metadata={"help": "warm-up steps; below 1: share of all steps"})
    metric_for_best_model: str | None = field(default="rouge_mean", metadata={"help": "selects the best checkpoint"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r_drop or self.keep == "lwf":
            asked = "--r_drop" if self.r_drop else "--keep lwf"
            raise InputError(f"{asked}: does not work with sentence scores; leave it out")


ARGUMENTS = (ModelArguments, ExtractiveDataArguments, TuningArguments, ExtractiveTrainingArguments)


@keep_trained_model
def main(argv: list[str] | None = None) -> dict[str, float]:
    # Arguments
    model_args, data_args, tuning_args, args = parse(ARGUMENTS, argv, __doc__)
    check_best_metric(args, scoring.SCORES)
    if args.learning_rate is None:
        args.learning_rate = tuning_args.rate(full=2e-4)
    set_seed(args.seed)

    # Data
    data, unlabeled = data_args.load()
    rouge = scoring.Rouge(data_args.rouge_words, data["train"]["summary"][:])
    compared = other_predictions(data_args.compare_to, data, "summary")
    run = Run(args, data_args, model_args, tuning_args, rows=data)

    # Model
    length = data_args.max_source_length
    options = {"argument": "max_source_length", "quantize": tuning_args.quantize, "dropout": args.dropout}
    loaded = load_model(AutoModelForTokenClassification, model_args, [extractive.LABEL], length, **options)
    settings = {"method": "extractive", "sentences": data_args.summary_sentences or 3}  # 3 until training has ended
    loaded.model.config.update({"summarization": settings, "max_source_length": length})  # for predict
    parts = extractive.marked(data, rouge)
    how = {"tokenizer": loaded.tokenizer, "max_length": length}
    columns = parts["train"].column_names
    encode = extractive.encode_windows
    windows = parts.map(encode, batched=True, with_indices=True, remove_columns=columns, fn_kwargs=how)
    tuned = tune(loaded, tuning_args, TaskType.TOKEN_CLS)

    # Trainer
    pickers = {name: extractive.Picker(data[name]["document"][:], windows[name]) for name in windows}
    references = data["validation"]["references"][:]

    def sentences_of(prediction: EvalPrediction) -> int:
        summaries = partial(pickers["validation"].summaries, prediction.predictions)
        return data_args.summary_sentences or scoring.best_count(rouge, summaries, references)

    def score(prediction: EvalPrediction, windows: Dataset) -> dict[str, float]:
        count = sentences_of(prediction)
        predicted = pickers["validation"].summaries(prediction.predictions, count)
        return scoring.by_domain(data["validation"], rouge(predicted, references), args) | {"sentences": count}

    trainer = Trainer(
        model=tuned,
        args=args,
        train_dataset=windows["train"],
        eval_dataset=windows["validation"],
        data_collator=extractive.WindowCollator(loaded.tokenizer, loaded.pad_multiple),
        losses=extractive.sentence_losses,
        preprocess_logits_for_metrics=extractive.sentence_logits,
        compute_metrics=score,
    )

    # Train
    run.train(trainer)

    # Test
    metrics: dict[str, float] = {}
    trainer.compute_metrics = None  # scored below, with the number of sentences chosen on validation
    first = scoring.best_count(rouge, partial(scoring.lead, data["validation"]["document"][:]), references)
    for split, name in (("eval", "validation"), ("test", "test")):
        if name not in windows:
            continue
        with run.phase(split):
            output = trainer.predict(windows[name], metric_key_prefix=split)
        if name == "validation":
            count = sentences_of(output)
        predicted = pickers[name].summaries(output.predictions, count)
        more = [{"sentences": numbers} for numbers in pickers[name].sentences(output.predictions, count)]
        other = compared if name == "test" else None
        values = scoring.score_split(rouge, data[name], predicted, (first, count), other, args)
        metrics |= run.save_scores(trainer, split, output.metrics, values | {"sentences": count})
        scoring.write_split(args.output_dir, name, rouge, data[name], predicted, more)
    draw_history(args.folder / "curve.png", trainer.state.log_history, "rouge_mean")
    scored = "test" if "test" in windows else "eval"
    scoring.print_scores(metrics, scored, rouge.signature)

    # Save
    settings["sentences"] = count
    run.publish(
        trainer,
        task="summarization",
        scores=scoring.HEADLINE,
        split=scored,
        metrics=metrics,
        usage=USAGE.format(folder=args.output_dir),
        signatures={"rouge": rouge.signature},
    )
    run.predict_unlabeled(unlabeled)
    return metrics


if __name__ == "__main__":
    command_line(main)
