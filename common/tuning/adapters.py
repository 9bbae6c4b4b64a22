"""Insert, save and load bottleneck adapters: small trainable layers in a frozen model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from common.errors import InputError
from common.models.structure import LINEAR, transformer_of, watch

WEIGHTS, ABOUT = "adapter.safetensors", "adapter.json"
MARK = "bottleneck_adapter"


@dataclass(frozen=True)
class Shape:
    """The placement of adapters, and the ratio of the width of the model to theirs."""

    placement: Literal["houlsby", "pfeiffer"]
    reduction: int


class Bottleneck(nn.Module):
    """Compute h + up(relu(down(h))), the adapter of Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751, figure 2).

    `h` has shape (..., width). A new adapter is close to the identity. Its weights come from a normal distribution of
    standard deviation 0.01, truncated at two standard deviations; its biases are 0 (section 3).
    """

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        for part in (self.down, self.up):
            nn.init.trunc_normal_(part.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(part.bias)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(torch.relu(self.down(h)))


def _adapt(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
    adapter = getattr(module, MARK)
    return adapter(output) if isinstance(output, Tensor) else (adapter(output[0]), *output[1:])


def insert_adapters(model: nn.Module, shape: Shape) -> list[str]:
    """Insert new adapters into each layer of `model`, initialised from the global random state.

    - `houlsby` (Houlsby et al. 2019): an adapter follows each attention output projection and each feed-forward part,
      before the residual connection and the norm. A layer has two; a decoder layer with cross-attention has three.
    - `pfeiffer` (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247, in the form of He et al. 2022,
      https://arxiv.org/abs/2110.04366, section 2.2): one adapter follows the last residual and norm of each layer.

    Args:
        model: the model; it is changed.
        shape: the placement, and `reduction`: an adapter is width / `reduction` wide.

    Returns:
        Names of the parameters of the adapters.

    Raises:
        InputError: `houlsby` does not find the attention of this model type.
    """
    adapted: list[tuple[str, str]] = []  # adapted module; linear map with the same output width
    for layer in watch(model):
        if shape.placement == "houlsby":
            if not layer.attention_output:
                raise InputError(
                    "--adapter_placement houlsby: finds no attention in a "
                    f"{transformer_of(model).config.model_type} model; give --adapter_placement pfeiffer"
                )
            adapted += [(name, name) for name in [*layer.attention_output, layer.output]]
        else:
            adapted.append((layer.name, layer.output))
    for name, linear in adapted:
        module, projection = model.get_submodule(name), model.get_submodule(linear)
        assert isinstance(projection, LINEAR)  # `watch` names no other modules
        width = projection.nf if isinstance(projection, Conv1D) else projection.out_features
        adapter = Bottleneck(width, max(1, width // shape.reduction)).to(projection.weight.device)
        module.add_module(MARK, adapter)
        # before the hook that unpacks the output of the last layer (common.speed.padding_free)
        module.register_forward_hook(_adapt, prepend=True)
    return adapter_names(model)


def is_adapter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter."""
    return f".{MARK}." in name


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters of the adapters in `model`."""
    return [name for name, _ in model.named_parameters() if is_adapter(name)]


def save_adapters(model: nn.Module, shape: Shape, folder: Path) -> None:
    """Save the adapters as safetensors, and their shape as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict()
    save_file({name: weights[name].contiguous().cpu() for name in adapter_names(model)}, folder / WEIGHTS)
    (folder / ABOUT).write_text(json.dumps(asdict(shape), indent=1) + "\n", encoding="utf-8")


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Insert the adapters that `save_adapters` wrote; raise `InputError` if they do not fit `model`."""
    try:
        shape = Shape(**json.loads((folder / ABOUT).read_text(encoding="utf-8")))
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder}: cannot read its adapters: {error}; name a folder that train saved") from None
    names = insert_adapters(model, shape)
    if set(names) != weights.keys():
        raise InputError(f"{folder}: its adapters belong to another model; name a folder that train saved")
    model.load_state_dict(weights, strict=False)
