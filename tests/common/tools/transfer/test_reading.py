"""Test that a plan is read, and that each mistake in it is named with its place and a remedy."""

import importlib
import re
from pathlib import Path

import pytest

from common.cli import parse, training_module
from common.errors import InputError
from common.tools.transfer.plan import Stage
from common.tools.transfer.reading import read_plan
from tests.conftest import ROOT

PLANS = sorted((ROOT / "common" / "tools" / "plans").glob("*.yaml"))
GOOD = """
targets:
  mine: {recipe: ner, rows: [100, all]}
sources:
  pretrained: {}
  scratch: {}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_plan_has_targets_and_sources_in_the_order_of_their_kinds(tmp_path):
    plan = read_plan(write(tmp_path, GOOD + "  other:\n    kind: intermediate\n    recipe: qa\n    rows: 50\n"))
    assert [source.name for source in plan.sources] == ["scratch", "pretrained", "other"]
    assert plan.targets[0].rows == (100, None)
    assert plan.source("other").stages == (Stage("qa", (), 50),)
    assert (plan.seeds, plan.baseline, plan.budget, plan.title) == ((1, 2, 3), "pretrained", None, "plan")
    assert not plan.source("other").serves(plan.targets[0], 0)


def test_a_part_of_a_plan_has_some_of_its_targets_and_numbers_of_rows(tmp_path):
    text = GOOD.replace("sources:", "  yours: {recipe: qa, rows: [10, 50]}\nsources:")
    plan = read_plan(write(tmp_path, text + "  far: {kind: intermediate, recipe: qa, only: [yours]}\n"))
    assert plan.part(None, None) == plan
    part = plan.part(["mine"], 100)
    assert [(target.name, target.rows) for target in part.targets] == [("mine", (100,))]
    assert [source.name for source in part.sources] == ["scratch", "pretrained"]
    with pytest.raises(InputError, match="--targets his: the plan has no such target; choose from mine, yours"):
        plan.part(["his"], None)
    with pytest.raises(InputError, match="--most_rows 20: leaves mine without runs"):
        plan.part(None, 20)


def test_each_target_is_a_source_for_the_others(tmp_path):
    text = """
seeds: 5
budget: 1.5 hours
targets:
  a: {recipe: ner, arguments: {num_train_epochs: 2, repair_bio: true}, rows: [0, 10]}
  b: {recipe: ner, rows: 10}
  c: {recipe: qa}
sources:
  pretrained: {}
  domains: {kind: domain, of: targets, only: [a, b], arguments: --seed_of_nothing 1}
"""
    plan = read_plan(write(tmp_path, text))
    assert [(source.name, source.task) for source in plan.sources[1:]] == [("a", "a"), ("b", "b")]
    words = ("--num_train_epochs", "2", "--repair_bio", "true", "--seed_of_nothing", "1")
    assert plan.source("a").stages == (Stage("ner", words),)
    assert plan.source("b").serves(plan.target("a"), 0)
    assert not plan.source("a").serves(plan.target("a"), 10)
    assert not plan.source("a").serves(plan.target("c"), None)
    assert (plan.seeds, plan.budget) == ((5,), 90)


def test_values_of_arguments_are_read_as_written(tmp_path):
    written = "{text_column_name: no, max_seq_length: 007, learning_rate: 2e-5, ignore_labels: [yes, 1.0], nothing: }"
    read = ["--text_column_name no", "--max_seq_length 007", "--learning_rate 2e-5", "--ignore_labels yes 1.0"]
    words = (*" ".join(read).split(), "--nothing")
    sequence = f"sequence: {{order: [mine, his], methods: {{kept: {written}}}}}\ntargets:\n  his: {{recipe: ner}}"
    text = GOOD.replace("recipe: ner, ", f"recipe: ner, arguments: {written}, ").replace("targets:", sequence)
    plan = read_plan(write(tmp_path, text + f"  head:\n    kind: frozen\n    then: {written}\n"))
    assert plan.target("mine").words == plan.source("head").then == plan.sequence.methods["kept"] == words


def test_only_values_of_arguments_are_read_as_written(tmp_path):
    text = """
targets:
  then: {recipe: ner, arguments: &some {text_column_name: no}, rows: [3]}
sources:
  pretrained: {}
  head: {kind: frozen, then: {<<: *some, ignore_labels: [no, null]}}
