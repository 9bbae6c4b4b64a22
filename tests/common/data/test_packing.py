"""Test that packed texts under a block mask have the same scores as single texts."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from common.data.packing import FROM_PADDING, FROM_ZERO, find_blocks, to_batch
from tests.common.speed.models import CAUSAL, NO_DROPOUT, OWN, SIZES


@pytest.mark.parametrize("kind", sorted(FROM_ZERO | FROM_PADDING))
def test_texts_under_a_block_mask_have_the_vectors_that_each_has_alone(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **OWN.get(kind, SIZES | NO_DROPOUT))
    model = AutoModel.from_config(config, attn_implementation="sdpa").eval()
    blocks = find_blocks(model, "blocks", causal=kind in CAUSAL)
    assert blocks is not None
    lengths = np.array([7, 12, 5])
    ids = np.random.default_rng(0).integers(5, 200, lengths.sum())
    batch = to_batch([(ids, ids, lengths), (ids[:9], ids[:9], np.array([9]))], 1, blocks)
    with torch.no_grad():
        found = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")})[0]
        for start, end in ((0, 7), (7, 19), (19, 24)):
            alone = model(input_ids=torch.from_numpy(ids[start:end])[None])[0][0]
            assert torch.allclose(found[0, start:end], alone, atol=1e-5)
        assert torch.allclose(found[1, :9], model(input_ids=torch.from_numpy(ids[:9])[None])[0][0], atol=1e-5)


UNABLE = {
    "type": ("mpnet", {}, "sdpa", "not tested with mpnet"),
    "window": (
        "qwen3",
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4},
        "sdpa",
        "attention is",
    ),
    "kernel": ("bert", {}, "eager", "attn_implementation is eager"),
}


@pytest.mark.parametrize("name", UNABLE)
def test_others_take_each_text_as_a_row(name, capsys):
    kind, settings, kernel, reason = UNABLE[name]
    config = AutoConfig.for_model(kind, **OWN.get(kind, SIZES) | settings)
    model = AutoModel.from_config(config, attn_implementation=kernel if kind != "mpnet" else None)
    assert find_blocks(model, "blocks", causal=False) is None
    assert f"no block mask ({reason}" in capsys.readouterr().out


def test_pieces_are_rows_where_they_are_asked_for(capsys):
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SIZES))
    assert find_blocks(model, "pieces", causal=False) is None
    assert (find_blocks(model, "auto", causal=False) is None) is not torch.accelerator.is_available()
    assert capsys.readouterr().out == ""
