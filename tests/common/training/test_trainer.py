"""Test the trainer's guarantees on a tiny token classifier: loss, gradient, order, precision and seeds."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

from common.args import TrainingArguments
from common.training import Trainer, label_losses

LABELS = 5


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Return 90 rows of very different length, for which means of batch means differ from the mean."""
    random = np.random.default_rng(0)
    lengths = random.integers(2, 60, size=90)
    ids = [[2, *random.integers(5, 500, size=n), 3] for n in lengths]
    labels = [[-100, *random.integers(0, LABELS, size=n), -100] for n in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "name": [str(i) for i in range(90)]})


def make(tiny, tokenizer, tmp_path, rows, metrics=None, **arguments) -> Trainer:
    torch.manual_seed(0)
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        **{"precision": "fp32", "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "logging_steps": 1}
        | {"num_train_epochs": 1, "max_grad_norm": 0.5, "save_strategy": "no", "eval_strategy": "no"}
        | arguments,
    )
    return Trainer(
        model=AutoModelForTokenClassification.from_pretrained(tiny, num_labels=LABELS),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=metrics,
        losses=label_losses,
    )


def trained(trainer: Trainer) -> tuple[dict[str, torch.Tensor], list[dict]]:
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}, steps


@pytest.mark.parametrize(
    ("count", "divisions", "more"),
    [
        (90, [(32, 1), (8, 4)], {}),
        (90, [(32, 1), (8, 4)], {"label_smoothing_factor": 0.1}),
        (9, [(4, 1), (2, 2), (1, 4)], {}),  # parts without a row
        (9, [(4, 1), (1, 4)], {"r_drop": 1.0}),
        (9, [(4, 1), (1, 4)], {"adversarial": "fgm", "adversarial_epsilon": 0.1}),
        (9, [(4, 1), (1, 4)], {"train_sampling_strategy": "group_by_length"}),
    ],
)
def test_accumulation_changes_neither_loss_nor_gradient_nor_weights(
    tiny, tokenizer, tmp_path, rows, count, divisions, more
):
    runs = []
    for batch, accumulation in divisions:
        cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        runs.append(trained(make(tiny, tokenizer, tmp_path, rows.select(range(count)), **cut, **more)))
    (whole, whole_log), *others = runs
    assert len(whole_log) == 3
    for parts, log in others:
        for a, b in zip(whole_log, log, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert max((whole[k] - parts[k]).abs().max().item() for k in whole) < 1e-6


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_eval_loss_is_the_mean_over_all_labels_whatever_the_batch(tiny, tokenizer, tmp_path, rows, batch):
    trainer = make(tiny, tokenizer, tmp_path, rows, per_device_eval_batch_size=batch)
    found = trainer.evaluate()["eval_loss"]
    model = trainer.model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            labels = torch.tensor(row["labels"])
            total += label_losses(logits, labels).sum().item()
            count += (labels != -100).sum().item()
    assert found == pytest.approx(total / count, rel=1e-5)


def test_predict_and_metrics_see_rows_in_data_set_order_and_all_columns(tiny, tokenizer, tmp_path, rows):
    seen = {}

    def metrics(prediction, dataset):
        seen["labels"] = [row[row != -100].tolist() for row in prediction.label_ids]
        seen["names"] = dataset["name"][:]
        return {"rows": len(prediction.predictions)}

    trainer = make(tiny, tokenizer, tmp_path, rows, metrics, per_device_eval_batch_size=16)
    output = trainer.predict(rows)
    assert seen["names"] == rows["name"][:]
    assert seen["labels"] == [row[1:-1] for row in rows["labels"]]
    assert output.metrics["test_rows"] == 90
    with torch.no_grad():
        for row, predicted, labels in zip(rows, output.predictions, output.label_ids, strict=True):
            alone = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1)
            kept = np.flatnonzero(labels != -100)
            assert predicted[kept].tolist() == alone[1:-1].tolist()


