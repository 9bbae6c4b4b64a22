"""Test arguments: precedence, names, types and help."""

import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from common import cli as arguments
from common.args import DataArguments, TrainingArguments, resume_rules
from common.errors import InputError
from common.training.language_model import LanguageArguments
from recipes.ner.predict import ARGUMENTS as PREDICT
from recipes.ner.train import ARGUMENTS, NerDataArguments, NerTrainingArguments
from recipes.sentiment.train import SentimentTrainingArguments
from recipes.translation.predict import ARGUMENTS as TRANSLATION
from tests.conftest import ROOT


def parse(*argv: str) -> tuple:
    return arguments.parse(ARGUMENTS, [*argv, "--output_dir", "unused"])


def test_command_line_wins_over_yaml_and_yaml_over_the_recipe(tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text(
        "learning_rate: 2e-5\nnum_train_epochs: 7\nseed: 5\nreport_to: [tensorboard, none]\n"
        "repair_bio: true\nload_best_model_at_end: false\nlr_scheduler_kwargs: {num_cycles: 2}\nlora_r: null\n"
    )
    _, data, lora, args = parse("--config", str(config), "--seed", "9")
    assert (args.learning_rate, args.num_train_epochs, args.seed) == (2e-5, 7.0, 9)
    assert args.per_device_train_batch_size == 32
    assert args.report_to == ["tensorboard", "none"]
    assert data.repair_bio is True
    assert args.load_best_model_at_end is False
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert lora.lora_r is None


@pytest.mark.parametrize(
    ("rows", "given", "epochs", "scored"),
    [
        (25, [], 150, ("steps", 15)),  # one step an epoch
        (100, [], 38, ("steps", 16)),  # four
        (3000, [], 10, ("epoch", None)),
        (25, ["--num_train_epochs", "7"], 7, ("epoch", None)),
        (
            25,
            ["--gradient_accumulation_steps", "4", "--eval_strategy", "no", "--save_strategy", "no"],
            150,
            ("no", None),
        ),
    ],
)
def test_few_rows_are_passed_over_more_often(rows, given, epochs, scored):
    *_, args = parse(*given)
    args.choose_length(rows)
    assert (args.num_train_epochs, args.eval_strategy.value, args.eval_steps) == (epochs, *scored)
    assert args.save_strategy.value == scored[0]
    if scored[0] == "steps":
        assert args.save_steps == scored[1]
        assert args.few_rows


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat", "1"], "unknown argument --learning_rat; did you mean --learning_rate?"),
        (["--learn", "1"], "unknown argument --learn"),  # no abbreviations
        (["--epochs", "3"], "unknown argument --epochs; did you mean --num_train_epochs?"),
        (["--bach_size", "3"], "unknown argument --bach_size; did you mean --per_device_train_batch_size?"),
        (["--epochs", "3", "--lr", "1"], "num_train_epochs? unknown argument --lr; did you mean --learning_rate?"),
        (["--epochs", "-1"], "unknown argument --epochs; did you mean --num_train_epochs?"),
        (["--train_batch", "3"], "unknown argument --train_batch; --help_all lists all arguments"),
        (["--epochs=3"], "unknown argument --epochs=3; did you mean --num_train_epochs?"),
        (["--learning_rate", "fast"], "--learning_rate: invalid float value: 'fast'"),
        (["--precision", "int8"], "invalid choice"),
        (["--train_file", "none.jsonl"], "--train_file none.jsonl: no such file"),
        (["--train_file", "."], "is a folder"),
        (["--dataset_name", "x", "--train_file", "Makefile"], "exclude each other"),
        (["stray"], "stray: a value without an argument name"),
        (["--lora_r", "0"], "--lora_r must be at least 1"),
        (["--max_train_samples", "0"], "--max_train_samples 0: must be at least 1"),
        (["--config", "none.yaml"], "--config none.yaml: No such file"),
        (["--test_file", "Makefile"], "--validation_file and --test_file: no training rows; add --train_file"),
        (["--early_stopping_patience", "2", "--eval_strategy", "no"], "--early_stopping_patience: needs evaluations"),
        (["--report_to", "tensorboard", "wandb"], "--report_to wandb: its package is not installed"),
        (["--report_to", "tensorbord"], "--report_to tensorbord: no such logger; did you mean tensorboard?"),
        (["--eval_strategy", "steps"], "--eval_strategy steps, --save_strategy epoch: the run ends"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--label_smoothing_factor", "-1"], "--label_smoothing_factor -1.0: must be at least 0 and below 1"),
        (["--save_total_limit", "-2"], "--save_total_limit -2: must be at least 1"),
        (["--logging_steps", "-3"], "--logging_steps -3.0: must be at least 0"),
        (["--precision", "bf16", "--save_strategy", "never"], "never is not a valid SaveStrategy"),
        (["--max_seq_length", "32", "--doc_stride", "40"], "--doc_stride 40"),
        (["--learning_rate", "-1"], "--learning_rate -1.0: must be at least 0"),
        (["--learning_rate", "nan"], "--learning_rate nan: must be at least 0"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0: must be at least 1"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0: must be at least 1"),
        (["--weight_decay", "-1"], "--weight_decay -1.0: must be at least 0"),
        (["--num_train_epochs", "-1"], "--num_train_epochs -1.0: must be at least 0"),
        (["--adam_beta2", "1.5"], "--adam_beta2 1.5: must be at least 0 and below 1"),
        (["--max_steps", "-3"], "--max_steps -3: must be at least 1; remove it to count epochs"),
        (["--early_stopping_patience", "0"], "--early_stopping_patience 0: must be at least 1"),
        (["--save_only_model", "true"], "--save_only_model: the checkpoints cannot be resumed; leave it out"),
        (["--prediction_loss_only", "true"], "--prediction_loss_only: the scores of an evaluation need the pred"),
        (["--batch_eval_metrics", "true"], "--batch_eval_metrics: the scores of an evaluation need all its rows"),
        (["--bf16_full_eval", "true"], "--bf16_full_eval: it would leave the weights in bfloat16; evaluations"),
        (["--fp16_full_eval", "true"], "--fp16_full_eval: it would leave the weights in float16; evaluations"),
    ],
)
def test_bad_arguments_fail_with_the_nearest_name(argv, message):
    with pytest.raises(InputError) as error:
        parse(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("alias", "train", "predict"),
    [
        ("lr", "learning_rate", None),
        ("epochs", "num_train_epochs", None),
        ("batch-size", "per_device_train_batch_size", "batch_tokens"),
        ("model", "model_name_or_path", None),
        ("model_name_or_path", None, "model"),
        ("output", "output_dir", None),
        ("output_dir", None, "output"),
        ("max_length", "max_seq_length", None),
        ("data", "train_file", "input"),
        ("dataset", "dataset_name", "input"),
        ("dev_file", "validation_file", None),
        ("evaluation_strategy", "eval_strategy", None),
        ("overwrite_output_dir", "overwrite", "overwrite"),
        ("warmup_ratio", "warmup_steps", None),
    ],
)
def test_names_of_other_scripts_are_answered_with_ours_and_not_accepted(alias, train, predict):
    for name, groups in ((train, ARGUMENTS), (predict, PREDICT)):
        if name is not None:
            with pytest.raises(InputError, match=f"unknown argument --{alias}; did you mean --{name}\\?"):
                arguments.parse(groups, [f"--{alias}", "x"])


