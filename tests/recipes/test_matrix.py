"""Train, evaluate, save and predict with each recipe on each architecture, or refuse it with a way out."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

from common.errors import InputError, RunStopped
from recipes.clm import predict as clm_predict
from recipes.clm import train as clm
from recipes.mlm import predict as mlm_predict
from recipes.mlm import train as mlm
from recipes.ner import predict as ner_predict
from recipes.ner import train as ner
from recipes.qa import predict as qa_predict
from recipes.qa import train as qa
from recipes.relation import predict as relation_predict
from recipes.relation import train as relation
from recipes.sentiment import predict as sentiment_predict
from recipes.sentiment import train as sentiment
from recipes.summarization import predict as summarization_predict
from recipes.summarization import train as extractive
from recipes.summarization import train_abstractive as abstractive
from recipes.translation import predict as translation_predict
from recipes.translation import train as translation
from tests.conftest import read_jsonl, write_jsonl
from tests.layouts import save_tokenizer

SENTENCES = [
    "Mara went to Berlin on Monday, and the train was late.", "The committee of Kenya met in Paris last week.",
    "No minister of Peru spoke in London about the new law.", "Anna works for a bank in Madrid and lives in Rome.",
]  # fmt: skip
TEXTS = [f"{SENTENCES[i % 4]} {SENTENCES[(i + 1) % 4]}" for i in range(16)]
PLACES = ("Berlin", "Kenya", "Paris", "Peru", "London", "Madrid", "Rome")


def tagged(text: str) -> dict:
    words = text.split()
    return {"tokens": words, "ner_tags": ["B-LOC" if word.strip(".,") in PLACES else "O" for word in words]}


def asked(number: int, text: str) -> dict:
    place = next(place for place in PLACES if place in text)
    answers = {"text": [place], "answer_start": [text.index(place)]}
    return {"id": str(number), "question": "Which place is named first?", "context": text, "answers": answers}


def related(number: int, text: str) -> dict:
    place = text.index(next(place for place in PLACES if place in text))
    return {"text": text, "head": [0, 4, "PER"], "tail": [place, place + 4, "LOC"], "label": "ab"[number % 2]}


PAIRS = [{"translation": {"en": text, "de": text.replace("the", "die")}} for text in TEXTS]
SUMMARIES = [{"document": f"{a} {b}", "summary": a} for a, b in zip(TEXTS, TEXTS[1:] + TEXTS[:1], strict=True)]
WRITING = [
    "--max_source_length", "64", "--max_target_length", "64", "--max_tokens_per_batch", "256", "--num_beams", "4",
]  # fmt: skip
#: recipe -> main of train, main of predict, rows, more arguments
RECIPES = {
    "sentiment": (
        sentiment.main, sentiment_predict.main,
        [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(TEXTS)], ["--max_seq_length", "48"],
    ),
    "ner": (
        ner.main, ner_predict.main, [tagged(text) for text in TEXTS],
        ["--max_seq_length", "48", "--doc_stride", "8"],
    ),
    "qa": (
        qa.main, qa_predict.main, [asked(i, text) for i, text in enumerate(TEXTS)],
        ["--max_seq_length", "64", "--doc_stride", "8", "--max_question_length", "24"],
    ),
    "relation": (
        relation.main, relation_predict.main, [related(i, text) for i, text in enumerate(TEXTS)],
        ["--max_seq_length", "48"],
    ),
    "mlm": (mlm.main, mlm_predict.main, [{"text": text} for text in TEXTS], ["--max_seq_length", "48"]),
    "clm": (clm.main, clm_predict.main, [{"text": text} for text in TEXTS], ["--max_seq_length", "48"]),
    "extractive": (extractive.main, summarization_predict.main, SUMMARIES, ["--max_source_length", "64"]),
    "abstractive": (
        abstractive.main, summarization_predict.main, SUMMARIES,
        WRITING,
    ),
    "translation": (
        translation.main, translation_predict.main, PAIRS,
        [*WRITING, "--source_lang", "en", "--target_lang", "de"],
    ),
}  # fmt: skip

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 80,
}  # fmt: skip
BOTH = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 80, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 48}
GROUPED = SIZES | {"num_key_value_heads": 2}
#: architecture -> layout of its tokenizer, model type, values of its configuration
ARCHITECTURES = {
    "bert": ("bert", "bert", SIZES),
    "roberta": ("roberta", "roberta", SIZES),
    "deberta-v2": ("deberta-v2", "deberta-v2", SIZES | {"position_biased_input": False, "relative_attention": True}),
    "distilbert": ("bert", "distilbert", {
        "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 80,
    }),
    "albert": ("albert", "albert", SIZES | {"embedding_size": 16}),
    "xlm-roberta": ("xlm-roberta", "xlm-roberta", SIZES),
    "electra": ("bert", "electra", SIZES | {"embedding_size": 16}),
    "mpnet": ("bert", "mpnet", SIZES),
    "modernbert": ("modernbert", "modernbert", SIZES),
    "bart": ("bart", "bart", BOTH),
    "t5": ("t5", "t5", T5),
    "umt5": ("t5", "umt5", T5),
    "gpt2": ("gpt2", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 80}),
    "llama": ("llama-3", "llama", GROUPED),
    "qwen2": ("qwen2", "qwen2", GROUPED),
    "gemma": ("gemma", "gemma", GROUPED | {"head_dim": 8}),
}  # fmt: skip
ENCODERS = {"bert", "roberta", "deberta-v2", "distilbert", "albert", "xlm-roberta", "electra", "mpnet", "modernbert"}
DECODERS = {"gpt2", "llama", "qwen2", "gemma"}
PAIRED = {"bart", "t5", "umt5"}
#: recipe -> architectures that cannot be, and the start of the way out in the message
ENCODER = "has no head .*; choose an encoder as --model_name_or_path: bert, roberta"
DECODER = "choose a decoder"
WRITERS = dict.fromkeys(ENCODERS, "add a decoder with --warm_start both, name an encoder-decoder such as T5, BART") | (
    dict.fromkeys(DECODERS, "choose an encoder-decoder such as T5, BART|add a decoder with --warm_start both")
)
REFUSED = {
    "sentiment": {}, "ner": {"bart": ENCODER}, "qa": {"gemma": ENCODER}, "relation": {"bart": ENCODER},
    "extractive": {"bart": ENCODER},
    "mlm": dict.fromkeys(DECODERS | PAIRED, f"give an encoder as --model_name_or_path|{ENCODER}"),
    "clm": dict.fromkeys(ENCODERS | PAIRED, DECODER), "abstractive": WRITERS, "translation": WRITERS,
}  # fmt: skip
#: cells that failed once
NORMAL = {("qa", "bart"), ("qa", "t5"), ("mlm", "bart"), ("clm", "bart"), ("translation", "umt5")}


def checkpoint(name: str, folder: Path) -> str:
    """Save a tiny random model with the tokenizer of its layout."""
    layout, kind, values = ARCHITECTURES[name]
    save_tokenizer(layout, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos", "cls", "sep")}
    ids = {role: value for role, value in ids.items() if value is not None}
    if name in PAIRED:
        ids["decoder_start_token_id"] = ids["pad_token_id"] if "t5" in kind else ids["eos_token_id"]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **values | ids)
    (AutoModelForSeq2SeqLM if name in PAIRED else AutoModel).from_config(config).save_pretrained(folder)
    return str(folder)


def cells():
    for recipe in RECIPES:
        for name in ARCHITECTURES:
            soak = () if (recipe, name) in NORMAL else pytest.mark.soak
            yield pytest.param(recipe, name, marks=soak, id=f"{recipe}-{name}")


def words_of(recipe: str, model: str, folder: Path) -> list[str]:
    """Return the arguments of three training steps."""
    rows, more = RECIPES[recipe][2:]
    files = [
        word for split in ("train", "validation", "test")
        for word in (f"--{split}_file", write_jsonl(folder / f"{split}.jsonl", rows))
    ]  # fmt: skip
    words = [
        *files, "--model_name_or_path", model, "--output_dir", str(folder / "out"), "--precision", "fp32",
        "--max_steps", "3", "--disable_tqdm", "true", *more,
    ]  # fmt: skip
    return words if more[-1] == "de" or more is WRITING else [*words, "--per_device_train_batch_size", "4"]


def check_predict(recipe: str, model: str, folder: Path) -> None:
    """Predict the first rows with the saved model."""
    source = RECIPES[recipe][2]
    if recipe == "mlm":
        mask = AutoTokenizer.from_pretrained(model).mask_token
        source = [{"text": row["text"].replace("Monday", mask).replace("week", mask)} for row in source]
    elif recipe == "translation":
        source = [{"text": row["translation"]["en"]} for row in source]
    given, out = write_jsonl(folder / "input.jsonl", source[:5]), folder / "predicted.jsonl"
    RECIPES[recipe][1](["--model", str(folder / "out"), "--input", given, "--output", str(out)])
    assert len(read_jsonl(out)) == 5


@pytest.mark.parametrize(("recipe", "name"), cells())
def test_matrix(recipe, name, tmp_path):
    train, model = RECIPES[recipe][0], checkpoint(name, tmp_path / "model")
    words = words_of(recipe, model, tmp_path)
    if name in REFUSED[recipe]:
        with pytest.raises(InputError, match=REFUSED[recipe][name]):
            train(words)
        assert not (tmp_path / "out").exists()
        return
    assert train(words)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]
    check_predict(recipe, model, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("recipe", RECIPES)
def test_matrix_of_failures_right_after_training(recipe, tmp_path, monkeypatch):
    """Nothing that the recipe does after training is needed to predict."""
    name = "gpt2" if recipe == "clm" else "bart" if recipe in ("abstractive", "translation") else "bert"
    model = checkpoint(name, tmp_path / "model")
    monkeypatch.delattr(transformers.Trainer, "save_state")
    with pytest.raises(RunStopped, match="the trained model is saved here; use it: make predict RECIPE="):
        RECIPES[recipe][0](words_of(recipe, model, tmp_path))
    check_predict(recipe, model, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize(("recipe", "name"), [("clm", "gpt2"), ("translation", "bart"), ("abstractive", "t5")])
def test_matrix_of_contradictory_generation_settings(recipe, name, tmp_path, capsys):
    model = checkpoint(name, tmp_path / "model")
    settings = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "num_return_sequences": 3, "max_new_tokens": 0}
    file = tmp_path / "model" / "generation_config.json"
    ids = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(ids | settings))
    RECIPES[recipe][0](words_of(recipe, model, tmp_path))
    assert "contradictory or invalid settings are unset" in capsys.readouterr().err
    check_predict(recipe, model, tmp_path)
