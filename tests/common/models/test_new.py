"""Test that a new tokenizer is the same in each process."""

import hashlib
import subprocess
import sys

import pytest
from datasets import Dataset

from common.models.new import ScratchArguments, train_tokenizer
from tests.conftest import ROOT

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
#: many pairs of characters are equally frequent: which is merged first decides on the tokens
TEXTS = [f"{a}{b}{c} {c}{a}{b}" for a in "bdfgk" for b in "aeiou" for c in "lmnr"]


def digest(kind: str) -> str:
    """Return a hash of the tokenizer that learned `TEXTS`."""
    args = ScratchArguments(tokenizer_train=kind, vocab_size=300)
    tokenizer = train_tokenizer(args, Dataset.from_dict({"text": TEXTS}), SPECIAL)
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


@pytest.mark.soak
def test_another_process_learns_the_same_tokens():
    code = "from tests.common.models.test_new import digest; print(digest('wordpiece'), digest('bpe'))"
    printed = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert printed.split()[-2:] == [digest("wordpiece"), digest("bpe")]


def test_only_special_tokens_are_found_in_a_text():
    tokenizer = train_tokenizer(
        ScratchArguments(tokenizer_train="wordpiece", vocab_size=300), Dataset.from_dict({"text": TEXTS}), SPECIAL
    )
    assert set(tokenizer.all_special_tokens) == set(SPECIAL.values())
    assert sorted(tokenizer.get_added_vocab()) == sorted(SPECIAL.values())
    assert "##a" in tokenizer.get_vocab()
    assert tokenizer.tokenize("bal##a[MASK]")[-2:] == ["a", "[MASK]"]
