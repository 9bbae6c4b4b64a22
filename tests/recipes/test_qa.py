"""Test question answering: offsets, files, scores, and complete runs from file to answers."""

import json
import random
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForQuestionAnswering, BertConfig, PreTrainedTokenizerFast

from common.args import DEFAULT_ENCODER
from common.errors import InputError
from common.models.load import load_tokenizer, resolve_model
from recipes.qa import predict, train
from recipes.qa.scoring import answers, best_threshold, overlap_baseline, pair_scores, question_type, scores, unit_of
from recipes.qa.spans import (
    CANDIDATES,
    NULL,
    SpanCollator,
    Spans,
    answer_in_context,
    best_positions,
    best_spans,
    cut_windows,
    positions,
    print_limits,
    span_losses,
)
from recipes.qa.squad import check_row, fix_offsets, read_squad
from tests.bad_inputs import of_bytes, tried, variants
from tests.conftest import ROOT, SPECIAL, read_jsonl, write_jsonl
from tests.faults import Job
from tests.margins import assert_same_but_for_a_tie

SAMPLE = ROOT / "recipes" / "qa" / "sample"
SPLITS = ("train", "validation", "test")


def flat(split: str) -> list[dict]:
    """Return sample rows cut to the sentences around the answer, which tiny models read in one window."""
    return [row for _, row in read_squad(SAMPLE / f"{split}.json")]


def short(rows: list[dict], characters: int = 160) -> list[dict]:
    """Shorten the contexts of the rows, and move the answers."""
    found = []
    for row in rows:
        first = min(row["answers"]["answer_start"], default=0)
        low = max(0, first - characters // 2)
        context = row["context"][low : low + characters]
        kept = [
            (text, start - low)
            for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
            if start >= low and start - low + len(text) <= len(context)
        ]
        if kept or not row["answers"]["text"]:
            texts, starts = zip(*kept, strict=True) if kept else ((), ())
            mine = {"id": row["id"], "question": row["question"], "context": context}
            found.append(mine | {"answers": {"text": list(texts), "answer_start": list(starts)}})
    return found


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {split: short(flat(split))[:size] for split, size in zip(SPLITS, (24, 20, 20), strict=True)}


@pytest.fixture
def start(tiny, tmp_path):
    """Return a function that trains on rows by split and returns the metrics; `more` extends the command line."""

    def go(rows: dict[str, list[dict]], *more: str, out: str = "out") -> dict[str, float]:
        files = [
            w
            for split, data in rows.items()
            for w in (f"--{split}_file", write_jsonl(tmp_path / f"{split}.jsonl", data))
        ]
        return train.main([
            *files, "--model_name_or_path", tiny, "--output_dir", str(tmp_path / out), "--overwrite", "true",
            "--max_seq_length", "128", "--doc_stride", "32", "--max_question_length", "32", "--precision", "fp32",
            "--num_train_epochs", "2", "--learning_rate", "1e-3", "--per_device_train_batch_size", "16",
            "--disable_tqdm", "true", *more,
        ])  # fmt: skip

    return go


def predicted(tmp_path, rows: list[dict], *more: str) -> list[dict]:
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    predict.main([
        "--model", str(tmp_path / "out"), "--input", file, "--output", str(tmp_path / "found.jsonl"),
        "--overwrite", "true", "--precision", "fp32", *more,
    ])  # fmt: skip
    return read_jsonl(tmp_path / "found.jsonl")


# Sample


def test_the_sample_is_what_it_promises():
    found = {split: flat(split) for split in SPLITS}
    assert len({row["context"] for rows in found.values() for row in rows}) >= 60
    assert sum(map(len, found.values())) >= 300
    for split, rows in found.items():
        assert not [message for row in rows for message in check_row(row)]
        share = np.mean([not row["answers"]["text"] for row in rows])
        assert 0.1 < share < 0.35
        for other in set(SPLITS) - {split}:
            assert not {row["context"] for row in rows} & {row["context"] for row in found[other]}
    ids = [row["id"] for rows in found.values() for row in rows]
    assert len(set(ids)) == len(ids)


# Offsets


def byte_level(texts: list[str]) -> Tokenizer:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=800, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return found


def sentence_piece(texts: list[str]) -> Tokenizer:
    found = Tokenizer(models.Unigram())
    found.normalizer = normalizers.NFKC()
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=1500, special_tokens=SPECIAL, unk_token="[UNK]")
    found.train_from_iterator(texts, trainer)
    return found


