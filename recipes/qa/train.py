"""Extractive question answering: fine-tune a model to find the answer to a question in a text, or that there is none.

    make qa
    make qa ARGS="--train_file train-v2.0.json --validation_file dev-v2.0.json --output_dir outputs/squad"
    make qa ARGS="--train_file my.jsonl --max_seq_length 256 --doc_stride 64 --lora_r 16 --output_dir outputs/mine"
    python -m recipes.qa.train --config my.yaml

The sample, all-MiniLM-L6-v2, 2 cores (AMD EPYC, bf16), 3.2 minutes: test F1 0.442, exact match 0.375; word overlap F1
0.052 (2026-11-23).
More in README.md.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import TaskType
from transformers import AutoModelForQuestionAnswering, EvalPrediction, PreTrainedTokenizerFast, set_seed

from common.args import DataArguments, ModelArguments, TrainingArguments, check_best_metric
from common.cli import command_line, parse
from common.data.rows import load_splits
from common.errors import InputError, tell, warn
from common.models.load import load_model
from common.models.structure import set_dropout
from common.run.folder import Run
from common.run.report import write_json_lines, write_model_card
from common.training import Trainer
from common.tuning import TuningArguments, merge, tune

from .scoring import UNITS, answers, best_threshold, compare, overlap_baseline, print_scores, scores
from .spans import (
    NULL,
    SpanCollator,
    Spans,
    answer_in_context,
    best_positions,
    best_spans,
    cut_windows,
    positions,
    span_losses,
    tell_of_limits,
)
from .squad import check_row, fix_offsets, read_squad

HERE = Path(__file__).resolve().parent
USAGE = """from recipes.qa.predict import Reader

