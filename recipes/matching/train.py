"""Matching: fine-tune an encoder for search, duplicates, answer selection or intent by example.

    make matching
    make matching ARGS="--train_file my.jsonl --validation_file dev.jsonl --test_file test.jsonl"
    make matching ARGS="--train_file my.jsonl --corpus_file passages.jsonl --positive_id_column_name passage_id"
    make matching ARGS="--teacher outputs/matching --tokenizer_train wordpiece --train_file translations.jsonl"
    python -m recipes.matching.train --config my.yaml

The sample, all-MiniLM-L6-v2, one core (AMD EPYC, bf16), 1.3 minutes: test nDCG@10 0.535, before training 0.386, BM25
0.121 (2026-11-30). More in README.md.
"""

from dataclasses import dataclass, field

from datasets import Dataset
from peft import TaskType
from transformers import AutoModel, EvalPrediction, set_seed

from common import models
from common.args import ModelArguments, TrainingArguments, check_best_metric
from common.cli import command_line, given_values, parse
from common.run import Run, draw_history, keep_trained_model, write_json_lines
from common.tuning import TuningArguments, tune

from . import index, losses, pairs, scoring, steps, student, vectors
from .arguments import MatchingDataArguments
from .reading import identities_of, load_pairs

USAGE = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{folder}")
queries, passages = model.encode_query(["Where is it?"]), model.encode_document(["Follow the link.", "We are closed."])
print(model.similarity(queries, passages))"""


@dataclass
class MatchingTrainingArguments(TrainingArguments):
    learning_rate: float | None = field(
        default=None, metadata={"help": "default: 1e-4 for full fine-tuning, 2e-3 for LoRA, ..."}
    )
    num_train_epochs: float = field(default=5, metadata={"help": "passes over the training rows"})
    metric_for_best_model: str | None = field(
        default="ndcg@10",
        metadata={
            "help": "score that selects the best checkpoint; for other rows the default is spearman (scores), "
            "average_precision (labels) or accuracy (--teacher)"
        },
    )
    temperature: float = field(default=0.05, metadata={"help": "divides the similarities in the loss of ranking rows"})
    pooling: vectors.Pooling | None = field(
        default=None, metadata={"help": "mean, cls or max over the tokens; default: as the checkpoint, else mean"}
    )
    query_prefix: str = field(default="", metadata={"help": "text before each query, such as 'query: ' for E5"})
    passage_prefix: str = field(default="", metadata={"help": "text before each passage"})
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "encoder whose vectors the model learns, for sentences and their translations",
            "resume": "fixed",
        },
    )


ARGUMENTS = (ModelArguments, models.ScratchArguments, MatchingDataArguments, TuningArguments, MatchingTrainingArguments)


@keep_trained_model
def main(argv: list[str] | None = None) -> dict[str, float]:
    # Arguments
    model_args, scratch_args, data_args, tuning_args, args = parse(ARGUMENTS, argv, __doc__)
    tuning_args.check_pretrained(new=scratch_args.from_scratch)
    if args.learning_rate is None:
        args.learning_rate = tuning_args.rate(full=1e-4)
    steps.check_arguments(args, scratch_args)
    set_seed(args.seed)

    # Data
    data, unlabeled, corpus = load_pairs(data_args, args.teacher)
    kind, ranking = data_args.rows, data_args.rows == "ranking"
    if "metric_for_best_model" not in given_values(ARGUMENTS, argv):
        args.metric_for_best_model = scoring.MAIN[kind]
    run = Run(args, data_args, model_args, scratch_args, tuning_args, rows=data)

    # Model
    length, options = data_args.max_seq_length, {"quantize": tuning_args.quantize, "dropout": args.dropout}
    if scratch_args.from_scratch:
        parts = scratch_args, model_args, data["train"], length, args.dropout, run.checkpoint
        loaded = vectors.without_pooler(student.new_student(*parts))
    else:
        loaded = vectors.without_pooler(models.load_model(AutoModel, model_args, None, length, **options))
    teacher = student.teacher_of(args, loaded)
    reading = vectors.chosen(loaded, args.pooling, args.query_prefix, args.passage_prefix, model_args.model_revision)
    loaded.model.config.update({"max_seq_length": length} | vectors.saved(reading))  # predict reads the same way
    judges = {
        split: student.Translations(rows, teacher) if teacher else scoring.judge_of(kind, rows, corpus, reading, args)
        for split, rows in data.items()
        if split != "train"
    }
    train_rows = pairs.training_rows(loaded.tokenizer, data["train"], kind, reading, length)
    rows = {
        split: pairs.encoded_rows(loaded.tokenizer, judge.texts, judge.labels, length)
        for split, judge in judges.items()
    }
    known = teacher(data["train"]["text"][:]) if teacher else identities_of(data["train"]) if ranking else None
    tuned = vectors.without_pooler(tune(loaded, tuning_args, TaskType.FEATURE_EXTRACTION))

    # Trainer
    check_best_metric(args, judges["validation"].names)

    def score(prediction: EvalPrediction, evaluated: Dataset) -> dict[str, float]:
        split = "test" if evaluated is rows.get("test") else "validation"
        return judges[split](prediction.predictions)

    trainer = steps.Trainer(
        model=tuned,
        args=args,
        train_dataset=train_rows,
        eval_dataset=rows["validation"],
        data_collator=pairs.TextCollator(loaded.tokenizer, loaded.pad_multiple),
        losses=losses.loss_of(kind, known, args.temperature),
        preprocess_logits_for_metrics=losses.reduced_for(kind),
        compute_metrics=score,
        reading=reading,
        in_batch=ranking,
        max_seq_length=length,
    )
    before = trainer.predict(rows["test"]).predictions if "test" in rows else None

    # Train
    run.train(trainer)
    with run.phase("eval"):
        metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    draw_history(scoring.picture(args.output_dir), trainer.state.log_history, args.metric_for_best_model)

    # Test
    scored, judge = "eval", judges["validation"]
    if "test" in rows:
        with run.phase("test"):
            output = trainer.predict(rows["test"], metric_key_prefix="test")
        scored, judge = "test", judges["test"]
        metrics |= run.save_scores(trainer, "test", output.metrics, judge.beside(output.predictions, before))
        write_json_lines(args.folder / "predictions_test.jsonl", judge.report(output.predictions))
    judge.show(metrics, scored)

    # Save
    run.publish(
        trainer,
        task="sentence-similarity",
        scores=judge.names,
        split=scored,
        metrics=metrics,
        usage=USAGE.format(folder=args.output_dir),
        base_model=loaded.source or "A new model",
    )
    if ranking:
        index.write_for(args, corpus)
        run.save()
    run.predict_unlabeled(unlabeled)
    return metrics


if __name__ == "__main__":
    command_line(main)
