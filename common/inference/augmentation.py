"""Augment training rows as `--augment` says: with words, mentions, a masked language model or two translators.

What a masked language model or two translators say of the training texts is computed once, before the first epoch, and
kept in a file of the output folder whose name follows from the texts and the models. The copies of an epoch are drawn
from it.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import regex
from datasets import Dataset, Features, List, Value
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

from common.args import TrainingArguments
from common.data.augment import (
    MENTIONS_CHANGED,
    WORDS_CHANGED,
    Pieces,
    SpanText,
    eda,
    mentions_of,
    replace_mentions,
    synonym,
)
from common.data.augment.arguments import AugmentedDataArguments
from common.data.augment.rows import AugmentedRows
from common.data.augment.words import number_of
from common.data.language_codes import Direction
from common.data.source import Row
from common.data.tokens import encodings
from common.errors import InputError, in_main_process, printable, tell, warn
from common.inference.filling import Filler
from common.inference.predictor import Predictor
from common.inference.translator import Translator, saved_directions
from common.models.load import load_config, resolve_model

#: texts that a model reads between two writes of the file
TEXTS_TOGETHER = 512
#: each word is masked once, together with every `GROUPS`th word: about 15 % of a text, as in the training of the model
GROUPS = 7
#: fills of a mask, and translations there of a text, from which a copy is drawn
FILLS, TRANSLATIONS = 10, 4
#: ends of the names of masked language models
HEADS = ("ForMaskedLM", "ForPreTraining")
#: copies that the message before training counts
COUNTED = 200
_LETTERS = regex.compile(r"[\p{L}\p{M}]+(?:['’-][\p{L}\p{M}]+)*")


class Augmentation(Protocol):
    """Makes a copy of a text from random numbers. `prepare` is called once before, with the texts of all rows."""

    def prepare(self, texts: Iterable[SpanText], folder: Path) -> None: ...

    def __call__(self, text: SpanText, rng: np.random.Generator) -> SpanText: ...


class Words:
    """Change words by `synonym` or `eda`."""

    def __init__(self, change: Callable[[SpanText, float, np.random.Generator], SpanText], share: float):
        self.change, self.share = change, share

    def prepare(self, texts: Iterable[SpanText], folder: Path) -> None:
        """Do nothing."""

    def __call__(self, text: SpanText, rng: np.random.Generator) -> SpanText:
        return self.change(text, self.share, rng)


class Mentions:
    """Replace mentions by others of the training rows with their label."""

    def __init__(self, share: float):
        self.share = share
        self.mentions: dict[str, list[str]] = {}

    def prepare(self, texts: Iterable[SpanText], folder: Path) -> None:
        """Collect the mentions of all texts."""
        self.mentions = mentions_of(texts)

    def __call__(self, text: SpanText, rng: np.random.Generator) -> SpanText:
        return replace_mentions(text, self.mentions, self.share, rng)


class ByModel:
    """An augmentation that draws from what models say of each text.

    Attributes:
        features: types of the columns that `found` returns.
        models: the models, released once all texts are read.
        key: names the weights of the models and the settings, for the name of the file.
    """

    features: ClassVar[Features]
    models: list[Any]
    key: str

    def found(self, texts: list[SpanText]) -> dict[str, list]:
        """Return the columns of `features`, with a row for each text."""
        raise NotImplementedError

    def prepare(self, texts: Iterable[SpanText], folder: Path) -> None:
        """Compute the rows of all different texts, or read them from a file in `folder`."""
        different = list({text.text: text for text in texts}.values())
        digest = hashlib.sha256(self.key.encode())
        for text in different:
            digest.update(repr((text.text, text.words)).encode("utf-8", "surrogatepass"))
        name = digest.hexdigest()[:16]
        file = folder / f"augment-{name}.arrow"

        def compute() -> Dataset:
            return Dataset.from_dict({"number": list(range(len(different)))}).map(
                lambda batch: self.found([different[number] for number in batch["number"]]),
                batched=True,
                batch_size=TEXTS_TOGETHER,
                remove_columns="number",
                features=self.features,
                cache_file_name=str(file),  # has another name until it is complete
                load_from_cache_file=True,
                new_fingerprint=name,
            )

        if not file.exists():
            tell(f"augmentation: the models read {len(different):,} texts; the result is kept in {file}")
        in_main_process(lambda: len(compute()))
        self.table = compute()  # from the file
        self.numbers = {text.text: number for number, text in enumerate(different)}
        self.models = []

    def of(self, text: SpanText) -> Row:
        """Return the row of a text."""
        return self.table[self.numbers[text.text]]


class Contextual(ByModel):
    """Replace words by fills of a masked language model, drawn by their probability.

    Kobayashi 2018, https://arxiv.org/abs/1805.06201, without its condition on the label. Each fill is a whole word
    other than the one in the text, predicted while about 15 % of the words are masked.
    """

    features = Features(
        starts=List(Value("int64")), fills=List(List(Value("string"))), probabilities=List(List(Value("float32")))
    )

    def __init__(self, folder: str, share: float):
        self.share, self.key = share, f"contextual {_hash_of_weights(folder)} {GROUPS} {FILLS}"
        kinds = load_config(resolve_model(folder)).architectures or ["a model without a head"]
        if not any(kind.endswith(HEADS) for kind in kinds):
            raise InputError(
                f"--augment_model {folder}: is {', '.join(kinds)}; name the folder of a masked language model"
            )
        self.models = [Predictor(AutoModelForMaskedLM, HEADS, folder)]
        if self.models[0].tokenizer.mask_token is None:
            raise InputError(f"--augment_model {folder}: its tokenizer has no mask token; name another model")

    def found(self, texts: list[SpanText]) -> dict[str, list]:
        """Return the first character of each word that has fills, the fills, and their probabilities."""
        (model,) = self.models
        tokenizer, mask = model.tokenizer, model.tokenizer.mask_token
        masked: list[str] = []
        places: list[tuple[int, list[tuple[int, str]]]] = []  # text, and the masked words with their first character
        for number, text in enumerate(texts):
            pieces = Pieces(SpanText(text.text, words=text.words)).pieces
            words = [(p.start, p.text) for p in pieces if p.start is not None and _LETTERS.fullmatch(p.text)]
            for group in range(min(GROUPS, len(words)) if mask not in text.text else 0):
                chosen = words[group::GROUPS]
                places.append((number, chosen))
                masked.append(_with_masks(text.text, chosen, mask))
        rows: list[list[tuple[int, list[str], list[float]]]] = [[] for _ in texts]
        fill = Filler(model.model, tokenizer, model.speed, model.max_length)
        for (number, chosen), fills in zip(places, fill(masked, FILLS, bf16=model.bf16), strict=True):
            for (start, word), of_word in zip(chosen, fills, strict=True):
                others = [(fill, p) for fill, p in of_word if p > 0 and _fits(fill, word, tokenizer)]
                if others:
                    rows[number].append((start, [_cased(fill, word) for fill, _ in others], [p for _, p in others]))
        rows = [sorted(row) for row in rows]
        return {name: [[word[i] for word in row] for row in rows] for i, name in enumerate(self.features)}

    def __call__(self, text: SpanText, rng: np.random.Generator) -> SpanText:
        row, pieces = self.of(text), Pieces(text)
        known = {start: number for number, start in enumerate(row["starts"])}
        free = pieces.free()
        chosen = [pieces.pieces[i] for i in free if pieces.pieces[i].start in known]
        for k in rng.permutation(len(chosen))[: number_of(self.share, len(free))]:
            at = known[chosen[k].start]
            weights = np.array(row["probabilities"][at])
            chosen[k].text = row["fills"][at][rng.choice(len(weights), p=weights / weights.sum())]
        return pieces.joined()


class BackTranslation(ByModel):
    """Translate a text there in several ways, and each translation back; draw a copy from the results.

    Sennrich et al. 2016, https://arxiv.org/abs/1511.06709; as augmentation Yu et al. 2018,
    https://arxiv.org/abs/1804.09541.
    """

    features = Features(texts=List(Value("string")))

    def __init__(self, there: str, back: str):
        self.key = f"back {_hash_of_weights(there)} {_hash_of_weights(back)} {TRANSLATIONS}"
        first, second = _there_and_back(there, back)
        self.models = [Translator(there, first, beams=TRANSLATIONS), Translator(back, second)]

    def found(self, texts: list[SpanText]) -> dict[str, list]:
        """Return the different texts that come back, other than the text."""
        there, back = self.models
        translated = there([text.text for text in texts], TRANSLATIONS)
        flat = [option["predicted"] for options in translated for option in options]
        back_again = iter([options[0]["predicted"].strip() for options in back(flat)])
        returned = [list(dict.fromkeys(next(back_again) for _ in options)) for options in translated]
        return {
            "texts": [
                [other for other in others if other and other != text.text.strip()]
                for text, others in zip(texts, returned, strict=True)
            ]
        }

    def __call__(self, text: SpanText, rng: np.random.Generator) -> SpanText:
        others = self.of(text)["texts"]
        return SpanText(others[rng.integers(len(others))]) if others else text


def _there_and_back(there: str, back: str) -> tuple[Direction, Direction]:
    """Return the direction of each of two models; the second is the reverse of the first."""
    directions = saved_directions(there), saved_directions(back)
    fitting = [
        (first, second)
        for first in directions[0]
        for second in directions[1]
        if (first.source_lang, first.target_lang) == (second.target_lang, second.source_lang)
    ]
    if len(fitting) != 1:
        known = " and ".join(", ".join(f"{d.source_lang}-{d.target_lang}" for d in some) for some in directions)
        wrong = "the second must be the reverse of the first" if not fitting else "give a first model of one direction"
        raise InputError(f"--augment_models {there} {back}: translate {known}; {wrong}")
    return fitting[0]


def _with_masks(text: str, words: list[tuple[int, str]], mask: str) -> str:
    """Return a text with the mask in the place of words, given with their first characters."""
    parts, at = [], 0
    for start, word in words:
        parts += [text[at:start], mask]
        at = start + len(word)
    return "".join([*parts, text[at:]])


def _fits(fill: str, word: str, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether a fill is a whole word, not a piece of one, and another than `word`."""
    if not _LETTERS.fullmatch(fill) or fill.lower() == word.lower():
        return False
    (encoding,) = encodings(tokenizer, [f" {fill}"])
    return len(encoding.ids) == 1


