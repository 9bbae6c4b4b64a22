"""Test that files of annotation tools and all tagging schemes become words with the right tags."""

import json

import pytest
from transformers import PretrainedConfig

from common.data.columns import Columns as SavedColumns
from common.data.words import split_words
from common.errors import InputError
from recipes.ner.annotations import Span
from recipes.ner.arguments import NerDataArguments
from recipes.ner.conll import BY_CONTENT, Columns
from recipes.ner.predict import check_row, in_columns, text_of, with_entities
from recipes.ner.reading import file_reader, load_tagged
from recipes.ner.schemes import IOB2, Scheme, recognise
from recipes.ner.spans import align
from tests.conftest import ROOT, write_jsonl

FILES = ROOT / "tests" / "formats" / "ner"
MARA = (["Mara", "Olsen", "moved", "to", "Oslo", "."], ["B-PER", "I-PER", "O", "O", "B-LOC", "O"])
NOBODY = (["Nobody", "called", "."], ["O", "O", "O"])


def loaded(file, **arguments):
    """Return words and tags of each row, as training gets them."""
    path = str(FILES / file)
    data, *_ = load_tagged(NerDataArguments(train_file=path, validation_file=path, **arguments))
    return [(row["tokens"], row["ner_tags"]) for row in data["train"]]


