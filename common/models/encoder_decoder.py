"""Encoder-decoders: pretrained ones, new ones with a tokenizer of their own, and encoders given a decoder."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    EncoderDecoderModel,
    M2M100Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from common.args import DEFAULT_ENCODER, ModelArguments
from common.errors import InputError, one_line, quiet, tell
from common.models.load import (
    LoadedModel,
    check_whole,
    load_config,
    quantization,
    resolve_model,
)
from common.models.new import MODELS, learn, overrides
from common.models.structure import set_dropout

#: layers on either side, width, heads, width of the feed-forward layers
SIZES = {"tiny": (2, 192, 3, 768), "small": (4, 256, 4, 1024), "base": (6, 512, 8, 2048)}
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
#: arguments of a new model, and what they are when not given
OF_A_NEW_MODEL = {"tokenizer_train": "bpe", "vocab_size": 4000, "config_overrides": None}


@dataclass
class Seq2SeqModelArguments(ModelArguments):
    """A pretrained encoder-decoder, an encoder that is given a decoder, or a new model."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "local folder or hub id of an encoder-decoder; a new one when not given"}
    )
    warm_start: Literal["both", "encoder"] | None = field(
        default=None,
        metadata={
            "help": "make an encoder an encoder-decoder: its weights on both sides, or a decoder drawn anew",
            "resume": "fixed",
        },
    )
    from_scratch: Literal["tiny", "small", "base"] | None = field(
        default=None,
        metadata={
            "help": "a new model: 2, 4 or 6 layers a side, 192, 256 or 512 wide; tiny if not given",
            "resume": "fixed",
        },
    )
    tokenizer_train: Literal["bpe", "unigram"] | None = field(
        default=None,
        metadata={"help": "kind of a new model's tokenizer, trained on both sides of the rows; bpe", "resume": "fixed"},
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "sub-tokens of that tokenizer, special ones included; 4000", "resume": "fixed"}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "values of a new model's configuration, such as: d_model=128,encoder_layers=4",
            "resume": "fixed",
        },
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is not None and self.from_scratch is not None:
            raise InputError("--from_scratch and --model_name_or_path exclude each other: give one or the other")
        if self.warm_start is not None:
            if self.from_scratch is not None:
                raise InputError("--from_scratch and --warm_start exclude each other: give one or the other")
            self.model_name_or_path = self.model_name_or_path or DEFAULT_ENCODER
        if self.model_name_or_path is None:
            self.from_scratch = self.from_scratch or "tiny"
            self.model_name_or_path = f"a {self.from_scratch} model from scratch"
            for name, value in OF_A_NEW_MODEL.items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
            if self.vocab_size < 300:
                raise InputError(f"--vocab_size {self.vocab_size}: must be at least 300")
            if self.attention_dropout is not None:
                raise InputError("--attention_dropout: with a new model give it in --config_overrides")
            return
        for name in OF_A_NEW_MODEL:
            if getattr(self, name) is not None:
                other = "--warm_start" if self.warm_start else "--model_name_or_path"
                raise InputError(
                    f"--{name}: of a new model, and {self.model_name_or_path} has its own; leave it out, or give "
                    f"--from_scratch in place of {other}"
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
    """What `args` asks for: by `--from_scratch` new ones, the tokenizer trained on `texts`; else a checkpoint's.

    A new tokenizer is taken from `checkpoint`, where the run goes on from there. `dropout` is 0.1 in a new model, and
    in another what it was, when not given. The rest is as of the functions below.
    """
    if args.from_scratch:  # a run that goes on has its own tokenizer
        tokenizer = load_seq2seq_tokenizer(checkpoint) if checkpoint else train_joint_tokenizer(args, texts, tags)
        dropout = 0.1 if dropout is None else dropout
        return new_encoder_decoder(args, tokenizer, dropout, max(source_length, target_length))
    tokenizer = load_seq2seq_tokenizer(args.model_name_or_path, args.model_revision)
    loaded = load_encoder_decoder(args, tokenizer, source_length, target_length, quantize)
    set_dropout(loaded.model, dropout, args.attention_dropout)
    return loaded


def train_joint_tokenizer(
    args: Seq2SeqModelArguments, texts: Iterable[str], tags: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """One tokenizer for both sides, trained on `texts`, with `--vocab_size` entries at most.

    BPE (Sennrich et al. 2016, https://aclanthology.org/P16-1162) or Unigram (Kudo 2018,
    https://arxiv.org/abs/1804.10959), both on bytes, so that no text is unknown and each comes back as it was but for
    blanks at its ends. Each digit is a sub-token: numbers are copied and rearranged rather than remembered. `</s>` ends
    a text, and begins the decoder's, as in fairseq. `tags`, such as `<2de>`, are sub-tokens of their own. On several
    processes the main one trains.
    """
    empty = Tokenizer(MODELS[args.tokenizer_train][0]())
    empty.normalizer = normalizers.NFC()
    empty.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Digits(individual_digits=True)]
    )
    empty.decoder = decoders.ByteLevel()
    tags = list(tags)
    special = {"pad": PAD, "eos": END, "unk": UNKNOWN} | {tag: tag for tag in tags}
    trained = learn(empty, args.tokenizer_train, args.vocab_size, special, texts, on_bytes=True)
    end = trained.token_to_id(END)
    trained.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, end)]
    )
    tell(f"a new tokenizer ({args.tokenizer_train}): {trained.get_vocab_size():,} sub-tokens")
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, additional_special_tokens=tags
    )


