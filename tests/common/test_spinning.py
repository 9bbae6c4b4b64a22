"""Test that idle threads of torch sleep early: in every program of ours, and not in the stock arms of the benchmark."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import common
from tests.benchmarks import bench
from tests.conftest import ROOT

#: `recipes/__init__.py` and `common/__init__.py` are loaded first in all programs; one of each kind is started
OURS = ["recipes.ner.train", "recipes.ner.predict", "common.tools.compare", "common.tools.sweep",
        "common.tools.transfer"]  # fmt: skip
STOCK = "tests.benchmarks.stock_ner"

#: starts each program until it imports torch, and prints the variable at that moment
START = """
import json, os, runpy, sys
import datasets, matplotlib.figure, transformers.utils  # to save time: programs import them, and they load no torch
from importlib.machinery import ModuleSpec

class AtTorch(BaseException):
    pass

class Torch:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name == "torch" else None

    def create_module(self, spec):
        raise AtTorch

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Torch())
for name, *argv in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        continue
    sys.argv = [name, *argv]
    try:
        runpy.run_module(name, run_name="__main__")
    except AtTorch:
        print(json.dumps([" ".join([name, *argv]), os.environ.get("GOMP_SPINCOUNT")]), flush=True)
    os._exit(0)
"""
CLEAN = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}


def at_torch(commands: list[list[str]]) -> dict[str, str | None]:
    """Return the value of `GOMP_SPINCOUNT` at the import of torch, by command."""
    script = [sys.executable, "-c", START, json.dumps(commands)]
    done = subprocess.run(script, env=CLEAN, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(map(json.loads, done.stdout.splitlines()))


def test_our_programs_limit_spinning_before_they_load_torch_and_a_stock_arm_does_not():
    watched = [["tests.benchmarks.watched", "x.measured", name] for name in ("recipes.ner.train", STOCK)]
    found = at_torch([*([name] for name in OURS), *watched])
    assert found.pop(" ".join(watched[1])) is None
    assert found == dict.fromkeys([*OURS, " ".join(watched[0])], common.SPIN_COUNT)


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is the library of torch on Linux")
@pytest.mark.parametrize(
    ("given", "shown"),
    [({}, common.SPIN_COUNT), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_libgomp_reads_the_value_and_the_choice_of_the_user_is_kept(given, shown):
    (library,) = Path(find_spec("torch").origin).parent.rglob("libgomp*.so*")
    load = f"import common, ctypes; ctypes.CDLL({str(library)!r})"
    environment = CLEAN | {"OMP_DISPLAY_ENV": "verbose"} | given
    done = subprocess.run([sys.executable, "-c", load], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{shown}'" in done.stderr


def test_a_stock_arm_inherits_the_setting_of_the_user_only(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    monkeypatch.setattr(common, "SPINNING_LIMITED", True)
    assert "GOMP_SPINCOUNT" not in bench.environment(STOCK)
    assert bench.environment("recipes.ner.train")["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setattr(common, "SPINNING_LIMITED", False)
    assert bench.environment(STOCK)["GOMP_SPINCOUNT"] == "1000"
