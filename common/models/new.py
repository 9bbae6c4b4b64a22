"""From nothing: a tokenizer trained on the texts of the run, and a model of a chosen size with random weights."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from common.args import ModelArguments
from common.errors import InputError, in_main_process, one_line, tell
from common.models.load import LoadedModel, load_config, load_tokenizer, resolve_model
from common.models.structure import set_dropout

#: kinds of tokenizers, and how each is learned
MODELS = {
    "wordpiece": (models.WordPiece, trainers.WordPieceTrainer),
    "bpe": (models.BPE, trainers.BpeTrainer),
    "unigram": (models.Unigram, trainers.UnigramTrainer),
}
#: layers, width and heads
SIZES = {"tiny": (2, 128, 2), "small": (6, 384, 6), "base": (12, 768, 12)}


@dataclass
class ScratchArguments:
    """Beginning without a checkpoint: giving any of these starts from random weights."""

    _argument_group_name = "from scratch"

    tokenizer_train: Literal["wordpiece", "bpe", "unigram"] | None = field(
        default=None, metadata={"help": "train a tokenizer of this kind on the training texts", "resume": "fixed"}
    )
    vocab_size: int = field(
        default=8000, metadata={"help": "sub-tokens of that tokenizer, special ones included", "resume": "fixed"}
    )
    model_size: Literal["tiny", "small", "base"] | None = field(
        default=None,
        metadata={"help": "2, 6 or 12 layers, 128, 384 or 768 wide; else as --model_name_or_path", "resume": "fixed"},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "values of the configuration, such as: num_hidden_layers=4,hidden_size=256",
            "resume": "fixed",
        },
    )

    def __post_init__(self) -> None:
        if self.vocab_size < 300:
            raise InputError(f"--vocab_size {self.vocab_size}: must be at least 300")

    @property
    def from_scratch(self) -> bool:
        return any(getattr(self, f.name) for f in fields(self) if f.name != "vocab_size")


def train_tokenizer(args: ScratchArguments, texts: Dataset, special: dict[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer of kind `--tokenizer_train` with `--vocab_size` entries at most, trained on column `text`.

    WordPiece: Schuster and Nakajima 2012; byte-level BPE: Radford et al. 2019; Unigram: Kudo 2018,
    https://arxiv.org/abs/1804.10959. `special` maps roles (pad, unk, cls, sep, mask; or bos, eos) to special tokens, of
    which cls and sep are put around each text. Case is kept. On several processes the main one trains.
    """
    batches = (texts[i : i + 1000]["text"] for i in range(0, len(texts), 1000))
    trained = learn(_untrained(args.tokenizer_train), args.tokenizer_train, args.vocab_size, special, batches)
    if "cls" in special:
        cls, sep = special["cls"], special["sep"]
        trained.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(token, trained.token_to_id(token)) for token in (cls, sep)],
        )
    tell(f"--tokenizer_train {args.tokenizer_train}: {trained.get_vocab_size():,} sub-tokens")
    roles = {f"{role}_token": token for role, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=trained, **roles)


def load_or_train_tokenizer(
    args: ScratchArguments,
    model_args: ModelArguments,
    texts: Callable[[], Dataset],
    special: dict[str, str],
    checkpoint: str | None,
) -> PreTrainedTokenizerFast:
    """Train the tokenizer that `--tokenizer_train` asks for on `texts()`, or load that of the checkpoint.

    A run that is resumed from `checkpoint` takes the tokenizer that it trained before.
    """
    if args.tokenizer_train and checkpoint is None:
        return train_tokenizer(args, texts(), special)
    own = checkpoint if args.tokenizer_train else None
    return load_tokenizer(own or resolve_model(model_args.model_name_or_path, model_args.model_revision))


def _untrained(kind: str) -> Tokenizer:
    """How texts are cut into words, and put together again, by a tokenizer of a language model."""
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
    texts: Iterable[str] | Iterable[list[str]],
    on_bytes: bool | None = None,
) -> Tokenizer:
    """`tokenizer`, which knows how to cut texts into words, with `vocab_size` sub-tokens at most learned from `texts`.

    `kind` is one of `MODELS`; `special` maps roles, `unk` among them, to tokens, which come first. `on_bytes`: words
    are of bytes (`pre_tokenizers.ByteLevel`), all of which it must know; of BPE when not given. On several processes
    the main one learns.
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
        tokenizer.train_from_iterator(texts, MODELS[kind][1](**settings))
        return tokenizer.to_str()

    return Tokenizer.from_str(in_main_process(in_one_process))


def new_model(
    auto_class: type,
    family: type[PretrainedConfig],
    args: ScratchArguments,
    model_args: ModelArguments,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    dropout: float | None = None,
) -> LoadedModel:
    """Make a model with random weights, drawn from the global random state.

    Args:
        auto_class: class of the model, such as `AutoModelForCausalLM`.
        family: configuration of `--model_size`; without that argument the one of `--model_name_or_path` is used.
        args: `--model_size` and `--config_overrides`, which changes values of the configuration.
        model_args: names the checkpoint, and the attention kernel.
        tokenizer: decides the size of the vocabulary and the special tokens.
        max_length: longest input, in tokens.
        dropout: see `set_dropout`.

    Raises:
        InputError: `--config_overrides` names a value that the configuration lacks, or makes no model.
    """
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}
    config = (
        family()
        if args.model_size
        else load_config(resolve_model(model_args.model_name_or_path, model_args.model_revision))
    )
    if args.model_size:
        layers, width, heads = SIZES[args.model_size]
        sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
        config.update(sizes | {"max_position_embeddings": max(512, max_length)})
        if hasattr(config, "intermediate_size"):
            config.intermediate_size = 4 * width
    config.update({"vocab_size": len(tokenizer)} | ids)
    for name, value in overrides(args.config_overrides, config).items():
        setattr(config, name, value)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise InputError(f"--max_seq_length {max_length}: the model would read {positions} sub-tokens at most")
    if model_args.attention_dropout is not None:
        raise InputError("--attention_dropout: with a new model give it in --config_overrides")
    kernel = None if model_args.attn_implementation == "auto" else model_args.attn_implementation
    try:
        model = auto_class.from_config(config, attn_implementation=kernel, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(f"invalid model configuration: {one_line(error)}") from None
    tell(f"a new {config.model_type} model of {model.num_parameters() / 1e6:.1f} million parameters, drawn by the seed")
    set_dropout(model, dropout, model_args.attention_dropout)
    return LoadedModel(model, tokenizer, read_length=max_length, attn_implementation=kernel)


def overrides(words: str | None, config: PretrainedConfig) -> dict[str, Any]:
    """Names and values of `--config_overrides`, of the types that the configuration has."""
    found: dict[str, Any] = {}
    for word in (words or "").split(","):
        if not word.strip():
            continue
        name, equals, text = word.strip().partition("=")
        if not equals or not hasattr(config, name):
            raise InputError(f"--config_overrides {word.strip()}: needed: name=value, of a {config.model_type} model")
        try:
            value = json.loads(text.lower() if text in ("True", "False") else text)
        except ValueError:
            value = text
        before = getattr(config, name)
        fits = isinstance(value, (int, float)) if isinstance(before, float) else isinstance(value, type(before))
        if before is not None and (not fits or isinstance(value, bool) != isinstance(before, bool)):
            raise InputError(f"--config_overrides {name}={text}: must be of the kind of {before!r}")
        found[name] = float(value) if isinstance(before, float) else value
    return found
