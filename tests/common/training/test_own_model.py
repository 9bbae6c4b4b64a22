"""Train a custom module around an encoder, with a custom head, by each kind of tuning."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
    MixtralConfig,
    MixtralForSequenceClassification,
)

from common.args import TrainingArguments
from common.errors import InputError
from common.models.load import LoadedModel
from common.training import Trainer, label_losses
from common.tuning import TuningArguments, merge, tune
from common.tuning.adapters import load_adapters

CLASSES = 3


class MeanHead(nn.Module):
    """Classify a text by the mean of its token vectors, with a hidden layer."""

    def __init__(self):
        super().__init__()
        config = BertConfig(
            vocab_size=500, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, input_ids, attention_mask):
        vectors = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(vectors.dtype)
        return {"logits": self.head((vectors * mask).sum(1) / mask.sum(1))}


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Return 48 texts; the first token determines the class."""
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, size=48)
    ids = [
        [2, *[10 + int(label)] * int(size), 3] for label, size in zip(labels, random.integers(2, 12, 48), strict=True)
    ]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels})


def make(tokenizer, folder, rows, tuning: str, **given) -> Trainer:
    torch.manual_seed(0)
    defaults = {"precision": "fp32", "disable_tqdm": True, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    defaults |= {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4, "save_total_limit": None}
    defaults |= {"eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "accuracy"}
    return Trainer(
        model=tune(LoadedModel(MeanHead(), tokenizer), TuningArguments(tuning=tuning), None),
        args=TrainingArguments(output_dir=str(folder), **defaults | given),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        losses=label_losses,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda p, d: {"accuracy": float(np.mean(np.stack(p.predictions) == np.stack(p.label_ids)))},
    )


@pytest.mark.parametrize(
    "tuning", [*(pytest.param(t, marks=pytest.mark.soak) for t in ("full", "head", "top:1")), "lora"]
)
def test_trained_killed_resumed_saved_and_loaded(tokenizer, tmp_path, rows, tuning):
    whole = make(tokenizer, tmp_path / "whole", rows, tuning)
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.train()
    after = whole.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed >= {name for name, value in whole.model.named_parameters() if value.requires_grad and "head" in name}
    frozen = {"full": set(), "head": {"encoder"}, "top:1": {"encoder.embeddings", "encoder.encoder.layer.0"}}
    for prefix in frozen.get(tuning, ()):
        assert not any(name.startswith(f"{prefix}.") for name in changed)

    resumed = make(tokenizer, tmp_path / "whole", rows, tuning)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(value, after[name]) for name, value in resumed.model.state_dict().items())

    metrics = whole.evaluate()
    whole.model = merge(whole.tuned, str(tmp_path / "out"), save=False)
    assert not isinstance(whole.model, PeftModel)
    whole.save_model(str(tmp_path / "out"))
    plain = MeanHead()
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    found = Trainer(
        model=plain,
        args=whole.args,
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        losses=label_losses,
    ).evaluate()
    assert found["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_adapters_and_base_are_saved_apart(tokenizer, tmp_path, rows):
    trainer = make(tokenizer, tmp_path, rows, "adapter", num_train_epochs=1)
    trainer.train()
    trained = trainer.model.eval()
    trainer.model = merge(trainer.tuned, str(tmp_path / "out"), save=True)
    trainer.save_model(str(tmp_path / "out"))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    plain = MeanHead().eval()
    plain.load_state_dict(load_file(tmp_path / "out" / "base" / "model.safetensors"))  # strict: no adapter in it
    inputs = {"input_ids": torch.tensor([[2, 11, 12, 3]]), "attention_mask": torch.ones(1, 4)}
    with torch.no_grad():
        assert not torch.equal(plain(**inputs)["logits"], trained(**inputs)["logits"])
        load_adapters(plain, tmp_path / "out" / "adapter")
        assert torch.equal(plain(**inputs)["logits"], trained(**inputs)["logits"])


def test_fsdp_with_sharded_states_saves_a_model_without_a_pickle(tokenizer, tmp_path, rows, monkeypatch):
    """The parent then writes neither the weights nor the file of arguments that `save_model` removes."""
    trainer = make(tokenizer, tmp_path, rows, "full", max_steps=1)
    trainer.is_fsdp_enabled = True
    plugin = FullyShardedDataParallelPlugin(state_dict_type="SHARDED_STATE_DICT", fsdp_version=1)
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
    trainer.save_model(str(tmp_path / "sharded"))
    assert not list((tmp_path / "sharded").glob("*.bin"))
    plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir() if path.suffix in (".safetensors", ".bin")] == [
        "model.safetensors"
    ]


def test_label_smoothing_without_a_config_says_what_to_do(tokenizer, tmp_path, rows):
    with pytest.raises(InputError, match=r"--label_smoothing_factor: .* MeanHead\.config; set it to the "):
        make(tokenizer, tmp_path, rows, "full", label_smoothing_factor=0.1)


def test_a_loss_of_the_batch_is_refused(tokenizer, tmp_path, rows):
    trainer = make(tokenizer, tmp_path, rows, "full")
    trainer.losses = {"labels": lambda logits, labels, smoothing: F.cross_entropy(logits, labels)}
    with pytest.raises(InputError, match=r"losses: the function of labels returns one number for the batch; return"):
        trainer.train()


def test_it_learns_and_keeps_the_best(tokenizer, tmp_path, rows):
    trainer = make(tokenizer, tmp_path, rows, "full", num_train_epochs=6, ema_decay=0.5)
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == trainer.state.best_metric > 0.9


class TiedHead(MeanHead):
    """A module with one weight under two names, as the encoder of T5 has."""

    def __init__(self):
        super().__init__()
        self.words = self.encoder.embeddings.word_embeddings


def test_tied_weights_are_saved_once_and_resumed(tokenizer, tmp_path, rows, monkeypatch):
    monkeypatch.setattr(f"{__name__}.MeanHead", TiedHead)
    whole = make(tokenizer, tmp_path, rows, "full")
    whole.train()
    resumed = make(tokenizer, tmp_path, rows, "full")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(v, whole.model.state_dict()[name]) for name, v in resumed.model.state_dict().items())


def test_a_model_that_is_saved_under_other_names_resumes(tokenizer, tmp_path, rows, monkeypatch):
    """`save_pretrained` writes each expert of Mixtral apart; the module holds them together."""
    config = MixtralConfig(
        vocab_size=500, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_labels=CLASSES, pad_token_id=0,
    )  # fmt: skip
    monkeypatch.setattr(f"{__name__}.MeanHead", lambda: MixtralForSequenceClassification(config))
    whole = make(tokenizer, tmp_path, rows, "full", learning_rate=1e-3)
    whole.train()
    resumed = make(tokenizer, tmp_path, rows, "full", learning_rate=1e-3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(v, whole.model.state_dict()[name]) for name, v in resumed.model.state_dict().items())
    for folder in (tmp_path / "checkpoint-4", tmp_path / "out"):
        if folder.name == "out":
            whole.save_model(str(folder))
        loaded = MixtralForSequenceClassification.from_pretrained(folder)
        assert loaded.state_dict().keys() == whole.model.state_dict().keys()
    assert all(torch.equal(v, whole.model.state_dict()[name]) for name, v in loaded.state_dict().items())
