"""Test that a fingerprint changes with everything that changes a result, and with nothing else."""

import json

from common.cli import parse
from common.run.fingerprint import NAMES, differences, fingerprint
from recipes.ner import train
from tests.conftest import ROOT


def test_each_change_has_its_name(arguments, small, tiny, tmp_path, monkeypatch):
    def made(*more: str) -> dict:
        return json.loads(json.dumps(fingerprint(parse(train.ARGUMENTS, [*arguments, *more]))))

    before = made()
    assert before.keys() == NAMES.keys()
    assert differences(before, made("--seed", "7", "--output_dir", str(tmp_path / "other"))) == []
    assert differences(before, made("--learning_rate", "3e-4")) == ["arguments"]
    assert differences(before, made("--precision", "bf16")) == ["arguments", "machine"]
    assert differences({"code": before["code"]}, before) == [name for name in NAMES.values() if name != "code"]
    (tmp_path / "lora.json").write_text("{}")
    with_config = made("--peft_config", str(tmp_path / "lora.json"))
    (tmp_path / "lora.json").write_text('{"r": 2}')
    assert differences(with_config, made("--peft_config", str(tmp_path / "lora.json"))) == ["data files"]
    long = ",".join(["name_of_a_column"] * 20)  # longer than the name of a file may be
    assert differences(before, made("--domain_column", long)) == ["arguments"]
    (tmp_path / "train.jsonl").write_text("{}")
    assert differences(before, made()) == ["data files"]
    monkeypatch.setattr("common.run.fingerprint.recipe_folder", lambda arguments: ROOT / "tests" / "bad_inputs")
    monkeypatch.setattr("common.run.fingerprint.versions", lambda: {"torch": "1"})
    monkeypatch.setattr("common.run.fingerprint.hardware", lambda: {"cpu": "other"})
    assert differences(before, made()) == ["code", "data files", "packages", "machine"]
