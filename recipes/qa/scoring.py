"""Exact match and F1 of SQuAD, the threshold for "no answer", a baseline, and the printed table."""

import math
import string
from collections import Counter
from collections.abc import Iterator

import numpy as np
import regex
from datasets import Dataset

from common.args import TrainingArguments
from common.data.domains import DOMAIN, by_domain
from common.data.words import WORD, composed, letters, without_spaces
from common.data.words import words as words_of
from common.errors import tell
from common.run.report import print_table, rows_named

from .spans import Spans, trimmed

ARTICLES = regex.compile(r"\b(a|an|the)\b(?!\p{M})")
#: words and numbers with inner punctuation: 1,000.5, O'Neill, well-known
_COMPOUND = regex.compile(rf"{WORD}(?:[.,'’-]+{WORD})*")
PUNCTUATION = set(string.punctuation)
QUESTION_WORDS = ("what", "who", "when", "where", "which", "why", "how")
_WHO = {"whom": "who", "whose": "who"}


def normalized(answer: str) -> str:
    """Lower-case an answer and remove punctuation, articles and extra spaces, in the order of the SQuAD scripts.

    The SQuAD scripts take accents in composed and decomposed form as different; here both are composed.
    """
    kept = "".join(c for c in composed(answer).lower() if c not in PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", kept).split())


def words(answer: str) -> list[str]:
    """Split the normalized answer into words, the default unit of F1."""
    return normalized(answer).split()


def characters(answer: str) -> list[str]:
    """Split the lower-cased answer into letters with their marks, and digits: the unit of F1 without spaces."""
    return letters(answer.lower())


UNITS = {"word": words, "character": characters}


def unit_of(unit: str, contexts: list[str]) -> str:
    """Return `unit`; for "auto" character if most letters of the contexts have no spaces between words, else word."""
    if unit != "auto":
        return unit
    unit = "character" if without_spaces("".join(context[:1000] for context in contexts[:1000])) else "word"
    tell(f"F1 counts each {unit}, from the script of the contexts; --f1_unit decides")
    return unit


def pair_scores(predicted: str, gold: list[str], unit: str = "word", may_be_none: bool = True) -> tuple[float, float]:
    """Compute exact match (0 or 1) and F1 of an answer, as https://rajpurkar.github.io/SQuAD-explorer/ does.

    Args:
        predicted: the answer; the empty text is "no answer".
        gold: the correct answers. The best score over them counts.
        unit: the unit of F1, a key of `UNITS`.
        may_be_none: True for the script of SQuAD 2.0. With an empty `gold`, "no answer" is then correct, and gold
            answers of articles and punctuation alone are ignored. False for the script of SQuAD 1.1.
    """
    units = UNITS[unit]
    answer, targets = units(predicted), [units(text) for text in gold]
    if may_be_none:
        targets = [target for target in targets if target] or [[]]
    return (
        max(float(answer == target) for target in targets),
        max(
            _f1(answer, target) if answer and target else float(may_be_none and answer == target) for target in targets
        ),
    )


def _f1(answer: list[str], target: list[str]) -> float:
    same = sum((Counter(answer) & Counter(target)).values())
    return 2 * same / (len(answer) + len(target))


def question_type(question: str) -> str:
    """Return the first question word: what, who, when, where, which, why, how or how_many; "other" without one."""
    question_words = words_of(question.lower())
    for i, word in enumerate(question_words):
        word = _WHO.get(word, word)
        if word in QUESTION_WORDS:
            many = word == "how" and question_words[i + 1 : i + 2] and question_words[i + 1] in ("many", "much")
            return "how_many" if many else word
    return "other"


def answers(contexts: list[str], spans: Spans, threshold: float | None) -> list[tuple[int, int]]:
    """Return the (start, end) characters of the answer to each question; (0, 0) for "no answer".

    The answer is the best span. "No answer" wins if its score exceeds the best span's by more than `threshold`. With
    the threshold None, each question gets an answer.
    """
    start, end, score = spans.best()
    none = np.isinf(score) if threshold is None else np.isinf(score) | (spans.null - score > threshold)
    return [
        (0, 0) if empty else trimmed(context, s, e)
        for context, s, e, empty in zip(contexts, start.tolist(), end.tolist(), none, strict=True)
    ]


def scores(questions: list[str], gold: list[list[str]], predicted: list[str], unit: str = "word") -> dict[str, float]:
    """Compute exact match and F1 (from 0 to 1) over all questions and for each question type.

    Like the SQuAD 2.0 script, separate questions with an answer (`HasAns_*`) from questions without (`NoAns_*`), if
    both kinds occur.
    """
    some_none = not all(gold)
    each = np.array([pair_scores(p, g, unit, some_none) for p, g in zip(predicted, gold, strict=True)])
    result = {"exact_match": each[:, 0].mean(), "f1": each[:, 1].mean()}
    answerable = np.array([bool(texts) for texts in gold])
    if 0 < answerable.sum() < len(gold):
        for name, kind in (("HasAns", answerable), ("NoAns", ~answerable)):
            result |= {f"{name}_exact": each[kind, 0].mean(), f"{name}_f1": each[kind, 1].mean()}
            result[f"{name}_total"] = int(kind.sum())
    types = np.array([question_type(question) for question in questions])
    for name in sorted(set(types)):
        of_type = each[types == name]
        result |= {f"{name}_exact_match": of_type[:, 0].mean(), f"{name}_f1": of_type[:, 1].mean()}
        result[f"{name}_support"] = len(of_type)
    return {name: v if isinstance(v, int) else float(v) for name, v in result.items()}


def best_threshold(contexts: list[str], gold: list[list[str]], spans: Spans, unit: str = "word") -> float | None:
    """Return the threshold for "no answer" with the best F1; None if each question has an answer.

    As in the SQuAD 2.0 script: sort the questions by margin and try the threshold between each two neighbours.
    """
    if all(gold):
        return None
    always = [context[s:e] for context, (s, e) in zip(contexts, answers(contexts, spans, None), strict=True)]
    answered = np.array([pair_scores(p, g, unit)[1] for p, g in zip(always, gold, strict=True)])
    silent = np.array([float(not texts) for texts in gold])
    margin = spans.null - spans.best()[2]
    order = np.argsort(margin, kind="stable")
    order = order[np.isfinite(margin[order])]  # without a span, no threshold gives an answer
    if not len(order):
        return 0.0
    totals = silent.sum() + np.r_[0, np.cumsum((answered - silent)[order])]
    margins = margin[order]
    # a threshold lies before the first margin, between two different margins, or after the last
    possible = np.r_[True, np.diff(margins) > 0, True]
    best = int(np.flatnonzero(possible)[np.argmax(totals[possible])])
    if best == 0:
        return float(margins[0]) - 1.0
    if best == len(margins):
        return float(np.nextafter(margins[-1], np.inf))  # above, because predict rounds the last margin differently
    return float((margins[best - 1] + margins[best]) / 2)


def overlap_baseline(questions: list[str], contexts: list[str]) -> list[str]:
    """Answer questions without training, from the window of words that overlaps most with the question.

    A window slides over the context. The weight of a shared word falls with its frequency in the context (the sliding
    window of Richardson et al. 2013, https://aclanthology.org/D13-1020). The answer is the longest run of at most five
    words in the best window. The run excludes words of the question and words in over 30 % of the contexts.
    """
    frequent = Counter(word for context in set(contexts) for word in set(words(context)))
    limit = 0.3 * len(set(contexts))
    return [_overlap_answer(q, c, frequent, max(limit, 1)) for q, c in zip(questions, contexts, strict=True)]


def _overlap_answer(question: str, context: str, frequent: Counter, limit: float) -> str:
    spans = [match.span() for match in _COMPOUND.finditer(context)]
    if not spans:
        return ""
    context_words = [normalized(context[s:e]) for s, e in spans]
    counts, asked = Counter(context_words), set(words(question))
    weights = np.array([math.log1p(1 / counts[word]) if word in asked else 0.0 for word in context_words])
    size = min(len(context_words), max(10, len(asked)))
    sums = np.convolve(weights, np.ones(size), mode="valid")
    first = int(sums.argmax())
    best: list[int] = []
    run: list[int] = []
    for i in range(first, first + size):
        if context_words[i] in asked or frequent[context_words[i]] > limit:
            run = []
            continue
        touches = run and len(run) < 5 and context[spans[i - 1][1] : spans[i][0]].isspace()
        run = [*run, i] if touches else [i]
        best = max(best, run, key=len)
    return context[spans[best[0]][0] : spans[best[-1]][1]] if best else ""


def compare(rows: Dataset, places: list[tuple[int, int]], unit: str) -> Iterator[dict]:
    """Yield each question with its gold answers, the predicted answer, its characters, exact match and F1."""
    some_none = not all(rows["gold"])
    for row, (start, end) in zip(rows, places, strict=True):
        predicted = row["context"][start:end]
        exact, f1 = pair_scores(predicted, row["gold"], unit, some_none)
        kept = {"id": row["id"]} | ({DOMAIN: row[DOMAIN]} if DOMAIN in row else {})
        kept |= {"question": row["question"], "answers": row["gold"]}
        place = {"start": start, "end": end} if end > start else {"start": None, "end": None}
        yield kept | {"predicted": predicted, **place, "exact_match": exact, "f1": round(f1, 4)}


class SquadScorer:
    """Score the questions in the `rows` of a split; `unit` is the unit of F1, word or character."""

    def __init__(self, rows: Dataset, unit: str, args: TrainingArguments):
        self.rows, self.unit, self.args = rows, unit, args
        self.questions, self.contexts = rows["question"][:], rows["context"][:]
        self.gold = rows["gold"][:]

    def __call__(self, spans: Spans, threshold: float | None) -> dict[str, float]:
        """Return the `scores` of the best spans, and those of the domains; see `answers` for `threshold`."""
        places = answers(self.contexts, spans, threshold)
        predicted = [context[start:end] for context, (start, end) in zip(self.contexts, places, strict=True)]
        columns = self.questions, self.gold, predicted
        return by_domain(self.rows, lambda select: scores(*map(select, columns), self.unit), self.args)

    def names(self) -> list[str]:
        """Return the names of the scores."""
        return list(scores(self.questions, self.gold, [""] * len(self.gold)))

    def best_threshold(self, spans: Spans) -> float | None:
        """Return the threshold for "no answer" with the best F1; see `best_threshold`."""
        return best_threshold(self.contexts, self.gold, spans, self.unit)

    def baseline(self) -> dict[str, float]:
        """Return exact match and F1 of the word overlap baseline, as `baseline_...`."""
        predicted = overlap_baseline(self.questions, self.contexts)
        result = scores(self.questions, self.gold, predicted, self.unit)
        return {f"baseline_{name}": result[name] for name in ("exact_match", "f1")}

    def predictions(self, spans: Spans, threshold: float | None) -> Iterator[dict]:
        """Yield the rows with their predicted answers; see `compare`."""
        return compare(self.rows, answers(self.contexts, spans, threshold), self.unit)


def print_scores(metrics: dict[str, float], split: str) -> None:
    """Print the scores of each question type, of questions with and without an answer, of all, and of the baseline."""
    of_split = {
        name.removeprefix(f"{split}_"): value for name, value in metrics.items() if name.startswith(f"{split}_")
    }
    types = sorted(name.removesuffix("_support") for name in of_split if name.endswith("_support"))
    total = sum(of_split[f"{name}_support"] for name in types)
    rows = [
        [t.replace("_", " "), of_split[f"{t}_exact_match"], of_split[f"{t}_f1"], of_split[f"{t}_support"]]
        for t in types
    ]
    for name, label in (("HasAns", "with an answer"), ("NoAns", "without an answer")):
        if f"{name}_total" in of_split:
            rows.append([label, of_split[f"{name}_exact"], of_split[f"{name}_f1"], of_split[f"{name}_total"]])
    rows.append(["all", of_split["exact_match"], of_split["f1"], total])
    if "baseline_f1" in of_split:
        rows.append(["word overlap", of_split["baseline_exact_match"], of_split["baseline_f1"], total])
    tell(f"\n{rows_named(split)} scores (exact match and F1 of SQuAD)")
    print_table(["questions", "exact match", "F1", "number"], rows, last=4)
