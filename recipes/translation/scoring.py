"""Score translations: BLEU, chrF and TER of sacreBLEU with their signatures, and a test of significance."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from sacrebleu.metrics import BLEU, CHRF, TER

from common.args import TrainingArguments
from common.data.domains import by_domain
from common.data.language_codes import two_letters
from common.errors import tell
from common.run.report import print_table, rows_named, write_json_lines, write_samples
from common.run.significance import bootstrap_p

#: scores of evaluations during training
SCORES = ("bleu", "chrf", "exact", "length_ratio")
#: sacreBLEU tokenizers of languages without spaces between words
TOKENIZERS = {
    "zh": "zh",
    "yue": "zh",
    "ja": "char",
    "th": "char",
    "lo": "char",
    "km": "char",
    "my": "char",
    "ko": "char",
}
TOKENIZE = ("13a", "intl", "zh", "char", "none")


def bleu_of(target_lang: str, tokenize: str) -> BLEU:
    """Return the cased BLEU of sacreBLEU (Papineni et al. 2002, https://aclanthology.org/P02-1040)."""
    return BLEU(tokenize=TOKENIZERS.get(two_letters(target_lang), "13a") if tokenize == "auto" else tokenize)


def scores(bleu: BLEU, predicted: list[str], gold: list[str], fast: bool = False) -> dict[str, float]:
    """Compute corpus scores: `bleu`, `chrf`, `ter`, `exact` and `length_ratio`.

    BLEU and chrF range from 0 to 100; TER can exceed 100. `exact` is the share of texts equal to the reference.
    `length_ratio` is the number of predicted characters divided by the number of reference characters. `fast` leaves
    TER out, which takes seconds.
    Sources: sacreBLEU, Post 2018, https://aclanthology.org/W18-6319; chrF, Popović 2015,
    https://aclanthology.org/W15-3049; TER, Snover et al. 2006, https://aclanthology.org/2006.amta-papers.25.
    """
    predicted = [" ".join(text.split()) for text in predicted]
    result = {
        "bleu": bleu.corpus_score(predicted, [gold]).score,
        "chrf": CHRF().corpus_score(predicted, [gold]).score,
        "exact": float(np.mean([a == " ".join(b.split()) for a, b in zip(predicted, gold, strict=True)])),
        "length_ratio": sum(map(len, predicted)) / sum(map(len, gold)),
    }
    return result if fast else result | {"ter": TER().corpus_score(predicted, [gold]).score}


def sentence_scores(predicted: list[str], gold: list[str]) -> list[float]:
    """Return the chrF of each row, from 0 to 100; BLEU is not meaningful for single sentences."""
    chrf = CHRF()
    return [chrf.sentence_score(" ".join(a.split()), [b]).score for a, b in zip(predicted, gold, strict=True)]


class Scorer:
    """Score rows of the language pairs `directions`.

    `tokenize` selects the tokenizer of BLEU (see `bleu_of`), and `args` the score of domains.
    """

    def __init__(self, directions: list[tuple[str, str]], tokenize: str, args: TrainingArguments):
        self.args = args
        self.bleus = {f"{source}-{target}": bleu_of(target, tokenize) for source, target in directions}

    def __call__(self, rows: Dataset, predicted: list[str], ended: list[bool], fast: bool = False) -> dict[str, float]:
        """Score predictions with `by_pair`, and copied sources as a baseline (`copy_...`).

        Args:
            rows: columns `source`, `target`, `pair` and optionally `group`.
            predicted: the translation of each row.
            ended: whether each output ended before the maximum length; `hit_max_length` is the share that did not.
            fast: return only the means of `SCORES`, also by domain, and `hit_max_length`.
        """
        gold, pairs = rows["target"][:], rows["pair"][:]
        cut = {"hit_max_length": ended.count(False) / len(ended)}
        columns = predicted, gold, pairs
        means = by_domain(rows, lambda select: by_pair(self.bleus, *map(select, columns), fast=True), self.args)
        if fast:
            return means | cut
        groups = rows["group"][:] if "group" in rows.column_names else None
        copied = by_pair(self.bleus, rows["source"][:], gold, pairs)
        result = means | by_pair(self.bleus, predicted, gold, pairs, groups)
        return result | {f"copy_{name}": value for name, value in copied.items()} | cut | {"samples": len(ended)}

    def compare(self, rows: Dataset, other: list[str], predicted: list[str]) -> dict[str, float]:
        """Compare rows of one pair with the predictions of another run (see `compare`)."""
        (bleu,) = self.bleus.values()
        return compare(bleu, other, predicted, rows["target"][:])

    def signatures(self) -> dict[str, str]:
        """Return the sacreBLEU signature of each score; compare only scores with the same signature."""
        signatures = {}
        for name, metric in (*self._named(), ("chrf", CHRF()), ("ter", TER())):
            metric.corpus_score(["a"], [["a"]])  # sets the number of references in the signature
            signatures[name] = str(metric.get_signature())
        return signatures

    def _named(self) -> list[tuple[str, BLEU]]:
        bleus = list(self.bleus.items())
        return [("bleu", bleus[0][1]), *((f"bleu {pair}", bleu) for pair, bleu in bleus[1:])]


def by_pair(
    bleus: dict[str, BLEU],
    predicted: list[str],
    gold: list[str],
    pairs: list[str],
    groups: list[str] | None = None,
    fast: bool = False,
) -> dict[str, float]:
    """Compute the mean of each score over the pairs, and BLEU, chrF and exact of each pair and group.

    Args:
        bleus: the BLEU metric of each pair.
        predicted: the translation of each row.
        gold: the reference of each row.
        pairs: the pair of each row.
        groups: the group of each row; None for no groups.
        fast: leave TER out.

    Returns:
        The scores by name. A pair or group also has `NAME_support`, its number of rows.
    """
    of_pair = {}
    for name in dict.fromkeys(pairs):
        rows = [i for i, pair in enumerate(pairs) if pair == name]
        of_pair[name] = scores(bleus[name], [predicted[i] for i in rows], [gold[i] for i in rows], fast)
    names = next(iter(of_pair.values()))
    result = {name: float(np.mean([of[name] for of in of_pair.values()])) for name in names}
    parts = {pair: (pair, pairs) for pair in of_pair} if len(of_pair) > 1 else {}
    if groups is not None:
        both = groups if len(of_pair) == 1 else [f"{pair} {group}" for pair, group in zip(pairs, groups, strict=True)]
        parts |= {name: (pairs[both.index(name)], both) for name in sorted(set(both))}
    for name, (pair, labels) in parts.items():
        rows = [i for i, label in enumerate(labels) if label == name]
        part = scores(bleus[pair], [predicted[i] for i in rows], [gold[i] for i in rows], fast=True)
        result |= {f"{name}_{score}": part[score] for score in ("bleu", "chrf", "exact")}
        result[f"{name}_support"] = len(rows)
    return result


def compare(bleu: BLEU, other: list[str], predicted: list[str], gold: list[str]) -> dict[str, float]:
    """Compute the BLEU of `other`, and the p-value of its difference from `predicted` (see `bootstrap_p`)."""
    other, predicted = ([" ".join(text.split()) for text in texts] for texts in (other, predicted))
    counts = (bleu_counts(bleu, texts, gold) for texts in (other, predicted))
    p = bootstrap_p(*counts, score=partial(bleu_of_counts, bleu))
    return {"compared_bleu": bleu.corpus_score(other, [gold]).score, "compared_p": p}


def bleu_counts(bleu: BLEU, predicted: list[str], gold: list[str]) -> np.ndarray:
    """Return the statistics of each row, (rows, 10): matches and n-grams of each order, both lengths."""
    scored = [bleu.corpus_score([text], [[reference]]) for text, reference in zip(predicted, gold, strict=True)]
    return np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in scored])