def _cased(fill: str, word: str) -> str:
    """Return a fill in the letter case of a word, if the word has capitals."""
    if len(word) > 1 and word.isupper():
        return fill.upper()
    return fill[:1].upper() + fill[1:] if word[:1].isupper() else fill


def _hash_of_weights(folder: str) -> str:
    """Return a hash of the weights and the configuration of a model."""
    digest = hashlib.sha256()
    path = Path(resolve_model(folder))
    for file in sorted(file for ending in ("safetensors", "json") for file in path.rglob(f"*.{ending}")):
        if "checkpoint-" not in str(file.relative_to(path)):
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def augmented(
    windows: Dataset,
    rows: Dataset,
    row_of: Sequence[int],
    encode: Callable[[dict[str, list]], dict[str, list]],
    texts_of: Callable[[Row], list[SpanText]],
    with_texts: Callable[[Row, list[SpanText]], Row],
    data_args: AugmentedDataArguments,
    args: TrainingArguments,
) -> Dataset | AugmentedRows:
    """Return the training set: `windows`, with augmented copies under `--augment`.

    Args:
        windows: the encoded rows, one or more windows a row.
        rows: the rows before encoding.
        row_of: number of the row of each window.
        encode: encodes a batch of rows; returns the columns of `windows`.
        texts_of: returns the texts of a row that may change, with the spans that carry its labels.
        with_texts: returns a row with other texts, and its labels by their spans.
        data_args: the arguments of augmentation.
        args: seed and output folder.

    Raises:
        InputError: a model of the augmentation cannot be loaded, or does not fit.
    """
    if data_args.augment is None:
        return windows
    augmentation = _chosen(data_args)

    def augment(row: Row, rng: np.random.Generator) -> Row:
        return with_texts(row, [augmentation(text, rng) for text in texts_of(row)])

    def encode_row(row: Row) -> dict[str, list]:
        return encode({name: [value] for name, value in row.items()})

    def prepare() -> None:
        augmentation.prepare((text for row in rows for text in texts_of(row)), args.folder)
        _report(result, texts_of, data_args)

    later = isinstance(augmentation, ByModel)  # writes into the output folder
    result = AugmentedRows(
        windows, row_of, rows, augment, encode_row, args.seed, data_args.augment_copies, prepare if later else None
    )
    if not later:
        prepare()
    return result


