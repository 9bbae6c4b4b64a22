"""Read questions and contexts from SQuAD's nested JSON or from flat rows, check them, and correct offsets."""

import json
import re
from bisect import bisect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from common.args import FileArguments, LabeledDataArguments
from common.data.files import read_file
from common.data.json_files import json_fault, parse_cell, parse_json
from common.data.rows import UNLABELED, Gold, load_splits
from common.data.source import Located, Row, Source
from common.errors import brief, tell, warn

KEYS = ("text", "answer_start")
NESTED = re.compile(r'\s*\{\s*"(version|data)"')


def read_squad(path: str | Path, answers: str = "answers", args: FileArguments | None = None) -> Iterator[Located]:
    """Yield rows of `id`, `title`, `context`, `question` and `answers`, each with its file and line.

    Reads the nested `.json` of SQuAD 1.1 and 2.0 (https://rajpurkar.github.io/SQuAD-explorer/) and flat rows in any
    format. The column `answers` of a flat row holds `{"text": [...], "answer_start": [...]}` or a list of
    `{"text", "answer_start"}`. A CSV cell holds either as JSON.
    """
    source = Source(Path(path), args or FileArguments())
    rows = _nested(source) if source.ending == ".json" else None
    flat = rows is None
    for where, row in read_file(path, args=args) if flat else rows:
        if isinstance(row, str):
            yield where, row
            continue
        if flat and answers in row:
            row = row | {answers: as_lists(row[answers])}
        if "id" in row:
            where = f"{where}, id {row['id']}"
        impossible, given = row.get("is_impossible"), row.get(answers)
        if impossible is True and given is None:
            row = row | {answers: {key: [] for key in KEYS}}
        texts = given.get("text") if isinstance(given, dict) else None
        if isinstance(impossible, bool) and isinstance(texts, list) and impossible == bool(texts):
            yield (
                where,
                f"is_impossible is {str(impossible).lower()}, but the row has {len(texts)} answers; correct either",
            )
            continue
        yield where, row


def load_questions(args: LabeledDataArguments) -> tuple[DatasetDict, Dataset | None]:
    """Load and check the splits with columns `question`, `context`, `answers` and `gold`; on request correct offsets.

    `gold` holds the texts of all answers, which are scored; `answers` only those in the context, which are learned.

    Returns:
        The splits; the test rows if their answers are hidden, else None.
    """
    columns = args.columns()
    check = partial(check_row, fix_offsets=args.fix_answer_offsets)
    read = partial(read_squad, answers=args.answer_column_name, args=args)
    gold = Gold("answers", ("answers",), lacks_answers, check_texts, answered_or_not, bool(args.drop_unlabeled))
    data = load_splits(args, columns, check, read=read, unique_ids=True, carve_by="context", gold=gold)
    unlabeled = data.pop(UNLABELED, None)
    data = data.map(fix_offsets)
    elsewhere = sum(sum(split["elsewhere"]) for split in data.values())
    if elsewhere:
        tell(f"{elsewhere:,} alternative answers are not in their context; they are scored, and not learned")
    if args.fix_answer_offsets:
        tell(f"--fix_answer_offsets: {sum(sum(split['moved']) for split in data.values())} offsets corrected")
    answered = {name: [bool(answers["text"]) for answers in split["answers"]] for name, split in data.items()}
    if "test" in data and not any(answered["test"]):
        if all(answered["train"] + answered["validation"]):
            warn("test: no question has an answer, unlike all other rows; the rows are predicted and not scored")
            unlabeled = data.pop("test").remove_columns(["answers", "gold", "moved", "elsewhere"])
        else:
            warn("test: no question has an answer; if the answers are hidden, remove the column from the test file")
    for name in ("train", "validation"):
        if not any(answered[name]):
            effect = "the model learns to find none" if name == "train" else "it cannot select a checkpoint"
            warn(f"{name}: none of the {len(data[name]):,} questions has an answer; {effect}; add answers")
    if all(answered["validation"]) and not all(answered["train"] + answered.get("test", [])):
        warn(
            "each validation question has an answer, so the model will answer every question; add "
            "unanswerable questions to --validation_file"
        )
    return data, unlabeled


def lacks_answers(row: Row) -> bool:
    """Return whether a row has no gold answers, not even two empty lists for "no answer"."""
    answers = row["answers"]
    return answers is None or (isinstance(answers, str) and not answers.strip())


def answered_or_not(row: Row) -> list[str]:
    """Return the class of a checked row: whether the question has an answer."""
    return ["answer" if as_lists(row["answers"])["text"] else "no answer"]


def as_lists(answers: Any) -> Any:
    """Convert answers to `{"text": [...], "answer_start": [...]}`; return values in unknown formats unchanged."""
    if isinstance(answers, str):
        try:
            answers = parse_cell(answers)
        except ValueError:
            return answers
    if isinstance(answers, list) and all(isinstance(a, dict) and all(k in a for k in KEYS) for a in answers):
        return {key: [answer[key] for answer in answers] for key in KEYS}
    if isinstance(answers, dict) and all(key in answers for key in KEYS):
        return {key: answers[key] for key in KEYS}
    return answers


