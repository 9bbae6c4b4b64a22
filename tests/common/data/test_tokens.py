"""Test that texts get the tokens of the checkpoint's tokenizer, over the layouts of published tokenizers."""

import json
import pickle
import random
from functools import cache
from itertools import accumulate

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.data.blocks import encode
from common.data.language_codes import encode_sources
from common.data.tokens import encode_parts, encodings, set_special_tokens, with_masks
from common.models.encoder_decoder import Seq2SeqModelArguments, train_joint_tokenizer
from common.models.load import load_tokenizer
from recipes.clm import texts as clm
from recipes.clm.arguments import ClmDataArguments
from recipes.clm.completing import Completer
from recipes.mlm.filling import sentences_with_a_gap
from recipes.mlm.masking import INSIDE, START, word_marks
from recipes.ner.train import encode as encode_words
from recipes.qa.spans import cut_windows, trimmed
from recipes.sentiment.texts import cut
from tests.layouts import LAYOUTS, save_tokenizer

#: parts of the random texts: scripts, blanks, newlines, emoji, combining marks, punctuation
PARTS = [
    "Mara", "went", "to", "Oslo", "it", "wasn't", "(really)", "2024", "1,000.5", "a", "snake_case", "#tag", "x\u0301",
    "Zoë", "Straße", "Привет", "Ελληνικά", "नमस्ते", "ไทย", "日本語", "مرحبا", "한국어", "e\u0301te\u0301", "…",
    "--", "«x»", "👍🏽", "👩\u200d👧", "…?!",
]  # fmt: skip
BLANKS = [" ", " ", " ", " ", "", "  ", "    ", "\n", "\n\n", "\t", " \n", "\u00a0"]
ISSUE = ["Mara went", "It wasn't (really) bad, in 2024.\nNo.", " a b ", "", "x"]


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    made = ["".join(rng.choice(PARTS) + rng.choice(BLANKS) for _ in range(rng.randint(1, 8))) for _ in range(count)]
    return [*ISSUE, *(rng.choice(["", "", " ", "\n"]) + text for text in made)]


TEXTS = random_texts(40)


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, tmp_path_factory) -> str:
    return save_tokenizer(request.param, tmp_path_factory.mktemp("layouts") / request.param)


@cache
def both(folder: str) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """Return the tokenizer of a layout as transformers loads it, and as this project does."""
    return AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)


def test_a_text_gets_the_tokens_of_the_plain_tokenizer_after_saving_too(layout, tmp_path):
    plain, own = both(layout)
    own.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": LAYOUTS[layout.rpartition("/")[2]][0]}))
    expected = plain(TEXTS, return_offsets_mapping=True)
    for tokenizer in (own, load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)):
        found = tokenizer(TEXTS, return_offsets_mapping=True)
        assert found["input_ids"] == expected["input_ids"]
        assert found["offset_mapping"] == expected["offset_mapping"]
        assert tokenizer.batch_decode(found["input_ids"]) == plain.batch_decode(expected["input_ids"])
    bare = plain(TEXTS, add_special_tokens=False)["input_ids"]
    assert [encoding.ids for encoding in encodings(own, TEXTS)] == bare
    assert [ids for ids, _ in encode(TEXTS, own, word_marks)] == bare
    assert encode_sources(own, "", TEXTS) == expected["input_ids"]
    assert encode_sources(own, "sum: ", TEXTS) == plain([f"sum: {text}" for text in TEXTS])["input_ids"]
    assert cut(own, TEXTS, None, 512, "head")["input_ids"] == expected["input_ids"]
    assert cut(own, TEXTS, TEXTS[::-1], 512, "head")["input_ids"] == plain(TEXTS, TEXTS[::-1])["input_ids"]


