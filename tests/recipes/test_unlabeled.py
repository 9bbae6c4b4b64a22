"""Test rows without a gold value in every recipe: an error, dropped on request, and predicted as a test split."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from common.errors import InputError
from recipes.ner import train as ner
from recipes.ner.arguments import NerDataArguments
from recipes.ner.reading import load_tagged
from recipes.qa import train as qa
from recipes.qa.arguments import QaDataArguments
from recipes.qa.scoring import SquadScorer
from recipes.qa.spans import Spans
from recipes.qa.squad import check_row, load_questions
from recipes.sentiment.arguments import SentimentDataArguments
from recipes.sentiment.labels import load_labeled
from recipes.summarization.arguments import SummarizationDataArguments
from recipes.translation.arguments import TranslationDataArguments
from tests.conftest import read_jsonl, write_jsonl

SHORT = [
    "--max_seq_length",
    "64",
    "--max_steps",
    "1",
    "--eval_strategy",
    "no",
    "--save_strategy",
    "no",
    "--disable_tqdm",
    "true",
]
WORDS = [["Ann", "left", str(i)] for i in range(12)]


def tagged(folder: Path, tags: list, **arguments) -> tuple:
    """Load a NER file in which every third row has `tags`, or no tags at all for `...`."""
    rows = [{"tokens": words, "ner_tags": ["B-PER", "O", "O"]} for words in WORDS]
    for row in rows[::3]:
        row |= {"ner_tags": tags}
        if tags is ...:
            del row["ner_tags"]
    file = write_jsonl(folder / "a.jsonl", rows)
    return load_tagged(NerDataArguments(train_file=file, validation_file=file, **arguments))


@pytest.mark.parametrize("tags", [None, [], [None] * 3, [-100] * 3, ["O", -1, "O"], ["-"] * 3, ...])
def test_sentences_without_tags_are_an_error_or_dropped(tmp_path, capsys, tags):
    with pytest.raises(InputError, match=r"a.jsonl:1: no .*ner_tags.* --drop_unlabeled true"):
        tagged(tmp_path, tags)
    data, unlabeled, _ = tagged(tmp_path, tags, drop_unlabeled=True)
    assert data["train"]["tokens"][:] == [words for i, words in enumerate(WORDS) if i % 3]
    assert unlabeled is None
    assert "a.jsonl: dropped 4 of 12 rows that lack their tags" in capsys.readouterr().out


def test_a_hub_test_split_without_tags_is_tagged_and_not_scored(tiny, tmp_path):
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-PER"]))})
    splits = {}
    for split in ("train", "validation", "test"):
        tags = [[-100] * 3 if split == "test" else [1, 0, 0] for _ in WORDS]
        splits[split] = Dataset.from_dict({"tokens": WORDS, "ner_tags": tags}, features)
    DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    more = ["--model_name_or_path", tiny, "--output_dir", str(tmp_path / "out"), *SHORT]
    metrics = ner.main(["--dataset_name", str(tmp_path / "saved"), *more])
    assert not [name for name in metrics if name.startswith("test_")]
    found = read_jsonl(tmp_path / "out" / "predictions_test.jsonl")
    assert [row["tokens"] for row in found] == WORDS
    assert all("entities" in row and "ner_tags" not in row for row in found)
    assert "predictions_test.jsonl" in json.loads((tmp_path / "out" / "run.json").read_text())["files"]


def test_splits_without_entities_and_rare_types_are_warned_of(tmp_path, capsys):
    none = write_jsonl(tmp_path / "none.jsonl", [{"tokens": words, "ner_tags": ["O"] * 3} for words in WORDS])
    rare = [{"tokens": words, "ner_tags": ["O", "O", "B-PER" if i else "B-Per"]} for i, words in enumerate(WORDS)]
    load_tagged(NerDataArguments(train_file=write_jsonl(tmp_path / "a.jsonl", rare), validation_file=none))
    warnings = capsys.readouterr().err
    assert "validation: none of the 12 rows has an entity" in warnings
    assert "entity types with fewer than 5 training rows, which are hard to learn: Per (1)" in warnings
    assert "'PER' (11 rows) and 'Per' (1 rows)" in warnings


# Question answering

CONTEXT = "Ada Lovelace met Charles Babbage in London."
ADA = {"text": ["Ada Lovelace"], "answer_start": [0]}


def question(**more) -> dict:
    return {"question": "Who?", "context": CONTEXT, "answers": ADA} | more


def asked(folder: Path, rows: list[dict], **arguments) -> tuple:
    file = write_jsonl(folder / "a.jsonl", rows)
    return load_questions(QaDataArguments(train_file=file, validation_file=file, **arguments))


@pytest.mark.parametrize("answers", [None, "", ...])
def test_questions_without_answers_are_an_error_or_dropped(tmp_path, capsys, answers):
    rows = [question() for _ in range(4)]
    rows[1] = {name: value for name, value in question(answers=answers).items() if value is not ...}
    with pytest.raises(InputError, match=r"a.jsonl:2: no .*answers.* --drop_unlabeled true"):
        asked(tmp_path, rows)
    data, _ = asked(tmp_path, rows, drop_unlabeled=True)
    assert data["train"]["id"][:] == ["1", "3", "4"]
    assert "a.jsonl: dropped 1 of 4 rows that lack their answers" in capsys.readouterr().out


@pytest.mark.parametrize("answers", [None, {"text": [], "answer_start": []}, ...])
def test_a_test_file_with_hidden_answers_is_not_scored(tmp_path, answers):
    rows = [{k: v for k, v in question(answers=answers, id=str(i)).items() if v is not ...} for i in range(3)]
    data, unlabeled = asked(tmp_path, [question()] * 3, test_file=write_jsonl(tmp_path / "test.jsonl", rows))
    assert set(data) == {"train", "validation"}
    assert unlabeled["question"][:] == ["Who?"] * 3
    assert "answers" not in unlabeled.column_names


def test_unanswerable_test_questions_are_scored_if_training_has_some(tmp_path, capsys):
    none = question(answers={"text": [], "answer_start": []})
    data, unlabeled = asked(tmp_path, [question(), none], test_file=write_jsonl(tmp_path / "test.jsonl", [none]))
    assert (len(data["test"]), unlabeled) == (1, None)
    assert "test: no question has an answer; if the answers are hidden, remove the column" in capsys.readouterr().err
    asked(tmp_path, [none, none])
    assert "train: none of the 2 questions has an answer; the model learns to find none" in capsys.readouterr().err


def test_alternative_answers_that_are_not_in_the_context_are_scored_and_not_learned(tmp_path, capsys):
    answers = {"text": ["Lady Lovelace", "Ada", "Augusta"], "answer_start": [-1, 0, None]}
    data, _ = asked(tmp_path, [question(answers=answers), question()])
    assert data["train"]["answers"][0] == {"text": ["Ada"], "answer_start": [0]}
    assert data["train"]["gold"][:] == [answers["text"], ["Ada Lovelace"]]
    assert "4 alternative answers are not in their context; they are scored" in capsys.readouterr().out
    either = question(answers={"text": ["London", "charles babbage"], "answer_start": [36, 0]})
    data, _ = asked(tmp_path, [either] * 2)
    babbage = Spans(*(np.array(x) for x in ([17, 17], [32, 32], [1.0, 1.0], [0, 1, 2], [0.0, 0.0])))
    scorer = SquadScorer(data["validation"], "word", qa.QaTrainingArguments(output_dir=str(tmp_path)))
    assert scorer(babbage, None)["exact_match"] == 1
    assert [row["exact_match"] for row in scorer.predictions(babbage, None)] == [1, 1]
    alone = question(answers={"text": ["Augusta", "Lady"], "answer_start": [0, 3]})
    assert len([message for message in check_row(alone) if "is not in the context; copy" in message]) == 2
    misplaced = question(answers={"text": ["Ada", "London"], "answer_start": [0, 3]})
    assert "answer 'London' is not at answer_start 3" in next(check_row(misplaced))


@pytest.mark.soak
def test_hidden_answers_are_predicted(tiny, tmp_path):
    files = (
        write_jsonl(tmp_path / "a.jsonl", [question()] * 8),
        write_jsonl(tmp_path / "b.jsonl", [question(answers=None)]),
    )
    words = ["--max_question_length", "16", "--doc_stride", "16", "--output_dir", str(tmp_path / "out"), *SHORT]
    given = ["--train_file", files[0], "--validation_file", files[0], "--test_file", files[1]]
    metrics = qa.main([*given, "--model_name_or_path", tiny, *words])
    assert not [name for name in metrics if name.startswith("test_")]
    (row,) = read_jsonl(tmp_path / "out" / "predictions_test.jsonl")
    assert row["context"] == CONTEXT
    assert row["answer"] in CONTEXT


# Summaries and translations

DOCUMENT = "Rain fell. The river rose. People left the town."


def loaded(kind: type, folder: Path, rows: list[dict], **arguments) -> tuple:
    file = write_jsonl(folder / "a.jsonl", rows)
    return kind(**{"train_file": file, "validation_file": file} | arguments).load()


@pytest.mark.parametrize("summary", [None, "", ...])
def test_documents_without_a_summary(tmp_path, summary):
    good, bad = {"document": DOCUMENT, "summary": "The river rose."}, {"document": DOCUMENT}
    bad |= {} if summary is ... else {"summary": summary}
    with pytest.raises(InputError, match=r"a.jsonl:2: no .*summary.* --drop_unlabeled true"):
        loaded(SummarizationDataArguments, tmp_path, [good, bad])
    data, _ = loaded(SummarizationDataArguments, tmp_path, [good, bad], drop_unlabeled=True)
    assert data["train"]["id"][:] == ["1"]
    test = write_jsonl(tmp_path / "test.jsonl", [bad, bad | {"document": ["Ann: Hi", "Bob: Hello"]}])
    data, unlabeled = loaded(SummarizationDataArguments, tmp_path, [good], test_file=test)
    assert "test" not in data
    assert unlabeled["document"][:] == [DOCUMENT, "Ann: Hi\nBob: Hello"]


@pytest.mark.parametrize("form", ["translation", "languages", "columns"])
@pytest.mark.parametrize("target", [None, "", ...])
def test_sources_without_a_target(tmp_path, form, target):
    languages = {"source_lang": "en", "target_lang": "de"}
    if form == "columns":
        languages |= {"source_column_name": "en", "target_column_name": "de"}
    good, bad = {"en": "rain", "de": "Regen"}, {"en": "snow"} | ({} if target is ... else {"de": target})
    if form == "translation":
        good, bad = {"translation": good}, {"translation": bad}
    with pytest.raises(InputError, match=r"a.jsonl:2: no .*--drop_unlabeled true"):
        loaded(TranslationDataArguments, tmp_path, [good, bad], **languages)
    data, _ = loaded(TranslationDataArguments, tmp_path, [good, bad], drop_unlabeled=True, **languages)
    assert data["train"]["target"][:] == ["Regen"]
    test = write_jsonl(tmp_path / "test.jsonl", [bad])
    data, unlabeled = loaded(TranslationDataArguments, tmp_path, [good], test_file=test, **languages)
    assert "test" not in data
    assert unlabeled["text"][:] == ["snow"]


def test_a_table_without_the_column_of_labels_is_told_once_at_its_header(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("text,sentiment\n" + "fine,good\n" * 12, encoding="utf-8")
    with pytest.raises(InputError, match=r"^\S+a\.csv:1: no column label; columns here: text, sentiment; [^\n]+$"):
        load_labeled(SentimentDataArguments(train_file=str(file)))
    file = write_jsonl(tmp_path / "b.jsonl", [{"text": "fine", "sentiment": "good"}] * 12)
    with pytest.raises(InputError, match=r"b\.jsonl:1: no column label; [^\n]*\(\d+ more such rows\)$"):
        load_labeled(SentimentDataArguments(train_file=file))