def test_every_alias_leads_to_an_argument_and_is_none_where_it_leads():
    known = [{f.name for group in groups for f in fields(group)} for groups in (ARGUMENTS, PREDICT)]
    translation = {f.name for group in TRANSLATION for f in fields(group)}
    for alias, names in arguments.ALIASES.items():
        assert set(names) <= set.union(translation, *known), alias
        assert any(alias not in some and some & set(names) for some in (*known, translation)), alias


def test_the_help_of_a_copied_recipe_has_the_name_of_the_copy(capsys, monkeypatch):
    text = """Fine-tune.

    make ner
    make ner ARGS="--output_dir outputs/ner"
    python -m recipes.ner.train --config my.yaml
    make predict RECIPE=ner MODEL=outputs/ner INPUT=manner.jsonl

The sample of recipes/ner, ner and dinner."""

    @dataclass
    class MineArguments(TrainingArguments):
        pass

    monkeypatch.setitem(sys.modules, "copied", SimpleNamespace(__file__="recipes/mine/train.py"))
    MineArguments.__module__ = "copied"
    with pytest.raises(SystemExit):
        arguments.parse((MineArguments,), ["--help"], text)
    shown = capsys.readouterr().out
    for line in ("    make mine\n", "recipes.mine.train", "RECIPE=mine MODEL=outputs/mine INPUT=manner.jsonl"):
        assert line in shown
    assert "The sample of recipes/mine, ner and dinner." in shown


