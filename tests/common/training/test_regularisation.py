"""Test each regulariser against its equation on a tiny model, and under the guarantees of the trainer."""

import importlib
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTokenClassification,
    BertConfig,
    DataCollatorForTokenClassification,
    MambaConfig,
    TrainerCallback,
)

from common.args import ModelArguments, TrainingArguments
from common.cli import training_module
from common.errors import InputError
from common.models.load import load_model
from common.models.structure import set_dropout
from common.training import Trainer, label_losses
from common.training.regularisation import Adversary, Mixout, WeightAverage, divergence, repeat_batch
from common.tuning import TuningArguments, tune
from tests.conftest import ROOT, SAMPLE, read_jsonl, write_jsonl
from tests.faults import Job, difference, make_files, words

LABELS = 5
SMALL = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Return 70 rows of very different length: steps of 32, 32 and 6."""
    random = np.random.default_rng(0)
    lengths = random.integers(2, 40, size=70)
    ids = [[2, *random.integers(5, 500, size=n), 3] for n in lengths]
    labels = [[-100, *random.integers(0, LABELS, size=n), -100] for n in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def make(tiny, tokenizer, tmp_path, rows, callbacks=(), **arguments) -> Trainer:
    """Return an SGD trainer of a token classifier that is loaded as in the recipes."""
    torch.manual_seed(0)
    defaults = {"precision": "fp32", "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "logging_steps": 1}
    defaults |= {"num_train_epochs": 1, "max_grad_norm": 0, "save_strategy": "no", "eval_strategy": "no"}
    defaults |= {"weight_decay": 0.0, "lr_scheduler_type": "constant"}
    args = TrainingArguments(output_dir=str(tmp_path / "out"), **defaults | arguments)
    model_args = ModelArguments(model_name_or_path=tiny)
    loaded = load_model(AutoModelForTokenClassification, model_args, [str(i) for i in range(LABELS)], 64)
    return Trainer(
        model=tune(loaded, TuningArguments(), None),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        callbacks=list(callbacks),
        losses=label_losses,
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def farthest(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


class Steps(TrainerCallback):
    """Keep the weights after each step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights.append(weights(model))


# Weight decay


HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
FAMILIES = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "albert": {"embedding_size": 8},
    "electra": {"embedding_size": 8},
    "deberta-v2": {},
    "modernbert": {"pad_token_id": 0},
    "distilbert": {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2},
    "llama": {"num_key_value_heads": 2},
    "t5": {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2},
    "bart": {
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    },
    "m2m_100": {
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_decay_takes_matrices_and_neither_biases_nor_norms(family, tmp_path):
    model = AutoModel.from_config(AutoConfig.for_model(family, **SMALL | FAMILIES[family]))
    args = TrainingArguments(str(tmp_path), weight_decay=0.1, eval_strategy="no", precision="fp32")
    trainer = Trainer(model, args, losses=label_losses)
    groups = trainer.create_optimizer().param_groups
    names = {id(value): name for name, value in model.named_parameters()}
    decayed = {names[id(value)] for group in groups for value in group["params"] if group["weight_decay"] == 0.1}
    spared = {names[id(value)] for group in groups for value in group["params"] if group["weight_decay"] == 0}
    assert decayed | spared == set(names.values())
    for name, value in model.named_parameters():
        matrix = value.ndim > 1 and "attention_bias" not in name  # T5 adds a bias table to its attention scores
        assert (name in decayed) == matrix, name


# Dropout


def test_dropout_is_set_everywhere_and_not_saved():
    model = AutoModel.from_config(BertConfig(**SMALL))
    set_dropout(model, None)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1}
    set_dropout(model, 0.3)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert model.config.hidden_dropout_prob == 0.1
    bart = AutoModel.from_config(AutoConfig.for_model("bart", **SMALL | FAMILIES["bart"]))
    set_dropout(bart, 0.3)
    assert bart.encoder.dropout == bart.decoder.layers[0].activation_dropout == 0.3
    with pytest.raises(InputError, match=r"--attention_dropout 0\.1: --dropout 0\.3 includes attention"):
        set_dropout(model, 0.3, 0.1)
    none = AutoModel.from_config(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=20, state_size=4))
    set_dropout(none, 0.0)
    with pytest.raises(InputError, match="--dropout: a mamba model has no dropout"):
        set_dropout(none, 0.3)