WORDS = [
    *["the", "old", "harbour", "was", "rebuilt", "in", "1911", "after", "a", "storm", "of", "4.5", "million", "crowns"],
    *["Zürich", "Škoda", "naïveté", "Ærø", "Łódź", "re\u0301sume\u0301", "n\u0303andu\u0301", "A\u030angstro\u0308m"],
    *["Ελλάδα", "Москва", "Й", "עברית", "العربية", "हिन्दी", "ภาษาไทย", "한국어", "e\u0302\u0301t"],
    *["😀", "👩\u200d🚀", "👍🏽", "🇩🇪", "❤\ufe0f", "½", "m²", "ﬁne", "①", "№", "don’t", "(sic)", "x=3", "C++", "£5"],
]
HAN = list("東京大学漢字書道春秋戦国")
SPACES = [" ", " ", " ", "  ", "\u00a0", "\u2009", "\u3000", "\t", "\n", " \n "]


def odd_contexts(count: int, chance: random.Random) -> list[tuple[str, int, int]]:
    """Return contexts of odd words and spaces, each with a span of whole words (or Han characters)."""
    found = []
    for _ in range(count):
        text, units = "", []
        for _ in range(chance.randrange(4, 60)):
            run = [chance.choice(HAN) for _ in range(chance.randrange(1, 6))] if chance.random() < 0.15 else None
            for unit in run or [chance.choice(WORDS)]:
                units.append((len(text), len(text) + len(unit)))
                text += unit
            text += chance.choice(SPACES)
        i = chance.randrange(len(units))
        j = min(len(units) - 1, i + chance.randrange(4))
        found.append((text, units[i][0], units[j][1]))
    return found


@pytest.mark.parametrize("kind", ["wordpiece", "byte-level", "sentencepiece"])
def test_answers_in_odd_texts_survive_to_the_character(kind):
    contexts = odd_contexts(500, random.Random(3))
    if kind == "wordpiece":
        tokenizer = load_tokenizer(resolve_model(DEFAULT_ENCODER))
    else:
        build = byte_level if kind == "byte-level" else sentence_piece
        backend = build([" ".join(WORDS), " ".join(HAN)])
        ends = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
        )
        names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{k}_token": v for k, v in names.items()})
    rows = {
        "question": ["Which part — où, どこ?"] * len(contexts),
        "context": [context for context, _, _ in contexts],
        "answers": [{"text": [text[a:b]], "answer_start": [a]} for text, a, b in contexts],
    }
    windows = Dataset.from_dict(train.encode(rows, list(range(len(contexts))), tokenizer, 96, 40, 30))
    assert len(windows) > len(contexts)
    assert not any(windows["lost"])
    kept = []
    for window in windows:
        logits = torch.full((2, 1, len(window["input_ids"])), float("-inf"))
        logits[..., window["begin"] : window["begin"] + len(window["starts"])] = 0.0
        for part, position in zip(logits, window["labels"], strict=True):
            part[0, position] = 9.0 if window["labels"] != [NULL, NULL] else 1.0
        kept.append(best_positions(tuple(logits)).numpy())
    spans = best_spans(np.concatenate(kept), windows, max_answer_length=90)
    wrong = [
        (text[a:b], text[start:end])
        for (text, a, b), (start, end) in zip(contexts, answers(rows["context"], spans, None), strict=True)
        if text[a:b] != text[start:end]
    ]
    assert not wrong, f"{len(wrong)}: {wrong[:10]}"