def _nested(source: Source) -> Iterator[Located] | None:
    """Return the questions of a nested file; None if the file is not nested."""
    path, text = source.path, source.text()
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        if not NESTED.match(text):
            return None
        where, fault = json_fault(path, error)
        return iter([(where, f"not JSON: {fault}; write it with json.dump")])
    articles = content.get("data") if isinstance(content, dict) else None
    if isinstance(articles, list) and all(isinstance(a, dict) and "paragraphs" not in a for a in articles):
        return None
    return None if articles is None else _questions(path, text, articles)


def _questions(path: Path, text: str, articles: Any) -> Iterator[Located]:
    breaks = [match.start() for match in re.finditer("\n", text)]
    at = 0

    def place(item: Any) -> str:
        """Return file and line of a question: search for its id after the question before."""
        nonlocal at
        key = item.get("id") if isinstance(item, dict) else None
        for as_written in (json.dumps(key), json.dumps(key, ensure_ascii=False)):
            if key is not None and (begin := text.find(as_written, at)) >= 0:
                at = begin + len(as_written)
                break
        return f"{path}:{bisect(breaks, at) + 1}"

    if not isinstance(articles, list):
        yield f"{path}:1", '"data" is not a list of articles'
        return
    for i, article in enumerate(articles, 1):
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            yield f"{place(None)}, article {i}", 'needs "paragraphs", a list'
            continue
        for j, paragraph in enumerate(paragraphs, 1):
            questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(questions, list):
                yield f"{place(None)}, article {i}, paragraph {j}", 'needs "qas", a list, and "context"'
                continue
            for k, item in enumerate(questions, 1):
                where = place(item)
                if isinstance(item, dict):
                    context = {"title": article.get("title"), "context": paragraph.get("context")}
                    yield where, item | context | {"answers": as_lists(item.get("answers"))}
                else:
                    yield f"{where}, article {i}, paragraph {j}, question {k}", "is not an object"


def check_texts(row: Row) -> Iterator[str]:
    """Yield a message if the question or the context of a row is missing or blank."""
    for name in ("question", "context"):
        if not isinstance(row[name], str) or not row[name].strip():
            yield f"{name} is {brief(row[name])}; needed: a non-blank text"
            return


def check_row(row: Row, fix_offsets: bool = False) -> Iterator[str]:
    """Yield a message for each error in a row of `question`, `context` and `answers`.

    An answer that is not in the context is an error unless another answer of the row is there; see `fix_offsets`.
    """
    faults = list(check_texts(row))
    if faults:
        yield from faults
        return
    answers = as_lists(row["answers"])
    if not isinstance(answers, dict) or any(not isinstance(answers.get(key), list) for key in KEYS):
        yield (
            f'answers is {brief(row["answers"])}; needed: {{"text": [...], "answer_start": [...]}}, both empty if the '
            "context has no answer"
        )
        return
    texts, starts = answers["text"], answers["answer_start"]
    if len(texts) != len(starts):
        yield f"{len(texts)} answer texts but {len(starts)} answer_start; needed: one answer_start per text"
        return
    another = any(isinstance(text, str) and text.strip() and text in row["context"] for text in texts)
    for text, start in zip(texts, starts, strict=True):
        if another and isinstance(text, str) and text not in row["context"]:
            continue
        if not isinstance(text, str) or not text.strip():
            yield f"answer is {brief(text)}; needed: a non-blank text (no answer: two empty lists)"
        elif isinstance(start, bool) or not isinstance(start, int):
            yield f"answer_start of {brief(text)} is {brief(start)}; needed: the first character in the context, from 0"
        elif start < 0 or row["context"][start : start + len(text)] != text:
            places = _places(row["context"], text)
            if len(places) == 1 and not fix_offsets:
                yield (
                    f"answer {brief(text)} is not at answer_start {start} but only at {places[0]}; correct the offset, "
                    "or pass --fix_answer_offsets true to correct all offsets with one match"
                )
            elif len(places) > 1:
                yield (
                    f"answer {brief(text)} is not at answer_start {start} but at "
                    f"{', '.join(map(str, places[:5]))}; set answer_start to one of these"
                )
            elif not places:
                yield f"answer {brief(text)} is not in the context; copy the answer from the context"


def fix_offsets(row: Row) -> Row:
    """Return the answers as two lists with correct offsets, without alternatives that are not in the context.

    `gold` holds the texts of all answers, `moved` counts the corrected offsets, and `elsewhere` the alternatives.
    """
    answers, context = as_lists(row["answers"]), row["context"]
    kept = [pair for pair in zip(answers["text"], answers["answer_start"], strict=True) if pair[0] in context]
    starts = [
        start if start >= 0 and context.startswith(text, start) else _places(context, text)[0] for text, start in kept
    ]
    moved = sum(start != before for start, (_, before) in zip(starts, kept, strict=True))
    return {
        "answers": {"text": [text for text, _ in kept], "answer_start": starts},
        "gold": answers["text"],
        "moved": moved,
        "elsewhere": len(answers["text"]) - len(kept),
    }


def _places(context: str, text: str) -> list[int]:
    return [match.start() for match in re.finditer(f"(?={re.escape(text)})", context)]