# R-Drop


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return (p * (p.log() - q.log()).where(p > 0, 0)).sum().item()


def test_divergence_is_the_mean_of_both_directions_over_labels():
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, 5), torch.tensor([[1, -100, 2], [0, 3, -100]]).repeat(2, 1)
    p, q = logits.softmax(-1).chunk(2)
    expected = sum(
        (kl(p[i, j], q[i, j]) + kl(q[i, j], p[i, j])) / 2 for i in range(2) for j in range(3) if labels[i, j] != -100
    )
    assert divergence(logits, labels).item() == pytest.approx(expected, rel=1e-5)
    picked = logits[labels != -100][None]  # as the head of a language model returns them
    assert divergence(picked, labels).item() == pytest.approx(expected, rel=1e-5)
    several = torch.randn(4, 3)  # independent classes
    p, q = torch.stack([several.sigmoid(), 1 - several.sigmoid()], -1).chunk(2)
    expected = (kl(p, q) + kl(q, p)) / 2
    assert divergence(several, torch.ones(4, 3)).item() == pytest.approx(expected, rel=1e-4)


def test_divergence_of_spans_leaves_out_what_is_not_possible():
    torch.manual_seed(0)
    start, end = torch.randn(2, 4, 6).unbind()
    start[:, 0] = -torch.inf
    start.requires_grad_()
    labels = torch.tensor([[1, 2], [-100, -100]]).repeat(2, 1)
    found = divergence((start, end), labels)
    expected = 0.0
    for logits in (start, end):
        p, q = logits.detach().softmax(-1)[[0, 2]]
        expected += (kl(p, q) + kl(q, p)) / 2
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert torch.isfinite(start.grad).all()
    assert start.grad[0].abs().sum() > 0


def test_r_drop_adds_its_weight_times_the_divergence(tiny, tokenizer, tmp_path, rows):
    trainer = make(tiny, tokenizer, tmp_path, rows, r_drop=0.5)
    logits, labels = torch.randn(6, 4, LABELS), torch.randint(0, LABELS, (3, 4)).repeat(2, 1)
    trainer.model.train()
    found = trainer.mean_loss({"logits": logits}, {"labels": labels}, {"labels": torch.tensor(24)})
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + 0.5 * divergence(logits, labels) / 12
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    trainer.model.eval()
    assert trainer.mean_loss({"logits": logits}, {"labels": labels}).item() == pytest.approx(
        label_losses(logits, labels).mean().item()
    )
    assert torch.equal(repeat_batch({"a": torch.tensor([[1], [2]])})["a"], torch.tensor([[1], [2], [1], [2]]))


# Adversarial embeddings


def by_hand(trainer: Trainer, batch: dict, epsilon: float, step_size: float, passes: int, first) -> dict:
    """Return the weights after one SGD step at 0.1 with the mean gradient of `passes` at perturbed embeddings."""
    model = trainer.model.train()
    embeddings, mask = model.get_input_embeddings(), batch["attention_mask"][..., None]
    delta = first(embeddings(batch["input_ids"]).shape)
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for _ in range(passes):
        delta = delta.detach().requires_grad_()
        logits = model(
            inputs_embeds=embeddings(batch["input_ids"]) + delta, attention_mask=batch["attention_mask"]
        ).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        *gradients, of_delta = torch.autograd.grad(loss, [*model.parameters(), delta])
        for sum_, gradient in zip(total.values(), gradients, strict=True):
            sum_ += gradient / passes
        moved = []
        for d, g in zip(delta.detach(), of_delta * mask, strict=True):
            d = d + step_size * g / g.norm()
            moved.append(d * min(1, epsilon / d.norm().item()))
        delta = torch.stack(moved)
    return {name: value.detach() - 0.1 * total[name] for name, value in model.named_parameters()}


