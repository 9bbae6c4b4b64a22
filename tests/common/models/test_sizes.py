"""Test that the sizes of tokenizer, embeddings, positions and arguments are checked together."""

import pytest
import torch
from peft import TaskType
from transformers import AutoConfig, AutoModel

from common.args import ModelArguments
from common.errors import InputError
from common.models.load import load_model
from common.models.sizes import check_vocabulary, pad_multiple, positions_of
from common.tuning import TuningArguments, tune
from recipes.ner import predict, train
from tests.common.speed.models import OWN, PAIRS, SIZES, T5
from tests.conftest import read_jsonl

ENCODERS = ("albert", "bert", "camembert", "data2vec-text", "electra", "gpt2", "longformer", "mpnet", "roberta")
#: model type -> tokens that 40 positions hold
HELD = dict.fromkeys(ENCODERS, 40) | {
    "camembert": 38, "data2vec-text": 38, "longformer": 38, "mpnet": 38, "roberta": 38, "xlm-roberta": 38,
    "roberta-prelayernorm": 38, "distilbert": 40, "opt": 40, "nystromformer": 40, "llama": 40, "modernbert": 40,
}  # fmt: skip


def body(kind: str, **sizes):
    torch.manual_seed(0)
    values = OWN.get(kind, SIZES) | {"max_position_embeddings": 40} | sizes
    if kind == "longformer":
        values = values | {"attention_window": 8}
    if kind == "opt":
        values = values | {"word_embed_proj_dim": 32, "ffn_dim": 64}
    return AutoModel.from_config(AutoConfig.for_model(kind, **values)).eval()


def reads(model, length: int) -> bool:
    ids = torch.full((1, length), 7)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", HELD)
def test_a_model_reads_as_many_tokens_as_its_positions_hold(kind):
    model = body(kind)
    assert positions_of(model) == HELD[kind]
    assert reads(model, HELD[kind])
    if kind not in ("llama", "modernbert", "longformer"):  # computed positions; padding to the window
        assert not reads(model, HELD[kind] + 1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bart", (64, 64)), ("mbart", (64, 64)), ("marian", (64, 64)), ("pegasus", (64, 64)), ("m2m_100", (None, None)),
        ("t5", (None, None)), ("led", (48, 32)),
    ],
)  # fmt: skip
def test_each_side_of_an_encoder_decoder_has_its_limit(kind, expected):
    sizes = {"max_encoder_position_embeddings": 48, "max_decoder_position_embeddings": 32, "attention_window": 8}
    values = T5 if kind == "t5" else PAIRS | (sizes if kind == "led" else {})
    model = AutoModel.from_config(AutoConfig.for_model(kind, **values))
    assert (positions_of(model), positions_of(model, "target")) == expected


def test_no_padding_exceeds_the_longest_row():
    assert [pad_multiple(length) for length in (None, 8, 128, 130, 492)] == [8, 8, 8, 1, 1]


def load(folder: str, length: int, tuning: str = "full"):
    loaded = load_model(train.AutoModelForTokenClassification, ModelArguments(folder), ["O", "B-X"], length)
    return tune(loaded, TuningArguments(tuning=tuning), TaskType.TOKEN_CLS)


def test_virtual_tokens_count(tiny):
    load(tiny, 108, "prompt")
    for method in ("prompt", "prefix", "ptuning"):
        with pytest.raises(InputError, match="20 virtual tokens and 109 tokens of text exceed the 128 positions"):
            load(tiny, 109, method)


@pytest.mark.parametrize(("kind", "tuning"), [("bert", "full"), ("roberta", "prompt")])
def test_the_longest_read_length_trains_evaluates_and_predicts(kind, tuning, tokenizer, arguments, small, tmp_path):
    folder = tmp_path / "model"
    length = 63
    held = length + (20 if tuning == "prompt" else 0) + (2 if kind == "roberta" else 0)
    body(kind, max_position_embeddings=held, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = [*arguments, "--model_name_or_path", str(folder), "--tuning", tuning, "--num_train_epochs", "1"]
    with pytest.raises(InputError, match=r"at most 63 tokens; lower --max_seq_length to 63|exceed the 83 "):
        train.main([*words, "--max_seq_length", "64"])
    train.main([*words, "--max_seq_length", "63"])
    long = [{"tokens": ["Berlin"] * 300}]
    (tmp_path / "long.jsonl").write_text('{"tokens": ' + str(long[0]["tokens"]).replace("'", '"') + "}\n")
    out = str(tmp_path / "tags.jsonl")
    predict.main(["--model", str(tmp_path / "out"), "--input", str(tmp_path / "long.jsonl"), "--output", out])
    assert len(read_jsonl(tmp_path / "tags.jsonl")) == 1


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(tokenizer):
    model = body("bert", vocab_size=len(tokenizer) - 1)
    with pytest.raises(InputError, match=rf"ids up to {len(tokenizer) - 1} .* has {len(tokenizer) - 1} embeddings"):
        check_vocabulary(model, tokenizer, "the model")
