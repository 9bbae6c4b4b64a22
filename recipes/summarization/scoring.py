"""Score summaries: ROUGE, novelty and length, with baselines and a test of significance."""

from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from datasets import Dataset
from rouge_score import rouge_scorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from common.args import TrainingArguments
from common.data import domains
from common.data.words import composed, letters, words
from common.errors import tell
from common.run.report import print_table, rows_named, write_json_lines, write_samples
from common.run.significance import bootstrap_p

from .articles import is_dialogue, units

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
#: scores of evaluations during training
SCORES = (*KINDS, "rouge_mean")
#: scores of the model card
HEADLINE = (*KINDS, "lead_rouge1", "oracle_rouge1")
#: samples of random sentences; the random baseline is their mean
DRAWS = 5
#: maximum number of sentences that `best_count` tries
MOST_SENTENCES = 5


class EnglishWords(DefaultTokenizer):
    """The words of rouge_score, a to z and digits, with Porter stems; of texts in composed form."""

    def __init__(self) -> None:
        super().__init__(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        return super().tokenize(composed(text))


class UnicodeWords(Tokenizer):
    """Split text into lower-case words of any script; the tokenizer of rouge_score keeps only a to z and digits."""

    def tokenize(self, text: str) -> list[str]:
        return words(text.lower())


def kind_of(texts: Sequence[str]) -> str:
    """Return the kind of words that fits the alphabet of the texts: "english" if 99 % of the letters are ASCII."""
    found = [letter for text in texts for letter in letters(text) if letter[0].isalpha()]
    return "english" if sum(map(str.isascii, found)) >= 0.99 * len(found) else "unicode"


class Rouge:
    """Compute the F1 of ROUGE-1, -2, -L and -Lsum with Google's rouge_score, and cache the scores.

    With several references, the best one counts for each kind of ROUGE. ROUGE-Lsum works on sentences or turns.
    Source: Lin 2004, https://aclanthology.org/W04-1013.

    Args:
        kind: "english" (words of rouge_score, Porter stemmer), "unicode" (words of any script, no stemmer), or "auto"
            (by `kind_of`).
        texts: texts for "auto".
    """

    def __init__(self, kind: str, texts: Sequence[str]):
        if kind == "auto":
            kind = kind_of(texts)
            tell(f"ROUGE counts {kind} words, from the alphabet of the summaries")
        stemmer = kind == "english"
        self.tokenizer = EnglishWords() if stemmer else UnicodeWords()
        self.scorer = rouge_scorer.RougeScorer(KINDS, tokenizer=self.tokenizer)
        stems = "porter" if stemmer else "no"
        self.signature = f"rouge_score:{version('rouge_score')}|words:{kind}|stemmer:{stems}|references:best"
        self._cache: dict[tuple, list[float]] = {}

    def __call__(self, predicted: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """Return scores from 0 to 100, of shape (rows, kinds)."""
        return np.array([self._score(text, tuple(of_row)) for text, of_row in zip(predicted, references, strict=True)])

    def _score(self, predicted: str, references: tuple[str, ...]) -> list[float]:
        key = predicted, references
        if key not in self._cache:
            targets = ["\n".join(units(text)) for text in references]
            scored = self.scorer.score_multi(targets, "\n".join(units(predicted)))
            self._cache[key] = [100 * scored[kind].fmeasure for kind in KINDS]
        return self._cache[key]


def means(values: np.ndarray) -> dict[str, float]:
    """Average scores of shape (rows, kinds) over the rows; `rouge_mean` is the mean of ROUGE-1, -2 and -L."""
    result = dict(zip(KINDS, values.mean(0).tolist(), strict=True))
    return result | {"rouge_mean": float(np.mean([result[kind] for kind in KINDS[:3]]))}


def style(documents: Sequence[str], summaries: Sequence[str]) -> dict[str, float]:
    """Describe the style of summaries without references.

    - `novel_1grams`, `novel_2grams`, `novel_3grams`: mean share of a summary's n-grams that are not in the document,
      over the summaries with n-grams (See et al. 2017, https://aclanthology.org/P17-1099)
    - `compression`: words of the documents divided by words of the summaries (Grusky et al. 2018,
      https://aclanthology.org/N18-1065)
    - `words`: mean number of words in a summary
    """
    split = UnicodeWords().tokenize
    pairs = [(split(document), split(summary)) for document, summary in zip(documents, summaries, strict=True)]
    result = {}
    for n in (1, 2, 3):
        shares = []
        for document, summary in pairs:
            known, grams = ngrams(document, n), ngrams(summary, n)
            if grams:
                shares.append(sum(count for gram, count in grams.items() if gram not in known) / grams.total())
        result[f"novel_{n}grams"] = float(np.mean(shares)) if shares else 0.0
    counts = [sum(map(len, side)) for side in zip(*pairs, strict=True)]
    return result | {"compression": counts[0] / max(1, counts[1]), "words": counts[1] / len(pairs)}


def ngrams(words: list[str], n: int) -> Counter:
    """Count the n-grams of `words`."""
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


# Baselines


def oracle(parts: Sequence[str], references: Sequence[str], rouge: Rouge) -> list[int]:
    """Return the numbers of the sentences in `parts` that match a reference best, by greedy search.

    The search adds sentences while the F1 of unigrams and bigrams grows. With several references, the best match
    counts. The list is empty if no word matches. Source: Nallapati et al. 2017, https://arxiv.org/abs/1611.04230.
    """
    split = [[ngrams(words, n) for n in (1, 2)] for words in map(rouge.tokenizer.tokenize, parts)]
    best: tuple[float, list[int]] = (0.0, [])
    for reference in references:
        words = rouge.tokenizer.tokenize(reference)
        best = max(best, _greedy(split, [ngrams(words, n) for n in (1, 2)]), key=lambda match: match[0])
    return sorted(best[1])


def _greedy(parts: list[list[Counter]], reference: list[Counter]) -> tuple[float, list[int]]:
    # only n-grams of the reference add to the score
    shared = [
        [Counter({g: c for g, c in grams.items() if g in r}) for grams, r in zip(part, reference, strict=True)]
        for part in parts
    ]
    sizes = [[grams.total() for grams in part] for part in parts]
    left = {i for i, part in enumerate(shared) if part[0]}
    selected, size, matched = [Counter(), Counter()], [0, 0], [0, 0]
    score, chosen = 0.0, []
    while left:
        options = []
        for i in left:
            gains = [
                sum(min(r[g], h[g] + c) - min(r[g], h[g]) for g, c in grams.items())
                for grams, h, r in zip(shared[i], selected, reference, strict=True)
            ]
            f1 = [
                2 * (m + gain) / (s + more + r.total())
                for m, gain, s, more, r in zip(matched, gains, size, sizes[i], reference, strict=True)
                if r
            ]
            options.append((sum(f1), -i))
        better, i = max(options)
        if better <= score:
            break
        score, i = better, -i
        left.remove(i)
        chosen.append(i)
        for grams, h in zip(shared[i], selected, strict=True):
            h.update(grams)
        size = [s + more for s, more in zip(size, sizes[i], strict=True)]
        matched = [sum(min(r[g], h[g]) for g in r) for h, r in zip(selected, reference, strict=True)]
    return score, chosen


def extract(document: str, chosen: Sequence[int]) -> str:
    """Join the chosen sentences of a document, or turns of a dialogue, as a text."""
    parts = units(document)
    return ("\n" if is_dialogue(document) else " ").join(parts[i] for i in chosen)


def best_count(rouge: Rouge, of_count, references: Sequence[Sequence[str]]) -> int:
    """Return the number of sentences with the best `rouge_mean`; stop at the first number that scores no better.

    `of_count(n)` returns the summaries of n sentences.
    """
    best, score = 1, -1.0
    for count in range(1, MOST_SENTENCES + 1):
        mean = means(rouge(of_count(count), references))["rouge_mean"]
        if mean <= score:
            break
        best, score = count, mean
    return best


def lead(documents: Sequence[str], count: int) -> list[str]:
    """Return the first `count` sentences of each document."""
    return [extract(text, range(min(count, len(units(text))))) for text in documents]


def baselines(rouge: Rouge, rows: Dataset, first: int, random: int) -> dict[str, float]:
    """Score the `first` sentences (`lead_`), `random` sentences (`random_`) and the greedy oracle (`oracle_`)."""
    documents, references = rows["document"][:], rows["references"][:]
    parts = [units(text) for text in documents]
    samples = []
    for draw in range(DRAWS):
        generator = np.random.default_rng(draw)
        picks = [sorted(generator.permutation(len(p))[:random]) for p in parts]
        samples.append(rouge([extract(text, pick) for text, pick in zip(documents, picks, strict=True)], references))
    chosen = [oracle(p, r, rouge) for p, r in zip(parts, references, strict=True)]
    best = [extract(text, pick) for text, pick in zip(documents, chosen, strict=True)]
    by_name = {
        "lead": means(rouge(lead(documents, first), references)),
        "random": means(np.mean(samples, axis=0)),
        "oracle": means(rouge(best, references)),
    }
    return {f"{name}_{kind}": value for name, values in by_name.items() for kind, value in values.items()} | {
        "lead_sentences": first,
        "random_sentences": random,
    }


def by_domain(rows: Dataset, values: np.ndarray, args: TrainingArguments) -> dict[str, float]:
    """Return the `means` of the scores of rows, and those of the domains."""
    return domains.by_domain(rows, lambda select: means(select(values)), args)


def scores(rouge: Rouge, rows: Dataset, predicted: Sequence[str], args: TrainingArguments) -> dict[str, float]:
    """Return mean ROUGE, also by domain and by group, and the style of the summaries and of the references."""
    documents, references = rows["document"][:], rows["references"][:]
    values = rouge(predicted, references)
    result = by_domain(rows, values, args) | style(documents, predicted)
    result |= {f"reference_{name}": value for name, value in style(documents, rows["summary"][:]).items()}
    if "group" in rows.column_names:
        groups = np.array(rows["group"][:])
        for name in sorted(set(groups.tolist())):
            of_group = means(values[groups == name])
            result |= {f"{name}_{kind}": of_group[kind] for kind in KINDS}
            result[f"{name}_support"] = int((groups == name).sum())
    return result


def score_split(
    rouge: Rouge,
    rows: Dataset,
    predicted: Sequence[str],
    counts: tuple[int, int],
    other: list[str] | None,
    args: TrainingArguments,
) -> dict[str, float]:
    """Return the `scores` of the predictions, the scores of the `baselines`, and the number of `samples`.

    Args:
        rouge: the scorer.
        rows: the rows of a split.
        predicted: a summary for each row.
        counts: number of sentences of the lead baseline and of the random baseline.
        other: predictions of another run to compare with; None for no comparison.
        args: name the score of domains.
    """
    result = scores(rouge, rows, predicted, args) | {"samples": len(predicted)} | baselines(rouge, rows, *counts)
    return result if other is None else result | compare(rouge, other, predicted, rows)


def write_split(folder: str, name: str, rouge: Rouge, rows: Dataset, predicted: list[str], more: list[dict]) -> None:
    """Write `predictions_<name>.jsonl`, and `samples_<name>.html` with random, worst and best summaries."""
    write_json_lines(Path(folder, f"predictions_{name}.jsonl"), predictions(rows, predicted, more))
    texts = {"document": rows["document"][:], "reference": rows["summary"][:], "hypothesis": predicted}
    of_rows = rouge(predicted, rows["references"][:])[:, :3].mean(1).tolist()
    write_samples(Path(folder, f"samples_{name}.html"), f"Summaries of {name}", texts, of_rows, "ROUGE")


def compare(rouge: Rouge, other: list[str], predicted: list[str], rows: Dataset) -> dict[str, float]:
    """Score the `other` summaries, and compute the p-value of the difference in `rouge_mean` (paired bootstrap)."""
    theirs, ours = (rouge(texts, rows["references"][:]) for texts in (other, predicted))
    p = bootstrap_p(theirs[:, :3].mean(1), ours[:, :3].mean(1))
    return {f"compared_{name}": value for name, value in means(theirs).items()} | {"compared_p": p}


def predictions(rows: Dataset, predicted: list[str], more: list[dict]) -> Iterator[dict]:
    """Yield the rows of a split with `predicted` and the columns in `more`."""
    for row, text, columns in zip(rows, predicted, more, strict=True):
        yield row | {"predicted": text} | columns


def print_scores(metrics: dict[str, float], split: str, signature: str) -> None:
    """Print a table with a line for each baseline, each group and the model."""
    values = {name.removeprefix(f"{split}_"): value for name, value in metrics.items() if name.startswith(f"{split}_")}
    titles = {
        "lead": f"first {values['lead_sentences']}",
        "random": f"random {values['random_sentences']}",
        "oracle": "oracle",
    }
    number = values["samples"]
    rows = [[title, *(values[f"{name}_{kind}"] for kind in KINDS), "", "", number] for name, title in titles.items()]
    rows.append(["references", *[""] * 4, values["reference_novel_2grams"], values["reference_words"], number])
    groups = [name.removesuffix("_support") for name in values if name.endswith("_support")]
    for name in groups:
        rows.append([name, *(values[f"{name}_{kind}"] for kind in KINDS), "", "", values[f"{name}_support"]])
    rows.append(["model", *(values[kind] for kind in KINDS), values["novel_2grams"], values["words"], number])
    tell(f"\n{rows_named(split)} scores, {signature}")
    print_table(["summaries", "ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum", "new 2-grams", "words", "number"], rows, 1)
    if values.get("hit_max_length"):
        tell(f"{values['hit_max_length']:.1%} of the outputs are cut off at --max_target_length")
    if "compared_p" in values:
        mean, p = values["compared_rouge_mean"], values["compared_p"]
        tell(f"compared to ROUGE mean {mean:.2f}: paired bootstrap p = {p:.3f}")
