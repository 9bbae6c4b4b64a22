"""Test the packages of common/: few, ordered, without import cycles, and independent of the recipes."""

import ast
import importlib
import re
from dataclasses import fields, is_dataclass
from functools import cache
from graphlib import TopologicalSorter
from inspect import get_annotations
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.conftest import ROOT

#: from the bottom up; a package imports itself and earlier ones
ROOMS = (
    "errors", "hardware", "cli", "args", "data", "models", "speed", "tuning", "inference", "training", "run", "tools",
)  # fmt: skip
RECIPES = sorted(path.parent.name for path in ROOT.glob("recipes/*/train.py"))


def modules(folder: str) -> dict[str, Path]:
    """Return dotted name -> file of each module in a folder; a package has the name of its folder."""
    files = (ROOT / folder).rglob("*.py")
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


@cache
def imports(name: str, path: Path) -> set[str]:
    """Return the dotted names of a module's imports, including imports in functions: modules, or names in modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: len(name.split(".")) - node.level + (path.name == "__init__.py")]
            base = ".".join([*package, *filter(None, [node.module])]) if node.level else node.module
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def imported_modules(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Return the `known` modules that a module imports."""
    named = imports(name, path)
    return {other if other in known else other.rpartition(".")[0] for other in named} & known.keys()


def test_the_first_level_of_common_is_short():
    names = {path.name for path in (ROOT / "common").iterdir()} - {"__init__.py", "__pycache__", "README.md"}
    assert len(names) <= 15
    assert {name.removesuffix(".py") for name in names} == {*ROOMS, "launch"}


def test_no_import_runs_up():
    up = [
        f"{name} imports {other}"
        for name, path in modules("common").items()
        for other in imports(name, path)
        if other.startswith("common.") and ROOMS.index(other.split(".")[1]) > ROOMS.index(name.split(".")[1])
    ]
    assert not up


def test_no_import_runs_in_a_circle():
    known = modules("common") | modules("recipes")
    graph = {name: imported_modules(name, path, known) for name, path in known.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle
    assert order.index("common.errors") < order.index("common.run.run") < order.index("recipes.ner.train")


def test_common_imports_no_recipe_and_recipes_import_none_of_each_other():
    wrong = [
        f"{name} imports {other}"
        for name, path in (modules("common") | modules("recipes")).items()
        for other in imports(name, path)
        if other.startswith("recipes.") and other.split(".")[1] != (name.split(".") * 2)[1]
    ]
    assert not wrong


def declared(folder: str) -> dict[str, Any]:
    """Return name -> default of each argument that a dataclass in a folder's modules declares."""
    found: dict[str, Any] = {}
    for name in modules(folder):
        for kind in vars(importlib.import_module(name)).values():
            if (
                isinstance(kind, type)
                and is_dataclass(kind)
                and kind.__module__ == name
                and kind.__name__.endswith("Arguments")
            ):
                defaults = {field.name: field.default for field in fields(kind)}
                found |= {argument: defaults[argument] for argument in get_annotations(kind) if argument in defaults}
    return found


@cache
def known_to_common() -> dict[str, Any]:
    return declared("common") | {field.name: field.default for field in fields(transformers.TrainingArguments)}


@cache
def texts_in_code(path: Path) -> list[tuple[int, str]]:
    """Return line and text of each string in a module, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    documented = [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node, clean=False)]
    docstrings = {id(node.body[0].value) for node in documented}
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [(node.lineno, node.value) for node in strings if id(node) not in docstrings]


@cache
def names_in_code(path: Path) -> list[tuple[int, str]]:
    """Return line and text of each identifier in a module: functions, classes, variables and attributes."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    named = [(node, getattr(node, key, None)) for node in nodes for key in ("name", "attr", "id")]
    return [(getattr(node, "lineno", 0), text) for node, text in named if isinstance(text, str)]


@cache
def keys_in_code(path: Path) -> list[tuple[int, str]]:
    """Return line and text of each string that a module looks up: `row["x"]` or `row.get("x")`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        key = node.slice if isinstance(node, ast.Subscript) else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            key = node.args[0]
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            found.append((node.lineno, key.value))
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_common_knows_no_recipe(recipe):
    arguments = declared(f"recipes/{recipe}")
    own = arguments.keys() - known_to_common()
    assert own
    columns = {value for name, value in arguments.items() if name.endswith("_column_name") and value}
    columns -= {value for name, value in known_to_common().items() if name.endswith("_column_name")}
    option = re.compile(rf"--({'|'.join(sorted(own))})(?!\w)")
    word = re.compile(rf"(?<![a-z])(?<!back_){recipe}(?![a-z])")  # back_translation is an augmentation
    # one-word names such as `top` or `label` have other meanings elsewhere
    distinct = {name for name in own | columns if "_" in name}
    found = []
    for name, path in modules("common").items():
        texts, names = texts_in_code(path), names_in_code(path)
        found += [(name, *f) for f in texts if word.search(f[1]) or option.search(f[1])]
        found += [(name, *f) for f in names if word.search(f[1])]
        found += [(name, *f) for f in texts if f[1] in distinct]
        found += [(name, *f) for f in keys_in_code(path) if f[1] in columns]
    assert not found