def test_a_carved_validation_split_shares_no_sentence(tmp_path):
    rows = [{"tokens": ["Mara", str(n // 3)], "ner_tags": ["B-PER", "O"]} for n in range(60)]
    data, *_ = load_tagged(NerDataArguments(train_file=write_jsonl(tmp_path / "t.jsonl", rows)))
    assert len(data["validation"]) == 6
    assert not {*map(tuple, data["validation"]["tokens"])} & {*map(tuple, data["train"]["tokens"])}


def test_files_of_annotation_tools_become_words_with_tags(capsys):
    for file in ("doccano_relations.jsonl", "label_studio_min.json", "spacy.json", "spacy_annotator.json"):
        assert loaded(file) == [MARA, NOBODY], file
    assert capsys.readouterr().out == ""

    bank = ["The", "Bank", "of", "Norway", "🏦", "hired", "Ida", "."]
    assert loaded("doccano.jsonl") == [MARA, NOBODY, (bank, ["O", "B-ORG", "I-ORG", "I-ORG", "O", "O", "B-PER", "O"])]
    assert loaded("doccano.jsonl", text_column_name="text", label_column_name="label")[0] == MARA
    told = capsys.readouterr().out
    assert "doccano.jsonl: spans inside a longer span, which alone is kept: 1 (doccano.jsonl:3 'Norway' LOC)" in told

    words, tags = MARA
    assert loaded("label_studio.json") == [([*words[:4], "🏦", *words[4:]], [*tags[:4], "O", *tags[4:]]), NOBODY]
    assert (
        "rows left out, because the Label Studio task has no annotation: 1 (label_studio.json, row 2)"
        in capsys.readouterr().out
    )

    assert loaded("cluener.jsonl")[0] == (list("马云在杭州"), ["B-name", "I-name", "O", "B-address", "I-address"])
    assert loaded("gliner.json") == [MARA, NOBODY]
    assert loaded("prodigy.jsonl") == [([*words[:5], "-", "Sentrum", "."], [*tags[:5], "O", "O", "O"]), NOBODY]
    assert "rows left out, because Prodigy's answer is ignore: 1 " in capsys.readouterr().out


def test_brat_folders_are_read_with_discontinuous_and_overlapping_spans_counted(tmp_path, capsys):
    poles = ["The", "South", "and", "North", "Poles", "are", "cold", "."]
    expected = [*MARA[1], "O", "B-LOC", "I-LOC", "I-LOC", "I-LOC", "O", "O", "O"]
    assert loaded("brat") == [([*MARA[0], *poles], expected), NOBODY]
    told = capsys.readouterr().out
    assert "spans of several parts, which become one from first to last: 1 (doc-1.txt" in told
    assert "spans inside a longer span, which alone is kept: 1 (doc-1.txt" in told  # North\nPoles is one piece

    (tmp_path / "a.txt").write_bytes(b"Hei\r\nMara bor her.\r\n")
    (tmp_path / "a.ann").write_text("T1\tPER 4 8\tMara\n", encoding="utf-8")  # counts a line end as one character
    assert loaded(tmp_path)[0] == (["Hei", "Mara", "bor", "her", "."], ["O", "B-PER", "O", "O", "O"])
    (tmp_path / "a.ann").write_text("T1\tPER 3 8\tMara\nT2 PER 4 8 Mara\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.ann:2: no annotation of brat"):
        loaded(tmp_path)
    (tmp_path / "a.ann").write_text("T1\tPER 3 7\tMara\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.txt: span \[3, 7\] PER says 'Mara', but the text has"):
        loaded(tmp_path)
    (tmp_path / "a.ann").unlink()
    with pytest.raises(InputError, match=r"is a folder without \.ann files of brat"):
        loaded(tmp_path)


def test_spans_cut_words_and_what_does_not_fit_is_counted_or_refused(tmp_path, capsys):
    text = "Olsens in Oslo-West. "
    spans = [[0, 5, "PER"], [9, 15, "LOC"], [10, 14, "ORG"], [12, 19, "ORG"], [20, 21, "LOC"], [10, 14, "LOC"]]
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "labels": spans}, {"text": "b c", "labels": []}])
    assert loaded(file)[0] == (["Olsen", "s", "in", "Os", "lo-West", "."], ["B-PER", "O", "O", "O", "B-ORG", "O"])
    told = capsys.readouterr().out
    for line in (
        "spans that start or end inside a word, which is cut there: 2 (a.jsonl:1 'Olsen' PER; a.jsonl:1 'lo-West' ORG)",
        "spans of blanks, which are dropped: 1 ",
        "spans with a blank at an end, which is left out: 1 ",
        "spans that overlap a longer or earlier span, which alone is kept: 3 ",
    ):
        assert line in told
    wrong = {
        "does not lie in the text of 3 characters": {"text": "b c", "labels": [[1, 4, "X"]]},
        "start must be below end": {"text": "b c", "labels": [[2, 2, "X"]]},
        "has the label None; needed: a text": {"text": "b c", "labels": [[0, 1, None]]},
        "says 'c', but the text has 'b' there": {
            "text": "b c",
            "spans": [{"start": 0, "end": 1, "label": "X", "text": "c"}],
        },
    }
    for message, row in wrong.items():
        file = write_jsonl(tmp_path / "b.jsonl", [{"text": "b c", "labels": []}, row])
        with pytest.raises(InputError) as error:
            loaded(file)
        assert f"{file}:2: " in str(error.value)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "span", "words"),
    [
        ("他在北京工作", (2, 4), ["他", "在", "北", "京", "工", "作"]),
        ("ฉันอยู่กรุงเทพ", (7, 14), ["ฉั", "น", "อ", "ยู่", "ก", "รุ", "ง", "เ", "ท", "พ"]),
        ("서울에서 왔다", (0, 2), ["서울", "에서", "왔다"]),
        ("हिन्दी में", (0, 6), ["हिन्दी", "में"]),
        ("Wien.Heute", (5, 10), ["Wien.", "Heute"]),
    ],
)
def test_words_are_cut_so_that_spans_align(text, span, words):
    found, tags = align(text, [Span(*span, "X")])
    assert [text[start:end] for start, end in found] == words
    inside = [i for i, tag in enumerate(tags) if tag != "O"]
    assert (found[inside[0]][0], found[inside[-1]][1]) == span
    assert [tags[i] for i in inside] == ["B-X"] + ["I-X"] * (len(inside) - 1)


def test_long_texts_are_cut_into_sentences_that_keep_their_spans(tmp_path, capsys):
    sentence = "Dr. Mara went to St. Moritz! "
    text = sentence * 20
    spans = [[29 * i + 17, 29 * i + 28, "LOC"] for i in range(20)]  # with the exclamation mark
    spans[3] = [29 * 3 + 17, 29 * 4 + 3, "LOC"]  # into the next sentence
    file = write_jsonl(tmp_path / "a.jsonl", [{"id": "x", "text": text, "label": spans}])
    data, *_ = load_tagged(NerDataArguments(train_file=file, validation_file=file, max_seq_length=64))
    rows = list(data["train"])
    assert len(rows) == 19
    assert [row["id"] for row in rows[:2]] == ["x-1", "x-2"]
    words, tags = zip(*((row["tokens"], row["ner_tags"]) for row in rows), strict=True)
    assert sum(map(len, words)) == len(split_words(text))
    assert sum(tag == "B-LOC" for row in tags for tag in row) == 20
    assert "texts of more than 32 words, cut into 19 sentences: 1" in capsys.readouterr().out


