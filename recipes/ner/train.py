"""Named entity recognition: fine-tune a token classifier on words with BIO tags.

    make ner
    make ner ARGS="--train_file my.jsonl --validation_file dev.jsonl --test_file test.jsonl"
    make ner ARGS="--model_name_or_path google-bert/bert-base-cased --lora_r 16 --num_train_epochs 3"
    python -m recipes.ner.train --config my.yaml

The sample, all-MiniLM-L6-v2, 2 cores (AMD EPYC, bf16), 1.2 minutes: test F1 0.791, linear probe
0.473, gazetteer 0.277 (2026-11-30). More in README.md.
"""

from dataclasses import dataclass, field

from datasets import Dataset
from peft import TaskType
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerFast,
    set_seed,
)

from common.args import HeadArguments, TrainingArguments, check_best_metric
from common.cli import command_line, parse
from common.data import label_names
from common.data.domains import carry
from common.models import load_model
from common.run import keep_trained_model, open_run, write_json_lines
from common.training import Trainer, label_losses
from common.training.probe import start_at_probe
from common.tuning import TuningArguments, tune

from . import scoring
from .arguments import NerDataArguments
from .augmenting import augmented
from .reading import load_tagged
from .tagging import cut_windows

USAGE = """from transformers import pipeline

tagger = pipeline("token-classification", model="{folder}", aggregation_strategy="simple")
tagger("Ada Lovelace met Charles Babbage in London.")"""


@dataclass
class NerTrainingArguments(TrainingArguments):
    learning_rate: float | None = field(default=None, metadata={"help": "default: 2e-4 full, 4e-3 LoRA, ..."})
    usual_epochs, least_steps = 10, 150
    num_train_epochs: float | None = field(default=None, metadata={"help": "default: 10, for few rows 150 steps"})
    metric_for_best_model: str | None = field(default="f1", metadata={"help": "score that selects the best checkpoint"})


ARGUMENTS = (HeadArguments, NerDataArguments, TuningArguments, NerTrainingArguments)


def encode(
    rows: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerFast,
    label2id: dict[str, int],
    max_seq_length: int,
    doc_stride: int,
) -> dict[str, list]:
    """Encode sentences as windows; predict does so too, with rows that have no `ner_tags`.

    Returns:
        The columns of `cut_windows` with `sentence` numbered by `indices`, and for rows with tags:
        tags: label ids of the window's words; the scores compare them with the output at the first token of each word.
        labels: what the loss compares; the tag at the first token of each word, -100 elsewhere.
    """
    windows = cut_windows(rows["tokens"], tokenizer, max_seq_length, doc_stride)
    windows = carry(windows, rows, windows["sentence"])
    if "ner_tags" in rows:
        tags = [iter([label2id[tag] for tag in sequence]) for sequence in rows["ner_tags"]]
        placed = list(zip(windows["sentence"], windows["positions"], strict=True))
        windows["tags"] = [[next(tags[sentence]) for _ in positions] for sentence, positions in placed]
        windows["labels"] = [[-100] * len(ids) for ids in windows["input_ids"]]
        for labels, positions, of_words in zip(windows["labels"], windows["positions"], windows["tags"], strict=True):
            for position, tag in zip(positions, of_words, strict=True):
                labels[position] = tag
    windows["sentence"] = [indices[sentence] for sentence in windows["sentence"]]
    return windows


@keep_trained_model
def main(argv: list[str] | None = None) -> dict[str, float]:
    # Arguments
    model_args, data_args, tuning_args, args = parse(ARGUMENTS, argv, __doc__)
    if args.learning_rate is None:
        args.learning_rate = tuning_args.rate(full=2e-4)
    set_seed(args.seed)

    # Data
    data, unlabeled, scheme = load_tagged(data_args)
    run, teacher = open_run(main, argv, args, data_args, model_args, tuning_args, rows=data)

    # Model
    length, options = data_args.max_seq_length, {"quantize": tuning_args.quantize, "dropout": args.dropout}
    loaded = load_model(AutoModelForTokenClassification, model_args, label_names(data, "ner_tags"), length, **options)
    config = loaded.model.config
    cut = {"max_seq_length": length, "doc_stride": data_args.doc_stride}
    reading = {"tag_scheme": "none" if scheme.name == "none" else "iob2", "sentences": data_args.sentence_column_name}
    reading["conll_columns"] = [data_args.conll_word_column, data_args.conll_tag_column]
    config.update(cut | reading)  # predict does the same
    how = {"tokenizer": loaded.tokenizer, "label2id": config.label2id, **cut}
    columns = data["train"].column_names
    windows = data.map(encode, batched=True, with_indices=True, remove_columns=columns, fn_kwargs=how)
    probed = start_at_probe(loaded, windows, model_args, args)
    tuned = tune(loaded, tuning_args, TaskType.TOKEN_CLS)

    # Trainer
    metric, labels = scoring.StrictSeqeval(config.tag_scheme, keep_in_memory=True), list(config.id2label.values())
    gold = data["validation"]["ner_tags"][:]
    check_best_metric(args, metric.compute(predictions=gold, references=gold))

    def score(prediction: EvalPrediction, windows: Dataset) -> dict[str, float]:
        predicted = scoring.predicted_tags(windows, prediction.predictions, labels)
        return scoring.by_domain(metric, windows, predicted, scoring.gold_tags(windows, labels), args)

    trainer = Trainer(
        model=tuned,
        args=args,
        train_dataset=augmented(windows["train"], data["train"], encode, how, scheme, data_args, args),
        eval_dataset=windows["validation"],
        data_collator=DataCollatorForTokenClassification(loaded.tokenizer, pad_to_multiple_of=loaded.pad_multiple),
        losses=label_losses,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=score,
        unlabeled=teacher and teacher.labels(windows, AutoModelForTokenClassification, config.label2id.get("O")),
    )

    # Train
    scored = "test" if "test" in windows else "eval"
    probe = trainer.predict(windows["test"]).metrics if probed and scored == "test" else {}
    run.train(trainer)
    with run.phase("eval"):
        metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)

    # Test
    if scored == "test":
        with run.phase("test"):
            output = trainer.predict(windows["test"], metric_key_prefix="test")
        baselines = {"gazetteer_f1": scoring.gazetteer_f1(data["train"], data["test"], metric)}
        baselines |= {"probe_f1": probe["test_f1"]} if probe else {}
        metrics |= run.save_scores(trainer, "test", output.metrics, baselines)
        predicted = scoring.predicted_tags(windows["test"], output.predictions, labels)
        write_json_lines(args.folder / "predictions_test.jsonl", scoring.compare(data["test"], predicted))
    scoring.print_scores(metrics, scored)
    metrics |= teacher.compare(trainer, metrics, ("precision", "recall", "f1")) if teacher else {}

    # Save
    run.publish(
        trainer,
        task="token-classification",
        scores=("precision", "recall", "f1", "accuracy"),
        split=scored,
        metrics=metrics,
        usage=USAGE.format(folder=args.output_dir),
    )
    run.predict_unlabeled(unlabeled)
    return metrics


if __name__ == "__main__":
    command_line(main)
