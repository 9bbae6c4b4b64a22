"""Insert, save and load bottleneck adapters: small layers, one for all texts or one for each domain."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common.errors import InputError
from common.models.structure import LINEAR, input_embeddings, transformer_of, watch
from common.speed.padding_free import PackedBatch, packed_batch

WEIGHTS, ABOUT = "adapter.safetensors", "adapter.json"
MARK = "bottleneck_adapter"


@dataclass(frozen=True)
class Shape:
    """The placement of adapters, the ratio of the width of the model to theirs, and the domains that have their own."""

    placement: Literal["houlsby", "pfeiffer"]
    reduction: int
    domains: Sequence[str] = ()


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


class Mixture(nn.Module):
    """Compute h + sum over domains d of w_d up_d(relu(down_d(h))): an adapter for each domain, weighted.

    The adapters stand side by side in two matrices. They are initialised as `Bottleneck`.
    """

    def __init__(self, width: int, inner: int, domains: int):
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.Linear(width, domains * inner), nn.Linear(domains * inner, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(domains, width))
        for part in (self.down, self.up):
            nn.init.trunc_normal_(part.weight, std=0.01, a=-0.02, b=0.02)
        nn.init.zeros_(self.down.bias)

    def forward(self, h: Tensor, weights: Tensor) -> Tensor:
        """Return the sum; `h` has shape (..., width), and `weights` a shape that expands to (..., domains)."""
        active = torch.relu(self.down(h))
        weights = weights.to(active.dtype)
        return h + self.up(active * weights.repeat_interleave(self.inner, -1)) + weights @ self.bias.to(weights.dtype)


class Gate(nn.Module):
    """Weight the domains of a text: 1 for its domain if it is given, else the probabilities of a linear classifier.

    The classifier reads the mean of the word embeddings of the text, and its gradient does not reach them. It learns to
    tell the domains (`common.training.domains`), so that a text of unknown domain gets the adapters of the domains that
    it resembles. DEMix (Gururangan et al. 2022, https://arxiv.org/abs/2108.05036) computes these probabilities by
    language models.

    Attributes:
        domains: their names.
        fixed: name of the domain of all texts; None if batches name it, or nothing does.
        given: number of the domain of each row of a batch, -1 if unknown; None if no row has one. The model that has
            the head sets it for the Transformer.
        logits: scores of the classifier, (rows, domains).
        weights: (rows, domains).
    """

    given: Tensor | None
    logits: Tensor
    weights: Tensor

    def __init__(self, width: int, domains: Sequence[str]):
        super().__init__()
        self.domains = list(domains)
        self.fixed: str | None = None
        self.given = None
        self.classifier = nn.Linear(width, len(self.domains))
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def read(self, embedded: Tensor, mask: Tensor | None) -> None:
        """Weight the domains of a batch.

        Args:
            embedded: word embeddings (rows, length, width).
            mask: 1 at tokens, 0 at padding (rows, length); None: no padding.
        """
        mask = torch.ones(embedded.shape[:2], device=embedded.device) if mask is None else mask
        shares = mask / mask.sum(1, keepdim=True).clamp(min=1)
        mean = (embedded.detach().float() * shares[..., None]).sum(1)
        self.logits = self.classifier(F.layer_norm(mean, mean.shape[-1:])).float()
        self.weights = self.logits.softmax(-1)
        given = self.given
        if self.fixed is not None:
            given = torch.full((len(mean),), self.domains.index(self.fixed), device=mean.device)
        if given is not None:
            one = F.one_hot(given.clamp(min=0), len(self.domains)).to(self.weights.dtype)
            self.weights = torch.where(given[:, None] >= 0, one, self.weights)

    def of_tokens(self, packed: PackedBatch | None) -> Tensor:
        """Return the weights of each token of the layer that computes: a shape that expands to (rows, length, domains).

        Without padding it is (1, tokens, domains).
        """
        if packed is None:
            return self.weights[:, None]
        rows = packed.padded_of_packed // packed.shape[1]
        return self.weights[rows if packed.chosen is None else rows[packed.chosen]][None]


def _take_domains(gate: Gate, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Take `domain` from the arguments of the model: a forward pre-hook."""
    gate.given = kwargs.pop("domain", None)
    return args, kwargs


def _weight_domains(gate: Gate, transformer: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
    """Weight the domains of a batch before the Transformer reads it: a forward pre-hook."""
    ids = args[0] if args else kwargs["input_ids"]
    words = F.embedding(ids, input_embeddings(transformer).weight)
    gate.read(words, args[1] if len(args) > 1 else kwargs.get("attention_mask"))


def _adapt(gate: Gate | None, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    adapter = getattr(module, MARK)
    weights = () if gate is None else (gate.of_tokens(packed_batch(args, kwargs)),)
    return adapter(output, *weights) if isinstance(output, Tensor) else (adapter(output[0], *weights), *output[1:])


def insert_adapters(model: nn.Module, shape: Shape) -> list[str]:
    """Insert new adapters into each layer of `model`, initialised from the global random state.

    - `houlsby` (Houlsby et al. 2019): an adapter follows each attention output projection and each feed-forward part,
      before the residual connection and the norm. A layer has two; a decoder layer with cross-attention has three.
    - `pfeiffer` (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247, in the form of He et al. 2022,
      https://arxiv.org/abs/2110.04366, section 2.2): one adapter follows the last residual and norm of each layer.

    With domains, each one has an adapter, and a `Gate` weights them for each text.

    Args:
        model: the model; it is changed.
        shape: the placement, and `reduction`: an adapter is width / `reduction` wide.

    Returns:
        Names of the parameters of the adapters.

    Raises:
        InputError: `houlsby` does not find the attention of this model type; domains in an encoder-decoder.
    """
    transformer, gate = transformer_of(model), None
    if shape.domains and transformer.config.is_encoder_decoder:
        raise InputError(
            f"--tuning domains: does not work with a {transformer.config.model_type} model; give --tuning full"
        )
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
    if shape.domains:
        words = input_embeddings(transformer).weight
        gate = Gate(words.shape[1], shape.domains).to(words.device)
        transformer.add_module(MARK, gate)
        transformer.register_forward_pre_hook(partial(_weight_domains, gate), with_kwargs=True)
        model.register_forward_pre_hook(partial(_take_domains, gate), with_kwargs=True, prepend=True)
    for name, linear in adapted:
        module, projection = model.get_submodule(name), model.get_submodule(linear)
        assert isinstance(projection, LINEAR)  # `watch` names no other modules
        width = projection.nf if isinstance(projection, Conv1D) else projection.out_features
        inner = max(1, width // shape.reduction)
        adapter = Mixture(width, inner, len(shape.domains)) if shape.domains else Bottleneck(width, inner)
        module.add_module(MARK, adapter.to(projection.weight.device))
        # before the hook that unpacks the output of the last layer (common.speed.padding_free)
        module.register_forward_hook(partial(_adapt, gate), prepend=True, with_kwargs=True)
    return adapter_names(model)


def gate_of(model: nn.Module) -> Gate | None:
    """Return the gate of a model with an adapter for each domain; None for other models."""
    return next((module for module in model.modules() if isinstance(module, Gate)), None)


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