SENTENCE = ["Anna", "visited", "New", "York", "City"]
TAGS = ["B-PER", "O", "B-LOC", "I-LOC", "I-LOC"]


def test_other_schemes_are_recognised_and_converted(capsys):
    assert loaded("bioes.conll") == [(SENTENCE, TAGS), (["Nobody", "called"], ["O", "O"])]
    assert "tags are BIOES: converted to IOB2" in capsys.readouterr().out
    assert loaded("bilou.conll") == [(SENTENCE, TAGS)]
    assert "tags are BILOU: converted to IOB2" in capsys.readouterr().out
    chinese = [
        (list("马云在杭州市"), ["B-NAME", "I-NAME", "O", "B-LOC", "I-LOC", "I-LOC"]),
        (["他", "好"], ["B-NAME", "O"]),
    ]
    assert loaded("bmes.bio") == chinese
    assert "tags are BMES: converted to IOB2" in capsys.readouterr().out
    names = ["Anna", "Bob", "visited", "New", "York"]
    assert loaded("iob1.conll") == [(names, ["B-PER", "B-PER", "O", "B-LOC", "I-LOC"])]
    told = capsys.readouterr().out
    assert "tags are IOB1: converted to IOB2" in told
    assert "columns 3 and 4 hold tags; the last is read (--conll_tag_column names another)" in told
    assert loaded("untyped.conll")[0][1] == ["B-ENTITY", "O", "B-ENTITY", "I-ENTITY"]
    assert "tags are IOB2 without types, which become ENTITY" in capsys.readouterr().out


def test_rows_with_lists_are_converted_as_files_of_columns(tmp_path):
    row = {"tokens": SENTENCE, "ner_tags": ["S_PER", "O", "B_LOC", "I_LOC", "E_LOC"]}
    assert loaded(write_jsonl(tmp_path / "a.jsonl", [row])) == [(SENTENCE, TAGS)]
    table = tmp_path / "a.csv"
    table.write_text("tokens,ner_tags\nAnna visited New York City,U-PER O B-LOC I-LOC L-LOC\n", encoding="utf-8")
    assert loaded(table) == [(SENTENCE, TAGS)]
    names = ["O,B-PER", "B-LOC", "I-LOC"]
    file = write_jsonl(tmp_path / "b.jsonl", [{"tokens": SENTENCE, "ner_tags": [1, 0, 2, 3, 3]}])
    assert loaded(file, label_names=names) == [(SENTENCE, TAGS)]
    table.write_text("tokens,ner_tags\nAnna visited New York City,1 0 2 3 3\n", encoding="utf-8")
    assert loaded(table, label_names=names) == [(SENTENCE, TAGS)]
    with pytest.raises(InputError, match=r"tag 1 is the number 1; needed: .* --label_names O,B-PER"):
        loaded(file)
    with pytest.raises(InputError, match=r"b\.jsonl:1: tag 3, but --label_names has 2 names"):
        loaded(file, label_names=names[:1])


@pytest.mark.parametrize(
    ("sentences", "scheme"),
    [
        ([["B-X", "I-X", "O"]], "iob2"),
        ([["O", "O"]], "iob2"),
        ([["I-X", "O"], ["I-X", "B-X", "O", "I-Y"]], "iob1"),
        ([["I-X", "O"], ["I-X", "O", "B-X"]], "iob2"),  # both are possible: the rows are refused
        ([["I-X", "O"], ["B-Y", "I-Y"]], "iob2"),  # one I can be a mistake
        ([["S-X", "O"]], "bioes"),
        ([["B-X", "I-X", "L-X"], ["U-Y"]], "bilou"),
        ([["B-X", "M-X", "E-X"]], "bmes"),
        ([["W-X", "B-X", "E-X"]], "bmes"),
        ([["NOUN", "VERB"], ["PUNCT"]], "none"),
        ([["NN", "VBZ", "."]], "none"),
    ],
)
def test_schemes_are_recognised(sentences, scheme):
    assert recognise(sentences) == Scheme(scheme)


