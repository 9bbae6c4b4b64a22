"""Cut texts of any script into words. All scores and baselines that count words, and all word tags, use this module."""

import unicodedata

import regex

#: scripts without spaces between words; each letter is a word
NO_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}"
#: a letter or digit with its combining marks, such as vowel signs and accents
_LETTER = r"[\p{L}\p{N}]\p{M}*"
_UNSPACED = rf"(?=[{NO_SPACES}]){_LETTER}"
#: what may follow in the word: combining marks, and joiners (Persian, Hindi) before more of the word
_REST = r"(?:\p{M}|[\u200c\u200d]+(?=[\p{L}\p{M}\p{N}]))*"
#: pattern of a word, for `regex`
WORD = rf"(?:{_UNSPACED}|(?:(?![{NO_SPACES}])[\p{{L}}\p{{N}}]{_REST})+)"
_WORD, _LETTERS, _ONE_UNSPACED = (regex.compile(pattern) for pattern in (WORD, _LETTER, _UNSPACED))
_SOFT_HYPHEN = "\u00ad"


def words(text: str) -> list[str]:
    """Return the words of a text, in Unicode's composed form (NFC).

    A word is a sequence of letters and digits with their combining marks. In scripts without spaces, such as Chinese,
    Japanese and Thai, each letter with its marks is a word. Punctuation and symbols separate words.
    """
    return _WORD.findall(composed(text))


def letters(text: str) -> list[str]:
    """Return the letters and digits of a text in composed form, each with its combining marks."""
    return _LETTERS.findall(composed(text))


def composed(text: str) -> str:
    """Return a text in composed form (NFC), without soft hyphens."""
    return unicodedata.normalize("NFC", text).replace(_SOFT_HYPHEN, "")


def without_spaces(text: str) -> bool:
    """Return whether most letters of a text are of scripts without spaces between words."""
    found = letters(text)
    return 2 * sum(_ONE_UNSPACED.match(letter) is not None for letter in found) > len(found)


#: a run of letters, digits and underscores
_PART = rf"(?:(?![{NO_SPACES}])[\p{{L}}\p{{M}}\p{{N}}_])+"
_TAGGED_WORD = regex.compile(
    rf"""https?://\S+ | www\.\S+                        # addresses
    | [@\#]{_PART}                                      # user names and hashtags
    | (?:\p{{L}}\.){{2,}}                               # U.S.
    | ['’](?:s|re|ve|ll|d|m)\b                          # clitics are separate words
    | {_PART}(?:(?:[-.&,:]|['’](?!(?:s|re|ve|ll|d|m)\b)){_PART})*   # O'Neill, AT&T, well-known, 1,000.5
    | \S\p{{M}}*""",
    regex.VERBOSE | regex.IGNORECASE,
)


def split_words(text: str) -> list[tuple[int, int]]:
    """Return the character span of each word. Punctuation and clitics are words, as in CoNLL and OntoNotes."""
    return [match.span() for match in _TAGGED_WORD.finditer(text)]
