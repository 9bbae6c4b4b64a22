"""Masked language modelling: go on pretraining an encoder on text of your own, or pretrain one from nothing.

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
from typing import Literal

from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, BertConfig, set_seed

from common.args import ModelArguments, check_best_metric
from common.cli import command_line, parse
from common.data.corpus import SHORTEST_TEXT, CorpusArguments, encode, ends_of, load_corpus, load_texts, to_blocks
from common.data.packing import find_blocks
from common.data.stream import TextStream, check_streaming, open_texts
from common.errors import InputError
from common.models.load import load_model, load_tokenizer, resolve_model
from common.models.new import ScratchArguments, new_model, train_tokenizer
from common.models.structure import set_dropout
from common.run.folder import Run
from common.run.report import draw_curve, print_perplexities, write_json_lines, write_model_card
from common.training import LanguageArguments, LanguageTrainer, losses_at_labels
from common.tuning import TuningArguments, merge, tune

from .filling import Filler, compare_fills, sentences_with_a_gap
from .heads import begin_as_identity
from .masking import MaskedBatches, Masker, Masking, masked_once, word_marks
from .pairs import check_pair_head, pair_hits, pair_losses, to_pairs

HERE = Path(__file__).resolve().parent
USAGE = """from transformers import pipeline

fill = pipeline("fill-mask", model="{folder}")
fill(f"The function returns a {{fill.tokenizer.mask_token}} of integers.")"""
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}  # of a new tokenizer


@dataclass
class MlmDataArguments(CorpusArguments):
    forgetting_file: str | None = field(
        default=None, metadata={"help": "texts of another kind, evaluated before and after: what is forgotten"}
    )
    objective: Literal["mlm", "mlm+nsp", "mlm+sop"] = field(
        default="mlm", metadata={"help": "masks alone, or also: is a second segment the next, are two in order"}
    )
    masking: Masking = field(default="token", metadata={"help": "what is masked as one: token, whole_word, span"})
    mlm_probability: float = field(default=0.15, metadata={"help": "share of the sub-tokens that are masked"})
    eval_mlm_probability: float = field(default=0.15, metadata={"help": "the same in evaluations, always of tokens"})
    mask_replaced: float = field(default=0.8, metadata={"help": "share of the masked that becomes the mask token"})
    mask_random: float = field(default=0.1, metadata={"help": "share of the masked that becomes a random sub-token"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.forgetting_file:
            self.check_path("forgetting_file", self.forgetting_file)
        if self.streaming and self.objective != "mlm":
            raise InputError(f"--objective {self.objective}: pairs are made of all texts, so not with --streaming")
        for name in ("mlm_probability", "eval_mlm_probability"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must lie between 0 and 1")
        if min(self.mask_replaced, self.mask_random) < 0 or self.mask_replaced + self.mask_random > 1:
            raise InputError("--mask_replaced and --mask_random: shares of at least 0 that together are at most 1")


@dataclass
class MlmTrainingArguments(LanguageArguments):
    output_dir: str | None = field(default=f"outputs/{HERE.name}", metadata={"help": "where model and results go"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "peak of the schedule; 1e-3 in full, 5e-3 under LoRA, ... when not given"}
    )
    num_train_epochs: float = field(default=1.5, metadata={"help": "passes over the training texts"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "rows a device takes at a time"})


ARGUMENTS = (ModelArguments, ScratchArguments, MlmDataArguments, TuningArguments, MlmTrainingArguments)


def main(argv: list[str] | None = None) -> dict[str, float]:
    # Arguments
    model_args, scratch_args, data_args, tuning_args, args = parse(ARGUMENTS, argv, __doc__)
    tuning_args.check_pretrained(new=scratch_args.from_scratch)
    if args.learning_rate is None:  # that of full is high already
        args.learning_rate = min(tuning_args.rate(full=1e-3), 5e-3)
    check_streaming(data_args, args)
    if data_args.pack_as == "blocks" and model_args.attn_implementation == "auto":
        model_args.attn_implementation = "sdpa"
    set_seed(args.seed)
    if args.r_drop and data_args.objective != "mlm":
        raise InputError("--r_drop: for masked sub-tokens alone; give --objective mlm")

    # Data
    stream = open_texts(data_args) if data_args.streaming else None
    texts = stream.splits if stream else load_corpus(data_args)
    if data_args.forgetting_file:
        texts["forgetting"] = load_texts(data_args.forgetting_file, data_args)
    rows = {**texts, "train": stream.names()} if stream else texts
    run = Run(args, data_args, model_args, scratch_args, tuning_args, rows=rows)

    # Model
    if scratch_args.tokenizer_train and not args.resume_from_checkpoint:
        tokenizer = train_tokenizer(scratch_args, stream.sample(data_args) if stream else texts["train"], SPECIAL)
    else:  # a run that goes on has its own tokenizer
        own = args.resume_from_checkpoint if scratch_args.tokenizer_train else None
        tokenizer = load_tokenizer(own or resolve_model(model_args.model_name_or_path, model_args.model_revision))
    if tokenizer.mask_token is None:
        raise InputError(f"{model_args.model_name_or_path}: its tokenizer has no mask token; take an encoder")
    length, in_pairs = data_args.max_seq_length, data_args.objective != "mlm"
    auto_class = AutoModelForPreTraining if in_pairs else AutoModelForMaskedLM
    if scratch_args.from_scratch:
        loaded = new_model(auto_class, BertConfig, scratch_args, model_args, tokenizer, length)
    else:
        loaded = load_model(auto_class, model_args, None, length, quantize=tuning_args.quantize)
        begin_as_identity(loaded)
    model = loaded.model
    if in_pairs:
        check_pair_head(model)
    set_dropout(model, args.dropout, model_args.attention_dropout)
    model.config.max_seq_length = length  # saved with the model, so that predict reads as much
    blocks_taken = None if in_pairs else find_blocks(model, data_args.pack_as, causal=False)
    tuned = tune(loaded, tuning_args, None)  # peft has no name for this task
    if in_pairs:
        blocks = to_pairs(texts, tokenizer, length, data_args.objective)
    else:
        blocks = to_blocks(texts, tokenizer, data_args, word_marks)
    if stream:
        encoded = partial(encode, tokenizer=tokenizer, marks=word_marks)
        blocks["train"] = TextStream(stream, encoded, ends_of(tokenizer), SHORTEST_TEXT, data_args, args)
    shares = data_args.mask_replaced, data_args.mask_random
    evaluated = {"masker": Masker(tokenizer, "token", data_args.eval_mlm_probability, *shares)}
    for split in blocks:
        if split != "train":
            blocks[split] = blocks[split].map(masked_once, batched=True, fn_kwargs=evaluated)

    # Trainer
    check_best_metric(args, ("perplexity", "accuracy", *(("pair_accuracy",) if in_pairs else ())))
    masker = Masker(tokenizer, data_args.masking, data_args.mlm_probability, *shares)
    trainer = LanguageTrainer(
        model=tuned,
        args=args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        data_collator=MaskedBatches(masker, tokenizer.pad_token_id, args.seed, blocks_taken),
        losses={"labels": losses_at_labels} | ({"pair": pair_losses} if in_pairs else {}),
        preprocess_logits_for_metrics={"pair": pair_hits},
    )
    filler = Filler(model, tokenizer, trainer.speed, length)
    gaps = sentences_with_a_gap(texts["validation"]["text"][:], tokenizer)

    # Train
    run.start()
    with run.phase("before"):
        metrics = trainer.scores(blocks, "before")
        filled = filler([text for text, _ in gaps], top=5)
    with run.phase("train"):
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()

    # Test
    with run.phase("after"):
        metrics |= trainer.scores(blocks, "after")
        fills = compare_fills(gaps, filled, filler([text for text, _ in gaps], top=5))
    trainer.save_metrics("eval", metrics)
    print_perplexities(metrics)
    write_json_lines(Path(args.output_dir, "fill_ins.jsonl"), fills)
    draw_curve(Path(args.output_dir, "curve.png"), trainer.state.log_history, metrics["before_validation_loss"])

    # Save
    trainer.model = merge(tuned, args.output_dir, save=args.should_save)
    scored = "test" if "test" in blocks else "validation"
    write_model_card(
        args.output_dir,
        task="fill-mask",
        base_model="A new model" if scratch_args.from_scratch else model_args.model_name_or_path,
        scores={name: metrics[f"after_{scored}_{name}"] for name in ("loss", "perplexity", "accuracy")},
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
