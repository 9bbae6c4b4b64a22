"""Named entity recognition: fine-tune a token classifier on words with BIO tags.

    make ner
    make ner ARGS="--train_file my.jsonl --validation_file dev.jsonl --test_file test.jsonl"
    make ner ARGS="--model_name_or_path google-bert/bert-base-cased --lora_r 16 --num_train_epochs 3"
    python -m recipes.ner.train --config my.yaml

The sample, all-MiniLM-L6-v2, 2 cores (AMD EPYC, bf16), 0.5 minutes: test F1 0.759, gazetteer 0.277 (2026-11-28).
More in README.md.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import TaskType
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerFast,
    set_seed,
)

from common.args import DataArguments, ModelArguments, TrainingArguments, check_best_metric
from common.cli import command_line, parse
from common.data.rows import label_names, load_splits
from common.errors import InputError, tell
from common.models.load import load_model
from common.models.structure import set_dropout
from common.run.folder import Run
from common.run.report import write_json_lines, write_model_card
from common.training import Trainer, label_losses
from common.tuning import TuningArguments, merge, tune

from .scoring import StrictSeqeval
from .tagging import Gazetteer, check_row, compare, cut_windows, print_scores, repair_tags, stitch

HERE = Path(__file__).resolve().parent
USAGE = """from transformers import pipeline

tagger = pipeline("token-classification", model="{folder}", aggregation_strategy="simple")
tagger("Ada Lovelace met Charles Babbage in London.")"""


@dataclass
class NerDataArguments(DataArguments):
    text_column_name: str = field(default="tokens", metadata={"help": "column with the list of words"})
    label_column_name: str = field(
        default="ner_tags", metadata={"help": "column with the list of BIO tags, one a word"}
    )
    max_seq_length: int = field(default=256, metadata={"help": "sub-tokens in a window; longer texts take several"})
    doc_stride: int | None = field(
        default=None, metadata={"help": "sub-tokens that neighbouring windows share; a quarter when not given"}
    )
    repair_bio: bool = field(default=False, metadata={"help": "read I-X that continues no X as B-X (IOB1 files)"})

    def __post_init__(self) -> None:
        if not (self.train_file or self.dataset_name):
            if self.validation_file or self.test_file:
                raise InputError("--validation_file and --test_file need --train_file beside them")
            for split in ("train", "validation", "test"):
                setattr(self, f"{split}_file", str(HERE / "sample" / f"{split}.jsonl"))
        super().__post_init__()
        if self.doc_stride is None:
            self.doc_stride = self.max_seq_length // 4
        if not 0 <= self.doc_stride <= self.max_seq_length // 2:
            raise InputError(f"--doc_stride {self.doc_stride}: must lie between 0 and half of --max_seq_length")


@dataclass
class NerTrainingArguments(TrainingArguments):
    output_dir: str | None = field(default=f"outputs/{HERE.name}", metadata={"help": "where model and results go"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "2e-4 in full, 2e-3 under LoRA, ... when not given"}
    )
    num_train_epochs: float = field(default=10, metadata={"help": "passes over the training rows"})
    metric_for_best_model: str | None = field(default="f1", metadata={"help": "score that picks the best checkpoint"})


ARGUMENTS = (ModelArguments, NerDataArguments, TuningArguments, NerTrainingArguments)


def encode(
    rows: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerFast,
    label2id: dict[str, int],
    max_seq_length: int,
    doc_stride: int,
) -> dict[str, list]:
    """Windows of sub-tokens with `labels`: a word's tag on its first sub-token in its own window, else -100."""
    windows = cut_windows(rows["tokens"], tokenizer, max_seq_length, doc_stride)
    windows["labels"] = []
    tags = [iter(sequence) for sequence in rows["ner_tags"]]
    for ids, sentence, positions in zip(
        windows["input_ids"], windows["sentence"], windows.pop("positions"), strict=True
    ):
        labels = [-100] * len(ids)
        for position in positions:
            labels[position] = label2id[next(tags[sentence])]
        windows["labels"].append(labels)
    windows["sentence"] = [indices[sentence] for sentence in windows["sentence"]]
    return windows


