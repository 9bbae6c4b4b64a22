"""Relation extraction: fine-tune a classifier of the relation between two marked mentions of a text.

    make relation
    make relation ARGS="--train_file my.jsonl --validation_file dev.jsonl --test_file test.jsonl"
    make relation ARGS="--train_file TRAIN_FILE.TXT --test_file TEST_FILE_FULL.TXT --no_relation_label Other"
    python -m recipes.relation.train --config my.yaml

The sample, all-MiniLM-L6-v2, one core (AMD EPYC, bf16), 1.6 minutes: test micro F1 0.705, types 0.508, probe 0.375
(2026-11-30). More in README.md.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from peft import TaskType
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerFast,
    set_seed,
)

from common.args import ModelArguments, TrainingArguments, check_best_metric
from common.cli import command_line, parse
from common.data import domains
from common.models import load_model
from common.run import Run, draw_history, keep_trained_model
from common.training import Trainer, label_losses
from common.tuning import TuningArguments, tune

from . import markers, scoring
from .arguments import RelationDataArguments
from .probe import probe
from .reading import load_pairs, related_types

USAGE = """from recipes.relation.predict import Classifier

classify = Classifier("{folder}")
classify([{{"text": "Ada Bell founded Kite.", "head": [0, 8, "PER"], "tail": [17, 21, "ORG"]}}])"""
HEADLINE = ("micro_f1", "macro_f1", "semeval_macro_f1", "accuracy")


@dataclass
class RelationTrainingArguments(TrainingArguments):
    learning_rate: float | None = field(
        default=None, metadata={"help": "default: 2e-4 for full fine-tuning, 4e-3 for LoRA, ..."}
    )
    usual_epochs, least_steps = 8, 100
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "passes over the rows; default: 8, for few rows 100 steps"}
    )
    warmup_steps: float = field(default=0.1, metadata={"help": "warm-up steps; below 1: share of all steps"})
    metric_for_best_model: str | None = field(
        default="micro_f1", metadata={"help": "score that selects the best checkpoint"}
    )
    remove_unused_columns: bool = field(default=False)  # the collator takes them


ARGUMENTS = (ModelArguments, RelationDataArguments, TuningArguments, RelationTrainingArguments)


def encode(
    rows: dict[str, list],
    tokenizer: PreTrainedTokenizerFast,
    marks: markers.Markers,
    relations: list[str],
    max_seq_length: int,
) -> dict[str, list]:
    """Encode pairs as `markers.encode_pairs`, with `labels`: the number of the relation."""
    columns = markers.encode_pairs(rows, tokenizer, marks, max_seq_length)
    return domains.carry(columns | {"labels": [relations.index(label) for label in rows["label"]]}, rows)


@keep_trained_model
def main(argv: list[str] | None = None) -> dict[str, float]:
    # Arguments
    model_args, data_args, tuning_args, args = parse(ARGUMENTS, argv, __doc__)
    if args.learning_rate is None:
        args.learning_rate = tuning_args.rate(full=2e-4)
    set_seed(args.seed)

    # Data
    data, unlabeled, relations, no_relation = load_pairs(data_args)
    run = Run(args, data_args, model_args, tuning_args, rows=data)

    # Model
    length, options = data_args.max_seq_length, {"quantize": tuning_args.quantize, "dropout": args.dropout}
    at_markers = data_args.pooling == "markers"
    if at_markers:
        names = markers.output_names(relations)
        loaded = load_model(AutoModelForTokenClassification, model_args, names, length, **options)
        relations = markers.relations_of(list(loaded.model.config.id2label.values()))
    else:
        loaded = load_model(AutoModelForSequenceClassification, model_args, relations, length, **options)
        relations = list(loaded.model.config.id2label.values())
    baselines = {}
    if "test" in data:
        baselines["probe"] = probe(data, relations, loaded.model, loaded.tokenizer, length, args.device)
        baselines["type_pair"] = scoring.most_frequent(data["train"], data["test"])
    marks = markers.Markers(markers.types_of(data["train"]) if data_args.typed_markers else [])
    marks.add(loaded)
    settings = {"pooling": data_args.pooling, "relations": relations, "no_relation": no_relation}
    settings |= {"types": marks.types, "pairs": related_types(data["train"], no_relation)}
    settings["max_distance"] = data_args.max_distance
    loaded.model.config.update({"relation": settings, "max_seq_length": length})  # predict reads pairs in the same way
    how = {"tokenizer": loaded.tokenizer, "marks": marks, "relations": relations, "max_seq_length": length}
    rows = data.map(encode, batched=True, remove_columns=data["train"].column_names, fn_kwargs=how)
    markers.report_cut([split["cut"][:] for split in rows.values()], length)
    if at_markers:
        markers.score_at_markers(loaded.model)
    tuned = tune(loaded, tuning_args, TaskType.TOKEN_CLS if at_markers else TaskType.SEQ_CLS)

    # Trainer
    scorer = scoring.Scorer(relations, no_relation)
    check_best_metric(args, scorer.names(rows["validation"]["labels"][:]))

    def score(prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        return domains.by_domain(rows, lambda select: scorer(select(prediction)), args)

    trainer = Trainer(
        model=tuned,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=markers.PairCollator(loaded.tokenizer, at_markers, loaded.pad_multiple),
        losses=label_losses,
        preprocess_logits_for_metrics=lambda logits, labels: logits.float(),
        compute_metrics=score,
    )

    # Train
    run.train(trainer)
    with run.phase("eval"):
        output = trainer.predict(rows["validation"], metric_key_prefix="eval")
    metrics = output.metrics
    trainer.save_metrics("eval", metrics)

    # Test
    scored = "test" if "test" in rows else "eval"
    if scored == "test":
        with run.phase("test"):
            output = trainer.predict(rows["test"], metric_key_prefix="test")
        gold, more = data["test"]["label"][:], {}
        for name, predicted in baselines.items():
            more |= scorer.baseline(name, predicted, gold)
        metrics |= run.save_scores(trainer, "test", output.metrics, more)
        scorer.write(args.output_dir, data["test"], output)
    scorer.draw(args.output_dir, output)
    draw_history(Path(args.output_dir, "curve.png"), trainer.state.log_history, "micro_f1")
    scoring.print_scores(metrics, scored, relations, no_relation)

    # Save
    run.publish(
        trainer,
        task="token-classification" if at_markers else "text-classification",
        scores=HEADLINE,
        split=scored,
        metrics=metrics,
        usage=USAGE.format(folder=args.output_dir),
    )
    run.predict_unlabeled(unlabeled)
    return metrics


if __name__ == "__main__":
    command_line(main)
