"""Causal language modelling: pretrain a decoder on text of your own, from nothing or from a checkpoint; or tune it.

    make clm
    make clm ARGS="--train_file 'texts/**/*.txt' --model_size small --num_train_epochs 4 --output_dir outputs/mine"
    make clm ARGS="--train_file dialogues.jsonl --loss_on completion --model_name_or_path outputs/mine --lora_r 16"
    python -m recipes.clm.train --config my.yaml

The documentation of Python, a GPT-2 of two layers from nothing, 2 cores (AMD EPYC, bf16), 3.2 minutes: 1.947 bits a
byte of held-out texts, five-grams 1.990 (2026-11-23).
More in README.md.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from peft import TaskType
from transformers import AutoModelForCausalLM, GPT2Config, set_seed

from common.args import ModelArguments, check_best_metric
from common.cli import command_line, parse
from common.data.corpus import CorpusArguments, load_corpus, load_texts
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

from .completing import Completer, compare_completions, prompts_from
from .texts import (
    NextBatches,
    beginning,
    bits_of,
    check_causal,
    encode_texts,
    joined,
    load_completions,
    shortest,
    to_rows,
)

HERE = Path(__file__).resolve().parent
USAGE = """from transformers import pipeline

write = pipeline("text-generation", model="{folder}")
write("Return the", max_new_tokens=40)"""
SPECIAL = {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>"}  # of a new tokenizer


@dataclass
class ClmModelArguments(ModelArguments):
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "a decoder: local folder or hub id; begins from nothing when not given"}
    )


@dataclass
class ClmScratchArguments(ScratchArguments):
    vocab_size: int = field(default=4000, metadata={"help": "sub-tokens of that tokenizer, special ones included"})


@dataclass
class ClmDataArguments(CorpusArguments):
    forgetting_file: str | None = field(
        default=None, metadata={"help": "texts of another kind, evaluated before and after: what is forgotten"}
    )
    loss_on: Literal["all", "completion"] = field(
        default="all", metadata={"help": "all of a text, or of rows with prompt and completion the latter only"}
    )
    prompt_column_name: str = field(default="prompt", metadata={"help": "column with the prompt"})
    completion_column_name: str = field(default="completion", metadata={"help": "column with the completion"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming and self.loss_on != "all":
            raise InputError("--loss_on completion: not with --streaming")
        if self.forgetting_file:
            if self.loss_on != "all":
                raise InputError("--forgetting_file: takes texts, so not together with --loss_on completion")
            self.check_path("forgetting_file", self.forgetting_file)


@dataclass
class ClmTrainingArguments(LanguageArguments):
    output_dir: str | None = field(default=f"outputs/{HERE.name}", metadata={"help": "where model and results go"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "1e-3 from nothing, else 1e-4 in full, 1e-3 under LoRA, ... when not given"}
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "rows a device takes at a time"})
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "passes over the training texts; 10 from nothing, 2 else when not given"}
    )


ARGUMENTS = (ClmModelArguments, ClmScratchArguments, ClmDataArguments, TuningArguments, ClmTrainingArguments)


def main(argv: list[str] | None = None) -> dict[str, float]:
    # Arguments
    model_args, scratch_args, data_args, tuning_args, args = parse(ARGUMENTS, argv, __doc__)
    if model_args.model_name_or_path is None:
        scratch_args.tokenizer_train = scratch_args.tokenizer_train or "bpe"
        scratch_args.model_size = scratch_args.model_size or "tiny"
    tuning_args.check_pretrained(new=scratch_args.from_scratch)
    if args.num_train_epochs is None:
        args.num_train_epochs = 10 if scratch_args.from_scratch else 2
    if args.learning_rate is None:
        args.learning_rate = 1e-3 if scratch_args.from_scratch else tuning_args.rate(full=1e-4)
    check_streaming(data_args, args)
    if data_args.pack_as == "blocks" and model_args.attn_implementation == "auto":
        model_args.attn_implementation = "sdpa"
    set_seed(args.seed)

    # Data
    stream = open_texts(data_args) if data_args.streaming else None
    if data_args.loss_on == "completion":
        columns = {"prompt": data_args.prompt_column_name, "completion": data_args.completion_column_name}
        texts = load_completions(data_args, columns)
    else:
        texts = stream.splits if stream else load_corpus(data_args)
    if data_args.forgetting_file:
        texts["forgetting"] = load_texts(data_args.forgetting_file, data_args)
    rows = {**texts, "train": stream.names()} if stream else texts
    run = Run(args, data_args, model_args, scratch_args, tuning_args, rows=rows)

    # Model
    if scratch_args.tokenizer_train and not args.resume_from_checkpoint:
        learned = stream.sample(data_args) if stream else texts["train"]
        if data_args.loss_on == "completion":
            learned = learned.map(joined)
        tokenizer = train_tokenizer(scratch_args, learned, SPECIAL)
    else:  # a run that goes on has its own tokenizer
        own = args.resume_from_checkpoint if scratch_args.tokenizer_train else None
        tokenizer = load_tokenizer(own or resolve_model(model_args.model_name_or_path, model_args.model_revision))
    length = data_args.max_seq_length
    if scratch_args.from_scratch:
        loaded = new_model(AutoModelForCausalLM, GPT2Config, scratch_args, model_args, tokenizer, length)
        loaded.model.config.max_seq_length = (
            length  # saved with it, so that predict goes no further than it was trained
        )
    else:
        loaded = load_model(AutoModelForCausalLM, model_args, None, length, quantize=tuning_args.quantize)
    model = loaded.model
    check_causal(model)
    set_dropout(model, args.dropout, model_args.attention_dropout)
    blocks_taken = find_blocks(model, data_args.pack_as, causal=True)
    tuned = tune(loaded, tuning_args, TaskType.CAUSAL_LM)
    blocks = to_rows(texts, tokenizer, data_args, data_args.loss_on)
    if stream:
        encoded, ends = partial(encode_texts, tokenizer=tokenizer), (beginning(tokenizer), [])
        blocks["train"] = TextStream(stream, encoded, ends, shortest(tokenizer), data_args, args)

    # Trainer
    check_best_metric(args, ("perplexity", "accuracy"))
    trainer = LanguageTrainer(
        model=tuned,
        args=args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        data_collator=NextBatches(tokenizer.pad_token_id, blocks_taken),
        losses=losses_at_labels,
    )
    completer = Completer(model, tokenizer, length)
    prompts = prompts_from(texts["validation"][:])

    # Train
    run.start()
    with run.phase("before"):
        metrics = trainer.scores(blocks, "before")
        completed = completer(prompts, new_tokens=24)
    with run.phase("train"):
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()

    # Test
    with run.phase("after"):
        metrics |= trainer.scores(blocks, "after")
        completions = compare_completions(prompts, completed, completer(prompts, new_tokens=24))
    scored = "test" if "test" in blocks else "validation"
    if data_args.loss_on == "all":
        metrics |= bits_of(blocks, texts, metrics, scored, tokenizer)
    trainer.save_metrics("eval", metrics)
    print_perplexities(metrics)
    write_json_lines(Path(args.output_dir, "completions.jsonl"), completions)
    draw_curve(Path(args.output_dir, "curve.png"), trainer.state.log_history, metrics["before_validation_loss"])

    # Save
    trainer.model = merge(tuned, args.output_dir, save=args.should_save)
    trainer.model.config.use_cache = True  # off while it was trained
    write_model_card(
        args.output_dir,
        task="text-generation",
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