def test_fgm_trains_on_the_loss_and_on_that_of_embeddings_moved_along_its_gradient(
    tiny,
    tokenizer,
    tmp_path,
    rows,
):
    trainer = make(
        tiny, tokenizer, tmp_path, rows.select(range(6)), adversarial="fgm", adversarial_epsilon=0.7, max_steps=1
    )
    batch = trainer.data_collator([{k: row[k] for k in ("input_ids", "labels")} for row in rows.select(range(6))])
    expected = by_hand(trainer, batch, 0.7, 0.7, passes=2, first=torch.zeros)
    before = weights(trainer.model)
    trainer.train()
    assert farthest(weights(trainer.model), expected) < 1e-6
    assert farthest(before, expected) > 1e-3


def test_freelb_takes_the_mean_gradient_of_its_ascent(tiny, tokenizer, tmp_path, rows):
    freelb = {"adversarial": "freelb", "adversarial_epsilon": 0.5, "adversarial_step_size": 0.4, "adversarial_steps": 3}
    trainer = make(tiny, tokenizer, tmp_path, rows.select(range(6)), **freelb, max_steps=1)
    batch = trainer.data_collator([{k: row[k] for k in ("input_ids", "labels")} for row in rows.select(range(6))])
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    first = trainer.adversary._first(ids, mask, 0)
    values = [row[real] * np.sqrt(row[real].numel()) for row, real in zip(first, mask, strict=True)]
    assert 0.49 < max(v.max() for v in values) <= 0.5
    assert -0.5 <= min(v.min() for v in values) < -0.49
    assert all(abs(v.mean()) < 0.1 for v in values)
    assert not first[~mask].any()
    assert not torch.equal(first, trainer.adversary._first(ids, mask, 1))
    longer = trainer.adversary._first(F.pad(ids[2:4], (0, 5)), F.pad(mask[2:4], (0, 5)), 0)  # in a different batch
    assert torch.equal(longer[:, : ids.shape[1]], first[2:4])
    expected = by_hand(trainer, batch, 0.5, 0.4, passes=3, first=lambda shape: first.clone())
    trainer.train()
    assert farthest(weights(trainer.model), expected) < 1e-6


def test_all_passes_of_a_step_drop_the_same(tiny, tokenizer, tmp_path, rows):
    trainer = make(tiny, tokenizer, tmp_path, rows, adversarial="freelb", adversarial_steps=4)
    drawn = []
    for _ in trainer.adversary.perturbed({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, 0):
        drawn.append(torch.rand(3))
        trainer.adversary.delta.grad = torch.ones_like(trainer.adversary.delta)
    assert len(drawn) == 4
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])
    assert not torch.equal(drawn[0], torch.rand(3))


def test_a_model_that_hands_its_embeddings_no_gradient_is_told(tiny, tokenizer, tmp_path, rows):
    trainer = make(tiny, tokenizer, tmp_path, rows, adversarial="fgm")
    forward = trainer.model.bert.forward

    def without_gradient(*args, **kwargs):
        with torch.no_grad():
            return forward(*args, **kwargs)

    trainer.model.bert.forward = without_gradient
    with pytest.raises(InputError, match="passes no gradient to its embeddings"):
        trainer.train()


def test_of_an_encoder_decoder_the_source_is_moved():
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model("t5", **SMALL | FAMILIES["t5"])).eval()
    adversary = Adversary(model, 1.0, None, None, seed=0)
    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[6, 7]])}
    plain = model(**inputs).last_hidden_state
    found = []
    for _ in adversary.perturbed({k: v for k, v in inputs.items() if k == "input_ids"}, 0):
        found.append(model(**inputs).last_hidden_state)
        found[-1].square().sum().backward()
    assert torch.equal(found[0], plain)
    assert not torch.allclose(found[1], plain)
    assert torch.equal(model(**inputs).last_hidden_state, plain)


# Toward the pretrained weights


