"""Compare outputs of barely trained models, for which rounding decides between almost equal choices."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: closer log-probabilities may come in either order
TIE = 1e-4


@torch.no_grad()
def margin(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> float:
    """Return the smallest difference of log-probability between the best two tokens of a greedy search."""
    inputs = tokenizer([source], return_tensors="pt")
    found = model.eval().generate(**inputs, num_beams=1, output_scores=True, return_dict_in_generate=True)
    best = torch.stack(found.scores).log_softmax(-1).topk(2).values
    return (best[..., 0] - best[..., 1]).min().item()


def assert_same_texts(
    found: list[str],
    expected: list[str],
    sources: list[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Assert that two greedy searches wrote the same texts, except where two tokens are almost equally probable.

    Args:
        found: texts of one search.
        expected: texts of the other search.
        sources: inputs of the model, with prefix.
        model: the model of both searches.
        tokenizer: tokenizer of the model.
    """
    unlike = [i for i, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other]
    assert len(unlike) <= len(found) / 2, [(found[i], expected[i]) for i in unlike]
    for i in unlike:
        assert margin(model, tokenizer, sources[i]) < TIE, (found[i], expected[i])


def assert_same_but_for_a_tie(found: list, expected: list) -> bool:
    """Assert that at most one predicted row of two runs differs, and return whether none differs."""
    unlike = [pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1]]
    assert len(unlike) <= 1, unlike
    return not unlike
