"""Encoder-decoders: pretrained ones of any family, or new ones with a tokenizer of their own."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from common.args import ModelArguments
from common.errors import InputError, quiet, tell
from common.models import (
    attention_kernel,
    check_whole,
    load_config,
    quantization,
    ready_for_training,
    resolve_model,
)
from common.outputs import in_main_process

#: layers on either side, width, heads, width of the feed-forward layers
SIZES = {"tiny": (2, 192, 3, 768), "small": (4, 256, 4, 1024), "base": (6, 512, 8, 2048)}
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


@dataclass
class Seq2SeqModelArguments(ModelArguments):
    """A pretrained encoder-decoder, or a new one."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "local folder or hub id of an encoder-decoder; a new one when not given"}
    )
    from_scratch: Literal["tiny", "small", "base"] | None = field(
        default=None, metadata={"help": "a new model: 2, 4 or 6 layers a side, 192, 256 or 512 wide; tiny if not given"}
    )
    tokenizer_train: Literal["bpe", "unigram"] = field(
        default="bpe", metadata={"help": "kind of the tokenizer of a new model, trained on both sides of the rows"}
    )
    vocab_size: int = field(default=4000, metadata={"help": "sub-tokens of that tokenizer, special ones included"})

    def __post_init__(self) -> None:
        if self.model_name_or_path is not None and self.from_scratch is not None:
            raise InputError("--from_scratch and --model_name_or_path exclude each other: give one or the other")
        if self.model_name_or_path is None:
            self.from_scratch = self.from_scratch or "tiny"
            self.model_name_or_path = f"a {self.from_scratch} model from scratch"
        if self.vocab_size < 300:
            raise InputError(f"--vocab_size {self.vocab_size}: must be at least 300")
        if self.from_scratch and self.attention_dropout is not None:
            raise InputError("--attention_dropout: a new model has none")


def train_joint_tokenizer(args: Seq2SeqModelArguments, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One tokenizer for both sides, trained on `texts`, with `--vocab_size` entries at most.

    BPE (Sennrich et al. 2016, https://aclanthology.org/P16-1162) or Unigram (Kudo 2018,
    https://arxiv.org/abs/1804.10959), both on bytes, so that no text is unknown and each comes back as it was but for
    blanks at its ends. Each digit is a sub-token: numbers are copied and rearranged rather than remembered. `</s>` ends
    a text, and begins the decoder's, as in fairseq. On several processes the main one trains.
    """
    trained = Tokenizer.from_str(in_main_process(lambda: _train(args, texts).to_str()))
    end = trained.token_to_id(END)
    trained.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, end)]
    )
    tell(f"a new tokenizer ({args.tokenizer_train}): {trained.get_vocab_size():,} sub-tokens")
    return PreTrainedTokenizerFast(tokenizer_object=trained, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def _train(args: Seq2SeqModelArguments, texts: Iterable[str]) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {
        "vocab_size": args.vocab_size,
        "special_tokens": [PAD, END, UNKNOWN],
        "show_progress": False,
        "initial_alphabet": alphabet,
    }
    if args.tokenizer_train == "bpe":
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(**settings)
    else:
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(**settings, unk_token=UNKNOWN)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def new_encoder_decoder(
    args: Seq2SeqModelArguments, tokenizer: PreTrainedTokenizerBase, dropout: float
) -> PreTrainedModel:
    """A Transformer of size `--from_scratch` with random weights, drawn from the global random state.

    As Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762), with the norm in front of each layer, which trains at
    high rates without long warm-up (Xiong et al. 2020, https://arxiv.org/abs/2002.04745), and one matrix for both
    embeddings and the output. Its architecture is that of M2M100, which is this one; positions are sinusoids, so no
    length is beyond it.
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
    kernel = None if args.attn_implementation == "auto" else args.attn_implementation
    try:
        model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation=kernel, dtype=torch.float32)
    except (ValueError, ImportError) as error:
        raise InputError(f"--attn_implementation {kernel}: {' '.join(str(error).split())}") from None
    tell(f"a new model of {model.num_parameters() / 1e6:.1f} million parameters, drawn by the seed")
    model.drawn, model.pretrained = set(), set()
    return ready_for_training(model, args)


def load_seq2seq_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint; unlike `common.models.load_tokenizer` a slow one will do (Marian, M2M100, ByT5)."""
    path = resolve_model(name, revision)
    load_config(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise InputError(f"{path}: its tokenizer cannot be loaded: {' '.join(str(error).split())}") from None
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id not in tokenizer("a")["input_ids"]:
        raise InputError(
            f"{path}: its tokenizer has no padding, or puts no end behind a text, so outputs would not end"
        )
    return tokenizer


def load_encoder_decoder(args: ModelArguments, max_length: int, quantize: str | None = None) -> PreTrainedModel:
    """The pretrained encoder-decoder `--model_name_or_path`, in float32 whatever the checkpoint's type.

    `max_length` is that of the longer side, in sub-tokens; `quantize` as of `common.models.quantization`. Raises
    `InputError` for a checkpoint of another kind, one without safetensors, and one that reads fewer sub-tokens.
    """
    path = resolve_model(args.model_name_or_path, args.model_revision)
    check_whole(path)
    config = load_config(path)
    if not config.is_encoder_decoder:
        raise InputError(
            f"{args.model_name_or_path}: a {config.model_type} model has no decoder beside an encoder; name one such "
            "as T5, BART, Marian, M2M100, or train a new one by --from_scratch"
        )
    positions = getattr(config, "max_position_embeddings", None)
    sinusoids = config.model_type in ("m2m_100", "nllb-moe")
    if positions and max_length > positions and not sinusoids:
        raise InputError(
            f"{args.model_name_or_path}: reads {positions} sub-tokens at most; lower --max_source_length and "
            "--max_target_length to that"
        )
    if args.attention_dropout is not None:
        if not hasattr(config, "attention_dropout"):
            raise InputError(f"--attention_dropout: a {config.model_type} model has none")
        config.attention_dropout = args.attention_dropout
    dropout = getattr(config, "attention_dropout", getattr(config, "dropout_rate", 0.0))
    quantized = quantization(quantize, AutoModelForSeq2SeqLM, config)
    try:
        with quiet():
            model, loading = AutoModelForSeq2SeqLM.from_pretrained(
                path,
                config=config,
                attn_implementation=attention_kernel(args.attn_implementation, dropout, max_length),
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **quantized,
            )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{args.model_name_or_path}: cannot be loaded as an encoder-decoder: {reason}") from None
    if loading["missing_keys"]:
        tell(f"untrained weights, drawn by the seed: {', '.join(sorted(loading['missing_keys']))}")
    model.drawn, model.read_length = set(loading["missing_keys"]), max_length
    model.pretrained = {name for name, _ in model.named_parameters()} - model.drawn
    model.name_or_path = args.model_name_or_path
    return ready_for_training(model, args)
