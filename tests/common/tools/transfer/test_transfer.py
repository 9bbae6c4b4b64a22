"""Test `make transfer`: chains of runs, shared by plans, resumed after a kill, and the report that they give."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, BertForSequenceClassification, BertForTokenClassification, BertModel

import recipes
from common.errors import InputError
from common.tools.transfer import __main__ as transfer
from common.tools.transfer.chains import Random, Run, add_longer, build, kept_by, time_factors
from common.tools.transfer.estimate import START_UP, Estimate
from common.tools.transfer.findings import Findings
from common.tools.transfer.reading import read_plan
from common.tools.transfer.sequence import _learned, add_sequence, joined, why_not_joined
from common.tools.transfer.statistics import DRAWS, Arm
from common.tools.transfer.tasks import Tasks, statistics_of
from common.tools.transfer.work import Store, graft, random_checkpoint
from tests.common.tools.transfer import toy
from tests.conftest import ROOT

PLAN = """
title: Toys
seeds: [1, 2, 3]
model: {tiny}
targets:
  play: {{recipe: toy, rows: [10, all]}}
sources:
  pretrained: {{}}
  scratch: {{}}
  school: {{kind: intermediate, recipe: toy, arguments: --teaches 1 --num_train_epochs 2}}
  street: {{kind: domain, recipe: toy, arguments: --train_file {file}}}
"""


@pytest.fixture
def toys(tmp_path, tiny, monkeypatch) -> Path:
    """Return a folder with a recipe `toy` and a plan, as working directory."""
    toy.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(recipes, "__path__", [str(tmp_path / "recipes"), *recipes.__path__])
    for name in [name for name in sys.modules if name.startswith("recipes.toy")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "plan.yaml").write_text(PLAN.format(tiny=tiny, file=tmp_path / "rows.jsonl"))
    return tmp_path


def run(folder: Path, *words: str) -> Findings:
    return transfer.main(["--plan", str(folder / "plan.yaml"), "--folder", str(folder / "out"), *words])


def test_a_plan_of_toys_is_trained_once_and_its_report_is_right(toys, capsys):
    text = (toys / "plan.yaml").read_text().replace("targets:", "forgetting: false\ntargets:")
    (toys / "plan.yaml").write_text(text)
    findings = run(toys, "--predict", "off", "--at_once", "2")
    told = capsys.readouterr().out
    # 8 cells, 2 sources, and the baseline for the minutes of school (3 times) and of street (2 times), with 3 seeds
    assert "30 of 30 runs are left: about " in told
    assert "rank" not in told
    assert re.search(r"30 of 30: .*: test_accuracy 0\.\d+, 2 s", told)
    assert "42 of 42: play, " in told
    cell = findings.cells["play", "school", 10]
    assert cell.score.mean == pytest.approx(82, abs=0.3)
    assert cell.gain.effect.mean == pytest.approx(30, abs=0.3)
    assert cell.gain.sure
    assert cell.seconds == 6
    assert cell.longer_seconds == pytest.approx(2 * 1.5**3)
    assert cell.longer.effect.mean == pytest.approx(2, abs=0.3)
    assert not findings.cells["play", "street", None].gain.sure
    assert findings.needed["play", "school"][50] == (10, 10, 10)
    report = (toys / "out" / "plan" / "transfer.md").read_text()
    assert "- Intermediate training on school helps play at 10 rows (+30." in report
    assert "- Training on the domain street has no sure effect on play: at 10 rows (+0.0 ± " in report
    assert "- On play at 10 rows, school also beats pretrained trained for the same minutes (+2" in report
    assert re.search(r"\| school \| \+30\.\d ± \d\.\d ● \| \+30\.\d ± \d\.\d ● \|", report)
    assert "| play, school | ≤ 10 | ≤ 10 |" in report
    page = (toys / "out" / "plan" / "transfer.html").read_text()
    assert "background: rgb(" in page
    assert "<svg" in page
    assert "<script" not in page
    content = json.loads((toys / "out" / "plan" / "transfer.json").read_text())
    assert len(content["cells"]) == 8
    assert content["cells"][0]["scores"] == findings.cells["play", "scratch", 10].scores
    # nothing is trained again, also not by another plan with the same runs
    files = {path: path.stat().st_mtime_ns for path in (toys / "out" / "runs").glob("*.json")}
    (toys / "other.yaml").write_text(text.replace("  scratch: {}\n", "").replace("Toys", "Others"))
    transfer.main(["--plan", "other.yaml", "--folder", str(toys / "out"), "--predict", "off"])
    assert {path: path.stat().st_mtime_ns for path in (toys / "out" / "runs").glob("*.json")} == files
    assert (toys / "out" / "other" / "transfer.md").read_text().startswith("# Others\n")
    assert not list((toys / "out" / "runs").glob("*.claim"))
    assert not list((toys / "out" / "models").iterdir())


SEQUENCE = """
title: One after the other
seeds: [1, 2]
model: {tiny}
sequence: {{order: [one, two, three], methods: {{naive: --keep none, lwf: --keep lwf, replay: --keep replay}}}}
targets:
  one: {{recipe: toy, arguments: --teaches 1}}
  two: {{recipe: toy, arguments: --teaches -1}}
  three: {{recipe: toy}}
