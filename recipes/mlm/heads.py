"""The head: a new one for an encoder that has none."""

import torch
from torch import nn
from transformers import PreTrainedModel

from common.errors import tell
from common.models.load import LoadedModel


def start_as_identity(loaded: LoadedModel) -> None:
    """Let the untrained head of a checkpoint without one begin by passing the encoder's vectors on; says so.

    Its decoder is tied to the input embeddings, so that it scores the vocabulary from the start; a random layer in
    front of it would first have to be undone.
    """
    model: PreTrainedModel = loaded.model
    fresh = {name for name in loaded.new_parameters if name.split(".")[0] != model.base_model_prefix}
    if not fresh:
        return
    for name, module in model.named_modules():
        square = isinstance(module, nn.Linear) and module.in_features == module.out_features
        if square and f"{name}.weight" in fresh:
            with torch.no_grad():
                nn.init.eye_(module.weight)
                nn.init.zeros_(module.bias)
    decoder = model.get_output_embeddings()
    tied = decoder is not None and decoder.weight is model.get_input_embeddings().weight
    how = "tied to the embeddings" if tied else "of its own, since this architecture does not tie it"
    tell(f"the checkpoint has no MLM head: a new one is trained, its decoder {how}")
