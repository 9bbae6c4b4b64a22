"""Test language models on several domains and after an earlier run: scores by domain, and old texts."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from common.data.blocks import to_blocks
from common.data.corpus import CorpusArguments, load_corpus
from common.data.mapping import map_rows
from common.errors import InputError
from common.models.load import LoadedModel
from common.training import LanguageArguments, LanguageTrainer, losses_at_labels
from common.tuning import TuningArguments, tune
from recipes.mlm import train
from recipes.mlm.masking import MaskedBatches, Masker, mask_once, word_marks
from tests.conftest import SAMPLE, read_jsonl, write_jsonl
from tests.faults import Job, difference, make_files, words

TEXTS = [" ".join(row["tokens"]) for row in read_jsonl(SAMPLE / "train.jsonl")]


def write_texts(folder) -> dict[str, str]:
    """Write new texts of two domains, a large and a small one, and old texts."""
    rows = [{"text": text, "topic": "small" if i % 4 == 0 else "large"} for i, text in enumerate(TEXTS[:60])]
    old = [{"text": text, "topic": "large"} for text in TEXTS[100:124]]
    parts = {"train_file": rows[:40], "validation_file": rows[40:], "replay_file": old}
    return {name: write_jsonl(folder / f"{name}.jsonl", some) for name, some in parts.items()}


def make_trainer(tokenizer, folder, texts: dict[str, str], **given) -> LanguageTrainer:
    """Return the trainer of a small model on `texts` with a topic."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    args = CorpusArguments(**texts, domain_column="topic", max_seq_length=64)
    rows = to_blocks(load_corpus(args), tokenizer, args, word_marks)
    masker = Masker(tokenizer, "token", 0.15)
    rows["validation"] = map_rows(rows["validation"], mask_once, batched=True, fn_kwargs={"masker": masker})
    arguments = {"output_dir": str(folder / "out"), "precision": "fp32", "use_cpu": True, "disable_tqdm": True}
    arguments |= {"per_device_train_batch_size": 8, "save_strategy": "no", "eval_strategy": "no"}
    return LanguageTrainer(
        model=tune(LoadedModel(BertForMaskedLM(config), tokenizer, source="before"), TuningArguments(), None),
        args=LanguageArguments(**arguments | given),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=MaskedBatches(masker, tokenizer.pad_token_id, 0),
        losses={"labels": losses_at_labels},
    )


@pytest.fixture
def make(tokenizer, tmp_path):
    """Return `make_trainer` on the files of `write_texts`."""
    return partial(make_trainer, tokenizer, tmp_path, write_texts(tmp_path))


def test_the_scores_of_a_domain_are_those_of_its_rows_alone(make):
    trainer = make(keep="replay")
    rows = trainer.eval_dataset
    metrics = trainer.predict(rows, metric_key_prefix="test").metrics
    found = {}
    for domain in ("large", "small"):
        numbers = [i for i, name in enumerate(rows["domain"]) if name == domain]
        alone = trainer.predict(rows.select(numbers), metric_key_prefix="alone").metrics
        for score in ("perplexity", "accuracy"):
            assert metrics[f"test_domain_{domain}_{score}"] == pytest.approx(alone[f"alone_{score}"], rel=1e-5)
            found.setdefault(score, []).append(alone[f"alone_{score}"])
        assert metrics[f"test_domain_{domain}_rows"] == len(numbers)
    assert metrics["test_worst_domain_perplexity"] == pytest.approx(max(found["perplexity"]), rel=1e-5)
    assert metrics["test_worst_domain_accuracy"] == pytest.approx(min(found["accuracy"]))
    assert metrics["test_mean_domain_perplexity"] == pytest.approx(np.mean(found["perplexity"]), rel=1e-5)


def test_an_epoch_has_texts_of_each_domain_and_some_old_ones(make):
    trainer = make(keep="replay", replay_rows=2, domain_temperature=100)
    trainer.get_train_dataloader()
    rows = trainer.train_dataset
    old, domains = np.asarray(rows["old"][:]), np.asarray(rows["domain"][:])
    new = (~old).sum()
    assert new > (domains[~old] == "small").sum() * 2
    for epoch in range(2):
        trainer.train_batches.set_epoch(epoch)
        taken = np.array([row for step in trainer.train_batches for row in step])
        assert old[taken].sum() == 2
        inside = domains[taken][~old[taken]]
        assert len(inside) == new
        assert abs((inside == "small").sum() - (inside == "large").sum()) <= 1
    with pytest.raises(InputError, match="--batch_ramp_start: takes each row equally often; leave --replay_file and"):
        make(keep="replay", batch_ramp_start=2, batch_ramp_steps=2)


def test_the_information_of_old_texts_is_the_mean_squared_gradient(make):
    trainer = make(keep="ewc")
    trainer.train_collator = None
    rows, model = trainer.train_dataset, trainer.model.eval()
    old, total = np.flatnonzero(rows["old"][:]), {}
    for number in old.tolist():
        batch = trainer.data_collator([rows[number]])
        model.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum").backward()
        for name, value in model.named_parameters():
            total[name] = total.get(name, 0) + (0 if value.grad is None else value.grad**2)
    importance = trainer.fisher_pull.importance
    assert importance.keys() == total.keys()
    for name, value in importance.items():
        assert torch.allclose(value, total[name] / len(old), rtol=1e-3, atol=1e-8), name
    assert len(trainer.get_train_dataloader()) == -(-(len(rows) - len(old)) // 8)


@pytest.mark.soak
@pytest.mark.parametrize("method", ["replay", "ewc"])
def test_a_killed_run_on_domains_resumes_exactly(tmp_path, method):
    texts = write_texts(tmp_path)
    settings = {"domain_column": "topic", "domain_temperature": 5, "max_seq_length": 64, "num_train_epochs": 6}
    settings |= {"metric_for_best_model": "worst_domain_perplexity"}
    first = texts | {"model_name_or_path": make_files(tmp_path)["model_name_or_path"]}
    del first["replay_file"]
    start = partial(Job, log=tmp_path / "log", main=train.main)
    start(words(first, tmp_path / "first", **settings)).succeeds()
    settings |= {"after": tmp_path / "first", "keep": method}
    start(words(texts, tmp_path / "whole", **settings)).succeeds()
    start(words(texts, tmp_path / "out", **settings), kill_at=9).ends()
    start(words(texts, tmp_path / "out", resume_from_checkpoint="true", **settings)).succeeds()
    assert difference(tmp_path / "whole", tmp_path / "out") == 0
    half = settings | {"per_device_train_batch_size": 4}
    start(words(texts, tmp_path / "two", **half), processes=2).succeeds()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-3