sources: {{pretrained: {{}}}}
"""


def test_a_sequence_says_what_is_forgotten(toys, tiny, capsys):
    (toys / "plan.yaml").write_text(SEQUENCE.format(tiny=tiny))
    findings = run(toys, "--predict", "off")
    assert "Holm's correction" not in (toys / "out" / "plan" / "transfer.md").read_text()  # it has no gains
    warned = capsys.readouterr().err
    assert "warning: replay is left out of the sequence: the training rows are no .jsonl files" in warned
    assert "warning: joint is left out of the sequence: the training rows are no .jsonl files" in warned
    assert findings.sequence.keys() == {"naive", "lwf", "alone"}
    naive = findings.sequence["naive"]
    # the model is worth 0, 1, 0, 0 before the first task and after each; each score is 50 + 30 times the worth
    wanted = {(0, 0): 50, (1, 0): 50, (1, 1): 80, (2, 0): 50, (2, 1): 50, (2, 2): 50}
    assert naive.scores == pytest.approx({place: value + 1.5 for place, value in wanted.items()}, abs=0.5)
    assert naive.average.mean == pytest.approx(51.5, abs=0.5)
    assert naive.forgetting.mean == pytest.approx(15, abs=0.5)  # task 1: 0, task 2: 80 - 50
    assert naive.backward.mean == pytest.approx(-15, abs=0.5)
    assert findings.sequence["alone"].average.mean == pytest.approx(51.5, abs=0.5)
    report = (toys / "out" / "plan" / "transfer.md").read_text()
    assert "- After the sequence, naive has an average accuracy of 51." in report
    assert "## Sequence, task by task" in report
    content = json.loads((toys / "out" / "plan" / "transfer.json").read_text())
    assert content["sequence"]["lwf"]["forgetting"]["mean"] == pytest.approx(15, abs=0.5)
    words = [json.loads(path.read_text())["words"] for path in (toys / "out" / "runs").glob("*.json")]
    assert sum("lwf" in of_run for of_run in words) == 4  # two later tasks, two seeds
    (toys / "plan.yaml").write_text(SEQUENCE.format(tiny=tiny).replace("--keep none", "--keeps none"))
    with pytest.raises(InputError, match="unknown argument --keeps; did you mean --keep"):
        run(toys, "--predict", "off")


def test_measures_of_a_sequence_are_those_of_the_papers():
    def arm(*scores: float) -> Arm:
        return Arm(np.array(scores), np.tile(np.array(scores)[:, None], DRAWS), 10)

    r = {(0, 0): arm(80, 60), (1, 0): arm(70, 70), (2, 0): arm(50, 40), (1, 1): arm(90, 90), (2, 1): arm(60, 80)}
    assert [kept_by(words) for words in ((), ("--keep", "ewc"), ("--a", "b", "--keep=lwf"))] == [None, "ewc", "lwf"]
    found = _learned(r | {(2, 2): arm(70, 60)}, last=2)
    assert found.average.mean == pytest.approx((50 + 60 + 70 + 40 + 80 + 60) / 6)
    assert found.forgetting.mean == pytest.approx((80 - 50 + 90 - 60 + 70 - 40 + 90 - 80) / 4)
    assert found.backward.mean == pytest.approx((50 - 80 + 60 - 90 + 40 - 60 + 80 - 90) / 4)


def test_training_files_are_joined_without_ids(toys):
    lines = {"a": '{"id": 1, "text": "x"}\n\n', "b": '{"id": 1, "text": "y"}\n'}
    for name, text in lines.items():
        (toys / f"{name}.jsonl").write_text(text)
    tasks = [Tasks().load("toy", ("--train_file", str(toys / f"{name}.jsonl"))) for name in lines]
    file = joined(tasks, "train_file", toys / "out")
    assert Path(file).read_text() == '{"text": "x"}\n{"text": "y"}\n'
    assert why_not_joined(tasks, same_labels=True) is None
    assert (
        why_not_joined([*tasks, Tasks().load("toy", ())], same_labels=True) == "the training rows are no .jsonl files"
    )


def test_the_signs_rank_without_training(toys, capsys):
    findings = run(toys, "--predict", "only")
    assert set(findings.signs["play"]) == {"school", "street"}
    assert findings.signs["play"]["school"]["similarity"] == pytest.approx(1)
    assert findings.signs["play"]["school"]["labels"] == 1
    assert "sources for play, by signs that need no training" in capsys.readouterr().out
    assert not (toys / "out" / "runs").exists()
    assert "## Prediction" in (toys / "out" / "plan" / "transfer.md").read_text()


def test_a_failed_run_is_told_and_tried_again_by_the_next_call(toys, capsys):
    text = (toys / "plan.yaml").read_text().replace("forgetting: true", "")
    broken = text.replace("--teaches 1", "--teaches 1 --fail 2").replace("targets:", "forgetting: false\ntargets:")
    (toys / "plan.yaml").write_text(broken)
    findings = run(toys, "--predict", "off", "--seeds", "1", "2")
    told = capsys.readouterr()
    assert "school: toy, seed 2: it was told to fail" in told.out
    assert "warning: failed runs: 1, runs left: 3; run the same command again for them" in told.err
    assert findings.cells["play", "school", 10].error == "it was told to fail"
    assert findings.cells["play", "street", 10].scores
    assert "failed" in (toys / "out" / "plan" / "transfer.md").read_text()
    begun = len(list((toys / "out" / "runs").glob("*.json")))
    run(toys, "--predict", "off", "--seeds", "1", "2")
    assert "3 of " in capsys.readouterr().out
    assert len(list((toys / "out" / "runs").glob("*.json"))) == begun


def test_a_budget_that_is_too_small_is_told_before_training(toys):
    with pytest.raises(InputError, match=r"budget: 0.1 minutes, but the \d+ runs that are left take about \d+ minutes"):
        run(toys, "--predict", "off", "--budget", "0.1")
    assert not list((toys / "out").glob("runs/*.json"))


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        (
            "translation",
            "",
            "sources: street: cannot feed play: translation trains an encoder-decoder, and toy needs an en",
        ),
        (
            "clm",
            "--train_file {file} --validation_file {file}",
            "sources: street: cannot feed play: clm trains a new decoder, and toy needs an encoder",
        ),
        ("ner", "--lerning_rate 1", "sources: street: unknown argument --lerning_rate; did you mean --learning_rate?"),
        ("ner", "--train_file {file}", "sources: street: {file}:1: "),
    ],
)
def test_a_source_that_cannot_feed_its_target_is_named(toys, recipe, arguments, message, monkeypatch):
    file = toys / "rows.jsonl"
    text = re.sub(r"^model: .*$", "", (toys / "plan.yaml").read_text(), flags=re.MULTILINE)
    street = f"recipe: {recipe}, arguments: {arguments.format(file=file)}}}"
    (toys / "plan.yaml").write_text(re.sub(r"recipe: toy, arguments: --train_file \S+}", street, text))
    for name in ("translation", "clm", "ner"):
        (toys / "recipes" / name).symlink_to(ROOT / "recipes" / name)
    with pytest.raises(InputError, match=re.escape(message.format(file=file))):
        run(toys)


def test_rows_that_are_not_there_and_a_recipe_without_scores_are_told(toys):
    (toys / "recipes" / "mlm").symlink_to(ROOT / "recipes" / "mlm")
    text, file = (toys / "plan.yaml").read_text(), toys / "rows.jsonl"
    texts = f"mlm, arguments: --train_file {file} --validation_file {file}, rows: [10]"
    (toys / "plan.yaml").write_text(text.replace("rows: [10, all]", "rows: [10, 60]"))
    with pytest.raises(InputError, match="targets: play: rows 60: there are 50 training rows; give all, or less"):
        run(toys)
    (toys / "plan.yaml").write_text(re.sub("model: .*", "", text).replace("toy, rows: [10, all]", texts))
    with pytest.raises(InputError, match="targets: play: mlm: has no score of single test rows, so it can be a source"):
        run(toys)
    (toys / "recipes" / "toy" / "transfer.py").unlink()
    (toys / "plan.yaml").write_text(text)
    with pytest.raises(InputError, match=r"toy: has no recipes/toy/transfer.py, which tells its rows and scores"):
        run(toys)


def test_equal_runs_of_two_plans_have_equal_keys_and_edited_files_other_ones(toys):
    def keys() -> list[str]:
        return [one.key for one in build(read_plan(toys / "plan.yaml"), Tasks(), toys / "out").runs()]

    before = keys()
    assert len(before) == len(set(before)) == 3 * (8 + 2 + 2)  # cells, sources, forgetting
    plan = toys / "plan.yaml"
    moved = toys / "moved.jsonl"
    (toys / "rows.jsonl").rename(moved)
    plan.write_text(plan.read_text().replace(str(toys / "rows.jsonl"), str(moved)))
    assert keys() == before
    moved.write_text('{"text": "edited"}\n')
    assert len(set(keys()) - set(before)) == 3 * 4  # street, its two cells, and its forgetting


def test_a_source_that_is_a_target_shares_its_runs(toys):
    text = (
        (toys / "plan.yaml").read_text().partition("targets:")[0]
        + """