def test_a_missing_file_is_answered_with_the_nearest_name_there(tmp_path):
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(InputError, match=r"did you mean .*train\.jsonl\?"):
        parse("--train_file", str(tmp_path / "trian.jsonl"))


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("hub_model_id: 2026-13-45\n", None, "month must be in 1..12"),
        ("seed: 1\nlearning_rat: 2\n", 2, "unknown argument learning_rat; did you mean learning_rate?"),
        ("seed: many\n", 1, "--seed: invalid int value: 'many'"),
        ("seed: 1\nseed: 2\n", 2, "seed is given twice"),
        ("seed: [1\n", 2, "expected"),
        ("seed: !!python/object/apply:os.system ['true']\n", 1, "could not determine a constructor"),
        ("- seed\n", None, "not a mapping; write lines of `name: value`"),
        ("config: other.yaml\n", 1, "unknown argument config"),
    ],
)
def test_bad_yaml_names_file_and_line(tmp_path, text, line, message):
    config = tmp_path / "my.yaml"
    config.write_text(text)
    with pytest.raises(InputError) as error:
        parse("--config", str(config))
    assert message in str(error.value)
    assert f"{config}:{line}: " in str(error.value) or line is None


def test_yaml_scalars_are_read_as_they_are_written(tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text("eval_strategy: no\nsave_strategy: no\nbf16: no\nlearning_rate: 1e-3\n")
    args = parse("--config", str(config))[3]
    assert (args.eval_strategy, args.save_strategy, args.bf16) == ("no", "no", False)
    assert args.learning_rate == 1e-3
    assert args.load_best_model_at_end is False


def test_items_of_a_yaml_list_are_read_as_they_are_written(tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text('label_names: [no, yes, 007, 1.10, "on", 2e-5]\n')
    assert parse("--config", str(config))[1].label_names == ["no", "yes", "007", "1.10", "on", "2e-5"]


def test_given_values_have_the_names_of_the_fields(monkeypatch):
    words = ["--no_domain_given", "--max-steps", "5", "--report_to", "a", "b", "--overwrite"]
    given = arguments.given_values(ARGUMENTS, words)
    assert given == {"domain_given": "false", "max_steps": "5", "report_to": ["a", "b"], "overwrite": "true"}
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    assert arguments.given_values(ARGUMENTS, None) == given


def test_paths_below_home_are_found_where_no_shell_replaces_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "run.yaml").write_text("train_file: ~/rows.jsonl\n")
    _, data, _, _ = parse("--config", str(tmp_path / "run.yaml"), "--test_file=~/rows.jsonl")
    assert data.train_file == data.test_file == str(tmp_path / "rows.jsonl")


def test_the_stride_follows_the_length():
    assert parse("--max_seq_length", "64")[1].doc_stride == 16
    assert parse()[1].doc_stride == 64


def test_several_yaml_problems_are_told_at_once(tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text("sed: 1\nsave_step: 2\n")
    with pytest.raises(InputError) as error:
        parse("--config", str(config))
    assert str(error.value).count("\n") == 1


def test_an_empty_yaml_changes_nothing(tmp_path):
    config = tmp_path / "my.yaml"
    config.touch()
    assert parse("--config", str(config))[3].seed == 42


def test_help_shows_our_arguments_first_with_defaults_and_hides_the_rare(capsys):
    with pytest.raises(SystemExit) as stop:
        arguments.parse(ARGUMENTS, ["--help"], "What it does.")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.index("--model_name_or_path") < text.index("--train_file") < text.index("--num_train_epochs")
    assert "(default: tokens)" in text
    assert "--torch_compile" not in text
    assert len(text.splitlines()) < 180
    with pytest.raises(SystemExit):
        arguments.parse(ARGUMENTS, ["--help_all"])
    assert "--torch_compile" in capsys.readouterr().out


def test_precision_follows_the_hardware_unless_told(monkeypatch):
    monkeypatch.setattr("common.args.training.native_bf16", lambda cpu: True)
    assert parse()[3].bf16 is True
    assert parse("--precision", "fp32")[3].bf16 is False
    monkeypatch.setattr("common.args.training.native_bf16", lambda cpu: False)
    assert parse()[3].bf16 is False
    assert parse("--precision", "bf16")[3].bf16 is True
    assert parse()[3].use_cpu is not torch.accelerator.is_available()


@pytest.mark.parametrize(
    ("kind", "metric", "greater"),
    [
        (LanguageArguments, "perplexity", False),
        (SentimentTrainingArguments, "eval_calibration_error", False),
        (NerTrainingArguments, "loss", False),
        (NerTrainingArguments, "f1", True),
    ],
)
def test_a_recipe_says_of_which_scores_less_is_better(tmp_path, kind, metric, greater):
    args = kind(output_dir=str(tmp_path), metric_for_best_model=metric)
    assert args.greater_is_better is greater


def test_a_field_that_a_recipe_declares_anew_keeps_the_rule_of_its_parent():
    rules = resume_rules(ARGUMENTS)
    assert rules["output_dir"] == rules["overwrite"] == rules["resume_from_checkpoint"] == "incidental"
    assert rules["per_device_train_batch_size"] == rules["gradient_accumulation_steps"] == "splits_step"
    assert rules["seed"] == rules["doc_stride"] == rules["lora_r"] == rules["model_name_or_path"] == "fixed"
    assert rules.keys().isdisjoint({"learning_rate", "num_train_epochs", "repair_bio"})


def test_a_rule_that_does_not_exist_is_an_error_of_the_recipe():
    @dataclass
    class Misspelt(TrainingArguments):
        depth: int = field(default=1, metadata={"help": "layers", "resume": "fix"})

    with pytest.raises(ValueError, match=r"Misspelt\.depth: resume is 'fix'; use fixed, splits_step, incidental"):
        resume_rules([Misspelt])


def test_the_sample_is_read_when_no_data_is_named(tmp_path):
    assert parse()[1].test_file == str(NerDataArguments.sample / "test.jsonl")

    @dataclass
    class OwnArguments(DataArguments):
        sample: ClassVar[Path | None] = tmp_path

    (tmp_path / "train.json").touch()
    assert OwnArguments().files() == {"train_file": str(tmp_path / "train.json")}
    assert DataArguments().files() == {}
    with pytest.raises(InputError, match="--validation_file and --test_file: no training rows; add --train_file"):
        OwnArguments(test_file=str(tmp_path / "train.json"))


def test_a_reader_of_the_output_that_ends_stops_the_program_without_a_traceback():
    text = "from common.cli import command_line; command_line(lambda: [print('x' * 99) for _ in range(99_999)])"
    with subprocess.Popen([sys.executable, "-c", text], cwd=ROOT, stdout=-1, stderr=-1, text=True) as child:
        child.stdout.readline()
        child.stdout.close()
        said = child.stderr.read()
    assert child.returncode == 141
    assert said.splitlines() == ["stopped: the program that reads the output has ended; write the output to a file"]


def test_passes_are_known_before_a_recipe_has_decided_them(tmp_path):
    from recipes.sentiment.train import SentimentTrainingArguments

    assert SentimentTrainingArguments(output_dir=str(tmp_path)).passes(20) == 5
    assert SentimentTrainingArguments(output_dir=str(tmp_path), num_train_epochs=2).passes(20) == 2
