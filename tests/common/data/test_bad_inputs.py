"""Test that each corrupted file is refused with file and line, or trains on exactly the rows in the file."""

import json
import random
import re
import signal
from pathlib import Path

import pytest

from common.data.corpus import CorpusArguments, load_corpus
from common.data.rows import load_splits
from common.errors import InputError
from recipes.ner import train
from recipes.ner.conll import BY_CONTENT
from recipes.ner.reading import check_row, file_reader, load_tagged
from recipes.qa.arguments import QaDataArguments
from recipes.qa.squad import load_questions
from recipes.relation.arguments import RelationDataArguments
from recipes.relation.reading import load_pairs
from recipes.sentiment.arguments import SentimentDataArguments
from recipes.sentiment.labels import load_labeled
from recipes.summarization.arguments import SummarizationDataArguments
from recipes.translation.arguments import TranslationDataArguments
from tests.bad_inputs import lines_of, of_bytes, tables, tried, variants
from tests.conftest import SAMPLE, read_jsonl, write_jsonl

COLUMNS = {"tokens": "tokens", "ner_tags": "ner_tags"}
READ = file_reader(BY_CONTENT, ("tokens", "ner_tags"))
SECONDS = 60
GOOD = [{k: row[k] for k in COLUMNS} for row in read_jsonl(SAMPLE / "train.jsonl")[:12]]


@pytest.fixture
def no_hang():
    def stop(*_):
        raise TimeoutError(f"not done in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    yield lambda: signal.alarm(SECONDS)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def rows_in(content: bytes) -> list[dict]:
    """Return the rows of a valid JSON Lines file, without code of this repository."""
    return [{k: json.loads(line)[k] for k in COLUMNS} for line in lines_of(content)]


def loaded(args) -> list[dict]:
    data = load_splits(args, COLUMNS, check_row, list_columns=COLUMNS, read=READ)
    return [{k: row[k] for k in COLUMNS} for row in data["train"]]


def check_refusal(error: InputError, file: Path, line: int | None) -> str | None:
    """Return the fault of a refusal, or None."""
    messages = str(error).split("\n")
    places = [re.match(rf"{re.escape(str(file))}(?::(\d+))?", message) for message in messages]
    if not any(places):
        return f"names no file: {messages[0][:200]}"
    named = [int(place[1]) for place in places if place and place[1]]
    # a line without its newline is joined with the next line
    if line is not None and not any(line <= number <= line + 1 for number in named):
        return f"names line {named}, not {line}: {messages[0][:200]}"
    return None


def test_the_corpus_is_large_and_has_no_doubles():
    found = list(variants(GOOD))
    assert len(found) >= 150
    assert len({variant.content for variant in found}) > 0.97 * len(found)
    assert len({variant.name for variant in found}) > 0.97 * len(found)


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.soak)])
def test_every_variant_trains_as_it_stands_or_is_refused(tiny, tmp_path, no_hang, capsys, every):
    good = write_jsonl(tmp_path / "good.jsonl", GOOD)
    file = tmp_path / "bad.jsonl"
    wrong, trained, refused = [], 0, 0
    for variant in list(variants(GOOD))[::every]:
        file.write_bytes(variant.content)
        out = tmp_path / "out"
        no_hang()
        try:
            train.main([
                *("--train_file", str(file), "--validation_file", good, "--model_name_or_path", tiny),
                *("--output_dir", str(out), "--overwrite", "true", "--max_seq_length", "64", "--precision", "fp32"),
                *("--max_steps", "1", "--save_strategy", "no", "--eval_strategy", "no", "--disable_tqdm", "true"),
            ])  # fmt: skip
        except InputError as error:
            refused += 1
            fault = check_refusal(error, file, variant.line)
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            trained += 1
            args = train.NerDataArguments(train_file=str(file), validation_file=good)
            same = loaded(args) == rows_in(variant.content)
            fault = None if same else "trained on other rows than the file holds"
        if fault:
            wrong.append(f"{variant.name}: {fault}")
    capsys.readouterr()
    assert not wrong, f"{len(wrong)} of {trained + refused}:\n" + "\n".join(wrong)
    assert trained >= 30 // every
    assert refused >= 100 // every


