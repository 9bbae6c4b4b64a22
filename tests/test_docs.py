"""Test that every documented command is accepted by its program, and that each recipe is complete."""

import ast
import importlib
import re
import shlex
import subprocess

import pytest

from common.cli import _Parser
from tests.conftest import ROOT

RECIPES = {path.parent.name for path in (ROOT / "recipes").glob("*/train.py")}
#: targets of make -> module that trains
TARGETS = {
    f"{path.parent.name}{path.stem.removeprefix('train').replace('_', '-')}": f"recipes.{path.parent.name}.{path.stem}"
    for path in (ROOT / "recipes").glob("*/train*.py")
}
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "common" / "README.md",
    ROOT / "common" / "data" / "README.md",
    ROOT / "common" / "tools" / "RESULTS.md",
    ROOT / "common" / "training" / "README.md",
    *(ROOT / "recipes").glob("*/*.md"),
    *(ROOT / "tests" / "benchmarks").glob("*.md"),
    *(ROOT / "common" / "launch").glob("*.yaml"),
]
PROGRAMS = [
    *(path for path in (ROOT / "recipes").glob("*/*.py") if path.name != "__init__.py"),
    ROOT / "common" / "tools" / "compare.py",
    ROOT / "common" / "tools" / "sweep.py",
    ROOT / "common" / "tools" / "annotate" / "__main__.py",
    ROOT / "common" / "tools" / "annotate" / "simulate.py",
    ROOT / "common" / "tools" / "transfer" / "__main__.py",
]
MODULE = re.compile(r"-m recipes\.(\w+)\.(\w+)(.*)")


def commands() -> list[tuple[str, str]]:
    """Return (file, command) of each line in a code block or docstring that runs make or a recipe."""
    found = []
    for path in DOCUMENTS + PROGRAMS:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        if path.suffix == ".md":
            blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
            text = "\n".join(block for language, block in blocks if language in ("", "bash", "sh"))
        elif path.suffix == ".py":
            text = text.split('"""')[1]
        variables = dict(re.findall(r'^([A-Z]+)="(.*)"$', text, re.MULTILINE))  # shell variables
        for line in text.splitlines():
            line = line.strip().removeprefix("# ").split("  #")[0].strip()
            line = re.sub(r"\$([A-Z]+)", lambda name, values=variables: values[name[1]], line)
            line = re.sub(r"^([A-Z_]+=\w+ )+", "", line)  # variables of the environment
            if re.match(r"(make|python|torchrun|accelerate|cp) ", line):
                found += [(str(path.relative_to(ROOT)), part) for part in line.split(" && ")]
    return found


def understood(recipe: str, program: str, words: list[str]) -> None:
    module = importlib.import_module(f"recipes.{recipe}.{program}")
    _Parser(module.ARGUMENTS, None, show_all=False).parse(words)


def beside_the_recipe(program: str, words: list[str]) -> None:
    """Assert that `common.tools.compare` or `common.tools.sweep` accepts `words`, and the recipe accepts the rest."""
    options, rest = importlib.import_module(f"common.tools.{program}").read_options(words)
    understood(options.recipe, "train", rest)
    if program == "compare":
        assert options.methods or options.settings
        for method in options.methods:
            understood(options.recipe, "train", ["--tuning", method])