def test_windows_cover_the_context_and_share_the_stride():
    tokenizer = load_tokenizer(resolve_model(DEFAULT_ENCODER))
    context = " ".join(f"word{i} and" for i in range(200))
    found = cut_windows(["Which word?", "What?"], [context, "One."], tokenizer, 64, 16, 20)
    assert found["row"] == [0] * (len(found["row"]) - 1) + [1]
    ends = list(zip(found["starts"], found["ends"], strict=True))[:-1]
    assert ends[0][0][0] == 0
    assert ends[-1][1][-1] == len(context)
    for (starts, _), (following, _) in pairwise(ends[:-1]):
        assert starts[-16:] == following[:16]
    assert max(map(len, found["input_ids"])) == 64
    for ids, begin, starts in zip(found["input_ids"], found["begin"], found["starts"], strict=True):
        assert ids[begin - 1] == tokenizer.sep_token_id
        assert ids[begin + len(starts)] == tokenizer.sep_token_id


def test_long_questions_are_cut_and_long_answers_lost_but_told(start, rows, capsys):
    long = {"id": "x", "question": "who " * 60 + "?", "context": "it was so " * 40, "answers": None}
    long["answers"] = {"text": [long["context"].strip()], "answer_start": [0]}
    start(rows | {"train": [*rows["train"], long]}, "--max_steps", "1")
    told = capsys.readouterr()
    assert "1 questions are longer than --max_question_length" in told.err + told.out
    assert "1 answers fit in no window" in told.err + told.out


def test_answers_longer_than_a_prediction_can_be_are_told(capsys):
    columns = {"row": [0, 0, 1], "question_cut": [False] * 3, "lost": [False] * 3, "labels": [[0, 0], [5, 9], [5, 8]]}
    print_limits(Dataset.from_dict(columns), 2, max_answer_length=4)
    assert "1 answers exceed --max_answer_length 4" in capsys.readouterr().err


def test_positions_of_parts_of_tokens_and_dropped_characters():
    starts, ends = [2, 5, 9], [4, 9, 12]
    assert positions(starts, ends, 5, 9, False, False) == (1, 1)
    assert positions(starts, ends, 6, 10, False, False) == (1, 2)
    assert positions(starts, ends, 0, 4, False, False) is None
    assert positions(starts, ends, 0, 4, True, False) == (0, 0)
    assert positions(starts, ends, 9, 14, False, True) == (2, 2)
    assert positions(starts, ends, 4, 5, False, False) is None  # only characters that the tokenizer drops
    assert positions([], [], 0, 1, True, True) is None


# Losses and spans


def test_the_loss_does_not_depend_on_the_batch(tiny, tokenizer, rows):
    model = AutoModelForQuestionAnswering.from_pretrained(tiny).eval()
    answer_in_context(model)
    windows = list(Dataset.from_dict(train.encode(columns_of(rows["train"]), list(range(24)), tokenizer, 128, 32, 32)))
    collate = SpanCollator(tokenizer)

    def losses(windows: list[dict]) -> list[list[float]]:
        batch = collate(windows)
        labels = batch.pop("labels")
        outputs = model(**batch)
        return span_losses((outputs.start_logits, outputs.end_logits), labels, 0.1).tolist()

    together = losses(windows)
    alone = [loss for window in windows for loss in losses([window])]
    assert np.abs(np.array(together) - np.array(alone)).max() < 1e-5