def test_l2_sp_pulls_to_where_the_weights_began_and_replaces_their_decay(tiny, tokenizer, tmp_path, rows):
    plain, pulled = Steps(), Steps()
    make(tiny, tokenizer, tmp_path, rows, [plain]).train()
    trainer = make(tiny, tokenizer, tmp_path, rows, [pulled], l2_sp=0.5, weight_decay=0.1)
    began = weights(trainer.model)
    trainer.train()
    first, second = pulled.weights[:2]
    head = {name for name in began if name.startswith("classifier")}
    decayed = began["classifier.weight"] * 0.1 * 0.1  # only the new head, by SGD at 0.1
    assert torch.allclose(first["classifier.weight"], plain.weights[0]["classifier.weight"] - decayed, atol=1e-6)
    assert farthest(*({k: v for k, v in w.items() if k not in head} for w in (first, plain.weights[0]))) < 1e-6

    # the second step by hand: gradient of the loss, and 0.5 (w - began)
    keep = make(tiny, tokenizer, tmp_path, rows)
    batches = [list(batch) for batch in keep._get_train_sampler()]
    keep.model.load_state_dict(first, strict=False)
    batch = keep.data_collator([{k: rows[i][k] for k in ("input_ids", "labels")} for i in batches[1]])
    keep.model.train()
    loss = F.cross_entropy(keep.model(**{k: v for k, v in batch.items() if k != "labels"}).logits.flatten(0, 1),
                           batch["labels"].flatten())  # fmt: skip
    loss.backward()
    for name, value in keep.model.named_parameters():
        if name not in head:
            expected = first[name] - 0.1 * (value.grad + 0.5 * (first[name] - began[name]))
            assert torch.allclose(second[name], expected, atol=1e-6), name


def test_mixout_mixes_keeps_the_mean_and_hands_the_gradient_on():
    model = nn.Sequential(nn.Linear(40, 50), nn.LayerNorm(50), nn.Linear(50, 3))
    w = model[0].weight
    before = w.detach().clone()
    parameters = {name: value for name, value in model.named_parameters() if name.startswith(("0", "1"))}
    mixout = Mixout(model, parameters, p=0.7, seed=3)
    assert [pair[0] is w for pair in mixout.pairs] == [True]  # no bias, norm or new head
    with torch.no_grad():
        w.add_(torch.randn_like(w))
    own = w.detach().clone()
    sums, count = torch.zeros_like(own), 400
    for step in range(count):
        mixout.mix(step)
        mixed = w.detach().clone()
        mixout.mix(step)  # a second batch of the same step
        assert torch.equal(w, mixed)
        taken = mixout.mixed[0][2]
        assert torch.allclose(mixed, torch.where(taken, (1 - 0.7) * before, own - 0.7 * before) / (1 - 0.7), atol=1e-5)
        w.grad = torch.ones_like(w)
        mixout.restore()
        assert torch.equal(w, own)
        assert torch.allclose(w.grad, (~taken).float() / (1 - 0.7))
        sums += mixed
        if step == 0:
            share = taken.float().mean().item()
    assert share == pytest.approx(0.7, abs=0.05)
    assert ((sums / count - own).abs() / (own - before).abs().clamp(min=0.1)).mean() < 0.2
    mixout.mix(0)
    first = mixout.mixed[0][2]
    mixout.forget()
    mixout.mix(1)
    assert not torch.equal(first, mixout.mixed[0][2])
    mixout.forget()
    mixout.mix(0)
    assert torch.equal(first, mixout.mixed[0][2])


def test_what_holds_pretrained_weights_is_refused_where_none_is_trained(tiny, tokenizer, tmp_path, rows):
    trainer = make(tiny, tokenizer, tmp_path, rows, speed="off")
    for parameter in trainer.model.bert.parameters():
        parameter.requires_grad_(False)
    for name in ("l2_sp", "mixout"):
        args = TrainingArguments(str(tmp_path / "other"), eval_strategy="no", speed="off", **{name: 0.5})
        with pytest.raises(InputError, match=f"--{name}: needs trained pretrained weights, and this run trains none"):
            Trainer(trainer.tuned, args, losses=label_losses)


# Averages of weights


