"""Exact match and F1 as SQuAD counts them, the threshold for "no answer", a baseline, and what is printed."""

import math
import re
import string
from collections import Counter
from collections.abc import Iterator

import numpy as np
from datasets import Dataset

from common.errors import tell
from common.run.report import print_table

from .spans import Spans, trimmed

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = set(string.punctuation)
QUESTION_WORDS = ("what", "who", "when", "where", "which", "why", "how")
_WHO = {"whom": "who", "whose": "who"}


def normalized(answer: str) -> str:
    """Lower-cased, without punctuation, articles and superfluous blanks, in the order of the SQuAD scripts."""
    kept = "".join(c for c in answer.lower() if c not in PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", kept).split())


def words(answer: str) -> list[str]:
    """What F1 counts: the words of the normalized answer."""
    return normalized(answer).split()


def characters(answer: str) -> list[str]:
    """What F1 counts for writing without spaces: each letter, mark and digit of the answer, lower-cased."""
    return [c for c in answer.lower() if c.isalnum()]


UNITS = {"word": words, "character": characters}


def pair_scores(predicted: str, gold: list[str], unit: str = "word", may_be_none: bool = True) -> tuple[float, float]:
    """Exact match (0 or 1) and F1 of an answer: the best over the `gold` ones; no answer is the empty text.

    As the scripts of https://rajpurkar.github.io/SQuAD-explorer/ count, of SQuAD 2.0 where questions `may_be_none`
    (without any gold answer the right one is the empty text), else of 1.1. They differ beside that in gold answers of
    nothing but articles and punctuation marks, which count for nothing in 2.0.
    """
    units = UNITS[unit]
    found, targets = units(predicted), [units(text) for text in gold]
    if may_be_none:
        targets = [target for target in targets if target] or [[]]
    return (
        max(float(found == target) for target in targets),
        max(_f1(found, target) if found and target else float(may_be_none and found == target) for target in targets),
    )


def _f1(found: list[str], target: list[str]) -> float:
    same = sum((Counter(found) & Counter(target)).values())
    return 2 * same / (len(found) + len(target))


def question_type(question: str) -> str:
    """The first question word: what, who, when, where, which, why, how, how many; "other" without one."""
    found = re.findall(r"\w+", question.lower())
    for i, word in enumerate(found):
        word = _WHO.get(word, word)
        if word in QUESTION_WORDS:
            many = word == "how" and found[i + 1 : i + 2] and found[i + 1] in ("many", "much")
            return "how_many" if many else word
    return "other"


def answers(contexts: list[str], spans: Spans, threshold: float | None) -> list[tuple[int, int]]:
    """First character and the one after the last of each question's answer; (0, 0) for none.

    The best span, unless "no answer" scores more than `threshold` above it; None always answers.
    """
    start, end, score = spans.best()
    none = np.isinf(score) if threshold is None else np.isinf(score) | (spans.null - score > threshold)
    return [
        (0, 0) if empty else trimmed(context, s, e)
        for context, s, e, empty in zip(contexts, start.tolist(), end.tolist(), none, strict=True)
    ]


def scores(questions: list[str], gold: list[list[str]], predicted: list[str], unit: str = "word") -> dict[str, float]:
    """Exact match and F1 (from 0 to 1) over all questions, and by question type.

    Where some of the questions have an answer and some do not, also over either kind, as the SQuAD 2.0 script does
    (`HasAns_*`, `NoAns_*`).
    """
    some_none = not all(gold)
    each = np.array([pair_scores(p, g, unit, some_none) for p, g in zip(predicted, gold, strict=True)])
    found = {"exact_match": each[:, 0].mean(), "f1": each[:, 1].mean()}
    answerable = np.array([bool(texts) for texts in gold])
    if 0 < answerable.sum() < len(gold):
        for name, kind in (("HasAns", answerable), ("NoAns", ~answerable)):
            found |= {f"{name}_exact": each[kind, 0].mean(), f"{name}_f1": each[kind, 1].mean()}
            found[f"{name}_total"] = int(kind.sum())
    types = np.array([question_type(question) for question in questions])
    for name in sorted(set(types)):
        of_type = each[types == name]
        found |= {f"{name}_exact_match": of_type[:, 0].mean(), f"{name}_f1": of_type[:, 1].mean()}
        found[f"{name}_support"] = len(of_type)
    return {name: v if isinstance(v, int) else float(v) for name, v in found.items()}


def best_threshold(contexts: list[str], gold: list[list[str]], spans: Spans, unit: str = "word") -> float | None:
    """The threshold for "no answer" with the best F1 on these questions; None where each of them has an answer.

    As in the SQuAD 2.0 script: questions are answered one more at a time, in the order of their margin.
    """
    if all(gold):
        return None
    always = [context[s:e] for context, (s, e) in zip(contexts, answers(contexts, spans, None), strict=True)]
    answered = np.array([pair_scores(p, g, unit)[1] for p, g in zip(always, gold, strict=True)])
    silent = np.array([float(not texts) for texts in gold])
    margin = spans.null - spans.best()[2]
    order = np.argsort(margin, kind="stable")
    totals = silent.sum() + np.r_[0, np.cumsum((answered - silent)[order])]
    margins = margin[order]
    # a cut lies between two margins that differ: before the first, between, or behind the last
    possible = np.r_[True, np.diff(margins) > 0, True]
    best = int(np.flatnonzero(possible)[np.argmax(totals[possible])])
    if best == 0:
        return float(margins[0]) - 1.0
    return float(margins[best - 1]) if best == len(margins) else float((margins[best - 1] + margins[best]) / 2)


def overlap_baseline(questions: list[str], contexts: list[str]) -> list[str]:
    """Answers without any training: the longest stretch of new words in the window that shares most with the question.

    A window of words slides over the context; a word that it shares with the question counts the more, the rarer it is
    in the context (the sliding window of Richardson et al. 2013, https://aclanthology.org/D13-1020). Of the window,
    the longest run of at most five words that are neither in the question nor frequent in all contexts is the answer.
    """
    frequent = Counter(word for context in set(contexts) for word in set(words(context)))
    most = 0.3 * len(set(contexts))
    return [_overlap_answer(q, c, frequent, max(most, 1)) for q, c in zip(questions, contexts, strict=True)]


def _overlap_answer(question: str, context: str, frequent: Counter, most: float) -> str:
    spans = [match.span() for match in re.finditer(r"\w[\w.,'’-]*\w|\w", context)]
    if not spans:
        return ""
    found = [normalized(context[s:e]) for s, e in spans]
    counts, asked = Counter(found), set(words(question))
    worth = np.array([math.log1p(1 / counts[word]) if word in asked else 0.0 for word in found])
    size = min(len(found), max(10, len(asked)))
    sums = np.convolve(worth, np.ones(size), mode="valid")
    first = int(sums.argmax())
    best: list[int] = []
    run: list[int] = []
    for i in range(first, first + size):
        if found[i] in asked or frequent[found[i]] > most:
            run = []
            continue
        touches = run and len(run) < 5 and context[spans[i - 1][1] : spans[i][0]].isspace()
        run = [*run, i] if touches else [i]
        best = max(best, run, key=len)
    return context[spans[best[0]][0] : spans[best[-1]][1]] if best else ""


def compare(rows: Dataset, found: list[tuple[int, int]], unit: str) -> Iterator[dict]:
    """The questions of a split with gold answers and the predicted one, its place, exact match and F1."""
    some_none = any(not row["text"] for row in rows["answers"])
    for row, (start, end) in zip(rows, found, strict=True):
        predicted = row["context"][start:end]
        exact, f1 = pair_scores(predicted, row["answers"]["text"], unit, some_none)
        kept = {"id": row["id"], "question": row["question"], "answers": row["answers"]["text"]}
        place = {"start": start, "end": end} if end > start else {"start": None, "end": None}
        yield kept | {"predicted": predicted, **place, "exact_match": exact, "f1": round(f1, 4)}


class SquadScorer:
    """Scores of the questions in `rows` of a split; `unit` is what F1 counts, word or character."""

    def __init__(self, rows: Dataset, unit: str):
        self.rows, self.unit = rows, unit
        self.questions, self.contexts = rows["question"][:], rows["context"][:]
        self.gold = [answers["text"] for answers in rows["answers"][:]]

    def __call__(self, found: Spans, threshold: float | None) -> dict[str, float]:
        """Return the `scores` of the best spans, with "no answer" above `threshold`."""
        places = answers(self.contexts, found, threshold)
        predicted = [context[start:end] for context, (start, end) in zip(self.contexts, places, strict=True)]
        return scores(self.questions, self.gold, predicted, self.unit)

    def names(self) -> list[str]:
        """Return the names of the scores."""
        return list(scores(self.questions, self.gold, [""] * len(self.gold)))

    def best_threshold(self, found: Spans) -> float | None:
        """Return the threshold for "no answer" with the best F1; see `best_threshold`."""
        return best_threshold(self.contexts, self.gold, found, self.unit)

    def baseline(self) -> dict[str, float]:
        """Return exact match and F1 of the word overlap baseline, as `baseline_...`."""
        predicted = overlap_baseline(self.questions, self.contexts)
        found = scores(self.questions, self.gold, predicted, self.unit)
        return {f"baseline_{name}": found[name] for name in ("exact_match", "f1")}

    def predictions(self, found: Spans, threshold: float | None) -> Iterator[dict]:
        """Yield the rows with their predicted answers; see `compare`."""
        return compare(self.rows, answers(self.contexts, found, threshold), self.unit)


def print_scores(metrics: dict[str, float], split: str) -> None:
    """A line for each type of question, for those with and without an answer, for all, and for the baseline."""
    own = {name.removeprefix(f"{split}_"): value for name, value in metrics.items() if name.startswith(f"{split}_")}
    types = sorted(name.removesuffix("_support") for name in own if name.endswith("_support"))
    total = sum(own[f"{name}_support"] for name in types)
    rows = [[t.replace("_", " "), own[f"{t}_exact_match"], own[f"{t}_f1"], own[f"{t}_support"]] for t in types]
    for name, label in (("HasAns", "with an answer"), ("NoAns", "without an answer")):
        if f"{name}_total" in own:
            rows.append([label, own[f"{name}_exact"], own[f"{name}_f1"], own[f"{name}_total"]])
    rows.append(["all", own["exact_match"], own["f1"], total])
    if "baseline_f1" in own:
        rows.append(["word overlap", own["baseline_exact_match"], own["baseline_f1"], total])
    tell(f"\n{split} scores, as SQuAD counts")
    print_table(["questions", "exact match", "F1", "number"], rows, last=4)
