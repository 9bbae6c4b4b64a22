"""Test that the trainers override only listed private methods of transformers, and that these are unchanged."""

from importlib import import_module

import pytest
import transformers

from common.training import LanguageTrainer, Seq2SeqTrainer, Trainer
from common.training.upstream import OVERRIDES, source_hash

FAMILY = {
    part
    for trainer in (Trainer, Seq2SeqTrainer, LanguageTrainer)
    for part in trainer.__mro__
    if issubclass(part, transformers.Trainer) and part is not transformers.Trainer
}


def overridden(part: type) -> set[str]:
    """Return the names of the private transformers methods that class `part` overrides."""
    return {
        name for name in vars(part) if name.startswith("_") and name[1] != "_" and hasattr(transformers.Trainer, name)
    }


def test_the_table_lists_every_private_override_and_there_are_at_most_twelve():
    assert {part.__module__.partition(".")[0] for part in FAMILY} == {"common"}
    assert set().union(*map(overridden, FAMILY)) == OVERRIDES.keys()
    assert len(OVERRIDES) <= 12


@pytest.mark.parametrize("method", OVERRIDES)
def test_the_source_of_an_overridden_method_is_the_one_that_was_tested(method):
    override = OVERRIDES[method]
    module = f"common.training.{override.file}"
    assert any(method in overridden(part) for part in FAMILY if part.__module__ == import_module(module).__name__)
    found = source_hash(method)
    assert found == override.sha256, (
        f"transformers {transformers.__version__}: Trainer.{method} has changed; read it, check in {module} that "
        f"{override.promise}, and record {found} in common/training/upstream.py"
    )


def test_a_changed_method_is_seen(monkeypatch):
    monkeypatch.setattr(transformers.Trainer, "_get_eval_sampler", lambda self, eval_dataset: None)
    assert source_hash("_get_eval_sampler") != OVERRIDES["_get_eval_sampler"].sha256
