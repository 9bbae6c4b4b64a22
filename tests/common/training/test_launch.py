"""Test several processes: the same update, loss, scores and model as one; launchers and their configurations."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

from recipes.clm import train as clm
from recipes.mlm import train as mlm
from recipes.ner import train
from recipes.qa import train as qa
from recipes.relation import train as relation
from recipes.sentiment import train as sentiment
from recipes.summarization import train as extractive
from recipes.translation import train as translation
from tests.conftest import ROOT, read_jsonl, run
from tests.faults import Job
from tests.margins import assert_same_but_for_a_tie

#: parallel tests must not share a port
PORT = 29517 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(PORT))
LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", str(PORT))


def results(folder: Path) -> dict:
    steps = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {
        "weights": load_file(folder / "model.safetensors"),
        "steps": [(entry["loss"], entry["grad_norm"]) for entry in steps if "grad_norm" in entry],
        "eval_losses": [entry["eval_loss"] for entry in steps if "eval_loss" in entry],
        "scores": json.loads((folder / "test_results.json").read_text()),
        "predictions": read_jsonl(folder / "predictions_test.jsonl"),
    }


@pytest.fixture
def two_and_one(arguments, tmp_path):
    """Run the recipe on two processes, with a launcher if given, and on one process with the same global batch."""

    def compare(launcher: tuple[str, ...] = ()) -> tuple[dict, dict]:
        more = ["--optim", "sgd", "--learning_rate", "0.1", "--logging_steps", "1"]
        halves = ["--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "6"]
        halves += ["--output_dir", str(tmp_path / "two")]
        if launcher:
            done = run(*launcher, "-m", "recipes.ner.train", *arguments, *more, *halves)
            assert done.returncode == 0, done.stderr[-3000:]
            printed = done.stdout
        else:
            job = Job([*arguments, *more, *halves], tmp_path / "log", processes=2)
            job.succeeds()
            printed = job.output
        assert printed.count("all (micro)") == 1  # only the main process prints
        train.main([*arguments, *more, "--output_dir", str(tmp_path / "one")])
        assert json.loads((tmp_path / "two" / "run.json").read_text())["hardware"]["processes"] == 2
        return results(tmp_path / "two"), results(tmp_path / "one")

    return compare


def same(two: dict, one: dict) -> None:
    assert len(two["steps"]) == len(one["steps"]) > 0
    for (loss_a, norm_a), (loss_b, norm_b) in zip(two["steps"], one["steps"], strict=True):
        assert loss_a == pytest.approx(loss_b, rel=1e-5)
        assert norm_a == pytest.approx(norm_b, rel=1e-4)
    assert two["eval_losses"] == pytest.approx(one["eval_losses"], rel=1e-5)
    assert max((two["weights"][k] - one["weights"][k]).abs().max().item() for k in one["weights"]) < 1e-5
    counted = ("_support", "_f1", "_precision", "_recall")
    kept = counted if assert_same_but_for_a_tie(two["predictions"], one["predictions"]) else counted[:1]
    counts = {k: v for k, v in one["scores"].items() if k.endswith(kept)}
    assert {k: two["scores"][k] for k in counts} == counts


@pytest.mark.soak
def test_torchrun_gives_what_one_process_gives(two_and_one):
    same(*two_and_one(TORCHRUN))


@pytest.mark.soak
def test_accelerate_launch_gives_what_one_process_gives(two_and_one):
    same(*two_and_one(LAUNCH))


def test_the_last_small_batch_counts_every_row_once_under_two_processes(two_and_one, arguments):
    arguments += ["--max_train_samples", "37", "--max_predict_samples", "19", "--max_eval_samples", "13"]
    same(*two_and_one())


@pytest.mark.soak
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        (train, []),
        (sentiment, ["--class_weights", "balanced"]),
        (sentiment, ["--long_texts", "windows", "--max_seq_length", "16"]),
        (qa, ["--max_question_length", "24", "--doc_stride", "8"]),
        (relation, []),
        (mlm, ["--text_unit", "paragraph"]),
        (mlm, ["--objective", "mlm+nsp", "--text_unit", "paragraph"]),
        (clm, ["--vocab_size", "300", "--config_overrides", "n_layer=1"]),
        (extractive, []),
        (translation, ["--max_tokens_per_batch", "64"]),
        (translation, []),
    ],
)
def test_rows_divide_among_processes_in_every_recipe(tiny, tmp_path, recipe, more):
    """Train on steps of six rows, in one batch, and on two processes with one row at a time."""
    words = [
        "--max_train_samples",
        "19",
        "--max_eval_samples",
        "6",
        "--max_predict_samples",
        "6",
        "--precision",
        "fp32",
    ]
    words += ["--logging_steps", "1", "--optim", "sgd", "--learning_rate", "0.1", "--disable_tqdm", "true"]
    words += ["--eval_strategy", "no", "--save_strategy", "no", "--use_cpu", "true", "--num_train_epochs", "2"]
    if recipe is translation:
        words += ["--from_scratch", "tiny", "--vocab_size", "300", "--dropout", "0", "--max_source_length", "56"]
        words += ["--max_target_length", "56", "--config_overrides", "d_model=48", "--num_beams", "1"]
    else:
        words += ["--max_source_length" if recipe is extractive else "--max_seq_length", "64"]
        words += [] if recipe is clm else ["--model_name_or_path", tiny]
    histories = []
    for processes, batch, accumulation in ((1, 6, 1), (2, 1, 3)):
        out = tmp_path / f"{processes}"
        cut = ["--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)]
        budget = ["--max_tokens_per_batch", "384"] if processes == 1 and "--max_tokens_per_batch" in more else []
        arguments = [*words, *more, *cut, *budget, "--output_dir", str(out)]
        Job(arguments, tmp_path / "log", processes=processes, main=recipe.main).succeeds()
        log = json.loads((out / "trainer_state.json").read_text())["log_history"]
        histories.append([(entry["loss"], entry["grad_norm"]) for entry in log if "grad_norm" in entry])
    assert len(histories[0]) == len(histories[1]) > 1
    for one, two in zip(*histories, strict=True):
        assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.soak
def test_lora_under_two_processes(two_and_one, arguments, tmp_path):
    arguments += ["--lora_r", "4", "--lora_dropout", "0", "--lora_target_modules", "query", "value"]
    same(*two_and_one())
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").is_file()


def test_bad_input_under_two_processes_is_told_once(arguments, tmp_path):
    arguments[arguments.index("--train_file") + 1] = str(tmp_path / "none.jsonl")
    job = Job(arguments, tmp_path / "log", processes=2)
    assert all(job.ends())
    assert job.output.count("none.jsonl: no such file") == 1


def see_no_other_process(argv: list[str]) -> dict[str, float]:
    """Train on an accelerator without a torch.distributed backend, such as a Mac's."""
    torch.accelerator.is_available = lambda: True
    return train.main(argv)


