"""Translation: train or fine-tune an encoder-decoder on pairs of sentences.

    make translation
    make translation ARGS="--train_file train.jsonl --validation_file dev.jsonl --source_lang en --target_lang de"
    make translation ARGS="--train_file t.en --train_target_file t.de --source_lang en --target_lang de --num_beams 1"
    make translation ARGS="--model_name_or_path google-t5/t5-small --train_file t.csv --source_lang en --target_lang de"
    python -m recipes.translation.train --config my.yaml

The sample, localisation from English to German, tiny model from scratch, 2 cores (AMD EPYC, bf16), 2.8 minutes: test
BLEU 73.1, source copied 10.9 (2026-11-23).
More in README.md.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from datasets import Dataset
from peft import TaskType
from transformers import EvalPrediction, PreTrainedTokenizerBase, set_seed

from common.args import check_best_metric, parse
from common.data import load_splits
from common.encoder_decoder import (
    Seq2SeqModelArguments,
    load_encoder_decoder,
    load_seq2seq_tokenizer,
    new_encoder_decoder,
    train_joint_tokenizer,
)
from common.errors import InputError, command_line, tell
from common.methods import TuningArguments
from common.outputs import Run
from common.regularisation import set_dropout
from common.report import write_json_lines, write_model_card
from common.seq2seq import (
    GenerationArguments,
    Seq2SeqCollator,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    finished_ids,
    set_generation,
)
from common.tuning import merge, tune

from .languages import direction, set_direction
from .localisation import LANGUAGES, sample_files
from .pairs import PairArguments, check_row, flat, look_over, reader
from .scoring import (
    TOKENIZE,
    bleu_of,
    by_group,
    check_comparison,
    compare,
    predictions,
    print_scores,
    scores,
    signatures,
)

HERE = Path(__file__).resolve().parent
USAGE = """from recipes.translation.predict import Translator

