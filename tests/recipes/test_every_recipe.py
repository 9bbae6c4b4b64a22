"""Test the guarantees of every recipe on its sample; the test names no recipe, and runs each `recipes/*/train*.py`.

A recipe whose default is the embedded encoder gets a tiny encoder; other recipes start from small new models. If the
sample takes too long, `tests/recipes/test_NAME.py` has a function `few(folder)` that returns arguments for smaller
data.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from common.args import DEFAULT_ENCODER
from common.cli import parse
from common.speed import apply
from tests.conftest import ROOT, build_tokenizer, read_jsonl, write_jsonl
from tests.faults import Job, difference

SCRIPTS = [
    pytest.param(path.parent.name, path.stem, id="-".join([path.parent.name, *path.stem.split("_")[1:]]))
    for path in sorted((ROOT / "recipes").glob("*/train*.py"))
]


#: a second script of a recipe runs in `make soak`
RUNS = [
    pytest.param(*script.values, id=script.id, marks=[pytest.mark.soak] if "_" in script.values[1] else [])
    for script in SCRIPTS
]


def module(recipe: str, name: str):
    return importlib.import_module(f"recipes.{recipe}.{name}")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> str:
    """Return the folder of a tiny BERT with the maximum length of the embedded encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 512
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def words(recipe: str, script: str, encoder: str, out: Path) -> list[str]:
    """Return arguments of a run of 4 steps on the recipe's sample, with a checkpoint after the second step."""
    arguments = {
        "output_dir": out, "precision": "fp32", "use_cpu": True, "disable_tqdm": True, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_min_seconds": 0,
        "per_device_train_batch_size": 8, "max_train_samples": 64, "max_eval_samples": 8, "max_predict_samples": 8,
    }  # fmt: skip
    defaults = parse(module(recipe, script).ARGUMENTS, ["--output_dir", str(out)], None)
    if any(getattr(group, "model_name_or_path", None) == DEFAULT_ENCODER for group in defaults):
        arguments["model_name_or_path"] = encoder
    if any(getattr(group, "warm_start", None) for group in defaults):
        arguments["warm_start"] = "both"
    found = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    own = f"tests.recipes.test_{recipe}"
    few = getattr(importlib.import_module(own), "few", None) if importlib.util.find_spec(own) else None
    return found + few(out.parent) if few else found


def unlabelled(recipe: str, folder: Path) -> Path:
    """Return an input file for the recipe's predict: its sample, or texts if the sample is generated at run time."""
    for file in (ROOT / "recipes" / recipe / "sample").glob("test.*"):
        return file
    return Path(
        write_jsonl(folder / "in.jsonl", [{"text": "the [MASK] river"}, {"text": "a [MASK] house of 12 rooms"}])
    )


@pytest.mark.parametrize(("recipe", "script"), RUNS)
def test_it_runs_tracks_resumes_and_predicts(recipe, script, encoder, tmp_path, monkeypatch):
    main = module(recipe, script).main
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    metrics = main([*words(recipe, script, encoder, whole), "--report_to", "tensorboard"])
    assert metrics
    assert all(isinstance(value, int | float) for value in metrics.values())
    assert list(whole.rglob("events.out.tfevents.*"))
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md", "run.json", "all_results.json"):
        assert (whole / name).is_file(), name

    killed = Job(words(recipe, script, encoder, out), log, kill_at=3, main=main)
    assert killed.ends() == [-9]
    Job([*words(recipe, script, encoder, out), "--resume_from_checkpoint", "true"], log, main=main).succeeds()
    assert difference(whole, out) == 0

    source, target = unlabelled(recipe, tmp_path), tmp_path / "found.jsonl"
    module(recipe, "predict").main(["--model", str(out), "--input", str(source), "--output", str(target)])
    found = read_jsonl(target)
    assert found
    if source.suffix == ".jsonl":
        rows = read_jsonl(source)
        assert [{name: row[name] for name in asked} for row, asked in zip(found, rows, strict=True)] == rows
        assert all(row.keys() > asked.keys() for row, asked in zip(found, rows, strict=True))

    def plain(loaded, args):
        assert args.speed == "off"
        return apply(loaded, args)

    monkeypatch.setattr("common.inference.predictor.apply", plain)
    monkeypatch.setattr("common.inference.generation.shrinking_search", lambda *_, **__: pytest.fail("--speed off"))
    off = ["--speed", "off", "--output", str(tmp_path / "plain.jsonl")]
    module(recipe, "predict").main(["--model", str(out), "--input", str(source), *off])
    assert len(read_jsonl(tmp_path / "plain.jsonl")) == len(read_jsonl(target))


@pytest.mark.parametrize(("recipe", "script"), SCRIPTS)
def test_a_push_to_the_hub_is_refused_offline_before_training(recipe, script, encoder, tmp_path):
    hub = ["--push_to_hub", "--hub_model_id", "me/model"]
    main = module(recipe, script).main
    job = Job([*words(recipe, script, encoder, tmp_path / "out"), *hub], tmp_path / "log", main=main)
    assert job.ends() == [2], job.output
    assert "error: --push_to_hub: " in job.output
    assert "offline mode is enabled" in job.output
    assert "Traceback" not in job.output
    assert job.steps == []


@pytest.mark.parametrize(("recipe", "script"), SCRIPTS)
def test_it_is_documented(recipe, script):
    docstring = module(recipe, script).__doc__
    assert re.match(r"\S.*[.:]\n\n", docstring), "a first line on the task"
    assert len(re.findall(r"^    (make|python) ", docstring, re.MULTILINE)) >= 3, "commands to copy"
    measured = r"(\d+|one) cores? \(.*\), [\d.]+ minutes: .*\(\d{4}-\d\d-\d\d\)"
    assert re.search(measured, docstring.replace("\n", " ")), "data, model, machine, minutes, score and date"
    assert (ROOT / "recipes" / recipe / "README.md").read_text(encoding="utf-8").startswith("# ")
    assert "    make predict " in module(recipe, "predict").__doc__


@pytest.mark.soak
def test_a_copied_recipe_passes_with_no_edit_to_a_test(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("common", "recipes", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("README.md", "Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(tmp_path / "recipes" / "ner", tmp_path / "recipes" / "contracts_copy")
    tests = ["tests/recipes/test_every_recipe.py", "tests/test_docs.py", "-k", "contracts_copy or test_docs"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
