"""Test that every notation of two mentions is the same pair, and that bad rows are refused with file and line."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from transformers import PretrainedConfig

from common.data.columns import Columns as SavedColumns
from common.data.rows import Rejected, checked
from common.errors import InputError
from recipes.relation import predict
from recipes.relation.arguments import RelationDataArguments
from recipes.relation.formats import Names
from recipes.relation.mentions import Unusable, read_pair
from recipes.relation.predict import COLUMNS
from recipes.relation.reading import PairBuilder, check_row, load_pairs, plain_row, read_rows
from tests.bad_inputs import lines_of, of_bytes, variants
from tests.common.data.test_bad_inputs import check_refusal, no_hang  # noqa: F401  (a fixture)
from tests.conftest import ROOT, read_jsonl, write_jsonl

FILES = ROOT / "tests" / "formats" / "relation"
NAMES = Names("text", "head", "tail", "label")
PAIRS = [
    ("Mara Olsen moved to Oslo .", "Mara Olsen", "Oslo", "lives_in(e1,e2)"),
    ("Oslo lost Mara Olsen .", "Mara Olsen", "Oslo", "Other"),
]


def loaded(file: str | Path, **arguments) -> tuple:
    return load_pairs(RelationDataArguments(train_file=str(file), validation_file=str(file), **arguments))


@pytest.mark.parametrize("file", sorted(FILES.iterdir()), ids=lambda path: path.name)
def test_every_format_is_the_same_data(file, capsys):
    data, unlabeled, labels, no_relation = loaded(
        file, **({"no_relation_label": "Other"} if "doccano" in file.name else {})
    )
    rows = data["train"].to_list()
    assert [(r["text"], r["head"]["text"], r["tail"]["text"], r["label"]) for r in rows] == PAIRS
    for row in rows:
        for name in ("head", "tail"):
            assert row["text"][row[name]["start"] : row[name]["end"]] == row[name]["text"]
    assert (unlabeled, labels, no_relation) == (None, ["Other", "lives_in(e1,e2)"], "Other")
    if file.stem in ("tacred", "doccano"):
        assert {(row["head"]["type"], row["tail"]["type"]) for row in rows} == {("PER", "LOC")}
    if file.stem == "doccano":
        assert "train: 1 relations, and 1 other pairs of entities as Other" in capsys.readouterr().out


def test_semeval_without_relations_is_a_test_file_and_an_input_of_predict(tmp_path, capsys):
    lines = [line for line in (FILES / "semeval.txt").read_text().split("\n") if "<e1>" in line]
    (tmp_path / "test.txt").write_text("\n".join(lines))
    _, unlabeled, _, _ = loaded(FILES / "semeval.txt", test_file=str(tmp_path / "test.txt"))
    assert unlabeled["id"][:] == ["1", "2"]
    assert "label" not in unlabeled.column_names
    found = list(read_rows(tmp_path / "test.txt", RelationDataArguments(), NAMES, predicting=True))
    assert [row["head"] for _, row in found] == [{"start": 0, "end": 10}, {"start": 10, "end": 20}]
    (tmp_path / "raw.txt").write_text("Ann left.\n\nBob 1\tcame.\n")
    raw = read_rows(tmp_path / "raw.txt", RelationDataArguments(), NAMES, predicting=True)
    assert [row for _, row in raw] == [{"text": "Ann left."}, {"text": "Bob 1\tcame."}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('1\t"<e1>A</e1> b c"\nOther\n', "a.txt:1: needs <e1>...</e1> and <e2>...</e2>, each once; mark both mentions"),
        ('1\t"<e1>A <e2>b</e2></e1> c"\nOther\n', "a.txt:1: needs <e1>"),
        ('1\t"<e1>A</e1> <e2></e2>b"\nOther\n', r"a.txt:1: tail \[2, 2\] is empty"),
        ('1\t"<e1>A</e1> <e2>b</e2>"\nOther\nUsage\n', "a.txt:3: 'Usage' is neither a sentence of SemEval-2010 Task 8"),
        ('Other\n1\t"<e1>A</e1> <e2>b</e2>"\nOther\n', "a.txt:1: 'Other' is neither a sentence"),
        ('1\t"<e1>A</e1> <e2>b</e2>"\n\n2\t"<e1>A</e1> <e2>c</e2>"\nOther\n', "a.txt:1: no label: label is None"),
        ("just a text\n", "a.txt:1: 'just a text' is neither a sentence"),
    ],
)
def test_lines_that_are_no_semeval_are_named(tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        loaded(tmp_path / "a.txt")


# doccano

ENTITIES = [
    {"id": 1, "label": "PER", "start_offset": 0, "end_offset": 3},
    {"id": 2, "label": "LOC", "start_offset": 9, "end_offset": 13},
    {"id": 3, "label": "LOC", "start_offset": 18, "end_offset": 22},
]


def annotated(relations: list, entities: list = ENTITIES, text: str = "Ann left Oslo for Rome") -> dict:
    return {"text": text, "entities": entities, "relations": relations}


def test_other_pairs_have_the_types_of_relations_and_are_near(tmp_path, capsys):
    born = {"from_id": 1, "to_id": 2, "type": "born_in"}
    far = annotated([born], text="Ann left Oslo for " + "and " * 40)
    file = write_jsonl(tmp_path / "a.jsonl", [annotated([born]), annotated([]), far | {"entities": ENTITIES[:2]}])
    data, _, labels, no_relation = loaded(file)
    assert (labels, no_relation) == (["born_in", "no_relation"], "no_relation")
    found = [(row["head"]["text"], row["tail"]["text"], row["label"]) for row in data["train"]]
    assert found == [
        ("Ann", "Oslo", "born_in"), ("Ann", "Rome", "no_relation"), ("Ann", "Oslo", "no_relation"),
        ("Ann", "Rome", "no_relation"), ("Ann", "Oslo", "born_in"),
    ]  # fmt: skip
    near = loaded(file, max_distance=1)[0]["train"]
    assert [row["tail"]["text"] for row in near] == ["Oslo", "Oslo", "Oslo"]
    with pytest.raises(InputError, match=r"label: 1 relation in the 4 rows read \(born_in\)"):
        loaded(file, other_pairs=False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (annotated([{"from_id": 1, "to_id": 9, "type": "x"}]), "9 is no id of an entity; ids here: 1, 2, 3"),
        (annotated([{"from_id": 1, "type": "x"}]), "None is no id of an entity"),
        (annotated([{"from_id": [1], "to_id": 2, "type": "x"}]), r"\[1\] is no id of an entity"),
        (annotated([{"from_id": 1, "to_id": 2}]), "has the type None; needed: a text"),
        (annotated([7]), "relation 7 is no object; needed: from_id, to_id and type"),
        (annotated([{"from_id": 1, "to_id": 1, "type": "x"}]), "has one entity twice; name two"),
        (
            annotated([{"from_id": 1, "to_id": 2, "type": t} for t in "xy"]),
            "entities 1 and 2 have two relations, x and y; keep one",
        ),
        (annotated([], [ENTITIES[0], ENTITIES[0]]), "two entities have the id 1; give each another id"),
        (annotated([], [{"label": "PER"}]), "has no id; give each entity an id"),
        (annotated([], [ENTITIES[0] | {"end_offset": 99}]), r"entity 1 \[0, 99\] does not lie in the text"),
        (annotated([], ENTITIES, text=""), "the text is ''"),
    ],
)
def test_bad_entities_and_relations_are_named(tmp_path, row, message):
    good = annotated([{"from_id": 1, "to_id": 2, "type": "born_in"}])
    with pytest.raises(InputError, match=rf"a\.jsonl:2: .*{message}"):
        loaded(write_jsonl(tmp_path / "a.jsonl", [good, row]))


# Mentions

TEXT = "Ann Lee left Oslo"
TOKENS = TEXT.split()
#: notation -> text, and a function from the first and the last+1 token or character to a mention
NOTATIONS = {
    "objects of tokens": (TOKENS, lambda a, b: {"start": a, "end": b}),
    "lists of tokens": (TOKENS, lambda a, b: [a, b]),
    "typed lists of tokens": (TOKENS, lambda a, b: [a, b, "X"]),
    "objects of characters": (TEXT, lambda a, b: {"start": a, "end": b, "type": "X"}),
    "offsets of doccano": (TEXT, lambda a, b: {"start_offset": a, "end_offset": b, "label": "X"}),
    "lists of characters": (TEXT, lambda a, b: [a, b]),
}
GOOD = {True: ((0, 2), (3, 4)), False: ((0, 7), (13, 17))}
#: fault -> both ends of the first mention, from its valid ends and the size of the text
FAULTS = {
    "empty": lambda a, b, n: (a, a), "reversed": lambda a, b, n: (b, a), "negative": lambda a, b, n: (-1, b),
    "beyond": lambda a, b, n: (a, n + 1), "far beyond": lambda a, b, n: (10**6, 10**6 + 1),
    "huge": lambda a, b, n: (a, 10**400), "null": lambda a, b, n: (None, b),
    "text": lambda a, b, n: (str(a), str(b)), "fraction": lambda a, b, n: (a, b + 0.5),
    "true": lambda a, b, n: (False, True), "list": lambda a, b, n: ([a], b), "whole text": lambda a, b, n: (0, n),
}  # fmt: skip
#: a cell that is no mention
NO_MENTION = {
    "null": None, "text": "Ann", "number": 3, "true": True, "empty list": [], "one number": [0], "four": [0, 1, 2, 3],
    "empty object": {}, "no end": {"start": 0}, "no start": {"end": 1}, "no indices": {"indices": []},
    "empty indices": {"indices": [[]]}, "text of indices": {"indices": "0"}, "indices of texts": {"indices": ["0"]},
    "gap in indices": {"indices": [[0, 2]]}, "backward indices": {"indices": [1, 0]}, "twice": {"indices": [0, 0]},
    "index beyond": {"indices": [[99]]}, "negative index": {"indices": [[-1]]}, "name alone": ["Ann", "Q1", []],
    "type is a number": {"start": 0, "end": 2, "type": 7}, "type is blank": {"start": 0, "end": 2, "type": " "},
    "type is a list": [0, 2, ["X"]], "other text": {"start": 0, "end": 2, "text": "Bob"},
    "other name": ["Bob Lee", "Q1", [[0, 1]]], "other text and indices": {"text": "Lee", "indices": [[0, 1]]},
}  # fmt: skip


def faulty_rows():
    """Yield the name of a fault and a row with it."""
    for notation, (text, mention) in NOTATIONS.items():
        of_tokens = isinstance(text, list)
        ends = dict(zip(("head", "tail"), GOOD[of_tokens], strict=True))
        row = {"text": text, "label": "x"} | {name: mention(*pair) for name, pair in ends.items()}
        for name in ends:
            for fault, change in FAULTS.items():
                yield f"{notation}, {name}: {fault}", row | {name: mention(*change(*ends[name], len(text)))}
        yield f"{notation}, the same mention twice", row | {"tail": row["head"]}
    row = {"text": TOKENS, "head": [0, 2], "tail": [3, 4], "label": "x"}
    for name in ("head", "tail"):
        for fault, cell in NO_MENTION.items():
            yield f"{name} is {fault}", row | {name: cell}
    for text in (" ", "", [], ["Ann", " "], 7, None, [1, 2, 3, 4], {"a": 1}):
        yield f"text is {text}", row | {"text": text}
    yield "blank mention", {"text": "Ann   left", "head": [3, 5], "tail": [6, 10], "label": "x"}
    yield "nested mentions", {"text": TEXT, "head": [0, 7], "tail": [4, 7], "label": "x"}


def test_each_faulty_mention_is_refused_with_its_line(tmp_path):
    faulty = list(faulty_rows())
    assert len(faulty) >= 200
    file = tmp_path / "bad.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for _, row in faulty))
    args = RelationDataArguments(train_file=str(file))
    built = PairBuilder(args, NAMES)({"train": read_rows(file, args, NAMES)})["train"]
    columns = SavedColumns(PretrainedConfig(), **COLUMNS)
    wrong = []
    entries = checked(built, NAMES._asdict(), check_row, (), args.max_chars)
    for number, (entry, (name, row)) in enumerate(zip(entries, faulty, strict=True), 1):
        if not isinstance(entry, Rejected):
            wrong.append(f"{name}: accepted")
        elif entry.place != f"{file}:{number}" or len(entry.problems) != 1 or ";" not in entry.problems[0]:
            wrong.append(f"{name}: {entry.place}: {entry.problems}")
        if None not in (row["head"], row["tail"]) and not list(predict.check_row(row, columns, finds=True)):
            wrong.append(f"{name}: predict accepts it")
    assert not wrong, f"{len(wrong)} of {len(faulty)}:\n" + "\n".join(wrong)


def test_valid_notations_are_the_same_pair():
    pairs = {
        read_pair(text, *(mention(*ends) for ends in GOOD[isinstance(text, list)]))
        for text, mention in NOTATIONS.values()
    }
    assert {(p.text, p.head.start, p.head.end, p.tail.start, p.tail.end) for p in pairs} == {(TEXT, 0, 7, 13, 17)}
    several = read_pair(TOKENS, {"text": "ann lee", "indices": [[0, 1], [3]]}, ["Oslo", "Q585", [[3]]])
    assert (several.head.end, several.tail.start) == (7, 13)
    with pytest.raises(Unusable, match=r"head \[0, 2\] is blank|does not lie|overlap"):
        read_pair("  x", [0, 2], [2, 3])


@pytest.mark.parametrize(
    ("label", "message"),
    [(True, "label is True"), (0.5, "label is 0.5"), (["a"], r"label is \['a'\]"), ({}, "label is {}")],
)
def test_labels_are_names_or_numbers(tmp_path, label, message):
    row = {"text": TEXT, "head": [0, 7], "tail": [13, 17], "label": "a"}
    with pytest.raises(InputError, match=rf"a.jsonl:2: {message}; needed: the name of a relation"):
        loaded(write_jsonl(tmp_path / "a.jsonl", [row, row | {"label": label}]))
    _, _, labels, _ = loaded(write_jsonl(tmp_path / "b.jsonl", [row | {"label": n} for n in (3, 12)]))
    assert labels == ["12", "3"]


@pytest.mark.parametrize("label", [None, "", "-", ...])
def test_rows_without_labels_are_an_error_or_dropped(tmp_path, capsys, label):
    row = {"text": TEXT, "head": [0, 7], "tail": [13, 17]}
    rows = [row | {"label": "a"}, row | ({} if label is ... else {"label": label}), row | {"label": "b"}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError, match=r"a.jsonl:2: no .*label.* --drop_unlabeled true"):
        loaded(file)
    assert loaded(file, drop_unlabeled=True)[0]["train"]["id"][:] == ["1", "3"]
    assert "a.jsonl: dropped 1 of 3 rows that lack their label" in capsys.readouterr().out


def test_rare_relations_and_unseen_types_are_warned_of(tmp_path, capsys):
    row = {"text": TEXT, "head": [0, 7, "PER"], "tail": [13, 17, "LOC"]}
    train = write_jsonl(tmp_path / "a.jsonl", [row | {"label": label} for label in "aaaaaab"])
    other = write_jsonl(tmp_path / "b.jsonl", [row | {"label": "A", "tail": [13, 17, "GPE"]}])
    load_pairs(RelationDataArguments(train_file=train, validation_file=other))
    warned = capsys.readouterr().err
    assert "relations of validation that training never sees and cannot learn: A" in warned
    assert "relations with fewer than 5 training rows, which are hard to learn: b (1)" in warned
    assert "'a' (6 rows) and 'A' (1 rows)" in warned
    assert "types of mentions that training never sees, marked as mentions without a type: GPE" in warned


# Corrupted files

BAD = [
    {
        "text": f"Ann {n} left Oslo, the café.",
        "label": "ab"[n % 2],
        "head": {"start": 0, "end": 3, "text": "Ann"},
        "id": str(n),
    }
    for n in range(12)
]
BAD = [row | {"tail": {"start": row["text"].index("Oslo"), "end": row["text"].index("Oslo") + 4}} for row in BAD]


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.soak)])
def test_every_corrupted_variant_is_read_as_it_stands_or_refused(tmp_path, no_hang, capsys, every):  # noqa: F811
    good = write_jsonl(tmp_path / "good.jsonl", BAD)
    file = tmp_path / "bad.jsonl"
    wrong, counts = [], {"read": 0, "refused": 0}
    for variant in list(variants(BAD))[::every]:
        file.write_bytes(variant.content)
        no_hang()
        try:
            data, *_ = load_pairs(RelationDataArguments(train_file=str(file), validation_file=good))
        except InputError as error:
            counts["refused"] += 1
            fault = check_refusal(error, file, variant.line)
            if str(error).startswith("label: "):  # a problem of all rows
                fault = None
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            counts["read"] += 1
            rows = [plain_row(json.loads(line), NAMES) for line in lines_of(variant.content)]
            held = [(read_pair(row["text"], row["head"], row["tail"]), str(row["label"]).strip()) for row in rows]
            same = [(p.text, p.head.start, p.tail.end, label) for p, label in held] == [
                (row["text"], row["head"]["start"], row["tail"]["end"], row["label"]) for row in data["train"]
            ]
            fault = None if same else "other rows than the file holds"
        if fault:
            wrong.append(f"{variant.name}: {fault}")
    capsys.readouterr()
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)
    assert counts["read"] >= 60 // every
    assert counts["refused"] >= 150 // every


def test_wrong_mentions_are_refused_and_right_ones_read():
    """150 of each kind: overlapping, empty, outside, of another text, and right; in characters and in tokens."""
    draw, found = random.Random(0), Counter()
    tokens = TEXT.split()
    while min(found[kind] for kind in ("overlapping", "empty", "outside", "unequal", "right")) < 150:
        words = draw.random() < 0.5
        size = len(tokens) if words else len(TEXT)
        a, b, c, d = (draw.randrange(-3, size + 4) for _ in range(4))
        mentions = [{"start": a, "end": b}, {"start": c, "end": d}]
        text = tokens if words else TEXT
        inside = all(0 <= m["start"] < m["end"] <= size for m in mentions)
        quoted = [" ".join(tokens[m["start"] : m["end"]]) if words else TEXT[m["start"] : m["end"]] for m in mentions]
        if inside and not all(part.strip() for part in quoted):
            continue  # blank mentions have a message of their own
        if not inside:
            kind = "empty" if any(m["start"] >= m["end"] for m in mentions) else "outside"
        elif max(a, c) < min(b, d):
            kind = "overlapping"
        else:
            kind = "unequal" if draw.random() < 0.6 else "right"
            if kind == "unequal":
                quoted[draw.randrange(2)] += draw.choice(["x", "-", "é", "s"])
            mentions = [m | {"text": part} for m, part in zip(mentions, quoted, strict=True)]
        found[kind] += 1
        told = list(check_row({"text": text, "head": mentions[0], "tail": mentions[1], "label": "a"}))
        assert bool(told) == (kind != "right"), (kind, text, mentions, told)
        if kind == "overlapping":
            assert told[0].startswith("head and tail overlap: ")
        assert all("; " in message for message in told), told  # each says what to do


@pytest.mark.parametrize("file", ["semeval.txt", "tacred.json", "fewrel.json"])
def test_corrupted_bytes_in_native_formats(tmp_path, no_hang, capsys, file):  # noqa: F811
    whole = write_jsonl(tmp_path / "good.jsonl", read_jsonl(FILES / "texts.jsonl"))
    bad, wrong = tmp_path / file, []
    for variant in [*of_bytes((FILES / file).read_bytes(), random.Random(2))][::2]:
        bad.write_bytes(variant.content)
        no_hang()
        try:
            load_pairs(RelationDataArguments(train_file=str(bad), validation_file=whole))
        except InputError as error:
            named = str(bad) in str(error) or str(error).startswith("label: ")
            fault = None if named else str(error)[:200]
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            fault = None
        if fault:
            wrong.append(f"{variant.name}: {fault}")
    assert not wrong, "\n".join(wrong)


def test_a_text_in_a_table_may_begin_with_a_bracket(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text('text,head,tail,label\n"[Reuters] Ada Bell left Oslo.","[10, 18]","[24, 28]",left\n')
    ((_, row),) = read_rows(str(file), RelationDataArguments(train_file=str(file)), NAMES)
    pair = read_pair(*(plain_row(row, NAMES)[name] for name in ("text", "head", "tail")))
    assert pair.text == "[Reuters] Ada Bell left Oslo."
    assert pair.text[pair.head.start : pair.head.end] == "Ada Bell"
    assert pair.text[pair.tail.start : pair.tail.end] == "Oslo"
    file.write_text('text,head,tail,label\n"[""Ada"", ""left""]","[0, 1]","[1, 2]",left\n')
    ((_, row),) = read_rows(str(file), RelationDataArguments(train_file=str(file)), NAMES)
    assert plain_row(row, NAMES)["text"] == ["Ada", "left"]


def test_no_text_is_in_both_training_and_validation_rows(tmp_path):
    texts = [f"Ada{n} met Bob{n} ." for n in range(40)]
    rows = [
        {"text": text, "head": [0, text.index(" ")], "tail": [text.index("Bob"), len(text) - 2], "label": label}
        for text in texts
        for label in ("met", "other")
    ]
    args = RelationDataArguments(train_file=write_jsonl(tmp_path / "train.jsonl", rows), test_file=None)
    data = load_pairs(args)[0]
    assert len(data["validation"]) > 1
    assert not set(data["train"]["text"][:]) & set(data["validation"]["text"][:])
