"""Test the augmentations by models: they read each text once, keep the result, and change only words outside spans."""

import re

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, ByT5Tokenizer, T5Config, T5ForConditionalGeneration

from common.data.augment import SpanText
from common.errors import InputError
from common.inference.augmentation import FILLS, BackTranslation, ByModel, Contextual

TEXTS = [
    SpanText("The old film about Paris was good, and we liked it.", ((19, 24),)),
    SpanText("(Well-known) BOOKS cost 12 pounds [MASK]."),
    SpanText("12 34"),
    SpanText("Two three.", words=((0, 3), (4, 10))),
]


@pytest.fixture(scope="module")
def masked(tmp_path_factory, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("masked")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def translator(folder, source: str, target: str) -> str:
    torch.manual_seed(len(source + target))
    sizes = {"d_model": 32, "d_kv": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "d_ff": 32}
    model = T5ForConditionalGeneration(T5Config(vocab_size=384, decoder_start_token_id=0, **sizes))
    direction = {"source_lang": source, "target_lang": target, "source_code": "", "target_code": ""}
    model.config.translation = [direction | {"source_prefix": ""}]
    model.config.max_source_length = 64
    model.generation_config.max_length, model.generation_config.num_beams = 12, 2
    model.save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return str(folder)


def copies(augmentation: ByModel, text: SpanText, count: int = 20) -> list[SpanText]:
    return [augmentation(text, np.random.default_rng(seed)) for seed in range(count)]


def test_a_masked_model_fills_words_outside_spans(masked, tmp_path):
    augmentation = Contextual(masked, 0.2)
    augmentation.prepare(TEXTS + TEXTS[:2], tmp_path)
    found = copies(augmentation, TEXTS[0])
    assert len({new.text for new in found}) > 10
    for new in found:
        assert [new.text[a:b] for a, b in new.spans] == ["Paris"]
        assert len(re.findall(r"\w+", new.text)) == 11
        changed = sum(a != b for a, b in zip(TEXTS[0].text.split(), new.text.split(), strict=True))
        assert changed == 2  # a fifth of ten words
    assert copies(augmentation, TEXTS[1])[0] == TEXTS[1]  # the mask token is in the text
    assert copies(augmentation, TEXTS[2])[0] == TEXTS[2]
    row = augmentation.of(TEXTS[0])
    assert row["starts"] == sorted(row["starts"])
    assert all(0 < len(fills) <= FILLS for fills in row["fills"])
    (file,) = tmp_path.glob("augment-*.arrow")
    again = Contextual(masked, 0.2)
    again.models = []  # nothing is left to compute
    again.prepare(TEXTS, tmp_path)
    assert copies(again, TEXTS[0]) == found
    assert list(tmp_path.iterdir()) == [file]
    file.unlink()
    recomputed = Contextual(masked, 0.2)
    recomputed.prepare(TEXTS, tmp_path)
    assert copies(recomputed, TEXTS[0]) == found


def test_texts_are_translated_there_and_back(tmp_path):
    there, back = translator(tmp_path / "a", "en", "de"), translator(tmp_path / "b", "de", "en")
    augmentation = BackTranslation(there, back)
    augmentation.prepare(TEXTS[:3], tmp_path)
    others = augmentation.of(TEXTS[0])["texts"]
    assert TEXTS[0].text not in others
    assert len(set(others)) == len(others)
    found = {new.text for new in copies(augmentation, TEXTS[0])}
    assert found == (set(others) or {TEXTS[0].text})
    with pytest.raises(InputError, match="translate en-de and en-de; the second must be the reverse of the first"):
        BackTranslation(there, there)


def test_models_of_other_kinds_are_errors(masked, tiny, tmp_path):
    with pytest.raises(InputError, match="is BertModel; name the folder of a masked"):
        Contextual(tiny, 0.1)
    with pytest.raises(InputError, match="has no languages; name the folder of a model"):
        BackTranslation(masked, masked)
