"""Load pretrained encoder-decoders, create new ones, and add a decoder to an encoder."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    EncoderDecoderModel,
    M2M100Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from common.args import DEFAULT_ENCODER, ModelArguments
from common.data.tokens import set_special_tokens
from common.errors import InputError, one_line, quiet, tell
from common.models.generation_settings import loadable_generation
from common.models.load import (
    LoadedModel,
    check_whole,
    load_config,
    quantization,
    read_from_left,
    read_tokenizer,
    resolve_model,
)
from common.models.new import MODELS, learn, overrides
from common.models.sizes import check_length, check_vocabulary
from common.models.structure import set_dropout, without_pooling_layer
from common.models.weights import check_fit, loading

#: layers of each side, width, heads, feed-forward width
SIZES = {"tiny": (2, 192, 3, 768), "small": (4, 256, 4, 1024), "base": (6, 512, 8, 2048)}
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
#: argument of a new model -> default
NEW_MODEL_DEFAULTS = {"tokenizer_train": "bpe", "vocab_size": 4000, "config_overrides": None}


@dataclass
class Seq2SeqModelArguments(ModelArguments):
    """Choose a pretrained encoder-decoder, an encoder with a new decoder, or a new model."""

    model_name_or_path: str | None = field(  # type: ignore[assignment]  # `__post_init__` replaces None
        default=None, metadata={"help": "local folder or hub id of an encoder-decoder; default: a new model"}
    )
    warm_start: Literal["both", "encoder"] | None = field(
        default=None,
        metadata={
            "help": "add a decoder to an encoder, with the encoder's weights (both) or random ones (encoder)",
            "resume": "fixed",
        },
    )
    from_scratch: Literal["tiny", "small", "base"] | None = field(
        default=None,
        metadata={
            "help": "new model of 2, 4 or 6 layers a side, 192, 256 or 512 wide; default: tiny",
            "resume": "fixed",
        },
    )
    tokenizer_train: Literal["bpe", "unigram"] | None = field(
        default=None,
        metadata={
            "help": "tokenizer of a new model, trained on sources and targets; default: bpe",
            "resume": "fixed",
        },
    )
    vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "maximum tokens of the new tokenizer, special tokens included; default: 4000",
            "resume": "fixed",
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "configuration values of a new model, such as: d_model=128,encoder_layers=4",
            "resume": "fixed",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name_or_path is not None and self.from_scratch is not None:
            raise InputError("--from_scratch and --model_name_or_path exclude each other; give one of them")
        if self.warm_start is not None:
            if self.from_scratch is not None:
                raise InputError("--from_scratch and --warm_start exclude each other; give one of them")
            self.model_name_or_path = self.model_name_or_path or DEFAULT_ENCODER
        if self.model_name_or_path is None:
            self.from_scratch = self.from_scratch or "tiny"
            self.model_name_or_path = f"a {self.from_scratch} model from scratch"
            for name, value in NEW_MODEL_DEFAULTS.items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
            if self.vocab_size is not None and self.vocab_size < 300:
                raise InputError(f"--vocab_size {self.vocab_size}: must be at least 300")
            if self.attention_dropout is not None:
                raise InputError(
                    "--attention_dropout: does not apply to a new model; use --config_overrides attention_dropout=VALUE"
                )
            return
        for name in NEW_MODEL_DEFAULTS:
            if getattr(self, name) is not None:
                other = "--warm_start" if self.warm_start else "--model_name_or_path"
                raise InputError(
                    f"--{name}: applies to new models only; remove it, or replace {other} by --from_scratch"
                )


def load_seq2seq(
    args: Seq2SeqModelArguments,
    texts: Iterable[str],
    source_length: int,
    target_length: int,
    tags: Iterable[str] = (),
    checkpoint: str | None = None,
    dropout: float | None = None,
    quantize: str | None = None,
) -> LoadedModel:
    """Load the model and tokenizer of a checkpoint, or create both with `--from_scratch`.

    Args:
        args: names the checkpoint, or describes the new model.
        texts: training texts of a new tokenizer.
        source_length: most tokens of a source.
        target_length: most tokens of a target.
        tags: extra tokens of a new tokenizer.
        checkpoint: folder with the tokenizer of a resumed run; None for a new run.
        dropout: see `set_dropout`; if None, 0.1 in a new model and unchanged in others.
        quantize: see `common.models.load.quantization`.

    Raises:
        InputError: see the functions below.
    """
    if args.from_scratch:  # a resumed run loads the tokenizer that it trained
        if checkpoint:
            tokenizer = load_seq2seq_tokenizer(checkpoint, allow_special_tokens=args.allow_special_tokens)
        else:
            tokenizer = train_joint_tokenizer(args, texts, tags)
            set_special_tokens(tokenizer, args.allow_special_tokens)
        dropout = 0.1 if dropout is None else dropout
        loaded = new_encoder_decoder(args, tokenizer, dropout, max(source_length, target_length))
    else:
        assert args.model_name_or_path is not None
        tokenizer = load_seq2seq_tokenizer(args.model_name_or_path, args.model_revision, args.allow_special_tokens)
        loaded = load_encoder_decoder(args, tokenizer, source_length, target_length, quantize)
        set_dropout(loaded.model, dropout, args.attention_dropout)
    config = cast(PreTrainedModel, loaded.model).config
    config.update({"allow_special_tokens": args.allow_special_tokens})  # saved with the model, for predict
    return loaded


def train_joint_tokenizer(
    args: Seq2SeqModelArguments, texts: Iterable[str], tags: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """Train one tokenizer for both sides, in the main process.

    BPE (Sennrich et al. 2016, https://aclanthology.org/P16-1162) or Unigram (Kudo 2018,
    https://arxiv.org/abs/1804.10959), both on bytes: each text can be encoded, and decoding returns the text without
    outer whitespace. Each digit is one token: models copy numbers instead of memorising them. `</s>` ends a text and
    starts the decoder, as in fairseq.

    Args:
        args: `--tokenizer_train` and `--vocab_size`, the most entries.
        texts: training texts of both sides.
        tags: extra tokens, such as `<2de>`.
    """
    kind, size = args.tokenizer_train, args.vocab_size
    assert kind is not None
    assert size is not None
    empty = Tokenizer(MODELS[kind][0]())
    empty.normalizer = normalizers.NFC()
    empty.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Digits(individual_digits=True)]
    )
    empty.decoder = decoders.ByteLevel()
    tags = list(tags)
    special = {"pad": PAD, "eos": END, "unk": UNKNOWN} | {tag: tag for tag in tags}
    trained = learn(empty, kind, size, special, texts, on_bytes=True)
    end = trained.token_to_id(END)
    trained.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, end)]
    )
    tell(f"new tokenizer ({kind}): {trained.get_vocab_size():,} tokens")
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, additional_special_tokens=tags
    )


def new_encoder_decoder(
    args: Seq2SeqModelArguments, tokenizer: PreTrainedTokenizerBase, dropout: float, max_length: int
) -> LoadedModel:
    """Create a Transformer of size `--from_scratch` with weights from the global random state.

    The architecture is M2M100: the Transformer of Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762) with the norm
    before each layer, which allows high learning rates without long warm-up (Xiong et al. 2020,
    https://arxiv.org/abs/2002.04745). One matrix serves both embeddings and the output. Sinusoidal positions allow
    inputs of any length.

    Args:
        args: size and configuration values.
        tokenizer: the tokenizer.
        dropout: dropout of embeddings and layers, not of attention.
        max_length: longest input, in tokens.

    Raises:
        InputError: `--config_overrides` is invalid.
    """
    assert args.from_scratch is not None
    layers, width, heads, inner = SIZES[args.from_scratch]
    config = M2M100Config(
        vocab_size=len(tokenizer),
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=inner,
        decoder_ffn_dim=inner,
        dropout=dropout,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        decoder_start_token_id=tokenizer.eos_token_id,
    )
    for name, value in overrides(args.config_overrides, config).items():
        setattr(config, name, value)
    kernel = None if args.attn_implementation == "auto" else args.attn_implementation
    try:
        model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation=kernel, dtype=torch.float32)
    except (ValueError, ImportError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(
            f"--config_overrides: invalid model configuration: {one_line(error)}; change the values"
        ) from None
    check_vocabulary(model, tokenizer, "--config_overrides")
    tell(f"new model: {model.num_parameters() / 1e6:.1f} million parameters, no pretrained weights")
    return LoadedModel(model, tokenizer, read_length=max_length, attn_implementation=kernel)


def load_seq2seq_tokenizer(
    name: str, revision: str | None = None, allow_special_tokens: bool | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint, fast or slow (Marian, M2M100 and ByT5 have slow ones only).

    The tokenizer of an encoder has no end token: its separator becomes the end token, and its class token the start
    token of the decoder. `common.models.load.load_tokenizer` describes `allow_special_tokens`.

    Raises:
        InputError: the tokenizer cannot be loaded, or lacks a padding or end token.
    """
    path = resolve_model(name, revision)
    tokenizer = read_tokenizer(path, allow_special_tokens)
    read_from_left(tokenizer)
    if tokenizer.eos_token is None and tokenizer.sep_token is not None and tokenizer.cls_token is not None:
        tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id not in tokenizer("a")["input_ids"]:
        raise InputError(
            f"{path}: the tokenizer lacks a padding token, or adds no end token; choose an encoder-decoder such as "
            "T5, BART, Marian or M2M100"
        )
    return tokenizer


def load_encoder_decoder(
    args: Seq2SeqModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    source_length: int,
    target_length: int,
    quantize: str | None = None,
) -> LoadedModel:
    """Load the model of `--model_name_or_path` in float32, with a new decoder if `--warm_start` is given.

    Args:
        args: names the checkpoint.
        tokenizer: the tokenizer of the checkpoint.
        source_length: most tokens of a source.
        target_length: most tokens of a target.
        quantize: see `common.models.load.quantization`.

    Raises:
        InputError: the checkpoint has another architecture, has no safetensors, or reads fewer tokens.
    """
    path = resolve_model(args.model_name_or_path, args.model_revision)
    check_whole(path)
    config = load_config(path)
    name = str(args.model_name_or_path)
    if args.warm_start and config.is_encoder_decoder:
        raise InputError(f"--warm_start: {name} is already an encoder-decoder; remove it, or name an encoder")
    if not args.warm_start and not config.is_encoder_decoder:
        raise InputError(
            f"{name}: a {config.model_type} model is not an encoder-decoder; add a decoder with --warm_start both, "
            "name an encoder-decoder such as T5, BART, Marian or M2M100, or use --from_scratch"
        )
    # the configuration of an EncoderDecoderModel contains those of both parts
    parts = [part for part in (config, *vars(config).values()) if isinstance(part, PretrainedConfig)]
    if args.attention_dropout is not None:
        names = [(p, n) for p in parts for n in ("attention_dropout", "attention_probs_dropout_prob") if hasattr(p, n)]
        if not names:
            raise InputError(f"--attention_dropout: a {config.model_type} model has no attention dropout; remove it")
        for part, key in names:
            setattr(part, key, args.attention_dropout)
    kernel = None if args.attn_implementation == "auto" else args.attn_implementation
    settings = {
        "attn_implementation": kernel,
        "dtype": torch.float32,
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    with loading(name, path, config, "as an encoder-decoder"), quiet():
        if args.warm_start:
            model, untrained, new = _add_decoder(path, config, tokenizer, args.warm_start, settings)
        else:
            changes = quantization(quantize, AutoModelForSeq2SeqLM, config) | loadable_generation(path)
            model, info = AutoModelForSeq2SeqLM.from_pretrained(
                path, config=config, output_loading_info=True, **settings, **changes
            )
            check_fit(model, info, name)
            new = set(info["missing_keys"])
            untrained = ", ".join(sorted(new))
    model.name_or_path = name
    check_vocabulary(model, tokenizer, model.name_or_path)
    for side, length in (("source", source_length), ("target", target_length)):
        check_length(model, model.name_or_path, f"max_{side}_length", length, side)
    if untrained:
        tell(f"new weights, which training sets: {untrained}")
    return LoadedModel(model, tokenizer, frozenset(new), name, max(source_length, target_length), kernel)


def _add_decoder(
    path: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, how: str, settings: dict
) -> tuple[PreTrainedModel, str, set[str]]:
    """Load the encoder in folder `path` and add a decoder of the same architecture (Rothe et al. 2020).

    https://aclanthology.org/2020.tacl-1.18: with `both` the decoder starts from all weights of the encoder (BERT2BERT),
    with `encoder` from its token embeddings only (BERT2RND). Cross-attention is always new. Encoder and decoder do not
    share weights. The output layer is tied to the embeddings of the decoder.

    Args:
        path: folder of the encoder.
        config: its configuration.
        tokenizer: its tokenizer.
        how: both or encoder.
        settings: arguments of `from_pretrained`.

    Returns:
        The model, and its new weights as text and as names.

    Raises:
        ValueError: the architecture has no decoder with cross-attention, or too few embeddings.
    """
    if config.is_decoder or getattr(config, "add_cross_attention", False):
        raise ValueError(f"this {config.model_type} model is a decoder, not an encoder")
    without_pooling_layer(config)
    encoder = AutoModel.from_pretrained(path, config=config, **settings)
    if encoder.get_input_embeddings().num_embeddings < len(tokenizer):
        raise ValueError("the model has fewer embeddings than the tokenizer has tokens")
    for parameter_name, parameter in encoder.named_parameters():
        if parameter_name.startswith("pooler"):  # unused: several processes would wait for its gradient
            parameter.requires_grad_(False)
    decoder_config = copy.deepcopy(config)
    decoder: Any
    decoder_config.update({"is_decoder": True, "add_cross_attention": True, "tie_word_embeddings": True})
    if how == "both":
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=decoder_config, output_loading_info=True, **settings
        )
        decoder, info = loaded
        untrained = sorted(info["missing_keys"])
        parts = {"crossattention" if "crossattention" in key else key for key in untrained}
        words, new = f"decoder: {', '.join(sorted(parts))}", set(untrained)
    else:
        kernel = settings["attn_implementation"]
        decoder = AutoModelForCausalLM.from_config(decoder_config, attn_implementation=kernel, dtype=torch.float32)
        with torch.no_grad():
            decoder.get_input_embeddings().weight.copy_(encoder.get_input_embeddings().weight)
        words = "decoder: all except the token embeddings"
        new = {n for n, value in decoder.named_parameters() if value is not decoder.get_input_embeddings().weight}
    if not any("crossattention" in name for name, _ in decoder.named_parameters()):
        raise ValueError(f"a {config.model_type} model does not support cross-attention")
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    for side in (model.encoder, model.decoder):
        for module in (
            side.modules()
        ):  # share the copied configuration with the layers: a later change of the kernel reaches them
            if isinstance(vars(module).get("config"), PretrainedConfig):
                module.config = side.config
    model.config.update(
        {
            "decoder_start_token_id": tokenizer.bos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "vocab_size": decoder.config.vocab_size,
        }
    )
    return model, words, {f"decoder.{name}" for name in new}