targets:
  a: {recipe: toy, arguments: --teaches 1, score: f1, rows: [0, 10, all]}
  b: {recipe: toy, arguments: --teaches 2, rows: [0, all]}
sources:
  pretrained: {}
  domains: {kind: domain, of: targets}
"""
    )
    (toys / "plan.yaml").write_text(text)
    chains = build(read_plan(toys / "plan.yaml"), Tasks(), toys / "out")
    assert chains.first["b", "a"] == chains.cells["a", "pretrained", None]
    zero = chains.cells["b", "a", 0][0]
    assert zero.only_scores
    assert zero.start == chains.cells["a", "pretrained", None][0]
    # one label set and one recipe: the model of the target is scored as it is
    assert chains.forgetting["b", "a"][0].start == chains.cells["b", "a", None][0]
    assert chains.first_scores == {("b", "a"): "f1", ("a", "b"): "accuracy"}
    order = [run.key for run in chains.runs()]
    assert all(order.index(need.key) < order.index(one.key) for one in chains.runs() for need in one.needs())


TAGGER, ENCODER = BertForTokenClassification, BertModel  # the weights of an encoder alone have no prefix


@pytest.mark.parametrize("kinds", [(TAGGER, BertForSequenceClassification), (TAGGER, ENCODER), (ENCODER, TAGGER)])
def test_the_head_of_a_source_is_put_on_the_weights_of_a_target(tiny, tmp_path, tokenizer, kinds):
    folders = dict(zip(("head", "body"), kinds, strict=True))
    for seed, (name, kind) in enumerate(folders.items()):
        torch.manual_seed(seed)
        model = kind.from_pretrained(tiny, num_labels=3)
        for weight in model.parameters():
            weight.data += seed
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    graft(tmp_path / "head", tmp_path / "body", tmp_path / "new")
    new, head, body = (load_file(tmp_path / name / "model.safetensors") for name in ("new", "head", "body"))
    assert new.keys() == head.keys()
    body = {name.removeprefix("bert."): value for name, value in body.items()}
    for name, value in new.items():
        own = name.startswith("classifier") or name.removeprefix("bert.") not in body  # a tagger has no pooler
        assert torch.equal(value, head[name] if own else body[name.removeprefix("bert.")]), name
    kinds[0].from_pretrained(tmp_path / "new")


def test_random_weights_have_the_architecture_and_the_tokenizer_of_the_model(tiny, tmp_path):
    for seed in (1, 2):
        random_checkpoint(Random(tiny, seed), tmp_path / str(seed))
    first, second, base = (AutoModel.from_pretrained(path) for path in (tmp_path / "1", tmp_path / "2", tiny))
    apart = {"dtype": None, "_name_or_path": None, "architectures": None}
    assert first.config.to_dict() | apart == base.config.to_dict() | apart
    name = "encoder.layer.0.attention.self.query.weight"
    weights = [model.state_dict()[name] for model in (first, second, base)]
    assert not any(torch.equal(a, b) for a, b in zip(weights, weights[1:] + weights[:1], strict=True))
    assert (tmp_path / "1" / "tokenizer.json").read_bytes() == (Path(tiny) / "tokenizer.json").read_bytes()


def toy_run(start: Random | None = None) -> Run:
    task = Tasks().load("toy", ())
    return Run(task, (), 1, start, None, "a run", task.identity)


def test_a_random_model_is_made_once_for_its_run(toys, tiny):
    store, run = Store(toys / "out"), toy_run(Random(tiny, 1))
    folder = store.model_of(run)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert store.model_of(run) == folder == store.made_for(run)
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert [path.name for path in (toys / "out" / "models").iterdir()] == [run.key]


def test_a_result_of_another_process_replaces_an_error(toys):
    store, other, run = Store(toys / "out"), Store(toys / "out"), toy_run()
    store.output(run).mkdir(parents=True)
    store.keep(run, {"error": "no memory"})
    assert store.result(run, fresh=True) == {"error": "no memory"}
    other.keep(run, {"scores": {}})
    assert store.result(run, fresh=True) == {"scores": {}}


def test_a_run_that_is_trained_again_has_neither_result_nor_model_until_it_ends(toys):
    store, run = Store(toys / "out"), toy_run()
    checkpoint = store.output(run) / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").touch()
    store.keep(run, {"scores": {}})
    store.begin(run)
    assert store.result(run, fresh=True) is None
    assert not store.has_model(run)
    assert checkpoint.exists()  # it is resumed
    (store.output(run) / "model.safetensors").touch()
    store.drop_checkpoints(run)
    assert not checkpoint.exists()
    assert store.has_model(run)
    store.forget(run)
    assert not store.output(run).exists()


@contextmanager
def claimed_elsewhere(file: Path) -> Iterator[None]:
    """Claim a run for another process, within a `with` block."""
    code = f"from common.tools.transfer.claims import claim; from pathlib import Path; claim(Path({str(file)!r}))"
    code += "; print(flush=True); import time; time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_fresh_trains_all_runs_again_and_removes_none_before_the_budget_is_checked(toys, capsys):
    (toys / "plan.yaml").write_text((toys / "plan.yaml").read_text().replace("targets:", "forgetting: false\ntargets:"))
    run(toys, "--predict", "off", "--seeds", "1")
    report = (toys / "out" / "plan" / "transfer.md").read_text()
    assert re.search(r"- Intermediate training on school: on play at 10 rows .*; with one seed, no effect is", report)
    files = {path: path.stat().st_mtime_ns for path in (toys / "out" / "runs").glob("*.json")}
    with pytest.raises(InputError, match=r"budget: 0.01 minutes, but the 10 runs that are left"):
        run(toys, "--predict", "off", "--seeds", "1", "--fresh", "--budget", "0.01")
    assert {path: path.stat().st_mtime_ns for path in files} == files
    capsys.readouterr()
    stopped = toys / "out" / "runs" / "0.claim"
    with claimed_elsewhere(stopped), pytest.raises(InputError, match="--fresh: another process trains runs in "):
        run(toys, "--predict", "off", "--seeds", "1", "--fresh")
    assert {path: path.stat().st_mtime_ns for path in files} == files
    run(toys, "--predict", "off", "--seeds", "1", "--fresh")
    told = capsys.readouterr()
    assert "14 of 14: " in told.out  # those for equal cost too
    assert "--fresh trains all again" not in told.err
    assert all(path.stat().st_mtime_ns > before for path, before in files.items())


def test_what_cannot_be_trained_is_told_before_training(toys):
    text = (toys / "plan.yaml").read_text()
    (toys / "plan.yaml").write_text(text.replace("pretrained: {}", "pretrained: {then: --lerning_rate 1}"))
    with pytest.raises(InputError, match="sources: pretrained: unknown argument --lerning_rate"):
        run(toys)
    (toys / "recipes" / "ner").symlink_to(ROOT / "recipes" / "ner")
    only = text.partition("  school:")[0].replace("rows: [10, all]", "rows: [0]")
    (toys / "plan.yaml").write_text(only + "  names: {kind: domain, recipe: ner}\n")
    with pytest.raises(InputError, match="targets: play: no source can be scored at 0 rows; add other rows"):
        run(toys)


def test_longer_training_counts_from_the_epochs_of_the_baseline(toys):
    text = (toys / "plan.yaml").read_text().replace("pretrained: {}", "pretrained: {then: --num_train_epochs 4}")
    (toys / "plan.yaml").write_text(text)
    chains = build(read_plan(toys / "plan.yaml"), Tasks(), toys / "out")
    place = ("play", "school", 10)
    assert time_factors(chains, lambda run: 10.0)[place] == 1.5**2  # twice as long
    assert time_factors(chains, lambda run: 10.0, lambda runs: False) == {}
    assert "equal cost of school at play, 10 rows, is unknown: its runs and those of pretrained" in chains.notes[0]
    add_longer(chains, {place: 1.5})
    assert chains.longer[place][0].words[-2:] == ("--num_train_epochs", "6")


def test_a_part_of_the_rows_is_not_joined(toys, tiny):
    for name in "ab":
        (toys / f"{name}.jsonl").write_text('{"text": "a"}\n')
    text = SEQUENCE.format(tiny=tiny).replace("[one, two, three]", "[a, b]").partition("targets:")[0]
    targets = "".join(f"  {n}: {{recipe: toy, arguments: --train_file {n}.jsonl, rows: [10]}}\n" for n in "ab")
    (toys / "plan.yaml").write_text(f"{text}targets:\n{targets}sources: {{pretrained: {{}}}}\n")
    chains = build(read_plan(toys / "plan.yaml"), Tasks(), toys / "out")
    add_sequence(chains, Tasks(), toys / "out")
    why = "a part is trained, and only whole files are joined; give all"
    left_out = (("replay", "a"), ("joint", "a, b"))
    assert chains.notes == [f"{name} is left out of the sequence: rows: {rows}: {why}" for name, rows in left_out]


def test_scores_up_to_100_are_points_already():
    scores = {"translation": "bleu", "summarization": "rouge_mean", "ner": "f1", "sentiment": "macro_f1", "qa": "f1"}
    found = {recipe: statistics_of(recipe)([], score).points for recipe, score in scores.items()}
    assert found == {"translation": 1, "summarization": 1, "ner": 100, "sentiment": 100, "qa": 100}


def test_the_last_value_of_an_argument_counts_in_an_estimate(toys, tiny):
    estimate = Estimate()
    estimate.token_seconds = lambda name, size: {(tiny, None): 1e-3}[name, size]
    task = Tasks().load("toy", ("--model_name_or_path", tiny))
    one, two = (Run(task, ("--num_train_epochs", n), 1) for n in ("10", "20"))
    both = replace(two, words=one.words + two.words)
    assert estimate.seconds(one) < estimate.seconds(two) == estimate.seconds(both)


def test_an_estimate_counts_the_size_of_a_new_model(tmp_path):
    estimate = Estimate()
    estimate.token_seconds = lambda name, size: {"tiny": 1e-5, "base": 1e-3}[size]
    (tmp_path / "texts.txt").write_text("".join(f"Tram {n} stops here.\n" for n in range(40)))
    words = ("--train_file", str(tmp_path / "texts.txt"), "--tokenizer_train", "wordpiece", "--model_size")
    tiny, base = (Run(Tasks().load("mlm", (*words, size)), (), 1) for size in ("tiny", "base"))
    assert estimate.seconds(tiny) - START_UP == pytest.approx((estimate.seconds(base) - START_UP) / 100)


REAL = """
seeds: [1, 2]
model: {tiny}
targets:
  reviews:
    recipe: sentiment
    arguments: --precision fp32 --max_seq_length 64 --max_eval_samples 20 --max_predict_samples 60 --max_steps 3
    rows: [20, 40]