def test_special_tokens_in_a_text_are_text(layout):
    plain, own = both(layout)
    special = {token.content: i for i, token in plain.added_tokens_decoder.items() if token.special}
    unknown = plain.unk_token_id  # characters may be unknown to the tiny vocabularies
    assert special
    allowing = load_tokenizer(layout, True)
    for token, number in special.items():
        for text in (token, f"a {token} b", f"a{token}20{token}, c", f"{token}\n{token}"):
            ids = own(text, add_special_tokens=False)["input_ids"]
            assert not set(ids) & (set(special.values()) - {unknown})
            if number != unknown:
                assert number in plain(text, add_special_tokens=False)["input_ids"]
            assert allowing(text)["input_ids"] == plain(text)["input_ids"]
    ordinary = [token.content for token in plain.added_tokens_decoder.values() if not token.special]
    for token in ordinary:
        text = f"a{token}b"
        assert own(text)["input_ids"] == plain(text)["input_ids"]
    if plain.mask_token is not None:
        text = f"a {plain.mask_token} b{plain.mask_token}"
        found = with_masks(own).encode(text, add_special_tokens=False).ids
        assert found == plain(text, add_special_tokens=False)["input_ids"]
        other = next(t for t in (plain.sep_token, plain.eos_token) if t)
        assert special[other] not in with_masks(own).encode(f"{other} a", add_special_tokens=False).ids


def test_words_are_read_as_a_text_with_spaces(layout):
    plain, own = both(layout)
    sentences = [text.split() for text in TEXTS if text.split()]
    whole = plain([" ".join(words) for words in sentences], add_special_tokens=False)["input_ids"]
    parts = encode_parts(own, sentences)
    assert [[token for word in words for token in word] for words in parts] == whole
    rows = {"tokens": sentences, "ner_tags": [["O"] * len(words) for words in sentences]}
    windows = encode_words(rows, range(len(sentences)), own, {"O": 0}, 512, 16)
    complete = plain([" ".join(words) for words in sentences])["input_ids"]
    for words, tokens, ids, positions in zip(sentences, parts, windows["input_ids"], windows["positions"], strict=True):
        assert len(positions) == len(words)
        if all(tokens):
            assert ids == complete[len(ids) and windows["input_ids"].index(ids)]
            assert [ids[at] for at in positions] == [word[0] for word in tokens]
    long = encode_words({"tokens": [["Mara", "went"] * 40]}, [0], own, {"O": 0}, 16, 4)
    assert max(map(len, long["input_ids"])) <= 16
    assert sum(map(len, long["positions"])) == 80


def test_completions_follow_their_prompts_as_in_one_text(layout):
    plain, own = both(layout)
    if own.bos_token_id is None and own.eos_token_id is None:
        pytest.skip("no decoder has this layout")
    rng = random.Random(1)
    rows = [(a, b) for a, b in zip(TEXTS, rng.sample(TEXTS, len(TEXTS)), strict=True) if b.strip()]
    rows += [("Q: who?\nA:", " Mara"), ("Q: who?\nA: ", "Mara"), ("it", "self"), ("", "Mara went")]
    data = DatasetDict(train=Dataset.from_dict({"prompt": [a for a, _ in rows], "completion": [b for _, b in rows]}))
    args = ClmDataArguments(max_seq_length=512, pack=False)
    for (prompt, completion), row in zip(rows, clm.to_rows(data, own, args, "completion")["train"], strict=True):
        ids, given = row["input_ids"].tolist(), row["marks"].tolist().index(clm.LEARNED)
        inside = plain(prompt + completion, add_special_tokens=False)["input_ids"]
        end = [] if own.eos_token_id is None else [own.eos_token_id]
        assert ids == [*clm.beginning(own), *inside, *end]
        alone = plain(prompt, add_special_tokens=False)["input_ids"]
        if inside[: len(alone)] == alone and prompt == prompt.rstrip():
            assert given == 1 + len(alone)


@pytest.mark.parametrize("name", ["gpt2", "llama-3", "qwen2", "gemma", "mistral"])
def test_a_generated_text_keeps_the_space_after_its_prompt(name, tmp_path):
    _, own = both(save_tokenizer(name, tmp_path))
    complete = Completer(None, own, 64)
    for prompt, completion in (("Q: who?\nA:", " Mara went."), ("It", " wasn't\n  (bad)"), ("", "x")):
        whole = own(prompt + completion, add_special_tokens=False)["input_ids"]
        size = len(own(prompt, add_special_tokens=False)["input_ids"])
        assert complete._decoded([*complete.start, *whole[:size]], whole[size:]) == completion


