"""Masked language modelling: continue pretraining an encoder on your own text, or pretrain one from scratch.

    make mlm
    make mlm ARGS="--train_file 'texts/**/*.txt' --text_unit paragraph --output_dir outputs/mine"
    make mlm ARGS="--train_file texts.jsonl --forgetting_file general.txt --masking whole_word --mlm_probability 0.3"
    python -m recipes.mlm.train --config my.yaml

The documentation of Python, all-MiniLM-L6-v2 with a new head, 2 cores (Intel Xeon, bf16), 2.8 minutes: held-out
perplexity 50,428 before and 40.2 after (2026-11-28).
More in README.md.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import DatasetDict
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    BertConfig,
    set_seed,
)

from common import cli, data, models
from common.args import ModelArguments, check_best_metric
from common.errors import InputError
from common.run import Run, draw_curve, keep_trained_model, print_perplexities, write_json_lines
from common.training import LanguageArguments, LanguageTrainer, losses_at_labels
from common.tuning import TuningArguments, tune

from . import filling, masking, pairs
from .arguments import MlmDataArguments
from .heads import start_as_identity

USAGE = """from transformers import pipeline

fill = pipeline("fill-mask", model="{folder}")
fill(f"The function returns a {{fill.tokenizer.mask_token}} of integers.")"""
# special tokens of a new tokenizer
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


@dataclass
class MlmTrainingArguments(LanguageArguments):
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "peak learning rate; default: 1e-3 for full fine-tuning, 5e-3 for LoRA, ..."},
    )
    num_train_epochs: float = field(default=1.5, metadata={"help": "passes over the training texts"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "rows per device in a training batch"})


ARGUMENTS = (ModelArguments, models.ScratchArguments, MlmDataArguments, TuningArguments, MlmTrainingArguments)


def encode(
    corpus: data.Corpus, loaded: models.LoadedModel, data_args: MlmDataArguments, args: MlmTrainingArguments
) -> tuple[DatasetDict, data.Blocks | None]:
    """Encode the texts as rows of tokens or of segment pairs; return them and the packing (None if not packed).

    The collator masks the training rows anew in each epoch. The other splits are masked here, once.
    """
    tokenizer, packing = loaded.tokenizer, None
    if data_args.objective == "mlm":
        packing = data.find_blocks(loaded.model, data_args.pack_as, causal=False)
        rows = masking.encode_texts(corpus, tokenizer, data_args, args)
    else:
        pairs.check_pair_head(loaded.model)
        rows = pairs.to_pairs(corpus.texts, tokenizer, data_args.max_seq_length, data_args.objective)
    if packing:
        loaded.attn_implementation = "sdpa"  # this kernel supports block masks
    shares = data_args.mask_replaced, data_args.mask_random
    masker = masking.Masker(tokenizer, "token", data_args.eval_mlm_probability, *shares)
    masking.mask_evaluated(rows, masker)
    return rows, packing


@keep_trained_model
def main(argv: list[str] | None = None) -> dict[str, float]:
    # Arguments
    model_args, scratch_args, data_args, tuning_args, args = cli.parse(ARGUMENTS, argv, __doc__)
    tuning_args.check_pretrained(new=scratch_args.from_scratch)
    if args.learning_rate is None:  # the rate of full fine-tuning is already high
        args.learning_rate = min(tuning_args.rate(full=1e-3), 5e-3)
    in_pairs, length = data_args.objective != "mlm", data_args.max_seq_length
    if args.r_drop and in_pairs:
        raise InputError("--r_drop: does not support sentence pairs; give --objective mlm")
    set_seed(args.seed)

    # Data
    corpus = data.open_corpus(data_args, args)
    run = Run(args, data_args, model_args, scratch_args, tuning_args, rows=corpus.recorded())

    # Model
    texts = partial(corpus.training_texts, data_args)
    tokenizer = models.load_or_train_tokenizer(scratch_args, model_args, texts, SPECIAL, run.checkpoint)
    if tokenizer.mask_token is None:
        raise InputError(f"{model_args.model_name_or_path}: no mask token; give an encoder as --model_name_or_path")
    auto_class = AutoModelForPreTraining if in_pairs else AutoModelForMaskedLM
    if scratch_args.from_scratch:
        loaded = models.new_model(auto_class, BertConfig, scratch_args, model_args, tokenizer, length, args.dropout)
    else:
        options = {"quantize": tuning_args.quantize, "dropout": args.dropout}
        loaded = models.load_model(auto_class, model_args, None, length, **options)
        start_as_identity(loaded)
    loaded.model.config.max_seq_length = length  # saved with the model: predict reads as many tokens
    blocks, packing = encode(corpus, loaded, data_args, args)
    tuned = tune(loaded, tuning_args, None)  # peft has no name for this task

    # Trainer
    check_best_metric(args, ("perplexity", "accuracy", *(("pair_accuracy",) if in_pairs else ())))
    shares = data_args.mask_replaced, data_args.mask_random
    masker = masking.Masker(tokenizer, data_args.masking, data_args.mlm_probability, *shares)
    trainer = LanguageTrainer(
        model=tuned,
        args=args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        data_collator=masking.MaskedBatches(masker, tokenizer.pad_token_id, args.seed, packing, loaded.pad_multiple),
        losses={"labels": losses_at_labels} | ({"pair": pairs.pair_losses} if in_pairs else {}),
        preprocess_logits_for_metrics={"pair": pairs.pair_hits},
    )
    gaps = filling.sentences_with_a_gap(corpus.texts["validation"]["text"][:], tokenizer)
    fill = filling.gap_filler(gaps, loaded.model, tokenizer, trainer.speed, length)

    # Train
    with run.phase("before"):
        metrics = trainer.scores(blocks, "before")
        before = fill()
    run.train(trainer)

    # Test
    with run.phase("after"):
        metrics |= trainer.scores(blocks, "after")
        fills = filling.compare_fills(gaps, before, fill())
    trainer.save_metrics("eval", metrics)
    print_perplexities(metrics)
    write_json_lines(Path(args.output_dir, "fill_ins.jsonl"), fills)
    draw_curve(Path(args.output_dir, "curve.png"), trainer.state.log_history, metrics["before_validation_loss"])

    # Save
    scored = "test" if "test" in blocks else "validation"
    run.publish(
        trainer,
        task="fill-mask",
        scores=("loss", "perplexity", "accuracy"),
        split=scored,
        metrics=metrics,
        usage=USAGE.format(folder=args.output_dir),
        base_model=loaded.source or "A new model",
        example=Path(args.output_dir, "fill_ins.jsonl"),
    )
    return metrics


if __name__ == "__main__":
    cli.command_line(main)
