"""How good translations are: BLEU, chrF and TER of sacreBLEU with their signatures; whether a difference is chance."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest

from common.data.language_codes import two_letters
from common.errors import tell
from common.run.report import print_table, write_json_lines, write_samples

#: of evaluations during training
SCORES = ("bleu", "chrf", "exact", "length_ratio")
RESAMPLES = 1000
#: what BLEU counts where words are not separated by blanks
TOKENIZERS = {"zh": "zh", "ja": "char", "th": "char", "lo": "char", "km": "char", "my": "char", "ko": "char"}
TOKENIZE = ("13a", "intl", "zh", "char", "none")


def bleu_of(target_lang: str, tokenize: str) -> BLEU:
    """BLEU (Papineni et al. 2002, https://aclanthology.org/P02-1040) as sacreBLEU counts it, cased."""
    return BLEU(tokenize=TOKENIZERS.get(two_letters(target_lang), "13a") if tokenize == "auto" else tokenize)


def scores(bleu: BLEU, predicted: list[str], gold: list[str], fast: bool = False) -> dict[str, float]:
    """`bleu`, `chrf`, `ter` (from 0 to 100, TER above it too), `exact` and `length_ratio`, over the corpus.

    sacreBLEU: Post 2018, https://aclanthology.org/W18-6319; chrF: Popović 2015, https://aclanthology.org/W15-3049; TER:
    Snover et al. 2006, https://aclanthology.org/2006.amta-papers.25. `exact` is the share of texts that are the
    reference to the letter; `length_ratio` is characters to those of the references. Without TER if `fast`, since it
    takes seconds.
    """
    predicted = [" ".join(text.split()) for text in predicted]
    found = {
        "bleu": bleu.corpus_score(predicted, [gold]).score,
        "chrf": CHRF().corpus_score(predicted, [gold]).score,
        "exact": float(np.mean([a == " ".join(b.split()) for a, b in zip(predicted, gold, strict=True)])),
        "length_ratio": sum(map(len, predicted)) / sum(map(len, gold)),
    }
    return found if fast else found | {"ter": TER().corpus_score(predicted, [gold]).score}


def sentence_scores(predicted: list[str], gold: list[str]) -> list[float]:
    """chrF of each row, from 0 to 100, which says more of a single sentence than BLEU does."""
    chrf = CHRF()
    return [chrf.sentence_score(" ".join(a.split()), [b]).score for a, b in zip(predicted, gold, strict=True)]


class Scorer:
    """Scores of rows of the language pairs `directions`, each by the BLEU that `tokenize` names (see `bleu_of`)."""

    def __init__(self, directions: list[tuple[str, str]], tokenize: str):
        self.bleus = {f"{source}-{target}": bleu_of(target, tokenize) for source, target in directions}

    def __call__(self, rows: Dataset, predicted: list[str], ended: list[bool], fast: bool = False) -> dict[str, float]:
        """What `by_pair` says of `predicted`, and of the sources, copied; the share that was cut off; the number.

        `rows` have `source`, `target`, `pair`, and perhaps `group`; `ended` says which outputs came to their end. If
        `fast`, the mean of `SCORES` and the share that was cut off alone.
        """
        gold, pairs = rows["target"][:], rows["pair"][:]
        cut = {"hit_max_length": ended.count(False) / len(ended)}
        if fast:
            return by_pair(self.bleus, predicted, gold, pairs, fast=True) | cut
        groups = rows["group"][:] if "group" in rows.column_names else None
        copied = by_pair(self.bleus, rows["source"][:], gold, pairs)
        found = by_pair(self.bleus, predicted, gold, pairs, groups)
        return found | {f"copy_{name}": value for name, value in copied.items()} | cut | {"samples": len(ended)}

    def compare(self, rows: Dataset, other: list[str], predicted: list[str]) -> dict[str, float]:
        """`compare` of rows of one pair."""
        (bleu,) = self.bleus.values()
        return compare(bleu, other, predicted, rows["target"][:])

    def signatures(self) -> dict[str, str]:
        """What has to be said with a score so that it can be compared, by the name of the score."""
        found = {}
        for name, metric in (*self._named(), ("chrf", CHRF()), ("ter", TER())):
            metric.corpus_score(["a"], [["a"]])  # the number of references is known only then
            found[name] = str(metric.get_signature())
        return found

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
    """The scores of one pair; of several the mean of each score over the pairs, and BLEU, chrF and exact of each.

    `bleus` has the BLEU of each pair, `pairs` that of each row. With `groups`, that of each row, those of each group of
    rows too. What is scored for itself has the number of its rows as `support`.
    """
    of_pair = {}
    for name in dict.fromkeys(pairs):
        own = [i for i, pair in enumerate(pairs) if pair == name]
        of_pair[name] = scores(bleus[name], [predicted[i] for i in own], [gold[i] for i in own], fast)
    names = next(iter(of_pair.values()))
    found = {name: float(np.mean([of[name] for of in of_pair.values()])) for name in names}
    parts = {pair: (pair, pairs) for pair in of_pair} if len(of_pair) > 1 else {}
    if groups is not None:
        both = groups if len(of_pair) == 1 else [f"{pair} {group}" for pair, group in zip(pairs, groups, strict=True)]
        parts |= {name: (pairs[both.index(name)], both) for name in sorted(set(both))}
    for name, (pair, labels) in parts.items():
        own = [i for i, label in enumerate(labels) if label == name]
        part = scores(bleus[pair], [predicted[i] for i in own], [gold[i] for i in own], fast=True)
        found |= {f"{name}_{score}": part[score] for score in ("bleu", "chrf", "exact")} | {f"{name}_support": len(own)}
    return found


def compare(bleu: BLEU, other: list[str], predicted: list[str], gold: list[str]) -> dict[str, float]:
    """BLEU of the `other` predictions, and the chance `p` that the difference to ours is none.

    Paired bootstrap over `RESAMPLES` samples of the test rows (Koehn 2004, https://aclanthology.org/W04-3250).
    """
    other, predicted = ([" ".join(text.split()) for text in texts] for texts in (other, predicted))
    if other == predicted:  # of which sacreBLEU says that the difference, none, is no chance
        return {"compared_bleu": bleu.corpus_score(other, [gold]).score, "compared_p": 1.0}
    systems = [("theirs", other), ("ours", predicted)]
    _, results = PairedTest(systems, {"BLEU": bleu}, [gold], test_type="bs", n_samples=RESAMPLES)()
    theirs, ours = results["BLEU"]
    return {"compared_bleu": theirs.score, "compared_p": ours.p_value}


def predictions(rows: Dataset, predicted: list[str], whole: list[bool]) -> Iterator[dict]:
    """The rows of a split with what was predicted, and whether the output came to its end."""
    for row, text, ended in zip(rows, predicted, whole, strict=True):
        yield row | {"predicted": text, "ended": ended}


def write_split(folder: str, name: str, rows: Dataset, predicted: list[str], ended: list[bool]) -> None:
    """Write `predictions_<name>.jsonl`, and `samples_<name>.html` to read: random, worst and best translations."""
    write_json_lines(Path(folder, f"predictions_{name}.jsonl"), predictions(rows, predicted, ended))
    texts = {"source": rows["source"][:], "reference": rows["target"][:], "hypothesis": predicted}
    page = Path(folder, f"samples_{name}.html")
    write_samples(page, f"Translations of {name}", texts, sentence_scores(predicted, texts["reference"]), "chrF")


def print_scores(metrics: dict[str, float], split: str, signature: str) -> None:
    """A line for the model, its groups, and copying the source."""
    own = {name.removeprefix(f"{split}_"): value for name, value in metrics.items() if name.startswith(f"{split}_")}
    names = [name.removesuffix("_support") for name in own if name.endswith("_support")]
    names = [name for name in names if not name.startswith("copy_")]
    rows = [
        [name, own[f"{name}_bleu"], own[f"{name}_chrf"], "", own[f"{name}_exact"], own[f"{name}_support"]]
        for name in names
    ]
    pairs = {name for name in names if f"copy_{name}_bleu" in own}
    rows.append(
        ["mean of the pairs" if pairs else "all", own["bleu"], own["chrf"], own["ter"], own["exact"], own["samples"]]
    )
    rows.append(
        ["source, copied", own["copy_bleu"], own["copy_chrf"], own["copy_ter"], own["copy_exact"], own["samples"]]
    )
    tell(f"\n{split} scores, {signature}")
    print_table(["rows", "BLEU", "chrF", "TER", "exact", "number"], rows, last=2)
    if own["hit_max_length"]:
        tell(f"{own['hit_max_length']:.1%} of the outputs were cut off at --max_target_length")
    if "compared_bleu" in own:
        tell(f"compared to BLEU {own['compared_bleu']:.2f}: paired bootstrap p = {own['compared_p']:.3f}")