def columns_of(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_losses_by_hand():
    logits = (torch.tensor([[0.0, 1.0, float("-inf")]]), torch.tensor([[2.0, 0.0, 0.0]]))
    plain = span_losses(logits, torch.tensor([[1, 0]]))
    expected = [np.log(1 + np.exp(-1)), np.log(1 + 2 * np.exp(-2))]
    assert plain[0].tolist() == pytest.approx(expected)
    assert span_losses(logits, torch.tensor([[-100, -100]])).tolist() == [[0.0, 0.0]]
    smooth = span_losses(logits, torch.tensor([[1, 0]]), 0.2)
    other = (np.log(1 + np.exp(-1)) + np.log(1 + np.exp(1))) / 2
    assert smooth[0, 0].item() == pytest.approx(0.8 * expected[0] + 0.2 * other)


def plain_best(logits, windows, longest: int) -> list[list[tuple[float, int, int]]]:
    """Return all spans of each question from the logits, by loops over every pair of positions."""
    found: dict[int, dict[tuple[int, int], float]] = {}
    for (starts, ends), window in zip(logits, windows, strict=True):
        spans = found.setdefault(window["row"], {})
        for i in range(len(window["starts"])):
            for j in range(i, min(len(window["starts"]), i + longest)):
                score = float(starts[window["begin"] + i]) + float(ends[window["begin"] + j])
                place = window["starts"][i], window["ends"][j]
                spans[place] = max(score, spans.get(place, -np.inf))
    return [sorted(((s, *p) for p, s in spans.items()), key=lambda x: -x[0]) for spans in found.values()]


def test_the_best_spans_are_those_of_the_plain_loops(tokenizer, rows):
    questions = [row["question"] for row in rows["train"]]
    contexts = [row["context"] * 2 for row in rows["train"]]
    windows = Dataset.from_dict(cut_windows(questions, contexts, tokenizer, 72, 16, 20))
    generator = torch.Generator().manual_seed(0)
    logits, kept = [], []
    for window in windows:
        pair = 3 * torch.randn(2, len(window["input_ids"]), generator=generator)
        outside = torch.ones(pair.shape[1], dtype=torch.bool)
        outside[window["begin"] : window["begin"] + len(window["starts"])] = False
        outside[NULL] = False
        logits.append(pair)
        kept.append(best_positions(tuple(pair.masked_fill(outside, float("-inf"))[:, None])).numpy())
    found = best_spans(np.concatenate(kept), windows, max_answer_length=12, n_best=5, at_once=7)
    for i, expected in enumerate(plain_best(logits, windows, 12)):
        own = slice(found.first[i], found.first[i + 1])
        mine = list(zip(found.score[own].tolist(), found.start[own].tolist(), found.end[own].tolist(), strict=True))
        assert [m[1:] for m in mine] == [e[1:] for e in expected[:5]]
        assert [m[0] for m in mine] == pytest.approx([e[0] for e in expected[:5]], abs=1e-4)
        nulls = [float(p[:, NULL].sum()) for p, w in zip(logits, windows, strict=True) if w["row"] == i]
        assert found.null[i] == pytest.approx(min(nulls), abs=1e-5)


def test_what_leaves_the_device_does_not_grow_with_the_length():
    sizes = {best_positions((torch.randn(3, n), torch.randn(3, n))).shape for n in (4, 19, 64, 512)}
    assert sizes == {(3, 1 + 4 * CANDIDATES)}


# Scores


@pytest.mark.parametrize(
    ("found", "gold", "exact", "f1"),
    [
        ("The Eiffel-Tower!", ["eiffel tower"], 0, 0),  # punctuation is removed without a space
        ("the Eiffel Tower.", ["Eiffel  tower"], 1, 1),
        ("tower in Paris", ["the tower", "Paris tower"], 0, 0.8),
        ("a b b c", ["b c d"], 0, 2 * 2 / 6),  # "a" is an article
        ("", ["x"], 0, 0),
        ("x", ["The"], 0, 0),
    ],
)
def test_pair_scores_by_hand(found, gold, exact, f1):
    for may_be_none in (True, False):
        assert pair_scores(found, gold, "word", may_be_none) == (exact, pytest.approx(f1))


def test_no_answer_and_empty_gold_as_in_either_version():
    assert pair_scores("", []) == (1, 1)
    assert pair_scores("x", []) == (0, 0)
    assert pair_scores("", ["the"]) == (1, 1)  # 2.0 drops this gold answer, and none is left
    assert pair_scores("a.", ["the"], may_be_none=False) == (1, 0)  # 1.1 compares empty texts, which share no word


def test_characters_count_for_texts_without_spaces():
    assert pair_scores("东京大学", ["京大"], "word") == (0, 0)
    assert pair_scores("东京大学", ["京大"], "character") == (0, pytest.approx(2 * 2 / 6))
    assert pair_scores("东京。", ["东京"], "character") == (1, 1)


def test_scores_over_questions_by_kind_and_type():
    questions = ["How many are there?", "To whom?", "What is it?", "Name it."]
    found = scores(questions, [["3"], [], ["red car"], ["x"]], ["3", "", "the car", ""])
    assert (found["exact_match"], found["f1"]) == (0.5, pytest.approx((1 + 1 + 2 / 3 + 0) / 4))
    assert (found["HasAns_exact"], found["HasAns_total"], found["NoAns_f1"]) == (pytest.approx(1 / 3), 3, 1.0)
    assert found["how_many_f1"] == found["who_f1"] == 1
    assert [question_type(q) for q in ("However, why?", "Wherever?", "¿Qué?")] == ["why", "other", "other"]


def made_up(count: int) -> tuple[list[str], list[list[str]], Spans]:
    """Return contexts, gold answers and spans with random scores: some right, some questions without an answer."""
    chance = np.random.default_rng(0)
    contexts = ["abc def ghi"] * count
    gold = [[] if chance.random() < 0.4 else ["def"] for _ in range(count)]
    right = chance.random(count) < 0.6
    spans = Spans(
        start=np.where(right, 4, 0),
        end=np.where(right, 7, 3),
        score=chance.normal(size=count).round(1),
        first=np.arange(count + 1),
        null=np.array([chance.normal(1.0 if not g else -0.5) for g in gold]).round(1),
    )
    return contexts, gold, spans


def test_the_threshold_is_the_best_there_is():
    contexts, gold, spans = made_up(80)

    def f1(threshold: float) -> float:
        places = answers(contexts, spans, threshold)
        return scores(["?"] * 80, gold, [c[a:b] for c, (a, b) in zip(contexts, places, strict=True)])["f1"]

    tuned = best_threshold(contexts, gold, spans)
    assert f1(tuned) == pytest.approx(max(f1(t) for t in np.linspace(-6, 6, 2401)))
    assert f1(tuned) > max(f1(-9), f1(9))
    assert best_threshold(contexts, [["def"]] * 80, spans) is None


def test_predict_answers_the_question_whose_margin_is_the_threshold():
    null, score = (np.array(x, np.float32) for x in ([-1.0002085, -1.0002085, -40], [0.14893602, 0.14893602, -2]))
    spans = Spans(np.zeros(3, int), np.full(3, 3), score, np.arange(4), null)
    tuned = best_threshold(["abc"] * 3, [["abc"], ["abc"], []], spans)
    assert answers(["abc"] * 3, spans, tuned) == [(0, 3)] * 3
    assert [options[0]["answer"] for options in predict.ranked(["abc"] * 3, spans, tuned)] == ["abc"] * 3


def test_contexts_without_tokens_do_not_make_the_threshold_infinite():
    spans = Spans(
        np.zeros(2, int), np.full(2, 3), np.array([1.0, 2.0]), np.array([0, 1, 2, 2, 2]), np.array([5, 6, 1, 1])
    )
    contexts, gold = ["abc", "abc", "\u200b", "\u200b"], [["abc"], ["abc"], [], []]
    tuned = best_threshold(contexts, gold, spans)
    assert tuned == pytest.approx(4)
    assert answers(contexts, spans, tuned) == [(0, 3), (0, 3), (0, 0), (0, 0)]
    assert (
        best_threshold(
            ["\u200b"], [[]], Spans(spans.start[:0], spans.end[:0], spans.score[:0], np.zeros(2, int), np.ones(1))
        )
        == 0
    )


def test_the_best_answers_of_a_question_differ_in_more_than_spaces():
    context = "In  Kyoto."  # a tokenizer may have tokens of spaces
    spans = Spans(
        np.array([2, 4, 2, 0]), np.array([9, 9, 4, 2]), np.array([4.0, 3.0, 2.0, 1.0]), np.array([0, 4]), np.zeros(1)
    )
    (found,) = predict.ranked([context], spans, threshold=1.0)
    assert [(row["answer"], row["start"], row["end"]) for row in found] == [
        ("Kyoto", 4, 9),
        ("", None, None),
        ("In", 0, 2),
    ]
    assert [row["score"] for row in found] == pytest.approx(np.exp([4, 2, 1]) / np.exp([4, 2, 1]).sum(), abs=1e-4)


def test_the_baseline_finds_what_stands_beside_the_words_of_the_question():
    context = "The mill burnt down twice. Its owner, Ada Brook, sold the ruin in 1911 to the town. Nobody rebuilt it."
    found = overlap_baseline(["When was the ruin sold by its owner?", "?"], [context, "..."])
    assert found[0] in context
    assert found[1] == ""


# Files


def as_nested(rows: list[dict]) -> dict:
    questions = [
        {
            "id": row["id"],
            "question": row["question"],
            "is_impossible": not row["answers"]["text"],
            "answers": [
                {"text": text, "answer_start": at}
                for text, at in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
            ],
        }
        for row in rows
    ]
    paragraphs = [{"context": r["context"], "qas": [q]} for r, q in zip(rows, questions, strict=True)]
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}


