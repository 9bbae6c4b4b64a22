"""Run a trial on a model and restore the model afterwards."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from common.errors import quiet

#: what a model raises in a trial of something that it does not support
FAILURES = (
    RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError, AssertionError,
)  # fmt: skip


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Evaluate `model` inside the block, without gradients and autocast, and undo every change of the block.

    Attributes, submodules, hooks, buffers and configurations are restored, and the states of all random number
    generators. Some models change themselves in a forward pass: BigBird replaces its block-sparse attention for good
    when it reads a short batch. Parameters are not copied; the block must not change their values.
    """
    modules = list(model.modules())
    configs = {id(c): c for module in modules for c in _configs_of(module)}.values()
    before = [(module, _copied(vars(module))) for module in modules]
    settings = [(config, _copied(vars(config))) for config in configs]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with (
            torch.random.fork_rng([] if device.type == "cpu" else [device]),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            quiet(),
        ):
            model.eval()
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        for thing, attributes in [*before, *settings]:
            _restore(vars(thing), attributes)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _configs_of(module: nn.Module) -> Iterator[PretrainedConfig]:
    """Yield the configurations of a module and the configurations inside them."""
    for config in vars(module).values():
        if isinstance(config, PretrainedConfig):
            yield config
            yield from (part for part in vars(config).values() if isinstance(part, PretrainedConfig))


def _copied(attributes: dict) -> dict:
    """Copy attributes; a dictionary among them (hooks, submodules, buffers) with its content."""
    return {name: (value, value.copy() if isinstance(value, dict) else None) for name, value in attributes.items()}


def _restore(attributes: dict, copied: dict) -> None:
    attributes.clear()
    for name, (value, content) in copied.items():
        if content is not None:  # the same dictionary: handles of hooks refer to it
            value.clear()
            value.update(content)
        attributes[name] = value
