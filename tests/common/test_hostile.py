"""Test hostile input: files that would run code, and texts that would break a terminal, a page or a file."""

import json
import unicodedata

import pytest
from huggingface_hub import ModelCard

from common.errors import InputError, printable
from common.run.report import ROWS_SHOWN, print_table
from recipes.ner import predict, train
from tests.conftest import read_jsonl, write_jsonl


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code was run"


# No code


def plant(path, canary) -> None:
    path.write_text(f"open({str(canary)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")


@pytest.mark.parametrize("known", [True, False])
def test_code_named_by_a_model_is_not_run(arguments, tiny, tmp_path, canary, capsys, known):
    model = tmp_path / "model"
    model.mkdir()
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (model / file).write_bytes((tmp_path.parent / tiny / file).read_bytes())
    config = json.loads((tmp_path.parent / tiny / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForTokenClassification": "evil.Model"}
    config["model_type"] = config["model_type"] if known else "evil"
    (model / "config.json").write_text(json.dumps(config))
    plant(model / "evil.py", canary)
    words = [*arguments, "--model_name_or_path", str(model)]
    if known:
        train.main(words)
        assert "ignoring the code that config.json names (auto_map)" in capsys.readouterr().err
        assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    else:
        with pytest.raises(InputError, match=r"config.json names code \(auto_map\), which is never run"):
            train.main(words)


def test_a_script_beside_a_data_set_is_not_run(arguments, small, tmp_path, canary):
    folder = tmp_path / "evil"
    folder.mkdir()
    plant(folder / "evil.py", canary)
    with pytest.raises(InputError, match="--dataset_name"):
        train.main([*arguments[6:], "--dataset_name", str(folder)])


def test_a_tag_in_a_yaml_file_is_refused(arguments, tmp_path, canary):
    config = tmp_path / "evil.yaml"
    config.write_text(f"seed: 1\noutput_dir: !!python/object/apply:os.mkdir [{canary}]\n")
    with pytest.raises(InputError, match=r"evil.yaml:2: could not determine a constructor"):
        train.main([*arguments, "--config", str(config)])


@pytest.mark.parametrize("key", ["trust_remote_code", "trust-remote-code"])
def test_trust_in_remote_code_cannot_be_given(arguments, tmp_path, key):
    config = tmp_path / "c.yaml"
    config.write_text(f"{key}: true\n")
    for words in (["--config", str(config)], [f"--{key}", "true"]):
        with pytest.raises(InputError, match="code in a checkpoint or data set is never run"):
            train.main([*arguments, *words])


# Texts

LABELS = [
    "\x1b[31mred\x1b]0;t\x07",
    "<script>alert(1)</script>",
    "a|b`c`",
    "\u202eevil\u202c",
    "macro",
    "gazetteer",
    "x" * 500,
]


def test_hostile_labels_words_and_names_break_nothing(tiny, tmp_path, capsys):
    rows = [
        {"tokens": ["one\x1b[2J", f"word\u202e{i}", "\x07bell", "</td>"], "ner_tags": ["O", f"B-{label}", "O", "O"]}
        for i, label in enumerate(LABELS * 4)
    ]
    file = write_jsonl(tmp_path / "a|`b`<img src=x>\x1b[31m.jsonl", rows)
    out = tmp_path / "out```|<b>"
    files = ("--train_file", file, "--validation_file", file, "--test_file", file)
    metrics = train.main([
        *files, "--model_name_or_path", tiny, "--output_dir", str(out), "--max_seq_length", "64", "--precision", "fp32",
        "--num_train_epochs", "1", "--disable_tqdm", "true",
    ])  # fmt: skip
    table, errors = capsys.readouterr()
    printed = table + errors
    unsafe = {c for c in printed if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") and c != "\n"} - {"\r"}
    assert not unsafe
    assert max(map(len, table[table.index("test scores") :].split("\n"))) < 120
    assert "B-" not in {name[:2] for name in metrics}
    assert metrics["test_type_macro_support"] == 4
    assert metrics["test_type_gazetteer_support"] == 4
    assert 0 <= metrics["test_gazetteer_f1"] <= 1
    card = (out / "README.md").read_text(encoding="utf-8")
    assert ModelCard(card).data.model_name
    body = card.split("---\n", 2)[2]
    prose = "".join(body.split("```")[::2])
    assert "<img" not in prose.replace("\\<", "")
    assert "\x1b" not in card
    assert body.count("```") == 4
    assert json.loads((out / "all_results.json").read_text())
    found = read_jsonl_lines(out / "predictions_test.jsonl")
    assert [row["tokens"] for row in found] == [row["tokens"] for row in rows]
    predict.main(["--model", str(out), "--input", file, "--output", str(tmp_path / "found.jsonl")])
    assert len(read_jsonl_lines(tmp_path / "found.jsonl")) == len(rows)


def read_jsonl_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_long_rows_and_too_many_labels_are_told(arguments, small, tiny, tmp_path):
    rows = read_jsonl(tmp_path / "train.jsonl")
    long = write_jsonl(tmp_path / "long.jsonl", [*rows, {"tokens": ["x" * 2_000_000], "ner_tags": ["O"]}])
    with pytest.raises(InputError, match=r"long.jsonl:49: 2,000,001 characters in one row, more than --max_chars"):
        train.main([*arguments, "--train_file", long])
    train.main(arguments)
    with pytest.raises(InputError, match=r"long.jsonl:49: 2,000,001 characters"):
        predict.main(["--model", str(tmp_path / "out"), "--input", long, "--output", str(tmp_path / "found.jsonl")])
    many = [{"tokens": ["x"] * 101, "ner_tags": [f"B-{i}" for i in range(n, n + 101)]} for n in range(0, 10_100, 101)]
    file = write_jsonl(tmp_path / "many.jsonl", many)
    with pytest.raises(
        InputError, match=r"ner_tags: 10,1\d\d different labels, more than 10,000; choose a column of labels"
    ):
        train.main([*arguments, "--train_file", file])


def test_printable_shows_text_and_escapes_the_rest():
    assert printable("Grüße, 東京 👍 é") == "Grüße, 東京 👍 é"
    assert printable("a\x1b[31m\u202e\x9b\n") == "a\\x1b[31m\\u202e\\x9b\\n"
    assert printable("x" * 3000) == "x" * 2000 + "… (3,000 characters)"


def test_a_large_table_is_cut_in_the_middle(capsys):
    print_table(["type", "n"], [[f"label{i}", i] for i in range(1000)] + [["all", 7]], last=1)
    lines = capsys.readouterr().out.split("\n")[:-1]
    assert len(lines) == ROWS_SHOWN + 2
    assert "... 941 more" in lines[-2]
    assert lines[-1].startswith("all")
