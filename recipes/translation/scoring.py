"""How good translations are: BLEU, chrF and TER of sacreBLEU with their signatures; whether a difference is chance."""

from collections.abc import Iterator

import numpy as np
from datasets import Dataset
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest

from common.errors import tell
from common.languages import two_letters
from common.report import print_table

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


def signatures(bleu: BLEU, predicted: list[str], gold: list[str]) -> dict[str, str]:
    """What has to be said with a score so that it can be compared, by the name of the score."""
    found = {}
    for name, metric in (("bleu", bleu), ("chrf", CHRF()), ("ter", TER())):
        metric.corpus_score(predicted[:1], [gold[:1]])  # the number of references is known only then
        found[name] = str(metric.get_signature())
    return found


def by_group(bleu: BLEU, predicted: list[str], gold: list[str], groups: list[str]) -> dict[str, float]:
    """BLEU, share of exact outputs and number of rows of each group."""
    found = {}
    for name in sorted(set(groups)):
        own = [i for i, group in enumerate(groups) if group == name]
        of_group = scores(bleu, [predicted[i] for i in own], [gold[i] for i in own], fast=True)
        found |= {f"{name}_bleu": of_group["bleu"], f"{name}_exact": of_group["exact"], f"{name}_support": len(own)}
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


def print_scores(metrics: dict[str, float], split: str, signature: str) -> None:
    """A line for the model, its groups, and copying the source."""
    own = {name.removeprefix(f"{split}_"): value for name, value in metrics.items() if name.startswith(f"{split}_")}
    names = [name.removesuffix("_support") for name in own if name.endswith("_support")]
    rows = [[name, own[f"{name}_bleu"], "", "", own[f"{name}_exact"], own[f"{name}_support"]] for name in names]
    rows.append(["all", own["bleu"], own["chrf"], own["ter"], own["exact"], own["samples"]])
    rows.append(
        ["source, copied", own["copy_bleu"], own["copy_chrf"], own["copy_ter"], own["copy_exact"], own["samples"]]
    )
    tell(f"\n{split} scores, {signature}")
    print_table(["rows", "BLEU", "chrF", "TER", "exact", "number"], rows, last=2)
    if own["hit_max_length"]:
        tell(f"{own['hit_max_length']:.1%} of the outputs were cut off at --max_target_length")
    if "compared_bleu" in own:
        tell(f"compared to BLEU {own['compared_bleu']:.2f}: paired bootstrap p = {own['compared_p']:.3f}")
