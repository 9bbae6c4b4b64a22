"""Train the encoder on few rows so that texts of one class have similar vectors (SetFit).

Tunstall et al. 2022 (https://arxiv.org/abs/2209.11055) train on pairs of texts: the cosine similarity of their vectors
should be 1 for texts of one class, and 0 for others. Here all pairs within a batch are trained, because a vector costs
much more than the product of two.
"""

import copy
from collections.abc import Collection, Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel

from common.args import SpeedArguments, TrainingArguments
from common.errors import InputError, tell
from common.models.load import LoadedModel
from common.models.pooling import fix_pooling
from common.models.structure import depths, layer_names
from common.speed import apply
from common.training.probe import inputs_as_outputs, last_linear, pass_on

from .steps import shuffled, train_steps

#: rows of a batch
SIZE = 32
RATE = 2e-5


def batches(labels: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the row numbers of training batches without end; all classes occur equally often.

    A batch has the same number of rows of each of its classes, and at least 2, so that each row is in a pair of its
    class. No list of pairs is made: memory grows with the rows only.

    Args:
        labels: 0 and 1, (rows, classes).
        size: rows of a batch, at least 4; fewer if the classes have fewer rows.
        seed: seed of the order.
    """
    random = np.random.default_rng(seed)
    of_class = [np.flatnonzero(column) for column in labels.T if column.any()]
    streams = [shuffled(rows.tolist(), random) for rows in of_class]
    together = min(len(streams), size // 2)
    classes = shuffled(range(len(streams)), random)
    while True:
        rows: set[int] = set()
        for number in islice(classes, together):
            rows.update(islice(streams[number], min(size // together, len(of_class[number]))))
        yield np.array(sorted(rows))


def pair_loss(vectors: Tensor, labels: Tensor) -> Tensor:
    """Return the mean squared error of the cosine similarities of all pairs in a batch.

    Pairs with a common class should have the similarity 1, the others 0. Both kinds have the same weight.

    Args:
        vectors: (rows, width).
        labels: 0 and 1, (rows, classes).
    """
    units = F.normalize(vectors)
    same = ((labels @ labels.T) > 0).float()
    errors = (units @ units.T - same) ** 2
    pairs = same - torch.eye(len(same), device=same.device)  # a row with itself is no pair
    alike, other = ((errors * kind).sum() / kind.sum().clamp(min=1) for kind in (pairs, 1 - same))
    return (alike + other) / 2


def train_encoder(
    loaded: LoadedModel, rows: Dataset, steps: int | None, rate: float | None, args: TrainingArguments
) -> None:
    """Train the layers and embeddings of `loaded` in place by `pair_loss`; its head stays as it is.

    The vectors are what the last layer of the head reads, so the pooling is that of the classifier.

    Args:
        loaded: the classifier, before `common.tuning.tune`.
        rows: encoded rows with `labels`: a class number, or a 0 or 1 for each class.
        steps: number of steps; by the number of rows for None.
        rate: highest learning rate; `RATE` for None.
        args: see `steps.train_steps`.

    Raises:
        InputError: the rows have no two classes, or none has two rows; or a loss is no finite number.
    """
    gold = np.array(rows["labels"][:])
    labels = np.eye(loaded.model.config.num_labels)[gold] if gold.ndim == 1 else gold
    if labels.sum(0).max() < 2 or labels.any(0).sum() < 2:
        raise InputError("--few_shot contrastive: needs two classes, and two training rows of one; add rows")
    steps = steps or default_steps(len(rows))
    model = copy.deepcopy(loaded.model).to(args.device)
    layer = last_linear(model)
    pass_on(model, layer)
    trained = train_below_head(model, loaded.new_parameters)
    apply(
        LoadedModel(model, loaded.tokenizer, attn_implementation=loaded.attn_implementation),
        SpeedArguments(speed=args.speed),
    )
    collate = DataCollatorWithPadding(loaded.tokenizer, pad_to_multiple_of=loaded.pad_multiple)
    inputs = rows.select_columns([name for name in loaded.tokenizer.model_input_names if name in rows.column_names])

    def loss_of(batch: np.ndarray) -> Tensor:
        vectors = model(**collate(inputs.select(batch).to_list()).to(args.device)).logits
        return pair_loss(vectors.float(), torch.tensor(labels[batch], dtype=torch.float32, device=args.device))

    tell(f"contrastive training: {steps} steps of at most {SIZE} of {len(rows):,} rows")
    with inputs_as_outputs(layer):
        loss = train_steps(model, batches(labels, SIZE, args.seed), loss_of, steps, rate or RATE, args)
    tell(f"contrastive training: loss of the last step {loss:.4f}")
    weights = {name: value for name, value in model.state_dict().items() if name in trained}
    loaded.model.load_state_dict(weights, strict=False)


def train_below_head(model: PreTrainedModel, new_parameters: Collection[str]) -> set[str]:
    """Freeze all parameters but those of the embeddings and layers; return the names of these."""
    layers, depth = layer_names(model), depths(model, new_parameters)
    inside = {n for n, d in depth.items() if d == 0 or (d <= len(layers) and n.startswith(f"{layers[d - 1]}."))}
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in inside)
    fix_pooling(model)
    return inside


def default_steps(rows: int) -> int:
    """Return the number of steps for a number of rows: 23 for 32, 99 for 616, 392 for 9,600."""
    return round(4 * rows**0.5)
