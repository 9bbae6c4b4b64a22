"""Test that a model that cannot be saved is refused before training, and that a failure after training leaves it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from common.errors import InputError, RunStopped
from common.training import checkpoints
from recipes.ner import predict, train
from tests.conftest import read_jsonl


@pytest.mark.parametrize("tuning", ["lora", "prompt"])
def test_a_failure_after_training_leaves_a_model_that_predicts(tuning, arguments, small, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no scores today")

    monkeypatch.setattr(train.scoring, "print_scores", fail)
    words = [*arguments, "--tuning", tuning, "--save_strategy", "no", "--load_best_model_at_end", "false"]
    with pytest.raises(RunStopped, match="after training: ValueError: no scores today") as stopped:
        train.main([*words, "--num_train_epochs", "1"])
    assert stopped.value.code == RunStopped.AFTER_TRAINING
    folder = tmp_path / "out"
    command = f"make predict RECIPE=ner MODEL={folder} INPUT={small['test']} OUTPUT={folder}-predicted.jsonl"
    assert f"{folder}: the trained model is saved here; use it: {command}" in str(stopped.value)
    assert "resume" not in str(stopped.value)  # no checkpoint
    assert "no scores today" in capsys.readouterr().err  # the traceback
    predict.main(["--model", str(folder), "--input", small["test"], "--output", str(tmp_path / "tags.jsonl")])
    assert len(read_jsonl(tmp_path / "tags.jsonl")) == 20
    assert json.loads((folder / "run.json").read_text())["finished"] is None


def test_resuming_repeats_only_the_part_that_failed(arguments, tmp_path, monkeypatch):
    monkeypatch.delattr(train.scoring, "compare")
    with pytest.raises(RunStopped, match="with --resume_from_checkpoint true"):
        train.main(arguments)
    monkeypatch.undo()
    newest = checkpoints.newest_whole(tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    train.main([*arguments, "--resume_from_checkpoint", "true"])
    assert checkpoints.newest_whole(tmp_path / "out") == newest
    assert all(torch.equal(weights[n], w) for n, w in load_file(tmp_path / "out" / "model.safetensors").items())


def test_a_failure_before_the_end_of_training_passes_unchanged(arguments, monkeypatch):
    monkeypatch.delattr(train.scoring, "StrictSeqeval")
    with pytest.raises(AttributeError):
        train.main(arguments)


@pytest.mark.parametrize("kind", ["config", "tied", "disk"])
def test_what_cannot_be_saved_is_refused_before_training(kind, arguments, tmp_path, monkeypatch):
    message = {
        "config": "cannot be saved after training: Object of type complex is not JSON serializable",
        "tied": "cannot be saved after training: .*shared tensors",
        "disk": "the disk has 1,000 bytes free, and the model with a checkpoint needs about [0-9,]+; free disk space",
    }
    load = train.load_model

    def damaged(*args, **kwargs):
        loaded = load(*args, **kwargs)
        layers = loaded.model.bert.encoder.layer
        if kind == "config":
            loaded.model.config.shares = 1j
        elif kind == "tied":
            layers[0].output.dense.weight = layers[1].output.dense.weight
        return loaded

    monkeypatch.setattr(train, "load_model", damaged)
    if kind == "disk":
        free = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(InputError, match=message[kind]):
        train.main(arguments)
    assert not (tmp_path / "out").exists()
