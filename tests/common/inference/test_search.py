"""Test that the search that drops finished rows finds the same outputs as transformers, with less computation."""

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    FSMTConfig,
    FSMTForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from common.inference.search import shrinking_search, why_not_shared
from common.models.decoding import BeginWith, generating

SPECIAL = {"pad_token_id": 3, "eos_token_id": 1, "decoder_start_token_id": 2}
SIZES = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64, "forced_eos_token_id": None,
}  # fmt: skip
PART = BertConfig(
    vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=64,
)  # fmt: skip
MODELS = {
    "marian": lambda: MarianMTModel(MarianConfig(vocab_size=60, **SIZES, **SPECIAL)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(vocab_size=60, **SIZES, **SPECIAL)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **SPECIAL)
    ),
    "umt5": lambda: UMT5ForConditionalGeneration(
        UMT5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **SPECIAL)
    ),
    "fsmt": lambda: FSMTForConditionalGeneration(
        FSMTConfig(langs=["en", "de"], src_vocab_size=60, tgt_vocab_size=60, **SIZES, **SPECIAL)
    ),
    "warm-started": lambda: EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(PART, PART)),
}


#: kinds whose attention accepts no shared source; a trial finds them
NOT_SHARED = {"umt5", "fsmt"}
SHARED = [kind for kind in MODELS if kind not in NOT_SHARED]


def model_of(kind: str, seed: int):
    torch.manual_seed(seed)
    model = MODELS[kind]().double().eval()  # in float32 rounding decides between equal outputs
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(2)
    model.generation_config.update(**SPECIAL, max_new_tokens=40)
    return model


