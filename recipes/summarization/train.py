"""Summarization: train an encoder to pick sentences (extractive), or an encoder-decoder to write (abstractive).

    make summarization
    make summarization ARGS="--train_file train.jsonl --validation_file dev.jsonl --output_dir outputs/mine"
    make summarization ARGS="--method abstractive --train_file train.jsonl --output_dir outputs/written"
    make summarization ARGS="--method abstractive --model_name_or_path facebook/bart-base --train_file train.jsonl"
    python -m recipes.summarization.train --config my.yaml

The sample, extractive, all-MiniLM-L6-v2, 2 cores (AMD EPYC, bf16), 0.9 minutes: test ROUGE-1 41.6, ROUGE-Lsum 33.4; the
first two sentences 33.9 and 25.4 (2026-11-28).
More in README.md.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset
from peft import TaskType
from transformers import AutoModelForTokenClassification, EvalPrediction, set_seed

from common.args import DEFAULT_ENCODER, check_best_metric
from common.cli import command_line, parse
from common.data.language_codes import set_direction
from common.data.rows import load_splits
from common.errors import InputError
from common.models.decoding import decoded, forced_ids
from common.models.encoder_decoder import tokenizer_and_model
from common.models.load import load_model
from common.models.structure import set_dropout
from common.run.folder import Run
from common.run.report import draw_history, write_json_lines, write_model_card, write_samples
from common.run.significance import check_comparison
from common.training import Seq2SeqCollator, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, label_losses
from common.tuning import TuningArguments, merge, tune

from .abstractive import encode, language_of, set_search, whole_rows
from .arguments import SummarizationDataArguments, SummarizationModelArguments, SummaryGenerationArguments, check_method
from .articles import check_row, check_splits, flatten
from .extractive import LABEL, Picker, WindowCollator, encode_windows, marked, sentence_logits, sentence_losses
from .scoring import SCORES, Rouge, best_count, compare, lead, means, predictions, print_scores, results

HERE = Path(__file__).resolve().parent
USAGE = """from recipes.summarization.predict import load