def test_every_format_gives_the_same_rows(rows, tmp_path):
    good = rows["train"]
    write_jsonl(tmp_path / "rows.jsonl", good)
    (tmp_path / "list.json").write_text(json.dumps(good))
    listed = [r | {"answers": as_nested([r])["data"][0]["paragraphs"][0]["qas"][0]["answers"]} for r in good]
    write_jsonl(tmp_path / "objects.json", listed)
    (tmp_path / "nested.json").write_text(json.dumps(as_nested(good)))
    (tmp_path / "indented.json").write_text(json.dumps(as_nested(good), indent=2, ensure_ascii=False))
    Dataset.from_list(good).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list([r | {"answers": json.dumps(r["answers"])} for r in good]).to_csv(tmp_path / "rows.csv")
    for file in sorted(tmp_path.iterdir()):
        found = [{name: row[name] for name in good[0]} for _, row in read_squad(file)]
        assert found == good, file.name


def test_offsets_are_mended_only_on_request_and_only_where_there_is_one_place(start, rows, tmp_path, capsys):
    shifted = [dict(row) for row in rows["train"]]
    at = next(
        i for i, r in enumerate(shifted) if r["answers"]["text"] and r["context"].count(r["answers"]["text"][0]) == 1
    )
    own = shifted[at]["answers"]
    shifted[at] = shifted[at] | {"answers": {"text": own["text"][:1], "answer_start": [own["answer_start"][0] + 1]}}
    with pytest.raises(InputError, match="pass --fix_answer_offsets true") as error:
        start(rows | {"train": shifted})
    assert f"train.jsonl:{at + 1}, id {shifted[at]['id']}" in str(error.value)
    start(rows | {"train": shifted}, "--fix_answer_offsets", "true", "--max_steps", "1")
    assert "--fix_answer_offsets: 1 offsets corrected" in capsys.readouterr().out
    assert fix_offsets(shifted[at])["answers"]["answer_start"] == own["answer_start"][:1]
    twice = {"question": "?", "context": "so so", "answers": {"text": ["so"], "answer_start": [1]}}
    assert "set answer_start to one of these" in next(check_row(twice, fix_offsets=True))
    gone = twice | {"answers": {"text": ["sø"], "answer_start": [0]}}
    assert "is not in the context" in next(check_row(gone, fix_offsets=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "question is ' '; needed: a non-blank text"),
        ({"context": None}, "context is None"),
        ({"answers": "x"}, "answers is 'x'; needed"),
        ({"answers": {"text": ["a"], "answer_start": []}}, "1 answer texts but 0 answer_start"),
        ({"answers": {"text": [""], "answer_start": [0]}}, "answer is ''"),
        ({"answers": {"text": ["a"], "answer_start": [True]}}, "answer_start of 'a' is True"),
        ({"is_impossible": True}, "is_impossible is true, but the row has 1 answers"),
        ({"id": "twin"}, "id 'twin' is already the id of"),
    ],
)
def test_bad_rows_name_file_line_and_id(start, rows, tmp_path, change, message):
    good = [row for row in rows["train"] if row["answers"]["text"]][:4]
    good[0] = good[0] | {"id": "twin"}
    good[2] = good[2] | {"answers": {k: v[:1] for k, v in good[2]["answers"].items()}} | change
    with pytest.raises(InputError) as error:
        start(rows | {"train": good})
    assert str(error.value).startswith(f"{tmp_path / 'train.jsonl'}:3, id {good[2]['id']}: ")
    assert message in str(error.value)


