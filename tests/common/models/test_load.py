"""Test names of checkpoints (local, embedded, hub), heads, labels and types."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from huggingface_hub import constants
from peft import TaskType
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
)

from common.args import DEFAULT_ENCODER, ModelArguments, TrainingArguments
from common.errors import InputError
from common.inference.predictor import Predictor
from common.models import load as models
from common.models.load import LoadedModel, load_model, load_tokenizer, resolve_model
from common.speed import apply
from common.speed.padding_free import leaves_out_padding
from common.tuning.methods import TuningArguments
from common.tuning.tune import merge, tune
from recipes.ner import train
from recipes.ner.predict import Tagger

LABELS = ["B-X", "I-X", "O"]


def load(name: str, max_length: int = 64, **arguments):
    return load_model(AutoModelForTokenClassification, ModelArguments(name, **arguments), LABELS, max_length)


def test_a_local_folder_is_itself(tiny):
    assert resolve_model(tiny) == tiny


def test_the_embedded_encoder_needs_no_network_and_is_checked(monkeypatch):
    folder = Path(resolve_model(DEFAULT_ENCODER))
    assert (folder / "model.safetensors").stat().st_size == 90868376
    package, sha256 = models.EMBEDDED[DEFAULT_ENCODER]
    monkeypatch.setitem(models.EMBEDDED, DEFAULT_ENCODER, (package, sha256[::-1]))
    resolve_model.cache_clear()
    with pytest.raises(InputError, match=rf"sha256 is {sha256}, not .*--force-reinstall"):
        resolve_model(DEFAULT_ENCODER)
    monkeypatch.undo()
    resolve_model.cache_clear()


def test_a_hub_name_offline_ends_in_one_sentence_with_the_remedies():
    with pytest.raises(InputError) as error:
        resolve_model("google-bert/bert-base-cased")
    text = str(error.value)
    assert text.startswith(
        "google-bert/bert-base-cased: no such folder, not in the cache, and the Hugging Face hub cannot be reached"
    )
    assert "local folder" in text
    assert DEFAULT_ENCODER in text
    assert "hf download google-bert/bert-base-cased" in text
    assert "\n" not in text


def test_a_model_that_no_run_has_saved_is_not_looked_for_on_the_hub():
    with pytest.raises(InputError, match=r"outputs/nothing: no such folder.*; train the model first, or name its"):
        resolve_model("outputs/nothing")


class Hub(BaseHTTPRequestHandler):
    """Answer the requests of a download: newest commit, list of files, and files."""

    folder: Path
    commit = "0123456789" * 4

    def do_HEAD(self):
        path = self.path.partition("?")[0]
        content, headers = b"", {}
        if "/resolve/" in path:
            content = (self.folder / path.partition(f"/resolve/{self.commit}/")[2]).read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.commit}
        elif "/tree/" in path:
            files = [file for file in self.folder.rglob("*") if file.is_file()]
            tree = [{"type": "file", "path": str(f.relative_to(self.folder)), "size": f.stat().st_size} for f in files]
            content = json.dumps([file | {"oid": file["path"]} for file in tree]).encode()
        else:
            content = json.dumps({"id": "me/tuned", "sha": self.commit, "siblings": []}).encode()
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Path]:
    """Return a folder that a local hub serves as `me/tuned`."""
    Hub.folder = tmp_path / "hub"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", place)
    template = place + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield Hub.folder
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("method", ["adapter", "prefix"])
def test_a_model_whose_adapter_is_apart_comes_from_the_hub_whole(tiny, tmp_path, hub, monkeypatch, method):
    model = tune(load(tiny), TuningArguments(tuning=method), TaskType.TOKEN_CLS)
    merge(model, str(hub), save=True).save_pretrained(str(hub))
    load_tokenizer(tiny).save_pretrained(hub)
    (hub / "checkpoint-1").mkdir()
    (hub / "checkpoint-1" / "model.safetensors").write_text("not asked for")
    found = Tagger("me/tuned", precision="fp32")
    expected = Tagger(str(hub), precision="fp32")
    inputs = {"input_ids": torch.tensor([[2, 9, 8, 7, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.int64)}
    assert torch.equal(found.model(**inputs).logits, expected.model(**inputs).logits)
    folder = Path(resolve_model("me/tuned"))
    assert tmp_path / "cache" in folder.parents
    assert not (folder / "checkpoint-1").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    resolve_model.cache_clear()
    assert resolve_model("me/tuned") == str(folder)
    with pytest.raises(InputError, match="the adapter is not merged"):
        load("me/tuned")
    resolve_model.cache_clear()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        ("bad name!", "neither a folder nor a valid hub id"),
        ("common", "not a checkpoint, because config.json is missing"),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(InputError, match=message):
        resolve_model(name)


def test_labels_are_set_and_weights_are_float32_whatever_the_checkpoint(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "half")
    weights = {k: v.bfloat16() for k, v in load_file(tmp_path / "half" / "model.safetensors").items()}
    save_file(weights, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    (tmp_path / "half" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    model = load(str(tmp_path / "half")).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.id2label == {0: "B-X", 1: "I-X", 2: "O"}
    assert model.config.label2id == {"B-X": 0, "I-X": 1, "O": 2}


def test_the_head_is_drawn_from_the_seed_and_replaced_for_other_labels(tiny, tmp_path):
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(load(tiny).model.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    AutoModelForTokenClassification.from_pretrained(tiny, num_labels=9).save_pretrained(tmp_path / "nine")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "nine")
    assert load(str(tmp_path / "nine")).model.classifier.out_features == 3


def test_a_head_is_kept_for_the_same_labels_in_its_own_order_and_for_no_others(tiny, tmp_path, capsys):
    for labels in (["O", "I-X", "B-X"], ["O", "I-Y", "B-Y"]):
        folder = tmp_path / labels[1]
        made = AutoModelForTokenClassification.from_pretrained(tiny, id2label=dict(enumerate(labels)))
        made.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
        capsys.readouterr()
        model = load(str(folder)).model
        kept = torch.equal(model.classifier.weight, made.classifier.weight)
        told = "new weights, which training sets: classifier.bias, classifier.weight" in capsys.readouterr().out
        assert torch.equal(
            model.bert.encoder.layer[0].output.dense.weight, made.bert.encoder.layer[0].output.dense.weight
        )
        if labels[1] == "I-X":
            assert kept
            assert not told
            assert list(model.config.id2label.values()) == labels
        else:
            assert not kept
            assert told
            assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)
            assert not model.classifier.bias.any()
            assert list(model.config.id2label.values()) == LABELS


def test_what_cannot_be_loaded_says_why(tiny, tmp_path):
    with pytest.raises(InputError, match=r"--max_seq_length 500: .* reads at most 128 tokens"):
        load(tiny, max_length=500)
    with pytest.raises(InputError, match=r"--max_seq_length 0: must be at least 4"):
        load(tiny, max_length=0)


def test_a_folder_without_a_whole_tokenizer_is_refused(tiny, tmp_path):
    """transformers makes an empty tokenizer of a folder with a configuration only."""
    bert = shutil.copytree(tiny, tmp_path / "bert")
    (bert / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"bert: cannot load the tokenizer \(KeyError: .*download"):
        load_tokenizer(str(bert))
    (bert / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"bert: has no tokenizer; copy tokenizer\.json of the checkpoint"):
        load_tokenizer(str(bert))
    (bert / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"bert: has no tokenizer; copy tokenizer\.json, or vocab\.txt, of the check"):
        load_tokenizer(str(bert))
    (bert / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nmara\n")
    assert load_tokenizer(str(bert))("Mara")["input_ids"] == [2, 5, 3]


def test_a_chat_template_comes_from_the_hub_in_its_own_file(tiny, hub):
    shutil.copytree(tiny, hub)
    (hub / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(resolve_model("me/tuned"))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Go"}], tokenize=False) == "Go!"


def test_attention_dropout_reaches_the_model(tiny):
    assert load(tiny, attention_dropout=0.25).model.config.attention_probs_dropout_prob == 0.25
    with pytest.raises(InputError, match="between 0 and 1"):
        load(tiny, attention_dropout=2.0)


@pytest.mark.parametrize(
    ("accelerator", "dropout", "read_length", "asked", "kernel"),
    [
        (False, 0.1, 512, None, "eager"),
        (False, 0.0, 64, None, "eager"),
        (False, 0.0, 512, None, "sdpa"),
        (False, 0.1, 64, "sdpa", "sdpa"),
        (True, 0.1, 64, None, "sdpa"),
    ],
)
def test_attention_kernel_follows_the_hardware(
    tokenizer, tmp_path, monkeypatch, accelerator, dropout, read_length, asked, kernel
):
    """An encoder-decoder shows the kernel; an encoder without padding hides it."""
    config = BartConfig(
        vocab_size=100, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, attention_dropout=dropout,
    )  # fmt: skip
    args = TrainingArguments(output_dir=str(tmp_path), precision="fp32")
    model = BartForConditionalGeneration(config)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    apply(LoadedModel(model, tokenizer, read_length=read_length, attn_implementation=asked), args)
    assert model.config._attn_implementation == kernel


@pytest.fixture
def byte_level(tmp_path) -> str:
    """Return the folder of a tiny GPT-2 with a byte-level BPE tokenizer without padding token, like GPT-2."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["a new york b"] * 50, vocab_size=300, special_tokens=["<|endoftext|>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    GPT2Model(config).save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_decoder_that_pads_left_is_trained_and_predicted_with_one_side(byte_level, tmp_path):
    path = Path(byte_level, "tokenizer_config.json")
    sides = {"padding_side": "left", "truncation_side": "left"}
    path.write_text(json.dumps(json.loads(path.read_text()) | sides))
    assert load_tokenizer(byte_level, one_side=False).padding_side == "left"  # of a language model
    head = AutoModelForSequenceClassification
    loaded = load_model(head, ModelArguments(byte_level), ["a", "b"], 32)
    assert (loaded.tokenizer.padding_side, loaded.tokenizer.truncation_side) == ("right", "right")
    assert loaded.tokenizer.pad_token == "<|endoftext|>"  # the checkpoint has no padding token
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id
    texts = ["a new york", "b", "new york b a a new"]
    rows = [{"input_ids": loaded.tokenizer(text)["input_ids"]} for text in texts]
    batch = DataCollatorWithPadding(loaded.tokenizer, pad_to_multiple_of=8)(rows)
    model = loaded.model.eval()
    with torch.no_grad():
        together = model(**batch).logits
        alone = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").padding_side == "right"
    predictor = Predictor(head, "ForSequenceClassification", str(tmp_path / "saved"), precision="fp32")
    found = torch.zeros_like(together)
    for numbers, logits in predictor.logits({"input_ids": [row["input_ids"] for row in rows]}):
        found[numbers] = logits.cpu()
    assert torch.allclose(found, together, atol=1e-4)