@pytest.mark.parametrize(("file", "command"), commands())
def test_documented_commands_are_understood(file, command):
    if command.startswith("cp "):
        assert command.split()[:3] == ["cp", "-r", "recipes/ner"]
        return
    if match := MODULE.search(command):
        recipe, program, rest = match.groups()
        understood(recipe, program, shlex.split(rest))
        for config in re.findall(r"--config_file (\S+)", command):
            assert (ROOT / config).is_file()
        return
    if match := re.search(r"-m common\.tools\.(compare|sweep) (.*)", command):
        beside_the_recipe(match[1], shlex.split(match[2]))
        return
    if match := re.search(r"-m common\.tools\.annotate simulate (.*)", command):
        options, rest = importlib.import_module("common.tools.annotate.simulate").read_options(shlex.split(match[1]))
        understood(options.recipe, "train", rest)
        return
    if match := re.search(r"-m common\.tools\.annotate (\w+) (.*)", command):
        understood(match[1], "annotate", shlex.split(match[2]))
        return
    if match := re.search(r"-m common\.tools\.transfer (.*)", command):
        importlib.import_module("common.tools.transfer.__main__").read_options(shlex.split(match[1]))
        return
    if match := re.search(r"-m (tests\.\w+\.\w+)", command):
        assert (ROOT / (match[1].replace(".", "/") + ".py")).is_file()
        return
    words = shlex.split(command)
    assert words[0] == "make", command
    targets = [word for word in words[1:] if "=" not in word]
    variables = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert target in {*TARGETS, "contracts"} or re.search(rf"^{target}:", makefile, re.MULTILINE), command
    assert set(variables) <= set(re.findall(r"\$\((\w+)\)", makefile)), command
    if targets[0] in TARGETS:
        _, recipe, script = TARGETS[targets[0]].split(".")
        understood(recipe, script, shlex.split(variables.get("ARGS", "")))
    if targets[0] == "annotate":
        given = {"input": "INPUT", "output": "OUTPUT", "model": "MODEL", "n": "N", "strategy": "STRATEGY"}
        options = [f"--{name} {variables[variable]}" for name, variable in given.items() if variable in variables]
        options = shlex.split(" ".join([*options, variables.get("ARGS", "")]))
        understood(variables.get("RECIPE", "ner"), "annotate", options)
    if targets[0] == "transfer":
        given = {"plan": "PLAN", "predict": "PREDICT", "seeds": "SEEDS"}
        options = [f"--{name} {variables[variable]}" for name, variable in given.items() if variable in variables]
        options = shlex.split(" ".join([*options, variables.get("ARGS", "")]))
        importlib.import_module("common.tools.transfer.__main__").read_options(options)
    if targets[0] in ("compare", "sweep"):
        given = {"methods": "METHODS", "settings": "SETTINGS"} if targets[0] == "compare" else {"trials": "TRIALS"}
        options = [f"--{name} {variables[variable]}" for name, variable in given.items() if variable in variables]
        options = shlex.split(" ".join([*options, variables.get("ARGS", "")]))
        beside_the_recipe(targets[0], [variables.get("RECIPE", "ner"), *options])


def test_there_are_commands_to_check():
    files = [file for file, _ in commands()]
    assert files.count("README.md") >= 8
    assert files.count("recipes/ner/README.md") >= 4
    for name in ("service.py", "histories.py", "recommend.py"):
        assert f"recipes/matching/{name}" in files


@pytest.mark.parametrize("readme", sorted((ROOT / "recipes").glob("*/README.md")), ids=lambda path: path.parent.name)
def test_a_recipe_readme_is_short_and_its_python_is_valid(readme):
    text = readme.read_text(encoding="utf-8")
    assert len(text.split()) <= 700
    assert "](RESULTS.md)" in text
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ast.parse(snippet)


def test_long_documents_have_a_list_of_contents():
    for path in [p for p in DOCUMENTS if p.suffix == ".md" and p != ROOT / "README.md"]:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > 100:
            assert text.count("](#") >= 3, path
            for anchor in re.findall(r"\]\(#([^)]+)\)", text):
                assert anchor in anchors(path), (path, anchor)


def anchors(path) -> set[str]:
    """Return the anchors of the headings of a Markdown file, as GitHub forms them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_each_recipe_is_whole():
    for recipe in RECIPES:
        folder = ROOT / "recipes" / recipe
        for name in ("train.py", "predict.py", "README.md", "RESULTS.md", "sweep.yaml"):
            assert (folder / name).is_file()


def test_the_readme_has_a_row_for_each_recipe_that_is_committed():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "recipes/*/train.py"], cwd=ROOT, capture_output=True, text=True)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = [line.split("/")[1] for line in listed.stdout.splitlines()]
    assert len(names) >= 7
    assert [name for name in names if f"recipes/{name}" not in readme] == []


@pytest.mark.parametrize("script", sorted((ROOT / "recipes").glob("*/train*.py")), ids=lambda path: path.parent.name)
def test_train_scripts_are_short_and_ordered(script):
    text = script.read_text(encoding="utf-8")
    tree = ast.parse(text)
    sections = re.findall(r"^    # (\w+)$", text, re.MULTILINE)
    assert sections == ["Arguments", "Data", "Model", "Trainer", "Train", "Test", "Save"]
    assert len(text.splitlines()) <= 170
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert main.end_lineno - main.lineno + 1 <= 100
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert sum(len(node.names) for node in imports) <= 30
    assert "losses=" in ast.get_source_segment(text, main)  # a copier must find the loss next to the Trainer


def test_readme_is_under_150_lines_and_links_hold():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    for path in [p for p in DOCUMENTS if p.suffix == ".md"]:
        for link, anchor in re.findall(r"\]\((?!http|#)([^)#]+)(#[^)]+)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path}: {link}"
            if anchor and path != ROOT / "README.md":
                assert anchor[1:] in anchors(path.parent / link), f"{path}: {link}{anchor}"


def test_common_never_imports_a_recipe_and_recipes_never_import_each_other():
    for path in (ROOT / "common").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) recipes", path.read_text(encoding="utf-8"), re.MULTILINE), path
    for path in (ROOT / "recipes").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) recipes", path.read_text(encoding="utf-8"), re.MULTILINE), path