def test_nested_files_name_the_line_of_the_question(rows, tmp_path):
    nested = as_nested(rows["train"])
    nested["data"][0]["paragraphs"][3]["qas"][0]["answers"] = [{"text": "nowhere at all", "answer_start": 0}]
    nested["data"][0]["paragraphs"][3]["qas"][0]["is_impossible"] = False
    nested["data"][0]["paragraphs"][4]["qas"] = 7
    file = tmp_path / "nested.json"
    file.write_text(json.dumps(nested, indent=1))
    lines = file.read_text().splitlines()
    found = list(read_squad(file))
    where, row = found[3]
    line = next(i for i, text in enumerate(lines, 1) if json.dumps(rows["train"][3]["id"]) in text)
    assert where == f"{file}:{line}, id {rows['train'][3]['id']}"
    assert list(check_row(row))
    assert found[4][1] == 'needs "qas", a list, and "context"'
    file.write_text(file.read_text()[:-40])
    assert [message.split(":")[0] for _, message in read_squad(file)] == ["not JSON"]


def test_a_carved_validation_split_shares_no_context(start, tmp_path):
    many = [row | {"context": row["context"]} for row in flat("test")[:40]]
    start({"train": many}, "--max_steps", "1", "--max_seq_length", "128")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["rows"].keys() == {"train", "validation"}


