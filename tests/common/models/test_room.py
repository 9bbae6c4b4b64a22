"""Test each length with each overlap of windows: right windows, or an error with both numbers and the remedy."""

import pytest
from datasets import Dataset, DatasetDict

from common.errors import InputError
from recipes.mlm.pairs import to_pairs
from recipes.ner.tagging import cut_windows
from recipes.qa.arguments import QaDataArguments
from recipes.qa.spans import cut_windows as question_windows
from recipes.sentiment.texts import cut
from recipes.sentiment.windows import cut_windows as text_windows
from recipes.summarization.extractive import encode_windows

LENGTHS = range(4, 14)


def test_windows_of_words(tokenizer):
    words = ["Anna", "Berg", "supercalifragilistic"] * 6
    for length in LENGTHS:
        for stride in range(length // 2 + 1):
            if stride >= length - 2:
                with pytest.raises(InputError, match=f"--doc_stride {stride}: .* --max_seq_length {length} .*give at"):
                    cut_windows([words], tokenizer, length, stride)
                continue
            found = cut_windows([words], tokenizer, length, stride)
            assert sum(map(len, found["positions"])) == len(words)
            assert max(map(len, found["input_ids"])) <= length


def test_windows_of_texts_and_pairs(tokenizer):
    for length in LENGTHS:
        for stride in range(length // 2 + 1):
            found = text_windows(tokenizer, ["the film was long " * 5], None, length, stride)
            assert max(map(len, found["input_ids"])) <= length
    for read in (cut, text_windows):
        with pytest.raises(InputError, match=r"--max_seq_length 4: a row has 3 special tokens .* give at least 5"):
            read(tokenizer, ["a b c"], ["a b c"], 4, "head" if read is cut else 1)
        assert read(tokenizer, ["a b c"], ["a b c"], 5, "head" if read is cut else 1)["input_ids"][0]


def test_windows_of_contexts(tokenizer):
    for length in (12, 13, 20):
        for question in range(1, 8):
            for stride in range(1, 8):
                sizes = {"max_seq_length": length, "doc_stride": stride, "max_question_length": question}
                if question + stride + 8 > length:
                    with pytest.raises(InputError, match=f"--max_seq_length {length}: .* {question} .* {stride}"):
                        QaDataArguments(**sizes)
                    continue
                found = question_windows(["who is it that came"], ["long context " * 9], tokenizer, *sizes.values())
                assert max(map(len, found["input_ids"])) <= length


def test_windows_of_sentences(tokenizer):
    rows = {"parts": [["It was a long day.", "It ended."]], "oracle": [[0]]}
    for length in LENGTHS:
        if length < 6:
            with pytest.raises(InputError, match=f"--max_source_length {length}: .* give at least 6"):
                encode_windows(rows, [0], tokenizer, length)
            continue
        assert max(map(len, encode_windows(rows, [0], tokenizer, length)["input_ids"])) <= length


def test_pairs_of_segments(tokenizer):
    texts = DatasetDict(train=Dataset.from_dict({"text": ["It was a long day. It ended. It was over."] * 3}))
    for length in LENGTHS:
        if length < 5:
            with pytest.raises(InputError, match=f"--max_seq_length {length}: .* give at least 5"):
                to_pairs(texts, tokenizer, length, "mlm+nsp")
            continue
        assert max(map(len, to_pairs(texts, tokenizer, length, "mlm+nsp")["train"]["input_ids"])) <= length
