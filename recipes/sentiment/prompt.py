"""Train the MLM head on few rows to fill in the word of the class in a pattern (PET).

Schick and Schuetze 2021 (https://arxiv.org/abs/2001.07676), with the loss over the words of the classes as in Gao et
al. 2021 (LM-BFF, https://arxiv.org/abs/2012.15723). The tokenizer puts the pattern around each text as it puts [CLS]
and [SEP], so the saved tokenizer holds the pattern, and a long text is cut to leave room for it. The classifier gets
the trained encoder; the words of the MLM head have no place in it, and its head is fitted anew.
"""

import re
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForMaskedLM, DataCollatorWithPadding, PreTrainedTokenizerFast

from common.args import ModelArguments, SpeedArguments, TrainingArguments
from common.data.tokens import ends_of
from common.errors import InputError, brief, tell
from common.models.load import LoadedModel, load_model
from common.speed import apply
from common.speed.head import scores_of

from .steps import shuffled, train_steps

#: rows of a batch
SIZE = 16
RATE = 1e-4
PATTERN, PAIR_PATTERN = "{text} It was [MASK].", "{text} ? [MASK] , {text_pair}"
MASK = "[MASK]"
_PARTS = re.compile(r"(\{text\}|\{text_pair\}|\[MASK\])")


def with_pattern(tokenizer: PreTrainedTokenizerFast, pattern: str | None, pair: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer that reads each text, or each pair of texts, in a pattern.

    Args:
        tokenizer: the tokenizer of an encoder with a mask token.
        pattern: text with `{text}`, `[MASK]` and for pairs `{text_pair}`; None for the default.
        pair: whether a row has two texts.

    Raises:
        InputError: the tokenizer has no mask token, or a part of the pattern is missing, repeated or unknown.
    """
    if tokenizer.mask_token is None:
        raise InputError("--few_shot prompt: the tokenizer has no mask token; give an encoder with an MLM head")
    pattern = pattern or (PAIR_PATTERN if pair else PATTERN)
    parts = [part for part in _PARTS.split(pattern.replace(tokenizer.mask_token, MASK)) if part.strip()]
    needed = ["{text}", MASK, *(["{text_pair}"] if pair else [])]
    for part in needed:
        if parts.count(part) != 1:
            raise InputError(f"--pattern {pattern!r}: has {parts.count(part)} times {part}; write it once")
    unknown = [part for part in parts if part not in needed and re.search(r"\{\w*\}", part)]
    if unknown:
        raise InputError(f"--pattern {pattern!r}: {brief(unknown[0])} is no column; use {' and '.join(needed)}")
    before, after = ends_of(tokenizer)
    template, pieces = ["before"], {"before": before, "after": after, "mask": [tokenizer.mask_token_id]}
    for number, part in enumerate(parts):
        if part in ("{text}", "{text_pair}"):
            template.append("$A" if part == "{text}" else "$B:0")
        elif part == MASK:
            template.append("mask")
        else:
            template.append(f"words{number}")
            pieces[f"words{number}"] = tokenizer(part.rstrip(), add_special_tokens=False)["input_ids"]
    special = [{"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)} for name, ids in pieces.items()]
    backend = tokenizer.backend_tokenizer
    single = None if pair else [*template, "after"]
    backend.post_processor = TemplateProcessing(
        single=single or "$A", pair=[*template, "after"] if pair else "$A $B", special_tokens=special
    )
    # the tokenizer class of a checkpoint, such as BertTokenizer, would replace the template when it is loaded
    plain = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        **tokenizer.special_tokens_map,
    )
    plain.split_special_tokens = tokenizer.split_special_tokens
    return plain


def words_of(labels: list[str], verbalizer: list[str] | None, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the token of the word of each class.

    Args:
        labels: the names of the classes, which are their words without `verbalizer`.
        verbalizer: `label=word` for some classes or all.
        tokenizer: the tokenizer.

    Raises:
        InputError: a word has several tokens or none, two classes have one word, or a label is unknown.
    """
    words = {label: label.lower() for label in labels}
    for given in verbalizer or []:
        label, equals, word = given.rpartition("=")
        if not equals or not word.strip():
            raise InputError(f"--verbalizer {given}: must be label=word, such as positive=great")
        if label not in words:
            raise InputError(f"--verbalizer {given}: no class {label!r}; the classes: {', '.join(labels)}")
        words[label] = word.strip()
    tokens: dict[str, int] = {}
    for label, word in words.items():
        # after a space, as in the pattern, a word of a BPE tokenizer is another token
        ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            pieces = " ".join(tokenizer.convert_ids_to_tokens(ids))
            raise InputError(
                f"--verbalizer: the word of class {label}, {word!r}, is {len(ids)} tokens ({pieces}); needed: one "
                f'known token; give another word: --verbalizer "{label}=WORD"'
            )
        if ids[0] in tokens.values():
            raise InputError(f"--verbalizer: {word!r} is the word of two classes; give class {label} another")
        tokens[label] = ids[0]
    return list(tokens.values())


class Prompted:
    """An MLM that answers with the word of a class at the mask of each row.

    Attributes:
        model: the model; its head computes only the masks.
        words: the token of the word of each class.
    """

    def __init__(self, loaded: LoadedModel, tokenizer: PreTrainedTokenizerFast, words: list[int], speed: str):
        """Take the model `loaded` and the tokenizer with the pattern."""
        self.model, self.tokenizer, self.words = loaded.model, tokenizer, words
        self.speed = apply(loaded, SpeedArguments(speed=speed))
        self.collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=loaded.pad_multiple)

    def logits(self, rows: Dataset) -> Tensor:
        """Return the scores of the words of the classes for encoded rows, in float32, (rows, classes)."""
        names = [name for name in self.tokenizer.model_input_names if name in rows.column_names]
        batch = self.collate(rows.select_columns(names).to_list()).to(self.model.device)
        at = batch["input_ids"] == self.tokenizer.mask_token_id
        with self.speed.at_labels(batch["input_ids"].masked_fill(~at, -100), scores=True):
            scores = scores_of(self.model(**batch))
        scores = scores[at] if scores.shape[:2] == at.shape else scores[0]
        return scores[:, self.words].float()

    @torch.inference_mode()
    def probabilities(self, rows: Dataset, bf16: bool) -> np.ndarray:
        """Return the probability of each class for encoded rows, (rows, classes)."""
        self.model.eval()
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=bf16):
            parts = [self.logits(rows.select(range(i, min(i + 64, len(rows))))) for i in range(0, len(rows), 64)]
        return torch.cat(parts).softmax(-1).cpu().numpy()


