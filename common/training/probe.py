"""Start the head of a classifier at a linear probe: logistic regression on what the frozen encoder gives the head.

Fine-tuning then starts from a good head, and changes the encoder less than it would with a random one (LP-FT, Kumar et
al. 2022, https://arxiv.org/abs/2202.10054). A head with the full weights of the probe leaves too little to learn: it
fits the training rows already. A smaller one ranks the classes alike, and its loss is higher (Tomihara and Sato 2024,
https://arxiv.org/abs/2405.16747).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from scipy.special import log_expit, log_softmax
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.args import HeadArguments, TrainingArguments
from common.errors import tell
from common.hardware import sharding
from common.inference.predictor import token_batches
from common.models.load import LoadedModel
from common.models.structure import head_names, layer_names
from common.models.trial import trial

#: strengths tried: the C of scikit-learn, inverse to the weight of the penalty
STRENGTHS = (0.0003, 0.003, 0.03, 0.3, 3.0)
#: share of the probe's weights at which the head starts, if training follows (recipes/sentiment/RESULTS.md)
SHARE = 0.3
#: about the most labels that a probe is fitted to, or compared by; a random sample of the rows has them
MOST_LABELS = 20_000
#: least standard deviation of a feature, relative to the size of all features; a smaller one is not scaled up to 1
LEAST_SPREAD = 0.1
#: tokens in a batch
BATCH_TOKENS = 8192
#: weight and bias before an activation that passes its input on: the linear part of tanh, the positive part of others
LINEAR_PARTS = ((0.1, 0.0), (1.0, 10.0))
#: least correlation of input and output that counts as linear
LEAST_LIKENESS = 0.99


@dataclass
class Linear:
    """A linear classifier of features: `weight` (classes, width) and `bias` (classes,)."""

    weight: np.ndarray
    bias: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return scores (rows, classes) of features (rows, width)."""
        return features @ self.weight.T + self.bias


def start_at_probe(
    loaded: LoadedModel,
    rows: DatasetDict,
    model_args: HeadArguments,
    args: TrainingArguments,
    weights: Tensor | None = None,
    multi_label: bool = False,
    strengths: Sequence[float] | None = None,
) -> bool:
    """Set the last layer of the head to a logistic regression; its strength has the least loss on the validation rows.

    The other layers of a head that no classification has trained pass the encoder's output on.

    Args:
        loaded: the model, before `common.tuning.tune`.
        rows: encoded rows with `labels`, of which the splits train and validation are read.
        model_args: `head_init` says whether a probe is wanted.
        args: give device, precision, seed, and whether training follows.
        weights: weight of each class in the loss; None for equal weights.
        multi_label: whether `labels` has a 0 or 1 for each class.
        strengths: the strengths that are tried; `STRENGTHS` for None.

    Returns:
        Whether the head was set. Under "probe" it stays as it is if the checkpoint has a head for these labels, if the
        class has no such head, if all training rows have one label, or under FSDP and DeepSpeed, which shard weights.
    """
    model = loaded.model
    assert isinstance(model, PreTrainedModel)
    layer = last_linear(model)
    names = {id(weight): name for name, weight in model.named_parameters()}
    wanted = model_args.head_init == "probe" and not sharding()
    if layer is None or names[id(layer.weight)] not in loaded.new_parameters or not wanted:
        return False
    pass_on(model, layer)
    classes = layer.out_features
    features, labels = features_of(loaded, layer, _sample(rows["train"], args.seed), args)
    if len(np.unique(labels, axis=0)) < 2:
        return False
    held_out = features_of(loaded, layer, _sample(rows["validation"], args.seed), args)
    each = np.ones(classes) if weights is None else weights.numpy()
    best = best_probe((features, labels), held_out, each, strengths or STRENGTHS, multi_label)
    share = SHARE if args.max_steps > 0 or args.num_train_epochs else 1.0
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(share * best.weight))
        if layer.bias is not None:  # most decoders have none
            layer.bias.copy_(torch.from_numpy(share * best.bias))
    tell(f"the head starts at a linear probe of {len(labels):,} labels (--head_init random: at random weights)")
    return True


def last_linear(model: PreTrainedModel) -> nn.Linear | None:
    """Return the linear layer of the head that scores the classes; None if there is none."""
    heads = {name.rpartition(".")[0] for name in head_names(model)}
    layers = [module for name, module in model.named_modules() if name in heads and isinstance(module, nn.Linear)]
    return next((layer for layer in reversed(layers) if layer.out_features == model.config.num_labels), None)


def pass_on(model: PreTrainedModel, last: nn.Linear) -> None:
    """Let the linear layer between the encoder and the last layer of the head pass its input on.

    A head without such a layer, or with several, stays as it is, and so does one whose activation has no linear part,
    and one that a classification has trained.
    """
    if (model.config.architectures or [""])[0].endswith("ForSequenceClassification"):
        return
    ids = torch.randint(3, model.config.vocab_size, (4, 9), generator=torch.Generator().manual_seed(0)).to(model.device)
    order: list[Any] = []
    inputs: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        order.append(module)
        inputs[module] = args[0]

    def run() -> None:
        order.clear()
        with trial(model):
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(record)
            model(input_ids=ids, attention_mask=torch.ones_like(ids))

    run()
    inside = {id(module) for name in layer_names(model, pooling=True) for module in model.get_submodule(name).modules()}
    end = max((i for i, module in enumerate(order) if id(module) in inside), default=-1)
    between = [module for module in order[end + 1 :] if module is not last]
    if len(between) != 1 or between[0].in_features != between[0].out_features:
        return
    dense = between[0]
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    likeness = []
    for weight, bias in LINEAR_PARTS:
        _scale(dense, weight, bias)
        run()
        given, got = inputs[dense], inputs[last]
        likeness.append(float(torch.corrcoef(torch.stack([given.flatten(), got.flatten()]))[0, 1]))
    if max(likeness) < LEAST_LIKENESS:
        dense.load_state_dict(before)
    else:
        _scale(dense, *LINEAR_PARTS[int(np.argmax(likeness))])


