"""The notebook runs from its first cell to its last."""

import json

import pytest

from tests.conftest import ROOT, run

NOTEBOOK = ROOT / "recipes" / "ner" / "ner.ipynb"


@pytest.mark.soak
def test_the_notebook_runs_and_its_model_finds_entities(tiny, small, tmp_path):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")  # committed without outputs
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    files = [word for split, file in small.items() for word in (f"--{split}_file", file)]
    words = [*files, "--model_name_or_path", tiny, "--max_seq_length", "64", "--max_steps", "4", "--precision", "fp32"]
    assert code.count("words = [") == 1
    program = code.replace("words = [", f"words = [*{words!r}, ")
    (tmp_path / "notebook.py").write_text(program, encoding="utf-8")
    done = run(str(tmp_path / "notebook.py"), cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "test scores" in done.stdout
    assert (tmp_path / "outputs" / "ner-notebook" / "model.safetensors").is_file()
