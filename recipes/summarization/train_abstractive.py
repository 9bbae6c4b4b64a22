"""Summarization: fine-tune an encoder-decoder that generates summaries.

    make summarization-abstractive ARGS="--train_file train.jsonl --output_dir outputs/written"
    make summarization-abstractive ARGS="--model_name_or_path facebook/bart-base --train_file train.jsonl"
    python -m recipes.summarization.train_abstractive --config my.yaml

The default adds a decoder to the embedded encoder (--warm_start both); training needs many rows.
SciTLDR, all-MiniLM-L6-v2 on both sides, 3 epochs, one core (AMD EPYC, bf16), 11 minutes: test ROUGE-1 27.2 ± 1.6,
baseline (the first sentences) 31.4 (2026-11-23). More in README.md.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import TaskType
from transformers import EvalPrediction, PreTrainedTokenizerBase, set_seed

from common.cli import command_line, parse
from common.data.domains import carry
from common.data.language_codes import encode_sources, set_direction
from common.models import decoded, forced_ids, label_ids, load_seq2seq
from common.run import Run, draw_history, keep_trained_model, other_predictions
from common.training import Seq2SeqCollator, Seq2SeqTrainer, Seq2SeqTrainingArguments, losses_at_labels
from common.tuning import tune

from . import abstractive, scoring

HERE = Path(__file__).resolve().parent
USAGE = """from recipes.summarization.predict import load

summarize = load("{folder}")
summarize(["A document of any length."])"""


@dataclass
class AbstractiveTrainingArguments(Seq2SeqTrainingArguments):
    lower_is_better = ("hit_max_length",)

    output_dir: str | None = field(
        default=f"outputs/{HERE.name}-abstractive", metadata={"help": "folder for the model and all results"}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "default: 1e-3 from scratch, 3e-4 warm-started, else 5e-5; LoRA: x20"}
    )
    num_train_epochs: float = field(default=10, metadata={"help": "passes over the training rows"})
    max_tokens_per_batch: int = field(
        default=4096, metadata={"help": "tokens in a batch, with padding; 0: count rows", "resume": "splits_step"}
    )
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "rows in a batch on each device", "resume": "splits_step"}
    )
    warmup_steps: float = field(default=0.1, metadata={"help": "warm-up steps; below 1: share of all steps"})
    metric_for_best_model: str | None = field(default="rouge_mean", metadata={"help": "selects the best checkpoint"})


ARGUMENTS = (*abstractive.GROUPS, AbstractiveTrainingArguments)


def encode(
    rows: dict[str, list], tokenizer: PreTrainedTokenizerBase, prefix: str, lengths: tuple[int, int], start: int | None
) -> dict[str, list]:
    """Encode documents as `input_ids` and summaries as `labels`, both cut to `lengths` tokens.

    `cut` marks longer documents, `summary_cut` longer summaries. The decoder starts with the token `start`.
    """
    whole = encode_sources(tokenizer, prefix, rows["document"])
    labels = label_ids(tokenizer, rows["summary"], start)
    columns = {
        "input_ids": encode_sources(tokenizer, prefix, rows["document"], lengths[0]),
        "labels": label_ids(tokenizer, rows["summary"], start, lengths[1]),
        "cut": [len(ids) > lengths[0] for ids in whole],
        "summary_cut": [len(ids) > lengths[1] for ids in labels],
    }
    return carry(columns, rows)


@keep_trained_model
def main(argv: list[str] | None = None) -> dict[str, float]:
    # Arguments
    model_args, data_args, generation_args, tuning_args, args = parse(ARGUMENTS, argv, __doc__)
    args.check_together(generation_args, model_args, tuning_args, (*scoring.SCORES, "hit_max_length"))
    if args.learning_rate is None:
        new = 1e-3 if model_args.from_scratch else 3e-4 if model_args.warm_start else None
        args.learning_rate = new or tuning_args.rate(full=5e-5)
    set_seed(args.seed)

    # Data
    data, unlabeled = data_args.load()
    rouge = scoring.Rouge(data_args.rouge_words, data["train"]["summary"][:])
    compared = other_predictions(data_args.compare_to, data, "summary")
    run = Run(args, data_args, model_args, generation_args, tuning_args, rows=data)

    # Model
    lengths = generation_args.max_source_length, generation_args.max_target_length
    texts = (text for side in ("document", "summary") for text in data["train"][side])
    options = {"checkpoint": run.checkpoint, "dropout": args.dropout, "quantize": tuning_args.quantize}
    loaded = load_seq2seq(model_args, texts, *lengths, **options)
    model, tokenizer = loaded.model, loaded.tokenizer
    direction = abstractive.direction_of(tokenizer, model, data_args.language, data_args.source_prefix)
    abstractive.set_search(model, generation_args)
    set_direction(tokenizer, model, direction)
    settings = {"method": "abstractive", "source_code": direction.source_code, "prefix": direction.source_prefix}
    model.config.update({"summarization": settings, "max_source_length": lengths[0]})  # for predict
    start = model.generation_config.decoder_start_token_id
    options = {"tokenizer": tokenizer, "prefix": direction.source_prefix, "lengths": lengths, "start": start}
    rows = data.map(encode, batched=True, remove_columns=data["train"].column_names, fn_kwargs=options)
    rows, cut = abstractive.drop_cut_summaries(rows)
    collator, forced = Seq2SeqCollator(tokenizer, model, lengths), forced_ids(model)
    tuned = tune(loaded, tuning_args, TaskType.SEQ_2_SEQ_LM)

    # Trainer
    references = data["validation"]["references"][:]
    watched = args.watched(len(references))

    def score(prediction: EvalPrediction, rows: Dataset) -> dict[str, float]:
        predicted, _, ended = decoded(prediction.predictions, tokenizer, forced)
        rows = data["validation"].select(watched)
        means = scoring.by_domain(rows, rouge(predicted, rows["references"][:]), args)
        return means | {"hit_max_length": ended.count(False) / len(ended)}

    trainer = Seq2SeqTrainer(
        model=tuned,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"].select(watched),
        data_collator=collator,
        losses=losses_at_labels,
        compute_metrics=score,
    )

    # Train
    run.train(trainer)

    # Test
    metrics: dict[str, float] = {}
    args.predict_with_generate, trainer.compute_metrics = True, None  # scored below, with the baselines
    first = scoring.best_count(rouge, partial(scoring.lead, data["validation"]["document"][:]), references)
    for split, name, other in (("eval", "validation", None), ("test", "test", compared)):
        if name not in rows:
            continue
        with run.phase(split):
            output = trainer.predict(rows[name], metric_key_prefix=split)
        predicted, _, ended = decoded(output.predictions, tokenizer, forced)
        values = {"hit_max_length": ended.count(False) / len(ended), "cut": float(np.mean(cut[name]))}
        values |= scoring.score_split(rouge, data[name], predicted, (first, first), other, args)
        metrics |= run.save_scores(trainer, split, output.metrics, values)
        scoring.write_split(args.output_dir, name, rouge, data[name], predicted, [{"ended": end} for end in ended])
    draw_history(Path(args.output_dir, "curve.png"), trainer.state.log_history, "rouge_mean")
    scored = "test" if "test" in rows else "eval"
    scoring.print_scores(metrics, scored, rouge.signature)

    # Save
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
