"""Test the benchmark: counted operations against torch's count, and the table of runs."""

import importlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    M2M100Config,
    M2M100ForConditionalGeneration,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from common.cli import _Parser
from common.speed.head import HeadAtLabels, losses_at_labels, read_first_tokens
from common.speed.padding_free import leave_out_padding
from tests.benchmarks.bench import JOBS, markdown, quantities
from tests.benchmarks.operations import operations, sizes
from tests.test_docs import RECIPES

ROWS, SOURCE, TARGET, VOCABULARY = 3, 24, 17, 150
BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 96, "attn_implementation": "eager",
}  # fmt: skip


def bert2bert() -> EncoderDecoderModel:
    sides = BertConfig(**BERT), BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*sides)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return EncoderDecoderModel(config)


def m2m100() -> M2M100ForConditionalGeneration:
    return M2M100ForConditionalGeneration(
        M2M100Config(
            vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=96, decoder_ffn_dim=64, encoder_layerdrop=0.0,
            decoder_layerdrop=0.0, decoder_start_token_id=1, attn_implementation="eager",
        )
    )  # fmt: skip


def t5() -> T5ForConditionalGeneration:
    sizes_of_t5 = {"d_model": 32, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 6}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes_of_t5, decoder_start_token_id=0))


MODELS = {
    "sentiment": lambda: BertForSequenceClassification(BertConfig(**BERT)),
    "sentiment, RoBERTa": lambda: RobertaForSequenceClassification(RobertaConfig(**BERT, pad_token_id=0)),
    "ner": lambda: BertForTokenClassification(BertConfig(**BERT)),
    "qa": lambda: BertForQuestionAnswering(BertConfig(**BERT)),
    "mlm": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "clm": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2, attn_implementation="eager")
    ),
    "translation": m2m100,
    "summarization": bert2bert,
    "T5": t5,
}


def batch_for(model, rows: int = ROWS, source: int = SOURCE) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, VOCABULARY, (rows, source))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        return inputs | {"labels": torch.randint(5, VOCABULARY, (rows, TARGET))}
    if "QuestionAnswering" in kind:
        return inputs | {"start_positions": ids[:, 0] % source, "end_positions": ids[:, 1] % source}
    if "LM" in kind:
        return inputs | {"labels": ids.clone()}
    return inputs | {"labels": (ids if "Token" in kind else ids[:, 0]) % 2}


def counted(model, batch: dict[str, torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_operations_are_those_that_torch_counts(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    batch = batch_for(model)
    found = operations(model, sizes(batch, model.config.is_encoder_decoder))
    assert found == pytest.approx(counted(model, batch), rel=0.02)


def test_operations_of_a_model_under_lora():
    torch.manual_seed(0)
    base = BertForTokenClassification(BertConfig(**BERT | {"num_hidden_layers": 8}))
    batch = batch_for(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", exclude_modules="classifier"))
    # torch neither computes nor counts unused gradients in the first layer
    assert operations(model, sizes(batch, False)) == pytest.approx(counted(model, batch), rel=0.03)


def test_padding_and_positions_without_a_label_are_no_operations():
    model = MODELS["mlm"]()
    one, other = batch_for(model, rows=1, source=8), batch_for(model, rows=1, source=20)
    other["labels"][0, 3:] = -100
    padded = {name: torch.zeros(2, 24, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    padded["labels"] = torch.full((2, 24), -100)
    for i, row in enumerate((one, other)):
        for name, values in row.items():
            padded[name][i, : values.shape[1]] = values[0]
    together = operations(model, sizes(padded, False))
    assert together == operations(model, sizes(one, False)) + operations(model, sizes(other, False))
    every = sizes(other | {"labels": other["input_ids"]}, False)
    assert operations(model, sizes(other, False)) < operations(model, every)


@pytest.mark.parametrize("name", ["sentiment", "mlm"])
def test_operations_of_a_last_layer_that_computes_chosen_sub_tokens_only(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    batch = batch_for(model, rows=40, source=64)  # each row fills a bin; all rows together have 2,560 of 2,624 tokens
    whole = operations(model, sizes(batch, False))
    assert leave_out_padding(model) is None
    if name == "sentiment":
        assert read_first_tokens(model) is None
        found = counted(model, batch)
    else:
        head, labels = HeadAtLabels(model), batch.pop("labels")
        labels[labels % 6 != 0] = -100
        with head.at(labels), FlopCounterMode(display=False) as counter:
            losses_at_labels(model(**batch).logits, labels).sum().backward()
        found, batch["labels"] = counter.get_total_flops(), labels
    assert operations(model, sizes(batch, False)) == pytest.approx(found, rel=0.03)
    assert found < 0.85 * whole


def run_of(arm: str, seed: int, **more) -> dict:
    about = {"recipe": "ner", "data": "sample", "rows": {"train": 64, "test": None}, "epochs": 1, "batch": 32}
    return about | {"arm": arm, "seed": seed, "cold": seed % 2 == 1, "train_share": 0.4, "score": 0.5} | more


def test_ratios_are_of_rounds_and_tell_how_many_times_as_fast_ours_is():
    speeds = {"ours": [30.0, 20.0, 90.0], "stock": [10.0, 10.0, 30.0]}
    runs = [
        run_of(arm, seed, train_tokens=speed, job=600 / speed, first_step=seed, preparation=1.0, peak_mib=seed * 100)
        for arm, own in speeds.items()
        for seed, speed in enumerate(own, 1)
    ]
    runs.append(
        run_of("ours", 4, train_tokens=1.0, job=1.0, first_step=4, preparation=1.0, peak_mib=1)
    )  # a stopped run
    found = quantities(runs)
    assert found["train_tokens"]["ratio"] == [3, 2, 3]
    assert found["job"]["ratio"] == [3, 2, 3]
    assert found["peak_mib"]["ratio"] == [1, 1, 1]
    assert found["first_step_cold"]["ours"] == [1, 3]
    assert found["first_step_cached"]["ours"] == [2, 4]
    table = markdown("title", {"ner": runs})
    assert "| ner | training, tokens per second | 25 (1–90) | 10 (10–30) | 3x (2–3) |" in table
    assert "| ner, sample | 64, all | 1, 32 | 3x |  |  | 3x | 1x | 40% | 0.500 ± 0.000 |" in table


def test_each_recipe_has_a_job_that_it_and_its_stock_script_understand():
    assert set(JOBS) <= RECIPES
    assert len(JOBS) >= 7
    for recipe, job in JOBS.items():
        importlib.import_module(f"tests.benchmarks.stock_{job.stock}")
        arguments = importlib.import_module(f"recipes.{recipe}.{job.script}").ARGUMENTS
        for words in (job.ours, job.start or []):
            _Parser(arguments, None, show_all=False).parse(words)
