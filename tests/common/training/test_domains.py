"""Test adapters of domains and their gate: the equations, steps that divide exactly, resuming, saving and messages."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    T5Config,
    T5ForSequenceClassification,
)

from common.args import TrainingArguments
from common.errors import InputError
from common.inference.predictor import Predictor
from common.models.load import LoadedModel
from common.training import Trainer, label_losses
from common.training.domains import DomainCollator
from common.training.order import LengthSortedSampler
from common.tuning import TuningArguments, tune
from common.tuning.adapters import Bottleneck, Gate, Mixture
from tests.conftest import build_tokenizer, read_jsonl, write_jsonl
from tests.faults import Job, difference, make_files, words

DOMAINS = ("films", "goods", "shops")


def make_rows(number: int, seed: int = 0, names=DOMAINS) -> Dataset:
    """Return encoded rows of domains; each domain has words of its own."""
    random = np.random.default_rng(seed)
    places = random.integers(0, len(names), size=number)
    ids = [[2, *random.integers(20 + 90 * k, 26 + 90 * k, size=random.integers(3, 20)).tolist(), 3] for k in places]
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    columns |= {"labels": random.integers(0, 3, size=number).tolist(), "domain": [names[k] for k in places]}
    return Dataset.from_dict(columns)


def small_model(tokenizer):
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=3, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def trainer_of(tokenizer, folder, rows, model=None, tuning="domains", **given):
    torch.manual_seed(1)
    arguments = {"precision": "fp32", "disable_tqdm": True, "learning_rate": 0.01, "use_cpu": True, "max_steps": 2}
    arguments |= {"save_strategy": "no", "eval_strategy": "no", "optim": "sgd", "max_grad_norm": 0.0}
    arguments |= {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 50,
        "logging_steps": 1,
        "output_dir": str(folder / "out"),
    }
    loaded = LoadedModel(model or small_model(tokenizer), tokenizer, frozenset(), "before")
    more = {"adapter_reduction": 4} if tuning == "domains" else {}
    return Trainer(
        model=tune(loaded, TuningArguments(tuning=tuning, **more), None),
        args=TrainingArguments(**arguments | given),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        losses=label_losses,
    )


@pytest.fixture
def make(tokenizer, tmp_path):
    """Return `trainer_of` for the folder of the test."""
    return partial(trainer_of, tokenizer, tmp_path)


def widen(trainer) -> None:
    """Move the adapters and the gate away from their start, where they change nearly nothing."""
    with torch.no_grad():
        for name, value in trainer.model.named_parameters():
            if "bottleneck_adapter" in name:
                value.add_(0.3 * torch.randn_like(value))


def batch_of(trainer, rows) -> dict[str, torch.Tensor]:
    """Return all rows as a batch, in their order."""
    places = np.argsort(LengthSortedSampler(rows).order)
    return {name: values[places] for name, values in next(iter(trainer.get_test_dataloader(rows))).items()}


# Equations


def test_a_mixture_adds_the_weighted_adapters():
    mixture, h = Mixture(6, 2, 3), torch.randn(4, 5, 6)
    torch.nn.init.normal_(mixture.up.weight)
    torch.nn.init.normal_(mixture.bias)
    each = []
    for k in range(3):
        one = Bottleneck(6, 2)
        part = slice(2 * k, 2 * k + 2)
        with torch.no_grad():
            one.down.weight.copy_(mixture.down.weight[part])
            one.down.bias.copy_(mixture.down.bias[part])
            one.up.weight.copy_(mixture.up.weight[:, part])
            one.up.bias.copy_(mixture.bias[k])
        each.append(one)
        alone = F.one_hot(torch.tensor([k]), 3).float().expand(4, 1, 3)
        assert torch.allclose(mixture(h, alone), one(h), atol=1e-5)
    weights = torch.rand(4, 1, 3)
    wanted = h + sum(weights[..., k : k + 1] * (each[k](h) - h) for k in range(3))
    assert torch.allclose(mixture(h, weights), wanted, atol=1e-5)


def test_the_gate_classifies_the_mean_embedding_and_steps_back_for_a_given_domain():
    gate = Gate(4, ["a", "b", "c"])
    torch.nn.init.normal_(gate.classifier.weight)
    words, mask = torch.randn(2, 3, 4, requires_grad=True), torch.tensor([[1, 1, 0], [1, 1, 1]])
    gate.given = torch.tensor([-1, 2])
    gate.read(words, mask)
    mean = words[0, :2].mean(0)
    wanted = gate.classifier((mean - mean.mean()) / mean.std(unbiased=False)).softmax(-1)
    assert torch.allclose(gate.weights[0], wanted, atol=1e-4)
    assert gate.weights[1].tolist() == [0, 0, 1]
    gate.weights[0, 0].backward()
    assert words.grad is None  # the gate does not train the embeddings
    gate.fixed = "b"
    gate.read(words, mask)
    assert gate.weights.tolist() == [[0, 1, 0]] * 2


def test_the_loss_has_that_of_the_gate_over_all_rows_of_the_step(make):
    trainer = make(make_rows(8))
    widen(trainer)
    batch = batch_of(trainer, trainer.train_dataset)
    _, counts = trainer.get_batch_samples(iter([dict(batch)]), 1, torch.device("cpu"))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=counts)
    labels = batch.pop("labels")
    logits = trainer.model(**batch).logits
    wanted = F.cross_entropy(logits, labels) + F.cross_entropy(trainer.gate.logits, batch["domain"])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert batch["domain"].tolist() == [DOMAINS.index(name) for name in trainer.train_dataset["domain"]]
    trainer.model.eval()
    trainer._told = torch.zeros(2, dtype=torch.int64)
    plain = trainer.compute_loss(trainer.model, batch | {"labels": labels})
    assert plain.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_each_row_has_its_weights_without_padding_too(make):
    rows = make_rows(12).add_column("at", list(range(12)))
    results = []
    for speed in ("off", "auto"):
        trainer = make(rows, speed=speed)
        torch.manual_seed(5)
        widen(trainer)
        assert bool(trainer.speed.without_padding) == (speed == "auto")
        batch = batch_of(trainer, rows)
        del batch["labels"]
        batch["domain"][::3] = -1  # the gate mixes these
        with torch.no_grad():
            results.append(trainer.model.eval()(**batch).logits)
    assert (results[0] - results[1]).abs().max() < 1e-5 < (results[0][0] - results[0][1]).abs().max()


def test_windows_of_a_row_have_its_domain(make):
    rows = Dataset.from_dict(
        {
            "input_ids": [[2, 3]] * 4, "attention_mask": [[1, 1]] * 4, "labels": [0] * 4,
            "domain": ["films", None, "shops", None],
        }
    )  # fmt: skip
    assert batch_of(make(rows), rows)["domain"].tolist() == [0, 0, 1, 1]


def test_pieces_of_a_packed_row_have_its_domain():
    def collate(rows):
        return {"input_ids": torch.zeros(3, 2), "owner": torch.tensor([0, 1, 1])}

    batch = DomainCollator(collate)([{"domain_number": 2}, {"domain_number": 0}])
    assert batch["domain"].tolist() == [2, 0, 0]


# Training


def test_the_gate_learns_the_domains_and_mixes_one_that_it_never_saw(make):
    trainer = make(make_rows(96), max_steps=120, optim="adamw_torch", learning_rate=1e-3)
    rates = {group["lr"] for group in trainer.create_optimizer().param_groups}
    assert rates == {1e-3, 5e-3}
    trainer.train()
    trainer.model.eval()
    result = trainer.predict(make_rows(30, seed=1))
    assert result.metrics["test_gate_accuracy"] > 0.9
    unseen = trainer.predict(make_rows(30, seed=1, names=("films", "new", "shops")))
    assert unseen.metrics["test_gate_accuracy"] > 0.9
    batch = batch_of(trainer, make_rows(30, seed=1, names=("films", "new", "shops")))
    assert set(batch["domain"].tolist()) == {0, 2, -1}


def test_domains_can_be_hidden_from_an_evaluation(make):
    trainer = make(make_rows(20), domain_given=False)
    assert set(batch_of(trainer, make_rows(6))["domain"].tolist()) == {-1}
    assert -1 not in batch_of(trainer, trainer.train_dataset)["domain"].tolist()


def train(arguments: list[str]) -> None:
    """Train and write the weights. Arguments: folder, rows per device, accumulation."""
    folder = Path(arguments[0])
    trainer = trainer_of(
        build_tokenizer(), folder, make_rows(40), max_grad_norm=0.5,
        per_device_train_batch_size=int(arguments[1]), gradient_accumulation_steps=int(arguments[2]),
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        save_file(trainer.accelerator.unwrap_model(trainer.model).state_dict(), folder / "weights.safetensors")


def furthest(one: Path, other: Path) -> float:
    a, b = (load_file(folder / "weights.safetensors") for folder in (one, other))
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_accumulation_changes_nothing(tmp_path):
    for name, given in (("whole", ["8", "1"]), ("parts", ["2", "4"])):
        (tmp_path / name).mkdir()
        train([str(tmp_path / name), *given])
    assert furthest(tmp_path / "whole", tmp_path / "parts") < 1e-5


@pytest.mark.soak
def test_two_processes_change_nothing(tmp_path):
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        given = [str(tmp_path / str(processes)), str(8 // processes), "1"]
        Job(given, tmp_path / "log", processes=processes, main=train).succeeds()
    assert furthest(tmp_path / "1", tmp_path / "2") < 1e-5


def with_topics(files: dict[str, str]) -> dict[str, str]:
    """Give each row a topic."""
    for name in ("train_file", "validation_file", "test_file"):
        rows = read_jsonl(Path(files[name]))
        write_jsonl(Path(files[name]), [row | {"topic": DOMAINS[i % 3]} for i, row in enumerate(rows)])
    return files | {"domain_column": "topic", "tuning": "domains"}


@pytest.mark.soak
def test_a_killed_run_resumes_exactly(tmp_path):
    files = with_topics(make_files(tmp_path))
    Job(words(files, tmp_path / "whole"), tmp_path / "log").succeeds()
    Job(words(files, tmp_path / "out"), tmp_path / "log", kill_at=9).ends()
    Job(words(files, tmp_path / "out", resume_from_checkpoint="true"), tmp_path / "log").succeeds()
    assert difference(tmp_path / "whole", tmp_path / "out") == 0


# Saving


def test_a_saved_model_predicts_with_a_domain_or_the_gate(make, tokenizer, tmp_path):
    rows = make_rows(12)
    trainer = make(rows)
    widen(trainer)
    batch = batch_of(trainer, rows)
    del batch["labels"]
    hidden = batch | {"domain": torch.full((12,), -1)}
    films = batch | {"domain": torch.zeros(12, dtype=torch.int64)}
    with torch.no_grad():
        wanted = {name: trainer.model.eval()(**given).logits for name, given in ((None, hidden), ("films", films))}
    folder = tmp_path / "saved"
    trainer.model = trainer.merged(str(folder), save=True)
    trainer.save_model(str(folder))
    for domain, logits in wanted.items():
        predictor = Predictor(
            AutoModelForSequenceClassification,
            "ForSequenceClassification",
            str(folder),
            precision="fp32",
            domain=domain,
        )
        for numbers, found in predictor.logits({"input_ids": rows["input_ids"][:]}):
            assert torch.allclose(found, logits[numbers], atol=1e-5)
    assert (wanted[None] - wanted["films"]).abs().max() > 1e-3
    with pytest.raises(InputError, match=r"--domain cars: .*was trained on films, goods, shops; name one of them"):
        Predictor(AutoModelForSequenceClassification, "ForSequenceClassification", str(folder), domain="cars")


# Messages


def test_rows_and_models_that_cannot_be_mixed_are_refused(make, tokenizer):
    rows = make_rows(8)
    t5 = T5ForSequenceClassification(
        T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    for given, message in (
        ({"rows": rows.remove_columns("domain")}, "--tuning domains: the rows have no domains; name their column by"),
        ({"rows": make_rows(8, names=("films",))}, "--tuning domains: all training rows have the domain films"),
        ({"rows": rows.to_iterable_dataset()}, "--tuning domains: needs one training set in memory"),
        ({"rows": rows, "model": t5}, "--tuning domains: does not work with a t5 model; give --tuning full"),
        ({"rows": rows, "tuning": "full", "domain_given": False}, "--domain_given false: needs adapters of domains"),
    ):
        with pytest.raises(InputError, match=message):
            make(**given)
