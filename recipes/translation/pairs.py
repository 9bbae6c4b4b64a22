"""Pairs of sentences from files: parallel lines, objects by language, or columns; checked, and what they look like."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from babel.core import get_global
from datasets import Dataset, DatasetDict

from common.data.corpus import files_of
from common.data.files import NOT_UTF8, Located, Row, numbered_lines, read_file
from common.data.language_codes import two_letters
from common.errors import InputError, tell, warn

#: rows that are looked at to tell whether the languages are swapped
LOOKED_AT = 2000
#: the most frequent words of a language that others do not have among theirs
FREQUENT = {
    "cs": "je na se že si jsem ale jako jsou není byl když které nebo",
    "da": "og det er på som til af jeg ikke med har den hvor også blev",
    "de": "der die und das ist nicht ein eine mit auf dem den sich auch für",
    "en": "the and of is that was with for are this it on you have at",
    "es": "el los las y que del por una con es para como pero más su",
    "fi": "ja on ei että hän oli se mutta joka kun niin myös ovat",
    "fr": "le les et des est dans une que pour pas qui sur vous avec sont",
    "hu": "az és hogy nem egy van volt csak meg már mint még ez",
    "it": "il che di per non una sono del con della più gli anche è",
    "nl": "het een van en is dat niet op te zijn voor met maar ook",
    "pl": "nie się jest że na jak ale dla czy tak był są jego może",
    "pt": "os não que uma para com do da em por mais foi são você ao",
    "ro": "și nu să este care pe cu din pentru mai sunt fost dar această",
    "sv": "och det är som att på inte jag för med har den ett också",
    "tr": "bir ve bu için çok ama daha gibi değil olarak kadar sonra",
}
_WORD = re.compile(r"[^\W\d_]+")
#: what else than groups is scored, by the names of the scores
OTHERS = ("copy", "compared")


def reader(directions: list[tuple[str, str]], targets: dict[str, str]) -> Callable[[str], Iterator[Located]]:
    """Return a reader of rows `{"translation": {source: ..., target: ...}}` in the languages of `directions`.

    Rows without `translation` but with columns named by the languages are read as well. With several pairs a language
    that is null counts as missing: Parquet files hold rows of different languages that way.

    Args:
        directions: pairs of source and target language.
        targets: file of source lines -> file of the target lines. `common.data.files.read_file` reads all others.
    """
    languages = list(dict.fromkeys(name for way in directions for name in way))

    def read(path: str) -> Iterator[Located]:
        if path in targets:
            yield from parallel_lines(path, targets[path], *directions[0])
            return
        for where, row in chain.from_iterable(map(read_file, files_of(path))):
            if isinstance(row, dict):
                found = row.get("translation")
                columns = _those(languages, row)
                if "translation" not in row and len(columns) > 1:
                    row = row | {"translation": columns}
                elif isinstance(found, dict):  # other languages may hold anything
                    kept = _those(languages, found)
                    there = {} if len(kept) > 1 else dict.fromkeys(sorted(set(found) - set(kept)))
                    row = row | {"translation": kept | there}
            yield where, row

    return read


def _those(languages: list[str], row: Row) -> Row:
    return {name: row[name] for name in languages if name in row and (row[name] is not None or len(languages) == 2)}


def parallel_lines(source: str, target: str, source_lang: str, target_lang: str) -> Iterator[Located]:
    """Line n of one file beside line n of the other. Unlike in other text files an empty line is a row, and an error.

    Where one file has more lines that is the only problem told: somewhere above it the lines lost each other.
    """
    counts = [sum(1 for _ in numbered_lines(Path(path))) for path in (source, target)]
    if counts[0] != counts[1]:
        longer, shorter = (source, target) if counts[0] > counts[1] else (target, source)
        lines = f"{longer} has {max(counts):,} lines and {shorter} {min(counts):,}"
        yield f"{longer}:{min(counts) + 1}", f"{lines}, so they are not parallel; align them line by line"
        return
    for (where, one), (other_where, other) in zip_longest(numbered_lines(Path(source)), numbered_lines(Path(target))):
        if one is None or other is None:
            yield (where if one is None else other_where), NOT_UTF8
        else:
            yield (other_where if one.strip() else where), {"translation": {source_lang: one, target_lang: other}}


def check_row(row: Row, directions: list[tuple[str, str]]) -> Iterator[str]:
    """A sentence for each thing that is wrong with a row: a missing language, an empty side, what is no text.

    Of several pairs it needs the languages of one.
    """
    sides = {"source": row.get("source"), "target": row.get("target")}
    if "translation" in row:
        found = row["translation"]
        if not isinstance(found, dict):
            yield f'translation must be an object of texts by language, such as {{"{directions[0][0]}": "...", ...}}'
            return
        whole = [name for way in directions if found.keys() >= set(way) for name in way]
        if not whole:
            missing = [name for name in directions[0] if name not in found]
            lacks = " and ".join(missing) if len(directions) == 1 else f"a side of each of {_named(directions)}"
            yield f"translation lacks {lacks}; languages here: {', '.join(map(str, found)) or 'none'}"
            return
        sides = {name: found[name] for name in whole}
    for name, text in sides.items():
        if not isinstance(text, str):
            yield f"{name} must be a text, not {type(text).__name__}"
        elif not text.strip():
            yield f"{name} is empty: nothing to translate; remove the row"
    if "group" in row and not (isinstance(row["group"], str) and row["group"].strip()):
        yield "the group must be a text that is not blank"
    elif row.get("group") in OTHERS:
        yield f"a group may not be called {row['group']}, under which other scores are reported"


def flatten(data: DatasetDict, directions: list[tuple[str, str]]) -> DatasetDict:
    """Checked rows with their texts in columns `source` and `target` and the name of their `pair`, such as `en-de`.

    A row with the languages of several pairs becomes as many rows. Raises `InputError` where a pair has no training
    row; says how many rows each pair has, and warns of one that is not scored.
    """

    def by_pair(rows: dict[str, list]) -> dict[str, list]:
        found: dict[str, list] = {name: [] for name in (*kept, "source", "target", "pair")}
        for number in range(len(rows["id"])):
            for source, target in directions:
                if "translation" in rows:
                    texts = rows["translation"][number]  # a language that the row has not may be there as None
                    texts = {"source": texts.get(source), "target": texts.get(target)}
                else:
                    texts = {"source": rows["source"][number], "target": rows["target"][number]}
                if None not in texts.values():
                    row = {name: rows[name][number] for name in kept} | texts | {"pair": f"{source}-{target}"}
                    for name, value in row.items():
                        found[name].append(value)
        return found

    kept = [name for name in ("id", "group") if name in data["train"].column_names]
    data = data.map(by_pair, batched=True, remove_columns=data["train"].column_names)
    if len(directions) > 1:
        for name, rows in data.items():
            counts = Counter(rows["pair"])
            tell(f"{name}: " + ", ".join(f"{counts[pair]:,} {pair}" for pair in counts))
            for pair in _named(directions).split(", "):
                if pair not in counts and name == "train":
                    raise InputError(f"--pairs {pair}: no training row has both languages")
                if pair not in counts:
                    warn(f"{name}: no row has both languages of {pair}, which is not scored there")
    return data


def upsampled(pairs: list[str], temperature: float, seed: int) -> np.ndarray:
    """Row numbers of an epoch in which the share of a pair is that of its rows to the power of 1 / `temperature`.

    Arivazhagan et al. 2019, https://arxiv.org/abs/1907.05019, who take 5; 1 leaves each row once, and infinity gives
    all pairs the same share. `pairs` has the pair of each row. The most frequent pair keeps each row once; of the
    others all rows are repeated as often as it takes, and of the rest as many as it takes are drawn by `seed`. The
    numbers are sorted.
    """
    names, number = np.unique(np.asarray(pairs), return_inverse=True)
    counts = np.bincount(number)
    wanted = np.round(counts.max() * (counts / counts.max()) ** (1 / temperature)).astype(int)
    random = np.random.default_rng(seed)
    found = []
    for pair in range(len(names)):
        own = np.flatnonzero(number == pair)
        times, rest = divmod(int(wanted[pair]), len(own))
        found += [np.repeat(own, times), random.choice(own, rest, replace=False)]
    return np.sort(np.concatenate(found))


def select_rows(rows: DatasetDict, pairs: list[str], temperature: float | None, seed: int) -> DatasetDict:
    """Leave out the training rows that were cut, and repeat those of rare pairs (see `upsampled`).

    `pairs` has the pair of each training row.

    Raises:
        InputError: every training row was cut.
    """
    for name, encoded in rows.items():
        if long := sum(encoded["cut"]):
            what = "left out of training" if name == "train" else "cut there"
            tell(f"{name}: {long:,} of {len(encoded):,} rows exceed the greatest lengths and are {what}")
    whole = [i for i, cut in enumerate(rows["train"]["cut"]) if not cut]
    if not whole:
        raise InputError("every training row exceeds --max_source_length or --max_target_length; allow longer ones")
    drawn = upsampled([pairs[i] for i in whole], temperature or 1, seed)
    rows["train"] = rows["train"].select([whole[i] for i in drawn])
    return rows.remove_columns("cut")


def check_splits(data: DatasetDict, directions: list[tuple[str, str]]) -> None:
    """Say how many rows have the same text on either side, and warn where the languages seem swapped."""
    for name, rows in data.items():
        same = sum(a.strip() == b.strip() for a, b in zip(rows["source"], rows["target"], strict=True))
        if same:
            tell(f"{name}: {same:,} of {len(rows):,} rows have the same text on either side")
        pairs = np.asarray(rows["pair"][:])
        for source, target in directions:
            own = np.flatnonzero(pairs == f"{source}-{target}")[:LOOKED_AT]
            reason = swapped(rows.select(own), source, target)
            if reason:
                warn(f"{name}: {source} and {target} seem to be swapped: {reason}")


def _named(directions: list[tuple[str, str]]) -> str:
    return ", ".join(f"{source}-{target}" for source, target in directions)


def swapped(rows: Dataset, source_lang: str, target_lang: str) -> str | None:
    """Why the sides of `rows` seem to be in each other's language; None where nothing speaks for it.

    Languages with scripts of their own are told apart by these, others by their most frequent words, where both are
    among those of `FREQUENT`.
    """
    sides = [" ".join(rows[:LOOKED_AT][side]) for side in ("source", "target")]
    scripts = [_script(language) for language in (source_lang, target_lang)]
    if scripts[0] and scripts[1] and scripts[0] != scripts[1]:
        written = [_written_in(text) for text in sides]
        if written == scripts[::-1]:
            return f"the sources are in {written[0].title()} letters and the targets in {written[1].title()}"
        return None
    source_lang, target_lang = two_letters(source_lang), two_letters(target_lang)
    if source_lang not in FREQUENT or target_lang not in FREQUENT or source_lang == target_lang:
        return None
    own, other = (set(FREQUENT[language].split()) for language in (source_lang, target_lang))
    counts = [Counter(_WORD.findall(text.lower())) for text in sides]
    right = sum(counts[0][w] for w in own - other) + sum(counts[1][w] for w in other - own)
    wrong = sum(counts[0][w] for w in other - own) + sum(counts[1][w] for w in own - other)
    if wrong > 10 and wrong > 3 * right:
        return f"{wrong:,} frequent words of either are on the other's side, and {right:,} on their own"
    return None


#: scripts by the code of the CLDR, in the word that begins the Unicode names of their letters
SCRIPTS = {
    "Latn": "LATIN", "Cyrl": "CYRILLIC", "Grek": "GREEK", "Arab": "ARABIC", "Hebr": "HEBREW", "Deva": "DEVANAGARI",
    "Hans": "CJK", "Hant": "CJK", "Jpan": "HIRAGANA", "Kore": "HANGUL", "Thai": "THAI", "Armn": "ARMENIAN",
    "Geor": "GEORGIAN", "Beng": "BENGALI", "Taml": "TAMIL", "Telu": "TELUGU", "Ethi": "ETHIOPIC",
}  # fmt: skip


def _script(language: str) -> str | None:
    parts = language.replace("-", "_").split("_")
    likely = get_global("likely_subtags").get(parts[0].lower(), "").split("_")
    return next((SCRIPTS[part] for part in [*parts[1:], *likely] if part in SCRIPTS), None)


def _written_in(text: str) -> str | None:
    """The script of most letters of a text; Japanese by its syllables, which no other language has."""
    names = Counter(unicodedata.name(c, "").split(" ")[0] for c in text[:100_000] if c.isalpha())
    names["HIRAGANA"] = 3 * (names["HIRAGANA"] + names.pop("KATAKANA", 0))
    return names.most_common(1)[0][0] if names.total() else None
