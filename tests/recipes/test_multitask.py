"""Test training of several tasks: weights against their equations, rows of a step, shared weights, saved models."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from safetensors.torch import load_file
from torchjd.aggregation import PCGrad
from torchjd.scalarization import DWA, UW
from transformers import AutoModel, AutoModelForTokenClassification, pipeline, set_seed

from common.cli import parse
from common.errors import InputError
from common.training.draws import EpochRows
from common.training.tasks import TaskRows
from recipes.multitask import model, predict, report, single, steps, train
from recipes.multitask.arguments import BY_GRADIENTS, MultitaskDataArguments, SharingArguments
from recipes.multitask.reading import read_entries, read_tasks, texts_of, words_of
from recipes.multitask.sampling import SampledTasks, shares
from recipes.multitask.weighting import weighting_of, without_conflicts
from recipes.ner import predict as ner_predict
from tests.conftest import ROOT, read_jsonl, write_jsonl
from tests.faults import Job

SAMPLE = ROOT / "recipes" / "multitask" / "sample" / "tasks.yaml"
ROWS = {
    "sentiment": read_jsonl(ROOT / "recipes" / "sentiment" / "sample" / "train.jsonl"),
    "ner": read_jsonl(ROOT / "recipes" / "ner" / "sample" / "train.jsonl"),
}


def make_tasks(folder: Path, more: str = "") -> str:
    """Write the file of three small tasks: classification, tagging, and the texts of both."""
    lines = []
    for name, rows in ROWS.items():
        lines += [f"{name}_task:", f"  recipe: {name}", "  max_seq_length: 64"]
        for number, split in enumerate(("train", "validation", "test")):
            some = rows[100 * number : 100 * number + (24 if split == "train" else 8)]
            lines.append(f"  {split}_file: {write_jsonl(folder / f'{name}-{split}.jsonl', some)}")
    lines += ["texts:", "  recipe: mlm", "  max_seq_length: 64", "  texts_of: [sentiment_task, ner_task]", more]
    file = folder / "tasks.yaml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def few(folder: Path) -> list[str]:
    """Return arguments for `test_every_recipe.py`: three small tasks, and weights that are learned."""
    return ["--tasks", make_tasks(folder), "--weighting", "gradnorm"]


def words(tiny: str, folder: Path, *more: str) -> list[str]:
    """Return the arguments of four steps of 12 rows."""
    return [
        *("--tasks", make_tasks(folder), "--model_name_or_path", tiny, "--output_dir", str(folder / "out")),
        *("--precision", "fp32", "--use_cpu", "true", "--disable_tqdm", "true", "--max_steps", "4", "--overwrite"),
        *("--per_device_train_batch_size", "12", "--eval_strategy", "no", "--save_strategy", "no"),
        *("--logging_steps", "1", "--learning_rate", "1e-3", *more),
    ]


def make_trainer(
    tiny: str, folder: Path, *more: str, start: str = "--model_name_or_path", tasks: str | None = None
) -> steps.Trainer:
    """Return the trainer of all tasks, as `main` makes it."""
    argv = words(tiny, folder, *more)
    argv[argv.index("--model_name_or_path")] = start
    if tasks is not None:
        Path(folder, "tasks.yaml").write_text(tasks, encoding="utf-8")
    _, data_args, sharing, args = parse(train.ARGUMENTS, argv)
    set_seed(0)
    entries, tasks = read_tasks(data_args.tasks, train.ARGUMENTS, argv, args)
    tuned, together = model.combine({name: task.model() for name, task in tasks.items()}, sharing)
    trainers = {name: task.trainer(tuned[name]) for name, task in tasks.items()}
    return steps.Trainer(
        model=together,
        args=args,
        trainers=trainers,
        sharing=sharing,
        fixed=[entry.share for entry in entries],
        scores={name: task.score for name, task in tasks.items()},
        losses={name: one.losses["labels"] for name, one in trainers.items()},
    )


# Weights, against their equations


def test_pcgrad_gives_the_weights_of_torchjd(monkeypatch):
    random = np.random.default_rng(0)
    changed = 0
    for tasks in (2, 3, 4):
        for seed in range(20):
            gradients = random.normal(size=(tasks, 5))
            order = [np.random.default_rng([7, seed])]
            monkeypatch.setattr(torch, "randperm", lambda n, order=order: torch.from_numpy(order[0].permutation(n)))
            expected = PCGrad()(torch.from_numpy(gradients)).numpy()
            weights = without_conflicts(gradients @ gradients.T, np.random.default_rng([7, seed]))
            np.testing.assert_allclose(weights @ gradients, expected, atol=1e-12)
            changed += not np.allclose(weights, 1)
    assert changed > 20


def test_pcgrad_removes_the_part_along_the_other_gradient():
    gradients = np.array([[1.0, 0.0], [-1.0, 1.0]])
    weights = without_conflicts(gradients @ gradients.T, np.random.default_rng(0))
    first = gradients[0] - (gradients[0] @ gradients[1]) / 2 * gradients[1]
    second = gradients[1] - (gradients[0] @ gradients[1]) * gradients[0]
    np.testing.assert_allclose(weights @ gradients, first + second)


def test_dwa_gives_the_weights_of_torchjd():
    weighting = weighting_of(3, SharingArguments(weighting="dwa"), window=4)
    oracle, random = DWA(2.0), np.random.default_rng(0)
    for step in range(16):
        losses = random.uniform(0.5, 3, size=3)
        expected = oracle._compute_weights(torch.zeros(3, dtype=torch.float64)).numpy()
        np.testing.assert_allclose(weighting.weights(np.ones(3) / 3), expected, atol=1e-12)
        oracle(torch.from_numpy(losses))
        weighting.update(losses, losses)
        if step % 4 == 3:
            oracle.step()
    assert not np.allclose(expected, 1)


def test_uncertainty_learns_as_torchjd_with_adam():
    weighting = weighting_of(2, SharingArguments(weighting="uncertainty", weighting_learning_rate=0.1), 1)
    oracle = UW(2).double()
    optimizer = torch.optim.Adam(oracle.parameters(), lr=0.1)
    for step in range(30):
        losses = torch.tensor([4.0 / (step + 1), 0.1], dtype=torch.float64)
        weights = torch.tensor(weighting.weights(np.ones(2) / 2))
        optimizer.zero_grad()
        oracle(2 * losses).backward()  # theirs has a half before the loss, as for regression
        optimizer.step()
        assert torch.allclose(weights, torch.exp(-torch.tensor(weighting.values)))
        weighting.update(losses.numpy(), losses.numpy())
        np.testing.assert_allclose(weighting.values, oracle.log_var.detach().numpy(), atol=1e-6)
    assert weighting.weights(np.ones(2) / 2)[1] > 3


def test_gradnorm_descends_its_equation_on_a_toy_problem():
    """Two linear tasks on one shared matrix, one with a loss 100 times as large (Chen et al. 2018, section 4)."""
    args = SharingArguments(weighting="gradnorm", weighting_learning_rate=0.02, gradnorm_alpha=0.12)
    weighting = weighting_of(2, args, 1)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    targets = torch.randn(64, 3, generator=generator, dtype=torch.float64)
    oracle = torch.ones(2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([oracle], lr=0.02)
    first = None
    for _ in range(40):
        outputs = inputs @ matrix
        losses = torch.stack([((outputs - targets) ** 2).mean(), 100 * ((outputs + targets) ** 2).mean()])
        gradients = [torch.autograd.grad(loss, matrix, retain_graph=True)[0] for loss in losses]
        norms = torch.stack([gradient.norm() for gradient in gradients])
        first = losses.detach() if first is None else first
        # equations 1 and 2 of the paper, with autograd
        weighted = oracle * norms
        rates = (losses / first).detach()
        target = (weighted.mean() * (rates / rates.mean()) ** 0.12).detach()
        adam.zero_grad()
        (weighted - target).abs().sum().backward()
        adam.step()
        with torch.no_grad():
            oracle *= 2 / oracle.sum()
        used = torch.tensor(weighting.weights(np.ones(2) / 2))
        weighting.update(losses.detach().numpy(), norms.numpy())
        np.testing.assert_allclose(weighting.values, oracle.detach().numpy(), atol=1e-6)
        with torch.no_grad():
            matrix -= 1e-3 * (used[0] * gradients[0] + used[1] * gradients[1])
    assert weighting.values[0] > 1.4  # the task with small gradients


def test_equal_norms_makes_the_mean_norms_equal():
    weighting = weighting_of(3, SharingArguments(weighting="equal_norms"), 1)
    assert weighting.weights(np.ones(3) / 3).tolist() == [1, 1, 1]
    norms = np.array([[1.0, 8.0, 0.0], [3.0, 4.0, 0.0]])  # the third task has no gradient
    for row in norms:
        weighting.update(row, row)
    weights = weighting.weights(np.ones(3) / 3)
    np.testing.assert_allclose((weights * norms.mean(0))[:2], norms[:, :2].mean())
    assert weights[2] == 1
    weighting.update(norms[0], np.array([1e9, 1e9, 1e-3]))  # noise of a task without a loss is not blown up
    assert weighting.weights(np.ones(3) / 3)[2] == pytest.approx(100)


@pytest.mark.parametrize("name", ["sampling", "uncertainty", "dwa", "gradnorm", "equal_norms"])
def test_the_state_of_weights_survives_json(name):
    args, random = SharingArguments(weighting=name), np.random.default_rng(0)
    losses = random.uniform(0.1, 5, size=(11, 3))
    whole = weighting_of(3, args, 2)
    for row in losses:
        whole.update(row, row**2)
    parts = weighting_of(3, args, 2)
    for row in losses[:5]:
        parts.update(row, row**2)
    resumed = weighting_of(3, args, 2)
    resumed.load(json.loads(json.dumps(parts.state(), allow_nan=False)))
    for row in losses[5:]:
        resumed.update(row, row**2)
    assert resumed.weights(np.ones(3) / 3).tolist() == whole.weights(np.ones(3) / 3).tolist()


# Rows


def rows_of(sizes: tuple[int, ...]) -> TaskRows:
    found = {}
    for number, size in enumerate(sizes):
        ids = [[0] * (1 + (7 * i) % 11) for i in range(size)]
        found[f"task{number}"] = Dataset.from_dict({"input_ids": ids, "row": list(range(size))})
    return TaskRows(found)


def sampler(
    sizes=(90, 30, 9), step_rows=10, steps_of_run=26, fixed=(1, 1, 1), draws=(None,) * 3, **settings
) -> SampledTasks:
    cut = {"accumulation": 1, "processes": 1, "rank": 0} | {
        name: settings.pop(name) for name in ("accumulation", "processes", "rank") if name in settings
    }
    args = SharingArguments(**settings)
    cut |= {"seed": 0, "draws": draws}
    return SampledTasks(rows_of(sizes), step_rows, args, np.array(fixed), lambda _: steps_of_run, **cut)


def test_a_pass_has_the_new_rows_and_the_budget_of_old_ones():
    draws = EpochRows([np.arange(20), np.arange(20, 30)], [20, 4], seed=0)
    batches = sampler(draws=(None, draws, None), sampling="proportional")
    assert batches.sizes.tolist() == [90, 24, 9]
    assert batches.epoch_steps == 12
    stream = batches._stream(1, 0)
    for number in range(3):
        rows = np.array([next(stream) for _ in range(24)]) - 129 * number - 90
        assert sorted(rows.tolist()) == sorted(draws.rows(number).tolist())
    resumed, whole = batches._stream(1, 30), batches._stream(1, 0)
    assert [next(resumed) for _ in range(40)] == [next(whole) for _ in range(70)][30:]


def test_shares_follow_their_equations():
    sizes, fixed = np.array([100, 400]), np.array([3.0, 1.0])

    def share(**settings) -> list[float]:
        progress = settings.pop("progress", 0.0)
        return shares(sizes, SharingArguments(**settings), fixed, progress).round(6).tolist()

    assert share(sampling="proportional") == [0.2, 0.8]
    assert share(sampling="temperature") == [0.333333, 0.666667]
    assert share(sampling="temperature", sampling_temperature=1.0) == [0.2, 0.8]
    assert share(sampling="equal") == [0.5, 0.5]
    assert share(sampling="fixed") == [0.75, 0.25]
    assert share(sampling="annealed", sampling_temperature=1.0) == [0.2, 0.8]
    assert share(sampling="annealed", sampling_temperature=1.0, progress=0.5) == [0.333333, 0.666667]
    assert share(sampling="annealed", progress=1.0) == [0.5, 0.5]


@pytest.mark.parametrize("sampling", ["proportional", "temperature", "annealed", "equal"])
def test_mixed_steps_have_all_tasks_in_their_shares(sampling):
    batches = sampler(sampling=sampling, sampling_temperature=1.0)
    counts = np.concatenate([batches.counts(epoch) for epoch in range(2)])
    assert counts.shape == (26, 3)
    assert (counts >= 1).all()
    assert (counts.sum(1) == 10).all()
    expected = sum(1 + 7 * batches.share_at(step) for step in range(26))
    assert abs(counts.sum(0) - expected).max() < 2


def test_homogeneous_steps_have_one_task():
    batches = sampler(batches="homogeneous", sampling="fixed", fixed=(8, 1, 1))
    counts = np.concatenate([batches.counts(epoch) for epoch in range(40)])
    assert ((counts > 0).sum(1) == 1).all()
    assert counts[:, 0].sum() / counts.sum() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("how", ["mixed", "homogeneous"])
def test_rows_come_in_whole_passes_and_do_not_depend_on_the_cut(how):
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    whole = sampler(batches=how)
    parts = [sampler(batches=how, accumulation=2, processes=2, rank=rank) for rank in range(2)]
    for epoch in (0, 1, 2):
        for one in (whole, *parts):
            one.set_epoch(epoch)
        both = [list(one) for one in parts]
        assert len(whole.steps()) == len(whole) == len(both[0]) // 2
        for i, rows in enumerate(whole.steps()):
            assert sorted(rows) == sorted(row for rank in both for batch in rank[2 * i : 2 * i + 2] for row in batch)
            for row in rows:
                place = row % 129
                seen[int(np.searchsorted([90, 120], place, side="right"))].append(row)
    for rows in seen.values():  # no row of a pass comes twice
        assert len(set(rows)) == len(rows)
    fresh = sampler(batches=how)
    fresh.set_epoch(2)
    assert list(fresh) == list(whole)


def test_a_task_on_texts_learns_no_text_of_test_rows(tiny, tmp_path):
    argv = words(tiny, tmp_path)
    _, data_args, _, args = parse(train.ARGUMENTS, argv)
    tasks = read_tasks(data_args.tasks, train.ARGUMENTS, argv, args)[1]
    texts = tasks["texts"].data
    assert len(texts["train"]) == 48
    assert " ".join(ROWS["ner"][0]["tokens"]) in texts["train"]["text"]
    repeated = texts_of([tasks["ner_task"], tasks["ner_task"]])
    assert len(repeated["train"]) == 24
    others = copy.copy(tasks["ner_task"])
    others.data = DatasetDict({split: rows for split, rows in tasks["ner_task"].data.items() if split != "test"})
    others.data["train"] = concatenate_datasets([others.data["train"], tasks["ner_task"].data["test"]])
    found = texts_of([others, tasks["ner_task"]])
    assert "test" not in found  # the other task has no test rows
    assert len(found["train"]) == 24
    tasks["ner_task"].data["test"] = tasks["ner_task"].data["train"]
    with pytest.raises(InputError, match="texts_of: each train text is also a text of another split; give other rows"):
        texts_of([tasks["ner_task"]])


def test_a_task_cannot_have_the_texts_of_texts(tiny, tmp_path):
    text = "a: {recipe: mlm, texts_of: [c]}\nb: {recipe: mlm, texts_of: [a]}\nc: {recipe: ner}\n"
    with pytest.raises(InputError, match=r":2: task b: texts_of: a has the texts of other tasks itself; name those"):
        make_trainer(tiny, tmp_path, "--max_train_samples", "9", tasks=text)


def test_scores_of_tasks_are_checked(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    before = {name: {"eval": {"f1": 0.1, "accuracy": 0.2, "loss": 1.0, "perplexity": 9.0}} for name in trainer.trainers}
    trainer.scores = dict.fromkeys(before, "accuracy")
    report.check_scores(trainer, before)
    trainer.scores["ner_task"] = "F1"
    with pytest.raises(InputError, match="task ner_task: score: F1: the task has no such score; choose one of acc"):
        report.check_scores(trainer, before)
    trainer.scores |= {"ner_task": "f1", "texts": "perplexity"}
    with pytest.raises(InputError, match="task texts: score: perplexity: less of it is better; choose one of accuracy"):
        report.check_scores(trainer, before)


def test_a_list_of_values_stays_a_list_for_the_tasks():
    given = {"column_names": ["text", "label"], "csv_header": "false"}
    assert words_of(given) == ["--column_names", "text", "label", "--csv_header=false"]


# Steps


def test_the_models_share_the_encoder_alone(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    models = trainer.model.tasks
    for name in ("embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.weight"):
        assert len({id(one.get_parameter(f"bert.{name}")) for one in models.values()}) == 1
    assert models["texts"].get_output_embeddings().weight is models["ner_task"].get_input_embeddings().weight
    assert not any(name.startswith("pooler") for name in trainer.model.shared_names())
    own = make_trainer(tiny, tmp_path, "--sharing", "top:1").model
    last = [one.get_parameter("bert.encoder.layer.1.output.dense.weight") for one in own.tasks.values()]
    first = [one.get_parameter("bert.encoder.layer.0.output.dense.weight") for one in own.tasks.values()]
    assert (len({id(value) for value in last}), len({id(value) for value in first})) == (3, 1)
    with pytest.raises(InputError, match=r"--sharing top:2: the model has 2 layers; give top:1 or less"):
        make_trainer(tiny, tmp_path, "--sharing", "top:2")


@pytest.mark.parametrize("weighting", ["sampling", "pcgrad"])
def test_the_gradient_of_a_step_is_the_weighted_sum_of_the_tasks(tiny, tmp_path, weighting):
    trainer = make_trainer(tiny, tmp_path, "--weighting", weighting, "--max_grad_norm", "0")
    loader = trainer.get_train_dataloader()
    trainer.begin(4)
    trainer.forget_losses()
    trainer.step_losses = []
    (batch,), counts = trainer.get_batch_samples(iter(loader), 1, trainer.args.device)
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    parameters = dict(trainer.model.named_parameters())
    single, losses = {}, {}
    for name, one in trainer.trainers.items():
        trainer.model.train()
        inputs = {k: v.clone() for k, v in batch[steps.BATCHES][name].items()}
        losses[name] = one.compute_loss(one.model, inputs, False, counts[name])
        losses[name].backward()
        single[name] = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        trainer.model.zero_grad()
    weights = trainer.weighting.weights(trainer.share)
    assert weights.sum() == pytest.approx(3)
    trainer.training_step(trainer.model, batch, counts)
    shared, of_heads = weights, dict(zip(trainer.trainers, weights, strict=True))
    if weighting == "pcgrad":
        flat = torch.stack(
            [torch.cat([single[n][name].flatten() for name in sorted(trainer.shared)]) for n in trainer.trainers]
        ).numpy()
        order = np.random.default_rng([trainer.args.seed, 0])
        shared = without_conflicts(flat.astype(np.float64) @ flat.T, order)
    for name, value in parameters.items():
        parts = [(i, task) for i, task in enumerate(trainer.trainers) if name in single[task]]
        expected = sum((shared[i] if name in trainer.shared else of_heads[t]) * single[t][name] for i, t in parts)
        if parts:
            assert torch.allclose(value.grad, expected, atol=1e-6), name
    norms = trainer.norms[0] / trainer.norms[1]
    for i, name in enumerate(trainer.trainers):
        assert norms[i] == pytest.approx(torch.cat([g.flatten() for g in single[name].values()]).norm().item(), 1e-4)


def farthest(a: dict, b: dict) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize(
    "weighting",
    ["gradnorm", *(pytest.param(n, marks=pytest.mark.soak) for n in ("uncertainty", "dwa", "equal_norms", "pcgrad"))],
)
def test_accumulation_changes_nothing(tiny, tmp_path, weighting):
    results = []
    for rows, accumulation in ((12, 1), (3, 4)):
        more = ["--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(accumulation)]
        trainer = make_trainer(tiny, tmp_path, "--weighting", weighting, "--optim", "sgd", *more)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "weight_texts" in entry]
        results.append(({k: v.clone() for k, v in trainer.model.state_dict().items()}, log))
    (one, whole), (other, parts) = results
    assert farthest(one, other) < 1e-5
    assert len(whole) == 4
    for a, b in zip(whole, parts, strict=True):
        assert a.keys() == b.keys()
        for name in ("loss_texts", "weight_texts", "rows_texts", "tokens_ner_task", "grad_norm_ner_task"):
            assert b[name] == pytest.approx(a[name], rel=1e-3)


@pytest.mark.soak
def test_the_queries_of_a_step_see_all_its_passages(tiny, tmp_path):
    (tmp_path / "tasks.yaml").write_text("search: {recipe: matching}\nmood: {recipe: sentiment}\n")
    results = []
    for rows, accumulation in ((12, 1), (3, 4)):
        more = ["--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(accumulation)]
        more += ["--tasks", str(tmp_path / "tasks.yaml"), "--max_train_samples", "24", "--max_eval_samples", "8"]
        trainer = make_trainer(tiny, tmp_path, "--optim", "sgd", "--learning_rate", "0.01", *more)
        trainer.train()
        results.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    assert farthest(*results) < 1e-5


@pytest.mark.soak
@pytest.mark.parametrize("weighting", ["sampling", "uncertainty", "gradnorm", "equal_norms", "pcgrad"])
def test_two_processes_change_nothing(tiny, tmp_path, weighting):
    found = []
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        more = ["--weighting", weighting, "--optim", "sgd", "--per_device_train_batch_size", str(12 // processes)]
        Job(
            words(tiny, tmp_path / str(processes), *more), tmp_path / "log", processes=processes, main=train.main
        ).succeeds()
        found.append(tmp_path / str(processes) / "out")
    one, two = (load_file(folder / "model.safetensors") for folder in found)
    assert farthest(one, two) < 1e-5
    for name in ("weight_texts", "rows_texts", "grad_norm_texts"):
        logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in found]
        ours, theirs = ([entry[name] for entry in log if name in entry] for log in logs)
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.soak
@pytest.mark.parametrize("weighting", ["uncertainty", "dwa", "equal_norms", "pcgrad"])
@pytest.mark.parametrize("how", ["mixed", "homogeneous"])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path, weighting, how):
    if how == "homogeneous" and weighting in BY_GRADIENTS:
        return
    more = ["--weighting", weighting, "--batches", how, "--sampling", "annealed", "--max_steps", "24"]
    more += [
        "--save_strategy",
        "steps",
        "--save_steps",
        "7",
        "--save_total_limit",
        "5",
        "--per_device_train_batch_size",
        "4",
    ]
    whole = make_trainer(tiny, tmp_path, *more)
    whole.train()
    expected = {k: v.clone() for k, v in whole.model.state_dict().items()}
    again = make_trainer(tiny, tmp_path, *more)
    again.train(str(tmp_path / "out" / "checkpoint-14"))
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())
    assert again.weighting.state() == whole.weighting.state()
    assert again.seen == whole.seen


# Results


def test_a_run_saves_an_encoder_and_a_model_for_each_task(tiny, tmp_path, capsys):
    metrics = train.main(words(tiny, tmp_path))
    out = tmp_path / "out"
    assert {"test_mean", "test_worst", "test_ner_task_f1", "eval_texts_accuracy"} <= metrics.keys()
    shown = capsys.readouterr().out
    assert "rows seen" in shown
    assert (out / "tasks.png").is_file()
    encoder, tagger = AutoModel.from_pretrained(out), AutoModelForTokenClassification.from_pretrained(out / "ner_task")
    inside = dict(tagger.bert.named_parameters())
    assert all(torch.equal(value, inside[name]) for name, value in encoder.named_parameters() if name in inside)
    assert pipeline("text-classification", model=str(out / "sentiment_task"))("Fine.")[0]["label"] in (
        "positive", "negative",
    )  # fmt: skip
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "Ada met [MASK] in Rome."}, {"text": "Fine."}])
    target = tmp_path / "found.jsonl"
    predict.main(["--model", str(out), "--input", source, "--output", str(target)])
    rows = read_jsonl(target)
    assert rows[0].keys() == {"text", "sentiment_task", "ner_task", "texts"}
    assert len(rows[0]["texts"]["fills"]) == 1
    alone = tmp_path / "alone.jsonl"
    ner_predict.main(["--model", str(out / "ner_task"), "--input", source, "--output", str(alone)])
    assert [row["ner_task"]["entities"] for row in rows] == [row["entities"] for row in read_jsonl(alone)]
    with pytest.raises(InputError, match=r"--task tags: the model has no such task; give one of ner_task, sent"):
        predict.main(["--model", str(out), "--text", "Fine.", "--task", "tags"])


@pytest.mark.soak
@pytest.mark.parametrize("sharing", ["adapter", "top:1"])
def test_other_sharing_predicts_as_it_was_trained(tiny, tmp_path, sharing):
    train.main(words(tiny, tmp_path, "--sharing", sharing))
    out = tmp_path / "out"
    source = str(tmp_path / "ner-test.jsonl")
    ner_predict.main(["--model", str(out / "ner_task"), "--input", source, "--output", str(tmp_path / "found.jsonl")])
    predicted = [row["entities"] for row in read_jsonl(tmp_path / "found.jsonl")]
    gold = [row["predicted_tags"] for row in read_jsonl(out / "ner_task" / "predictions_test.jsonl")]
    assert [sum(tag.startswith("B-") for tag in tags) for tags in gold] == [len(found) for found in predicted]
    assert AutoModel.from_pretrained(out).config.num_hidden_layers == (1 if sharing == "top:1" else 2)
    assert (out / "ner_task" / "adapter").is_dir() == (sharing == "adapter")
    assert not (out / "adapter").exists()


@pytest.mark.soak
def test_a_task_may_add_tokens(tiny, tmp_path):
    tasks = tmp_path / "three.yaml"
    links = "mood: {recipe: sentiment}\nlinks: {recipe: relation}\n"
    tasks.write_text(f"{links}texts: {{recipe: mlm, texts_of: links, max_seq_length: 64}}\n")
    few_rows = [f"--max_{split}_samples={rows}" for split, rows in (("train", 24), ("eval", 8), ("predict", 8))]
    train.main(words(tiny, tmp_path, "--tasks", str(tasks), *few_rows))
    out = tmp_path / "out"
    sizes = {
        name: load_file(out / name / "model.safetensors")["bert.embeddings.word_embeddings.weight"].shape
        for name in ("mood", "links", "texts")
    }
    assert len(set(sizes.values())) == 1
    assert AutoModel.from_pretrained(out).config.vocab_size == sizes["mood"][0]
    source = str(ROOT / "recipes" / "relation" / "sample" / "test.jsonl")
    predict.main(["--model", str(out), "--input", source, "--output", str(tmp_path / "found.jsonl")])
    assert "predicted" in read_jsonl(tmp_path / "found.jsonl")[0]["links"]
    tasks.write_text(f"{links}more: {{recipe: relation}}\n")
    with pytest.raises(InputError, match="tasks links and more: both add tokens, such as markers; train one of them"):
        train.main(words(tiny, tmp_path, "--tasks", str(tasks), *few_rows))


@pytest.mark.soak
def test_single_runs_are_compared_and_taken_again(tiny, tmp_path, capsys):
    more = ["--compare_single", "true", "--eval_strategy", "epoch"]
    metrics = train.main(words(tiny, tmp_path, *more))
    assert {"alone_updates_ner_task_f1", "alone_minutes_texts_accuracy"} <= metrics.keys()
    first = capsys.readouterr().out
    assert "ner_task alone, same updates: 4 steps of" in first
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["single"]["ner_task"][single.UPDATES].keys() >= {"alone", "gain", "low", "high", "verdict"}
    train.main(words(tiny, tmp_path, *more))
    assert "alone, same updates: 4 steps of" not in capsys.readouterr().out


def test_the_gain_over_a_single_run_has_an_interval(tmp_path):
    rows = [{"id": str(i), "label": "ab"[i % 2], "predicted": "ab"[i % 2]} for i in range(60)]
    worse = [row | {"predicted": "a"} for row in rows]
    for name, some in (("ours", rows), ("theirs", worse), ("fewer", rows[:5])):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "predictions_test.jsonl", some)
    effect = single.effect_of("sentiment", "accuracy", tmp_path / "ours", tmp_path / "theirs")
    assert effect.mean == pytest.approx(0.5)
    assert 0.3 < effect.low < 0.5 < effect.high < 0.7
    assert single.verdict(effect.mean, effect) == "the other tasks help: +0.5000"
    same = single.effect_of("sentiment", "accuracy", tmp_path / "ours", tmp_path / "ours")
    assert single.verdict(same.mean, same) == "no sure difference: +0.0000"
    assert single.effect_of("sentiment", "accuracy", tmp_path / "ours", tmp_path / "fewer") is None
    assert single.effect_of("mlm", "accuracy", tmp_path / "ours", tmp_path / "theirs") is None
    assert single.verdict(-0.1, None) == "lower together, without an interval"


def test_a_task_is_scored_and_sampled_by_domain(tiny, tmp_path, capsys):
    tasks = Path(make_tasks(tmp_path)).read_text(encoding="utf-8")
    tasks = tasks.replace("  recipe: sentiment\n", "  recipe: sentiment\n  domain_column: domain\n")
    trainer = make_trainer(tiny, tmp_path, "--domain_temperature", "100", tasks=tasks)
    domains = {row["domain"] for row in ROWS["sentiment"][:24]}
    assert len(trainer.draws[0].counts) == len(domains) > 1
    assert max(trainer.draws[0].counts) - min(trainer.draws[0].counts) <= 1
    assert trainer.draws[1:] == [None, None]
    metrics = trainer.evaluate()
    named = {f"eval_sentiment_task_{name}_macro_f1" for name in ("mean_domain", "worst_domain")}
    assert named <= metrics.keys()
    scores = {name.removeprefix("eval_sentiment_task_"): metrics[name] for name in metrics if "sentiment" in name}
    report.print_scores({"mood": {"eval": scores}}, {"mood": {"eval": scores}}, {"mood": "macro_f1"})
    assert "mean of the domains" in capsys.readouterr().out
    with pytest.raises(InputError, match="--domain_temperature: no task has domains; write domain_column below one in"):
        make_trainer(tiny, tmp_path, "--domain_temperature", "100")


# Bad input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {recipe: ner}\nb: {recipe: mlm}\na: {recipe: qa}", r":3: task a is also in line 1; rename one"),
        ("a: {recipe: ner}\nb: {recipe: nerd}", r":2: task b: no such recipe here: nerd; did you mean ner\?"),
        ("a: {recipe: ner}\nb: {}", r":2: task b: names no recipe; give `recipe:` one of matching, mlm, ner"),
        ("a: {recipe: ner}\nb:", r":2: task b: has no settings; write `recipe: FOLDER` below it"),
        ("a: {recipe: ner}", r"names 1 task; name two or more, or train it by its own recipe"),
        ("- a", r"names no tasks; write a block for each"),
        ("a: {recipe: ner, share: 0}\nb: {recipe: qa, share: 0}", r"the shares of the tasks sum to 0; give a positive"),
        ("a: {recipe: ner, share: 0}\nb: {recipe: qa}", r":1: task a: share 0 trains it never; remove it, or raise"),
        ("a: {recipe: ner, share: x}\nb: {recipe: qa}", r":1: task a: share: x is no number of at least 0; correct it"),
        ("a:\n  recipe: ner\n  train_fil: x\nb: {recipe: qa}", r":3: task a: train_fil: .* did you mean train_file\?"),
        ("a: {recipe: ner, learning_rate: 1}\nb: {recipe: qa}", r"set for the whole run; give --learning_rate on the"),
        ("a: {recipe: ner, semi: pseudo}\nb: {recipe: qa}", r"semi: does not work beside other tasks; remove it"),
        ("a: {recipe: mlm, texts_of: c}\nb: {recipe: qa}", r":1: task a: texts_of: c is no other task; name one of"),
        ("a: {recipe: mlm, texts_of: b, max_train_samples: 9}\nb: {recipe: qa}", r":1: task a: texts_of and max_train"),
        ("mean: {recipe: mlm}\nb: {recipe: qa}", r":1: 'mean' cannot name a task; choose another name, of letters"),
        ("pop: {recipe: mlm}\nb: {recipe: qa}", r":1: 'pop' cannot name a task"),
        ("a: [", r":1: not YAML: "),
    ],
)
def test_a_bad_file_of_tasks_is_refused(tmp_path, text, message):
    file = tmp_path / "tasks.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_entries(str(file))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("train_file: /no/file.jsonl", r"task a: --train_file /no/file\.jsonl: no such file"),
        ("text_column_name: words", r"task a: .*train\.jsonl:1: no column words; columns here: id, tokens"),
        ("validation_file: OTHER", r"task a: validation_file: none of its labels \(B-X\) is in the training rows \(B-"),
        ("skip_bad_rows: 1000", r"task a: .*bad\.jsonl:1: 1 tokens but 2 tags; needed"),
    ],
)
def test_a_bad_task_is_named_with_its_line(tmp_path, settings, message):
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"tokens": ["a"], "ner_tags": ["O", "O"]}] * 4)
    other = write_jsonl(tmp_path / "other.jsonl", [{"tokens": ["a"], "ner_tags": ["B-X"]}] * 4)
    train_file = bad if "skip" in settings else ROOT / "recipes" / "ner" / "sample" / "train.jsonl"
    files = "" if "train" in settings else f"  train_file: {train_file}\n"
    settings = settings.replace("OTHER", other)
    (tmp_path / "tasks.yaml").write_text(f"a:\n  recipe: ner\n  {settings}\n{files}b: {{recipe: mlm, texts_of: a}}\n")
    argv = ["--tasks", str(tmp_path / "tasks.yaml"), "--output_dir", str(tmp_path / "out")]
    _, data_args, _, args = parse(train.ARGUMENTS, argv)
    with pytest.raises(InputError, match=message) as caught:
        read_tasks(data_args.tasks, train.ARGUMENTS, argv, args)
    assert str(caught.value).startswith(f"{tmp_path}/tasks.yaml:1: task a: ")


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    for arguments, message in (
        ({"sharing": "half"}, "--sharing half: must be full, adapter or top:k"),
        ({"weighting": "pcgrad", "batches": "homogeneous"}, "--weighting pcgrad: needs all tasks in each step"),
        ({"sampling_temperature": 0.0}, "--sampling_temperature 0.0: must be above 0"),
    ):
        with pytest.raises(InputError, match=message):
            SharingArguments(**arguments)
    with pytest.raises(InputError, match="--train_file: belongs to one task; write it into the file of --tasks"):
        MultitaskDataArguments(train_file="x")
    assert set(MultitaskDataArguments().files().values()) > {str(SAMPLE), "recipes/ner/sample/train.jsonl"}