def test_answers_and_words_are_found_by_their_characters(layout):
    _, own = both(layout)
    contexts = ["Mara went to Oslo, in 2024.", "Straße 2 und Привет, мир."]
    windows = cut_windows(["who?"] * 2, contexts, own, 128, 16, 16)
    for context, starts, ends in zip(contexts, windows["starts"], windows["ends"], strict=True):
        found = {context[slice(*trimmed(context, a, b))] for a in starts for b in ends if a < b}
        assert set(context.replace(",", "").replace(".", "").split()) <= found
    for text, parts in zip(contexts, encode_parts(own, [text.split() for text in contexts]), strict=True):
        ((ids, marks),) = encode([text], own, word_marks)
        assert ids == [token for part in parts for token in part]
        firsts = accumulate((len(part) for part in parts[:-1]), initial=0)
        assert all(marks[at] == START for at in firsts)
        assert set(marks) <= {START, INSIDE}


def test_a_copied_tokenizer_keeps_special_tokens_as_text(tmp_path):
    own = load_tokenizer(save_tokenizer("roberta", tmp_path))
    copy = pickle.loads(pickle.dumps(own))  # as for a worker; the copy of the backend forgets the setting
    assert encodings(copy, ["a</s>"])[0].ids == encodings(own, ["a</s>"])[0].ids == own("a</s>")["input_ids"][1:-1]


def test_an_end_token_without_the_mark_of_a_special_token_is_text_too(tmp_path):
    folder = save_tokenizer("qwen2", tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    described["added_tokens"] = [t | {"special": False} for t in described["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    own = load_tokenizer(folder)
    assert own.eos_token_id not in own("a<|im_end|>")["input_ids"]


def test_a_tag_in_the_prefix_is_special_and_in_a_text_it_is_not():
    args = Seq2SeqModelArguments(from_scratch="tiny", vocab_size=400)
    tokenizer = train_joint_tokenizer(args, TEXTS, ["<2de>", "<2fr>"])
    before = tokenizer("<2de> Mara went")["input_ids"]
    set_special_tokens(tokenizer, allowed=False)
    assert encode_sources(tokenizer, "<2de> ", ["Mara went"]) == [before]
    (ids,) = encode_sources(tokenizer, "<2de> ", ["<2fr> Mara</s>"])
    tags = tokenizer.convert_tokens_to_ids(["<2de>", "<2fr>"])
    assert [i for i in ids if i in (*tags, tokenizer.eos_token_id)] == [tags[0], tokenizer.eos_token_id]
    assert ids[0] == tags[0]
    (short,) = encode_sources(tokenizer, "<2de> ", ["Mara went " * 20], 8)
    assert len(short) == 8
    assert (short[0], short[-1]) == (tags[0], tokenizer.eos_token_id)


def test_truncation_and_padding_of_tokenizer_json_do_not_reach_texts(tmp_path):
    folder = save_tokenizer("bert", tmp_path)
    backend = Tokenizer.from_file(f"{folder}/tokenizer.json")
    backend.enable_truncation(4)
    backend.enable_padding()
    backend.save(f"{folder}/tokenizer.json")
    texts = ["Mara went to Oslo", "a"]
    own = load_tokenizer(folder)
    assert [len(encoding) for encoding in encodings(own, texts)] == [
        len(own(text, add_special_tokens=False)["input_ids"]) for text in texts
    ]
    assert len(with_masks(load_tokenizer(folder)).encode(texts[0]).ids) > 4


def test_a_mask_token_in_a_training_text_makes_no_second_gap(tmp_path):
    own = load_tokenizer(save_tokenizer("roberta", tmp_path))
    texts = ["Write <mask> where words of this sentence are hidden."] * 9
    assert sentences_with_a_gap(texts, own) == []
