"""Bottleneck adapters: small layers put into a frozen model, which alone are trained."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.errors import InputError
from common.models.structure import transformer_of, watch

WEIGHTS, ABOUT = "adapter.safetensors", "adapter.json"
MARK = "bottleneck_adapter"


@dataclass(frozen=True)
class Shape:
    """Where adapters stand, and by what factor they are narrower than the model."""

    placement: Literal["houlsby", "pfeiffer"]
    reduction: int


class Bottleneck(nn.Module):
    """h + up(relu(down(h))), the adapter of Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751, figure 2).

    `h` has shape (..., width). It begins close to the identity: weights are drawn from a normal distribution of
    standard deviation 0.01 that is cut off at two of these, and biases are 0 (their section 3).
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


def insert_adapters(model: PreTrainedModel, shape: Shape) -> list[str]:
    """Put an adapter, drawn from the global random state, into each layer of `model`; returns their parameters' names.

    - `houlsby` (Houlsby et al. 2019): behind each attention's output projection and behind the feed-forward part, in
      front of the residual connection and the norm: two a layer, three in a decoder that attends to an encoder.
    - `pfeiffer` (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247, as He et al. 2022 write it,
      https://arxiv.org/abs/2110.04366, section 2.2): one a layer, on what comes out of its last residual and norm.

    Each is width / `reduction` wide. Raises `InputError` where the attention's output cannot be found.
    """
    adapted: list[tuple[str, str]] = []  # module whose output is adapted; linear map that tells its width
    for layer in watch(model):
        if shape.placement == "houlsby":
            if not layer.attention_output:
                raise InputError(
                    "--adapter_placement houlsby: finds no attention in a "
                    f"{transformer_of(model).config.model_type} model; choose pfeiffer"
                )
            adapted += [(name, name) for name in [*layer.attention_output, layer.output]]
        else:
            adapted.append((layer.name, layer.output))
    for name, linear in adapted:
        module, weight = model.get_submodule(name), model.get_submodule(linear).weight
        width = getattr(model.get_submodule(linear), "out_features", None) or model.get_submodule(linear).nf
        adapter = Bottleneck(width, max(1, width // shape.reduction)).to(weight.device)
        module.add_module(MARK, adapter)
        # in front of the hook by which the last layer gives padding back (common.speed.padding_free)
        module.register_forward_hook(_adapt, prepend=True)
    return adapter_names(model)


def adapter_names(model: nn.Module) -> list[str]:
    """Parameters of the adapters in `model`."""
    return [name for name, _ in model.named_parameters() if f".{MARK}." in name]


def save_adapters(model: PreTrainedModel, shape: Shape, folder: Path) -> None:
    """Write the adapters alone, as safetensors, with what is needed to put them back."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict()
    save_file({name: weights[name].contiguous().cpu() for name in adapter_names(model)}, folder / WEIGHTS)
    (folder / ABOUT).write_text(json.dumps(asdict(shape), indent=1) + "\n", encoding="utf-8")


def load_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Put the adapters that `save_adapters` wrote back into a model without any."""
    try:
        shape = Shape(**json.loads((folder / ABOUT).read_text(encoding="utf-8")))
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder}: its adapters cannot be read: {error}") from None
    names = insert_adapters(model, shape)
    if set(names) != weights.keys():
        raise InputError(f"{folder}: its adapters are of another model")
    model.load_state_dict(weights, strict=False)
