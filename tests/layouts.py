"""Tiny tokenizers in the layouts of published ones: normalizer, pre-tokenizer, model, decoder and special tokens."""

import json
from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.conftest import SAMPLE, read_jsonl

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
#: layout -> model type, class of the tokenizer, roles of its special tokens
LAYOUTS: dict[str, tuple[str, str, dict[str, str]]] = {}
BUILDERS = {}
BERT = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
FAIRSEQ = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
ROBERTA = FAIRSEQ | {"cls": "<s>", "sep": "</s>", "mask": "<mask>"}


def layout(name: str, model_type: str, kind: str, roles: dict[str, str]):
    """Register the function that builds the backend of a layout."""

    def add(build):
        LAYOUTS[name], BUILDERS[name] = (model_type, kind, roles), build
        return build

    return add


def texts() -> list[str]:
    rows = [" ".join(row["tokens"]) for row in read_jsonl(SAMPLE / "train.jsonl")[:300]]
    return [*rows, "Ça va, Zoë? Привет, мир. नमस्ते 日本語 مرحبا", "It wasn't (really) bad, in 2024.\n\tNo."]


@cache
def trained(kind: str) -> str:
    """Return a small trained model of a kind as JSON; layouts of a kind share its vocabulary."""
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    elif kind == "pieces":
        backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=500)
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"])
    else:
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=500)
    backend.train_from_iterator(texts(), trainer)
    return json.dumps(json.loads(backend.to_str())["model"])


def words(special: list[str]) -> models.WordPiece:
    learned = [word for word in json.loads(trained("words"))["vocab"] if word not in special]
    vocab = {word: i for i, word in enumerate([*special, *learned])}
    return models.WordPiece(vocab, unk_token="[UNK]")


def bpe(kind: str, special: list[str], **options) -> models.BPE:
    """Return a BPE model whose vocabulary begins with `special`, and the bytes under `byte_fallback`."""
    described = json.loads(trained(kind))
    first = [*special, *(f"<0x{byte:02X}>" for byte in range(256) if options.get("byte_fallback"))]
    ids = {token: i for i, token in enumerate([*first, *(t for t in described["vocab"] if t not in first)])}
    return models.BPE(ids, [tuple(pair) for pair in described["merges"]], **options)


def unigram(special: list[str], unknown: str, last: tuple[str, ...] = ()) -> models.Unigram:
    """Return a Unigram model with the special tokens as pieces of score 0, as converted from SentencePiece."""
    pieces = [(piece, score) for piece, score in json.loads(trained("unigram"))["vocab"] if piece != "<unk>"]
    vocab = [*((token, 0.0) for token in special), *pieces, *((token, 0.0) for token in last)]
    return models.Unigram(vocab, unk_id=special.index(unknown))


def template(backend: Tokenizer, single: str, pair: str) -> processors.TemplateProcessing:
    tokens = {part.split(":")[0] for part in f"{single} {pair}".split() if not part.startswith("$")}
    return processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, backend.token_to_id(token)) for token in sorted(tokens)]
    )


def added(backend: Tokenizer, special: list[str], lstrip: str | None = None) -> Tokenizer:
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False, lstrip=t == lstrip) for t in special])
    return backend