def tag_sequences(windows: Dataset, values: list[np.ndarray], prediction: EvalPrediction, labels: list[str]) -> list:
    """One list of tags a sentence from `values`, arrays of label ids a window."""
    return [[labels[i] for i in ids] for ids in stitch(windows["sentence"], values, prediction.label_ids)]


def main(argv: list[str] | None = None) -> dict[str, float]:
    # Arguments
    model_args, data_args, tuning_args, args = parse(ARGUMENTS, argv, __doc__)
    if args.learning_rate is None:
        args.learning_rate = tuning_args.rate(full=2e-4)
    set_seed(args.seed)

    # Data
    columns = {"tokens": data_args.text_column_name, "ner_tags": data_args.label_column_name}
    check = partial(check_row, repair_bio=data_args.repair_bio)
    data = load_splits(data_args, columns, check, list_columns=columns, txt="conll")
    if data_args.repair_bio:
        data = data.map(repair_tags)
        tell(f"--repair_bio: {sum(sum(split['repaired']) for split in data.values())} tags I-X became B-X")
    labels = label_names(data, "ner_tags")
    run = Run(args, data_args, model_args, tuning_args, rows=data)

    # Model
    length = data_args.max_seq_length
    loaded = load_model(AutoModelForTokenClassification, model_args, labels, length, quantize=tuning_args.quantize)
    model, tokenizer = loaded.model, loaded.tokenizer
    labels = list(model.config.id2label.values())
    cut = {"max_seq_length": data_args.max_seq_length, "doc_stride": data_args.doc_stride}
    model.config.update(cut)  # saved with the model, so that predict cuts the same windows
    windows = data.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=data["train"].column_names,
        fn_kwargs={"tokenizer": tokenizer, "label2id": model.config.label2id, **cut},
    )
    set_dropout(model, args.dropout, model_args.attention_dropout)
    tuned = tune(loaded, tuning_args, TaskType.TOKEN_CLS)

    # Trainer
    metric = StrictSeqeval(keep_in_memory=True)
    gold = data["validation"]["ner_tags"][:]
    check_best_metric(args, metric.compute(predictions=gold, references=gold))

    def score(prediction: EvalPrediction, windows: Dataset) -> dict[str, float]:
        return metric.compute(
            predictions=tag_sequences(windows, prediction.predictions, prediction, labels),
            references=tag_sequences(windows, prediction.label_ids, prediction, labels),
        )

    trainer = Trainer(
        model=tuned,
        args=args,
        train_dataset=windows["train"],
        eval_dataset=windows["validation"],
        data_collator=DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=8),
        losses=label_losses,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=score,
    )

    # Train
    run.start()
    with run.phase("train"):
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    with run.phase("eval"):
        metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    scored = "eval"

    # Test
    if "test" in windows:
        scored = "test"
        with run.phase("test"):
            output = trainer.predict(windows["test"], metric_key_prefix="test")
        gazetteer = Gazetteer(data["train"]["tokens"], data["train"]["ner_tags"])
        baseline = metric.compute(
            predictions=[gazetteer.tag(words) for words in data["test"]["tokens"]],
            references=data["test"]["ner_tags"][:],
        )
        metrics |= output.metrics | {"test_gazetteer_f1": baseline["f1"]}
        trainer.save_metrics("test", output.metrics | {"test_gazetteer_f1": baseline["f1"]})
        predicted = tag_sequences(windows["test"], output.predictions, output, labels)
        write_json_lines(Path(args.output_dir, "predictions_test.jsonl"), compare(data["test"], predicted))
    print_scores(metrics, scored)

    # Save
    trainer.model = merge(tuned, args.output_dir, save=args.should_save)
    headline = {name: metrics[f"{scored}_{name}"] for name in ("precision", "recall", "f1", "accuracy")}
    write_model_card(
        args.output_dir,
        task="token-classification",
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
