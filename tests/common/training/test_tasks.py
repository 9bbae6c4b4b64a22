"""Test several label columns in a batch, and several tasks in a run: losses, order and resume."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, DataCollatorForTokenClassification, DataCollatorWithPadding

from common.args import TrainingArguments
from common.errors import InputError
from common.training import Trainer, label_losses
from common.training.tasks import TaskBatches, TaskRows
from tests.conftest import build_tokenizer
from tests.faults import Job

TAGS, TOPICS = 5, 3
SMALL = {"vocab_size": 500, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
#: rows of the two tasks: steps of 16 rows
ROWS = {"tags": 70, "topic": 40}


class TwoHeads(nn.Module):
    """BERT with a head for tags and a head for topics; `task` selects one head, or both."""

    def __init__(self, dropout: float):
        super().__init__()
        shares = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        self.encoder = BertModel(BertConfig(**SMALL, **shares, intermediate_size=32), add_pooling_layer=False)
        self.heads = nn.ModuleDict({"tags": nn.Linear(16, TAGS), "topic": nn.Linear(16, TOPICS)})

    def forward(self, input_ids, attention_mask=None, task=None):
        vectors = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        found = {"tags": self.heads["tags"](vectors), "topic": self.heads["topic"](vectors[:, 0])}
        return found if task is None else {"logits": found[task]}


def make_tasks() -> dict[str, Dataset]:
    """Return rows of very different length, for which means of batch means differ from the mean."""
    random = np.random.default_rng(0)
    found = {}
    for task, n in ROWS.items():
        ids = [[2, *random.integers(5, 500, size=size), 3] for size in random.integers(2, 30, size=n)]
        tags = [[-100, *random.integers(0, TAGS, size=len(row) - 2), -100] for row in ids]
        topics = random.integers(0, TOPICS, size=n).tolist()
        found[task] = Dataset.from_dict({"input_ids": ids, "labels": tags if task == "tags" else topics})
    return found


@pytest.fixture(scope="module")
def tasks() -> dict[str, Dataset]:
    return make_tasks()


def arguments(tmp_path, **given) -> TrainingArguments:
    defaults = {"precision": "fp32", "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "logging_steps": 1}
    defaults |= {"num_train_epochs": 2, "max_grad_norm": 0.5, "save_strategy": "no", "eval_strategy": "no"}
    return TrainingArguments(output_dir=str(tmp_path), **defaults | {"per_device_train_batch_size": 16} | given)


def of_tasks(tasks, tokenizer, tmp_path, dropout=0.0, metrics=None, **given) -> Trainer:
    torch.manual_seed(0)
    return Trainer(
        model=TwoHeads(dropout),
        args=arguments(tmp_path, **given),
        train_dataset=tasks,
        eval_dataset=tasks,
        processing_class=tokenizer,
        data_collator={
            "tags": DataCollatorForTokenClassification(tokenizer),
            "topic": DataCollatorWithPadding(tokenizer),
        },
        losses={"tags": label_losses, "topic": label_losses},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=metrics,
    )


def trained(trainer: Trainer, **how) -> tuple[dict[str, torch.Tensor], list[dict]]:
    trainer.train(**how)
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}, [
        entry for entry in trainer.state.log_history if "grad_norm" in entry
    ]


def farthest(a: dict, b: dict) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


# Several tasks


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_neither_losses_nor_weights(tasks, tokenizer, tmp_path, accumulation):
    whole, whole_log = trained(of_tasks(tasks, tokenizer, tmp_path))
    cut = {"per_device_train_batch_size": 16 // accumulation, "gradient_accumulation_steps": accumulation}
    parts, parts_log = trained(of_tasks(tasks, tokenizer, tmp_path, **cut))
    assert len(whole_log) == len(parts_log) == 2 * (70 // 16 + 40 // 16)
    for a, b in zip(whole_log, parts_log, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert a.keys() == b.keys()
    assert farthest(whole, parts) < 1e-6


def test_the_loss_of_each_task_is_logged_for_the_steps_that_have_it(tasks, tokenizer, tmp_path):
    steps = trained(of_tasks(tasks, tokenizer, tmp_path))[1]
    for entry in steps:  # a step has rows of one task
        (name,) = {"loss_tags", "loss_topic"} & entry.keys()
        assert entry[name] == pytest.approx(entry["loss"], rel=1e-5)
    every_third = trained(of_tasks(tasks, tokenizer, tmp_path, logging_steps=3))[1]
    for i, entry in enumerate(every_third):
        together = steps[3 * i : 3 * i + 3]
        for name in ("loss_tags", "loss_topic"):
            own = [step[name] for step in together if name in step]
            assert (name in entry) == bool(own)
            if own:
                assert entry[name] == pytest.approx(np.mean(own), rel=1e-4)


def test_resumed_in_the_second_epoch_equals_uninterrupted(tasks, tokenizer, tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 8, "save_total_limit": None, "dropout": 0.1, "logging_steps": 5}
    whole, log = trained(of_tasks(tasks, tokenizer, tmp_path, **steps))
    (last,) = [p for p in tmp_path.glob("checkpoint-*") if p.name == "checkpoint-8"]
    resumed, again = trained(of_tasks(tasks, tokenizer, tmp_path, **steps), resume_from_checkpoint=str(last))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [entry["step"] for entry in again] == [entry["step"] for entry in log]


def test_the_loss_of_a_task_in_evaluation_is_the_mean_over_its_labels(tasks, tokenizer, tmp_path):
    trainer = of_tasks(
        tasks, tokenizer, tmp_path, per_device_eval_batch_size=7, metrics=lambda p, d: {"rows": len(p.predictions)}
    )
    found = trainer.evaluate()
    for task, rows in tasks.items():
        total, count = 0.0, 0
        with torch.no_grad():
            for row in rows:
                logits = trainer.model(torch.tensor([row["input_ids"]]), task=task)["logits"]
                labels = torch.tensor([row["labels"]])
                total += label_losses(logits, labels).sum().item()
                count += (labels != -100).sum().item()
        assert found[f"eval_{task}_loss"] == pytest.approx(total / count, rel=1e-5)
        assert found[f"eval_{task}_rows"] == ROWS[task]
    assert found["eval_loss"] == pytest.approx(found["eval_tags_loss"] + found["eval_topic_loss"])


def test_a_checkpoint_is_picked_by_the_sum_of_the_losses(tasks, tokenizer, tmp_path):
    trainer = of_tasks(
        tasks, tokenizer, tmp_path, eval_strategy="epoch", save_strategy="epoch", save_min_seconds=0,
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_what_does_not_fit_the_tasks_is_told(tasks, tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"losses: differ from the tasks of train_dataset \(topic\)"):
        Trainer(TwoHeads(0.0), arguments(tmp_path), train_dataset=tasks, losses={"tags": label_losses})
    encoder = BertModel(BertConfig(**SMALL, intermediate_size=32), add_pooling_layer=False)
    with pytest.raises(InputError, match=r"BertModel\.forward: takes no argument `task`"):
        Trainer(encoder, arguments(tmp_path), train_dataset=tasks, losses={"tags": label_losses, "topic": label_losses})

    with pytest.raises(InputError, match=r"train_dataset\['topic'\]: has no rows"):
        of_tasks(tasks | {"topic": tasks["topic"].select([])}, tokenizer, tmp_path)
    rows = Dataset.from_list([{"input_ids": [2, 7, 3], "task": name} for name in tasks])
    with pytest.raises(InputError, match=r"task: one batch has rows of \w+ and \w+; evaluate or predict each task"):
        of_tasks(tasks, tokenizer, tmp_path).predict(rows)


@pytest.mark.parametrize(("best", "patience", "epochs"), [("loss", 1, 2), ("tags_score", 2, 3)])
def test_early_stopping_reads_the_sum_of_the_losses_or_a_score_of_a_task_once(
    tasks, tokenizer, tmp_path, best, patience, epochs
):
    trainer = of_tasks(
        tasks, tokenizer, tmp_path, eval_strategy="epoch", save_strategy="epoch", num_train_epochs=6,
        load_best_model_at_end=True, metric_for_best_model=best, early_stopping_patience=patience,
        learning_rate=0.0, save_min_seconds=0, metrics=lambda prediction, rows: {"score": 0.5},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.epoch == epochs


def batches(tasks, epoch=0, step_rows=16, **cut) -> list[list[int]]:
    sampler = TaskBatches(TaskRows(tasks), step_rows, **{"accumulation": 1, "processes": 1, "rank": 0, "seed": 0} | cut)
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


def test_steps_hold_each_row_once_and_one_task_each(tasks):
    found = batches(tasks)
    assert sorted(row for batch in found for row in batch) == list(range(110))
    assert all(len({row < 70 for row in batch}) == 1 and 16 <= len(batch) < 24 for batch in found)
    assert batches(tasks) == found
    assert batches(tasks, epoch=1) != found != batches(tasks, seed=1)


@pytest.mark.parametrize(("accumulation", "processes"), [(2, 1), (1, 2), (4, 2), (8, 2)])
def test_steps_do_not_depend_on_how_they_are_cut(tasks, accumulation, processes):
    each = [batches(tasks, accumulation=accumulation, processes=processes, rank=r) for r in range(processes)]
    for i, step in enumerate(batches(tasks)):
        own = [row for rank in each for batch in rank[i * accumulation : (i + 1) * accumulation] for row in batch]
        assert sorted(own) == sorted(step)


def test_later_passes_have_other_row_numbers(tasks):
    numbered = {name: rows.add_column("row", list(range(len(rows)))) for name, rows in tasks.items()}
    first, second = TaskRows(numbered).__getitems__([75, 75 + 2 * 110])
    assert first["task"] == second["task"] == "topic"
    assert first["input_ids"] == second["input_ids"]
    assert (first["row"], second["row"]) == (5, 5 + 2 * 40)


# Several label columns


class Both:
    """Collate rows that have tags and a topic."""

    def __init__(self, tokenizer):
        self.tags = DataCollatorForTokenClassification(tokenizer)

    def __call__(self, rows):
        batch = dict(self.tags([{"input_ids": row["input_ids"], "labels": row["tags"]} for row in rows]))
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "tags": batch["labels"],
            "topic": torch.tensor([row["topic"] for row in rows]),
        }


def of_columns(tasks, tokenizer, tmp_path, metrics=None, **given) -> Trainer:
    torch.manual_seed(0)
    rows = tasks["tags"].rename_column("labels", "tags").add_column("topic", [i % TOPICS for i in range(70)])
    return Trainer(
        model=TwoHeads(0.0),
        args=arguments(tmp_path, **given),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=Both(tokenizer),
        losses={"tags": label_losses, "topic": label_losses},
        preprocess_logits_for_metrics={"tags": lambda logits, labels: logits.argmax(-1)},
        compute_metrics=metrics,
    )


def test_the_loss_of_a_step_is_the_sum_of_the_means_of_its_columns(tasks, tokenizer, tmp_path):
    before = {k: v.clone() for k, v in of_columns(tasks, tokenizer, tmp_path).model.state_dict().items()}
    whole, whole_log = trained(of_columns(tasks, tokenizer, tmp_path))
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    parts, parts_log = trained(of_columns(tasks, tokenizer, tmp_path, **cut))
    for a, b in zip(whole_log, parts_log, strict=True):
        for name in ("loss", "loss_tags", "loss_topic"):
            assert b[name] == pytest.approx(a[name], rel=1e-5)
        assert a["loss"] == pytest.approx(a["loss_tags"] + a["loss_topic"], rel=1e-5)
    assert farthest(whole, parts) < 1e-6 < farthest(whole, before)


def test_each_column_is_predicted_without_labels(tasks, tokenizer, tmp_path):
    trainer = of_columns(tasks, tokenizer, tmp_path, lambda prediction, dataset: {})
    rows = trainer.eval_dataset
    labelled = trainer.predict(rows).predictions
    trainer.data_collator = DataCollatorWithPadding(tokenizer)
    found = trainer.predict(rows.remove_columns(["tags", "topic"])).predictions
    assert found.keys() == labelled.keys() == {"tags", "topic"}
    assert all(np.allclose(a, b, atol=1e-5) for name in found for a, b in zip(found[name], labelled[name], strict=True))


def test_each_column_is_evaluated(tasks, tokenizer, tmp_path):
    seen = {}

    def metrics(prediction, dataset):
        seen["tags"] = [row[row != -100].tolist() for row in prediction.label_ids["tags"]]
        seen["topic"] = [int(row) for row in prediction.label_ids["topic"]]
        seen["shapes"] = {name: np.shape(rows[0]) for name, rows in prediction.predictions.items()}
        return {"rows": len(dataset)}

    trainer = of_columns(tasks, tokenizer, tmp_path, metrics, per_device_eval_batch_size=16)
    found = trainer.evaluate()
    assert seen["tags"] == [row[1:-1] for row in trainer.eval_dataset["tags"]]
    assert seen["topic"] == trainer.eval_dataset["topic"][:]
    assert len(seen["shapes"]["tags"]) == 1  # reduced
    assert seen["shapes"]["topic"] == (TOPICS,)  # unchanged
    totals = {"tags": [], "topic": []}
    with torch.no_grad():
        for row in trainer.eval_dataset:
            outputs = trainer.model(torch.tensor([row["input_ids"]]))
            for name, values in totals.items():
                labels = torch.tensor([row[name]])
                values += label_losses(outputs[name], labels)[labels != -100].tolist()
    for name, values in totals.items():
        assert found[f"eval_loss_{name}"] == pytest.approx(np.mean(values), rel=1e-5)
    assert found["eval_loss"] == pytest.approx(found["eval_loss_tags"] + found["eval_loss_topic"])
    assert found["eval_rows"] == 70


# Several processes


def train_both(arguments: list[str]) -> None:
    """Train on tasks, then on label columns; write weights and logged losses. Arguments: folder, rows per device."""
    folder, rows = Path(arguments[0]), int(arguments[1])
    tokenizer = build_tokenizer()
    for name, make in (("tasks", of_tasks), ("columns", of_columns)):
        trainer = make(make_tasks(), tokenizer, folder / name, per_device_train_batch_size=rows, use_cpu=True)
        weights, log = trained(trainer)
        if trainer.is_world_process_zero():
            save_file(weights, folder / f"{name}.safetensors")
            names = ("loss", "loss_tags", "loss_topic")
            losses = [{name: entry[name] for name in names if name in entry} for entry in log]
            (folder / f"{name}.json").write_text(json.dumps(losses))


@pytest.mark.soak
def test_two_processes_change_nothing(tmp_path):
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        words = [str(tmp_path / str(processes)), str(16 // processes)]
        Job(words, tmp_path / "log", processes=processes, main=train_both).succeeds()
    for name in ("tasks", "columns"):
        one, two = (load_file(tmp_path / n / f"{name}.safetensors") for n in "12")
        assert farthest(one, two) < 1e-6
        one, two = (json.loads((tmp_path / n / f"{name}.json").read_text()) for n in "12")
        assert len(one) > 8
        for a, b in zip(one, two, strict=True):
            assert b == pytest.approx(a, rel=1e-5)