translate = Translator("{folder}")
translate(["A text, or a document of any length."])"""
HEADLINE = ("bleu", "chrf", "ter", "exact", "copy_bleu")


@dataclass
class TranslationDataArguments(PairArguments):
    group_column_name: str | None = field(
        default=None, metadata={"help": "column with the domain of a row; each is scored for itself too"}
    )
    source_code: str | None = field(
        default=None, metadata={"help": "the model's code for the source, such as eng_Latn; found when not given"}
    )
    target_code: str | None = field(default=None, metadata={"help": "the same for the target"})
    source_prefix: str | None = field(
        default=None, metadata={"help": "text in front of each source; that of T5 and Marian is known"}
    )
    bleu_tokenize: str = field(default="auto", metadata={"help": f"words of BLEU: auto, {', '.join(TOKENIZE)}"})
    compare_to: str | None = field(
        default=None, metadata={"help": "predictions_test.jsonl of another run: is the difference in BLEU chance?"}
    )

    def __post_init__(self) -> None:
        if not (self.train_file or self.dataset_name):
            if self.validation_file or self.test_file or self.targets() or self.source_lang or self.target_lang:
                raise InputError("--train_file or --dataset_name is missing; without any the sample is translated")
            for split, file in sample_files().items():
                setattr(self, f"{split}_file", file)
            self.source_lang, self.target_lang = LANGUAGES
            self.group_column_name = "held_out"
        super().__post_init__()
        if self.bleu_tokenize not in ("auto", *TOKENIZE):
            raise InputError(f"--bleu_tokenize {self.bleu_tokenize}: must be auto or one of {', '.join(TOKENIZE)}")

    def columns(self) -> dict[str, str]:
        """What `load_splits` is to read."""
        return super().columns() | ({"group": self.group_column_name} if self.group_column_name else {})


@dataclass
class TranslationTrainingArguments(Seq2SeqTrainingArguments):
    output_dir: str | None = field(default=f"outputs/{HERE.name}", metadata={"help": "where model and results go"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "3e-3 from scratch (base: 7e-4), 5e-5 pretrained, 5e-4 under LoRA, ..."}
    )
    num_train_epochs: float = field(default=6, metadata={"help": "passes over the training rows"})
    max_tokens_per_batch: int = field(
        default=2048,
        metadata={"help": "sub-tokens in a batch, with padding; 0: --per_device_train_batch_size rows"},
    )
    warmup_steps: float = field(default=0.1, metadata={"help": "steps, or below 1 the share of all steps"})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "weight spread over all sub-tokens"})
    metric_for_best_model: str | None = field(default="bleu", metadata={"help": "score that picks the best checkpoint"})


ARGUMENTS = (
    Seq2SeqModelArguments,
    TranslationDataArguments,
    GenerationArguments,
    TuningArguments,
    TranslationTrainingArguments,
)


def encode(
    rows: dict[str, list],
    tokenizer: PreTrainedTokenizerBase,
    source_prefix: str,
    max_source_length: int,
    max_target_length: int,
) -> dict[str, list]:
    """`input_ids` of the sources and `labels`, cut to the greatest lengths; `cut`: whether that took something off."""
    sources = [source_prefix + text for text in rows["source"]]
    whole = tokenizer(sources, verbose=False)["input_ids"]
    labels = tokenizer(text_target=rows["target"], verbose=False)["input_ids"]
    return {
        "input_ids": tokenizer(sources, truncation=True, max_length=max_source_length)["input_ids"],
        "labels": tokenizer(text_target=rows["target"], truncation=True, max_length=max_target_length)["input_ids"],
        "cut": [len(a) > max_source_length or len(b) > max_target_length for a, b in zip(whole, labels, strict=True)],
    }


def main(argv: list[str] | None = None) -> dict[str, float]:
    # Arguments
    model_args, data_args, generation_args, tuning_args, args = parse(ARGUMENTS, argv, __doc__)
    if args.learning_rate is None:
        new = 7e-4 if model_args.from_scratch == "base" else 3e-3
        args.learning_rate = new if model_args.from_scratch else tuning_args.rate(full=5e-5)
    tuning_args.check_pretrained(new=model_args.from_scratch is not None)
    if args.predict_with_generate and (args.metric_for_best_model or "").removeprefix("eval_") == "loss":
        raise InputError(
            "--metric_for_best_model loss: evaluations that generate give no loss; add --predict_with_generate false"
        )
    args.check_lengths(generation_args)
    set_seed(args.seed)

    # Data
    languages = {"source_lang": data_args.source_lang, "target_lang": data_args.target_lang}
    read = reader(**languages, targets=data_args.targets())
    data = load_splits(data_args, data_args.columns(), partial(check_row, **languages), read=read)
    data = data.map(flat, fn_kwargs=languages).select_columns(
        ["id", "source", "target", *(["group"] if data_args.group_column_name else [])]
    )
    look_over(data, **languages)
    if data_args.compare_to:
        if "test" not in data:
            raise InputError("--compare_to: there are no test rows to compare on; give --test_file")
        compared = check_comparison(data_args.compare_to, data["test"]["target"][:])
    run = Run(args, data_args, model_args, generation_args, tuning_args, rows=data)

    # Model
    if model_args.from_scratch:
        texts = (text for side in ("source", "target") for text in data["train"][side])
        own = args.resume_from_checkpoint  # a run that goes on has its own tokenizer
        tokenizer = load_seq2seq_tokenizer(own) if own else train_joint_tokenizer(model_args, texts)
        model = new_encoder_decoder(model_args, tokenizer, 0.1 if args.dropout is None else args.dropout)
    else:
        longest = max(generation_args.max_source_length, generation_args.max_target_length)
        model = load_encoder_decoder(model_args, longest, tuning_args.quantize)
        tokenizer = load_seq2seq_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    set_dropout(model, args.dropout, model_args.attention_dropout)
    codes = {name: getattr(data_args, name) for name in ("source_code", "target_code", "source_prefix")}
    way = direction(tokenizer, model, **languages, **codes)
    set_generation(model, generation_args)
    set_direction(tokenizer, model, way)
    limits = {name: getattr(generation_args, name) for name in ("max_source_length", "max_target_length")}
    model.config.update({"translation": asdict(way), **limits})  # saved with the model, for predict
    rows = data.map(
        encode,
        batched=True,
        remove_columns=data["train"].column_names,
        fn_kwargs={"tokenizer": tokenizer, "source_prefix": way.source_prefix, **limits},
    )
    for name, encoded in rows.items():
        long = sum(encoded["cut"])
        if long:
            what = "left out of training" if name == "train" else "cut there"
            tell(f"{name}: {long:,} of {len(encoded):,} rows exceed the greatest lengths and are {what}")
    rows["train"] = rows["train"].filter(lambda cut: not cut, input_columns="cut")
    if len(rows["train"]) == 0:
        raise InputError("every training row exceeds --max_source_length or --max_target_length")
    rows = rows.remove_columns("cut")
    collator, forced = Seq2SeqCollator(tokenizer, model), model.generation_config.forced_bos_token_id
    model = tune(model, tuning_args, TaskType.SEQ_2_SEQ_LM)

    # Trainer
    bleu, gold = bleu_of(data_args.target_lang, data_args.bleu_tokenize), {s: data[s]["target"][:] for s in data}

    def texts_of(prediction: EvalPrediction) -> tuple[list[str], list[bool]]:
        found = [finished_ids(row, tokenizer.eos_token_id, forced) for row in prediction.predictions]
        decoded = tokenizer.batch_decode(
            [ids for ids, _ in found], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [text.strip() for text in decoded], [ended for _, ended in found]

    def score(prediction: EvalPrediction, encoded: Dataset) -> dict[str, float]:
        predicted, ended = texts_of(prediction)
        found = scores(bleu, predicted, gold["validation"][: len(encoded)], fast=True)
        return found | {"hit_max_length": ended.count(False) / len(ended)}

    first = gold["validation"][:1]
    check_best_metric(args, scores(bleu, first, first, fast=True) if args.predict_with_generate else ())
    quick = args.eval_generate_samples if args.predict_with_generate else None
    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"].select(range(min(quick or len(rows["validation"]), len(rows["validation"])))),
        processing_class=tokenizer,
        data_collator=collator,
        compute_metrics=score,
    )

    # Train
    run.start()
    with run.phase("train"):
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    args.predict_with_generate = True
    metrics = {}

    # Test
    trainer.compute_metrics = None
    for scored, name in (("eval", "validation"), ("test", "test")):
        if name not in rows:
            continue
        with run.phase(scored):
            output = trainer.predict(rows[name], metric_key_prefix=scored)
        predicted, ended = texts_of(output)
        copied = scores(bleu, data[name]["source"][:], gold[name])
        own = scores(bleu, predicted, gold[name]) | {f"copy_{k}": v for k, v in copied.items()}
        own |= {"hit_max_length": ended.count(False) / len(ended), "samples": len(ended)}
        if data_args.group_column_name:
            own |= by_group(bleu, predicted, gold[name], data[name]["group"][:])
        if name == "test" and data_args.compare_to:
            own |= compare(bleu, compared, predicted, gold[name])
        own = output.metrics | {f"{scored}_{key}": value for key, value in own.items()}
        trainer.save_metrics(scored, own)
        metrics |= own
        write_json_lines(Path(args.output_dir, f"predictions_{name}.jsonl"), predictions(data[name], predicted, ended))
    scored = "test" if "test" in rows else "eval"
    signature = signatures(bleu, predicted, gold["test" if scored == "test" else "validation"])
    print_scores(metrics, scored, signature["bleu"])

    # Save
    trainer.model = merge(trainer.model, args.output_dir, save=args.should_save)
    headline = {name: metrics[f"{scored}_{name}"] for name in HEADLINE}
    write_model_card(
        args.output_dir,
        task="translation",
        base_model=model_args.model_name_or_path,
        scores=headline,
        split=scored,
        record=run.record,
        usage=USAGE.format(folder=args.output_dir),
    )
    trainer.save_model(_internal_call=True)  # which leaves the push for when all is there
    run.finish(scores=metrics, signatures=signature)
    if args.push_to_hub:
        trainer.push_to_hub()
    return metrics


if __name__ == "__main__":
    command_line(main)
