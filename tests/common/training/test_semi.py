"""Test training on unlabelled rows: thresholds, weights, targets, masks, order and the loss of a step, exactly."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from common.args import TrainingArguments
from common.data.pool import PoolArguments
from common.errors import InputError
from common.models.load import LoadedModel
from common.training import Trainer, label_losses
from common.training.semi import (
    CLEAN,
    TARGETS,
    MixedBatches,
    MixedRows,
    Unlabeled,
    Views,
    best_threshold,
    target_losses,
    trust,
)
from common.tuning import TuningArguments, tune
from tests.conftest import build_tokenizer
from tests.faults import Job

CLASSES, WORDS = 3, range(20, 300)


def make_rows(number: int, tags: bool = False, seed: int = 0) -> Dataset:
    random = np.random.default_rng(seed)
    ids = [[2, *random.choice(WORDS, size=size).tolist(), 3] for size in random.integers(3, 20, size=number)]
    of_tags = [[-100, *random.integers(0, CLASSES, size=len(row) - 2).tolist(), -100] for row in ids]
    of_rows = random.integers(0, CLASSES, size=number).tolist()
    masks = [[1] * len(row) for row in ids]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": of_tags if tags else of_rows})


def small_model(tokenizer, tags: bool, seed: int, dropout: float = 0.0):
    torch.manual_seed(seed)
    shares = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=CLASSES, initializer_range=0.3, **shares,
    )  # fmt: skip
    return (BertForTokenClassification if tags else BertForSequenceClassification)(config)


def trainer_of(tokenizer, folder, semi="pseudo", tags=False, settings=None, background=None, dropout=0.0, **given):
    """Return a trainer of 24 labelled and 60 unlabelled rows."""
    (folder / "pool.txt").write_text("text\n")
    pool = PoolArguments(semi=semi, unlabeled_file=[str(folder / "pool.txt")], **settings or {})
    arguments = {"precision": "fp32", "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1}
    arguments |= {"num_train_epochs": 1, "save_strategy": "no", "eval_strategy": "no", "max_grad_norm": 0.5}
    arguments |= {"per_device_train_batch_size": 8, "logging_steps": 1, "output_dir": str(folder / "out")}
    collator = DataCollatorForTokenClassification if tags else DataCollatorWithPadding
    loaded = LoadedModel(small_model(tokenizer, tags, seed=1, dropout=dropout), tokenizer)
    return Trainer(
        model=tune(loaded, TuningArguments(), None),
        args=TrainingArguments(**arguments | given),
        train_dataset=make_rows(24, tags),
        eval_dataset=make_rows(40, tags, seed=2),
        data_collator=collator(tokenizer),
        losses=label_losses,
        compute_metrics=lambda prediction, dataset: {},
        unlabeled=Unlabeled(make_rows(60, tags, seed=3), pool, small_model(tokenizer, tags, seed=4), background),
    )


@pytest.fixture
def make(tokenizer, tmp_path):
    """Return `trainer_of` for the folder of the test."""
    return partial(trainer_of, tokenizer, tmp_path)


def batch_of(trainer: Trainer, numbers: list[int]) -> dict:
    return trainer.data_collator(trainer.train_dataset.__getitems__(numbers))


def only_inputs(batch) -> dict:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}


# Threshold and weight


def test_trust_is_that_of_the_formula():
    assert trust(0, 8, 2) == pytest.approx(1 - 0.1 * 2)
    assert trust(3, 8, 4) == pytest.approx(1 - 0.4 * 4 / 3)
    assert trust(np.array([7, 8]), 8, 2).tolist() == [0, 0]
    assert trust(0, 0, 3) == pytest.approx(1 - 0.5 * 1.5)


def test_the_threshold_has_the_most_worth():
    confidence = np.array([0.5, 0.9, 0.8, 0.6, 0.7])
    right = np.array([False, True, True, False, True])
    # 2 classes, from the highest: 1 (1 - 2/3)^2, 2 (1 - 2/4)^2, 3 (1 - 2/5)^2, 4 (1 - 4/6)^2, 5 (1 - 6/7)^2
    worth = [n * (1 - 2 * e) ** 2 for n, e in ((1, 1 / 3), (2, 1 / 4), (3, 1 / 5), (4, 2 / 6), (5, 3 / 7))]
    assert np.argmax(worth) == 2
    assert best_threshold(confidence, right, 2) == 0.7
    # 100 classes: an error costs less, all 5 have 5 (1 - 3/7)^2 = 1.63, 4 have 4 (1 - 2/6)^2 = 1.78, 3 have 1.92
    assert best_threshold(confidence, right, 100) == 0.7
    assert best_threshold(confidence, np.ones(5, dtype=bool), 2) == 0.5


def test_equal_confidences_are_kept_or_left_out_together():
    confidence = np.array([0.9, 0.6, 0.6, 0.6])
    assert best_threshold(confidence, np.array([True, True, True, False]), 3) in (0.9, 0.6)
    assert best_threshold(np.full(4, 0.6), np.array([True, True, True, False]), 3) == 0.6


@pytest.mark.parametrize("tags", [False, True])
def test_the_trainer_chooses_by_the_validation_predictions_of_the_teacher(make, tags, capsys):
    trainer = make(tags=tags, background=0 if tags else None)
    teacher = trainer.unlabeled.teacher
    confidence, right = [], []
    for row in trainer.eval_dataset:
        with torch.no_grad():
            logits = teacher(torch.tensor([row["input_ids"]])).logits[0]
        gold = torch.tensor(row["labels"])
        probability, best = logits.softmax(-1).max(-1)
        if tags:
            kept = (gold != -100) & ((gold != 0) | (best != 0))
            gold, probability, best = gold[kept], probability[kept], best[kept]
        confidence += probability.reshape(-1).tolist()
        right += (best == gold).reshape(-1).tolist()
    confidence, right = np.array(confidence), np.array(right)
    assert trainer.threshold == pytest.approx(best_threshold(confidence, right, CLASSES), abs=1e-5)
    kept = right[confidence >= trainer.threshold - 1e-5]
    assert trainer.weight == pytest.approx(float(trust((~kept).sum(), len(kept), CLASSES)))
    assert f"{len(kept):,} of {len(right):,} validation labels reach it, and {kept.sum():,}" in capsys.readouterr().out


def test_given_threshold_and_weight_are_used(make):
    trainer = make(settings={"semi_threshold": 0.4, "semi_weight": 2.0})
    assert (trainer.threshold, trainer.weight) == (0.4, 2.0)


# Order of rows


def test_each_step_has_labelled_and_unlabelled_rows_and_an_epoch_has_all():
    rows = MixedRows(make_rows(24), make_rows(60, seed=3))

    def steps(epoch=0, accumulation=1, processes=1, rank=0) -> list[list[int]]:
        sampler = MixedBatches(rows, 8, accumulation, processes, rank, seed=0)
        sampler.set_epoch(epoch)
        found = list(sampler)
        assert len(found) == len(sampler)
        return found

    whole = steps()
    assert len(whole) == 12  # 24 labelled rows by 2; 60 unlabelled rows by 6 are 10 steps
    assert all(sum(row < 24 for row in step) == 2 and len(step) == 8 for step in whole)
    assert sorted(row for step in whole for row in step if row < 24) == list(range(24))
    assert {row for step in whole for row in step} == set(range(84))
    assert steps() == whole != steps(epoch=1)
    for accumulation, processes in ((2, 1), (1, 2), (2, 2)):
        each = [steps(0, accumulation, processes, rank) for rank in range(processes)]
        for i, step in enumerate(whole):
            parts = [row for of in each for part in of[i * accumulation : (i + 1) * accumulation] for row in part]
            assert sorted(parts) == sorted(step)
    assert [row[TARGETS] for row in rows.__getitems__([23, 24])] == [0, 1]


# Masks


def test_masks_keep_places_and_follow_from_seed_epoch_and_row(tokenizer):
    views = Views(DataCollatorForTokenClassification(tokenizer), tokenizer, 0.3, seed=0)
    rows = [row | {TARGETS: 1} for row in make_rows(200, tags=True)]
    seen = [views.noised(row["input_ids"]) for row in rows]
    pairs = [(a, b) for row, new in zip(rows, seen, strict=True) for a, b in zip(row["input_ids"], new, strict=True)]
    changed = [(a, b) for a, b in pairs if a != b]
    assert {b for _, b in changed} == {tokenizer.mask_token_id}
    assert not {a for a, _ in changed} & set(tokenizer.all_special_ids)
    words = sum(a not in tokenizer.all_special_ids for a, _ in pairs)
    assert abs(len(changed) / words - 0.3) < 4 * (0.3 * 0.7 / words) ** 0.5
    assert [views.noised(row["input_ids"]) for row in rows] == seen
    views.set_epoch(1)
    assert [views.noised(row["input_ids"]) for row in rows] != seen
    assert Views(views.collate, tokenizer, 0.0, 0).noised(rows[0]["input_ids"]) == rows[0]["input_ids"]


def test_a_batch_holds_masked_rows_and_the_rows_as_they_are(make):
    trainer = make("fixmatch", tags=True)
    numbers = [0, 30, 1, 40]
    batch = batch_of(trainer, numbers)
    rows = trainer.train_dataset.__getitems__(numbers)
    for row, marks, ids, labels, targets in zip(
        rows, (0, 1, 0, 1), batch["input_ids"], batch["labels"], batch[TARGETS], strict=True
    ):
        length = len(row["input_ids"])
        own = torch.tensor(row["labels"])
        assert (labels if not marks else targets)[:length].tolist() == own.tolist()
        assert set((targets if not marks else labels).tolist()) == {-100}
        if not marks:
            assert ids[:length].tolist() == row["input_ids"]
    clean = [row["input_ids"] for row in rows if row[TARGETS]]
    found = batch[CLEAN]
    assert [
        ids[mask.bool()].tolist() for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True)
    ] == clean
    assert "labels" not in found
    assert TARGETS not in batch_of(trainer, [0, 1]) or CLEAN not in batch_of(trainer, [0, 1])


# Targets and losses


@pytest.mark.parametrize("tags", [False, True])
@pytest.mark.parametrize("semi", ["pseudo", "noisy_student", "fixmatch"])
def test_targets_are_the_classes_or_probabilities_above_the_threshold(make, semi, tags):
    trainer = make(semi, tags, settings={"semi_threshold": 0.5}, dropout=0.5)
    trainer.model.train()
    numbers = [0, 1, *range(24, 50)]
    batch = batch_of(trainer, numbers)
    found = trainer.targets(trainer.model, batch)
    assert trainer.model.training
    labeller = (trainer.model if semi == "fixmatch" else trainer.unlabeled.teacher).eval()
    reached = 0
    for row, targets in zip(trainer.train_dataset.__getitems__(numbers), found, strict=True):
        if not row[TARGETS]:
            assert not targets.any()
            continue
        with torch.no_grad():
            probabilities = labeller(torch.tensor([row["input_ids"]])).logits[0].softmax(-1)
        wanted = torch.eye(CLASSES)[probabilities.argmax(-1)] if semi != "noisy_student" else probabilities
        wanted = wanted * (probabilities.max(-1).values >= 0.5)[..., None]
        reached += int(wanted.sum())
        if tags:
            wanted[torch.tensor(row["labels"]) == -100] = 0
            assert not targets[len(wanted) :].any()
        assert torch.allclose(targets[: len(wanted)] if tags else targets, wanted, atol=1e-5)
    assert 0 < reached < sum(map(len, trainer.train_dataset.unlabeled["input_ids"]))


def test_target_losses_are_cross_entropies():
    logits = torch.tensor([[0.0, 0.0], [0.0, float(np.log(3))], [5.0, 1.0]])
    targets = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]])
    wanted = [np.log(2), 0.5 * np.log(4) + 0.5 * np.log(4 / 3), 0.0]
    assert target_losses(logits, targets).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("tags", [False, True])
def test_the_loss_of_a_step_is_the_mean_of_labels_plus_the_weighted_mean_of_all_unlabelled_ones(make, tags):
    trainer = make("pseudo", tags, settings={"semi_threshold": 0.5, "semi_weight": 0.7})
    trainer.forget_losses()
    batch = batch_of(trainer, [0, 1, 2, 30, 31, 32, 33, 34])
    _, counts = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=counts)
    with torch.no_grad():
        logits = trainer.model(**only_inputs(batch)).logits
        targets = trainer.targets(trainer.model, batch)
    gold, places = batch["labels"], batch[TARGETS]
    labelled = torch.nn.functional.cross_entropy(logits[gold != -100], gold[gold != -100])
    unlabelled = target_losses(logits, targets).sum() / (places != -100).sum()
    assert 0 < targets.sum() < (places != -100).sum()
    assert loss.item() == pytest.approx((labelled + 0.7 * unlabelled).item(), rel=1e-5)


def test_the_weight_of_fixmatch_grows_over_the_first_quarter(make):
    trainer = make("fixmatch", settings={"semi_threshold": 0.5, "semi_weight": 0.8})
    logits, targets = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    trainer.state.max_steps = 40
    found = []
    for trainer.state.global_step in (0, 5, 10, 39):
        found.append(trainer._target_losses(logits, targets, 0.0).item() / np.log(2))
    assert found == pytest.approx([0, 0.4, 0.8, 0.8])


@pytest.mark.parametrize("semi", ["noisy_student", "fixmatch"])
def test_accumulation_changes_neither_losses_nor_weights(make, semi):
    results = []
    for rows in (8, 2):
        trainer = make(
            semi, tags=True, settings={"semi_threshold": 0.45, "semi_weight": 1.0}, max_steps=4,
            per_device_train_batch_size=rows, gradient_accumulation_steps=8 // rows,
        )  # fmt: skip
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss_unlabeled" in entry]
        results.append((log, trainer.model.state_dict()))
    (whole, one), (parts, other) = results
    assert len(whole) == len(parts) == 4
    for a, b in zip(whole, parts, strict=True):
        assert all(b[name] == pytest.approx(a[name], rel=1e-4) for name in ("loss", "loss_labels", "loss_unlabeled"))
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-5


def train_each(arguments: list[str]) -> None:
    """Train by each method and write the weights. Arguments: folder, rows per device."""
    for semi in ("pseudo", "noisy_student", "fixmatch"):
        trainer = trainer_of(
            build_tokenizer(), Path(arguments[0]), semi, tags=True, max_steps=4, use_cpu=True,
            settings={"semi_threshold": 0.45, "semi_weight": 1.0}, per_device_train_batch_size=int(arguments[1]),
        )  # fmt: skip
        trainer.train()
        if trainer.is_world_process_zero():
            weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
            save_file(weights, f"{arguments[0]}/{semi}.safetensors")


@pytest.mark.soak
def test_two_processes_change_nothing(tmp_path):
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        words = [str(tmp_path / str(processes)), str(8 // processes)]
        Job(words, tmp_path / "log", processes=processes, main=train_each).succeeds()
    for semi in ("pseudo", "noisy_student", "fixmatch"):
        one, two = (load_file(tmp_path / n / f"{semi}.safetensors") for n in "12")
        assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5


def test_what_cannot_be_combined_is_refused(make):
    with pytest.raises(InputError, match="--r_drop: cannot be combined with --semi; leave one of them out"):
        make(r_drop=1.0)
    with pytest.raises(InputError, match="--adversarial: cannot be combined with --semi"):
        make(adversarial="fgm")