reader = Reader("{folder}")
reader(["Who met Charles Babbage?"], ["Ada Lovelace met Charles Babbage in London."])"""
HEADLINE = ("exact_match", "f1", "HasAns_f1", "NoAns_f1")


@dataclass
class QaDataArguments(DataArguments):
    question_column_name: str = field(default="question", metadata={"help": "column with the question"})
    context_column_name: str = field(default="context", metadata={"help": "column with the text to find it in"})
    answer_column_name: str = field(
        default="answers", metadata={"help": "column with the answers, {text: [...], answer_start: [...]}"}
    )
    fix_answer_offsets: bool = field(
        default=False,
        metadata={"help": "correct the offset of an answer that stands elsewhere in its context, but once"},
    )
    max_seq_length: int = field(default=384, metadata={"help": "sub-tokens in a window; longer texts take several"})
    doc_stride: int = field(default=128, metadata={"help": "sub-tokens that neighbouring windows share"})
    max_question_length: int = field(default=64, metadata={"help": "sub-tokens of a question that are read"})
    max_answer_length: int = field(default=30, metadata={"help": "sub-tokens that an answer may have"})
    f1_unit: str = field(default="word", metadata={"help": "what F1 counts: word, or character (Chinese, Japanese)"})

    def __post_init__(self) -> None:
        if not (self.train_file or self.dataset_name):
            if self.validation_file or self.test_file:
                raise InputError("--validation_file and --test_file need --train_file beside them")
            for split in ("train", "validation", "test"):
                setattr(self, f"{split}_file", str(HERE / "sample" / f"{split}.json"))
        super().__post_init__()
        if self.f1_unit not in UNITS:
            raise InputError(f"--f1_unit {self.f1_unit}: must be {' or '.join(UNITS)}")
        if min(self.doc_stride, self.max_question_length, self.max_answer_length) < 1:
            raise InputError("--doc_stride, --max_question_length and --max_answer_length must be at least 1")
        if self.max_question_length + self.doc_stride + 8 > self.max_seq_length:  # 8: special tokens, and some step
            raise InputError(
                f"--max_seq_length {self.max_seq_length}: too short for a question of {self.max_question_length} "
                f"sub-tokens and windows that share {self.doc_stride}; lower --max_question_length or --doc_stride"
            )


@dataclass
class QaTrainingArguments(TrainingArguments):
    output_dir: str | None = field(default=f"outputs/{HERE.name}", metadata={"help": "where model and results go"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "2e-4 in full, 2e-3 under LoRA, ... when not given"}
    )
    num_train_epochs: float = field(default=6, metadata={"help": "passes over the training rows"})
    warmup_steps: float = field(default=0.1, metadata={"help": "steps, or below 1 the share of all steps"})
    metric_for_best_model: str | None = field(default="f1", metadata={"help": "score that picks the best checkpoint"})
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    remove_unused_columns: bool = field(default=False)  # the collator needs to know where the context begins


ARGUMENTS = (ModelArguments, QaDataArguments, TuningArguments, QaTrainingArguments)


def encode(
    rows: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerFast,
    max_seq_length: int,
    doc_stride: int,
    max_question_length: int,
) -> dict[str, list]:
    """Windows with `labels`: first and last sub-token of the first answer, `NULL` twice where the window has none.

    -100 twice where the answer is in no window of its context as a whole, which makes the row `lost`.
    """
    windows = cut_windows(rows["question"], rows["context"], tokenizer, max_seq_length, doc_stride, max_question_length)
    labels, answered, of = [], set(), windows["row"]
    context = (windows[name] for name in ("begin", "starts", "ends"))
    for i, (row, begin, starts, ends) in enumerate(zip(of, *context, strict=True)):
        labels.append([NULL, NULL])
        if rows["answers"][row]["text"]:
            start = rows["answers"][row]["answer_start"][0]
            end = start + len(rows["answers"][row]["text"][0])
            first, last = i == 0 or of[i - 1] != row, i + 1 == len(of) or of[i + 1] != row
            found = positions(starts, ends, start, end, first, last)
            if found is not None:
                labels[-1] = [begin + position for position in found]
                answered.add(row)
    windows["lost"] = [bool(rows["answers"][row]["text"]) and row not in answered for row in of]
    windows["labels"] = [[-100, -100] if lost else own for own, lost in zip(labels, windows["lost"], strict=True)]
    windows["row"] = [indices[row] for row in of]
    return windows


def main(argv: list[str] | None = None) -> dict[str, float]:
    # Arguments
    model_args, data_args, tuning_args, args = parse(ARGUMENTS, argv, __doc__)
    if args.learning_rate is None:
        args.learning_rate = tuning_args.rate(full=2e-4)
    set_seed(args.seed)

    # Data
    columns = {
        "question": data_args.question_column_name,
        "context": data_args.context_column_name,
        "answers": data_args.answer_column_name,
    }
    check = partial(check_row, fix_offsets=data_args.fix_answer_offsets)
    read = partial(read_squad, answers=data_args.answer_column_name)
    data = load_splits(data_args, columns, check, read=read, unique_ids=True, carve_by="context")
    data = data.map(fix_offsets)
    if data_args.fix_answer_offsets:
        tell(f"--fix_answer_offsets: {sum(sum(split['moved']) for split in data.values())} answers moved")
    gold = {name: [answers["text"] for answers in split["answers"]] for name, split in data.items()}
    if all(gold["validation"]) and not all(gold["train"] + gold.get("test", [])):
        warn("each validation question has an answer, so the model will answer each question; give some that have none")
    run = Run(args, data_args, model_args, tuning_args, rows=data)

    # Model
    length, labels = data_args.max_seq_length, ["LABEL_0", "LABEL_1"]
    loaded = load_model(AutoModelForQuestionAnswering, model_args, labels, length, quantize=tuning_args.quantize)
    model, tokenizer = loaded.model, loaded.tokenizer
    cut = {name: getattr(data_args, name) for name in ("max_seq_length", "doc_stride", "max_question_length")}
    model.config.update(cut | {"max_answer_length": data_args.max_answer_length})  # for predict
    windows = data.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns=data["train"].column_names,
        fn_kwargs={"tokenizer": tokenizer, **cut},
    )
    tell_of_limits(windows["train"], len(data["train"]))
    set_dropout(model, args.dropout, model_args.attention_dropout)
    answer_in_context(model)
    tuned = tune(loaded, tuning_args, TaskType.QUESTION_ANS)

    # Trainer
    questions, contexts = ({name: split[c][:] for name, split in data.items()} for c in ("question", "context"))
    unit = data_args.f1_unit

    def spans(prediction: EvalPrediction, windows: Dataset) -> Spans:
        return best_spans(np.stack(prediction.predictions), windows, data_args.max_answer_length)

    def score(split: str, found: Spans, threshold: float | None) -> dict[str, float]:
        places = answers(contexts[split], found, threshold)
        predicted = [context[start:end] for context, (start, end) in zip(contexts[split], places, strict=True)]
        return scores(questions[split], gold[split], predicted, unit)

    def score_validation(prediction: EvalPrediction, windows: Dataset) -> dict[str, float]:
        found = spans(prediction, windows)
        return score("validation", found, best_threshold(contexts["validation"], gold["validation"], found, unit))

    check_best_metric(args, scores(questions["validation"], gold["validation"], [""] * len(gold["validation"])))
    trainer = Trainer(
        model=tuned,
        args=args,
        train_dataset=windows["train"],
        eval_dataset=windows["validation"],
        data_collator=SpanCollator(tokenizer),
        preprocess_logits_for_metrics=best_positions,
        compute_metrics=score_validation,
        losses=span_losses,
    )

    # Train
    run.start()
    with run.phase("train"):
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    with run.phase("eval"):
        output = trainer.predict(windows["validation"], metric_key_prefix="eval")
    metrics, scored = output.metrics, "eval"
    trainer.save_metrics("eval", metrics)
    # tuned on the validation rows, and used on the test rows and by predict
    found = spans(output, windows["validation"])
    threshold = best_threshold(contexts["validation"], gold["validation"], found, unit)
    model.config.no_answer_threshold = threshold

    # Test
    if "test" in windows:
        scored = "test"
        trainer.compute_metrics = None  # scored below, by the threshold found
        with run.phase("test"):
            output = trainer.predict(windows["test"], metric_key_prefix="test")
        found = spans(output, windows["test"])
        own = score("test", found, threshold)
        overlap = scores(questions["test"], gold["test"], overlap_baseline(questions["test"], contexts["test"]), unit)
        own |= {f"baseline_{name}": overlap[name] for name in ("exact_match", "f1")}
        test_metrics = output.metrics | {f"test_{name}": value for name, value in own.items()}
        trainer.save_metrics("test", test_metrics)
        metrics |= test_metrics
        predicted = compare(data["test"], answers(contexts["test"], found, threshold), unit)
        write_json_lines(Path(args.output_dir, "predictions_test.jsonl"), predicted)
    print_scores(metrics, scored)

    # Save
    trainer.model = merge(tuned, args.output_dir, save=args.should_save)
    headline = {name: metrics[f"{scored}_{name}"] for name in HEADLINE if f"{scored}_{name}" in metrics}
    write_model_card(
        args.output_dir,
        task="question-answering",
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
