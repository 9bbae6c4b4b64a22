"""Test checkpoints with missing, damaged or unfitting weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LongformerConfig,
    LongformerForMaskedLM,
    T5Config,
    T5Model,
)

from common.args import ModelArguments
from common.errors import InputError
from common.inference.predictor import load_saved
from common.models.encoder_decoder import Seq2SeqModelArguments, load_encoder_decoder
from common.models.load import load_model, resolve_model
from common.models.weights import zero_new_biases
from tests.layouts import save_tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture
def bert(tmp_path) -> Path:
    """Return the folder of a random BERT."""
    folder = Path(save_tokenizer("bert", tmp_path / "bert"))
    size = len(AutoTokenizer.from_pretrained(folder))
    BertModel(BertConfig(vocab_size=size, max_position_embeddings=64, **SIZES)).save_pretrained(folder)
    return folder


def load(folder: Path):
    return load_model(AutoModelForTokenClassification, ModelArguments(str(folder)), ["O", "B-X"], 32)


def configure(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("content", [b"", b"{}", "half"])
def test_a_damaged_file_of_weights_is_named(bert, content):
    file = bert / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000] if content == "half" else content)
    for begin in (load, lambda folder: load_saved(AutoModelForTokenClassification, str(folder))):
        with pytest.raises(InputError, match=r"bert/model\.safetensors: is damaged \(.*\); download or copy it again"):
            begin(bert)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(bert, name):
    (bert / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n")
    with pytest.raises(InputError, match=rf"bert/{name}: is a pointer of git-lfs.*git -C {bert} lfs pull"):
        resolve_model(str(bert))


def test_weights_in_another_format_are_converted_by_the_command_of_the_message(bert, tmp_path, monkeypatch):
    weights = load_file(bert / "model.safetensors")
    (bert / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"bert: has no weights; copy model\.safetensors"):
        load(bert)
    torch.save(weights, bert / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"other formats can run code; convert .*, and give bert-safetensors") as error:
        load(bert)
    with pytest.raises(InputError, match="other formats can run code"):
        load_saved(AutoModelForTokenClassification, str(bert))
    monkeypatch.chdir(tmp_path)
    exec(str(error.value).partition('-c "')[2].partition('"')[0])  # what the command runs
    converted = load(tmp_path / "bert-safetensors").model.state_dict()
    assert all(torch.equal(converted[f"bert.{n}"], value) for n, value in weights.items() if "pooler" not in n)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 64}, r"has the shape \[32\] in the weights and \[64\] by config.json; copy both files"),
        ({"max_position_embeddings": 512}, r"position_embeddings.weight has the shape \[64, 32\] .* \[512, 32\]"),
        ({"num_hidden_layers": 3}, r"lack 16 parameters of the layers in config.json, such as bert.encoder.layer.2"),
    ],
)
def test_weights_of_another_configuration_are_refused(bert, values, message):
    configure(bert, **values)
    with pytest.raises(InputError, match=message):
        load(bert)


def test_weights_under_other_names_are_refused(bert):
    file = bert / "model.safetensors"
    save_file({f"module.{name}": value for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(InputError, match="lack 32 parameters of the layers"):
        load(bert)


def test_new_biases_of_a_head_are_zero_and_others_stay():
    """Longformer without a language-model head had random memory in `lm_head.bias`: losses from 6 to 4e12."""
    model = LongformerForMaskedLM(LongformerConfig(vocab_size=20, attention_window=[4, 4], pad_token_id=1, **SIZES))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    inside = "longformer.encoder.layer.0.output.dense.bias"
    zero_new_biases(model, ["lm_head.bias", "lm_head.decoder.bias", "lm_head.dense.weight", inside])
    assert not model.lm_head.bias.any()
    assert not model.lm_head.decoder.bias.any()
    others = ["lm_head.dense.weight", "lm_head.dense.bias", inside]
    assert all(bool((model.get_parameter(name) == 7).all()) for name in others)


def test_an_encoder_decoder_without_its_layers_is_refused(tmp_path):
    folder = save_tokenizer("t5", tmp_path / "t5")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"d_model": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4, "d_ff": 48}
    T5Model(T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes)).save_pretrained(folder)
    configure(Path(folder), num_layers=2, num_decoder_layers=2)
    with pytest.raises(InputError, match=r"the weights lack .* parameters of the layers"):
        load_encoder_decoder(Seq2SeqModelArguments(folder), tokenizer, 32, 32)
