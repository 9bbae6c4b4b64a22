"""Initialise a new MLM head for an encoder without a head."""

import torch
from torch import nn
from transformers import PreTrainedModel

from common.errors import tell
from common.models.load import LoadedModel


def start_as_identity(loaded: LoadedModel) -> None:
    """Initialise the linear layers of a new head as the identity, and print a message.

    The decoder of the head is tied to the input embeddings and scores the vocabulary from the first step. A random
    layer before the decoder would destroy these scores.
    """
    model: PreTrainedModel = loaded.model
    new = {name for name in loaded.new_parameters if name.split(".")[0] != model.base_model_prefix}
    if not new:
        return
    for name, module in model.named_modules():
        square = isinstance(module, nn.Linear) and module.in_features == module.out_features
        if square and f"{name}.weight" in new:
            with torch.no_grad():
                nn.init.eye_(module.weight)
                if module.bias is not None:  # ModernBERT has none
                    nn.init.zeros_(module.bias)
    decoder = model.get_output_embeddings()
    tied = decoder is not None and decoder.weight is model.get_input_embeddings().weight
    decoder_kind = "tied to the embeddings" if tied else "untied, as in this architecture"
    tell(f"the checkpoint has no MLM head: training starts with a new head, decoder {decoder_kind}")
