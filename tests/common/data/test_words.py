"""Test that texts of every script are cut into words, without the loss of a letter, digit or mark."""

import random
import unicodedata
from functools import cache

import pytest
import regex

from common.data.sentences import sentences
from common.data.words import letters, split_words, without_spaces, words

SENTENCES = {
    "Latin": ("Ça coûte 1 000 €, naïve!", ["Ça", "coûte", "1", "000", "naïve"]),
    "Vietnamese": ("Tiếng Việt đẹp.", ["Tiếng", "Việt", "đẹp"]),
    "Greek": ("Ἀθῆναι, ὦ φίλε", ["Ἀθῆναι", "ὦ", "φίλε"]),
    "Cyrillic": ("Ёлка и ещё й", ["Ёлка", "и", "ещё", "й"]),
    "Devanagari": ("हिन्दी भाषा।", ["हिन्दी", "भाषा"]),
    "Bengali": ("বাংলা ভাষা", ["বাংলা", "ভাষা"]),
    "Tamil": ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
    "Arabic": ("السَّلَامُ عَلَيْكُمْ؟", ["السَّلَامُ", "عَلَيْكُمْ"]),
    "Persian": ("می\u200cخواهم.", ["می\u200cخواهم"]),
    "Hebrew": ("שָׁלוֹם עוֹלָם", ["שָׁלוֹם", "עוֹלָם"]),
    "Hangul": ("한국어 문장", ["한국어", "문장"]),
    "Thai": ("ม้ากิน", ["ม้", "า", "กิ", "น"]),
    "Burmese": ("မြန်မာ", ["မြ", "န်", "မာ"]),
    "Chinese": ("我爱。北京2024年", ["我", "爱", "北", "京", "2024", "年"]),
    "Japanese": ("カレーがす", ["カ", "レ", "ー", "が", "す"]),
    "mixed": (
        "Rock'n'roll, U.S. a_b 3.5 dog\u00adhouse ❤️",
        ["Rock", "n", "roll", "U", "S", "a", "b", "3", "5", "doghouse"],
    ),
}


@pytest.mark.parametrize("script", SENTENCES)
def test_words_of_a_sentence_in_any_normal_form(script):
    text, expected = SENTENCES[script]
    expected = [unicodedata.normalize("NFC", word) for word in expected]
    for form in ("NFC", "NFD"):
        assert words(unicodedata.normalize(form, text)) == expected
        assert "".join(letters(unicodedata.normalize(form, text))) == "".join(expected).replace("\u200c", "")


@cache
def scripts() -> dict[str, dict[str, str]]:
    """Return, for each script and category L, M or N, its characters."""
    found: dict[str, dict[str, str]] = {}
    for i in range(0x20000):
        kind = unicodedata.category(chr(i))[0]
        if kind in "LMN":
            script = unicodedata.name(chr(i), "?").split(" ")[0]
            of_script = found.setdefault(script, dict.fromkeys("LMN", ""))
            of_script[kind] += chr(i)
    assert len(found) > 150
    return {name: kinds for name, kinds in found.items() if kinds["L"]}


def test_no_letter_digit_or_mark_of_any_script_is_lost():
    generator = random.Random(0)
    for name, kinds in scripts().items():
        for _ in range(3):
            text = ""
            for _ in range(8):
                text += generator.choice(kinds["L"])
                text += "".join(generator.choice(kinds["M"]) for _ in range(generator.randrange(3)) if kinds["M"])
                text += generator.choice([" ", "", "", ", ", *kinds["N"][:10]])
            expected = "".join(c for c in unicodedata.normalize("NFC", text) if unicodedata.category(c)[0] in "LMN")
            found = words(text)
            assert "".join(found) == expected == "".join(letters(text)), name
            assert found == words(unicodedata.normalize("NFD", text)), name
            assert not any(regex.match(r"\p{M}", word) for word in found), name


def test_marks_tell_words_apart():
    assert words("काली") != words("काला")
    assert letters("ม้า") != letters("มา")


def test_scripts_without_spaces_are_known():
    assert [without_spaces(text) for text in ("我爱你们 NLP", "ภาษาไทย", "한국어", "Deutsch", "हिन्दी", "")] == [
        True, True, False, False, False, False
    ]  # fmt: skip


def test_sentences_end_at_the_marks_of_their_script():
    for text in ("वह घर गया। मैं रुका।", "ما اسمك؟ اسمي علي.", "আমি যাই। তুমি থাকো।", "यह हिन. यह ठीक है.", "ተማሪ ነኝ። አዎ።"):
        assert len(sentences(text)) == 2
        assert " ".join(sentences(text)) == text
    assert sentences("Apple Inc. CEO Tim Cook met Gov. Hill. He left.")[1:] == ["He left."]
    assert sentences("Dr. A. É. Meier kam. Er ging.") == ["Dr. A. É. Meier kam.", "Er ging."]
    assert len(sentences(unicodedata.normalize("NFD", "Dr. É. Meier kam. Er ging."))) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Munich's mayor, J. O'Neill, isn't here.", "Munich 's mayor , J . O'Neill , isn't here ."),
        ("AT&T paid $1,000.50 (5%) in the U.S.", "AT&T paid $ 1,000.50 ( 5 % ) in the U.S."),
        ("see https://a.b/c?d=1 @ann_b #NER", "see https://a.b/c?d=1 @ann_b #NER"),
        ("東京へ行く Tokyo", "東 京 へ 行 く Tokyo"),
        ("हिन्दी भाषा", "हिन्दी भाषा"),
        ("well-known re\u0301sume\u0301", "well-known re\u0301sume\u0301"),
        ("", ""),
    ],
)
def test_words_of_tags_are_those_of_conll(text, expected):
    assert [text[start:end] for start, end in split_words(text)] == expected.split()