def _chosen(args: AugmentedDataArguments) -> Augmentation:
    """Return the augmentation that the arguments name."""
    words = args.augment_share or WORDS_CHANGED
    if args.augment == "mention":
        return Mentions(args.augment_share or MENTIONS_CHANGED)
    if args.augment == "contextual":
        assert args.augment_model is not None  # `__post_init__` asks for it
        return Contextual(args.augment_model, words)
    if args.augment == "back_translation":
        assert args.augment_models is not None  # `__post_init__` asks for it
        return BackTranslation(*args.augment_models)
    return Words(synonym if args.augment == "synonym" else eda, words)


def _report(rows: AugmentedRows, texts_of: Callable[[Row], list[SpanText]], args: AugmentedDataArguments) -> None:
    """Print how many of the first copies differ from their row, and one of them."""
    counted, changed = min(COUNTED, len(rows.rows)), []
    for number in range(counted):
        before, after = texts_of(rows.rows[number]), texts_of(rows.copy_of(number, 1))
        changed += [(a.text, b.text) for a, b in zip(before, after, strict=True) if a.text != b.text][:1]
    each = "copy" if args.augment_copies == 1 else "copies"
    tell(
        f"--augment {args.augment}: {args.augment_copies} augmented {each} of each training row in an epoch "
        f"({len(rows.rows):,} rows); {len(changed)} of the first {counted} copies differ from their row"
    )
    if not changed:
        warn(f"--augment {args.augment}: changes none of the first {counted} rows; leave it out")
        return
    row, copy = changed[0]
    at = next((i for i, (a, b) in enumerate(zip(row, copy, strict=False)) if a != b), 0)
    for name, text in (("row: ", row), ("copy:", copy)):
        tell(f"  {name} {printable(text[max(0, at - 40) : at + 60])}")
