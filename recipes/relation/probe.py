"""Rate the baseline of frozen features: logistic regression on the states of the pretrained encoder."""

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import nn
from transformers import PreTrainedTokenizerFast

from common.models.structure import transformer_of
from common.training.probe import best_probe

from .markers import PairCollator, encode_pairs

#: most training and validation rows of the probe, which bounds its time and memory
MOST_ROWS = 4000
BATCH = 32


@torch.no_grad()
def features(
    rows: Dataset, model: nn.Module, tokenizer: PreTrainedTokenizerFast, max_seq_length: int, device: torch.device
) -> np.ndarray:
    """Return the mean state of the head, of the tail and of the whole text for each row, (rows, 3 width).

    Call it before training. No marker is in the texts, as the pretrained encoder does not know them.
    """
    columns = encode_pairs(rows[:], tokenizer, None, max_seq_length)
    collate, encoder = PairCollator(tokenizer, at_markers=False), transformer_of(model)
    if encoder.device != device:
        encoder.to(device)
    training = encoder.training
    encoder.eval()
    order = np.argsort([len(ids) for ids in columns["input_ids"]], kind="stable")
    results: list[np.ndarray] = [np.zeros(0)] * len(order)
    for start in range(0, len(order), BATCH):
        numbers = order[start : start + BATCH].tolist()
        batch = collate([{name: values[i] for name, values in columns.items()} for i in numbers])
        batch = {name: values.to(device) for name, values in batch.items()}
        states = encoder(**batch)[0].float()
        for i, of_row, mask in zip(numbers, states, batch["attention_mask"], strict=True):
            parts = [of_row[first : max(last, first + 1)].mean(0) for first, last in columns["spans"][i]]
            results[i] = torch.cat([*parts, of_row[mask.bool()].mean(0)]).cpu().numpy()
    encoder.train(training)
    return np.stack(results)


def probe(
    data: DatasetDict,
    relations: list[str],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    max_seq_length: int,
    device: torch.device,
) -> list[str]:
    """Return the relation of each test row by a linear probe on `features` of the first training rows.

    Its strength has the least loss on the first validation rows.

    Args:
        data: the splits train, validation and test.
        relations: the relations of all splits.
        model: the pretrained model.
        tokenizer: its tokenizer.
        max_seq_length: longest row, in tokens.
        device: where the model runs.
    """
    rows = {split: data[split].select(range(min(len(data[split]), MOST_ROWS))) for split in ("train", "validation")}
    labels = {split: np.array([relations.index(label) for label in of["label"][:]]) for split, of in rows.items()}
    read = {
        split: features(of, model, tokenizer, max_seq_length, device)
        for split, of in (rows | {"test": data["test"]}).items()
    }
    if len(set(labels["train"])) < 2:
        return [relations[labels["train"][0]]] * len(read["test"])
    known, held_out = ((read[split], labels[split]) for split in ("train", "validation"))
    best = best_probe(known, held_out, np.ones(len(relations)))
    return [relations[i] for i in best.logits(read["test"]).argmax(1)]
