"""Train a tokenizer on the texts of the run, and create a model with random weights."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from common.args import ModelArguments
from common.data.tokens import set_special_tokens
from common.errors import InputError, in_main_process, one_line, tell
from common.models.load import LoadedModel, load_config, load_tokenizer, resolve_model
from common.models.sizes import check_length, check_vocabulary
from common.models.structure import set_dropout

#: kind of tokenizer -> model and trainer
MODELS = {
    "wordpiece": (models.WordPiece, trainers.WordPieceTrainer),
    "bpe": (models.BPE, trainers.BpeTrainer),
    "unigram": (models.Unigram, trainers.UnigramTrainer),
}
#: layers, width and heads
SIZES = {"tiny": (2, 128, 2), "small": (6, 384, 6), "base": (12, 768, 12)}


@dataclass
class ScratchArguments:
    """Start from random weights. Each of these arguments, except `vocab_size`, selects a new model."""

    _argument_group_name = "from scratch"

    tokenizer_train: Literal["wordpiece", "bpe", "unigram"] | None = field(
        default=None,
        metadata={
            "help": "train a tokenizer of this kind on the training texts; unigram differs a little each time",
            "resume": "fixed",
        },
    )
    vocab_size: int = field(
        default=8000,
        metadata={"help": "maximum tokens of the new tokenizer, special tokens included", "resume": "fixed"},
    )
    model_size: Literal["tiny", "small", "base"] | None = field(
        default=None,
        metadata={
            "help": "new model of 2, 6 or 12 layers, 128, 384 or 768 wide; default: as --model_name_or_path",
            "resume": "fixed",
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "configuration values of a new model, such as: num_hidden_layers=4,hidden_size=256",
            "resume": "fixed",
        },
    )

    def __post_init__(self) -> None:
        if self.vocab_size < 300:
            raise InputError(f"--vocab_size {self.vocab_size}: must be at least 300")

    @property
    def from_scratch(self) -> bool:
        """Return whether the arguments select a new model."""
        return any(getattr(self, f.name) for f in fields(self) if f.name != "vocab_size")


def train_tokenizer(args: ScratchArguments, texts: Dataset, special: dict[str, str]) -> PreTrainedTokenizerFast:
    """Train a cased tokenizer in the main process.

    WordPiece: Schuster and Nakajima 2012; byte-level BPE: Radford et al. 2019; Unigram: Kudo 2018,
    https://arxiv.org/abs/1804.10959.

    Args:
        args: `--tokenizer_train` and `--vocab_size`, the most entries.
        texts: training texts, in column `text`.
        special: role (pad, unk, cls, sep, mask; or bos, eos) -> special token. cls and sep enclose each text.
    """
    kind = args.tokenizer_train
    assert kind is not None
    trained = learn(_untrained(kind), kind, args.vocab_size, special, texts["text"])
    if "cls" in special:
        cls, sep = special["cls"], special["sep"]
        trained.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(token, trained.token_to_id(token)) for token in (cls, sep)],
        )
    tell(f"--tokenizer_train {kind}: {trained.get_vocab_size():,} tokens")
    roles = {f"{role}_token": token for role, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=trained, **roles)


def load_or_train_tokenizer(
    args: ScratchArguments,
    model_args: ModelArguments,
    texts: Callable[[], Dataset],
    special: dict[str, str],
    checkpoint: str | None,
) -> PreTrainedTokenizerFast:
    """Train the tokenizer of `--tokenizer_train`, or load the one of `--model_name_or_path`.

    Args:
        args: kind and size of a new tokenizer.
        model_args: names the checkpoint.
        texts: returns the training texts.
        special: see `train_tokenizer`.
        checkpoint: folder with the new tokenizer of a resumed run; None for a new run.
    """
    allowed = model_args.allow_special_tokens
    if args.tokenizer_train and checkpoint is None:
        tokenizer = train_tokenizer(args, texts(), special)
        set_special_tokens(tokenizer, allowed)
        return tokenizer
    trained = checkpoint if args.tokenizer_train else None
    path = trained or resolve_model(model_args.model_name_or_path, model_args.model_revision)
    return load_tokenizer(path, allowed, one_side=False)


def _untrained(kind: str) -> Tokenizer:
    """Return an untrained tokenizer that splits texts into words and joins them."""
    tokenizer = Tokenizer(MODELS[kind][0]())
    if kind == "wordpiece":
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
    elif kind == "bpe":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def learn(
    tokenizer: Tokenizer,
    kind: str,
    vocab_size: int,
    special: dict[str, str],
    texts: Iterable[str],
    on_bytes: bool | None = None,
) -> Tokenizer:
    """Train `tokenizer` in the main process and return the trained tokenizer in each process.

    WordPiece and BPE learn the same tokens each time. Unigram adds floats in another order in each process, so that a
    few tokens differ.

    Args:
        tokenizer: an untrained tokenizer that splits texts into words.
        kind: a key of `MODELS`.
        vocab_size: most tokens.
        special: role -> special token, `unk` included. Special tokens get the first ids.
        texts: training texts, which WordPiece reads twice.
        on_bytes: words consist of bytes (`pre_tokenizers.ByteLevel`), and all bytes become tokens; if None, for BPE
            only.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "special_tokens": list(special.values()),
        "show_progress": False,
    }
    if kind == "bpe" if on_bytes is None else on_bytes:
        settings["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    if kind == "unigram":
        settings["unk_token"] = special["unk"]
    if kind == "wordpiece":
        tokenizer.model.unk_token = special["unk"]

    def in_one_process() -> str:
        if kind != "wordpiece":
            tokenizer.train_from_iterator(texts, MODELS[kind][1](**settings))
            return tokenizer.to_str()
        # Of pairs of equal counts, the one with the lowest ids is merged first. Characters inside words get their ids
        # in the order of a hash map, which differs between processes, but special tokens in the order given.
        tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(**settings | {"vocab_size": 0}))
        inner = sorted(token for token in tokenizer.get_vocab() if len(token) == 3 and token.startswith("##"))
        settings["special_tokens"] += inner
        tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(**settings))
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in inner]
        return json.dumps(state)

    return Tokenizer.from_str(in_main_process(in_one_process))