def test_unclear_schemes_name_the_argument_that_decides(tmp_path):
    for tags in (["PER", "O", "LOC"], ["Nc", "Vm"], ["1", "0"]):
        with pytest.raises(InputError, match="give --tag_scheme none if each word has a tag of its own"):
            recognise([tags])
    with pytest.raises(InputError, match="start with B, E, I, M, which is no known scheme"):
        recognise([["B-X", "I-X", "M-X", "E-X"]])
    wrong = {
        "tag 2 is '0'; needed: the capital letter O": ["B-X", "0"],
        "tag 1 is 'b-X'; write B-X": ["b-X", "B-X"],
        "pass --repair_bio to repair all these tags, or --tag_scheme iob1": ["I-X", "B-X", "O", "B-X", "O", "I-X"],
        "tag 2 (O on 'w') comes before E-X, which BIOES does not allow": ["B-X", "O", "S-X"],
        "tag 1 (E-X on 'w') follows no B-X": ["E-X", "O"],
        "the end of the sentence comes before E-X": ["S-X", "B-X"],
    }
    for message, tags in wrong.items():
        file = write_jsonl(tmp_path / "a.jsonl", [{"tokens": ["w"] * len(tags), "ner_tags": tags}])
        with pytest.raises(InputError) as error:
            loaded(file)
        assert str(error.value).startswith(f"{file}:1: ")
        assert message in str(error.value)
    file = write_jsonl(tmp_path / "a.jsonl", [{"tokens": list("abcd"), "ner_tags": ["E-X", "O", "B-X", "S-X"]}])
    assert loaded(file, repair_bio=True) == [(list("abcd"), ["B-X", "O", "B-X", "B-X"])]
    assert loaded(file, tag_scheme="none") == [(list("abcd"), ["E-X", "O", "B-X", "S-X"])]


