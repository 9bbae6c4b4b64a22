"""Recognise the scheme of a tag column and convert it to IOB2."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from common.errors import InputError, tell

Name = Literal["auto", "iob2", "iob1", "bioes", "bmes", "bilou", "none"]

#: letters of a scheme that marks the ends of entities -> their meaning in BIOES
ROLES = {
    "bioes": {"B": "B", "I": "I", "E": "E", "S": "S"},
    "bmes": {"B": "B", "M": "I", "E": "E", "S": "S", "W": "S"},
    "bilou": {"B": "B", "I": "I", "L": "E", "U": "S"},
}
#: type of entities in files whose tags are single letters, such as B, I, O
UNTYPED = "ENTITY"

#: parts of speech of Universal Dependencies and of the Penn Treebank: tags of words, not of spans
UPOS = frozenset({
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM",
    "VERB", "X",
})  # fmt: skip
PENN = frozenset({
    "CC", "CD", "DT", "EX", "FW", "HYPH", "IN", "JJ", "JJR", "JJS", "LS", "MD", "NFP", "NN", "NNP", "NNPS", "NNS",
    "PDT", "POS", "PRP", "PRP$", "RB", "RBR", "RBS", "RP", "SYM", "TO", "UH", "VB", "VBD", "VBG", "VBN", "VBP", "VBZ",
    "WDT", "WP", "WP$", "WRB", "ADD", "AFX", "GW", "XX", "-LRB-", "-RRB-", "(", ")", ",", ".", ":", ";", "``", "''",
    "#", "$", '"', "'",
})  # fmt: skip

#: mistaken forms of O
_NO_ENTITY = frozenset({"0", "o", "Other", "OTHER", "_", "-", "None"})
#: entities that start with I, from which IOB1 is sure; fewer can be mistakes
_FEWEST_ENTITIES = 2
_PREFIXED = re.compile(r"([BIESMLUW])([-_])\S(?:.*\S)?")


@dataclass(frozen=True)
class Scheme:
    """Scheme of the tags in the user's files.

    Attributes:
        name: iob2, iob1, bioes, bmes, bilou, or none for tags of single words, such as parts of speech.
        separator: character between letter and type; empty if the tags are letters without a type.
    """

    name: str = "iob2"
    separator: str = "-"

    def to_iob2(self, tags: list[str]) -> list[str]:
        """Convert the tags of a sentence to IOB2; with scheme none, return them unchanged."""
        if self.name == "none":
            return tags
        tags = [self.hyphenated(tag) for tag in tags]
        if self.name in ROLES:
            begins = {letter for letter, role in ROLES[self.name].items() if role in "BS"}
            tags = [tag if tag == "O" else ("B-" if tag[0] in begins else "I-") + tag[2:] for tag in tags]
        return with_begins(tags) if self.name == "iob1" else tags

    def problems(self, tokens: list[str], tags: list[str], repair: bool) -> Iterator[str]:
        """Yield a message for the first tag of a sentence that the scheme does not allow.

        Args:
            tokens: words of the sentence.
            tags: their tags, one per word.
            repair: accept sequences of tags that `--repair_bio` repairs.
        """
        for i, tag in enumerate(tags, 1):
            message = self._wrong_tag(tag)
            if message:
                yield f"tag {i} is {'the number ' if isinstance(tag, int) else ''}{tag!r}; {message}"
                return
        if repair or self.name in ("none", "iob1"):
            return
        if self.name in ROLES:
            yield from self._broken_entity(tokens, tags)
            return
        for i in invalid_tags([self.hyphenated(tag) for tag in tags])[:1]:
            kind = self.hyphenated(tags[i])[2:]
            yield (
                f"tag {i + 1} ({tags[i]} on {tokens[i]!r}) does not follow B-{kind} or I-{kind}; write B-{kind}, or "
                "pass --repair_bio to repair all these tags, or --tag_scheme iob1 if the file is IOB1"
            )

    def hyphenated(self, tag: str) -> str:
        """Return a tag in the notation LETTER-TYPE."""
        if tag == "O" or self.separator == "-":
            return tag
        return f"{tag[0]}-{tag[2:] if self.separator else UNTYPED}"

    def _wrong_tag(self, tag: object) -> str | None:
        if isinstance(tag, int):
            return "needed: names such as B-PER; name the numbers from 0 by --label_names O,B-PER,..."
        if not isinstance(tag, str) or not tag.strip():
            return "needed: a text"
        if self.name == "none":
            return None
        letters = "".join(ROLES.get(self.name, "BI"))
        kind = rf"{self.separator}\S(?:.*\S)?" if self.separator else ""
        if tag == "O" or re.fullmatch(f"[{letters}]{kind}", tag):
            return None
        if tag in _NO_ENTITY:
            return "needed: the capital letter O on words outside entities"
        if tag[0].upper() in letters and tag[1:2] in ("-", "_") and tag[2:]:
            return f"write {tag[0].upper()}{self.separator or '-'}{tag[2:]}, as the other tags"
        begun = ", ".join(f"{letter}-TYPE" for letter in letters)
        return f"needed: O, {begun}; --tag_scheme names another scheme, none for tags of single words"

    def _broken_entity(self, tokens: list[str], tags: list[str]) -> Iterator[str]:
        """Yield a message for the first entity without begin or end."""
        roles = ROLES[self.name]
        end = next(letter for letter, role in roles.items() if role == "E")
        opened: str | None = None
        for i, tag in enumerate([*tags, "O"]):
            role, kind = ("O", "") if tag == "O" else (roles[tag[0]], self.hyphenated(tag)[2:])
            continues = role in "IE"
            if continues != (opened is not None) or (continues and kind != opened):
                place = f"tag {i + 1} ({tag} on {tokens[i]!r})" if i < len(tags) else "the end of the sentence"
                wrong = f"comes before {end}-{opened}" if opened is not None else f"follows no B-{kind}"
                yield (
                    f"{place} {wrong}, which {self.name.upper()} does not allow; correct it, or pass --repair_bio to "
                    "repair all these tags"
                )
                return
            opened = kind if role in "BI" else None


IOB2 = Scheme()


def invalid_tags(tags: list[str]) -> list[int]:
    """Return the position of each `I-X` that follows neither `B-X` nor `I-X`, which IOB2 does not allow."""
    return [
        i for i, tag in enumerate(tags) if tag.startswith("I-") and (i == 0 or tags[i - 1] not in (tag, "B-" + tag[2:]))
    ]


def with_begins(tags: list[str]) -> list[str]:
    """Replace each `I-X` that does not continue an `X` by `B-X`."""
    invalid = set(invalid_tags(tags))
    return ["B-" + tag[2:] if i in invalid else tag for i, tag in enumerate(tags)]


def recognise(sentences: Iterable[list[str]], wanted: Name = "auto") -> Scheme:
    """Return the scheme of all tags of a run, and print one line if they will be converted.

    Args:
        sentences: the tags of each sentence of all files.
        wanted: `--tag_scheme`; "auto" recognises the scheme only where no other scheme is possible.

    Raises:
        InputError: several schemes are possible; the message names the argument that decides.
    """
    sentences = [[tag for tag in tags if isinstance(tag, str)] for tags in sentences if isinstance(tags, list)]
    tags = {tag for sentence in sentences for tag in sentence} - {"O"} - _NO_ENTITY
    separator = _separator(tags)
    scheme = Scheme(_name(tags, sentences, separator) if wanted == "auto" else wanted, separator)
    if scheme.name == "none":
        if wanted == "auto":
            tell(f"the {len(tags)} tags are parts of speech: each word is scored by itself, as --tag_scheme none does")
        return scheme
    if scheme.name != "iob2" or (separator != "-" and tags):
        kind = {"_": " with underscores", "": f" without types, which become {UNTYPED}"}.get(separator, "")
        tell(f"tags are {scheme.name.upper()}{kind}: converted to IOB2 (--tag_scheme names another scheme)")
    return scheme


def _separator(tags: set[str]) -> str:
    if tags and tags <= set("BIESMLU") and "B" in tags:
        return ""
    matches = [_PREFIXED.fullmatch(tag) for tag in tags]
    return "_" if tags and all(match and match[2] == "_" for match in matches) else "-"


def _name(tags: set[str], sentences: list[list[str]], separator: str) -> str:
    prefixed = {tag for tag in tags if not separator or _PREFIXED.fullmatch(tag)}
    if not prefixed:
        if tags and (tags <= UPOS or tags <= PENN) and not any("O" in sentence for sentence in sentences):
            return "none"
        if tags:
            shown = ", ".join(sorted(tags)[:5]) + (", ..." if len(tags) > 5 else "")
            raise InputError(
                f"--tag_scheme auto: no tag starts with B- or I- (the tags are {shown}); "
                "give --tag_scheme none if each word has a tag of its own, such as a part of speech; if another column "
                "holds the tags, give --conll_tag_column or --label_column_name"
            )
        return "iob2"
    letters = {tag[0] for tag in prefixed}
    for name, needed in (("bioes", set("ES")), ("bmes", {"M", "W"}), ("bilou", set("LU"))):
        if letters & needed and letters <= set(ROLES[name]):
            return name
    if not letters <= set("BI"):
        raise InputError(
            f"--tag_scheme auto: the tags start with {', '.join(sorted(letters))}, which is no known scheme; correct "
            "them, or give --tag_scheme none if each word has a tag of its own"
        )
    # IOB1 writes B only where an entity touches the one before; a single other B makes both schemes possible
    as_hyphens = Scheme("iob2", separator)
    sentences = [[as_hyphens.hyphenated(tag) for tag in sentence] for sentence in sentences]
    if sum(len(invalid_tags(sentence)) for sentence in sentences) < _FEWEST_ENTITIES:
        return "iob2"
    touching = all(
        tag[:2] != "B-" or (i > 0 and sentence[i - 1] in ("I-" + tag[2:], tag))
        for sentence in sentences
        for i, tag in enumerate(sentence)
    )
    return "iob1" if touching else "iob2"