def test_ema_and_swa_by_their_equations():
    model = nn.Linear(1, 1, bias=False)
    values = [1.0, 2.0, 4.0, -3.0, 5.0, 6.0]

    def after(average: WeightAverage) -> list[float | None]:
        average.begin(len(values))
        found = []
        nn.init.constant_(model.weight, 0.5)
        for step, value in enumerate(values, 1):
            average.before_step(model)
            nn.init.constant_(model.weight, value)
            average.after_step(model, step)
            with average.in_place(model):
                found.append(model.weight.item())
            assert model.weight.item() == value
        return found

    mean, expected = 0.5, []
    for step, value in enumerate(values, 1):
        decay = min(0.3, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * value
        expected.append(mean)
    assert after(WeightAverage(0.3, None)) == pytest.approx(expected, rel=1e-6)
    assert min(0.3, 2 / 11) == 2 / 11  # the first steps equal those of a short run
    tail = [1.0, 2.0, *(np.mean(values[2:n]) for n in (3, 4, 5, 6))]
    assert after(WeightAverage(None, 3)) == pytest.approx(tail, rel=1e-6)
    assert after(WeightAverage(None, 0.5)) == pytest.approx(tail, rel=1e-6)
    average = WeightAverage(None, 7)
    with pytest.raises(InputError, match="--swa_start 7: the run has 6 steps"):
        average.begin(6)


@pytest.mark.parametrize("average", [{"ema_decay": 0.6}, {"swa_start": 3}])
def test_the_mean_is_evaluated_saved_and_picked(tiny, tokenizer, tmp_path, rows, average):
    scores, seen, steps = iter([0.2, 0.7, 0.3]), [], Steps()
    by_epoch = {"num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": "epoch", "save_min_seconds": 0}
    by_epoch |= {"save_total_limit": None, "metric_for_best_model": "f1", "greater_is_better": True}
    trainer = make(tiny, tokenizer, tmp_path, rows, [steps], **by_epoch, **average)
    mean = weights(trainer.model)

    def metrics(prediction, dataset):
        seen.append(weights(trainer.model))
        return {"f1": next(scores)}

    trainer.user_metrics = metrics
    trainer.train()
    expected = []
    for step, own in enumerate(steps.weights, 1):
        share = 1 - min(0.6, (1 + step) / (10 + step)) if "ema_decay" in average else 1 / max(1, step - 2)
        mean = {name: value + share * (own[name] - value) for name, value in mean.items()}
        if step % 3 == 0:
            expected.append(mean)
    for found, mean in zip(seen, expected, strict=True):
        assert farthest(found, mean) < 1e-5
    assert farthest(seen[1], steps.weights[5]) > 1e-4
    saved = load_file(tmp_path / "out" / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in seen[1].items())
    own = load_file(tmp_path / "out" / "checkpoint-6" / "unaveraged.safetensors")
    assert all(torch.equal(own[name], value) for name, value in steps.weights[5].items())
    assert farthest(weights(trainer.model), seen[1]) == 0  # the best epoch is the second
    last = make(tiny, tokenizer, tmp_path / "last", rows, **by_epoch | {"eval_strategy": "no"}, **average)
    last.train()
    assert farthest(weights(last.model), expected[2]) < 1e-5
    last.save_model()
    saved = load_file(tmp_path / "last" / "out" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in weights(last.model).items())


def test_a_checkpoint_with_a_mean_is_not_taken_for_plain_weights(tiny, tokenizer, tmp_path, rows):
    saves = {"save_strategy": "steps", "save_steps": 2}
    make(tiny, tokenizer, tmp_path, rows, **saves, ema_decay=0.5).train()
    with pytest.raises(InputError, match="its run averages the weights; give its --ema_decay or --swa_start"):
        make(tiny, tokenizer, tmp_path, rows).train(str(tmp_path / "out" / "checkpoint-3"))


# Under the guarantees of the trainer

EACH = {
    "r_drop": {"r_drop": 1.0},
    "fgm": {"adversarial": "fgm"},
    "freelb": {"adversarial": "freelb"},
    "mixout": {"mixout": 0.5},
    "l2_sp": {"l2_sp": 0.5},
    "ema": {"ema_decay": 0.9},
    "swa": {"swa_start": 0.5},
    "together": {"mixout": 0.3, "l2_sp": 0.1, "adversarial": "fgm", "ema_decay": 0.5, "label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("name", EACH)
def test_accumulation_changes_nothing(tiny, tokenizer, tmp_path, rows, name):
    found = []
    for batch, accumulation in ((32, 1), (8, 4)):
        cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = make(tiny, tokenizer, tmp_path, rows, **cut, **EACH[name], max_grad_norm=0.5)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]
        found.append((weights(trainer.model), losses))
    assert len(found[0][1]) == 3
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    assert farthest(found[0][0], found[1][0]) < 2e-6


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.soak) for n in ("swa", "r_drop", "freelb", "together")]
)
def test_two_processes_change_nothing(files, tmp_path, name):
    more = {"dropout": 0, "optim": "sgd", "learning_rate": 0.1} if name != "r_drop" else {"optim": "sgd"}
    if name == "r_drop":  # without dropout R-Drop compares equal outputs, and is plain training
        more["dropout"] = 1e-9
    settings = EACH[name] | more | {"num_train_epochs": 1}
    Job(words(files, tmp_path / "one", **settings), tmp_path / "log").succeeds()
    two = settings | {"per_device_train_batch_size": 4}
    Job(words(files, tmp_path / "two", **two), tmp_path / "log", processes=2).succeeds()
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert farthest(one, two) < 1e-5