@layout("bert", "bert", "BertTokenizer", BERT)
def build_bert() -> Tokenizer:
    backend = Tokenizer(words(list(BERT.values())))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    added(backend, list(BERT.values()))
    backend.post_processor = template(backend, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    return backend


def like_roberta() -> Tokenizer:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend = Tokenizer(bpe("bytes", special))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    added(backend, special, lstrip="<mask>")
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
    return backend


layout("roberta", "roberta", "RobertaTokenizer", ROBERTA)(like_roberta)
layout("bart", "bart", "BartTokenizer", ROBERTA)(like_roberta)


@layout("deberta-v2", "deberta-v2", "DebertaV2Tokenizer", BERT)
def build_deberta_v2() -> Tokenizer:
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    backend = Tokenizer(unigram(special, "[UNK]", ("[MASK]",)))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    added(backend, [*special, "[MASK]"])
    backend.post_processor = template(backend, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    return backend


def like_sentencepiece(backend: Tokenizer) -> Tokenizer:
    backend.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Metaspace()
    return backend


@layout("xlm-roberta", "xlm-roberta", "XLMRobertaTokenizer", ROBERTA)
def build_xlm_roberta() -> Tokenizer:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = like_sentencepiece(Tokenizer(unigram(special, "<unk>", ("<mask>",))))
    added(backend, [*special, "<mask>"], lstrip="<mask>")
    backend.post_processor = template(backend, "<s> $A </s>", "<s> $A </s> </s> $B </s>")
    return backend


@layout("mbart", "mbart", "MBartTokenizer", ROBERTA)
def build_mbart() -> Tokenizer:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    last = ("en_XX", "de_DE", "fr_XX", "<mask>")
    backend = like_sentencepiece(Tokenizer(unigram(special, "<unk>", last)))
    added(backend, [*special, *last], lstrip="<mask>")
    backend.post_processor = template(backend, "$A </s> en_XX", "$A $B </s> en_XX")
    return backend


@layout("albert", "albert", "AlbertTokenizer", BERT | {"pad": "<pad>", "unk": "<unk>"})
def build_albert() -> Tokenizer:
    special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(unigram(special, "<unk>"))
    quotes = [normalizers.Replace(mark, '"') for mark in ("``", "''")]
    folded = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    backend.normalizer = normalizers.Sequence([*quotes, *folded, normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    added(backend, special, lstrip="[MASK]")
    backend.post_processor = template(backend, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    return backend


@layout("t5", "t5", "T5Tokenizer", {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"})
def build_t5() -> Tokenizer:
    special, last = ["<pad>", "</s>", "<unk>"], tuple(f"<extra_id_{i}>" for i in (1, 0))
    backend = like_sentencepiece(Tokenizer(unigram(special, "<unk>", last)))
    added(backend, [*special, *last])
    backend.post_processor = template(backend, "$A </s>", "$A </s> $B </s>")
    return backend


@layout("gpt2", "gpt2", "GPT2Tokenizer", dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>"))
def build_gpt2() -> Tokenizer:
    backend = Tokenizer(bpe("bytes", ["<|endoftext|>"]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return added(backend, ["<|endoftext|>"])


def after_split(backend: Tokenizer, pattern: str) -> Tokenizer:
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    return backend


@layout("llama-3", "llama", "PreTrainedTokenizerFast", {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"})
def build_llama_3() -> Tokenizer:
    backend = after_split(Tokenizer(bpe("bytes", [], ignore_merges=True)), LLAMA_3)
    added(backend, ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"])
    begin = template(backend, "<|begin_of_text|> $A", "<|begin_of_text|> $A <|begin_of_text|>:1 $B:1")
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return backend


@layout("qwen2", "qwen2", "Qwen2Tokenizer", {"eos": "<|im_end|>", "pad": "<|endoftext|>"})
def build_qwen2() -> Tokenizer:
    backend = after_split(Tokenizer(bpe("bytes", [])), QWEN_2)
    backend.normalizer, backend.post_processor = normalizers.NFC(), processors.ByteLevel(trim_offsets=False)
    added(backend, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return backend


@layout("gemma", "gemma", "GemmaTokenizer", {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"})
def build_gemma() -> Tokenizer:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>"]
    backend = Tokenizer(bpe("pieces", special, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    added(backend, special)
    backend.post_processor = template(backend, "<bos> $A", "<bos> $A <bos>:1 $B:1")
    return backend


@layout("mistral", "mistral", "LlamaTokenizer", {"bos": "<s>", "eos": "</s>", "unk": "<unk>"})
def build_mistral() -> Tokenizer:
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(bpe("pieces", special, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    added(backend, special)
    backend.post_processor = template(backend, "<s> $A", "<s> $A <s>:1 $B:1")
    return backend


@layout("modernbert", "modernbert", "PreTrainedTokenizerFast", BERT)
def build_modernbert() -> Tokenizer:
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    backend = Tokenizer(bpe("bytes", []))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_tokens([AddedToken(" " * size, special=False, normalized=True) for size in (4, 3, 2)])
    added(backend, special, lstrip="[MASK]")
    backend.post_processor = template(backend, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]")
    return backend


def save_tokenizer(name: str, folder: Path, **config) -> str:
    """Write the tokenizer of a layout, and a config.json with its model type, into `folder`."""
    model_type, kind, roles = LAYOUTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    BUILDERS[name]().save(str(folder / "tokenizer.json"))
    described = {f"{role}_token": token for role, token in roles.items()} | {"tokenizer_class": kind} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return str(folder)