def test_columns_of_conll_files(tmp_path, capsys):
    with pytest.raises(
        InputError, match=r"germeval\.conll: columns 3 and 4 hold tags; choose one by --conll_tag_column 3"
    ):
        loaded("germeval.conll")
    german = ["Anna", "besuchte", "die", "Uni", "Wien"]
    outer = loaded("germeval.conll", conll_tag_column="3")
    assert outer == [(german, ["B-PER", "O", "O", "B-ORG", "I-ORG"]), (["Niemand", "rief"], ["O", "O"])]
    assert "column 1 is a running number; words are read from column 2" in capsys.readouterr().out
    inner = loaded("germeval.conll", conll_tag_column="4", conll_word_column="2")
    assert inner[0] == (german, ["O", "O", "O", "O", "B-LOC"])
    with pytest.raises(InputError, match="--conll_tag_column 7: lines have 4 columns"):
        loaded("germeval.conll", conll_tag_column="7")
    with pytest.raises(InputError, match=r"--conll_tag_column upos: no such column; only \.conllu and"):
        loaded("germeval.conll", conll_tag_column="upos")
    with pytest.raises(InputError, match="--conll_word_column 0: must be a number from 1"):
        loaded("germeval.conll", conll_word_column="0")

    assert loaded("multiconer.conll")[0] == (["anna", "visited", "#", "oslo"], ["B-PER", "O", "O", "B-LOC"])
    assert [row["id"] for _, row in file_reader(BY_CONTENT, ("a", "b"))(FILES / "multiconer.conll")] == [
        "5239d808-f300",
        "77ab",
    ]
    tweet = tmp_path / "tweet.conll"
    tweet.write_text("# a comment\n#Oslo B-LOC\nrocks O\n", encoding="utf-8")  # no other word has the tag B-LOC
    assert loaded(tweet) == [(["#Oslo", "rocks"], ["B-LOC", "O"])]
    assert predicted_rows(tweet, "# id 7\n#Oslo\nrocks\n") == [{"tokens": ["#Oslo", "rocks"], "id": "7"}]
    mit = tmp_path / "mit.conll"
    mit.write_text("B-ACTOR\tAnna\nO\tsings\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"column 1 holds BIO tags, .* --conll_tag_column 1 --conll_word_column 2"):
        loaded(mit)
    assert loaded(mit, conll_tag_column="1", conll_word_column="2")[0] == (["Anna", "sings"], ["B-ACTOR", "O"])
    lone = tmp_path / "lone.conll"
    lone.write_text("\n\n".join(["A B-X", "b O"] * 10), encoding="utf-8")
    with pytest.raises(InputError, match="each of the 20 sentences has one word"):
        loaded(lone)


def predicted_rows(path, text=None, **arguments):
    """Return the rows that predict reads."""
    if text is not None:
        path.write_text(text, encoding="utf-8")
    columns = Columns(arguments.pop("word", None), arguments.pop("tag", None))
    read = file_reader(columns, ("tokens", "ner_tags"), predicting=True, **arguments)
    return [row for _, row in read(path)]


def test_predict_needs_no_tags_in_conll_files_and_reads_the_columns_of_training(tmp_path):
    file = tmp_path / "a.conll"
    assert predicted_rows(FILES / "germeval.conll")[1] == {"tokens": ["Niemand", "rief"]}  # two columns can be the tag
    trained = {"word": "2", "tag": "4"}
    assert predicted_rows(FILES / "germeval.conll", **trained)[1]["ner_tags"] == ["O", "O"]
    assert predicted_rows(file, "1 Anna\n2 ran\n", **trained) == [{"tokens": ["Anna", "ran"]}]
    assert predicted_rows(file, "Anna\nran\n", **trained) == [{"tokens": ["Anna", "ran"]}]
    assert (
        "column 2 holds tags; name the column of the words" in predicted_rows(file, "Anna B-X\nran O\n", **trained)[0]
    )
    assert predicted_rows(file, "Anna B-X\n", tag="upos") == [{"tokens": ["Anna"]}]
    text = tmp_path / "a.txt"
    assert predicted_rows(text, "Anna NN\nran VB\n") == [{"text": "Anna NN"}, {"text": "ran VB"}]
    assert predicted_rows(text, labels={"NN", "VB"}) == [{"tokens": ["Anna", "ran"], "ner_tags": ["NN", "VB"]}]


def test_a_test_file_of_columns_may_have_words_alone(tmp_path):
    words, tagged = tmp_path / "words.txt", tmp_path / "tagged.conll"
    words.write_text("Anna\nran\n\nRome\n", encoding="utf-8")
    tagged.write_text("Anna B-PER\nran O\n\nRome B-LOC\n", encoding="utf-8")
    files = {"train_file": str(tagged), "validation_file": str(tagged)}
    unlabeled = load_tagged(NerDataArguments(**files, test_file=str(words)))[1]
    assert unlabeled["tokens"][:] == [["Anna", "ran"], ["Rome"]]
    with pytest.raises(InputError, match="each line has one column, a word without a tag"):
        loaded(words)
    tagged.write_text("Anna\nran\n\n" + "Rome B-LOC\n\n" * 3, encoding="utf-8")
    with pytest.raises(InputError, match="conll:1: 1 column, but most lines have 2") as error:
        loaded(tagged)
    assert len(str(error.value).splitlines()) == 2


def test_conll_columns_in_a_table_are_named_as_such(tmp_path):
    file = tmp_path / "germeval.tsv"
    file.write_text("# source 1\n1\tAnna\tB-PER\tO\n2\tran\tO\tO\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"germeval\.tsv:1: it looks like CoNLL columns.* in \.conll$"):
        loaded(file)


def test_parts_of_speech(capsys):
    with pytest.raises(InputError, match="give --conll_tag_column, such as upos; columns here: id, form, lemma, upos"):
        loaded("ud.conllu")
    words = ["Gib", "'s", "im", "Haus", "ab", "!"]
    assert loaded("ud.conllu", conll_tag_column="upos") == [
        (words, ["VERB", "PRON", "ADP", "NOUN", "ADP", "PUNCT"]),
        (["Ja"], ["INTJ"]),
    ]
    assert "are parts of speech: each word is scored by itself" in capsys.readouterr().out
    german = loaded("ud.conllu", conll_tag_column="xpos", tag_scheme="none")
    assert german[0][1] == ["VVIMP", "PPER", "APPRART", "NN", "PTKVZ", "$."]
    assert loaded("penn.conll") == [(["Anna", "smiled", "."], ["NNP", "VBD", "."])]


class _EachWord:
    """Give the first word of a text the tag B-X, and other words O."""

    def __call__(self, sentences):
        return [(["B-X"] + ["O"] * (len(words) - 1), [1.0] * len(words)) for words in sentences]

    @staticmethod
    def spans(tags):
        return [("X", 0, 1)] if tags else []


@pytest.mark.parametrize("file", sorted(path.name for path in FILES.iterdir()))
def test_predict_reads_what_training_reads(file):
    read = file_reader(BY_CONTENT, ("tokens", "ner_tags"), predicting=True)
    if file in ("germeval.conll", "ud.conllu"):
        pytest.skip("needs arguments")
    rows = [row for _, row in read(FILES / file)]
    assert rows
    assert [problem for row in rows for problem in check_row(row)] == []
    for row, found in zip(rows, with_entities(rows, _EachWord(), "found"), strict=True):
        assert {name: found[name] for name in row} == row
        assert found["found"][0]["start"] == 0
    json.dumps(rows)


KAGGLE = """Sentence #,Word,POS,Tag
Sentence: 1,Mara,NNP,B-PER
,Olsen,NNP,I-PER
,"moved, again",VBD,O
Sentence: 2,Nobody,NN,O
,called,VBD,O
"""


def test_a_table_with_a_word_in_each_row_becomes_sentences(tmp_path):
    file = tmp_path / "ner.csv"
    file.write_text(KAGGLE, encoding="utf-8")
    names = {"text_column_name": "Word", "label_column_name": "Tag", "sentence_column_name": "Sentence #"}
    expected = [(["Mara", "Olsen", "moved, again"], ["B-PER", "I-PER", "O"]), (["Nobody", "called"], ["O", "O"])]
    assert loaded(file, **names) == expected
    numbered = KAGGLE.replace("Sentence: 1", "1").replace("\n,", "\n1,", 2).replace("Sentence: 2", "2")
    file.write_text(numbered.replace("\n,", "\n2,"), encoding="utf-8")
    assert loaded(file, **names) == expected

    read = file_reader(BY_CONTENT, ("tokens", "ner_tags"), predicting=True, sentences="Sentence #")
    rows = [row for _, row in read(file)]
    assert rows[1] == {"Word": ["Nobody", "called"], "POS": ["NN", "VBD"], "Tag": ["O", "O"], "id": "2"}
    words = [{"id": n, "Sentence #": n // 2, "Word": f"w{n}", "Tag": "O"} for n in range(4)]
    by_word = write_jsonl(tmp_path / "words.jsonl", words)
    assert [(row["id"], row["Word"]) for _, row in read(by_word)] == [("0", ["w0", "w1"]), ("1", ["w2", "w3"])]
    other = write_jsonl(tmp_path / "a.jsonl", [{"text": "Mara left"}])
    assert [row for _, row in read(other)] == [{"text": "Mara left"}]

    with pytest.raises(InputError, match=r"ner\.csv:1: no column Sentence; columns here: Sentence #, Word, POS, Tag"):
        loaded(file, **names | {"sentence_column_name": "Sentence"})
    words = KAGGLE.replace('"moved, again"', "moved")
    file.write_text(words + words.split("\n", 1)[1], encoding="utf-8")
    with pytest.raises(InputError, match=r"ner\.csv:2: each of the 10 rows has one word; .* by --sentence_column_name"):
        loaded(file, text_column_name="Word", label_column_name="Tag")
    file.write_text(KAGGLE.replace("called", ""), encoding="utf-8")
    with pytest.raises(InputError, match=r"ner\.csv:5: token 2 is ''"):
        loaded(file, **names)


def test_predict_finds_the_training_column_in_a_task_of_label_studio():
    columns = SavedColumns(PretrainedConfig(columns={"tokens": {"name": "review"}}), tokens=("tokens",))
    row = {"id": 1, "data": {"title": "a", "review": "b c"}, "annotations": []}
    assert text_of(in_columns(row, columns)).text == "b c"


def test_a_text_file_of_tags_is_read_as_columns_by_predict(tmp_path):
    read = file_reader(BY_CONTENT, ("tokens", "ner_tags"), predicting=True)
    file = tmp_path / "a.txt"
    file.write_text("Anna B-PER\nleft O\n\nNobody O\n", encoding="utf-8")
    assert [row["tokens"] for _, row in read(file)] == [["Anna", "left"], ["Nobody"]]
    file.write_text("Anna left Oslo\n\nPlan B\n", encoding="utf-8")
    assert [row["text"] for _, row in read(file)] == ["Anna left Oslo", "Plan B"]
    assert IOB2.name == "iob2"
