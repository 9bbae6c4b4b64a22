"""Test the signs that rank sources: LogME against the evidence computed directly, probes, and the features of rows."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from transformers import AutoModelForSequenceClassification

from common.run.transferable import TaskRows
from common.tools.transfer.signs import Embedder, Features, log_evidence, probe_score, source_outputs, vocabulary


def best_evidence(features: np.ndarray, label: np.ndarray) -> float:
    """Return the largest log evidence of a Bayesian linear model, over the precisions of weights and noise."""

    def negative(logs: np.ndarray) -> float:
        alpha, beta = np.exp(logs)
        covariance = np.eye(len(label)) / beta + features @ features.T / alpha
        return -multivariate_normal(np.zeros(len(label)), covariance, allow_singular=True).logpdf(label)

    return -minimize(negative, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-6}).fun


@pytest.mark.parametrize("width", [3, 40])  # fewer and more features than rows
def test_logme_is_the_best_evidence(width):
    random = np.random.default_rng(0)
    features = random.normal(size=(30, width))
    classes = ["a" if value > 0 else "b" for value in features[:, 0] + 0.3 * random.normal(size=30)]
    label = np.array([float(name == "a") for name in classes])
    expected = (best_evidence(features, label) + best_evidence(features, 1 - label)) / 2 / 30
    assert log_evidence(features, classes) == pytest.approx(expected, abs=2e-3)


def test_features_that_tell_the_classes_promise_more():
    random = np.random.default_rng(0)
    features = random.normal(size=(60, 5))
    told = ["a" if row[1] > 0 else "b" for row in features]
    mixed = list(random.permutation(told))
    assert log_evidence(features, told) > log_evidence(features, mixed)
    assert probe_score(features, told) > 0.85 > probe_score(features, mixed)
    assert probe_score(features, ["a"] * 60) is None
    # a source whose classes are those of the target tells them, one with other classes does not
    target = Features(features.mean(0), features, told)
    other = ["x" if row[2] > 0 else "y" for row in features]
    same, apart = (source_outputs(Features(features.mean(0), features, names), target) for names in (told, other))
    assert log_evidence(same, told) > log_evidence(apart, told)
    assert source_outputs(Features(features.mean(0), features, None), target) is None


def test_embeddings_are_those_of_the_words_and_of_the_text(tiny):
    rows = TaskRows(
        [["the", "river", "rises"], ["a house"]], [["O", "LOC", "O"], ["O"]], AutoModelForSequenceClassification, (0, 0)
    )
    embed = Embedder(tiny)
    features = embed(rows)
    assert sorted(features.classes) == ["LOC", "O", "O", "O"]
    encoded = embed.tokenizer(["the", "river", "rises"], is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        states = embed.model(**encoded).last_hidden_state[0].numpy()
    river = states[[number == 1 for number in encoded.word_ids()]].mean(0)
    assert features.pieces[features.classes.index("LOC")] == pytest.approx(river, abs=1e-5)
    assert features.mean.shape == (64,)


def test_the_vocabulary_has_the_most_frequent_words():
    assert vocabulary(["The house, the HOUSE", "a river"]) == {"the", "house", "a", "river"}
