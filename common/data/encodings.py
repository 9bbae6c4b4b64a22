"""Read the encoding of a file from its byte order mark. Without a mark, name the likely encoding, in messages only."""

import codecs

from charset_normalizer import from_bytes

from common.errors import brief

SAMPLE = 65_536  # bytes of a file that decide
#: byte order mark -> encoding; the longer marks first
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
#: first bytes of files that are no text -> their kind and the remedy
FORMATS = {
    b"\x1f\x8b": "a gzip file; end its name in .gz, such as rows.csv.gz",
    b"BZh": "a bzip2 file; end its name in .bz2, such as rows.csv.bz2",
    b"\xfd7zXZ\0": "an xz file; end its name in .xz, such as rows.csv.xz",
    b"\x28\xb5\x2f\xfd": "a zstandard file; end its name in .zst, such as rows.csv.zst",
    b"PK\x03\x04": "a zip file; end its name in .zip, or .xlsx if a spreadsheet program wrote it",
    b"PAR1": "a Parquet file; end its name in .parquet",
    b"%PDF": "a PDF file; extract its text",
}
#: encoding -> name, and letters that are frequent in its languages and not ASCII
LATIN = {
    "cp1252": ("Windows, Western Europe", "éèêëàâäáãåçñöôóõòüûúùíîïìßæøœÉÈÀÄÖÜÅÇÑ“”„‘’–—…€£°«»·"),
    "cp1250": ("Windows, Central Europe", "ąćęłńóśźżěščřžýáíéůúďťňőűöüţşăâîđĄĆĘŁŃŚŹŻŠČŘŽ„”“’–—…€"),
    "cp1254": ("Windows, Turkish", "ğışİöçüŞĞÇÖÜâîû“”’–—…€"),
}
#: encoding of Chinese, Japanese or Korean -> name
EAST_ASIAN = {
    "gb18030": "GBK, simplified Chinese",
    "big5": "Big5, traditional Chinese",
    "cp932": "Shift JIS, Japanese",
    "euc_jp": "EUC, Japanese",
    "cp949": "EUC-KR, Korean",
}
JAPANESE = ("cp932", "euc_jp")  # Japanese text has kana
TYPICAL = {"cp949": "다이는을를가은에의고하지한로도어기서"}  # syllables that Korean text repeats
#: encoding -> first and last lead byte of the frequent characters, and the lead byte of punctuation
FIRST_LEVEL = {
    "gb18030": (0xB0, 0xD7, 0xA1),
    "big5": (0xA4, 0xC6, 0xA1),
    "cp932": (0x88, 0x97, 0x81),
    "euc_jp": (0xB0, 0xCF, 0xA1),
    "cp949": (0xB0, 0xC8, 0xA1),
}
OTHERS = {
    "cp1251": "Windows, Cyrillic",
    "koi8_r": "KOI8-R, Russian",
    "cp1253": "Windows, Greek",
    "cp1255": "Windows, Hebrew",
    "cp1256": "Windows, Arabic",
    "cp874": "Windows, Thai",
}
NAMES = {name: title for name, (title, _) in LATIN.items()} | EAST_ASIAN | OTHERS


def marked_encoding(sample: bytes) -> str | None:
    """Return the encoding that the byte order mark of a file names; None without a mark."""
    return next((name for mark, name in MARKS.items() if sample.startswith(mark)), None)


def likely_encoding(sample: bytes) -> str | None:
    """Return the likely encoding of text that is not UTF-8, or None if the bytes do not seem to be text.

    Args:
        sample: the first bytes of the file, up to the end of a line.
    """
    marked = marked_encoding(sample)
    if marked:
        return marked
    if b"\0" in sample:
        return _wide(sample)
    if any(byte < 32 and byte not in b"\t\n\r\f\v\x1b" for byte in sample):
        return None
    latin = {name: share for name in LATIN if (share := _latin_share(sample, name)) > 0.5}
    if latin:
        return max(latin, key=latin.__getitem__)
    found = from_bytes(sample, cp_isolation=[*EAST_ASIAN, *OTHERS], threshold=0.5).best()
    guess = found.encoding if found else None
    if guess in OTHERS:
        return guess
    shares = {name: share for name in EAST_ASIAN if (share := _east_asian_share(sample, name)) > 0.5}
    return max(shares, key=shares.__getitem__) if shares else guess