def test_workers_that_live_on_evaluate_the_rows_that_are_given(tiny, tokenizer, tmp_path, rows):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make(tiny, tokenizer, tmp_path, rows, lambda p, d: {"rows": len(p.predictions)}, **workers)
    sizes = [trainer.evaluate(data)["eval_rows"] for data in (None, rows.select(range(7)), None)]
    assert sizes == [90, 7, 90]


def test_rows_without_labels_can_be_predicted(tiny, tokenizer, tmp_path, rows):
    trainer = make(tiny, tokenizer, tmp_path, rows)
    trainer.data_collator = lambda batch: dict(tokenizer.pad(batch, return_tensors="pt"))
    output = trainer.predict(rows.remove_columns("labels"))
    labelled = make(tiny, tokenizer, tmp_path, rows, lambda p, d: {}).predict(rows)
    assert output.label_ids is None
    assert "test_loss" not in output.metrics
    for alone, beside, row in zip(output.predictions, labelled.predictions, rows, strict=True):
        assert alone[: len(row["labels"])].tolist() == beside[: len(row["labels"])].tolist()


@pytest.mark.parametrize("labelled", [True, False])
def test_a_cpu_evaluates_so_many_sub_tokens_at_a_time(tiny, tokenizer, tmp_path, rows, monkeypatch, labelled):
    seen = []

    def predicted():
        seen.clear()
        trainer = make(tiny, tokenizer, tmp_path, rows, lambda p, d: {"rows": len(p.predictions)})
        trainer.model.register_forward_pre_hook(
            lambda model, args, kwargs: seen.append(kwargs["attention_mask"].sum(1).tolist()), with_kwargs=True
        )
        if not labelled:
            trainer.data_collator = lambda batch: dict(tokenizer.pad(batch, return_tensors="pt"))
        return trainer.predict(rows if labelled else rows.remove_columns("labels"))

    whole = predicted()
    assert [len(batch) for batch in seen] == [64, 26]
    expected = sum(sum(batch[:-1]) // 200 + 1 for batch in seen)
    monkeypatch.setattr("common.training.evaluation.EVALUATED_TOGETHER", 200)
    parts = predicted()
    assert len(seen) == expected
    assert all(sum(part[:-1]) < 200 + max(part) for part in seen)
    assert sorted(size for part in seen for size in part) == sorted(map(len, rows["input_ids"]))
    for one, other in zip(whole.predictions, parts.predictions, strict=True):
        assert one.tolist() == other.tolist()
    if labelled:
        assert parts.metrics["test_loss"] == pytest.approx(whole.metrics["test_loss"], rel=1e-6)
        assert parts.metrics["test_rows"] == 90
        assert [r.tolist() for r in parts.label_ids] == [r.tolist() for r in whole.label_ids]
    else:
        assert parts.label_ids is None


def test_the_seed_decides_order_and_the_same_seed_gives_the_same_weights(tiny, tokenizer, tmp_path, rows):
    first, log = trained(make(tiny, tokenizer, tmp_path, rows, seed=1))
    again, _ = trained(make(tiny, tokenizer, tmp_path, rows, seed=1))
    _, other = trained(make(tiny, tokenizer, tmp_path, rows, seed=2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert [entry["loss"] for entry in log] != [entry["loss"] for entry in other]


def test_resumed_in_the_second_epoch_equals_uninterrupted(tiny, tokenizer, tmp_path, rows):
    steps = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": None, "num_train_epochs": 3}
    whole, _ = trained(make(tiny, tokenizer, tmp_path, rows, **steps))
    resumed = make(tiny, tokenizer, tmp_path, rows, **steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))  # three steps per epoch
    assert all(torch.equal(whole[k], v) for k, v in resumed.model.state_dict().items())


def test_of_equal_scores_the_one_with_the_lowest_loss_is_the_best(tiny, tokenizer, tmp_path, rows):
    steps = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 4, "metric_for_best_model": "f1"}
    trainer = make(tiny, tokenizer, tmp_path, rows, lambda prediction, dataset: {"f1": 1.0}, **steps)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.state.best_global_step == min(losses, key=losses.get) > min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()))