@pytest.mark.parametrize(
    ("name", "more"),
    [
        pytest.param(name, more, marks=pytest.mark.soak)
        for name, more in (("together", {}), ("freelb", {}), ("swa", {"lora_r": 4}))
    ],
)
def test_killed_and_resumed_equals_uninterrupted(files, tmp_path, name, more):
    settings = EACH[name] | more
    Job(words(files, tmp_path / "whole", **settings), tmp_path / "log").succeeds()
    out = words(files, tmp_path / "out", **settings)
    assert Job(out, tmp_path / "log", kill_at=11).ends() == [-signal.SIGKILL]
    Job([*out, "--resume_from_checkpoint", "true"], tmp_path / "log").succeeds()
    assert difference(tmp_path / "whole", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r_drop": 1.0, "adversarial": "fgm"}, "--r_drop and --adversarial exclude each other"),
        ({"r_drop": 1.0, "dropout": 0.0}, "--r_drop: without dropout the two passes are the same"),
        ({"ema_decay": 0.9, "swa_start": 0.5}, "--ema_decay and --swa_start exclude each other"),
        ({"adversarial_epsilon": 0.5}, "--adversarial_epsilon: needs --adversarial fgm or freelb"),
        ({"adversarial": "fgm", "adversarial_steps": 2}, "--adversarial_steps: needs --adversarial freelb"),
        ({"adversarial": "freelb", "adversarial_step_size": 0.0}, "--adversarial_step_size 0.0: must be above 0"),
        ({"mixout": 1.0}, "--mixout 1.0: must be at least 0 and below 1"),
        ({"dropout": -0.1}, "--dropout -0.1: must be at least 0"),
        ({"l2_sp": -1.0}, "--l2_sp -1.0: must be at least 0"),
        ({"swa_start": -1.0}, "--swa_start -1.0: must be at least 0; give a step, or below 1 a share"),
    ],
)
def test_what_makes_no_sense_is_told(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        TrainingArguments(str(tmp_path), **arguments)


def recipe_words(recipe: str, tiny: str, folder: Path) -> list[str]:
    """Return arguments for four SGD steps on eight rows of a recipe each, without dropout."""
    recipe, _, own = recipe.partition("-")
    sentences = [row["tokens"] for row in read_jsonl(SAMPLE / "train.jsonl")[:40]]
    if recipe == "translation":  # its sample is generated at run time: use texts, and reversed texts as targets
        rows = [{"translation": {"en": " ".join(words), "de": " ".join(words[::-1])}} for words in sentences]
        more = ["--source_lang", "en", "--target_lang", "de", "--vocab_size", "400", "--max_tokens_per_batch", "0"]
        more += ["--num_beams", "1", "--max_target_length", "64"]
    elif own:
        rows = [{"document": " ".join(words), "summary": " ".join(words[:4])} for words in sentences]
        more = ["--from_scratch", "tiny", "--vocab_size", "400", "--max_tokens_per_batch", "0"]
        more += ["--num_beams", "1", "--max_source_length", "64", "--max_target_length", "32"]
    elif recipe in ("mlm", "clm"):
        rows = [{"text": " ".join(words)} for words in sentences]
        more = ["--max_seq_length", "32"]
        more += ["--tokenizer_train", "bpe", "--vocab_size", "400", "--model_size", "tiny"] if recipe == "clm" else []
    else:
        (sample,) = (ROOT / "recipes" / recipe / "sample").glob("train.*")
        length = "--max_source_length" if recipe == "summarization" else "--max_seq_length"
        more = ["--max_train_samples", "40", "--max_eval_samples", "4", length, "128"]
        more += ["--validation_file", str(sample.with_stem("validation")), "--train_file", str(sample)]
        more += ["--doc_stride", "32"] * (recipe in ("ner", "qa")) + ["--max_question_length", "32"] * (recipe == "qa")
    if recipe in ("mlm", "clm", "translation") or own:
        for split, some in (("train", rows), ("validation", rows[:4])):
            more += [f"--{split}_file", write_jsonl(folder / f"{split}.jsonl", some)]
    if recipe not in ("clm", "translation") and not own:
        more += ["--model_name_or_path", tiny]
    more += ["--max_steps", "4", "--optim", "sgd", "--learning_rate", "0.05", "--precision", "fp32", "--dropout", "0"]
    return [*more, "--eval_strategy", "no", "--save_strategy", "no", "--logging_steps", "1", "--disable_tqdm", "true"]


@pytest.mark.parametrize(
    "recipe",
    [
        *("clm", "ner"),
        *(
            pytest.param(name, marks=pytest.mark.soak)
            for name in ("mlm", "qa", "sentiment", "summarization", "summarization-abstractive", "translation")
        ),
    ],
)
def test_in_every_recipe_accumulation_changes_nothing(recipe, tiny, tmp_path):
    main = importlib.import_module(training_module(recipe)).main
    pretrained = recipe not in ("clm", "translation") and "abstractive" not in recipe
    arms = {"plain": [], "freelb": ["--adversarial", "freelb", "--ema_decay", "0.5", "--label_smoothing_factor", "0.1"]}
    arms["freelb"] += ["--mixout", "0.3", "--l2_sp", "0.1"] if pretrained else []
    arms["r_drop"] = ["--r_drop", "1", "--dropout", "1e-9"]  # without dropout R-Drop is plain training
    pairs = [("plain", 8), ("r_drop", 4), ("freelb", 8), ("freelb", 4)]
    if recipe == "summarization":
        with pytest.raises(InputError, match="--r_drop: does not work with sentence scores"):
            main([*recipe_words(recipe, tiny, tmp_path), *arms["r_drop"]])
        pairs[1] = ("plain", 4)
    found = {}
    for arm, batch in pairs:
        cut = ["--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(8 // batch)]
        out = tmp_path / f"{arm}-{batch}"
        main([*recipe_words(recipe, tiny, tmp_path), *cut, "--output_dir", str(out), *arms[arm]])
        found[arm, batch] = load_file(out / "model.safetensors")
    assert farthest(found["plain", 8], found[pairs[1]]) < 1e-5
    assert farthest(found["freelb", 8], found["freelb", 4]) < 1e-5
    assert farthest(found["plain", 8], found["freelb", 8]) > 1e-4


@pytest.mark.parametrize("name", ["mixout", "l2_sp"])
def test_a_model_from_scratch_has_nothing_to_be_held_to(name, tiny, tmp_path):
    main = importlib.import_module("recipes.clm.train").main
    with pytest.raises(InputError, match=f"--{name}: needs trained pretrained weights"):
        main([*recipe_words("clm", tiny, tmp_path), "--output_dir", str(tmp_path / "out"), f"--{name}", "0.1"])