def _wide(sample: bytes) -> str | None:
    """Return the kind of UTF-16 or UTF-32 without a byte order mark, by the place of the zero bytes."""
    sample = sample[: len(sample) // 4 * 4]
    zeros = [sample[i::4].count(0) for i in range(4)]
    quarter = len(sample) // 4
    kinds = {
        "utf-32-le": zeros[3] == quarter and zeros[2] == quarter,
        "utf-32-be": zeros[0] == quarter and zeros[1] == quarter,
        "utf-16-le": zeros[0] + zeros[2] == 0,
        "utf-16-be": zeros[1] + zeros[3] == 0,
    }
    for name, fits in kinds.items():
        text = _decoded(sample, name) if fits else None
        if text is not None and all(c.isprintable() or c.isspace() or c == "\ufeff" for c in text):
            return name
    return None


def _decoded(sample: bytes, encoding: str) -> str | None:
    """Return the text of a sample, which may end within a character; None if it is not in this encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return None


def _latin_share(sample: bytes, encoding: str) -> float:
    """Return the share of frequent letters among the characters that are not ASCII and stand alone."""
    text = _decoded(sample, encoding)
    if text is None:
        return 0
    others = [i for i, c in enumerate(text) if ord(c) > 127]
    frequent = set(LATIN[encoding][1])
    alone = [i for i in others if not any(ord(c) > 127 for c in text[max(0, i - 1) : i] + text[i + 1 : i + 2])]
    return len([i for i in alone if text[i] in frequent]) / max(1, len(others))


def _east_asian_share(sample: bytes, encoding: str) -> float:
    """Return the share of frequent characters among those that are not ASCII.

    The standards order characters by frequency: the first levels of GB 2312, Big5 and JIS hold the frequent ones. Kana
    and the syllables in `TYPICAL` count twice.
    """
    text = _decoded(sample, encoding)
    if text is None:
        return 0
    others = [c for c in text if ord(c) > 127]
    first = FIRST_LEVEL[encoding]
    typical = sum(
        c in TYPICAL.get(encoding, "") or (encoding in JAPANESE and "\u3041" <= c <= "\u30ff") for c in others
    )
    if encoding in (*JAPANESE, *TYPICAL) and typical < 0.1 * len(others):
        return 0.0
    codes = [c.encode(encoding) for c in others]
    frequent = sum(len(code) == 2 and (first[0] <= code[0] <= first[1] or code[0] == first[2]) for code in codes)
    if encoding in JAPANESE:
        frequent = max(frequent, typical)
    return (frequent + typical) / max(1, len(others))


def encoding_problem(sample: bytes, line: bytes, encoding: str) -> str:
    """Return the problem of a line that is not text in the encoding of its file, with the remedy.

    Args:
        sample: the first bytes of the file.
        line: the bytes of the line.
        encoding: the encoding in which the file is read.
    """
    kind = next((kind for start, kind in FORMATS.items() if sample.startswith(start)), None)
    if kind:
        return f"not text but {kind}"
    if _is_utf8(line) and b"\0" not in line:
        return f"not {encoding.upper()} text but UTF-8; leave --encoding out"
    marked = marked_encoding(sample) is not None
    whole = sample if marked or b"\0" in sample else sample[: sample.rfind(b"\n") + 1] + line
    likely = likely_encoding(whole)
    problem = f"not {encoding.upper()} text"
    if b"\0" in line and not marked:
        problem = "contains zero bytes"
    if likely is None:
        return f"{problem}: a binary file, or damaged; give a text file, and its encoding by --encoding"
    if marked and likely == encoding:
        return f"{problem}, although its byte order mark says so; write the file again, or give its --encoding"
    if likely.startswith("utf"):
        reason = "by its byte order mark" if marked else "by its zero bytes"
        return f"{problem}; likely {likely}, {reason}; give --encoding {likely}"
    if encoding == "utf-8" and _has_utf8(whole):
        return f"{problem}, unlike other lines of this file; correct this line, or drop it by --skip_bad_rows 1"
    shown = line.decode(likely, errors="replace").strip()
    at = next((i for i, c in enumerate(shown) if ord(c) > 127), 0)
    return (
        f"{problem}; likely {likely} ({NAMES[likely]}), in which it reads {brief(shown[max(0, at - 20) : at + 20])}; "
        f"give --encoding {likely} if that is right, else the --encoding of the file"
    )


def _has_utf8(sample: bytes) -> bool:
    """Return whether some line of `sample` is UTF-8 with characters that are not ASCII."""
    return any(_is_utf8(line) for line in sample.split(b"\n") if not line.isascii())


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
