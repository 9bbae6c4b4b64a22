"""Read and check pairs of sentences from parallel lines, objects by language, or columns."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from babel.core import get_global
from datasets import Dataset, DatasetDict

from common.args import FileArguments
from common.data.corpus import files_of
from common.data.domains import DOMAIN, OLD
from common.data.files import READERS, TABLES, Readers, read_file, read_text
from common.data.json_files import parse_cell
from common.data.language_codes import two_letters
from common.data.source import Located, Row, Source
from common.data.words import words
from common.errors import InputError, brief, tell, warn

#: rows that `swapped` reads
ROWS_READ = 2000
#: frequent words that distinguish a language from the others
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
#: prefixes of other scores, which no group may use
OTHERS = ("copy", "compared")


def reader(
    directions: list[tuple[str, str]], targets: dict[str, str], args: FileArguments | None = None
) -> Callable[[str], Iterator[Located]]:
    """Return a reader of rows `{"translation": {source: ..., target: ...}}` in the languages of `directions`.

    The reader also accepts rows with one column for each language. With several pairs, a null language counts as
    missing, because Parquet stores absent languages as nulls.

    Args:
        directions: pairs of source and target language.
        targets: file of source lines -> file of target lines. `common.data.files.read_file` reads all other files.
        args: how to read the files; the defaults if None.
    """
    languages = list(dict.fromkeys(name for direction in directions for name in direction))
    readers = line_readers(languages)

    def read(path: str) -> Iterator[Located]:
        if path in targets:
            yield from parallel_lines(path, targets[path], *directions[0], args=args)
            return
        lines = Source(Path(path)).ending not in TABLES  # the source of each row
        for where, row in chain.from_iterable(read_file(file, readers, args) for file in files_of(path)):
            if isinstance(row, dict) and lines and len(directions) == 1:
                row = {"translation": {directions[0][0]: row["text"]}}
            if isinstance(row, dict):
                row = with_object(row)
                translation = row.get("translation")
                columns = _texts_in(languages, row)
                one_pair = len(directions) == 1 and directions[0][0] in columns
                if "translation" not in row and (len(columns) > 1 or one_pair):
                    row = row | {"translation": columns}
                elif isinstance(translation, dict):  # drop the values of other languages, which may have any type
                    kept = _texts_in(languages, translation)
                    others = {} if len(kept) > 1 else dict.fromkeys(sorted(set(translation) - set(kept)))
                    row = row | {"translation": kept | others}
            yield where, row

    return read


def line_readers(languages: list[str]) -> Readers:
    """Return the readers of all formats, and of files of lines that end in a language, such as `.en`, or in `.src`."""
    endings = {f".{name.lower()}" for language in languages for name in (language, two_letters(language))}
    return dict.fromkeys((*endings, ".src", ".source"), read_text) | READERS


def with_object(row: Row) -> Row:
    """Return a row with the object in `translation`, which a cell of a table holds as JSON or as Python writes it."""
    cell = row.get("translation")
    if not isinstance(cell, str) or not cell.lstrip().startswith("{"):
        return row
    try:
        return row | {"translation": parse_cell(cell)}
    except ValueError:
        return row


def _texts_in(languages: list[str], row: Row) -> Row:
    return {name: row[name] for name in languages if name in row and (row[name] is not None or len(languages) == 2)}


def parallel_lines(
    source: str, target: str, source_lang: str, target_lang: str, args: FileArguments | None = None
) -> Iterator[Located]:
    """Pair line n of `source` with line n of `target`; an empty line is an error.

    If one file has more lines, the reader reports only that problem, as the pairs above it may be wrong too.
    """
    one, other = (Source(Path(path), args or FileArguments()) for path in (source, target))
    counts = [sum(1 for _ in side.lines()) for side in (one, other)]
    for problem in (line for side in (one, other) for line in side.lines() if line.problem):
        yield problem.where, problem.problem
        return
    if counts[0] != counts[1]:
        longer, shorter = (source, target) if counts[0] > counts[1] else (target, source)
        lines = f"{longer} has {max(counts):,} lines and {shorter} {min(counts):,}"
        yield f"{longer}:{min(counts) + 1}", f"{lines}: the files are not parallel; align them line by line"
        return
    for a, b in zip(one.lines(), other.lines(), strict=True):
        yield (b.where if a.text.strip() else a.where), {"translation": {source_lang: a.text, target_lang: b.text}}


def check_row(row: Row, directions: list[tuple[str, str]]) -> Iterator[str]:
    """Yield a message for each problem in a row: a missing language, an empty side, or a side that is not a string.

    With several pairs, a row needs the languages of one pair.
    """
    sides = {"source": row.get("source"), "target": row.get("target")}
    if "translation" in row:
        texts = row["translation"]
        if not isinstance(texts, dict):
            yield f'translation must be an object of texts by language, such as {{"{directions[0][0]}": "...", ...}}'
            return
        whole = [name for direction in directions if texts.keys() >= set(direction) for name in direction]
        if not whole:
            missing = [name for name in directions[0] if name not in texts]
            lacks = " and ".join(missing) if len(directions) == 1 else f"both languages of any of {_named(directions)}"
            yield f"translation lacks {lacks}; languages here: {', '.join(map(str, texts)) or 'none'}"
            return
        sides = {name: texts[name] for name in whole}
    for name, text in sides.items():
        if not isinstance(text, str):
            yield f"{name} must be a string, not {type(text).__name__}"
        elif not text.strip():
            yield f"{name} is empty; remove the row"
    if "group" in row and not (isinstance(row["group"], str) and row["group"].strip()):
        yield "the group must be a string that is not blank; name a group or remove the row"
    elif row.get("group") in OTHERS:
        yield f"the group name {row['group']} is reserved for other scores; rename the group"


def source_of(row: Row, language_pair: tuple[str, str]) -> Any:
    """Return the source text of a row."""
    texts = row["translation"] if "translation" in row else {language_pair[0]: row["source"]}
    return texts.get(language_pair[0]) if isinstance(texts, dict) else None


def first_source(row: Row, directions: list[tuple[str, str]]) -> str:
    """Return the source text of a checked row in the first direction that it has."""
    if "source" in row:
        return row["source"]
    texts = row["translation"]
    return next(texts[source] for source, target in directions if texts.keys() >= {source, target})


def lacks_target(row: Row, language_pair: tuple[str, str]) -> bool:
    """Return whether a row has a source text and no target, or a blank one."""
    if "translation" not in row:
        target = row["target"]
    elif isinstance(row["translation"], dict) and row["translation"].keys() <= set(language_pair):
        target = row["translation"].get(language_pair[1])
    else:  # other languages: the names of the languages may be wrong
        return False
    return source_of(row, language_pair) is not None and (
        target is None or (isinstance(target, str) and not target.strip())
    )


def check_source(row: Row, language_pair: tuple[str, str]) -> Iterator[str]:
    """Yield a message if the source of a row is no text, or blank."""
    source = source_of(row, language_pair)
    if not isinstance(source, str) or not source.strip():
        yield f"the source is {brief(source)}; needed: a text that is not blank"


def in_columns(row: Row, language_pair: tuple[str, str]) -> Row:
    """Return a checked row of one pair with its texts in columns `source` and `target`."""
    if "translation" not in row:
        return row
    texts = dict(zip(("source", "target"), map(row["translation"].get, language_pair), strict=True))
    return {name: value for name, value in row.items() if name != "translation"} | texts


def flatten(data: DatasetDict, directions: list[tuple[str, str]]) -> DatasetDict:
    """Convert checked rows to columns `source`, `target` and `pair` (such as `en-de`).

    A row with the languages of several pairs becomes one row for each pair. Prints the number of rows of each pair,
    and warns if a pair has no row to score.

    Raises:
        InputError: a pair has no training row.
    """

    def by_pair(rows: dict[str, list]) -> dict[str, list]:
        flat: dict[str, list] = {name: [] for name in (*kept, "source", "target", "pair")}
        for number in range(len(rows["id"])):
            for source, target in directions:
                if "translation" in rows:
                    texts = rows["translation"][number]  # a missing language may be stored as None
                    texts = {"source": texts.get(source), "target": texts.get(target)}
                else:
                    texts = {"source": rows["source"][number], "target": rows["target"][number]}
                if None not in texts.values():
                    row = {name: rows[name][number] for name in kept} | texts | {"pair": f"{source}-{target}"}
                    for name, value in row.items():
                        flat[name].append(value)
        return flat

    kept = [name for name in ("id", "group", DOMAIN, OLD) if name in data["train"].column_names]
    data = data.map(by_pair, batched=True, remove_columns=data["train"].column_names)
    if len(directions) > 1:
        for name, rows in data.items():
            counts = Counter(rows["pair"])
            tell(f"{name}: " + ", ".join(f"{counts[pair]:,} {pair}" for pair in counts))
            for pair in _named(directions).split(", "):
                if pair not in counts and name == "train":
                    raise InputError(f"--pairs {pair}: no training row has both languages; add rows or remove the pair")
                if pair not in counts:
                    warn(f"{name}: no row has both languages of {pair}; this split has no scores of {pair}")
    return data


def upsampled(pairs: list[str], temperature: float, seed: int) -> np.ndarray:
    """Return the sorted row numbers of an epoch with temperature sampling over the pairs.

    The share of a pair is proportional to its number of rows to the power of 1 / `temperature`. At 1 each row occurs
    once; at infinity all pairs have the same share. The most frequent pair keeps each row once. Rows of other pairs
    are repeated; a random subset occurs once more.
    Source: Arivazhagan et al. 2019, https://arxiv.org/abs/1907.05019, with temperature 5.

    Args:
        pairs: the pair of each row.
        temperature: at least 1.
        seed: seed of the random subset.
    """
    names, number = np.unique(np.asarray(pairs), return_inverse=True)
    counts = np.bincount(number)
    wanted = np.round(counts.max() * (counts / counts.max()) ** (1 / temperature)).astype(int)
    rng = np.random.default_rng(seed)
    parts = []
    for pair in range(len(names)):
        of_pair = np.flatnonzero(number == pair)
        times, rest = divmod(int(wanted[pair]), len(of_pair))
        parts += [np.repeat(of_pair, times), rng.choice(of_pair, rest, replace=False)]
    return np.sort(np.concatenate(parts))


def select_rows(rows: DatasetDict, pairs: list[str], temperature: float | None, seed: int) -> DatasetDict:
    """Remove the training rows that were cut, and repeat rows of rare pairs (see `upsampled`).

    `pairs` has the pair of each training row.

    Raises:
        InputError: every training row was cut.
    """
    for name, encoded in rows.items():
        if long := sum(encoded["cut"]):
            action = "are not used for training" if name == "train" else "are cut"
            limits = "--max_source_length or --max_target_length"
            tell(f"{name}: {long:,} of {len(encoded):,} rows exceed {limits} and {action}")
    whole = [i for i, cut in enumerate(rows["train"]["cut"]) if not cut]
    if not whole:
        raise InputError("every training row exceeds --max_source_length or --max_target_length; raise these limits")
    sampled = upsampled([pairs[i] for i in whole], temperature or 1, seed)
    rows["train"] = rows["train"].select([whole[i] for i in sampled])
    return rows.remove_columns("cut")


def check_splits(data: DatasetDict, directions: list[tuple[str, str]]) -> None:
    """Print the number of rows with identical sides, and warn if the languages seem swapped."""
    for name, rows in data.items():
        same = sum(a.strip() == b.strip() for a, b in zip(rows["source"], rows["target"], strict=True))
        if same:
            tell(f"{name}: {same:,} of {len(rows):,} rows have the same text on both sides")
        pairs = np.asarray(rows["pair"][:])
        for source, target in directions:
            of_pair = np.flatnonzero(pairs == f"{source}-{target}")[:ROWS_READ]
            reason = swapped(rows.select(of_pair), source, target)
            if reason:
                warn(f"{name}: {source} and {target} seem to be swapped: {reason}; exchange the languages if so")


def _named(directions: list[tuple[str, str]]) -> str:
    return ", ".join(f"{source}-{target}" for source, target in directions)


def swapped(rows: Dataset, source_lang: str, target_lang: str) -> str | None:
    """Return why the sides of `rows` seem to be swapped, or None.

    Languages with different scripts are compared by script, other languages by the words in `FREQUENT`.
    """
    sides = [" ".join(rows[:ROWS_READ][side]) for side in ("source", "target")]
    scripts = [_script(language) for language in (source_lang, target_lang)]
    if scripts[0] and scripts[1] and scripts[0] != scripts[1]:
        written = [_written_in(text) for text in sides]
        if written == scripts[::-1]:
            return f"the sources are in {written[0].title()} letters and the targets in {written[1].title()}"
        return None
    source_lang, target_lang = two_letters(source_lang), two_letters(target_lang)
    if source_lang not in FREQUENT or target_lang not in FREQUENT or source_lang == target_lang:
        return None
    source, target = (set(FREQUENT[language].split()) for language in (source_lang, target_lang))
    counts = [Counter(words(text.lower())) for text in sides]
    right = sum(counts[0][w] for w in source - target) + sum(counts[1][w] for w in target - source)
    wrong = sum(counts[0][w] for w in target - source) + sum(counts[1][w] for w in source - target)
    if wrong > 10 and wrong > 3 * right:
        return f"{wrong:,} frequent words are on the wrong side, and {right:,} on the right side"
    return None


#: CLDR script code -> first word of the Unicode names of its letters
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
    """Return the script of most letters; kana count three times, because Japanese text also has many CJK letters."""
    names = Counter(unicodedata.name(c, "").split(" ")[0] for c in text[:100_000] if c.isalpha())
    names["HIRAGANA"] = 3 * (names["HIRAGANA"] + names.pop("KATAKANA", 0))
    return names.most_common(1)[0][0] if names.total() else None
