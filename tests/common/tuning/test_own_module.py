"""Test a custom `nn.Module` with a custom head through tune, merge, save and load."""

from pathlib import Path

import pytest
import torch
from peft import TaskType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from common.models.load import LoadedModel
from common.tuning import TuningArguments, merge, tune

IDS = torch.tensor([[2, 9, 8, 7, 3], [2, 11, 3, 0, 0]])


class Pooled(nn.Module):
    """BERT with two more layers on its mean vector."""

    def __init__(self, path: str):
        super().__init__()
        self.bert = AutoModel.from_pretrained(path, add_pooling_layer=False)
        width = self.bert.config.hidden_size
        self.scorer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].float()
        return self.scorer((hidden * mask).sum(1) / mask.sum(1))


def names(parts: str, model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(parts.split()))}


@pytest.mark.parametrize(
    ("method", "trained"),
    [("full", "bert. scorer."), ("head", "scorer."), ("top:1", "bert.encoder.layer.1. scorer."), ("lora", "scorer.")],
)
@pytest.mark.parametrize("task_type", [TaskType.SEQ_CLS, None])
def test_it_trains_merges_and_loads(tiny, tokenizer, tmp_path, method, trained, task_type):
    model = Pooled(tiny)
    fresh = frozenset(names("scorer.", model))
    whole = names("bert. scorer.", model)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tuned = tune(LoadedModel(model, tokenizer, fresh, source=tiny), TuningArguments(tuning=method), task_type)
    trainable = {name for name, weight in tuned.model.named_parameters() if weight.requires_grad}
    plain = {name.replace("base_model.model.", "").replace("modules_to_save.default.", "") for name in trainable}
    assert {name for name in plain if "lora" not in name} == names(trained, model) & whole
    assert any("lora_A" in name for name in plain) == (method == "lora")

    inputs = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
    labels = torch.tensor([0, 2])
    optimizer = torch.optim.AdamW([w for w in tuned.model.parameters() if w.requires_grad], lr=5e-3)
    losses = []
    for _ in range(40):
        losses.append(nn.functional.cross_entropy(tuned.model.train()(**inputs), labels))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2

    with torch.no_grad():
        expected = tuned.model.eval()(**inputs)
        merged = merge(tuned, str(tmp_path), save=True).eval()
        assert torch.allclose(merged(**inputs), expected, atol=1e-4)
        assert {name for name, _ in merged.named_parameters()} == whole
        save_file(merged.state_dict(), tmp_path / "model.safetensors")
        again = Pooled(tiny).eval()
        again.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert torch.equal(again(**inputs), merged(**inputs))
    changed = {name for name, weight in again.named_parameters() if not torch.equal(weight, start[name])}
    adapted = names("bert.encoder.", again) & {
        name for name in whole if "query.weight" in name or "value.weight" in name
    }
    assert changed == (names(trained, again) | adapted if method == "lora" else names(trained, again))
    assert Path(tmp_path, "adapter").exists() == (method == "lora")