"""
    plan = read_plan(write(tmp_path, text))
    assert plan.target("then").rows == (3,)
    assert plan.target("then").words == ("--text_column_name", "no")
    assert plan.source("head").then == ("--text_column_name", "no", "--ignore_labels", "no")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("rows: [100", "row: [100", "targets: mine: unknown key row; did you mean rows?"),
        ("targets:", "target:", "unknown key target; did you mean targets?"),
        ("recipe: ner", "recipe: nre", "targets: mine: recipe nre: no such recipe; did you mean ner?"),
        ("recipe: ner, ", "", "targets: mine: recipe is missing; choose one of clm, "),
        ("rows: [100, all]", "rows: [100, 100]", "targets: mine: rows [100, 100]: a number is repeated"),
        ("rows: [100, all]", "rows: [-1]", "targets: mine: rows is -1; give a number of at least 0, or all"),
        ("rows: [100, all]", "rows: [0, 10]", "targets: mine: rows 0: no source of kind domain or multilingual"),
        ("scratch: {}", "scrach: {}", "sources: scrach: kind is missing; choose one of scratch, "),
        ("scratch: {}", "x: {kind: [scratch]}", "sources: x: kind ['scratch']: no such kind"),
        ("scratch: {}", "scratch: {only: 5}", "sources: scratch: only 5: no such target"),
        ("targets:", "sequence: {order: 5}\ntargets:", "sequence: order 5: no such target"),
        ("recipe: ner, ", "recipe: ner, arguments: [--seed, 1], ", "mine: arguments are a list; write them as text"),
        ("scratch: {}", "x: {kind: domian}", "sources: x: kind domian: no such kind; did you mean domain?"),
        ("scratch: {}", "x: {kind: domain}", "sources: x: recipe is missing; choose one of"),
        ("scratch: {}", "x: {kind: frozen, rows: 5}", "sources: x: rows: kind frozen trains nothing before the target"),
        ("scratch: {}", "x: {kind: frozen, only: [mime]}", "sources: x: only mime: no such target; did you mean mine?"),
        ("scratch: {}", "x: {kind: frozen, of: targets}", "sources: x: of is 'targets'; write of: targets, with"),
        ("scratch: {}", "x: {kind: domain, stages: []}", "sources: x: stages: give a list"),
        (
            "scratch: {}", "x: {kind: adapted, recipe: mlm, texts: target, arguments: --train_file Makefile}",
            "sources: x: texts: target and --train_file exclude each other",
        ),
        ("scratch: {}", "mine: {kind: domain, of: targets}\n  other: {kind: domain, of: targets}", "two sources have"),
        ("pretrained: {}", "frozen: {}", "baseline: pretrained: no such source; add it to the sources"),
        ("  scratch: {}\n", "", "sources: only the baseline is here"),
        ("targets:", "baseline: none\ntargets:", "baseline: none: no such source; name one of the sources"),
        ("targets:", "sequence: {order: [mine]}\ntargets:", "sequence: order: give at least two targets"),
        ("targets:", "sequence: {order: [mine, mein]}\ntargets:", "order mein: no such target; did you mean mine?"),
        ("targets:", "sequence: {order: [mine, mine]}\ntargets:", "order mine: is repeated; name each target once"),
        ("targets:", "sequence: {methods: {joint: --keep ewc}}\ntargets:", "methods joint: is the name of a bound"),
        ("targets:", "sequence: {methods: {a: --after b}}\ntargets:", "methods a: --after: is set by the sequence"),
        ("targets:", "seeds: [1, 1]\ntargets:", "seeds: [1, 1]: a seed is repeated"),
        ("targets:", "seeds: many\ntargets:", "seeds: is 'many'; give whole numbers"),
        ("targets:", "budget: soon\ntargets:", "budget: is 'soon'; give minutes, such as: 90 minutes, 3 hours"),
        ("targets:", "equal_cost: maybe\ntargets:", "equal_cost: is 'maybe'; write true or false"),
        ("ner, rows", "ner, arguments: --seed 3, rows", "mine: --seed: is set by the plan; give seeds instead"),
        ("ner, rows", "ner, arguments: --max_train_samples=3, rows", "--max_train_samples: is set by the plan; give"),
        ("ner, rows", "ner, arguments: {model_name_or_path: x}, rows", "--model_name_or_path: is set by the plan; gi"),
        ("ner, rows", "ner, arguments: --train_file Makefil, rows", "--train_file Makefil: no such file; did you me"),
        ("ner, rows", "ner, arguments: --train_file $NOT_SET/a, rows", "NOT_SET is not set; run: NOT_SET=/your/folder"),
        ("ner, rows", "ner, arguments: \"'open\", rows", "targets: mine: arguments: No closing quotation"),
        ("{recipe: ner, rows: [100, all]}", "ner", "targets: mine: is 'ner'; write keys and values: recipe,"),
        ("targets:\n  mine: {recipe: ner, rows: [100, all]}", "targets:", "targets: write a name for each"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place(tmp_path, monkeypatch, before, after, message):
    monkeypatch.chdir(ROOT)
    assert before in GOOD
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        read_plan(write(tmp_path, GOOD.replace(before, after)))
    assert all(line.startswith((str(tmp_path / "plan.yaml"), "...")) for line in str(raised.value).split("\n"))


def test_files_that_are_no_plan_are_named(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(InputError, match=r"--plan .*plan.yml: no such file; did you mean .*plan.yaml\?"):
        read_plan(tmp_path / "plan.yml")
    for text in ("[1, 2]", "just text", ""):
        with pytest.raises(InputError, match="not a plan; write the keys targets and sources"):
            read_plan(write(tmp_path, text))
    broken = {
        "a: [1\nb: {": "",
        "seeds: [1]\nseeds: [2]": ": line 2: seeds is given twice; remove one",
        "sources:\n  x: &x {kind: *x}": ": line 2: a value contains itself by its anchor",
        "title: 2026-13-45": ": month must be in 1..12",
    }
    for text, message in broken.items():
        with pytest.raises(InputError, match=rf"--plan .*plan.yaml{message}"):
            read_plan(write(tmp_path, text))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_plans_of_this_folder_are_right_about_the_arguments_of_recipes(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DATA", str(tmp_path))
    text = path.read_text(encoding="utf-8").replace(" outputs/", f" {tmp_path}/outputs/")
    for file in re.findall(r"_file (?:\$DATA|\S*(?=/outputs))(/\S+)", text):
        if "*" not in file:
            (tmp_path / file[1:]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file[1:]).touch()
    plan = read_plan(write(tmp_path, text))
    commands = {(target.recipe, target.words) for target in plan.targets}
    for source in plan.sources:
        commands |= {(stage.recipe, stage.words) for stage in source.stages}
        commands |= {(target.recipe, target.words + source.then) for target in plan.targets if source.serves(target, 1)}
    for method in plan.sequence.methods.values() if plan.sequence else ():
        commands |= {(plan.target(name).recipe, plan.target(name).words + method) for name in plan.sequence.order}
    for recipe, words in commands:
        parse(importlib.import_module(training_module(recipe)).ARGUMENTS, list(words))
    assert plan.budget is not None