class Unsteady(LogitsProcessor):
    """Score each token from all previous tokens, which gives outputs of different lengths; a new model never ends."""

    def __init__(self):
        self.scores = torch.randn(97, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
        self.scores[:, 1] += 3

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        so_far = (input_ids * torch.arange(1, input_ids.shape[1] + 1)).sum(1)
        return scores + self.scores[so_far % 97]


def sources(rows: int = 12, length: int = 9) -> dict[str, torch.Tensor]:
    mask = (torch.arange(length) < torch.randint(3, length + 1, (rows, 1))).long()
    return {"input_ids": torch.randint(4, 60, (rows, length)).where(mask.bool(), 3), "attention_mask": mask}


def rows_computed(model, **search) -> tuple[torch.Tensor, list[int]]:
    """Return the outputs, and the number of decoder rows at each step."""
    seen = []
    why_not_shared(model)  # its trial is not counted
    decoder = model.get_decoder()
    first = torch.arange(10, 10 + len(search["input_ids"]))
    search["logits_processor"] = LogitsProcessorList([Unsteady(), BeginWith(first)])
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    found = model.generate(**search)
    hook.remove()
    return found, seen


SEARCHES = [
    {"num_beams": 1},
    {"num_beams": 1, "repetition_penalty": 1.5, "eos_token_id": [1, 7, 8]},
    {"num_beams": 4, "length_penalty": 1.0},
    {"num_beams": 4, "length_penalty": 2.0, "num_return_sequences": 3},
    {"num_beams": 3, "length_penalty": 0.3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"num_beams": 2, "eos_token_id": [1, 7, 8, 9]},
    {"num_beams": 4, "early_stopping": True},
    {"num_beams": 2, "encoder_no_repeat_ngram_size": 2},
    {"num_beams": 2, "use_cache": False},
]
#: each search with one kind of model, and each kind with two searches or more; the others are long together
SOME_SEARCHES = [
    pytest.param(
        kind,
        search,
        id="-".join(map(str, (*search.values(), kind))),
        marks=() if (i + k) % len(SHARED) == 0 else pytest.mark.soak,
    )
    for i, search in enumerate(SEARCHES)
    for k, kind in enumerate(SHARED)
]


@pytest.mark.parametrize(("kind", "search"), SOME_SEARCHES)
def test_it_finds_what_transformers_finds(kind, search):
    shrinks = []
    for seed in range(3):
        model = model_of(kind, seed)
        inputs = sources()
        expected, _ = rows_computed(model, **inputs, **search)
        found, seen = rows_computed(model, **inputs, **search, custom_generate=shrinking_search)
        assert found.tolist() == expected.tolist()
        assert found[:: search.get("num_return_sequences", 1), 1].tolist() == list(range(10, 22))
        shrinks.append(seen[-1] < seen[0])
    # transformers handles the other settings
    assert any(shrinks) == (not search.keys() & {"early_stopping", "encoder_no_repeat_ngram_size", "use_cache"})


@pytest.mark.parametrize("beams", [1, 4])
def test_rows_that_are_done_are_computed_no_more(beams):
    model = model_of("marian", 0)
    inputs = sources()
    whole, steps = rows_computed(model, **inputs, num_beams=beams)
    found, seen = rows_computed(model, **inputs, num_beams=beams, custom_generate=shrinking_search)
    assert found.tolist() == whole.tolist()
    assert set(steps) == {12 * beams}
    assert seen[0] == 12 * beams
    assert seen == sorted(seen, reverse=True)
    if beams == 1:  # one row for each generated token, with the end token
        ends = (found == 1).long().cumsum(1).bool()
        assert sum(seen) == (~ends).sum() + ends.any(1).sum() - len(found)
    assert sum(seen) < sum(steps)


@pytest.mark.parametrize("kind", MODELS)
def test_a_trial_decides_whether_beams_share_their_source(kind):
    model, inputs = model_of(kind, 0), sources()
    assert (why_not_shared(model) is not None) == (kind in NOT_SHARED)
    if kind in NOT_SHARED:
        expected = model.generate(**inputs, num_beams=4)
        assert model.generate(**inputs, num_beams=4, custom_generate=shrinking_search).tolist() == expected.tolist()


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", SHARED)
def test_the_beams_of_a_row_share_its_source(kind, kernel):
    model = model_of(kind, 1)
    model.set_attn_implementation(kernel)
    why_not_shared(model)  # its trial is not counted
    seen = {}

    def look(decoder, args, kwargs, output):
        shapes = [tuple(layer.keys.shape[:3:2]) for layer in output.past_key_values.cross_attention_cache.layers]
        seen.setdefault(len(kwargs["encoder_hidden_states"]), set()).update(shapes)

    hook = model.get_decoder().register_forward_hook(look, with_kwargs=True)
    inputs = sources()
    expected = model.generate(**inputs, num_beams=3, num_return_sequences=2)
    assert seen == {36: {(36, 9)}}
    seen.clear()
    found = model.generate(**inputs, num_beams=3, num_return_sequences=2, custom_generate=shrinking_search)
    hook.remove()
    assert found.tolist() == expected.tolist()
    assert seen[12] == {(12, 9)}
    assert all(shapes == {(rows, 9)} for rows, shapes in seen.items())
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    assert {part.config._attn_implementation for part in parts} == {kernel}


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", SHARED)
def test_beams_share_their_source_after_a_begun_target(kind, kernel):
    model = model_of(kind, 1)
    model.set_attn_implementation(kernel)
    inputs = sources() | {"decoder_input_ids": torch.cat([torch.full((12, 1), 2), torch.randint(4, 60, (12, 3))], 1)}
    expected = model.generate(**inputs, num_beams=3)
    found = model.generate(**inputs, num_beams=3, custom_generate=shrinking_search)
    assert found.tolist() == expected.tolist()
    assert found[:, :4].tolist() == inputs["decoder_input_ids"].tolist()


def test_beams_share_their_source_under_a_prefix_of_keys():
    model = get_peft_model(model_of("bart", 1), PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4))
    inputs = sources()
    expected = model.generate(**inputs, num_beams=3)
    found = model.generate(**inputs, num_beams=3, custom_generate=shrinking_search)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", SHARED)
def test_a_cpu_generates_by_sdpa_and_leaves_the_kernel_of_the_training(kind, kernel):
    model = model_of(kind, 0)
    model.set_attn_implementation(kernel)
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    with generating(model, None):
        assert {part.config._attn_implementation for part in parts} == {"sdpa"}
    assert {part.config._attn_implementation for part in parts} == {kernel}


def test_of_equal_scores_greedy_search_takes_the_first():
    model = model_of("marian", 0)
    model.final_logits_bias.copy_(torch.tensor([0.0, 1.0, 5.0, 5.0, 2.0]).repeat(12))
    model.lm_head.weight.data.zero_()
    inputs = sources()
    found = model.generate(**inputs, num_beams=1, custom_generate=shrinking_search)
    assert found.tolist() == model.generate(**inputs, num_beams=1).tolist()
    assert set(found.flatten().tolist()) == {2}


def test_scores_that_are_not_numbers_end_at_the_greatest_length():
    model = model_of("marian", 0)
    model.final_logits_bias.fill_(torch.nan)
    for beams in (1, 3):
        found = model.generate(**sources(), num_beams=beams, custom_generate=shrinking_search)
        assert len(found) == 12
        assert found.shape[1] <= 41