def load_prompted(
    model_args: ModelArguments, tokenizer: PreTrainedTokenizerFast, words: list[int], length: int, speed: str
) -> Prompted:
    """Load the encoder of `model_args` with its MLM head.

    Raises:
        InputError: the checkpoint has no MLM head.
    """
    mlm = load_model(AutoModelForMaskedLM, model_args, None, length)
    if mlm.new_parameters:
        name = model_args.model_name_or_path
        raise InputError(
            f"--few_shot prompt: {name} has no MLM head; make one from texts by: make mlm "
            f'ARGS="--model_name_or_path {name} --train_file texts.txt", then give --model_name_or_path outputs/mlm'
        )
    return Prompted(mlm, tokenizer, words, speed)


def train_prompted(
    prompted: Prompted, rows: Dataset, steps: int | None, rate: float | None, args: TrainingArguments
) -> None:
    """Train `prompted` in place by the cross-entropy over the words of the classes.

    Args:
        prompted: the model.
        rows: encoded rows with `labels`, the number of the class.
        steps: number of steps; by the number of rows for None.
        rate: highest learning rate; `RATE` for None.
        args: see `train_steps`.
    """
    gold = torch.tensor(rows["labels"][:], device=args.device)
    prompted.model.to(args.device)
    steps, size = steps or default_steps(len(rows)), min(SIZE, len(rows))
    order = shuffled(range(len(rows)), np.random.default_rng(args.seed))
    batches = (np.array(list(islice(order, size))) for _ in range(steps))
    tell(f"prompt training: {steps} steps of {size} of {len(rows):,} rows")
    loss = train_steps(
        prompted.model,
        batches,
        lambda batch: F.cross_entropy(prompted.logits(rows.select(batch)), gold[batch]),
        steps,
        rate or RATE,
        args,
    )
    tell(f"prompt training: loss of the last step {loss:.4f}")


def default_steps(rows: int) -> int:
    """Return the number of steps for a number of rows."""
    return max(50, 5 * rows // SIZE)