sources:
  scratch: {{}}
  pretrained: {{}}
  own:
    kind: adapted
    recipe: mlm
    texts: target
    arguments: --precision fp32 --max_seq_length 64 --max_eval_samples 10 --max_steps 2
  names:
    kind: intermediate
    recipe: ner
    rows: 40
    arguments: --precision fp32 --max_seq_length 64 --max_eval_samples 10 --max_predict_samples 20 --max_steps 3
"""


@pytest.mark.soak
def test_a_killed_plan_goes_on_where_it_was(tiny, tmp_path):
    (tmp_path / "plan.yaml").write_text(REAL.format(tiny=tiny))
    command = [sys.executable, "-m", "common.tools.transfer", "--plan", str(tmp_path / "plan.yaml"), "--at_once", "2"]
    command += ["--folder", str(tmp_path / "out")]
    runs = tmp_path / "out" / "runs"
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        first = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while first.poll() is None and not (len(list(runs.glob("*.json"))) >= 3 and list(runs.glob("*.claim"))):
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    before = {path.name: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert len(before) >= 3
    assert list(runs.glob("*.claim"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in its record" not in done.stderr  # the rows give the scores of the runs
    after = {path.name: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert {name: after[name] for name in before} == before
    assert not list(runs.glob("*.claim"))
    content = json.loads((tmp_path / "out" / "plan" / "transfer.json").read_text())
    assert [cell["error"] for cell in content["cells"] if cell["error"]] == []
    assert all(cell["score"] is not None and len(cell["scores"]) == 2 for cell in content["cells"])
    assert [one["source"] for one in content["forgetting"]] == ["names"]
    assert {cell["source"] for cell in content["cells"] if cell["net"]} >= {"own", "names"}
    assert set(content["signs"]["reviews"]) == {"own", "names"}


def test_every_recipe_says_what_transfer_reads_of_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in sorted(ROOT.glob("recipes/*/transfer.py")):
        module = importlib.import_module(f"recipes.{path.parent.name}.transfer")
        assert callable(module.training_rows)
