"""Test that the features are what the last layer reads, of models of every shape, and that hooks do not stay."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, RobertaConfig

from common.errors import InputError
from common.inference.features import head_input

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize("config", [
    BertConfig(**SMALL, vocab_size=30, num_labels=4),
    RobertaConfig(**SMALL, vocab_size=30, num_labels=4),
    GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, num_labels=4, pad_token_id=0),
], ids=lambda config: config.model_type)  # fmt: skip
def test_the_last_layer_computes_the_logits_from_the_features(config):
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 2, 3]])
    last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 4][-1]
    with torch.inference_mode(), head_input(model, 4) as record:
        logits = model(input_ids=ids).logits
        features = record.of(logits)
        assert features.shape == (2, 16)
        assert last(features) == pytest.approx(logits, abs=1e-6)
    assert not last._forward_hooks
    with pytest.raises(InputError, match="has no linear layer of 9 classes"), head_input(model, 9):
        pass