def test_predict_reads_special_tokens_as_training_did(byte_level, tmp_path):
    for allowed in (False, True):
        arguments = ModelArguments(byte_level, allow_special_tokens=allowed)
        loaded = load_model(AutoModelForTokenClassification, arguments, LABELS, 32)
        folder = tmp_path / str(allowed)
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        for tokenizer in (loaded.tokenizer, load_tokenizer(str(folder))):
            found = tokenizer.eos_token_id in tokenizer("a<|endoftext|> b")["input_ids"]
            assert found is allowed
        tagger = Tagger(str(folder), precision="fp32", allow_special_tokens=not allowed)
        assert tagger.tokenizer.split_special_tokens is allowed


def test_a_decoder_trains_and_predicts(byte_level, arguments, tmp_path):
    arguments[arguments.index("--model_name_or_path") + 1] = byte_level
    train.main([*arguments, "--output_dir", str(tmp_path / "decoder")])
    tagger = Tagger(str(tmp_path / "decoder"), precision="fp32")
    assert leaves_out_padding(tagger.model) is not torch.accelerator.is_available()
    assert [len(tags) for tags, _ in tagger([["a"] * 3, ["new", "york"] * 60])] == [3, 120]


def test_code_that_a_checkpoint_brings_along_is_not_run(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path / "trap")
    config = json.loads((tmp_path / "trap" / "config.json").read_text())
    config |= {"model_type": "trap", "auto_map": {"AutoConfig": "trap.C", "AutoModelForTokenClassification": "trap.M"}}
    (tmp_path / "trap" / "config.json").write_text(json.dumps(config))
    (tmp_path / "trap" / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nC = M = None\n")
    with pytest.raises(InputError, match=r"config\.json names code \(auto_map\), which is never run"):
        load(str(tmp_path / "trap"))
    assert not (tmp_path / "ran").exists()


def test_merged_and_unmerged_lora_agree_and_the_head_is_trained_in_full(tiny, tmp_path):
    torch.manual_seed(0)
    plain = load(tiny)
    head = sum(p.numel() for p in plain.model.classifier.parameters())
    tuned = tune(plain, TuningArguments(lora_r=4, lora_target_modules=["query", "value"]), TaskType.TOKEN_CLS)
    model = tuned.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == head + 2 * 2 * 4 * (64 + 64)  # layers, matrices, rank, in + out
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)  # the initial value 0 would hide errors
    ids = torch.randint(5, 500, (3, 20))
    with torch.no_grad():
        unmerged = model.eval()(input_ids=ids).logits
        merged = merge(tuned, str(tmp_path), save=True).eval()
        assert (merged(input_ids=ids).logits - unmerged).abs().max() < 1e-5
        assert (load(tiny).model.eval()(input_ids=ids).logits - unmerged).abs().max() > 1e-2
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 4
    assert adapter["base_model_name_or_path"] == tiny
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_lora_modules_that_do_not_exist_are_an_input_error(tiny):
    with pytest.raises(InputError, match="--lora_target_modules"):
        tune(load(tiny), TuningArguments(lora_r=4, lora_target_modules=["q_proj"]), TaskType.TOKEN_CLS)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_lora_is_refused_where_it_could_not_be_merged(tiny, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(InputError, match=f"cannot be merged under {name}"):
        tune(load(tiny), TuningArguments(lora_r=4), TaskType.TOKEN_CLS)


def test_the_folder_of_a_stopped_run_says_what_to_do(tmp_path):
    for name in ("checkpoint-8", "checkpoint-12", "checkpoint-100"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"no model; resume the run \(its train command with --resume_from_checkpoint"):
        resolve_model(str(tmp_path))  # checkpoints of an adapter are no models
    for name in ("checkpoint-8", "checkpoint-12"):
        (tmp_path / name / "config.json").touch()
    with pytest.raises(InputError, match=r"true\), or name a checkpoint: .*checkpoint-12$"):
        resolve_model(str(tmp_path))