def test_early_stopping_counts_evaluations_and_restores_the_best(tiny, tokenizer, tmp_path, rows):
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.1])
    weights = []

    def metrics(prediction, dataset):
        weights.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
        return {"f1": next(scores)}

    trainer = make(
        tiny, tokenizer, tmp_path, rows, metrics,
        num_train_epochs=6, eval_strategy="epoch", save_strategy="epoch", early_stopping_patience=2,
        metric_for_best_model="f1",
    )  # fmt: skip
    trainer.train()
    assert len(weights) == 4  # the best is the second; the next two are not better
    assert trainer.state.best_metric == 0.5
    assert all(torch.equal(weights[1][k], v) for k, v in trainer.model.state_dict().items())


def test_the_best_of_an_epoch_without_a_checkpoint_is_in_the_next_one(tiny, tokenizer, tmp_path, rows, monkeypatch):
    """Save checkpoints after epochs 1, 4 and the last; the best epoch is the third."""
    monkeypatch.setattr(Trainer, "_may_wait", lambda self: self.state.epoch in (2, 3, 5))
    by_epoch = {"num_train_epochs": 6, "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": None}
    scores = {1: 0.1, 2: 0.2, 3: 0.5, 4: 0.4, 5: 0.3, 6: 0.2}
    weights = {}

    def metrics(prediction, dataset):
        weights[trainer.state.epoch] = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        return {"f1": scores[trainer.state.epoch]}

    trainer = make(tiny, tokenizer, tmp_path, rows, metrics, metric_for_best_model="f1", **by_epoch)
    trainer.train()
    folders = {path.name: (path / "best.safetensors").exists() for path in (tmp_path / "out").glob("checkpoint-*")}
    assert folders == {"checkpoint-3": False, "checkpoint-12": True, "checkpoint-18": False}
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-12")
    assert all(torch.equal(weights[3][k], v) for k, v in trainer.model.state_dict().items())
    last = weights[6]
    for step in (3, 12):  # before epoch 3, and after it, when its weights come from the checkpoint
        trainer = make(tiny, tokenizer, tmp_path, rows, metrics, metric_for_best_model="f1", **by_epoch)
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert all(torch.equal(weights[6][k], v) for k, v in last.items())
        assert all(torch.equal(weights[3][k], v) for k, v in trainer.model.state_dict().items())


def test_a_checkpoint_waits_only_where_nobody_asked_for_it(tiny, tokenizer, tmp_path, rows):
    def saved(**arguments) -> set[str]:
        make(tiny, tokenizer, tmp_path, rows, num_train_epochs=3, save_total_limit=None, **arguments).train()
        return {path.name for path in (tmp_path / "out").glob("checkpoint-*")}

    assert saved(save_strategy="epoch") == {"checkpoint-9"}
    assert saved(save_strategy="epoch", save_min_seconds=0) == {"checkpoint-3", "checkpoint-6", "checkpoint-9"}
    assert saved(save_strategy="steps", save_steps=4) >= {"checkpoint-4", "checkpoint-8"}


def test_bf16_trains_in_autocast_and_saves_float32_without_pickles(tiny, tokenizer, tmp_path, rows):
    trainer = make(tiny, tokenizer, tmp_path, rows, precision="bf16")
    dtypes = set()
    hook = trainer.model.classifier.register_forward_hook(lambda m, i, out: dtypes.add(out.dtype))
    trainer.train()
    hook.remove()
    trainer.save_model()
    assert dtypes == {torch.bfloat16}
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}
    assert not [f for f in (tmp_path / "out").iterdir() if f.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o444 == 0o444 & ~_umask()


def _umask() -> int:
    import os

    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_label_losses_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    labels = torch.tensor([[0, 1], [-100, 1]])
    expected = [[np.log(2), np.log(1 + np.exp(2.0))], [0.0, np.log(2)]]
    assert label_losses(logits, labels).numpy() == pytest.approx(np.array(expected), rel=1e-6)
