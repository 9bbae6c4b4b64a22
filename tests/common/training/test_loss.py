"""Test that a label of -100 has no part in any loss of the recipes: a part of a step without a row has only those."""

import pytest
import torch

from common.training import label_losses, losses_at_labels
from recipes.mlm.pairs import pair_losses
from recipes.qa.spans import span_losses
from recipes.sentiment.texts import loss_with
from recipes.summarization.extractive import sentence_losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("losses", "logits", "labels"),
    [
        (label_losses, (2, 5, 3), (2, 5)),
        (losses_at_labels, (2, 5, 3), (2, 5)),
        (loss_with(None, False), (2, 3), (2,)),
        (loss_with(torch.tensor([0.5, 1.0, 1.5]), False), (2, 3), (2,)),
        (loss_with(torch.tensor([0.5, 1.0, 1.5]), True), (2, 3), (2, 3)),
        (sentence_losses, (2, 5, 1), (2, 4, 3)),
        (span_losses, (2, 2, 5), (2, 2)),
        (pair_losses, (1, 2, 2), (2,)),
    ],
)
def test_labels_of_minus_100_give_no_loss_and_no_gradient(losses, logits, labels, smoothing):
    scores = torch.randn(logits, requires_grad=True)
    given = tuple(scores) if losses in (span_losses, pair_losses) else scores
    multi_label = len(labels) == 2 and logits == labels
    found = losses(given, torch.full(labels, -100.0 if multi_label else -100), smoothing)
    assert found.shape == labels
    assert found.abs().sum() == 0
    found.sum().backward()
    assert scores.grad.abs().sum() == 0
