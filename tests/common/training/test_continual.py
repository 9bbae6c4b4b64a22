"""Test learning without forgetting: EWC, LwF and replay against their equations, and steps that divide exactly."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from common.args import FISHER, LabeledDataArguments, ModelArguments, TrainingArguments, check_together
from common.errors import InputError
from common.models.load import LoadedModel
from common.training import Trainer, label_losses
from common.training.continual import distillation, row_losses, share_weights
from common.training.draws import replayed
from common.training.regularisation import PullToPretrained, for_new_rows
from common.tuning import TuningArguments, tune
from tests.conftest import build_tokenizer, write_jsonl
from tests.faults import Job, make_files, words
from tests.faults import difference as of_runs

CLASSES = 3


def make_rows(number: int, tags: bool = False, seed: int = 0, old: int = 0) -> Dataset:
    """Return encoded rows; the last `old` ones are marked as old."""
    random = np.random.default_rng(seed)
    ids = [[2, *random.integers(20, 300, size=size).tolist(), 3] for size in random.integers(3, 20, size=number)]
    labels = random.integers(0, CLASSES, size=number).tolist()
    if tags:
        labels = [[-100, *random.integers(0, CLASSES, size=len(row) - 2).tolist(), -100] for row in ids]
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}
    return Dataset.from_dict(columns | ({"old": [i >= number - old for i in range(number)]} if old else {}))


def small_model(tokenizer, kind=BertForSequenceClassification, seed=1, classes=CLASSES):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=classes, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return kind(config)


def trainer_of(tokenizer, folder, rows, model=None, source=None, new=(), tags=False, **given):
    """Return a trainer of a model that learned before, saved in the folder `before`."""
    if model is None:
        model = small_model(tokenizer, BertForTokenClassification if tags else BertForSequenceClassification)
    arguments = {"precision": "fp32", "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "use_cpu": True}
    arguments |= {"num_train_epochs": 1, "save_strategy": "no", "eval_strategy": "no", "max_grad_norm": 0.0}
    arguments |= {"per_device_train_batch_size": 8, "logging_steps": 1, "output_dir": str(folder / "out")}
    collator = DataCollatorForTokenClassification if tags else DataCollatorWithPadding
    loaded = LoadedModel(model, tokenizer, frozenset(new), source or "before")
    return Trainer(
        model=tune(loaded, TuningArguments(), None),
        args=TrainingArguments(**arguments | given),
        train_dataset=rows,
        data_collator=collator(tokenizer),
        losses=label_losses,
    )


@pytest.fixture
def make(tokenizer, tmp_path):
    """Return `trainer_of` for the folder of the test."""
    return partial(trainer_of, tokenizer, tmp_path)


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


# EWC


def test_rows_of_new_tokens_have_no_importance():
    old = torch.ones(2, 3)
    assert torch.equal(for_new_rows(old, torch.ones(4, 3)), torch.tensor([[1.0] * 3] * 2 + [[0.0] * 3] * 2))
    for weight in (torch.ones(2, 3), torch.ones(4, 5), torch.ones(1, 3), torch.ones(())):
        assert for_new_rows(old, weight) is old


def test_ewc_pulls_each_weight_by_its_importance():
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    pull = PullToPretrained({"w": weight}, 4.0, {"w": torch.tensor([0.0, 0.5, 2.0])})
    with torch.no_grad():
        weight.add_(torch.tensor([1.0, 1.0, -1.0]))
    penalty = 4.0 / 2 * (torch.tensor([0.0, 0.5, 2.0]) * (weight - torch.tensor([1.0, 2.0, 3.0])) ** 2).sum()
    (wanted,) = torch.autograd.grad(penalty, weight)
    weight.grad = torch.ones(3)
    pull.add_gradient()
    assert torch.allclose(weight.grad, 1 + wanted)


@pytest.mark.parametrize("tags", [False, True])
def test_fisher_information_is_the_mean_squared_gradient_of_the_old_rows(make, tags):
    rows = make_rows(12, tags, old=5)
    trainer = make(rows, tags=tags, keep="ewc", keep_strength=50.0, label_smoothing_factor=0.1)
    model, total = trainer.model.eval(), {}
    for row in rows.select(range(7, 12)):
        model.zero_grad()
        logits = model(torch.tensor([row["input_ids"]])).logits
        F.cross_entropy(logits.flatten(0, -2), torch.tensor(row["labels"]).flatten(), reduction="sum").backward()
        for name, value in model.named_parameters():
            total[name] = total.get(name, 0) + (0 if value.grad is None else value.grad**2)
    for name, value in trainer.fisher_pull.importance.items():
        assert torch.allclose(value, total[name] / 5, rtol=1e-4, atol=1e-9), name
    assert all(value.requires_grad for value in model.parameters())
    assert trainer.args.label_smoothing_factor == 0.1
    assert len(trainer.get_train_dataloader()) == 1  # the 7 new rows; the old ones are not trained


def test_ewc_holds_the_weights_and_replaces_their_decay(make):
    moved = []
    for strength in (1e-6, 20.0):
        trainer = make(
            make_rows(40, old=20), keep="ewc", keep_strength=strength, num_train_epochs=3, learning_rate=0.02
        )
        before, importance = weights_of(trainer), trainer.fisher_pull.importance
        trainer.train()
        after = weights_of(trainer)
        moved.append(sum((importance[name] * (after[name] - before[name]) ** 2).sum().item() for name in importance))
        assert trainer.get_decay_parameter_names(trainer.model) == []
    assert moved[1] < 0.8 * moved[0]


def test_the_information_of_a_run_is_saved_and_added_up(make, tokenizer, tmp_path):
    first = make(make_rows(10), save_fisher=True)
    first.save_fisher()
    alone = load_file(tmp_path / "out" / FISHER)
    assert alone.keys() == dict(first.model.named_parameters()).keys()
    first.model.save_pretrained(tmp_path / "before")
    (tmp_path / "before" / "fisher").mkdir()
    (tmp_path / "out" / FISHER).rename(tmp_path / "before" / FISHER)
    second = make(make_rows(10, seed=4), source=str(tmp_path / "before"), keep="ewc", save_fisher=True)
    assert all(torch.equal(second.fisher_pull.importance[name], alone[name]) for name in alone)
    second.save_fisher()
    third = make(make_rows(10, seed=4), save_fisher=True)
    both = load_file(tmp_path / "out" / FISHER)
    third.save_fisher()
    of_rows = load_file(tmp_path / "out" / FISHER)
    assert all(torch.allclose(both[name], alone[name] + of_rows[name]) for name in both)


def test_a_new_head_is_not_pulled_and_cannot_read_the_old_rows(make, tokenizer, tmp_path):
    new = ("classifier.weight", "classifier.bias")
    with pytest.raises(InputError, match="--keep ewc: before has no head for these labels"):
        make(make_rows(12, old=5), new=new, keep="ewc")
    trainer = make(make_rows(10), save_fisher=True)
    folder = tmp_path / "out"
    trainer.model.save_pretrained(folder)
    trainer.save_fisher()
    second = make(make_rows(10), model=small_model(tokenizer, classes=5), source=str(folder), new=new, keep="ewc")
    assert second.fisher_pull.pairs.keys() == dict(second.model.named_parameters()).keys() - set(new)


# Learning without forgetting


def test_distillation_is_the_cross_entropy_at_a_temperature():
    new, old = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]]), torch.tensor([[0.0, 4.0, 0.0], [2.0, 1.0, 0.0]])
    labels = torch.tensor([2, -100])
    p, q = (np.exp(x[0].numpy() / 2) / np.exp(x[0].numpy() / 2).sum() for x in (old, new))
    wanted = -(p * np.log(q)).sum()
    assert distillation(new, old, labels, 2.0).item() == pytest.approx(wanted, rel=1e-5)
    at_labels = new[None, :1]  # a language model gives the scores of its labels
    assert distillation(at_labels, old, labels, 2.0).item() == pytest.approx(wanted, rel=1e-5)
    spans = (new, new), (old, old)
    assert distillation(*spans, torch.tensor([[2, 2], [-100, -100]]), 2.0).item() == pytest.approx(2 * wanted, rel=1e-5)
    one, other = torch.tensor([[0.5]]), torch.tensor([[-1.0]])
    p, q = (1 / (1 + np.exp(-x.item() / 2)) for x in (other, one))
    wanted = -(p * np.log(q) + (1 - p) * np.log(1 - q))
    assert distillation(one, other, torch.tensor([[1.0]]), 2.0).item() == pytest.approx(wanted, rel=1e-5)
    hidden = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert torch.isfinite(distillation(hidden, hidden, torch.tensor([0]), 2.0))


@pytest.mark.parametrize("tags", [False, True])
def test_the_loss_of_a_step_has_the_old_outputs(make, tokenizer, tags):
    trainer = make(make_rows(8, tags), tags=tags, keep="lwf", keep_strength=0.7)
    old = trainer.old_task.old
    with torch.no_grad():
        for value in trainer.model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    batch = trainer.data_collator([trainer._remove_unused_columns(trainer.train_dataset)[i] for i in range(8)])
    _, counts = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=counts)
    labels = batch.pop("labels")
    new, before = trainer.model(**batch).logits[labels != -100], old(**batch).logits[labels != -100]
    wanted = F.cross_entropy(new, labels[labels != -100])
    wanted = wanted + 0.7 * F.cross_entropy(new / 2, (before / 2).softmax(-1))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert not any(value.requires_grad for value in old.parameters())
    trainer.model.eval()
    plain = trainer.compute_loss(trainer.model, batch | {"labels": labels})
    assert plain.item() == pytest.approx(F.cross_entropy(new, labels[labels != -100]).item(), rel=1e-5)


@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForQuestionAnswering, BertForSequenceClassification])
def test_the_old_head_reads_the_encoder_in_training(make, tokenizer, tmp_path, kind):
    before = small_model(tokenizer, kind, seed=3, classes=2 if kind is BertForQuestionAnswering else 4)
    before.save_pretrained(tmp_path / "before")
    tokenizer.save_pretrained(tmp_path / "before")
    model = small_model(tokenizer)
    model.bert.load_state_dict(before.bert.state_dict(), strict=False)
    new = [name for name, _ in model.named_parameters() if name.startswith("classifier") or "pooler" in name]
    trainer = make(make_rows(8), model=model, source=str(tmp_path / "before"), new=new, keep="lwf", num_train_epochs=3)
    head = trainer.old_task.with_old_head
    encoder = "bert.encoder.layer.0.attention.self.query.weight"
    assert head.get_parameter(encoder) is trainer.model.get_parameter(encoder)
    kept = {name: value.clone() for name, value in head.state_dict().items() if not name.startswith("bert.")}
    trainer.train()
    assert all(torch.equal(head.state_dict()[name], value) for name, value in kept.items())
    assert not torch.equal(head.get_parameter(encoder), before.get_parameter(encoder))
    inputs = {"input_ids": torch.tensor([[2, 30, 40, 3]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    loss = trainer.old_task.of_old_head(inputs)
    with torch.no_grad():
        new, old = head(**inputs), before.eval()(**inputs)
        parts = []
        for name in new:
            a, b = (x[name][0] / 2 for x in (new, old))
            a, b = (x[:3] if kind is not BertForSequenceClassification else x for x in (a, b))
            parts.append(F.cross_entropy(a, b.softmax(-1)))
    assert loss.tolist() == pytest.approx([torch.stack(parts).mean().item()], rel=1e-4)


def test_the_old_head_reads_tokens_that_were_added_since(make, tokenizer, tmp_path):
    before = small_model(tokenizer, BertForTokenClassification, seed=3)
    before.save_pretrained(tmp_path / "before")
    tokenizer.save_pretrained(tmp_path / "before")
    model = small_model(tokenizer)
    model.bert.load_state_dict(before.bert.state_dict(), strict=False)
    model.resize_token_embeddings(len(tokenizer) + 2, mean_resizing=False)
    new = [name for name, _ in model.named_parameters() if name.startswith("classifier") or "pooler" in name]
    trainer = make(make_rows(8), model=model, source=str(tmp_path / "before"), new=new, keep="lwf")
    words, task = model.get_input_embeddings().weight, trainer.old_task
    assert task.with_old_head.get_input_embeddings().weight is words
    assert torch.equal(task.old.get_input_embeddings().weight, words)
    added = torch.tensor([[2, len(tokenizer), len(tokenizer) + 1, 3]])
    assert torch.isfinite(task.of_old_head({"input_ids": added, "attention_mask": torch.ones_like(added)})).all()


def test_the_mean_of_a_row_leaves_out_padding():
    new, old = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    each = -((old / 2).softmax(-1) * (new / 2).log_softmax(-1)).sum(-1)
    assert torch.allclose(row_losses(new, old, mask, 2.0), torch.stack([each[0, :2].mean(), each[1].mean()]))


def test_weights_of_another_size_are_not_shared(tokenizer):
    model, other = small_model(tokenizer), small_model(tokenizer, classes=5)
    other.bert.embeddings.word_embeddings = nn.Embedding(3, 16)
    names = share_weights(model, other)
    assert "bert.embeddings.word_embeddings.weight" not in names
    assert "classifier.weight" not in names
    assert model.bert.encoder.layer[0].output.dense.weight is other.bert.encoder.layer[0].output.dense.weight
    assert not model.classifier.weight.requires_grad


# Replay


def test_the_budget_of_old_rows():
    assert [replayed(100, 40, asked) for asked in (None, 0.25, 0.001, 1, 30, 1000)] == [40, 25, 1, 1, 30, 100]


def test_an_epoch_has_the_new_rows_and_the_budget_of_old_ones(make):
    trainer = make(make_rows(50, old=30), keep="replay", replay_rows=10, per_device_train_batch_size=10)
    trainer.get_train_dataloader()
    epochs = []
    for epoch in range(3):
        trainer.train_batches.set_epoch(epoch)
        epochs.append([row for step in trainer.train_batches for row in step])
    assert all(sorted(row for row in rows if row < 20) == list(range(20)) for rows in epochs)
    old = [row for rows in epochs for row in rows if row >= 20]
    assert sorted(old) == list(range(20, 50))  # three epochs of 10


# Steps


METHODS = {
    "ewc": {"keep": "ewc", "keep_strength": 1.0},
    "lwf": {"keep": "lwf"},
    "replay": {"keep": "replay", "replay_rows": 0.5},
}


def train_each(arguments: list[str]) -> None:
    """Train by each method and write the weights. Arguments: folder, rows per device, accumulation."""
    folder = Path(arguments[0])
    for name, method in METHODS.items():
        trainer = trainer_of(
            build_tokenizer(), folder, make_rows(40, tags=True, old=0 if name == "lwf" else 16), tags=True, max_steps=2,
            max_grad_norm=0.5,
            per_device_train_batch_size=int(arguments[1]), gradient_accumulation_steps=int(arguments[2]), **method,
        )  # fmt: skip
        trainer.train()
        if trainer.is_world_process_zero():
            weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
            save_file(weights, folder / f"{name}.safetensors")


def difference(one: Path, other: Path, name: str) -> float:
    a, b = (load_file(folder / f"{name}.safetensors") for folder in (one, other))
    return max((a[n] - b[n]).abs().max().item() for n in a)


def test_accumulation_changes_nothing(tmp_path):
    for name, given in (("whole", ["8", "1"]), ("parts", ["2", "4"])):
        (tmp_path / name).mkdir()
        train_each([str(tmp_path / name), *given])
    assert max(difference(tmp_path / "whole", tmp_path / "parts", name) for name in METHODS) < 1e-5


@pytest.mark.soak
def test_two_processes_change_nothing(tmp_path):
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        given = [str(tmp_path / str(processes)), str(8 // processes), "1"]
        Job(given, tmp_path / "log", processes=processes, main=train_each).succeeds()
    assert max(difference(tmp_path / "1", tmp_path / "2", name) for name in METHODS) < 1e-5


@pytest.mark.soak
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_resumes_exactly(method, tmp_path):
    files = make_files(tmp_path)
    Job(words(files, tmp_path / "first", save_fisher="true"), tmp_path / "log").succeeds()
    del files["model_name_or_path"]
    settings = {"after": tmp_path / "first", "keep": method}
    if method == "replay":
        settings |= {"replay_file": files["validation_file"], "replay_rows": 7}
    Job(words(files, tmp_path / "whole", **settings), tmp_path / "log").succeeds()
    Job(words(files, tmp_path / "out", **settings), tmp_path / "log", kill_at=9).ends()
    Job(words(files, tmp_path / "out", resume_from_checkpoint="true", **settings), tmp_path / "log").succeeds()
    assert of_runs(tmp_path / "whole", tmp_path / "out") == 0


# Arguments


def test_arguments_that_belong_together_are_checked(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    model = str(tmp_path / "model")

    def check(after=None, replay_file=None, **given):
        groups = [ModelArguments(after=after)]
        data = LabeledDataArguments(train_file=file, replay_file=replay_file)
        check_together(TrainingArguments(output_dir="unused", **given), data, groups)

    for given, message in (
        ({"keep": "lwf"}, "--keep lwf: needs the model that learned before; name it by --after"),
        ({"keep": "replay", "after": model}, "--keep replay: needs old rows; name their file by --replay_file"),
        ({"replay_file": file, "after": model}, "--replay_file: needs --keep replay, or --keep ewc"),
        ({"keep": "ewc", "after": model}, "has no fisher/fisher.safetensors; train it with --save_fisher true"),
        ({"keep_strength": 1.0}, "--keep_strength: needs --keep ewc or lwf"),
        ({"replay_rows": 5, "keep": "lwf", "after": model}, "--replay_rows: needs --keep replay"),
        ({"keep": "ewc", "keep_strength": -1.0, "after": model}, "--keep_strength -1.0: must be above 0"),
        ({"keep": "lwf", "r_drop": 1.0, "after": model}, "--r_drop: cannot be combined with --keep lwf"),
        ({"replay_file": str(tmp_path / "none.jsonl")}, "--replay_file .*none.jsonl: no such file"),
    ):
        with pytest.raises(InputError, match=message):
            check(**given)
    check(after=model, keep="replay", replay_file=file)
    assert ModelArguments(after=model).model_name_or_path == model
    with pytest.raises(InputError, match="--after and --model_name_or_path: both name the model"):
        ModelArguments(after=model, model_name_or_path="another")
