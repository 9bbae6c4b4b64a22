"""Test `make sweep`: pruned, shared and resumed trials, the check of the space, and the configuration of the winner."""

import json
import signal
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from transformers import TrainerState, TrainingArguments

from common.cli import given_values, parse
from common.errors import InputError
from common.tools import sweep
from recipes.ner import train
from tests.conftest import ROOT
from tests.faults import Job, make_files, words


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def command(files, tmp_path) -> list[str]:
    """Return a sweep of NER runs with 18 steps and 9 evaluations, decided by the validation loss."""
    (tmp_path / "space.yaml").write_text("learning_rate: {choices: [1e-2, 1e-9], first: 1e-2}\n")
    own = words(files, tmp_path, optim="sgd", metric_for_best_model="loss")
    for name in ("--output_dir", "--learning_rate"):
        del own[own.index(name) : own.index(name) + 2]
    places = ["--space", str(tmp_path / "space.yaml"), "--folder", str(tmp_path / "sweep")]
    return ["ner", *places, "--unpruned", "1", *own]


def study_in(folder: Path) -> optuna.Study:
    return optuna.load_study(
        study_name="ner", storage=JournalStorage(JournalFileBackend(str(folder / "sweep" / "journal.log")))
    )


def test_a_worse_trial_is_pruned_and_the_winner_is_a_configuration(command, tmp_path, capsys, monkeypatch):
    first = sweep.main([*command, "--trials", "1"]).trials[0]
    assert first.params == {"learning_rate": "1e-2"}
    assert sorted(first.intermediate_values) == list(range(1, 10))
    assert first.value == min(first.intermediate_values.values()) < first.intermediate_values[1]
    assert not list((tmp_path / "sweep").rglob("*.safetensors"))
    assert not list((tmp_path / "sweep" / "trial-0").glob("test_results.json"))  # a sweep does not use the test rows
    study_in(tmp_path).enqueue_trial({"learning_rate": "1e-9"})  # as another machine might do
    second = sweep.main([*command, "--trials", "2"]).trials[1]
    assert second.state == TrialState.PRUNED
    assert len(second.intermediate_values) < 9
    printed = capsys.readouterr()
    told = printed.out
    assert "were made with other" not in printed.err
    assert f"1 of 2: trial 0: learning_rate 1e-2: {first.value:.4f} (best {first.value:.4f}, trial 0)" not in told
    assert f"1 of 1: trial 0: learning_rate 1e-2: {first.value:.4f} (best {first.value:.4f}, trial 0)" in told
    assert f"pruned after evaluation {second.last_step} (best {first.value:.4f}, trial 0)" in told
    best = tmp_path / "sweep" / "best.yaml"
    args = parse(train.ARGUMENTS, ["--config", str(best), "--output_dir", str(tmp_path / "best")])[-1]
    assert args.learning_rate == 1e-2
    assert args.optim == "sgd"
    train.main(["--config", str(best), "--output_dir", str(tmp_path / "best")])
    assert json.loads((tmp_path / "best" / "trainer_state.json").read_text())["best_metric"] == first.value
    monkeypatch.setattr("common.run.fingerprint.recipe_folder", lambda arguments: ROOT / "tests" / "bad_inputs")
    sweep.main([*command, "--trials", "2"])
    assert "2 of 2 trials were made with other code; the sweep continues" in capsys.readouterr().err
    sweep.forget(study_in(tmp_path)._storage, "ner", tmp_path / "sweep")
    assert not (tmp_path / "sweep" / "trial-0").exists()
    with pytest.raises(KeyError):
        study_in(tmp_path)


@pytest.mark.soak
def test_a_sweep_that_was_killed_goes_on_in_the_middle_of_its_trial(command, tmp_path):
    sweep.main([*command, "--trials", "1", "--folder", str(tmp_path / "whole")])
    whole = JournalStorage(JournalFileBackend(str(tmp_path / "whole" / "journal.log")))
    whole = optuna.load_study(study_name="ner", storage=whole).trials[0]
    command += ["--trials", "1"]
    assert Job(command, tmp_path / "log", kill_at=9, main=sweep.main).ends() == [-signal.SIGKILL]
    assert [trial.state for trial in study_in(tmp_path).trials] == [TrialState.RUNNING]
    assert Job(command, tmp_path / "log", kill_at=13, by=signal.SIGTERM, main=sweep.main).ends() == [143]
    again = Job(command, tmp_path / "log", main=sweep.main)
    again.succeeds()
    assert again.steps[0] > 12  # the signal ends the current step or the next
    assert again.steps[-1] == 18
    killed, stopped, trial = study_in(tmp_path).trials
    assert (killed.state, stopped.state, trial.state) == (TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE)
    assert trial.params == whole.params
    assert trial.value == whole.value
    assert trial.intermediate_values == whole.intermediate_values
    assert (tmp_path / "sweep" / "best.yaml").is_file()
    again = Job(command, tmp_path / "log", main=sweep.main)  # all trials are done
    again.succeeds()
    assert again.steps == []


