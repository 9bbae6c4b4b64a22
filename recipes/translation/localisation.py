"""Generate the sample: dates, times, amounts and names in English and German, from the Unicode CLDR.

Babel (https://babel.pocoo.org) contains the tables of the CLDR (https://cldr.unicode.org). Each pair formats one value
in both languages with these tables. No pair is machine translated.

Validation and test hold two kinds of pairs. `value`: training has the pattern with other values. `pattern`: training
has neither the pattern nor its values. Single names (France, Frankreich) are always in training, as no model could
guess them.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path

import datasets
from babel import Locale, dates, lists, numbers, units

from common.errors import InputError

SEED = 0
LANGUAGES = ("en", "de")
#: random values for each pattern of a kind
VALUES = {
    "date": 330, "time": 400, "datetime": 300, "interval": 200, "number": 500, "percent": 300, "compact": 250,
    "currency": 22, "currency name": 22, "unit": 22, "relative": 60, "territories": 260, "languages": 260,
    "months": 150,
}  # fmt: skip
HELD_OUT_PATTERNS, HELD_OUT_VALUES = 0.06, 0.04

#: without yMMMd and hm: they equal the medium and short forms in English, but not in German
DATE_SKELETONS = (
    "yMd", "yMMMEd", "yMEd", "yMMMM", "yMMM", "MMMMd", "MMMd", "MMMEd", "MEd", "Md", "yM", "Ed", "GyMMMd",
    "GyMMMEd", "yQQQ", "yQQQQ",
)  # fmt: skip
TIME_SKELETONS = ("Hm", "Hms", "EHm", "EHms", "H")
UNITS = (
    "length-kilometer", "length-meter", "length-centimeter", "length-millimeter", "length-mile", "length-foot",
    "length-inch", "length-yard", "mass-kilogram", "mass-gram", "mass-tonne", "mass-pound", "mass-ounce",
    "volume-liter", "volume-milliliter", "volume-cubic-meter", "volume-gallon", "volume-cup", "area-square-meter",
    "area-square-kilometer", "area-hectare", "area-acre", "temperature-celsius", "temperature-fahrenheit",
    "temperature-kelvin", "speed-kilometer-per-hour", "speed-meter-per-second", "speed-mile-per-hour", "speed-knot",
    "duration-second", "duration-minute", "duration-hour", "duration-day", "duration-week", "duration-month",
    "duration-year", "duration-century", "energy-calorie", "energy-kilocalorie", "energy-joule",
    "energy-kilowatt-hour", "power-watt", "power-kilowatt", "power-horsepower", "pressure-bar",
    "pressure-hectopascal", "electric-volt", "electric-ampere", "electric-ohm", "frequency-hertz",
    "frequency-megahertz", "digital-byte", "digital-kilobyte", "digital-megabyte", "digital-gigabyte",
    "digital-terabyte", "digital-bit", "digital-megabit", "angle-degree", "angle-radian", "light-lux",
    "consumption-liter-per-100-kilometer", "consumption-mile-per-gallon", "concentr-karat", "force-newton",
)  # fmt: skip
CURRENCIES = (
    "USD", "EUR", "GBP", "JPY", "CHF", "SEK", "NOK", "DKK", "PLN", "CZK", "HUF", "RON", "BGN", "TRY", "RUB", "UAH",
    "CNY", "KRW", "INR", "IDR", "THB", "VND", "PHP", "MYR", "SGD", "HKD", "AUD", "NZD", "CAD", "MXN", "BRL", "ARS",
    "CLP", "COP", "PEN", "ZAR", "EGP", "MAD", "NGN", "KES", "ILS", "SAR", "AED", "ISK",
)  # fmt: skip

#: formats a value in a language
Writer = Callable[..., str]


def sample_files() -> dict[str, str]:
    """Return the sample file of each split; write missing files to the cache of `datasets`.

    Raises:
        InputError: the cache is not writable.
    """
    source_hash = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"cldr-{'-'.join(LANGUAGES)}-{version('babel')}-{source_hash}"
    files = {split: folder / f"{split}.jsonl" for split in ("train", "validation", "test")}
    if not all(file.is_file() for file in files.values()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for split, rows in sample().items():
                part = files[split].with_suffix(f".{os.getpid()}")  # several processes may write
                part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
                part.replace(files[split])
        except OSError as error:
            raise InputError(f"{folder}: the sample cannot be written: {error.strerror}; set HF_HOME") from None
    return {split: str(file) for split, file in files.items()}


def sample() -> dict[str, list[dict]]:
    """Return rows `{"id", "kind", "held_out", "translation": {"en", "de"}}` of train, validation and test.

    Each English text occurs once. The rows depend only on the version of Babel.
    """
    patterns: dict[str, list[tuple[str, str]]] = {}
    for pattern, write in values():
        pair = tuple(_one_line(write(language=language)) for language in LANGUAGES)
        patterns.setdefault(pattern, []).append(pair)
    rng = random.Random(SEED)
    names = sorted(pattern for pattern in patterns if not pattern.startswith("name"))
    unseen = set(rng.sample(names, round(HELD_OUT_PATTERNS * len(names))))
    seen: set[str] = set()
    rows: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for pattern in sorted(patterns, key=lambda p: (p in unseen, p)):  # a text of training stays in training
        for source, target in patterns[pattern]:
            if source in seen:
                continue
            seen.add(source)
            if pattern in unseen:
                held_out = "pattern"
            else:
                held_out = "value" if pattern in names and rng.random() < HELD_OUT_VALUES else ""
            split = rng.choice(("validation", "test")) if held_out else "train"
            kind = pattern.split(":")[0]
            row = {"id": f"{split}-{len(rows[split])}", "kind": kind, "held_out": held_out or "none"}
            rows[split].append(row | {"translation": {"en": source, "de": target}})
    for split in rows.values():
        rng.shuffle(split)
    rows["validation"] = rows["validation"][: len(rows["validation"]) // 3]
    return rows


def values() -> Iterator[tuple[str, Writer]]:
    """Yield each value of the sample: the name of its pattern, and the function that formats it."""
    rng = random.Random(SEED)
    for kind, makers in _kinds().items():
        for name, make in makers.items():
            for _ in range(VALUES[kind]):
                yield f"{kind}:{name}", make(rng)
    english = Locale(LANGUAGES[0])
    for table in ("territories", "languages", "scripts", "currencies"):
        for key in sorted(getattr(english, table)):
            if all(key in getattr(Locale(language), table) for language in LANGUAGES):
                yield f"name of {table}:{key}", partial(_name, table, key)
    for width in ("wide", "abbreviated"):
        for key in range(1, 13):
            yield f"name of months:{width}", partial(_calendar_name, "months", width, key)
        for key in range(7):
            yield f"name of days:{width}", partial(_calendar_name, "days", width, key)


def _kinds() -> dict[str, dict[str, Callable[[random.Random], Writer]]]:
    """Return, by kind and name of the pattern, a function that draws a value and returns its writer."""
    lengths = ("full", "long", "medium", "short")
    kinds: dict[str, dict[str, Callable[[random.Random], Writer]]] = {kind: {} for kind in VALUES}
    for length in lengths:
        kinds["date"][length] = lambda r, f=length: partial(_call, dates.format_date, _moment(r), f)
        if length in ("medium", "short"):
            kinds["time"][length] = lambda r, f=length: partial(_call, dates.format_time, _moment(r).time(), f)
        if length in ("medium", "short"):
            kinds["datetime"][length] = lambda r, f=length: partial(_datetime, _moment(r), f)
    for skeleton in DATE_SKELETONS:
        kinds["date"][skeleton] = lambda r, s=skeleton: partial(_skeleton, s, _moment(r))
    for skeleton in TIME_SKELETONS:
        kinds["time"][skeleton] = lambda r, s=skeleton: partial(_skeleton, s, _moment(r))
    for skeleton in ("yMMMd", "MMMd", "yMd", "Hm", "yMMM"):
        kinds["interval"][skeleton] = lambda r, s=skeleton: partial(_interval, s, _moment(r), r.randint(1, 200))
    kinds["number"]["whole"] = lambda r: partial(_call, numbers.format_decimal, _amount(r, 0))
    for digits in (1, 2, 3):
        kinds["number"][str(digits)] = lambda r, d=digits: partial(_call, numbers.format_decimal, _amount(r, d))
    kinds["number"]["negative"] = lambda r: partial(_call, numbers.format_decimal, -_amount(r, 2))
    kinds["percent"]["whole"] = lambda r: partial(_call, numbers.format_percent, r.randint(0, 400) / 100)
    kinds["percent"]["fraction"] = lambda r: partial(
        _call, numbers.format_percent, r.randint(0, 2000) / 10000, "#,##0.0 %"
    )
    for length in ("short", "long"):
        kinds["compact"][length] = lambda r, f=length: partial(_compact, _amount(r, 0) * 10 ** r.randint(0, 6), f)
    for code in CURRENCIES:
        kinds["currency"][code] = lambda r, c=code: partial(_call, numbers.format_currency, _amount(r, 2), c)
        kinds["currency name"][code] = lambda r, c=code: partial(_currency_name, _amount(r, r.choice((0, 2))), c)
    for unit in UNITS:
        for length in ("long", "short"):
            kinds["unit"][f"{unit} {length}"] = lambda r, u=unit, f=length: partial(
                _unit, u, _amount(r, r.choice((0, 0, 1))) if r.random() < 0.9 else 1, f
            )
    for unit, seconds in (("second", 1), ("minute", 60), ("hour", 3600), ("day", 86400), ("week", 604800)):
        for sign, tense in ((1, "in"), (-1, "ago")):
            for length in ("long", "short"):
                kinds["relative"][f"{tense} {unit} {length}"] = lambda r, s=seconds * sign, u=unit, f=length: partial(
                    _relative, timedelta(seconds=s * r.randint(1, 99)), u, f
                )
    for table in ("territories", "languages"):
        codes = _common_codes(table)
        for style in ("standard", "or"):
            for size in (2, 3, 4, 5):
                kinds[table][f"{style} {size}"] = lambda r, t=table, c=codes, s=style, n=size: partial(
                    _list, t, r.sample(c, n), s
                )
    for size in (2, 3):
        kinds["months"][str(size)] = lambda r, n=size: partial(_month_list, sorted(r.sample(range(1, 13), n)))
    return kinds


def _moment(rng: random.Random) -> datetime:
    return datetime(1900, 1, 1) + timedelta(seconds=rng.randrange(150 * 365 * 86400))


def _amount(rng: random.Random, digits: int) -> int | float:
    """Draw a number with one to seven integer digits; each number of digits is equally likely."""
    whole = rng.randrange(10 ** rng.randint(1, 7))
    return round(whole + rng.random(), digits) if digits else whole


def _one_line(text: str) -> str:
    """Replace narrow and no-break spaces by plain spaces."""
    return " ".join(text.split())


def _call(function: Callable, value: object, form: str | None = None, *, language: str) -> str:
    return function(value, form, locale=language) if form else function(value, locale=language)


def _datetime(moment: datetime, length: str, language: str) -> str:
    return dates.format_datetime(moment, length, locale=language)


def _skeleton(skeleton: str, moment: datetime, language: str) -> str:
    return dates.format_skeleton(skeleton, moment, locale=language)


def _interval(skeleton: str, start: datetime, steps: int, language: str) -> str:
    later = start + (timedelta(minutes=7 * steps) if skeleton == "Hm" else timedelta(days=steps))
    if skeleton == "Hm":
        start, later = start.time(), later.time()
    return dates.format_interval(start, later, skeleton, locale=language)


def _compact(number: int, length: str, language: str) -> str:
    return numbers.format_compact_decimal(number, format_type=length, locale=language, fraction_digits=1)


def _currency_name(amount: float, code: str, language: str) -> str:
    return numbers.format_currency(amount, code, locale=language, format_type="name")


def _unit(unit: str, amount: float, length: str, language: str) -> str:
    return units.format_unit(amount, unit, length=length, locale=language)


def _relative(delta: timedelta, unit: str, length: str, language: str) -> str:
    return dates.format_timedelta(
        delta, granularity=unit, threshold=1e9, add_direction=True, format=length, locale=language
    )


def _name(table: str, key: str, language: str) -> str:
    return getattr(Locale(language), table)[key]


def _calendar_name(table: str, width: str, key: int, language: str) -> str:
    return getattr(Locale(language), table)["stand-alone"][width][key]


def _common_codes(table: str) -> list[str]:
    """Return the two-letter codes that have a name in both languages."""
    named = [set(getattr(Locale(language), table)) for language in LANGUAGES]
    return sorted(
        code
        for code in set.intersection(*named)
        if len(code) == 2 and code.isalpha() and code not in ("XA", "XB", "ZZ")
    )


def _list(table: str, codes: list[str], style: str, language: str) -> str:
    return lists.format_list([_name(table, code, language) for code in codes], style=style, locale=language)


def _month_list(months: list[int], language: str) -> str:
    names = [_calendar_name("months", "wide", month, language) for month in months]
    return lists.format_list(names, locale=language)
