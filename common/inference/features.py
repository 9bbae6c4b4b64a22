"""Record what the last linear layer of a saved model reads: the features of a text or a token."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common.errors import InputError
from common.inference.predictor import Predictor


class HeadInput:
    """The input and the output of the last linear layer that a forward pass computes."""

    def __init__(self) -> None:
        self.features = self.scores = torch.empty(0)

    def keep(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Record a layer, as a forward hook; the last layer of a pass stays."""
        self.features, self.scores = inputs[0], output

    def of(self, logits: Tensor) -> Tensor:
        """Return the features from which `logits` were computed, in their shape up to the last dimension.

        A decoder scores each token of a text and returns the scores of one of them; its features are returned.
        """
        if self.features.dim() == logits.dim():
            return self.features
        positions = (self.scores == logits[:, None]).all(-1).int().argmax(1)
        return self.features[torch.arange(len(logits), device=logits.device), positions]


@contextmanager
def head_input(model: nn.Module, classes: int) -> Iterator[HeadInput]:
    """Record the input of the layer that computes the scores of `classes`, within a `with` block.

    Raises:
        InputError: the model has no linear layer with that many outputs.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not layers:
        raise InputError(f"{type(model).__name__}: has no linear layer of {classes} classes; name a model of train")
    record = HeadInput()
    hooks = [layer.register_forward_hook(record.keep) for layer in layers]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def logits_and_features(
    predictor: Predictor, columns: dict[str, list[list[int]]]
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield row numbers, logits and features in float32, on the CPU, for batches of encoded rows (see `outputs`).

    The features are the input of the last linear layer: (rows, width), or (rows, length, width) of a tagger.
    """
    with head_input(predictor.model, len(predictor.labels)) as record:
        for batch, outputs in predictor.outputs(columns):
            logits = outputs["logits"]
            yield batch, logits.float().cpu(), record.of(logits).float().cpu()
