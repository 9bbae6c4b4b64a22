"""Rate the baseline of frozen features: logistic regression on the states of the pretrained encoder."""

import numpy as np
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import PreTrainedTokenizerFast

from common.models.structure import transformer_of

from .markers import PairCollator, encode_pairs

#: most training rows of the probe, which bounds its time and memory
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
    train: Dataset, test: Dataset, model: nn.Module, tokenizer: PreTrainedTokenizerFast, max_seq_length: int, device
) -> list[str]:
    """Return the relation of each test row by logistic regression on `features` of the first training rows."""
    train = train.select(range(min(len(train), MOST_ROWS)))
    known, asked = (features(rows, model, tokenizer, max_seq_length, device) for rows in (train, test))
    labels = train["label"][:]
    if len(set(labels)) < 2:
        return [labels[0]] * len(asked)
    # C as in the probes of CLIP: small, for features as many as rows
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)).fit(known, labels)
    return fitted.predict(asked).tolist()