def test_a_trial_that_cannot_end_is_counted_and_left_out(command, tmp_path):
    (tmp_path / "space.yaml").write_text("learning_rate: {choices: [1e30], first: 1e30}\n")
    with pytest.raises(InputError, match="no trial is complete"):
        sweep.main([*command, "--trials", "1"])
    (trial,) = study_in(tmp_path).trials
    assert trial.state == TrialState.FAIL
    assert "not a finite number" in trial.user_attrs["failed"]


def test_a_trial_whose_scores_are_no_numbers_is_counted_and_left_out(command, tmp_path):
    (tmp_path / "space.yaml").write_text("learning_rate: {choices: [1e30], first: 1e30}\n")
    with pytest.raises(InputError, match="no trial is complete"):
        sweep.main([*command, "--trials", "1", "--max_steps", "1"])
    (trial,) = study_in(tmp_path).trials
    assert trial.user_attrs["failed"] == "no evaluation has a score that is a number"


def test_evaluations_of_single_tasks_are_not_reported():
    trial = optuna.create_study().ask()
    report = sweep.Report(trial, {})
    args, state = TrainingArguments(metric_for_best_model="mean"), TrainerState(log_history=[])
    report.on_evaluate(args, state, None, {"eval_ner_f1": 0.9})
    assert report.scores == {}
    state.log_history.append({"eval_mean": 0.5})
    report.on_evaluate(args, state, None, {"eval_mean": 0.5})
    assert report.scores == {1: 0.5}


def test_the_configuration_has_names_of_any_script(tmp_path):
    sweep.write_config(tmp_path / "best.yaml", {"output_dir": "o/😀é", "seed": 3}, "trial 0")
    args = parse(train.ARGUMENTS, ["--config", str(tmp_path / "best.yaml")])[-1]
    assert (args.output_dir, args.seed) == ("o/😀é", 3)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("lerning_rate: {low: 1e-5, high: 1e-3}", "lerning_rate: unknown argument --lerning_rate.*learning_rate"),
        ("learning_rate: {low: 1e-3, high: 1e-5}", "learning_rate: low must be below high"),
        ("learning_rate: {low: 0.0, high: 1e-5, log: true}", "above 0 if log is true"),
        ("learning_rate: {low: a, high: b}", "low and high must be numbers, not a"),
        ("learning_rate: {lowest: 1, high: 2}", "give low and high, or choices"),
        ("optim: {choices: sgd}", "choices must be a list"),
        ("optim: {choices: [sgd], first: adamw}", "first must lie in the space"),
        ("per_device_train_batch_size: {low: 0.5, high: 2.5}", "per_device_train_batch_size: .*invalid int value"),
        ("mixout: {low: 0.5, high: 1.5}", "--mixout 1.5: must be at least 0 and below 1"),
        ("seed: {low: 1, high: 3}", "seed: is in the space and also given as --seed"),
        ("", "write a line for each argument"),
    ],
)
def test_a_space_that_does_not_fit_is_told(tmp_path, space, message):
    (tmp_path / "space.yaml").write_text(space)
    command = ["ner", "--space", str(tmp_path / "space.yaml"), "--folder", str(tmp_path / "sweep")]
    with pytest.raises(InputError, match=message):
        sweep.main([*command, "--seed", "1"])
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval_strategy", "no"], "--eval_strategy no: a sweep needs evaluations"),
        (["--output_dir", "out"], "--output_dir: is set by the sweep"),
        (["--hub_token", "secret"], "--hub_token: would be written into the results"),
        (["--semi", "pseudo", "--unlabeled_file", "pyproject.toml"], "--semi pseudo: a sweep would score the training"),
    ],
)
def test_what_a_sweep_cannot_take_is_told(words, message):
    with pytest.raises(InputError, match=message):
        sweep.main(["ner", *words])


@pytest.mark.parametrize("recipe", sorted(path.parent.name for path in (ROOT / "recipes").glob("*/train.py")))
def test_each_recipe_has_a_space_that_fits(recipe):
    module = __import__(f"recipes.{recipe}.train", fromlist=["ARGUMENTS"])
    space = sweep.read_space(
        ROOT / "recipes" / recipe / "sweep.yaml", lambda name, value: parse(module.ARGUMENTS, [f"--{name}={value}"])
    )
    assert "learning_rate" in space
    assert all("first" in about for about in space.values())


def test_what_was_given_is_kept_as_it_was_written(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 2e-5\nlora_target_modules: [query, key]\nseed: 3\n")
    found = given_values(train.ARGUMENTS, ["--config", str(tmp_path / "a.yaml"), "--seed=4", "--overwrite"])
    assert found == {
        "learning_rate": "2e-5", "lora_target_modules": ["query", "key"], "seed": "4", "overwrite": "true"
    }  # fmt: skip