def test_processes_that_would_train_apart_are_refused(arguments, tmp_path):
    job = Job(arguments, tmp_path / "log", processes=2, main=see_no_other_process)
    assert all(job.ends())
    assert "WORLD_SIZE 2: each process sees 1" in job.output
    assert not (tmp_path / "out").exists()


@pytest.mark.soak
def test_accelerate_launch_with_one_process(arguments, tmp_path):
    done = run("-m", "accelerate.commands.launch", "--num_processes", "1", "-m", "recipes.ner.train", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("config", sorted(p.name for p in (ROOT / "common" / "launch").glob("*.yaml")))
def test_launch_configurations_are_valid(config, monkeypatch):
    path = str(ROOT / "common" / "launch" / config)
    loaded = load_config_from_file(path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # as on the target machines
    args = launch_command_parser().parse_args(["--config_file", path, "-m", "recipes.ner.train", "--seed", "1"])
    args, _, _ = _validate_launch_command(args)
    assert args.num_processes == loaded.num_processes
    kinds = {
        "one_gpu.yaml": "NO",
        "multi_gpu.yaml": "MULTI_GPU",
        "multi_node.yaml": "MULTI_GPU",
        "fsdp2.yaml": "FSDP",
        "deepspeed_zero2.yaml": "DEEPSPEED",
    }
    assert loaded.distributed_type.value == kinds[config]
    assert args.multi_gpu == (kinds[config] == "MULTI_GPU")
    assert args.use_fsdp == (kinds[config] == "FSDP")
    assert args.use_deepspeed == (kinds[config] == "DEEPSPEED")
    if config == "fsdp2.yaml":
        assert str(args.fsdp_version) == "2"
    if config == "deepspeed_zero2.yaml":
        assert args.zero_stage == 2


def test_all_launch_configurations_are_there():
    assert {p.stem for p in (ROOT / "common" / "launch").iterdir()} == {
        "one_gpu", "multi_gpu", "multi_node", "fsdp2", "deepspeed_zero2",
    }  # fmt: skip


@pytest.fixture
def copy(tmp_path) -> Path:
    """Return a copy of the repository after `cp -r recipes/ner recipes/contracts`."""
    for name in ("common", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / "copy")
    shutil.copytree(tmp_path / "copy" / "recipes" / "ner", tmp_path / "copy" / "recipes" / "contracts")
    return tmp_path / "copy"


def make(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Call make with the environment of this test run as its .venv, which installs nothing."""
    command = ["make", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed", *words]
    of_make_test = ("MAKE", "MFLAGS", "ARGS")  # `make test` exports these variables
    env = {k: v for k, v in os.environ.items() if not k.startswith(of_make_test)}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, env=env | {"OMP_NUM_THREADS": "1"}
    )


def test_a_copied_recipe_is_a_target_and_runs_unedited(copy, arguments):
    assert "contracts" in make(copy, "help").stdout
    without_output = [
        word for i, word in enumerate(arguments) if "--output_dir" not in arguments[max(i - 1, 0) : i + 1]
    ]
    done = make(copy, "contracts", f"ARGS={' '.join(without_output)}")
    assert done.returncode == 0, done.stderr[-3000:]
    out = copy / "outputs" / "contracts"
    assert (out / "model.safetensors").is_file()
    assert not (copy / "outputs" / "ner").exists()
    assert "give INPUT=" in make(copy, "predict", "RECIPE=contracts").stderr
    (copy / "in.jsonl").write_text('{"text": "Ann left Oslo."}\n')
    done = make(copy, "predict", "RECIPE=contracts", "MODEL=outputs/contracts", "INPUT=in.jsonl", "OUTPUT=found.jsonl")
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_jsonl(copy / "found.jsonl")[0]["text"] == "Ann left Oslo."


def test_gpus_run_through_accelerate_launch(copy):
    assert "accelerate launch --multi_gpu --num_processes 4 -m recipes.ner.train --seed 1" in make(
        copy, "-n", "ner", "GPUS=4", "ARGS=--seed 1"
    ).stdout  # fmt: skip


def test_help_lists_every_target_in_one_line(copy):
    lines = make(copy, "help").stdout.splitlines()
    middle = lines.index(next(line for line in lines if line.startswith("Commands:")))
    scripts = (copy / "recipes").glob("*/train*.py")
    names = {"-".join([path.parent.name, *path.stem.split("_")[1:]]) for path in scripts}
    assert [line.split()[0] for line in lines[1:middle]] == sorted(names)
    assert "contracts" in names
    targets = {"help", "setup", "predict", "compare", "domains", "sweep", "annotate", "transfer", "labels"}
    targets |= {"test", "soak", "bench", "lint", "format"}
    assert {line.split()[0] for line in lines[middle + 1 :]} == targets
    assert all(len(line.split()) > 3 for line in lines[1:middle] + lines[middle + 1 :])
