"""Unset generation settings that transformers refuses to load or to save."""

import json
import re
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from common.errors import InputError, brief, one_line, quiet, warn

FILE = "generation_config.json"


def loadable_generation(path: str) -> dict[str, GenerationConfig]:
    """Return the argument `generation_config` of `from_pretrained` if the settings in folder `path` need a change.

    transformers refuses contradictions, such as a temperature without sampling, when it saves a model: after training.
    They are unset here, with a warning. The result is empty for settings without contradictions.

    Raises:
        InputError: the settings are refused for another reason.
    """
    file = Path(path, FILE) if Path(path, FILE).is_file() else Path(path, "config.json")  # old checkpoints
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # from_pretrained names this error, or needs no such file
    if not isinstance(values, dict):
        return {}
    if file.name != FILE:
        values = {name: values[name] for name in values.keys() & GenerationConfig().to_dict().keys()}
    unset: dict[str, Any] = {}
    while True:
        try:
            with quiet():
                config = GenerationConfig.from_dict(values)
            break
        except (ValueError, TypeError) as error:
            names = _named(error, [name for name, value in values.items() if value is not None])
            if not names:
                raise InputError(f"{file}: {one_line(error)}; correct this file") from None
            unset |= {name: values.pop(name) for name in names}
    unset |= unset_contradictions(config)
    if not unset:
        return {}
    warn(f"{file}: contradictory or invalid settings are unset: {_listed(unset)}; the trained model is saved without")
    return {"generation_config": config}


def unset_contradictions(config: GenerationConfig) -> dict[str, Any]:
    """Set to None what `validate` refuses when `config` is saved; return the names and their former values.

    Raises:
        InputError: `config` is refused for another reason.
    """
    unset: dict[str, Any] = {}
    while True:
        try:
            config.validate(strict=True)
        except (ValueError, TypeError) as error:
            names = _named(error, [name for name, value in vars(config).items() if value is not None])
            if not names:
                raise InputError(f"{FILE}: {one_line(error)}; correct this file of the checkpoint") from None
            for name in names:
                unset[name] = getattr(config, name)
                setattr(config, name, None)
        else:
            return unset


def _named(error: Exception, names: list[str]) -> list[str]:
    """Return those of `names` that a message of `GenerationConfig.validate` reports."""
    listed = re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE) or re.findall(r"`(\w+)`", str(error))[:1]
    return [name for name in listed if name in names]


def _listed(unset: dict[str, Any]) -> str:
    return ", ".join(f"{name} {brief(value)}" for name, value in unset.items())
