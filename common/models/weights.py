"""Say why the weights of a checkpoint cannot be loaded, or do not fit its configuration, before training."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig

from common.errors import InputError, one_line
from common.hardware import is_out_of_memory
from common.models.structure import layer_names, transformer_of

#: first bytes of the text that git puts in place of a large file
LFS_POINTER = b"version https://git-lfs"
#: endings of other formats of weights
OTHER_FORMATS = frozenset({".bin", ".ckpt", ".h5", ".msgpack", ".pt", ".pth"})


def check_not_pointers(folder: Path) -> None:
    """Raise `InputError` for a file that `git clone` has left as a pointer, because git-lfs was not installed."""
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size < 1024):
        if file.read_bytes().startswith(LFS_POINTER):
            raise InputError(
                f"{file}: is a pointer of git-lfs, not the file itself; install git-lfs, and run: "
                f"git -C {folder} lfs pull"
            )


@contextmanager
def loading(name: str, path: str, config: PretrainedConfig, what: str) -> Iterator[None]:
    """Turn an error of `from_pretrained` inside the block into `InputError`.

    Args:
        name: the checkpoint, as the user names it.
        path: its folder.
        config: its configuration.
        what: end of the sentence `NAME: cannot be loaded ...`.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        problem = _problem(name, Path(path), config)
        reason = problem or f"cannot be loaded {what}: {one_line(error)}; choose another checkpoint"
        raise InputError(reason if problem else f"{name}: {reason}") from None


def _problem(name: str, folder: Path, config: PretrainedConfig) -> str | None:
    """Return the message about missing or damaged weights in `folder`; None if the files are well."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            return f"{file}: is damaged ({one_line(error)}); download or copy it again"
    if files:
        return None
    if Path(name).is_dir() and not any(path.suffix in OTHER_FORMATS for path in folder.iterdir()):
        return f"{name}: has no weights; copy model.safetensors of the checkpoint into it"
    kind, new = (config.architectures or ["AutoModel"])[0], f"{Path(name).name}-safetensors"
    code = f"from transformers import AutoTokenizer, {kind}; "
    code += f"[c.from_pretrained('{name}').save_pretrained('{new}') for c in (AutoTokenizer, {kind})]"
    return (
        f"{name}: has no weights in .safetensors, and other formats can run code; convert a checkpoint that you trust: "
        f'python -c "{code}", and give {new}'
    )


def check_fit(model: nn.Module, info: dict[str, Any], name: str) -> None:
    """Raise `InputError` if weights inside the layers, or of the embeddings, are not those of the checkpoint.

    They would be random, and a model would train from nothing. A head or a pooler may be new.

    Args:
        model: the loaded model.
        info: `missing_keys` and `mismatched_keys` of `from_pretrained`.
        name: the checkpoint.
    """
    body = _names_of_body(model)
    for key, stored, expected in sorted(info.get("mismatched_keys", ())):
        if key in body:
            raise InputError(
                f"{name}: {key} has the shape {list(stored)} in the weights and {list(expected)} by config.json; copy "
                "both files from one checkpoint"
            )
    layers = tuple(f"{layer}." for layer in layer_names(model))
    missing = sorted(key for key in info["missing_keys"] if key.startswith(layers) and key in body)
    if missing:
        raise InputError(
            f"{name}: the weights lack {len(missing)} parameters of the layers in config.json, such as {missing[0]}; "
            "copy both files from one checkpoint"
        )


def zero_new_biases(model: nn.Module, missing: Iterable[str]) -> None:
    """Set new biases of the head to 0. For some heads `from_pretrained` leaves them as uninitialised memory.

    Args:
        model: the loaded model.
        missing: names of the parameters that the checkpoint lacks.
    """
    body = _names_of_body(model)
    new = {name for name in missing if name.endswith("bias")} - body
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in new:
            nn.init.zeros_(parameter)


def _names_of_body(model: nn.Module) -> set[str]:
    """Return the names of the parameters of the Transformer in `model`, without its head."""
    inside = {id(parameter) for parameter in transformer_of(model).parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}