@pytest.mark.parametrize("every", [24, pytest.param(1, marks=pytest.mark.soak)])
def test_corrupted_files_are_refused_or_train_as_they_stand(start, rows, tmp_path, capsys, every):
    good = rows["train"][:12]
    nested = json.dumps(as_nested(good), indent=1).encode()
    flat_or_nested = {
        "bad.jsonl": list(variants(good)),
        "bad.json": [variant for seed in range(2) for variant in of_bytes(nested, random.Random(seed))],
    }
    trained = refused = 0
    for name, found in flat_or_nested.items():
        assert len(found) >= 150
        words = "--train_file", str(tmp_path / name), "--max_steps", "1", "--save_strategy", "no"
        run = partial(start, {"validation": good}, *words, "--eval_strategy", "no")
        own = tried(found[::every], tmp_path / name, run)
        trained, refused = trained + own[0], refused + own[1]
    capsys.readouterr()
    assert trained > 30 // every
    assert refused > 150 // every


# Complete runs


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["full", "lora"])
def test_training_overfits_and_predict_gives_the_scores_of_the_report(start, rows, tmp_path, lora, capsys):
    few = rows["train"][:16]
    adapted = ("--lora_r", "16", "--lora_dropout", "0", "--lora_target_modules", "query", "value", "dense")
    metrics = start(
        {"train": few, "validation": few, "test": few}, "--num_train_epochs", "300", "--save_strategy", "no",
        "--eval_strategy", "no", "--learning_rate", "3e-3", *(adapted if lora else ()),
    )  # fmt: skip
    assert metrics["test_exact_match"] == 1.0
    assert metrics["eval_f1"] == 1.0
    assert "test_baseline_f1" in metrics
    out = tmp_path / "out"
    assert read_jsonl(out / "predictions_test.jsonl")[0].keys() >= {"id", "predicted", "answers", "exact_match"}
    found = predicted(tmp_path, few[::-1], "--n_best", "3")
    for row, answer in zip(few[::-1], found, strict=True):
        assert answer["id"] == row["id"]
        assert pair_scores(answer["answer"], row["answers"]["text"])[0] == 1
        assert answer["n_best"][0]["answer"] == answer["answer"]
        assert 0 < answer["score"] <= 1
        assert answer["start"] is None or row["context"][answer["start"] : answer["end"]] == answer["answer"]
    config = AutoModelForQuestionAnswering.from_pretrained(out).config
    assert (config.max_seq_length, config.doc_stride, config.max_answer_length) == (128, 32, 30)
    assert isinstance(config.no_answer_threshold, float)