def written(ending: str) -> str:
    """Write the valid rows in another format."""
    if ending == "conll":
        pairs = [zip(row["tokens"], row["ner_tags"], strict=True) for row in GOOD]
        return "\n\n".join("\n".join(map(" ".join, words)) for words in pairs) + "\n"
    if ending == "csv":
        cells = [['"' + json.dumps(row[k]).replace('"', '""') + '"' for k in COLUMNS] for row in GOOD]
        return "\n".join(map(",".join, [list(COLUMNS), *cells])) + "\n"
    return json.dumps(GOOD, ensure_ascii=False, indent=0)


@pytest.mark.parametrize("ending", ["conll", "csv", "json"])
def test_corrupted_bytes_in_other_formats(tmp_path, ending, no_hang, capsys):
    good = written(ending).encode()
    file = tmp_path / f"bad.{ending}"
    whole = write_jsonl(tmp_path / "good.jsonl", GOOD)
    wrong = []
    for variant in [*of_bytes(good, random.Random(1))]:
        file.write_bytes(variant.content)
        no_hang()
        try:
            rows = loaded(train.NerDataArguments(train_file=str(file), validation_file=whole))
        except InputError as error:
            fault = check_refusal(error, file, None)
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            changed = sum(row not in GOOD for row in rows)  # at most the changed row and the next row
            fault = None if changed <= 2 or variant.line is None else f"{changed} rows changed"
        if fault:
            wrong.append(f"{variant.name}: {fault}")
    assert not wrong, "\n".join(wrong)


TEXTS = [f"The {number} cats, and a “dog”." for number in range(12)]
ANSWERS = {"text": ["cats"], "answer_start": None}
#: recipe -> rows, and what loads a file of them
LOADERS = {
    "ner": (GOOD, lambda file: load_tagged(train.NerDataArguments(train_file=file, validation_file=file))),
    "sentiment": (
        [{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(TEXTS)],
        lambda file: load_labeled(SentimentDataArguments(train_file=file, validation_file=file)),
    ),
    "qa": (
        [
            {"question": "What?", "context": text, "answers": ANSWERS | {"answer_start": [text.index("cats")]}}
            for text in TEXTS
        ],
        lambda file: load_questions(QaDataArguments(train_file=file, validation_file=file)),
    ),
    "translation": (
        [{"en": text, "de": f"Die {text}"} for text in TEXTS],
        lambda file: TranslationDataArguments(
            train_file=file, validation_file=file, source_lang="en", target_lang="de"
        ).load(),
    ),
    "summarization": (
        [{"document": f"{text} {text}", "summary": text} for text in TEXTS],
        lambda file: SummarizationDataArguments(train_file=file, validation_file=file).load(),
    ),
    "relation": (
        [
            {
                "text": text,
                "head": [4, 5],
                "tail": [text.index("dog"), text.index("dog") + 3],
                "label": "ab"[number % 2],
            }
            for number, text in enumerate(TEXTS[:10])
        ],
        lambda file: load_pairs(RelationDataArguments(train_file=file, validation_file=file)),
    ),
    "corpus": (
        [{"text": text, "number": number} for number, text in enumerate(TEXTS)],
        lambda file: load_corpus(CorpusArguments(train_file=file, validation_file=file)),
    ),
}


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("recipe", LOADERS)
def test_tables_of_every_kind_are_read_or_refused_by_every_recipe(tmp_path, recipe, every, capsys):
    rows, load = LOADERS[recipe]
    found = list(tables(rows))[::every]
    taken = refused = 0
    for ending in (".csv", ".tsv", ".csv.gz"):
        file = tmp_path / f"bad{ending}"
        variants_of_ending = [variant for name, variant in found if name == ending]
        own = tried(variants_of_ending, file, lambda file=file: load(str(file)), also="label")
        taken, refused = taken + own[0], refused + own[1]
    capsys.readouterr()
    assert taken > 20 // every
    assert refused > 40 // every