def new_model(
    auto_class: type[Any],
    family: type[PretrainedConfig],
    args: ScratchArguments,
    model_args: ModelArguments,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    dropout: float | None = None,
) -> LoadedModel:
    """Create a model with weights from the global random state.

    Args:
        auto_class: class of the model, such as `AutoModelForCausalLM`.
        family: configuration class for `--model_size`; without it the configuration of `--model_name_or_path` is used.
        args: `--model_size` and `--config_overrides`.
        model_args: names the checkpoint, and the attention kernel.
        tokenizer: sets the size of the vocabulary and the special tokens.
        max_length: longest input, in tokens.
        dropout: see `set_dropout`.

    Raises:
        InputError: `--config_overrides` is invalid, the model reads fewer tokens, or `--after` names a trained model.
    """
    if model_args.after is not None:
        raise InputError(f"--after {model_args.after}: a new model forgets it; leave --after or the new model out")
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}
    config = (
        family()
        if args.model_size
        else load_config(resolve_model(model_args.model_name_or_path, model_args.model_revision))
    )
    if args.model_size:
        set_size(config, args.model_size)
        config.update({"max_position_embeddings": max(512, max_length)})
    config.update({"vocab_size": len(tokenizer), "allow_special_tokens": model_args.allow_special_tokens} | ids)
    for name, value in overrides(args.config_overrides, config).items():
        setattr(config, name, value)
    if model_args.attention_dropout is not None:
        raise InputError(
            "--attention_dropout: does not apply to a new model; use --config_overrides attention_dropout=VALUE"
        )
    kernel = None if model_args.attn_implementation == "auto" else model_args.attn_implementation
    try:
        model = auto_class.from_config(config, attn_implementation=kernel, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(
            f"--config_overrides: invalid model configuration: {one_line(error)}; change the values"
        ) from None
    check_vocabulary(model, tokenizer, "--config_overrides")
    check_length(model, "the new model", "max_seq_length", max_length)
    size = model.num_parameters() / 1e6
    tell(f"new {config.model_type} model: {size:.1f} million parameters, no pretrained weights")
    set_dropout(model, dropout, model_args.attention_dropout)
    return LoadedModel(model, tokenizer, read_length=max_length, attn_implementation=kernel)


def set_size(config: PretrainedConfig, size: str) -> None:
    """Set the layers, width and heads of `--model_size` in a configuration."""
    layers, width, heads = SIZES[size]
    config.update({"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads})
    if hasattr(config, "intermediate_size"):
        config.intermediate_size = 4 * width


def overrides(words: str | None, config: PretrainedConfig) -> dict[str, Any]:
    """Parse `--config_overrides` into name -> value, with the types of the configuration.

    Raises:
        InputError: the configuration lacks a name, or a value has another type.
    """
    changes: dict[str, Any] = {}
    for word in (words or "").split(","):
        if not word.strip():
            continue
        name, equals, text = word.strip().partition("=")
        if not equals or not hasattr(config, name):
            raise InputError(
                f"--config_overrides {word.strip()}: unknown; give NAME=VALUE of a {config.model_type} config"
            )
        try:
            value = json.loads(text.lower() if text in ("True", "False") else text)
        except ValueError:
            value = text
        before = getattr(config, name)
        fits = isinstance(value, (int, float)) if isinstance(before, float) else isinstance(value, type(before))
        if before is not None and (not fits or isinstance(value, bool) != isinstance(before, bool)):
            raise InputError(f"--config_overrides {name}={text}: must have the type of {before!r}")
        changes[name] = float(value) if isinstance(before, float) else value
    return changes