summarize = load("{folder}")
summarize(["A document of any length."])"""
HEADLINE = ("rouge1", "rouge2", "rougeL", "rougeLsum", "lead_rouge1", "oracle_rouge1")
#: where the two methods differ, in what they are trained by when nothing is given
DEFAULTS = {
    "extractive": {"num_train_epochs": 6, "max_tokens_per_batch": 0},
    "abstractive": {"num_train_epochs": 10, "max_tokens_per_batch": 4096},
}


@dataclass
class SummarizationTrainingArguments(Seq2SeqTrainingArguments):
    method: Literal["extractive", "abstractive"] = field(
        default="extractive", metadata={"help": "pick sentences of the document, or write a summary"}
    )
    output_dir: str | None = field(default=f"outputs/{HERE.name}", metadata={"help": "where model and results go"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "2e-4 extractive; 1e-3 from scratch, 3e-4 warm-started, else 5e-5; LoRA: x20"}
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "passes over the training rows; 6 extractive, 10 abstractive when not given"}
    )
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "sub-tokens in a batch, with padding; 0: rows; 4096 abstractive if not given"}
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "rows, or windows, a device takes at once"})
    warmup_steps: float = field(default=0.1, metadata={"help": "steps, or below 1 the share of all steps"})
    metric_for_best_model: str | None = field(default="rouge_mean", metadata={"help": "picks the best checkpoint"})
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])

    def __post_init__(self) -> None:
        for name, value in DEFAULTS[self.method].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()


ARGUMENTS = (
    SummarizationModelArguments,
    SummarizationDataArguments,
    SummaryGenerationArguments,
    TuningArguments,
    SummarizationTrainingArguments,
)


def main(argv: list[str] | None = None) -> dict[str, float]:
    # Arguments
    model_args, data_args, generation_args, tuning_args, args = parse(ARGUMENTS, argv, __doc__)
    extractive, window = args.method == "extractive", generation_args.max_source_length
    check_method(args.method, args, model_args, data_args, generation_args)
    if extractive:
        check_best_metric(args, SCORES)
    else:
        if model_args.model_name_or_path == DEFAULT_ENCODER:  # which has no decoder
            model_args.warm_start = model_args.warm_start or "both"
        args.check_together(generation_args, model_args, tuning_args, (*SCORES, "hit_max_length"))
    if args.learning_rate is None and (model_args.from_scratch or model_args.warm_start):
        args.learning_rate = 1e-3 if model_args.from_scratch else 3e-4
    elif args.learning_rate is None:
        args.learning_rate = tuning_args.rate(full=2e-4 if extractive else 5e-5)
    set_seed(args.seed)

    # Data
    optional = {"references": data_args.references_column_name}
    data = load_splits(data_args, data_args.columns(), check_row, read=data_args.read, optional=optional).map(flatten)
    check_splits(data)
    rouge = Rouge(data_args.rouge_words, data["train"]["summary"][:])
    if data_args.compare_to:
        if "test" not in data:
            raise InputError("--compare_to: there are no test rows to compare on; give --test_file")
        compared = check_comparison(data_args.compare_to, data["test"]["summary"][:], "summary")
    run = Run(args, data_args, model_args, generation_args, tuning_args, rows=data)

    # Model
    if extractive:
        loaded = load_model(
            AutoModelForTokenClassification,
            model_args,
            [LABEL],
            window,
            argument="max_source_length",
            quantize=tuning_args.quantize,
        )
        model, tokenizer = loaded.model, loaded.tokenizer
        set_dropout(model, args.dropout, model_args.attention_dropout)
        rows = marked(data, rouge).map(
            encode_windows,
            batched=True,
            with_indices=True,
            remove_columns=["parts", "oracle"],
            fn_kwargs={"tokenizer": tokenizer, "max_length": window},
        )
        tuned = tune(loaded, tuning_args, TaskType.TOKEN_CLS)
    else:
        limits = {"max_source_length": window, "max_target_length": generation_args.max_target_length}
        loaded = tokenizer_and_model(
            model_args,
            (text for side in ("document", "summary") for text in data["train"][side]),
            *limits.values(),
            checkpoint=args.resume_from_checkpoint,
            dropout=args.dropout,
            quantize=tuning_args.quantize,
        )
        model, tokenizer = loaded.model, loaded.tokenizer
        way = language_of(tokenizer, model, data_args.language, data_args.source_prefix)
        set_search(model, generation_args)
        set_direction(tokenizer, model, way)
        start = model.generation_config.decoder_start_token_id
        rows = data.map(
            encode,
            batched=True,
            remove_columns=data["train"].column_names,
            fn_kwargs={"tokenizer": tokenizer, "source_prefix": way.source_prefix, "start": start, **limits},
        )
        rows, cut = whole_rows(rows)
        collator, forced = Seq2SeqCollator(tokenizer, model), forced_ids(model)
        tuned = tune(loaded, tuning_args, TaskType.SEQ_2_SEQ_LM)

    # Trainer
    shared = {"model": tuned, "args": args, "train_dataset": rows["train"]}
    validation = data["validation"]["references"][:]
    if extractive:
        picker = {name: Picker(data[name]["document"][:], rows[name]) for name in rows}

        def count_for(prediction: EvalPrediction) -> int:
            of_count = partial(picker["validation"].summaries, prediction.predictions)
            return data_args.summary_sentences or best_count(rouge, of_count, validation)

        def score(prediction: EvalPrediction, encoded: Dataset) -> dict[str, float]:
            count = count_for(prediction)
            predicted = picker["validation"].summaries(prediction.predictions, count)
            return means(rouge(predicted, validation)) | {"sentences": count}

        trainer = Trainer(
            **shared,
            eval_dataset=rows["validation"],
            data_collator=WindowCollator(tokenizer),
            preprocess_logits_for_metrics=sentence_logits,
            compute_metrics=score,
            losses=sentence_losses,
        )
    else:
        watched = args.watched(len(validation))

        def score(prediction: EvalPrediction, encoded: Dataset) -> dict[str, float]:
            predicted, _, ended = decoded(prediction.predictions, tokenizer, forced)
            found = means(rouge(predicted, [validation[i] for i in watched]))
            return found | {"hit_max_length": ended.count(False) / len(ended)}

        trainer = Seq2SeqTrainer(
            **shared,
            eval_dataset=rows["validation"].select(watched),
            data_collator=collator,
            losses=label_losses,
            compute_metrics=score,
        )

    # Train
    run.start()
    with run.phase("train"):
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    args.predict_with_generate = True
    metrics: dict[str, float] = {}

    # Test
    trainer.compute_metrics = None
    first = best_count(rouge, partial(lead, data["validation"]["document"][:]), validation)
    for scored, name in (("eval", "validation"), ("test", "test")):
        if name not in rows:
            continue
        with run.phase(scored):
            output = trainer.predict(rows[name], metric_key_prefix=scored)
        if extractive:
            if name == "validation":  # whose number of sentences is used on test, and by predict
                count = count_for(output)
            predicted = picker[name].summaries(output.predictions, count)
            more = [{"sentences": own} for own in picker[name].sentences(output.predictions, count)]
            own = {"sentences": count}
        else:
            predicted, _, ended = decoded(output.predictions, tokenizer, forced)
            more = [{"ended": e} for e in ended]
            own = {"hit_max_length": ended.count(False) / len(ended), "cut": float(np.mean(cut[name]))}
        own |= results(rouge, data[name], predicted, first, count if extractive else first)
        if name == "test" and data_args.compare_to:
            own |= compare(rouge, compared, predicted, data[name])
        own = output.metrics | {f"{scored}_{key}": value for key, value in own.items()}
        trainer.save_metrics(scored, own)
        metrics |= own
        write_json_lines(Path(args.output_dir, f"predictions_{name}.jsonl"), predictions(data[name], predicted, more))
        texts = {"document": data[name]["document"][:], "reference": data[name]["summary"][:], "hypothesis": predicted}
        of_rows = rouge(predicted, data[name]["references"][:])[:, :3].mean(1).tolist()
        page = Path(args.output_dir, f"samples_{name}.html")
        write_samples(page, f"Summaries of {name}", texts, of_rows, "ROUGE")
    draw_history(Path(args.output_dir, "curve.png"), trainer.state.log_history, "rouge_mean")
    scored = "test" if "test" in rows else "eval"
    print_scores(metrics, scored, rouge.signature)

    # Save
    found = {"method": args.method, "document_column_name": data_args.document_column_name}
    found |= {"sentences": count} if extractive else {"source_code": way.source_code, "prefix": way.source_prefix}
    trainer.model = merge(tuned, args.output_dir, save=args.should_save)
    trainer.model.config.update({"summarization": found, "max_source_length": window})  # for predict
    write_model_card(
        args.output_dir,
        task="summarization",
        base_model=model_args.model_name_or_path,
        scores={name: metrics[f"{scored}_{name}"] for name in HEADLINE},
        split=scored,
        record=run.record,
        usage=USAGE.format(folder=args.output_dir),
    )
    trainer.save_model(_internal_call=True)  # which leaves the push for when all is there
    run.finish(scores=metrics, signatures={"rouge": rouge.signature})
    if args.push_to_hub:
        trainer.push_to_hub()
    return metrics


if __name__ == "__main__":
    command_line(main)
