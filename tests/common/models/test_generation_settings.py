"""Test that contradictory generation settings of a checkpoint are unset, and that the model then loads and saves."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel

from common.models.decoding import GenerationArguments, set_generation
from common.models.generation_settings import loadable_generation, unset_contradictions

SAMPLING = {"top_k": 10, "min_p": 0.1, "typical_p": 0.2, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=16)).save_pretrained(folder)
    return str(folder)


CASES = [
    ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, {"temperature", "top_p"}),
    ({"temperature": 0.9}, {"temperature"}),
    (SAMPLING, set(SAMPLING)),
    ({"early_stopping": True}, {"early_stopping"}),
    ({"length_penalty": 2.0}, {"length_penalty"}),
    ({"early_stopping": "maybe", "num_beams": 3}, {"early_stopping"}),
    ({"num_return_sequences": 3, "temperature": 0.5}, {"num_return_sequences", "temperature"}),
    ({"num_beams": 2, "num_return_sequences": 3}, {"num_return_sequences"}),
    ({"max_new_tokens": 0}, {"max_new_tokens"}),
    ({"cache_implementation": "nonsense"}, {"cache_implementation"}),
    ({"use_cache": False, "cache_implementation": "static"}, {"cache_implementation"}),
    ({"pad_token_id": -1}, {"pad_token_id"}),
    ({"output_scores": True}, {"output_scores"}),
    ({"suppress_tokens": [5], "forced_eos_token_id": 5}, {"forced_eos_token_id"}),
    ({"logits_processor": [1]}, {"logits_processor"}),
    ({"watermarking_config": {"greenlist_ratio": 4}}, {"watermarking_config"}),
    ({"compile_config": {"mode": "x"}}, {"compile_config"}),
    ({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1}, set()),
    ({"num_beams": 4, "early_stopping": True, "length_penalty": 2.0}, set()),
]


@pytest.mark.parametrize(
    ("settings", "unset", "file"),
    [
        *((*case, "generation_config.json") for case in CASES),
        *((*case, "config.json") for case in CASES[:5]),  # checkpoints of older releases
    ],
)
def test_what_save_pretrained_refuses_is_unset_and_said(gpt2, tmp_path, capsys, settings, unset, file):
    model = GPT2LMHeadModel.from_pretrained(gpt2)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / file).write_text(json.dumps(config | settings if file == "config.json" else settings))
    changes = loadable_generation(str(tmp_path))
    told = capsys.readouterr().err
    assert bool(changes) == bool(unset)
    assert all(f"{name} " in told for name in unset)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **changes)
    loaded.generation_config.eos_token_id = 7  # a changed configuration is checked in full
    loaded.save_pretrained(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: kept.get(name) for name in settings.keys() - unset} == {
        name: settings[name] for name in settings.keys() - unset if name in kept
    }
    assert not kept.keys() & unset


def test_every_contradiction_of_one_configuration_is_unset():
    config = GenerationConfig()
    config.temperature, config.pad_token_id, config.num_return_sequences = 0.5, -3, 4
    assert unset_contradictions(config) == {"temperature": 0.5, "pad_token_id": -3, "num_return_sequences": 4}


def test_the_settings_of_the_search_contradict_nothing_of_the_checkpoint(gpt2):
    model = GPT2LMHeadModel.from_pretrained(gpt2)
    model.generation_config.num_return_sequences = 3
    model.generation_config.do_sample, model.generation_config.min_p = True, 0.2
    set_generation(model, GenerationArguments(num_beams=2))
    model.generation_config.validate(strict=True)
    assert model.generation_config.num_beams == 2


@pytest.mark.parametrize("beams", [1, 4])
def test_each_text_gets_one_output_whatever_the_checkpoint_asks_for(gpt2, beams):
    model = GPT2LMHeadModel.from_pretrained(gpt2)
    asked = {"num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True, "min_new_tokens": 5}
    vars(model.generation_config).update(asked, decoder_start_token_id=1, pad_token_id=0)
    set_generation(model, GenerationArguments(num_beams=beams, max_target_length=3))
    found = model.generate(input_ids=torch.ones(3, 2, dtype=torch.long), attention_mask=torch.ones(3, 2))
    assert found.shape == (3, 5)
