"""Encode texts with a saved model: no padding, sorted batches, bf16 where the hardware has it."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

from common.inference.predictor import Predictor
from common.models import resolve_model
from common.models.load import load_config
from common.training.checkpoints import sha256
from common.tuning.tune import ADAPTER, BASE

from .pairs import encode_texts
from .vectors import pooled, reading_of


class Embedder(Predictor):
    """A saved encoder, or one of the hub, that turns texts into vectors of length 1.

    Attributes:
        reading: how it reads.
        width: length of a vector.
    """

    def __init__(self, model: str, batch_tokens: int = 4096, precision: str = "auto", speed: str = "auto", **more):
        super().__init__(AutoModel, "Model", model, batch_tokens, precision, speed, **more)
        self.name, self.path = model, resolve_model(model)
        self.reading = reading_of(self.path, self.config)
        self.width = self.config.hidden_size

    def __call__(self, texts: list[str], prefix: str = "") -> np.ndarray:
        """Return the vector of each text in float32, (texts, width). `prefix` is written before each text."""
        ids, _ = encode_texts(self.tokenizer, [prefix + text for text in texts], self.max_length)
        vectors = np.empty((len(ids), self.width), dtype=np.float32)
        for batch, outputs in self.outputs({"input_ids": ids}):
            states = outputs["last_hidden_state"]
            lengths = torch.tensor([len(ids[i]) for i in batch], device=states.device)
            mask = (torch.arange(states.shape[1], device=states.device) < lengths[:, None]).long()
            vectors[batch] = pooled(states, mask, self.reading.pooling).cpu().numpy()
        return vectors

    def queries(self, texts: list[str]) -> np.ndarray:
        """Return the vector of each query, (texts, width)."""
        return self(texts, self.reading.query_prefix)

    def passages(self, texts: list[str]) -> np.ndarray:
        """Return the vector of each passage, (texts, width)."""
        return self(texts, self.reading.passage_prefix)


def fingerprint(model: str) -> str:
    """Return a hash of what decides the vectors of a model: weights, tokenizer, pooling, prefixes and length."""
    path = resolve_model(model)
    config = load_config(path)
    files = [file for part in ("", BASE, ADAPTER) for file in Path(path, part).glob("*.safetensors")]
    files += Path(path).glob("tokenizer.json")
    settings = asdict(reading_of(path, config)) | {"length": getattr(config, "max_seq_length", None)}
    described = [json.dumps(settings, sort_keys=True), *(sha256(file) for file in sorted(files))]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()