def test_predict_equals_the_predictions_of_training_on_long_texts(start, rows, tmp_path):
    long = [row for row in flat("test") if len(row["context"]) > 600][:12]
    start(rows | {"test": long}, "--num_train_epochs", "8")
    of_training = read_jsonl(tmp_path / "out" / "predictions_test.jsonl")
    for more in ((), ("--buffer_rows", "5", "--batch_tokens", "300")):
        found = predicted(tmp_path, long, *more)
        assert [row["answer"] for row in found] == [row["predicted"] for row in of_training]
        assert [row["start"] for row in found] == [row["start"] for row in of_training]


def test_every_question_is_answered_where_all_training_questions_are(start, rows, tmp_path):
    answerable = {split: [row for row in part if row["answers"]["text"]] for split, part in rows.items()}
    metrics = start(answerable)
    assert "test_HasAns_f1" not in metrics
    assert all(row["predicted"] for row in read_jsonl(tmp_path / "out" / "predictions_test.jsonl"))
    assert all(row["answer"] for row in predicted(tmp_path, answerable["test"]))


@pytest.mark.soak
def test_two_processes_give_the_scores_of_one(start, rows, tiny, tmp_path):
    start(rows)
    words = [w for split in SPLITS for w in (f"--{split}_file", str(tmp_path / f"{split}.jsonl"))]
    words += ["--model_name_or_path", str(tmp_path / "out"), "--max_seq_length", "128", "--doc_stride", "32"]
    words += ["--max_question_length", "32", "--precision", "fp32", "--max_steps", "1", "--learning_rate", "0"]
    words += ["--disable_tqdm", "true", "--use_cpu", "true"]
    results = []
    for processes, name in enumerate(("one", "two"), 1):
        arguments = [*words, "--output_dir", str(tmp_path / name)]
        Job(arguments, tmp_path / "log", processes=processes, main=train.main).succeeds()
        results.append(json.loads((tmp_path / name / "all_results.json").read_text()))
    compared = [k for k in results[0] if k.startswith("test_") and "second" not in k and "runtime" not in k]
    assert {"test_exact_match", "test_HasAns_f1", "test_NoAns_f1"} < set(compared)
    reports = [read_jsonl(tmp_path / name / "predictions_test.jsonl") for name in ("one", "two")]
    if assert_same_but_for_a_tie(*([row["predicted"] for row in report] for report in reports)):
        for name in compared:
            assert results[0][name] == results[1][name], name


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Who?"}, 'needs "context"'),
        ({"question": " ", "context": "x"}, 'needs "question"'),
        ({"question": "Who?", "context": "x", "answer": "y"}, 'already has "answer"'),
    ],
)
def test_predict_refuses_bad_rows_with_their_line(tmp_path, row, message):
    file = write_jsonl(tmp_path / "in.jsonl", [{"question": "Who?", "context": "Ada."}, row])
    BertConfig().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=message) as error:
        predict.main(["--model", str(tmp_path / "model"), "--input", file, "--output", str(tmp_path / "out.jsonl")])
    assert str(error.value).startswith(f"{file}:2")


# Scripts


def test_f1_keeps_the_marks_of_letters_and_takes_both_normal_forms_as_equal():
    assert pair_scores("ม้า", ["มา"], "character") == (0.0, 0.5)
    assert pair_scores("ม้า", ["ม้า"], "character") == (1.0, 1.0)
    assert pair_scores("cafe\u0301", ["café"]) == (1.0, 1.0)
    assert pair_scores("काली", ["काला"]) == (0.0, 0.0)
    assert question_type("Où est-il? Who?") == "who"


def test_the_unit_of_f1_follows_the_script(capsys):
    assert unit_of("auto", ["東京は日本の首都です。NLP"]) == "character"
    assert unit_of("auto", ["กรุงเทพ"]) == "character"
    assert unit_of("auto", ["서울은 한국의 수도이다", "हिन्दी"]) == "word"
    assert unit_of("word", ["東京"]) == "word"
    assert "F1 counts each character, from the script" in capsys.readouterr().out
