"""Turn the states of a Transformer into one vector a text, and save the way in the format of sentence-transformers."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from common.errors import InputError
from common.models import LoadedModel, resolve_model
from common.models.load import trained_pooling

Pooling = Literal["mean", "cls", "max"]
#: flags of the poolings in the configuration of sentence-transformers
POOLINGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}
#: entry of the saved configuration of the model
SAVED = "matching"


@dataclass(frozen=True)
class Reading:
    """How a text becomes a vector; saved with the model.

    Attributes:
        pooling: the mean or the maximum over the tokens, or the state at the first token.
        query_prefix: written before each query, such as `query: ` for E5.
        passage_prefix: written before each passage.
    """

    pooling: Pooling = "mean"
    query_prefix: str = ""
    passage_prefix: str = ""


def saved(reading: Reading) -> dict[str, dict[str, str]]:
    """Return the entry of the saved configuration by which `reading_of` finds `reading`."""
    return {SAVED: asdict(reading)}


def pooled(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Return a vector of length 1 for each text, in float32.

    Args:
        states: last states of the Transformer, (texts, length, width).
        mask: 1 at real tokens, (texts, length).
        pooling: see `Reading`.
    """
    states = states.float()
    if pooling == "cls":
        vectors = states[:, 0]
    elif pooling == "max":
        vectors = states.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
    else:
        weights = mask[..., None].to(states.dtype)
        vectors = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return F.normalize(vectors, dim=-1)


def reading_of(path: str, config: PretrainedConfig) -> Reading:
    """Return how the model in folder `path` was trained to read; mean pooling if the folder does not say.

    Raises:
        InputError: sentence-transformers pools the model in a way that this recipe lacks.
    """
    saved = getattr(config, SAVED, None)
    if saved is not None:
        return Reading(**saved)
    trained = {"mean": "mean", "first": "cls"}.get(trained_pooling(path) or "")
    if trained is None and Path(path, "1_Pooling").is_dir():
        raise InputError(f"{path}/1_Pooling: pools in a way that this recipe lacks; give --pooling mean, cls or max")
    return Reading(trained or "mean")


def save_modules(folder: Path, reading: Reading, width: int, max_seq_length: int) -> None:
    """Write the files by which `SentenceTransformer(folder)` loads the Transformer in `folder` with its pooling."""
    kind = "sentence_transformers.models."
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{kind}{name}"}
        for i, (name, path) in enumerate((("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")))
    ]
    pooling = {flag: mode == reading.pooling for flag, mode in POOLINGS.items()}
    pooling |= {"pooling_mode_mean_sqrt_len_tokens": False, "pooling_mode_weightedmean_tokens": False}
    pooling |= {"pooling_mode_lasttoken": False, "include_prompt": True}
    prompts = {"query": reading.query_prefix, "document": reading.passage_prefix}
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": max_seq_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {"word_embedding_dimension": width} | pooling,
    }
    (folder / "2_Normalize").mkdir(parents=True, exist_ok=True)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def chosen(
    loaded: LoadedModel, pooling: Pooling | None, query_prefix: str, passage_prefix: str, revision: str | None = None
) -> Reading:
    """Return how a model is trained to read: the given pooling, else that of its checkpoint, else mean."""
    if pooling is None and loaded.source is None:
        pooling = "mean"
    if pooling is None:
        pooling = reading_of(resolve_model(loaded.source, revision), loaded.model.config).pooling
    return Reading(pooling, query_prefix, passage_prefix)


def without_pooler(loaded: LoadedModel) -> LoadedModel:
    """Freeze the pooler, a layer for classification behind the first token that no vector passes through.

    Call it before `tune`, which trains all new parameters, and after it, because it chooses the trained parameters.
    """
    poolers = {name for name, _ in loaded.model.named_parameters() if ".pooler." in f".{name}"}
    for name, weight in loaded.model.named_parameters():
        if name in poolers:
            weight.requires_grad_(False)
    return replace(loaded, new_parameters=loaded.new_parameters - poolers)