def bleu_of_counts(bleu: BLEU, counts: np.ndarray) -> float:
    """Return the corpus BLEU of rows of `bleu_counts`."""
    sums = counts.sum(0).tolist()
    return BLEU.compute_bleu(sums[:4], sums[4:8], *sums[8:], smooth_method=bleu.smooth_method).score


def predictions(rows: Dataset, predicted: list[str], whole: list[bool]) -> Iterator[dict]:
    """Yield the rows of a split with `predicted` and `ended`."""
    for row, text, ended in zip(rows, predicted, whole, strict=True):
        yield row | {"predicted": text, "ended": ended}


def write_split(folder: str, name: str, rows: Dataset, predicted: list[str], ended: list[bool]) -> None:
    """Write `predictions_<name>.jsonl`, and `samples_<name>.html` with random, worst and best translations."""
    write_json_lines(Path(folder, f"predictions_{name}.jsonl"), predictions(rows, predicted, ended))
    texts = {"source": rows["source"][:], "reference": rows["target"][:], "hypothesis": predicted}
    page = Path(folder, f"samples_{name}.html")
    write_samples(page, f"Translations of {name}", texts, sentence_scores(predicted, texts["reference"]), "chrF")


def print_scores(metrics: dict[str, float], split: str, signature: str) -> None:
    """Print a table with a line for each pair or group, for all rows, and for copied sources."""
    values = {name.removeprefix(f"{split}_"): value for name, value in metrics.items() if name.startswith(f"{split}_")}
    names = [name.removesuffix("_support") for name in values if name.endswith("_support")]
    names = [name for name in names if not name.startswith("copy_")]
    rows = [
        [name, values[f"{name}_bleu"], values[f"{name}_chrf"], "", values[f"{name}_exact"], values[f"{name}_support"]]
        for name in names
    ]
    pairs = {name for name in names if f"copy_{name}_bleu" in values}
    columns = ("bleu", "chrf", "ter", "exact")
    rows.append(["mean of the pairs" if pairs else "all", *(values[name] for name in columns), values["samples"]])
    rows.append(["source, copied", *(values[f"copy_{name}"] for name in columns), values["samples"]])
    tell(f"\n{rows_named(split)} scores, {signature}")
    print_table(["rows", "BLEU", "chrF", "TER", "exact", "number"], rows, last=2)
    if values["hit_max_length"]:
        tell(f"{values['hit_max_length']:.1%} of the outputs are cut off at --max_target_length")
    if "compared_bleu" in values:
        tell(f"compared to BLEU {values['compared_bleu']:.2f}: paired bootstrap p = {values['compared_p']:.3f}")
