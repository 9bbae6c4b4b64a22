"""Test the output folder: one run at a time, no silent replacement, and a record of the run."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForTokenClassification

from common.cli import parse
from common.data import load_splits
from common.data.files import fresh_file
from common.errors import InputError
from common.run.report import draw_history, write_samples
from common.run.run import Run
from common.training import checkpoints
from common.training.checkpoints import sha256
from recipes.ner import predict, train
from recipes.ner.reading import check_row
from tests.conftest import ROOT, read_jsonl

COLUMNS = {"tokens": "tokens", "ner_tags": "ner_tags"}


def files_in(folder: Path) -> dict[str, str]:
    """Return the hash of each file in a folder by path, without the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def test_a_finished_run_is_kept_aside_by_the_next_and_one_only(arguments, tmp_path, capsys):
    out, previous = tmp_path / "out", tmp_path / "out.previous"
    arguments += ["--report_to", "tensorboard"]  # tensorboard writes into a separate folder
    train.main(arguments)
    assert "moves to" not in capsys.readouterr().out
    first = files_in(out)
    assert any(name.startswith("runs/") for name in first)
    (out / "notes.txt").write_text("mine")

    train.main([*arguments, "--seed", "7"])
    said = capsys.readouterr().out
    assert said.count(f"{out}: the finished run moves to out.previous when training begins") == 1
    assert files_in(previous) == first
    assert (out / "notes.txt").read_text() == "mine"
    second = files_in(out)
    assert second["model.safetensors"] != first["model.safetensors"]
    assert not [path for path in out.rglob("*") if path.is_dir() and not any(path.iterdir())]

    (previous / "read_me.txt").write_text("mine too")
    train.main(arguments)  # the same command as the first
    kept = files_in(previous)
    assert kept.pop("read_me.txt")
    assert kept == {name: hash_ for name, hash_ in second.items() if name != "notes.txt"}
    assert files_in(out)["model.safetensors"] == first["model.safetensors"]
    assert train_from(previous) == kept["model.safetensors"]


def train_from(folder: Path) -> str:
    """Load the model in a folder and return its hash."""
    AutoModelForTokenClassification.from_pretrained(folder)
    return sha256(folder / "model.safetensors")