@torch.no_grad()
def _scale(layer: nn.Linear, weight: float, bias: float) -> None:
    """Let a square layer multiply its input by `weight` and add `bias`."""
    nn.init.eye_(layer.weight).mul_(weight)
    if layer.bias is not None:
        layer.bias.fill_(bias)


def features_of(
    loaded: LoadedModel, layer: nn.Linear, rows: Dataset, args: TrainingArguments
) -> tuple[np.ndarray, np.ndarray]:
    """Return what `layer`, the last one of the head, reads at each label without dropout, and the labels.

    A row has a label, a 0 or 1 for each class, or a label for each token (-100: none).

    Returns:
        Features in float32, (labels, width), and the labels, in the order of the rows.
    """
    model = loaded.model if loaded.model.device == args.device else loaded.model.to(args.device)
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    labels = rows["labels"][:]
    rows = rows.select_columns([name for name in tokenizer.model_input_names if name in rows.column_names])
    features: list[Any] = [None] * len(rows)
    with trial(model), inputs_as_outputs(layer), torch.autocast(args.device.type, torch.bfloat16, bool(args.bf16)):
        for batch in token_batches([len(ids) for ids in rows["input_ids"]], BATCH_TOKENS):
            inputs = tokenizer.pad(rows[batch], return_tensors="pt").to(args.device)
            for row, read in zip(batch, model(**inputs).logits.float().cpu().numpy(), strict=True):
                of_tokens = read.ndim == 2
                features[row] = read[np.flatnonzero(np.array(labels[row]) != -100)] if of_tokens else read[None]
    flat = [number for of_row in labels for number in of_row if number != -100] if of_tokens else labels
    return np.concatenate(features), np.array(flat)


def best_probe(
    known: tuple[np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray],
    weights: np.ndarray,
    strengths: Sequence[float] = STRENGTHS,
    multi_label: bool = False,
) -> Linear:
    """Fit a probe of each strength, and return the one with the least mean loss on held-out labels.

    Args:
        known: features (labels, width), and the class of each, or a 0 or 1 for each class.
        held_out: the same of other rows.
        weights: weight of each class in the loss, (classes,).
        strengths: the strengths that are tried.
        multi_label: whether there is a 0 or 1 for each class.
    """
    with threadpool_limits(1):  # the products are small: more threads are slower
        tried = _fits(*known, weights, len(weights), strengths, multi_label)
    return min(tried, key=lambda probe: _mean_loss(probe.logits(held_out[0]), held_out[1], multi_label))


def _sample(rows: Dataset, seed: int) -> Dataset:
    """Return random rows with about `MOST_LABELS` labels, or all rows if they have fewer."""
    labels = rows["labels"][:]
    counts = [sum(number != -100 for number in row) if isinstance(row, list) else 1 for row in labels]
    order = np.random.default_rng(seed).permutation(len(rows))
    kept = order[: 1 + np.searchsorted(np.cumsum(np.array(counts)[order]), MOST_LABELS)]
    return rows.select(np.sort(kept))


@contextmanager
def inputs_as_outputs(layer: nn.Module) -> Iterator[None]:
    """Let `layer` return its input inside the block."""
    vars(layer)["forward"] = lambda features: features
    try:
        yield
    finally:
        del vars(layer)["forward"]


def _fits(
    features: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    classes: int,
    strengths: Sequence[float],
    multi_label: bool,
) -> list[Linear]:
    """Fit a probe of each strength to the labels of features (rows, width), standardised for the fit."""
    mean = features.mean(0, dtype=np.float64)
    scale = np.maximum(features.std(0), LEAST_SPREAD * np.sqrt(np.square(features).mean()))
    scaled = (features - mean) / scale
    probes = [_fit(scaled, labels, weights, classes, strength, multi_label) for strength in strengths]
    return [Linear(probe.weight / scale, probe.bias - probe.weight / scale @ mean) for probe in probes]


def _fit(
    scaled: np.ndarray, labels: np.ndarray, weights: np.ndarray, classes: int, strength: float, multi_label: bool
) -> Linear:
    """Fit a probe to the labels of standardised features (rows, width) by logistic regression."""
    count, width = scaled.shape
    probe = Linear(np.zeros((classes, width)), np.full(classes, -np.log(count)))  # a class without rows is rare
    model = LogisticRegression(C=strength, max_iter=300, tol=1e-3)
    if multi_label:
        for i, hits in enumerate(labels.T > 0):
            if hits.all():
                probe.bias[i] *= -1
            elif hits.any():
                model.fit(scaled, hits, np.where(hits, weights[i], 1.0))
                probe.weight[i], probe.bias[i] = model.coef_[0], model.intercept_[0]
    else:
        model.fit(scaled, labels, weights[labels])
        seen = model.classes_
        pair = len(seen) == 2  # one set of weights, that of the second class
        probe.weight[seen] = np.concatenate([-model.coef_, model.coef_]) / 2 if pair else model.coef_
        probe.bias[seen] = np.concatenate([-model.intercept_, model.intercept_]) / 2 if pair else model.intercept_
    return probe


def _mean_loss(scores: np.ndarray, labels: np.ndarray, multi_label: bool) -> float:
    """Return the mean loss of scores (labels, classes)."""
    if multi_label:
        return float(-log_expit(np.where(labels > 0, scores, -scores)).mean())
    return float(-log_softmax(scores, axis=-1)[np.arange(len(labels)), labels].mean())
