"""Test several tasks after an earlier run: where each starts, and how EWC, LwF and replay keep what it learned."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.args import FISHER
from common.errors import InputError
from common.training import continual
from common.training.continual import cross_entropies
from common.training.draws import of_windows
from common.training.language_model import LanguageTrainer
from recipes.multitask import train
from recipes.multitask.earlier import check_shared, start_of
from tests.conftest import write_jsonl
from tests.faults import Job, difference
from tests.recipes.test_multitask import ROWS, make_tasks, make_trainer, words

#: rows whose gradients give the importance of a weight
FISHER_ROWS = 6
OLD_TASKS = {"sentiment_task": "sentiment", "ner_task": "ner", "texts": "mlm"}


@pytest.fixture(scope="module")
def before(tiny, tmp_path_factory) -> Path:
    """Return the folder of an earlier run with the importance of its weights."""
    folder = tmp_path_factory.mktemp("before")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual, "FISHER_ROWS", FISHER_ROWS)
        train.main(words(tiny, folder, "--save_fisher", "true", "--max_steps", "1"))
    return folder / "out"


def after(before: Path, folder: Path, *more: str) -> list[str]:
    """Return the arguments of a run after `before`."""
    given = words(str(before), folder, *more)
    given[given.index("--model_name_or_path")] = "--after"
    return given


def trainer_after(before: Path, folder: Path, *more: str, tasks: str | None = None):
    """Return the trainer of a run after `before`."""
    return make_trainer(str(before), folder, *more, start="--after", tasks=tasks)


def batch_of(trainer):
    """Return the batches of the first step, and the number of their labels."""
    loader = trainer.get_train_dataloader()
    trainer.forget_losses()
    trainer.begin(4)
    trainer.step_losses = []
    batches, counts = trainer.get_batch_samples(iter(loader), 1, torch.device("cpu"))
    trainer.model.train()
    return batches[0], counts


def test_the_importance_of_shared_weights_is_the_sum_over_the_tasks(before, tmp_path, monkeypatch):
    monkeypatch.setattr(continual, "FISHER_ROWS", FISHER_ROWS)
    trainer = trainer_after(before, tmp_path, "--keep", "ewc")
    saved = {name: load_file(before / name / FISHER) for name in trainer.trainers}
    encoder = load_file(before / FISHER)
    tagger = "bert.encoder.layer.0.output.dense.weight"
    each = [one.importance()[tagger] for one in make_trainer(str(before), tmp_path, start="--after").trainers.values()]
    for importance in saved.values():
        assert torch.allclose(importance[tagger], torch.stack(each).sum(0), rtol=1e-4, atol=1e-12)
        assert torch.equal(importance[tagger], encoder[tagger.removeprefix("bert.")])
    pull = trainer.fisher_pull
    names = dict(trainer.model.named_parameters())
    assert torch.equal(pull.importance[f"tasks.sentiment_task.{tagger}"], encoder[tagger.removeprefix("bert.")])
    heads = {name for name in pull.pairs if "classifier" in name}
    assert heads == {
        f"tasks.{task}.classifier.{part}" for task in OLD_TASKS if task != "texts" for part in ("weight", "bias")
    }
    assert torch.equal(pull.importance["tasks.ner_task.classifier.weight"], saved["ner_task"]["classifier.weight"])
    name = f"tasks.sentiment_task.{tagger}"
    batch, counts = batch_of(trainer)
    with torch.no_grad():
        names[name].add_(0.1)
    trainer.training_step(trainer.model, batch, counts)
    pulled = names[name].grad.clone()
    trainer.fisher_pull = None
    trainer.model.zero_grad()
    batch, counts = batch_of(trainer)
    trainer.training_step(trainer.model, batch, counts)
    wanted = 10_000 * pull.importance[name] * 0.1
    assert torch.allclose(pulled - names[name].grad, wanted, rtol=1e-2, atol=1e-5)


def test_a_new_task_starts_from_the_encoder_and_its_head_is_not_pulled(before, tmp_path, capsys):
    make_tasks(tmp_path)
    tasks = Path(tmp_path, "tasks.yaml")
    tasks.write_text(tasks.read_text().replace("sentiment_task", "mood"))
    trainer = trainer_after(before, tmp_path, "--keep", "ewc", tasks=tasks.read_text())
    assert "mood: not among the tasks of" in capsys.readouterr().out
    mood, tagger = (trainer.trainers[name].tuned.new_parameters for name in ("mood", "ner_task"))
    assert "classifier.weight" in mood
    assert not tagger
    saved = load_file(before / "model.safetensors")
    assert torch.equal(
        trainer.model.get_parameter("tasks.mood.bert.encoder.layer.0.output.dense.weight"),
        saved["encoder.layer.0.output.dense.weight"],
    )
    assert "tasks.mood.bert.encoder.layer.0.output.dense.weight" in trainer.fisher_pull.pairs
    assert "tasks.mood.classifier.weight" not in trainer.fisher_pull.pairs
    assert "tasks.ner_task.classifier.weight" in trainer.fisher_pull.pairs


def test_each_task_learns_its_old_outputs(before, tmp_path):
    trainer = trainer_after(before, tmp_path, "--keep", "lwf", "--keep_strength", "0.5")
    batch, counts = batch_of(trainer)
    for name, one in trainer.trainers.items():
        assert one.old_task.with_old_head is None
        rows = dict(batch["batches"][name])
        with torch.no_grad():
            loss = trainer_loss(trainer, name, rows, counts)
            old, one.old_task = one.old_task, None
            plain = trainer_loss(trainer, name, rows, counts)
            one.old_task = old
        if not isinstance(one, LanguageTrainer):
            labels = rows.pop("labels")
            logits = trainer.model.tasks[name](**rows).logits[labels != -100]
            entropy = cross_entropies(logits, logits, 2.0).mean()
            assert (loss - plain).item() == pytest.approx(0.5 * entropy.item(), rel=1e-3)
        assert loss > plain
    before_step = {
        name: value.clone() for name, value in trainer.trainers["ner_task"].old_task.old.state_dict().items()
    }
    trainer.train()
    after_run = trainer.trainers["ner_task"].old_task.old.state_dict()
    assert all(torch.equal(value, after_run[name]) for name, value in before_step.items())


def trainer_loss(trainer, name, rows, counts):
    return trainer.trainers[name].compute_loss(
        lambda **inputs: trainer.model(name, **inputs), dict(rows), num_items_in_batch=counts[name]
    )


def with_replay(folder: Path) -> str:
    """Return the tasks of `make_tasks`, with old rows of the tagging task."""
    text = Path(make_tasks(folder)).read_text(encoding="utf-8")
    old = write_jsonl(folder / "old.jsonl", ROWS["ner"][300:320])
    return text.replace("  recipe: ner\n", f"  recipe: ner\n  replay_file: {old}\n")


def test_a_pass_over_a_task_has_some_of_its_old_rows(before, tmp_path):
    trainer = trainer_after(before, tmp_path, "--keep", "replay", "--replay_rows", "5", tasks=with_replay(tmp_path))
    rows = trainer.trainers["ner_task"].train_dataset
    old = sum(of_windows(rows, "old"))
    assert old >= 20
    batches = trainer.make_batches(trainer.train_dataset)
    assert batches.sizes.tolist() == [24, len(rows) - old + 5, len(trainer.train_dataset.datasets["texts"])]
    assert [draws is None for draws in trainer.draws] == [True, False, True]
    trainer.train()
    assert trainer.seen["ner_task"][0] > 0


@pytest.mark.soak
@pytest.mark.parametrize("method", ["ewc", "lwf", "replay"])
def test_a_killed_run_resumes_exactly_and_two_processes_change_nothing(before, tmp_path, method):
    given = after(before, tmp_path, "--keep", method, "--max_steps", "6", "--save_fisher", "true")
    if method == "replay":
        Path(tmp_path, "tasks.yaml").write_text(with_replay(tmp_path), encoding="utf-8")
    given += ["--save_strategy", "steps", "--save_steps", "2", "--save_min_seconds", "0"]

    def run(name: str, *more: str, **settings) -> Job:
        out = ["--output_dir", str(tmp_path / name)]
        return Job([*given, *out, *more], tmp_path / "log", main=train.main, **settings)

    run("whole").succeeds()
    run("out", kill_at=5).ends()
    run("out", "--resume_from_checkpoint", "true").succeeds()
    assert difference(tmp_path / "whole", tmp_path / "out") == 0
    run("two", "--per_device_train_batch_size", "6", "--optim", "sgd", processes=2).succeeds()
    run("one", "--optim", "sgd").succeeds()
    for file in ("model.safetensors", FISHER, f"ner_task/{FISHER}"):
        whole, resumed, one, two = (load_file(tmp_path / n / file) for n in ("whole", "out", "one", "two"))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), file
        assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4, file


# Bad input


def test_a_task_starts_from_its_own_folder_or_from_the_encoder(before):
    own = ["--after", str(before / "ner_task")]
    given = {"after": str(before), "keep": "lwf", "keep_strength": "2"}
    assert start_of("ner_task", "ner", False, given) == [*own, "--keep", "lwf", "--keep_strength", "2"]
    assert start_of("persons", "ner", False, given) == ["--after", str(before)]
    assert start_of("ner_task", "sentiment", False, given) == ["--after", str(before)]
    assert start_of("ner_task", "ner", False, given | {"keep": "ewc"}) == own
    assert start_of("ner_task", "ner", True, {"after": str(before), "keep": "replay", "replay_rows": "9"}) == [
        *own, "--keep", "replay", "--replay_rows", "9",
    ]  # fmt: skip
    single = {"after": str(before / "ner_task"), "keep": "lwf"}
    assert start_of("mood", "sentiment", False, single) == ["--after", str(before / "ner_task"), "--keep", "lwf"]
    assert start_of("mood", "sentiment", False, {}) == []


def test_arguments_that_keep_nothing_are_errors(before, tmp_path):
    def tried(*more: str, tasks: str | None = None, folder: Path = before) -> None:
        make_tasks(tmp_path)
        trainer_after(folder, tmp_path, *more, tasks=tasks)

    for more, tasks, message in (
        (("--keep", "replay"), None, "--keep replay: needs old rows; write a replay_file below a task in the file of"),
        (("--keep", "ewc"), with_replay(tmp_path), "task ner_task: replay_file: needs --keep replay; add it, or leave"),
        (
            ("--keep", "lwf"),
            "a: {recipe: ner}\nb: {recipe: sentiment}",
            "--keep lwf: no task here has the name and the",
        ),
    ):
        with pytest.raises(InputError, match=message):
            tried(*more, tasks=tasks)
    with pytest.raises(InputError, match="--save_fisher: --sharing adapter is not merged into the weights; leave it"):
        train.main(words(str(before), tmp_path, "--sharing", "adapter", "--save_fisher", "true"))
    trainer = trainer_after(before, tmp_path, "--keep", "ewc")
    models = {name: one.tuned for name, one in trainer.trainers.items()}
    check_shared(models, 0)
    models["texts"].model.bert.encoder.layer[1].output.dense.weight = torch.nn.Parameter(torch.ones(64, 128))
    with pytest.raises(
        InputError, match=r"task texts: encoder\.layer\.1.output\.dense\.weight differs from that of senti"
    ):
        check_shared(models, 0)