def test_overwrite_removes_the_run_and_keeps_the_files_of_the_user(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    train.main([*arguments, "--report_to", "tensorboard"])
    weights = sha256(out / "model.safetensors")
    for name in ("notes.txt", "predictions_of_mine.jsonl", "my/model.safetensors"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    train.main([*arguments, "--seed", "7", "--overwrite"])
    assert f"{out}: the run there is removed when training begins" in capsys.readouterr().out
    assert not (tmp_path / "out.previous").exists()
    assert sha256(out / "model.safetensors") != weights
    assert not (out / "runs").exists()
    for name in ("notes.txt", "predictions_of_mine.jsonl", "my/model.safetensors"):
        assert (out / name).read_text() == "mine"
        assert name not in json.loads((out / "run.json").read_text())["files"]


def test_a_file_of_the_user_with_a_name_of_the_run_comes_back(arguments, tmp_path, capsys):
    out, test = tmp_path / "out", arguments.index("--test_file")
    train.main(arguments[:test] + arguments[test + 2 :])
    (out / "predictions_test.jsonl").write_text("mine")
    train.main(arguments)
    assert "predictions_test.jsonl: written by the run; your file of this name is now" in capsys.readouterr().err
    assert (out / "predictions_test.jsonl.yours").read_text() == "mine"
    assert len(read_jsonl(out / "predictions_test.jsonl")) == 20
    files = json.loads((out / "run.json").read_text())["files"]
    assert "predictions_test.jsonl" in files
    assert "predictions_test.jsonl.yours" not in files


def test_a_run_does_not_replace_what_it_reads(arguments, tmp_path):
    out = tmp_path / "out"
    train.main([*arguments, "--save_total_limit", "5"])
    train.main([*arguments, "--save_total_limit", "5", "--seed", "7"])
    before = files_in(tmp_path)
    for words, message in [
        (["--model_name_or_path", str(out)], "--model_name_or_path .*out would be replaced"),
        (["--model_name_or_path", str(out), "--overwrite"], "--model_name_or_path .*out would be replaced"),
        (["--model_name_or_path", f"{out}.previous"], r"--model_name_or_path .*out\.previous would be replaced"),
        (["--resume_from_checkpoint", f"{out}.previous/checkpoint-4"], "--resume_from_checkpoint .* would be replaced"),
    ]:
        with pytest.raises(InputError, match=message):
            train.main([*arguments, *words])
    assert files_in(tmp_path) == before
    train.main([*arguments, "--model_name_or_path", f"{out}.previous", "--overwrite"])


def test_a_folder_of_others_is_not_taken_for_the_previous_run(arguments, tmp_path):
    train.main(arguments)
    (tmp_path / "out.previous").mkdir()
    (tmp_path / "out.previous" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"out\.previous: the finished run would move here, but this folder"):
        train.main(arguments)
    train.main([*arguments, "--overwrite"])
    assert (tmp_path / "out.previous" / "thesis.txt").read_text() == "mine"


def test_another_run_is_not_taken_for_the_previous_run(arguments, tmp_path):
    train.main(arguments)
    train.main([*arguments, "--output_dir", str(tmp_path / "out.previous")])
    before = files_in(tmp_path / "out.previous")
    with pytest.raises(InputError, match=r"out\.previous: the finished run would move here, but this folder"):
        train.main(arguments)
    assert files_in(tmp_path / "out.previous") == before


def test_a_link_is_not_taken_for_the_previous_run(arguments, tmp_path):
    train.main(arguments)
    (tmp_path / "out.previous").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"out\.previous: is a link, and the finished run would move here; rename it"):
        train.main(arguments)


def test_a_training_file_in_the_replaced_run_is_refused(arguments, tmp_path):
    train.main(arguments)
    rows = tmp_path / "out" / "predictions_test.jsonl"
    rows.write_text(Path(arguments[arguments.index("--train_file") + 1]).read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(InputError, match=r"--train_file .*predictions_test\.jsonl would be replaced by this run"):
        train.main([*arguments, "--train_file", str(rows), "--overwrite"])
    assert rows.exists()


def test_a_checkpoint_whose_replacement_was_interrupted_is_found(arguments, tmp_path):
    out = tmp_path / "out"
    train.main([*arguments, "--save_min_seconds", "0"])
    newest = checkpoints.in_order(out)[-1]
    (out / checkpoints.STAGING).mkdir()
    newest.rename(out / checkpoints.STAGING / f"{newest.name}.replaced")
    train.main([*arguments, "--resume_from_checkpoint", "true"])
    assert newest.is_dir()


def test_a_record_names_no_files_outside_its_folder(arguments, tmp_path):
    out = tmp_path / "out"
    train.main(arguments)
    (tmp_path / "else.txt").write_text("mine")
    record = json.loads((out / "run.json").read_text())
    record["files"] += ["../else.txt", str(tmp_path / "else.txt")]
    (out / "run.json").write_text(json.dumps(record))
    train.main([*arguments, "--overwrite"])
    assert (tmp_path / "else.txt").read_text() == "mine"


def test_a_run_that_was_killed_while_it_moved_the_one_before_moves_the_rest(arguments, tmp_path, monkeypatch):
    out, previous = tmp_path / "out", tmp_path / "out.previous"
    train.main(arguments)
    first, moves = files_in(out), []

    def move(source, target):
        if len(moves) == 3:
            raise KeyboardInterrupt
        moves.append(os.replace(source, target))

    monkeypatch.setattr("shutil.move", move)
    with pytest.raises(KeyboardInterrupt):
        train.main([*arguments, "--seed", "7"])
    monkeypatch.undo()
    assert len(files_in(previous)) == 4  # includes the record
    train.main([*arguments, "--seed", "7"])
    assert files_in(previous) == first


def test_the_files_of_a_killed_run_are_its_own(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "finish", lambda *_, **__: 1 / 0)  # after the model is saved
    with pytest.raises(ZeroDivisionError):
        train.main(arguments)
    monkeypatch.undo()
    out = tmp_path / "out"
    assert "model.safetensors" in json.loads((out / "run.json").read_text())["files"]
    (out / "notes.txt").write_text("mine")
    train.main([*arguments, "--resume_from_checkpoint", "true"])
    finished = files_in(out)
    train.main(arguments)
    assert files_in(tmp_path / "out.previous") == {n: h for n, h in finished.items() if n != "notes.txt"}
    assert (out / "notes.txt").read_text() == "mine"


def test_edited_code_runs_again_and_is_warned_of_by_a_run_that_resumes(arguments, tmp_path, monkeypatch, capsys):
    arguments += ["--save_total_limit", "5"]
    train.main(arguments)
    resumed = [*arguments, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-4")]
    train.main(resumed)
    assert "resuming with changed code" not in capsys.readouterr().err
    monkeypatch.setattr("common.run.fingerprint.recipe_folder", lambda arguments: ROOT / "tests" / "bad_inputs")
    train.main(resumed)
    assert "warning: resuming with changed code; results may differ" in capsys.readouterr().err
    train.main(arguments)
    assert (tmp_path / "out.previous" / "model.safetensors").is_file()


def test_a_run_that_resumes_takes_no_other_argument_than_it_can(arguments, tmp_path, capsys):
    arguments += ["--save_total_limit", "5"]
    train.main(arguments)
    resumed = [*arguments, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-4")]
    other = str(tmp_path / "other")
    for words, message in [
        (["--seed", "7"], "--seed: the run has 42 and cannot resume with 7; give --seed 42"),
        (["--doc_stride", "8"], "--doc_stride: the run has 16 and cannot resume with 8; give --doc_stride 16"),
        (["--per_device_train_batch_size", "8"], "the run took 16 rows a step and would now take 8 rows"),
        (["--max_steps", "3"], "--max_steps 3: .*checkpoint-4 is of step 4; give at least 4"),
        (["--num_train_epochs", "0.5"], "--num_train_epochs 0.5: are 2 steps, and .*checkpoint-4 is of step 4"),
        (["--output_dir", other, "--seed", "7"], "--seed: the run has 42 and cannot resume with 7"),
        (["--output_dir", other, "--max_train_samples", "20"], "checkpoint-4: its run was on other data .train. and"),
    ]:
        before = files_in(tmp_path)
        with pytest.raises(InputError, match=message):
            train.main([*resumed, *words])
        assert files_in(tmp_path) == before
    assert not Path(other).exists()
    capsys.readouterr()
    split = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--run_name", "other"]
    train.main([*resumed, *split])
    assert "changed arguments" not in capsys.readouterr().err
    train.main([*resumed, "--weight_decay", "0.1"])
    said = capsys.readouterr().err
    assert "resuming with changed arguments; results will differ from the original run: --weight_decay 0.01" in said


def test_a_run_writes_nothing_into_its_arguments(arguments, tmp_path):
    groups = parse(train.ARGUMENTS, [*arguments, "--save_total_limit", "5"])
    train.main([*arguments, "--save_total_limit", "5"])
    args, data_args = groups[-1], groups[1]
    args.resume_from_checkpoint = True
    before = repr(args)
    run = Run(args, data_args, *groups[::2][:1], groups[2], rows=load_splits(data_args, COLUMNS, check_row))
    assert run.checkpoint == str(tmp_path / "out" / "checkpoint-8")
    assert repr(args) == before


def test_a_folder_with_foreign_files_is_refused(arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("somebody's")
    for words in ([], ["--overwrite"]):
        with pytest.raises(InputError, match="holds files that no run of a recipe wrote"):
            train.main(arguments + words)
    assert (tmp_path / "out" / "model.safetensors").read_text() == "somebody's"


def test_a_stopped_run_is_not_started_anew_by_the_same_command(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Trainer, "_load_best_model", lambda _: 1 / 0)  # stops after the last checkpoint
    with pytest.raises(ZeroDivisionError):
        train.main(arguments)
    monkeypatch.undo()
    with pytest.raises(
        InputError, match="holds a stopped run; resume it with --resume_from_checkpoint true, drop it with --overwrite"
    ):
        train.main(arguments)
    assert list((tmp_path / "out").glob("checkpoint-*"))
    train.main([*arguments, "--resume_from_checkpoint", "true"])
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def test_a_run_goes_on_from_its_checkpoint_or_says_that_there_is_none(arguments, tmp_path):
    with pytest.raises(InputError, match="--resume_from_checkpoint true: no checkpoint in"):
        train.main([*arguments, "--resume_from_checkpoint", "true"])
    with pytest.raises(InputError, match="not a checkpoint folder"):
        train.main([*arguments, "--resume_from_checkpoint", "common"])
    train.main([*arguments, "--save_total_limit", "5"])
    whole = sha256(tmp_path / "out" / "model.safetensors")
    train.main([*arguments, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-4")])
    assert sha256(tmp_path / "out" / "model.safetensors") == whole
    assert sha256(tmp_path / "out.previous" / "model.safetensors") == whole  # the finished run is kept
    assert not list((tmp_path / "out.previous").glob("checkpoint-*"))
    assert "model.safetensors" in json.loads((tmp_path / "out" / "run.json").read_text())["files"]


def test_a_run_does_not_go_on_with_other_data(arguments, tmp_path):
    train.main(arguments)
    rows = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[1:]))
    with pytest.raises(InputError, match="its run was on other data"):
        train.main([*arguments, "--resume_from_checkpoint", "true"])


def test_what_fails_before_training_leaves_the_old_run_alone(arguments, tiny, tmp_path):
    train.main(arguments)
    files = {path: sha256(path) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for words, message in [
        (["--model_name_or_path", "./nowhere"], "no such folder"),
        (["--lora_r", "4", "--lora_target_modules", "nothing"], "--lora_target_modules"),
        (["--metric_for_best_model", "F1"], "--metric_for_best_model F1: no such score; did you mean f1?"),
        (["--max_seq_length", "500"], "reads at most 128 tokens"),
    ]:
        with pytest.raises(InputError) as error:
            train.main([*arguments, "--overwrite", *words])
        assert message in str(error.value)
        assert {path: sha256(path) for path in files if path.name != ".lock"} == {
            path: hash_ for path, hash_ in files.items() if path.name != ".lock"
        }


def test_a_start_that_failed_does_not_stand_in_the_way(arguments):
    with pytest.raises(InputError):
        train.main([*arguments, "--model_name_or_path", "./nowhere"])
    train.main(arguments)


def test_a_folder_in_use_is_refused(arguments, tmp_path):
    (tmp_path / "out").mkdir()
    hold = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, 2); f.write('process 1 on here'); "
        "f.flush(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "out" / ".lock")], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    try:
        with pytest.raises(InputError, match="in use by process 1 on here"):
            train.main(arguments)
    finally:
        holder.kill()
        holder.wait()
    train.main(arguments)  # the lock of a dead process is stale


def test_a_folder_that_cannot_be_written_is_an_input_error(arguments, tmp_path):
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for folder, message in (
        ("file/out", "cannot be written"),
        ("file", "file: is a file; name a folder"),
        (".", "holds files that no run of a recipe wrote"),
        ("new/../file", "file: is a file; name a folder"),
    ):
        with pytest.raises(InputError, match=message):
            train.main([*arguments, "--output_dir", f"{tmp_path}/{folder}"])
    with pytest.raises(InputError, match="no checkpoint in"):
        train.main([*arguments, "--output_dir", f"{tmp_path}/new/../out/inner", "--resume_from_checkpoint", "true"])
    assert sorted(tmp_path.rglob("*")) == before


def test_the_record_tells_what_was_run_and_the_printed_command_runs(arguments, small, tmp_path, capsys):
    train.main(arguments)
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("epoch 2, step 8: validation loss ")]
    assert [line for line in said if re.match(r"best checkpoint, step [48]: validation loss .*, f1 ", line)]
    (command,) = (line.removeprefix("use it: make predict ") for line in said if line.startswith("use it: "))
    given = dict(word.split("=", 1) for word in shlex.split(command))
    assert (given["RECIPE"], given["INPUT"]) == ("ner", small["test"])
    predict.main(["--model", given["MODEL"], "--input", given["INPUT"], "--output", given["OUTPUT"]])
    assert len(read_jsonl(Path(given["OUTPUT"]))) == 20
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["finished"] >= record["started"]
    assert record["arguments"]["num_train_epochs"] == 2
    assert record["arguments"]["doc_stride"] == 16
    assert record["data"]["train_file"]["sha256"] == sha256(small["train"])
    assert record["versions"]["transformers"] == "5.23.0"
    assert record["hardware"]["precision"] == "fp32"
    assert set(record["phases"]) == {"train", "eval", "test"}
    assert all(phase["seconds"] > 0 and phase["peak_memory_mib"] > 100 for phase in record["phases"].values())
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert git.returncode != 0 or record["git_commit"].startswith(git.stdout.strip())


@pytest.mark.parametrize("words", [["--hub_token", "hf_secret"], ["--hub-token=hf_secret"]])
def test_the_hub_token_is_in_no_file(arguments, tmp_path, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, *words])
    train.main()
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            assert b"hf_secret" not in file.read_bytes(), file
    assert "HIDDEN" in (tmp_path / "out" / "README.md").read_text()


def test_a_fresh_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "a.jsonl"

    def stopped() -> None:
        with fresh_file(path, overwrite=False) as file:
            file.write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert list(path.parent.iterdir()) == []
    with fresh_file(path, overwrite=False) as file:
        file.write("whole")
    with pytest.raises(InputError, match="exists already"), fresh_file(path, overwrite=False):
        pass
    assert path.read_text() == "whole"
    beside = path.with_name("a.jsonl.part")
    beside.write_text("mine")
    with fresh_file(path, overwrite=True) as file:
        file.write("new")
    assert path.read_text() == "new"
    for name, text in (("link", "through a link"), ("dangling", "through a dangling link")):
        link, target = tmp_path / name, tmp_path / f"target_of_{name}"
        link.symlink_to(target.name)
        if name == "link":
            target.write_text("old")
        with fresh_file(link, overwrite=True) as file:
            file.write(text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert beside.read_text() == "mine"
    for wrong in (tmp_path, ""):
        with pytest.raises(InputError, match="is no regular file"), fresh_file(wrong, overwrite=True):
            pass


RECIPES = sorted(path.parent.name for path in (ROOT / "recipes").glob("*/predict.py"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_predict_names_an_output_that_cannot_be_written_before_it_loads_a_model(recipe, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    module = importlib.import_module(f"recipes.{recipe}.predict")
    for output, message in (
        (tmp_path / "a.txt", "exists already"),
        (tmp_path, "is no regular file"),
        (tmp_path / "a.txt" / "b" / "c.jsonl", "cannot be written"),
        ("/proc/1/new/c.jsonl", "cannot be written"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long"),
    ):
        with pytest.raises(InputError, match=message):
            module.main(["--model", "none", "--input", str(tmp_path / "a.txt"), "--output", str(output)])
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_missing_picture_library_is_told_before_training(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("common.run.run.find_spec", lambda name: None)
    with pytest.raises(InputError, match="matplotlib: is not installed"):
        train.main(arguments)
    assert not (tmp_path / "out").exists()


def test_an_average_is_the_mean_in_float32(tmp_path):
    folders = [tmp_path / f"checkpoint-{n}" for n in (1, 2, 3)]
    weights = torch.randn(3, 4, 5)
    half = torch.tensor([[1.0], [1.0078125], [1.0]]).to(torch.bfloat16)  # their sum is not a bfloat16
    for n, folder in enumerate(folders):
        folder.mkdir()
        save_file({"w": weights[n], "h": half[n], "steps": torch.tensor(n)}, folder / "model.safetensors")
        save_file({"w": torch.zeros(4, 5)}, folder / checkpoints.BEST)  # from another step
    found = checkpoints.average(folders)
    assert torch.equal(found["w"], (weights[0] + weights[1] + weights[2]) / 3)
    assert found["h"].dtype == torch.bfloat16
    assert found["h"].item() == torch.tensor((1 + 1.0078125 + 1) / 3).to(torch.bfloat16).item()
    assert found["steps"].item() == 0
    save_file({"w": weights[0], "h": half[0]}, folders[2] / "model.safetensors")
    with pytest.raises(InputError, match="checkpoint-3: holds other weights than"):
        checkpoints.average(folders)
    (folders[2] / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no weights as safetensors"):
        checkpoints.average(folders)


def test_a_page_of_samples_shows_texts_as_they_are_and_sorted(tmp_path):
    number = 100
    texts = {
        "source": [f"s{n} <b>&\u202e" for n in range(number)],
        "hypothesis": [f"h{n}\nline" for n in range(number)],
    }
    texts["source"][0] = "x" * 5000
    scores = [float((n * 37) % number) for n in range(number)]
    write_samples(tmp_path / "a.html", "A <title>", texts, scores, "chrF")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<h1>A &lt;title&gt;</h1>" in page
    assert "&lt;b&gt;&amp;\\u202e" in page
    assert "<b>" not in page
    lowest = page.split("Lowest chrF")[1].split("Highest chrF")
    rows = [[int(line.split("<")[0]) - 1 for line in part.split("<tr><th>row ")[1:]] for part in lowest]
    assert [scores[n] for n in rows[0]] == list(range(20))
    assert [scores[n] for n in rows[1]] == list(range(99, 79, -1))
    assert "(5,000 characters)" in page
    write_samples(tmp_path / "b.html", "A <title>", texts, scores[::-1], "chrF")
    drawn = [
        (tmp_path / name).read_text().split("Lowest")[0].split("<tr><th>row ")[1:] for name in ("a.html", "b.html")
    ]
    assert [row.split("<")[0] for row in drawn[0]] == [row.split("<")[0] for row in drawn[1]]
    history = [{"loss": 2.0, "step": 1}, {"eval_loss": 3.0, "step": 2}, {"eval_bleu": 4.0, "step": 2}]
    draw_history(tmp_path / "curve.png", history, "bleu")
    draw_history(tmp_path / "loss.png", history)
    sizes = [(tmp_path / name).read_bytes()[16:24] for name in ("curve.png", "loss.png")]  # width and height
    assert sizes[0] > sizes[1]
