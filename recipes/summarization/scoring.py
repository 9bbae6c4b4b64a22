"""How good summaries are: ROUGE, what is new in them, their length; baselines; whether a difference is chance."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from datasets import Dataset
from rouge_score import rouge_scorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from common.errors import tell
from common.run.report import print_table, write_json_lines, write_samples
from common.run.significance import bootstrap_p

from .articles import is_dialogue, units

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
#: of evaluations during training
SCORES = (*KINDS, "rouge_mean")
#: of the model card
HEADLINE = (*KINDS, "lead_rouge1", "oracle_rouge1")
#: draws of random sentences that the baseline is the mean of
DRAWS = 5
#: sentences that a summary may have where validation rows choose
MOST_SENTENCES = 5
#: Thai, Lao, Burmese, Khmer, Japanese, Chinese: scripts that write no blanks between words
_NO_BLANKS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
#: a run of letters and digits, or one character of such a script
_WORD = re.compile(rf"[{_NO_BLANKS}]|[^\W_{_NO_BLANKS}]+")


class UnicodeWords(Tokenizer):
    """Words of any script, lower-cased: rouge_score's own tokenizer drops all that is not a to z or a digit."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


class Rouge:
    """F1 of ROUGE-1, -2, -L and -Lsum (Lin 2004, https://aclanthology.org/W04-1013) by Google's rouge_score.

    `words` is "english" (that package's words, Porter stemmer), "unicode" (words of any script, no stemmer), or "auto":
    by the letters of `texts`. Of several references the best counts, for each kind by itself. ROUGE-Lsum is over
    sentences, or turns. Summaries that were scored once are not scored again.
    """

    def __init__(self, words: str, texts: Sequence[str]):
        if words == "auto":
            letters = [c for text in texts for c in text if c.isalpha()]
            words = "english" if sum(map(str.isascii, letters)) >= 0.99 * len(letters) else "unicode"
            tell(f"ROUGE counts {words} words, by the letters of the summaries")
        stemmer = words == "english"
        self.tokenizer = DefaultTokenizer(use_stemmer=stemmer) if stemmer else UnicodeWords()
        self.scorer = rouge_scorer.RougeScorer(KINDS, tokenizer=self.tokenizer)
        stems = "porter" if stemmer else "no"
        self.signature = f"rouge_score:{version('rouge_score')}|words:{words}|stemmer:{stems}|references:best"
        self._known: dict[tuple, list[float]] = {}

    def __call__(self, predicted: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """Scores from 0 to 100, of shape (rows, kinds)."""
        return np.array([self._score(text, tuple(of_row)) for text, of_row in zip(predicted, references, strict=True)])

    def _score(self, predicted: str, references: tuple[str, ...]) -> list[float]:
        key = predicted, references
        if key not in self._known:
            targets = ["\n".join(units(text)) for text in references]
            found = self.scorer.score_multi(targets, "\n".join(units(predicted)))
            self._known[key] = [100 * found[kind].fmeasure for kind in KINDS]
        return self._known[key]


def means(values: np.ndarray) -> dict[str, float]:
    """Mean of each kind over the rows of what a `Rouge` gave, and `rouge_mean`, that of ROUGE-1, -2 and -L."""
    found = dict(zip(KINDS, values.mean(0).tolist(), strict=True))
    return found | {"rouge_mean": float(np.mean([found[kind] for kind in KINDS[:3]]))}


def style(documents: Sequence[str], summaries: Sequence[str]) -> dict[str, float]:
    """What summaries are like, whatever their references.

    - `novel_1grams`, `_2grams`, `_3grams`: share of the n-grams of a summary that are not in its document, the mean
      over the summaries that have some (See et al. 2017, https://aclanthology.org/P17-1099)
    - `compression`: words of the documents to words of the summaries (Grusky et al. 2018,
      https://aclanthology.org/N18-1065)
    - `words`: words of a summary
    """
    split = UnicodeWords().tokenize
    pairs = [(split(document), split(summary)) for document, summary in zip(documents, summaries, strict=True)]
    found = {}
    for n in (1, 2, 3):
        shares = []
        for document, summary in pairs:
            there, own = ngrams(document, n), ngrams(summary, n)
            if own:
                shares.append(sum(count for gram, count in own.items() if gram not in there) / own.total())
        found[f"novel_{n}grams"] = float(np.mean(shares)) if shares else 0.0
    counts = [sum(map(len, side)) for side in zip(*pairs, strict=True)]
    return found | {"compression": counts[0] / max(1, counts[1]), "words": counts[1] / len(pairs)}


def ngrams(words: list[str], n: int) -> Counter:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


# What a summary is compared with


def oracle(parts: Sequence[str], references: Sequence[str], rouge: Rouge) -> list[int]:
    """The sentences of `parts` that together are most like a reference, found greedily, in their order.

    One after the other is taken as long as the F1 of unigrams and bigrams grows (Nallapati et al. 2017,
    https://arxiv.org/abs/1611.04230). Of several references the one that is met best. None where no word is shared.
    """
    split = [[ngrams(words, n) for n in (1, 2)] for words in map(rouge.tokenizer.tokenize, parts)]
    best: tuple[float, list[int]] = (0.0, [])
    for reference in references:
        words = rouge.tokenizer.tokenize(reference)
        best = max(best, _greedy(split, [ngrams(words, n) for n in (1, 2)]), key=lambda found: found[0])
    return sorted(best[1])


def _greedy(parts: list[list[Counter]], reference: list[Counter]) -> tuple[float, list[int]]:
    # only what the reference holds too can count
    shared = [
        [Counter({g: c for g, c in own.items() if g in r}) for own, r in zip(part, reference, strict=True)]
        for part in parts
    ]
    sizes = [[own.total() for own in part] for part in parts]
    left = {i for i, part in enumerate(shared) if part[0]}
    have, size, met = [Counter(), Counter()], [0, 0], [0, 0]
    score, chosen = 0.0, []
    while left:
        options = []
        for i in left:
            gains = [
                sum(min(r[g], h[g] + c) - min(r[g], h[g]) for g, c in own.items())
                for own, h, r in zip(shared[i], have, reference, strict=True)
            ]
            f1 = [
                2 * (m + gain) / (s + more + r.total())
                for m, gain, s, more, r in zip(met, gains, size, sizes[i], reference, strict=True)
                if r
            ]
            options.append((sum(f1), -i))
        better, i = max(options)
        if better <= score:
            break
        score, i = better, -i
        left.remove(i)
        chosen.append(i)
        for own, h in zip(shared[i], have, strict=True):
            h.update(own)
        size = [s + more for s, more in zip(size, sizes[i], strict=True)]
        met = [sum(min(r[g], h[g]) for g in r) for h, r in zip(have, reference, strict=True)]
    return score, chosen


def extract(document: str, chosen: Sequence[int]) -> str:
    """The chosen sentences of a document, or turns of a dialogue, as a text."""
    parts = units(document)
    return ("\n" if is_dialogue(document) else " ").join(parts[i] for i in chosen)


def best_count(rouge: Rouge, of_count, references: Sequence[Sequence[str]]) -> int:
    """How many sentences make the best summaries: `of_count(n)` are those of n. Stops where the scores fall again."""
    best, score = 1, -1.0
    for count in range(1, MOST_SENTENCES + 1):
        found = means(rouge(of_count(count), references))["rouge_mean"]
        if found <= score:
            break
        best, score = count, found
    return best


def lead(documents: Sequence[str], count: int) -> list[str]:
    """The first sentences of each document."""
    return [extract(text, range(min(count, len(units(text))))) for text in documents]


def baselines(rouge: Rouge, rows: Dataset, first: int, random: int) -> dict[str, float]:
    """Scores of the `first` sentences, of so many `random` ones, and of the `oracle`, under their names."""
    documents, references = rows["document"][:], rows["references"][:]
    parts = [units(text) for text in documents]
    drawn = []
    for draw in range(DRAWS):
        generator = np.random.default_rng(draw)
        picks = [sorted(generator.permutation(len(p))[:random]) for p in parts]
        drawn.append(rouge([extract(text, pick) for text, pick in zip(documents, picks, strict=True)], references))
    chosen = [oracle(p, r, rouge) for p, r in zip(parts, references, strict=True)]
    best = [extract(text, pick) for text, pick in zip(documents, chosen, strict=True)]
    found = {
        "lead": means(rouge(lead(documents, first), references)),
        "random": means(np.mean(drawn, axis=0)),
        "oracle": means(rouge(best, references)),
    }
    return {f"{name}_{kind}": value for name, values in found.items() for kind, value in values.items()} | {
        "lead_sentences": first,
        "random_sentences": random,
    }


def scores(rouge: Rouge, rows: Dataset, predicted: Sequence[str]) -> dict[str, float]:
    """Means of ROUGE, style of the summaries and of the rows' own; by group too, where the rows have one."""
    documents, references = rows["document"][:], rows["references"][:]
    values = rouge(predicted, references)
    found = means(values) | style(documents, predicted)
    found |= {f"reference_{name}": value for name, value in style(documents, rows["summary"][:]).items()}
    if "group" in rows.column_names:
        groups = np.array(rows["group"][:])
        for name in sorted(set(groups.tolist())):
            own = means(values[groups == name])
            found |= {f"{name}_{kind}": own[kind] for kind in KINDS} | {f"{name}_support": int((groups == name).sum())}
    return found


def score_split(
    rouge: Rouge, rows: Dataset, predicted: Sequence[str], counts: tuple[int, int], other: list[str] | None
) -> dict[str, float]:
    """Return the `scores` of the predictions, those of the `baselines`, and the number of `samples`.

    Args:
        rouge: the scorer.
        rows: the rows of a split.
        predicted: a summary for each row.
        counts: sentences of the lead baseline and of the random one.
        other: predictions of another run to compare with; None for no comparison.
    """
    found = scores(rouge, rows, predicted) | {"samples": len(predicted)} | baselines(rouge, rows, *counts)
    return found if other is None else found | compare(rouge, other, predicted, rows)


def write_split(folder: str, name: str, rouge: Rouge, rows: Dataset, predicted: list[str], more: list[dict]) -> None:
    """Write `predictions_<name>.jsonl`, and `samples_<name>.html` to read: random, worst and best summaries."""
    write_json_lines(Path(folder, f"predictions_{name}.jsonl"), predictions(rows, predicted, more))
    texts = {"document": rows["document"][:], "reference": rows["summary"][:], "hypothesis": predicted}
    of_rows = rouge(predicted, rows["references"][:])[:, :3].mean(1).tolist()
    write_samples(Path(folder, f"samples_{name}.html"), f"Summaries of {name}", texts, of_rows, "ROUGE")


def compare(rouge: Rouge, other: list[str], predicted: list[str], rows: Dataset) -> dict[str, float]:
    """Scores of the `other` summaries, and the chance `p` that the difference to ours in their mean is none."""
    theirs, ours = (rouge(texts, rows["references"][:]) for texts in (other, predicted))
    p = bootstrap_p(theirs[:, :3].mean(1), ours[:, :3].mean(1))
    return {f"compared_{name}": value for name, value in means(theirs).items()} | {"compared_p": p}


def predictions(rows: Dataset, predicted: list[str], more: list[dict]) -> Iterator[dict]:
    """The rows of a split with what was predicted, and what else is to be known of each."""
    for row, text, own in zip(rows, predicted, more, strict=True):
        yield row | {"predicted": text} | own


def print_scores(metrics: dict[str, float], split: str, signature: str) -> None:
    """A line for each baseline, group, and the model."""
    own = {name.removeprefix(f"{split}_"): value for name, value in metrics.items() if name.startswith(f"{split}_")}
    titles = {
        "lead": f"first {own['lead_sentences']}",
        "random": f"random {own['random_sentences']}",
        "oracle": "oracle",
    }
    rows = [
        [title, *(own[f"{name}_{kind}"] for kind in KINDS), "", "", own["samples"]] for name, title in titles.items()
    ]
    rows.append(["references", *[""] * 4, own["reference_novel_2grams"], own["reference_words"], own["samples"]])
    groups = [name.removesuffix("_support") for name in own if name.endswith("_support")]
    rows += [[name, *(own[f"{name}_{kind}"] for kind in KINDS), "", "", own[f"{name}_support"]] for name in groups]
    rows.append(["model", *(own[kind] for kind in KINDS), own["novel_2grams"], own["words"], own["samples"]])
    tell(f"\n{split} scores, {signature}")
    print_table(["summaries", "ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum", "new 2-grams", "words", "number"], rows, 1)
    if own.get("hit_max_length"):
        tell(f"{own['hit_max_length']:.1%} of the outputs were cut off at --max_target_length")
    if "compared_p" in own:
        tell(f"compared to ROUGE mean {own['compared_rouge_mean']:.2f}: paired bootstrap p = {own['compared_p']:.3f}")