def new_encoder_decoder(
    args: Seq2SeqModelArguments, tokenizer: PreTrainedTokenizerBase, dropout: float, max_length: int
) -> LoadedModel:
    """A Transformer of size `--from_scratch` with random weights, drawn from the global random state.

    As Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762), with the norm in front of each layer, which trains at
    high rates without long warm-up (Xiong et al. 2020, https://arxiv.org/abs/2002.04745), and one matrix for both
    embeddings and the output. Its architecture is that of M2M100, which is this one; positions are sinusoids, so no
    length is beyond it. `dropout` is that of embeddings and layers, not of attention, and `max_length`, in sub-tokens,
    is the longest input.
    """
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
        raise InputError(f"invalid model configuration: {one_line(error)}") from None
    tell(f"a new model of {model.num_parameters() / 1e6:.1f} million parameters, drawn by the seed")
    return LoadedModel(model, tokenizer, read_length=max_length, attn_implementation=kernel)


def load_seq2seq_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint; unlike `common.models.load.load_tokenizer` a slow one will do (Marian, M2M100, ByT5).

    That of an encoder ends a text by its separator, and a decoder begins by its class token: they become its ends.
    """
    path = resolve_model(name, revision)
    load_config(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise InputError(f"{path}: its tokenizer cannot be loaded: {one_line(error)}") from None
    if tokenizer.eos_token is None and tokenizer.sep_token is not None and tokenizer.cls_token is not None:
        tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id not in tokenizer("a")["input_ids"]:
        raise InputError(
            f"{path}: its tokenizer has no padding, or puts no end behind a text, so outputs would not end"
        )
    return tokenizer


def load_encoder_decoder(
    args: Seq2SeqModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    source_length: int,
    target_length: int,
    quantize: str | None = None,
) -> LoadedModel:
    """The model of `--model_name_or_path`, pretrained or by `--warm_start`, in float32 whatever the checkpoint's type.

    `source_length` and `target_length` are the greatest, in sub-tokens of `tokenizer`, which is the checkpoint's own;
    `quantize` as of `common.models.load.quantization`. Raises `InputError` for a checkpoint of another kind, one
    without safetensors, and one that reads fewer tokens.
    """
    path = resolve_model(args.model_name_or_path, args.model_revision)
    check_whole(path)
    config = load_config(path)
    name = args.model_name_or_path
    if args.warm_start and config.is_encoder_decoder:
        raise InputError(f"--warm_start: {name} is an encoder-decoder already; leave it out, or name an encoder")
    if not args.warm_start and not config.is_encoder_decoder:
        raise InputError(
            f"{name}: a {config.model_type} model has no decoder beside an encoder; give it one by --warm_start both, "
            "name an encoder-decoder such as T5, BART, Marian, M2M100, or train a new one by --from_scratch"
        )
    for side, length in (("source", source_length), ("target", target_length)):
        positions = _positions(config, side)
        if positions and length > positions:
            raise InputError(f"{name}: a {side} has {positions} sub-tokens at most; lower --max_{side}_length to that")
    # one made from two models has the configuration of either within its own
    parts = [part for part in (config, *vars(config).values()) if isinstance(part, PretrainedConfig)]
    if args.attention_dropout is not None:
        names = [(p, n) for p in parts for n in ("attention_dropout", "attention_probs_dropout_prob") if hasattr(p, n)]
        if not names:
            raise InputError(f"--attention_dropout: a {config.model_type} model has none")
        for part, own in names:
            setattr(part, own, args.attention_dropout)
    kernel = None if args.attn_implementation == "auto" else args.attn_implementation
    settings = {
        "attn_implementation": kernel,
        "dtype": torch.float32,
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    try:
        with quiet():
            if args.warm_start:
                model, untrained, drawn = _warm_started(path, config, tokenizer, args.warm_start, settings)
            else:
                quantized = quantization(quantize, AutoModelForSeq2SeqLM, config)
                model, loading = AutoModelForSeq2SeqLM.from_pretrained(
                    path, config=config, output_loading_info=True, **settings, **quantized
                )
                drawn = set(loading["missing_keys"])
                untrained = ", ".join(sorted(drawn))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = one_line(error)
        raise InputError(f"{name}: cannot be loaded as an encoder-decoder: {reason}") from None
    if untrained:
        tell(f"untrained weights, drawn by the seed: {untrained}")
    model.name_or_path = name
    return LoadedModel(model, tokenizer, frozenset(drawn), name, max(source_length, target_length), kernel)


def _positions(config: PretrainedConfig, side: str) -> int | None:
    """Sub-tokens that a model has positions for on a side; None where no length is beyond it."""
    if config.model_type in ("m2m_100", "nllb-moe"):  # sinusoids that grow
        return None
    config = getattr(config, "encoder" if side == "source" else "decoder", config)  # of one made from two models
    own = f"max_{'encoder' if side == 'source' else 'decoder'}_position_embeddings"  # of LED
    found = getattr(config, own, getattr(config, "max_position_embeddings", None))
    # the family of RoBERTa counts positions from the one after its padding on
    after_padding = config.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl")
    return found - config.pad_token_id - 1 if found and after_padding else found


def _warm_started(
    path: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, how: str, settings: dict
) -> tuple[PreTrainedModel, str, set[str]]:
    """The encoder in folder `path` with a decoder of its kind; which weights are untrained, in words and by name.

    Rothe et al. 2020, https://aclanthology.org/2020.tacl-1.18: with `both` the decoder begins with the weights of the
    encoder (their BERT2BERT), with `encoder` with its embeddings of sub-tokens alone (BERT2RND). Cross-attention is new
    either way. The decoder has matrices of its own, and its output layer is tied to its embeddings.
    """
    if config.is_decoder or getattr(config, "add_cross_attention", False):
        raise ValueError(f"a {config.model_type} model that is a decoder")
    encoder = AutoModel.from_pretrained(path, config=config, **settings)
    if encoder.get_input_embeddings().num_embeddings < len(tokenizer):
        raise ValueError("it has fewer embeddings than its tokenizer has sub-tokens")
    for parameter_name, parameter in encoder.named_parameters():
        if parameter_name.startswith("pooler"):  # nothing reads it, and several processes would wait for its gradient
            parameter.requires_grad_(False)
    own = copy.deepcopy(config)
    own.update({"is_decoder": True, "add_cross_attention": True, "tie_word_embeddings": True})
    if how == "both":
        decoder, loading = AutoModelForCausalLM.from_pretrained(path, config=own, output_loading_info=True, **settings)
        untrained = sorted(loading["missing_keys"])
        parts = {"crossattention" if "crossattention" in key else key for key in untrained}
        words, drawn = f"the decoder's {', '.join(sorted(parts))}", set(untrained)
    else:
        kernel = settings["attn_implementation"]
        decoder = AutoModelForCausalLM.from_config(own, attn_implementation=kernel, dtype=torch.float32)
        with torch.no_grad():
            decoder.get_input_embeddings().weight.copy_(encoder.get_input_embeddings().weight)
        words = "the decoder, all but its embeddings of sub-tokens"
        drawn = {n for n, value in decoder.named_parameters() if value is not decoder.get_input_embeddings().weight}
    if not any("crossattention" in name for name, _ in decoder.named_parameters()):
        raise ValueError(f"a {config.model_type} model has no form with cross-attention")
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    for side in (model.encoder, model.decoder):
        for module in side.modules():  # it copies the configurations; the layers would never hear of another kernel
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
    return model, words, {f"decoder.{name}" for name in drawn}
