"""Read questions on texts, in the nested JSON of SQuAD or as flat rows; check them, and correct their offsets."""

import json
import re
from bisect import bisect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from common.args import DataArguments
from common.data.files import Located, Row, json_fault, parse_json, read_file
from common.data.rows import load_splits
from common.errors import brief, tell, warn

KEYS = ("text", "answer_start")
NESTED = re.compile(r'\s*\{\s*"(version|data)"')


def read_squad(path: str | Path, answers: str = "answers") -> Iterator[Located]:
    """Yield rows of `id`, `title`, `context`, `question` and `answers`, each with its place.

    Reads the nested `.json` of SQuAD 1.1 and 2.0 (https://rajpurkar.github.io/SQuAD-explorer/) and flat rows of any
    format. The answers of a flat row, in column `answers`, are `{"text": [...], "answer_start": [...]}` or a list of
    `{"text", "answer_start"}`, in a CSV cell as JSON.
    """
    path = Path(path)
    rows = _nested(path) if path.suffix.lower() == ".json" else None
    flat = rows is None
    for where, row in read_file(path) if flat else rows:
        if isinstance(row, str):
            yield where, row
            continue
        if flat and answers in row:
            row = row | {answers: as_lists(row[answers])}
        if "id" in row:
            where = f"{where}, id {row['id']}"
        impossible, given = row.get("is_impossible"), row.get(answers)
        texts = given.get("text") if isinstance(given, dict) else None
        if isinstance(impossible, bool) and isinstance(texts, list) and impossible == bool(texts):
            yield where, f"is_impossible is {str(impossible).lower()}, but {len(texts)} answers are given"
            continue
        yield where, row


def load_questions(args: DataArguments) -> DatasetDict:
    """Load the splits with columns `question`, `context` and `answers`, every row checked and offsets corrected."""
    columns = {
        "question": args.question_column_name,
        "context": args.context_column_name,
        "answers": args.answer_column_name,
    }
    check = partial(check_row, fix_offsets=args.fix_answer_offsets)
    read = partial(read_squad, answers=args.answer_column_name)
    data = load_splits(args, columns, check, read=read, unique_ids=True, carve_by="context").map(fix_offsets)
    if args.fix_answer_offsets:
        tell(f"--fix_answer_offsets: {sum(sum(split['moved']) for split in data.values())} answers moved")
    answered = {name: [bool(answers["text"]) for answers in split["answers"]] for name, split in data.items()}
    if all(answered["validation"]) and not all(answered["train"] + answered.get("test", [])):
        warn("each validation question has an answer, so the model will answer each question; give some that have none")
    return data


def as_lists(answers: Any) -> Any:
    """`{"text": [...], "answer_start": [...]}` from the other ways to write answers; what is none of them as it is."""
    if isinstance(answers, str):
        try:
            answers = parse_json(answers)
        except (ValueError, RecursionError):
            return answers
    if isinstance(answers, list) and all(isinstance(a, dict) and all(k in a for k in KEYS) for a in answers):
        return {key: [answer[key] for answer in answers] for key in KEYS}
    if isinstance(answers, dict) and all(key in answers for key in KEYS):
        return {key: answers[key] for key in KEYS}
    return answers


def _nested(path: Path) -> Iterator[Located] | None:
    """The questions of a nested file; None where the file is not nested."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = parse_json(text)
    except (OSError, UnicodeDecodeError):
        return None  # which `read_file` says better
    except (ValueError, RecursionError) as error:
        if not NESTED.match(text):
            return None
        where, fault = json_fault(path, error)
        return iter([(where, f"not JSON: {fault}; write it with json.dump")])
    return _questions(path, text, found["data"]) if isinstance(found, dict) and "data" in found else None


def _questions(path: Path, text: str, articles: Any) -> Iterator[Located]:
    breaks = [match.start() for match in re.finditer("\n", text)]
    at = 0

    def place(item: Any) -> str:
        """File and line of a question, found by its id, from that of the one before it on."""
        nonlocal at
        key = item.get("id") if isinstance(item, dict) else None
        for as_written in (json.dumps(key), json.dumps(key, ensure_ascii=False)):
            if key is not None and (found := text.find(as_written, at)) >= 0:
                at = found + len(as_written)
                break
        return f"{path}:{bisect(breaks, at) + 1}"

    if not isinstance(articles, list):
        yield f"{path}:1", '"data" is no list of articles'
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
                    yield f"{where}, article {i}, paragraph {j}, question {k}", "is no object"


def check_row(row: Row, fix_offsets: bool = False) -> Iterator[str]:
    """A sentence for each thing that is wrong with a row of `question`, `context` and `answers`."""
    for name in ("question", "context"):
        if not isinstance(row[name], str) or not row[name].strip():
            yield f"{name} is {brief(row[name])}; needed: a text that is not blank"
            return
    answers = as_lists(row["answers"])
    if not isinstance(answers, dict) or any(not isinstance(answers.get(key), list) for key in KEYS):
        yield (
            f'answers is {brief(row["answers"])}; needed: {{"text": [...], "answer_start": [...]}}, both empty where '
            "the text has no answer"
        )
        return
    texts, starts = answers["text"], answers["answer_start"]
    if len(texts) != len(starts):
        yield f"{len(texts)} answer texts but {len(starts)} answer_start; needed: one each"
        return
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            yield f"answer is {brief(text)}; needed: a text that is not blank (no answer: two empty lists)"
        elif isinstance(start, bool) or not isinstance(start, int):
            yield f"answer_start of {brief(text)} is {brief(start)}; needed: its first character in context, from 0"
        elif start < 0 or row["context"][start : start + len(text)] != text:
            places = _places(row["context"], text)
            if len(places) == 1 and not fix_offsets:
                yield (
                    f"answer {brief(text)} does not stand at answer_start {start} but at {places[0]} only; correct "
                    "it, or pass --fix_answer_offsets true to correct all of this kind"
                )
            elif len(places) > 1:
                yield (
                    f"answer {brief(text)} does not stand at answer_start {start} but at "
                    f"{', '.join(map(str, places[:5]))}; say which by answer_start"
                )
            elif not places:
                yield f"answer {brief(text)} does not stand in the context; correct it, letter by letter"


def fix_offsets(row: Row) -> Row:
    """The answers as two lists, each `answer_start` where its text stands, and how many had to be `moved`."""
    answers = as_lists(row["answers"])
    starts = [
        start if start >= 0 and row["context"].startswith(text, start) else _places(row["context"], text)[0]
        for text, start in zip(answers["text"], answers["answer_start"], strict=True)
    ]
    moved = sum(a != b for a, b in zip(starts, answers["answer_start"], strict=True))
    return {"answers": {"text": answers["text"], "answer_start": starts}, "moved": moved}


def _places(context: str, text: str) -> list[int]:
    return [match.start() for match in re.finditer(f"(?={re.escape(text)})", context)]
