"""Test translation as a user runs it: sample, pairs, languages, batches, resume, predict and bad input."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from sacrebleu.metrics import BLEU
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    ByT5Tokenizer,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    M2M100Tokenizer,
    MarianTokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PegasusTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    T5Tokenizer,
)

from common.data.columns import Columns
from common.data.files import read_file
from common.data.language_codes import Direction, direction, set_direction, target_id
from common.data.mapping import Splits
from common.data.sentences import joined, pieces
from common.errors import InputError, RunStopped
from common.models.decoding import finished_ids, generating, label_ids
from common.models.encoder_decoder import (
    Seq2SeqModelArguments,
    load_encoder_decoder,
    load_seq2seq_tokenizer,
    train_joint_tokenizer,
)
from common.speed import apply
from common.training.seq2seq import Seq2SeqTrainingArguments
from recipes.translation import predict, train
from recipes.translation.localisation import sample
from recipes.translation.pairs import check_row, check_splits, flatten, reader, swapped, upsampled
from recipes.translation.scoring import bleu_counts, bleu_of, bleu_of_counts, compare, scores
from tests.bad_inputs import lines_of, variants
from tests.common.data.test_bad_inputs import check_refusal, no_hang  # noqa: F401  (a fixture)
from tests.conftest import read_jsonl, write_jsonl
from tests.faults import Job
from tests.margins import assert_same_but_for_a_tie, assert_same_texts

#: dimensions of new models
SMALL = "d_model=64,encoder_ffn_dim=128,decoder_ffn_dim=128,encoder_attention_heads=2,decoder_attention_heads=2"

WIDER = "d_model=128,encoder_ffn_dim=256,decoder_ffn_dim=256,encoder_attention_heads=2,decoder_attention_heads=2"


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[dict]]:
    """Return the sample, generated once."""
    return sample()


def rows_of(rows: list[dict]) -> list[dict]:
    return [{"translation": row["translation"]} for row in rows]


@pytest.fixture
def small(pairs, tmp_path) -> dict[str, str]:
    """Return the first rows of the sample as files."""
    sizes = {"train": 96, "validation": 20, "test": 20}
    return {s: write_jsonl(tmp_path / f"{s}.jsonl", rows_of(pairs[s][:size])) for s, size in sizes.items()}


@pytest.fixture
def arguments(small, tmp_path) -> list[str]:
    """Return arguments of a training run of seconds."""
    files = [word for split, file in small.items() for word in (f"--{split}_file", file)]
    return [
        *files,
        *("--source_lang", "en", "--target_lang", "de", "--vocab_size", "400", "--config_overrides", SMALL),
        *("--dropout", "0", "--num_beams", "2"),
        *("--output_dir", str(tmp_path / "out"), "--precision", "fp32", "--num_train_epochs", "2"),
        *("--max_source_length", "64", "--max_target_length", "40", "--max_tokens_per_batch", "512"),
        *("--save_min_seconds", "0", "--disable_tqdm", "true"),
    ]


# Data


def test_the_sample_is_what_it_promises(pairs):
    assert sum(map(len, pairs.values())) >= 20_000
    assert min(len(pairs["validation"]), len(pairs["test"])) >= 300
    sources = [row["translation"]["en"] for rows in pairs.values() for row in rows]
    assert len(set(sources)) == len(sources)
    for rows in pairs.values():
        for row in rows:
            assert list(check_row({"translation": row["translation"]}, WAY)) == []
    kinds = {row["kind"] for row in pairs["train"]}
    assert kinds >= {"date", "time", "number", "currency", "unit", "territories", "languages", "relative", "months"}
    assert {row["held_out"] for row in pairs["test"]} == {"value", "pattern"}
    assert {row["held_out"] for row in pairs["train"]} == {"none"}
    found = {row["translation"]["en"]: row["translation"]["de"] for rows in pairs.values() for row in rows}
    assert found["France"] == "Frankreich"
    assert sample() == pairs


def parallel(tmp_path, source: str | bytes, target: str | bytes) -> list[str]:
    for name, text in (("t.en", source), ("t.de", target)):
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return ["--train_file", str(tmp_path / "t.en"), "--train_target_file", str(tmp_path / "t.de")]


LANGUAGES = ("--source_lang", "en", "--target_lang", "de")
WAY = [("en", "de")]


@pytest.mark.parametrize(
    ("source", "target", "where", "what"),
    [
        ("a\nb\nc\n", "A\nB\n", "t.en:3", "t.en has 3 lines and {}t.de 2"),
        ("a\nb\n", "A\nB\nC\nD\n", "t.de:3", "t.de has 4 lines and {}t.en 2"),
        ("a\n\nc\n", "A\nB\nC\n", "t.en:2", "en is empty"),
        ("a\nb\nc\n", "A\nB\n \n", "t.de:3", "no target (de); add it"),
        ("a\nb\n", b"A\n\xff\xfe\n", "t.de:2", "not UTF-8"),
    ],
)
def test_parallel_files_that_are_not_parallel_are_refused(tmp_path, source, target, where, what):
    files = parallel(tmp_path, source, target)
    with pytest.raises(InputError) as error:
        train.main([*files, *LANGUAGES, "--output_dir", str(tmp_path / "out")])
    assert str(error.value).startswith(f"{tmp_path}/{where}: ")
    assert what.format(f"{tmp_path}/") in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"translation": {"en": "a"}}, "no target (de); add it, remove the row, or pass --drop_unlabeled true"),
        ({"translation": {"en": "a", "fr": "b"}}, "translation lacks de; languages here: en, fr"),
        ({"translation": {"en": "a", "de": " "}}, "no target (de)"),
        ({"translation": {"en": ["a"], "de": "b"}}, "en must be a string, not list"),
        ({"translation": "a"}, "translation must be an object"),
        ({"en": "a"}, "no target (de)"),
        ({"translation": {"en": "a", "de": None}}, "no target (de)"),
        (
            {"translation": {"en": "a", "de": "b"}, "held_out": "copy"},
            "the group name copy is reserved for other scores",
        ),
    ],
)
def test_rows_that_cannot_be_translated_are_told_with_their_line(tmp_path, row, message):
    more = ["--group_column_name", "held_out"] if "held_out" in row else []
    file = write_jsonl(tmp_path / "t.jsonl", [{"translation": {"en": "a", "de": "b"}, "held_out": "x"}, row])
    with pytest.raises(InputError) as error:
        train.main(["--train_file", file, *LANGUAGES, "--output_dir", str(tmp_path / "out"), *more])
    assert f"{file}:2: {message}" in str(error.value)


def test_files_of_one_language_and_objects_in_cells(tmp_path):
    lines = "".join(f"the cat {number}\n" for number in range(6))
    files = parallel(tmp_path, lines, lines.replace("the cat", "die Katze"))
    named = dict(zip((name.removeprefix("--") for name in files[::2]), files[1::2], strict=True))
    (tmp_path / "other.en").write_text("a dog\n\nno dog\n", encoding="utf-8")
    languages = {"source_lang": "en", "target_lang": "de"}
    arguments = train.TranslationDataArguments(**named, **languages, test_file=str(tmp_path / "other.en"))
    assert arguments.load()[1]["text"][:] == ["a dog", "no dog"]
    with pytest.raises(InputError, match=r"t\.en: has lines of one language; add the others by --train_target_file"):
        train.TranslationDataArguments(train_file=files[1], **languages)
    several = train.TranslationDataArguments(train_file=str(tmp_path / "t.en"), pairs=["en-de", "de-en"])
    assert several.predict_arguments() == ["--source_lang", "en", "--target_lang", "de"]

    cells = ['{""en"": ""a"", ""de"": ""b""}', "{'en': 'a', 'de': 'b'}"]
    (tmp_path / "t.csv").write_text("translation\n" + "".join(f'"{cell}"\n' for cell in cells), encoding="utf-8")
    rows = [row for _, row in reader(WAY, {})(str(tmp_path / "t.csv"))]
    assert [row["translation"] for row in rows] == [{"en": "a", "de": "b"}] * 2
    row = next(read_file(tmp_path / "t.csv"))[1]
    assert predict.source_of(row, Columns(PretrainedConfig(), source=("text",)), "en") == "a"


def test_the_three_forms_of_rows_are_the_same_data(pairs, tmp_path, arguments):
    rows = [row["translation"] for row in pairs["train"][:30]]
    (tmp_path / "t.csv").write_text("en,de\n" + "".join(f'"{r["en"]}","{r["de"]}"\n' for r in rows), encoding="utf-8")
    other = [{"quelle": r["en"], "ziel": r["de"], "translation": 7} for r in rows]
    forms = [
        parallel(tmp_path, *("".join(r[name] + "\n" for r in rows) for name in ("en", "de"))),
        ["--train_file", str(tmp_path / "t.csv")],
        ["--train_file", write_jsonl(tmp_path / "t.jsonl", [{"translation": r | {"fr": 1}} for r in rows])],
    ]
    hashes = []
    more = ["--validation_file", arguments[3], *LANGUAGES, "--max_steps", "1", "--vocab_size", "300"]
    more += ["--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true", "--max_eval_samples", "1"]
    for number, form in enumerate(forms):
        out = tmp_path / str(number)
        train.main([*form, *more, "--output_dir", str(out), "--num_beams", "1", "--max_target_length", "8"])
        hashes.append(json.loads((out / "run.json").read_text())["rows"]["train"])
    assert len(set(hashes)) == 1
    data_args = train.TranslationDataArguments(
        train_file=write_jsonl(tmp_path / "o.jsonl", other), source_column_name="quelle",
        target_column_name="ziel", source_lang="en", target_lang="de",
    )  # fmt: skip
    assert data_args.columns() == {"source": "quelle", "target": "ziel"}


@pytest.mark.parametrize(
    ("languages", "source", "target", "reason"),
    [
        (("en", "de"), "the cat is on the mat and it was", "die Katze ist nicht auf der Matte und das", None),
        (("en", "de"), "die Katze ist nicht auf der Matte", "the cat is on the mat and it was", "frequent words"),
        (("eng_Latn", "deu_Latn"), "die Katze ist nicht auf der Matte", "the cat is on the mat", "frequent words"),
        (("en", "ru"), "кошка сидит", "the cat sits", "Cyrillic"),
        (("en", "ru"), "the cat sits", "кошка сидит", None),
        (("ja", "en"), "the cat", "猫がいます", "Latin"),
        (("en", "xx"), "die Katze", "the cat", None),
    ],
)
def test_swapped_languages_are_noticed(languages, source, target, reason):
    rows = Dataset.from_dict({"source": [source] * 20, "target": [target] * 20})
    found = swapped(rows, *languages)
    assert (reason in found) if reason else (found is None)


def test_identical_sides_are_counted_and_swapped_ones_warned_of(tmp_path, capsys):
    rows = [{"source": "das ist nicht die Katze", "target": "this is not the cat"}] * 8
    rows += [{"source": "OK", "target": "OK"}] * 2
    data = DatasetDict(train=Dataset.from_list([row | {"pair": "en-de"} for row in rows]))
    check_splits(data, WAY)
    printed = capsys.readouterr()
    assert "train: 2 of 10 rows have the same text on both sides" in printed.out
    assert "warning: train: en and de seem to be swapped" in printed.err


BAD = [{"translation": {"en": f"The {n} cat", "de": f"Die {n}. Katze"}, "id": str(n)} for n in range(12)]


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.soak)])
def test_every_corrupted_variant_trains_as_it_stands_or_is_refused(tmp_path, no_hang, capsys, every):  # noqa: F811
    flat = [{"en": row["translation"]["en"], "de": row["translation"]["de"]} for row in BAD]
    good = write_jsonl(tmp_path / "good.jsonl", BAD)
    file = tmp_path / "bad.jsonl"
    wrong, counts = [], {"read": 0, "refused": 0}
    for variant in [*variants(BAD), *variants(flat, seed=1)][::every]:
        file.write_bytes(variant.content)
        no_hang()
        args = train.TranslationDataArguments(
            train_file=str(file), validation_file=good, source_lang="en", target_lang="de"
        )
        try:
            data, _ = args.load()
        except InputError as error:
            counts["refused"] += 1
            fault = check_refusal(error, file, variant.line)
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            counts["read"] += 1
            lines = [json.loads(line) for line in lines_of(variant.content)]
            texts = [row.get("translation", row) for row in lines]
            same = [(r["en"], r["de"]) for r in texts] == list(
                zip(data["train"]["source"], data["train"]["target"], strict=True)
            )
            fault = None if same else "other rows than the file holds"
        if fault:
            wrong.append(f"{variant.name}: {fault}")
    capsys.readouterr()
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)
    assert counts["read"] >= 60 // every
    assert counts["refused"] >= 150 // every


# Tokens


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_trained_tokenizer_gives_back_every_text(pairs, kind, tmp_path):
    args = Seq2SeqModelArguments(tokenizer_train=kind, vocab_size=500)
    texts = [text for row in pairs["train"][:500] for text in row["translation"].values()]
    tokenizer = train_joint_tokenizer(args, texts)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) <= 500
    for text in [*texts[:200], "Ünïcode 東京 \U0001f600 a  b", "1,234.50 m² – “x”"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip() == text
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("4711 and 12")["input_ids"])
    assert all(sum(c.isdigit() for c in piece) <= 1 for piece in pieces)


def test_encode_by_hand(pairs):
    texts = [text for row in pairs["train"][:200] for text in row["translation"].values()]
    tokenizer = train_joint_tokenizer(Seq2SeqModelArguments(vocab_size=400), texts)
    rows = {"source": ["May 5", "1 2 3 4 5 6 7 8"], "target": ["5. Mai", "x"], "pair": ["en-de"] * 2}
    way = {"en-de": Direction("en", "de", source_prefix="to German: ")}
    found = train.encode(rows, tokenizer, way, (30, 6))
    plain = [tokenizer("to German: " + text)["input_ids"] for text in rows["source"]]
    assert found["input_ids"][0] == plain[0]
    assert found["labels"][1] == tokenizer("x")["input_ids"]
    assert found["cut"] == [len(plain[0]) > 30 or len(tokenizer("5. Mai")["input_ids"]) > 6, len(plain[1]) > 30]
    cut = train.encode(rows, tokenizer, {"en-de": Direction("en", "de")}, (5, 3))
    assert [len(ids) for ids in cut["input_ids"]] == [min(5, len(tokenizer(t)["input_ids"])) for t in rows["source"]]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in cut["input_ids"] + cut["labels"])
    assert cut["cut"][1]


def test_generated_rows_end_where_they_end_and_never_hold_minus_100():
    ids, ended = finished_ids(np.array([1, 7, 8, 1, 0, -100, -100]), eos=1)
    assert (ids, ended) == ([7, 8], True)
    ids, ended = finished_ids(np.array([1, 7, 8, 9, -100]), eos=1)
    assert (ids, ended) == ([7, 8, 9], False)
    assert finished_ids(np.array([1, 5, 7, 1]), eos=1, forced={5}) == ([7], True)


def test_pieces_of_a_document_join_to_it():
    text = (
        'He said "Go." Dr. Smith left at 3.14! Yes?\n\n  A line, with a comma, and words that go on.\n日本語です。次。'
    )
    for longest in (1, 8, 20, 45, 1000):
        cut = pieces(text, lambda piece, n=longest: len(piece) <= n)
        assert joined([piece for piece, _ in cut], cut) == text
        assert all(len(piece) <= longest for piece, _ in cut)
    assert [piece for piece, _ in pieces("One here. Two here. Dr. No is three.", lambda piece: len(piece) < 20)] == [
        "One here.", "Two here.", "Dr. No is three.",
    ]  # fmt: skip
    assert pieces("One. Two.\n", lambda piece: True) == [("One. Two.", "\n")]
    read = []  # characters that each test of a piece's length reads
    assert len(pieces("x" * 100_000, lambda piece: read.append(len(piece)) or len(piece) <= 100)) > 1000
    assert sum(read) < 20 * 100_000


# Scores


def test_scores_are_those_of_sacrebleu_and_the_bootstrap_tells_chance_from_difference():
    gold = [f"the cat number {n} sat on the mat" for n in range(60)]
    noisy = [text.replace("cat", "dog") if n % 3 else text for n, text in enumerate(gold)]
    bleu = bleu_of("de", "auto")
    assert scores(bleu, noisy, gold)["bleu"] == BLEU().corpus_score(noisy, [gold]).score
    assert scores(bleu, gold, gold) == {
        "bleu": pytest.approx(100),
        "chrf": 100,
        "exact": 1,
        "length_ratio": 1,
        "ter": 0,
    }
    assert compare(bleu, noisy, gold, gold)["compared_p"] < 0.01
    assert compare(bleu, gold, gold, gold)["compared_p"] == 1
    for predicted in (noisy, noisy[:1], ["a b c"] * 60):
        counts = bleu_counts(bleu, predicted, gold[: len(predicted)])
        assert bleu_of_counts(bleu, counts) == pytest.approx(
            bleu.corpus_score(predicted, [gold[: len(predicted)]]).score
        )
    assert bleu_of("zh", "auto").get_signature is not None


# Training


def assert_as_reported(found: Path, report: list[dict], out: Path, target: str = "de") -> None:
    """Assert that predict repeats the translations in `report`, from the run that saved `out`."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    (way,) = [Direction(**way) for way in model.config.translation if way["target_lang"] == target]
    set_direction(tokenizer, model, way)
    texts = [[row["predicted"] for row in rows] for rows in (read_jsonl(found), report)]
    assert_same_texts(*texts, [way.source_prefix + row["source"] for row in report], model, tokenizer)


def results(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


def test_a_run_leaves_results_and_the_saved_model_gives_the_scores_of_the_report(arguments, small, tmp_path, capsys):
    metrics = train.main([*arguments, "--num_train_epochs", "4", "--num_beams", "1"])
    out = tmp_path / "out"
    assert results(out)["test_bleu"] == metrics["test_bleu"]
    assert results(out)["test_hit_max_length"] == metrics["test_hit_max_length"]
    assert metrics["test_copy_bleu"] > 0
    signature = json.loads((out / "run.json").read_text())["signatures"]["bleu"]
    assert "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" in signature
    printed = capsys.readouterr().out
    assert "source, copied" in printed
    assert "Lowest chrF" in (out / "samples_test.html").read_text(encoding="utf-8")
    assert (out / "curve.png").stat().st_size > 5000
    assert f"| bleu | {metrics['test_bleu']:.4f} |" in (out / "README.md").read_text()
    rows = read_jsonl(out / "predictions_test.jsonl")
    gold = [row["translation"] for row in read_jsonl(Path(small["test"]))]
    assert [(row["source"], row["target"]) for row in rows] == [(row["en"], row["de"]) for row in gold]

    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    alone = []
    for row in rows:  # one by one: the result must not depend on order or padding of the evaluation
        ids = model.generate(**tokenizer([row["source"]], return_tensors="pt"))
        alone.append(tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip())
    predicted = [row["predicted"] for row in rows]
    assert_same_texts(alone, predicted, [row["source"] for row in rows], model, tokenizer)
    joined_by_spaces = [" ".join(text.split()) for text in predicted]
    expected = BLEU().corpus_score(joined_by_spaces, [[row["target"] for row in rows]]).score
    assert metrics["test_bleu"] == expected


ADAPTED = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_it_overfits_on_bleu_and_predict_translates_the_same(arguments, pairs, tmp_path, lora):
    file = write_jsonl(tmp_path / "few.jsonl", rows_of(pairs["train"][96:104]))
    out = tmp_path / "over"
    arguments[arguments.index("--config_overrides") + 1] = WIDER
    arguments += [w for s in ("train", "validation", "test") for w in (f"--{s}_file", file)]
    arguments += ["--eval_strategy", "no", "--save_strategy", "no", "--label_smoothing_factor", "0"]
    arguments += ["--weight_decay", "0", "--max_tokens_per_batch", "1024", "--learning_rate", "4e-3"]
    more = ["--num_train_epochs", "140"]
    if lora:
        begun = train.main([*arguments, "--num_train_epochs", "60"])  # the model to adapt
        assert begun["test_bleu"] < 60
        more = ["--num_train_epochs", "100", "--model_name_or_path", str(tmp_path / "out"), "--lora_r", "32"]
        more += ["--lora_dropout", "0", "--lora_target_modules", *ADAPTED]
        at = arguments.index("--vocab_size")
        arguments[at : at + 6] = []
    metrics = train.main([*arguments, *more, "--output_dir", str(out)])
    assert metrics["test_bleu"] > 90
    assert metrics["test_hit_max_length"] == 0
    report = read_jsonl(out / "predictions_test.jsonl")
    predict.main(["--model", str(out), "--input", file, "--output", str(tmp_path / "p.jsonl"), "--precision", "fp32"])
    found = read_jsonl(tmp_path / "p.jsonl")
    assert [row["predicted"] for row in found] == [row["predicted"] for row in report]
    assert all(row["pieces"] == 1 and row["ended"] and row["score"] <= 0 for row in found)
    assert (out / "adapter").exists() == lora
    if lora:
        base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
        ids = torch.randint(5, 300, (2, 9))
        with torch.no_grad():
            inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
            unmerged = PeftModel.from_pretrained(base, out / "adapter").eval()(**inputs).logits
            merged = AutoModelForSeq2SeqLM.from_pretrained(out).eval()(**inputs).logits
        assert (merged - unmerged).abs().max() < 1e-3


def test_steps_do_not_depend_on_how_they_are_cut(arguments, tmp_path):
    sgd = ["--optim", "sgd", "--learning_rate", "0.1", "--logging_steps", "1", "--eval_strategy", "no"]
    for name, budget, accumulation in (("whole", 512, 1), ("cut", 128, 4)):
        train.main([
            *arguments, *sgd, "--output_dir", str(tmp_path / name), "--max_tokens_per_batch", str(budget),
            "--gradient_accumulation_steps", str(accumulation), "--num_beams", "1",
        ])  # fmt: skip
    logs = [json.loads((tmp_path / n / "trainer_state.json").read_text())["log_history"] for n in ("whole", "cut")]
    steps = [[(e["loss"], e["grad_norm"]) for e in log if "grad_norm" in e] for log in logs]
    assert len(steps[0]) == len(steps[1]) > 4
    for (loss, norm), (other_loss, other_norm) in zip(*steps, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert max((whole[k] - cut[k]).abs().max().item() for k in whole) < 1e-5


@pytest.mark.parametrize("way", ["budget", "rows", "pairs"])
def test_resumed_equals_uninterrupted_bit_for_bit(arguments, tmp_path, way):
    steps = ["--save_strategy", "steps", "--save_steps", "3", "--num_train_epochs", "3", "--eval_strategy", "no"]
    steps += ["--dropout", "0.1", "--num_beams", "1", "--save_total_limit", "20"]
    if way == "pairs":
        for name in ("--source_lang", "--target_lang"):
            del arguments[arguments.index(name) : arguments.index(name) + 2]
        steps += ["--pairs", "en-de", "de-en"]
    if way == "rows":
        steps += ["--max_tokens_per_batch", "0", "--per_device_train_batch_size", "16"]
    train.main([*arguments, *steps, "--output_dir", str(tmp_path / "whole")])
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    checkpoints = sorted((tmp_path / "cut").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    middle = len(checkpoints) // 2  # in the second epoch
    for path in checkpoints[middle + 1 :]:
        shutil.rmtree(path)
    (tmp_path / "cut" / ".lock").unlink()
    record = json.loads((tmp_path / "cut" / "run.json").read_text())
    (tmp_path / "cut" / "run.json").write_text(json.dumps(record | {"finished": None}))
    train.main([*arguments, *steps, "--output_dir", str(tmp_path / "cut"), "--resume_from_checkpoint", "true"])
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    assert results(tmp_path / "whole")["test_bleu"] == results(tmp_path / "cut")["test_bleu"]


def test_another_budget_cannot_be_resumed_unless_the_step_is_the_same(arguments, tmp_path):
    train.main([*arguments, "--num_beams", "1"])
    more = ["--resume_from_checkpoint", "true", "--num_beams", "1"]
    with pytest.raises(InputError, match="took 512 tokens a step and would now take 256 tokens"):
        train.main([*arguments, *more, "--max_tokens_per_batch", "256"])
    train.main([*arguments, *more, "--max_tokens_per_batch", "256", "--gradient_accumulation_steps", "2"])


@pytest.mark.soak
def test_two_processes_give_the_steps_and_scores_of_one(arguments, tmp_path):
    sgd = ["--optim", "sgd", "--learning_rate", "0.1", "--logging_steps", "1", "--max_predict_samples", "19"]
    sgd += ["--num_beams", "1"]
    halves = ["--max_tokens_per_batch", "256", "--per_device_eval_batch_size", "3"]
    halves += ["--output_dir", str(tmp_path / "two")]
    job = Job([*arguments, *sgd, *halves], tmp_path / "log", processes=2, main=train.main)
    job.succeeds()
    assert job.output.count("source, copied") == 1
    train.main([*arguments, *sgd, "--output_dir", str(tmp_path / "one")])
    two, one = tmp_path / "two", tmp_path / "one"
    names = ("test_bleu", "test_chrf", "test_ter", "eval_bleu", "test_hit_max_length")
    if assert_same_but_for_a_tie(*(read_jsonl(folder / "predictions_test.jsonl") for folder in (two, one))):
        assert [results(two)[name] for name in names] == [results(one)[name] for name in names]
    weights = [load_file(folder / "model.safetensors") for folder in (two, one)]
    assert max((weights[0][k] - weights[1][k]).abs().max().item() for k in weights[1]) < 1e-5


@pytest.mark.soak
def test_layers_left_out_at_random_train_under_two_processes(arguments, tmp_path):
    """Test a skipped layer, which has no gradient; DDP must look for unused parameters."""
    drops = ["--from_scratch", "tiny", "--config_overrides", f"{SMALL},encoder_layerdrop=0.5,decoder_layerdrop=0.5"]
    few = ["--max_steps", "6", "--eval_strategy", "no", "--save_strategy", "no", "--max_predict_samples", "4"]
    Job([*arguments, *drops, *few], tmp_path / "log", processes=2, main=train.main).succeeds()
    found = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert found["train_steps_per_second"] > 0
    assert "train_samples_per_second" not in found  # unknown under a token budget


def test_the_last_checkpoints_are_averaged(arguments, tmp_path):
    steps = ["--save_strategy", "steps", "--save_steps", "2", "--max_steps", "7", "--average_checkpoints", "3"]
    with pytest.raises(InputError, match="the run would save 2; train longer"):
        train.main([*arguments, "--average_checkpoints", "3"])
    more = ["--lr_scheduler_type", "inverse_sqrt", "--warmup_steps", "3", "--learning_rate", "4e-3"]
    more += [
        *steps,
        "--logging_steps",
        "1",
        "--eval_strategy",
        "no",
        "--num_beams",
        "1",
        "--label_smoothing_factor",
        "0",
    ]
    metrics = train.main([*arguments, *more])
    out = tmp_path / "out"
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    rates = [4e-3 * (n / 3 if n < 3 else (3 / n) ** 0.5) for n in range(7)]  # Vaswani et al. 2017, section 5.3
    assert [entry["learning_rate"] for entry in log if "loss" in entry] == pytest.approx(rates)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6", "checkpoint-7"]
    weights = [load_file(out / f"checkpoint-{n}" / "model.safetensors") for n in (4, 6, 7)]
    saved = load_file(out / "model.safetensors")
    assert saved.keys() == weights[0].keys()
    for name, value in saved.items():
        assert torch.allclose(value, sum(w[name].double() for w in weights).float() / 3, rtol=1e-6, atol=1e-8)
    assert not torch.equal(saved["model.shared.weight"], weights[2]["model.shared.weight"])
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.shared.weight
    row = read_jsonl(out / "predictions_test.jsonl")[0]
    ids = model.generate(**tokenizer([row["source"]], return_tensors="pt"))
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == row["predicted"]
    # too few checkpoints: the run is kept
    with pytest.raises(InputError, match=r"--average_checkpoints 5: .* has 3 checkpoints; save more often"):
        train.main([*arguments, *more[:-1], "0", "--average_checkpoints", "5", "--resume_from_checkpoint", "true"])
    again = train.main([*arguments, *more, "--resume_from_checkpoint", "true"])
    assert again["test_chrf"] == metrics["test_chrf"]
    # evaluate by steps, save a checkpoint each epoch
    few = ["--eval_strategy", "steps", "--eval_steps", "5", "--average_checkpoints", "2", "--num_beams", "1"]
    train.main([*arguments, *few, "--output_dir", str(tmp_path / "b")])
    assert len(list((tmp_path / "b").glob("checkpoint-*"))) == 2


def in_two_files(pairs: dict[str, list[dict]], folder: Path, languages=("de", "xx")) -> list[str]:
    """Write files of two pairs, the second with a quarter of the training rows; return arguments that name them."""
    for at, name in enumerate(languages):
        for split, size in (("train", 64 if at == 0 else 16), ("validation", 8), ("test", 8)):
            (folder / name).mkdir(exist_ok=True)
            texts = [row["translation"] for row in pairs[split][at * size : (at + 1) * size]]
            rows = [{"translation": {"en": t["en"], name: t["de"] if at == 0 else t["de"].upper()}} for t in texts]
            write_jsonl(folder / name / f"{split}.jsonl", rows)
    files = [w for s in ("train", "validation", "test") for w in (f"--{s}_file", str(folder / "*" / f"{s}.jsonl"))]
    return [*files, "--pairs", *(f"en-{name}" for name in languages)]


def without_data(arguments: list[str], *more: str) -> list[str]:
    """Return the arguments of a run without its files, its languages, and the names in `more`."""
    kept = list(arguments)
    for name in ("train_file", "validation_file", "test_file", "source_lang", "target_lang", *more):
        del kept[kept.index(f"--{name}") : kept.index(f"--{name}") + 2]
    return kept


def test_several_pairs_in_one_model(arguments, pairs, tmp_path, capsys):
    data = in_two_files(pairs, tmp_path)
    few = [*without_data(arguments), "--num_train_epochs", "3", "--eval_strategy", "no", "--num_beams", "1"]
    metrics = train.main([*few, *data, "--sampling_temperature", "5"])
    out = tmp_path / "out"
    printed = capsys.readouterr().out
    assert "train: 64 en-de, 16 en-xx" in printed
    assert "mean of the pairs" in printed
    of_pairs = [metrics[f"test_{pair}_chrf"] for pair in ("en-de", "en-xx")]
    assert metrics["test_chrf"] == pytest.approx(sum(of_pairs) / 2)
    assert metrics["test_en-xx_support"] == 8
    state = json.loads((out / "run.json").read_text())
    assert len([name for name in state["data"] if name.startswith("train_file")]) == 2
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("<2xx> May 5")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<2xx>"
    assert ids[1:] == tokenizer("May 5")["input_ids"]
    rows = read_jsonl(out / "predictions_test.jsonl")
    assert [row["pair"] for row in rows] == ["en-de"] * 8 + ["en-xx"] * 8
    for target, own in (("de", rows[:8]), ("xx", rows[8:])):
        source = write_jsonl(tmp_path / f"{target}.jsonl", [{"text": row["source"]} for row in own])
        command = ["--model", str(out), "--input", source, "--output", str(tmp_path / f"{target}.out")]
        with pytest.raises(InputError, match="matches several pairs of the model; choose one of: en-de, en-xx"):
            predict.main(command)
        with pytest.raises(InputError, match="--target_lang qq: the model was not trained on this pair"):
            predict.main([*command, "--target_lang", "qq"])
        predict.main([*command, "--target_lang", target, "--precision", "fp32"])
        assert_as_reported(tmp_path / f"{target}.out", own, out, target)
    for more, message in (
        (["--source_lang", "en"], "--pairs: names the languages already"),
        (["--compare_to", "x"], "--compare_to: works with one pair only"),
        (["--sampling_temperature", "0.5"], "must be at least 1"),
        (["--pairs", "en-de", "ende"], "--pairs ende: must be two languages"),
        (["--pairs", "en-de", "en-de"], "en-de: is repeated; name each pair once"),
        (["--pairs", "en-de", "en-xx", "en-fr"], "en-fr: no training row has both languages"),
        (
            ["--pairs", "fr-de", "fr-xx"],
            "translation lacks both languages of any of fr-de, fr-xx; languages here: de, en",
        ),
    ):
        with pytest.raises(InputError, match=message):
            train.main([*few, *data, "--output_dir", str(tmp_path / "b"), *more])


def test_a_language_that_is_null_is_missing(tmp_path):
    rows = [{"en": "a", "de": "b", "cs": None}, {"en": "c", "de": None, "cs": "d"}]
    Dataset.from_list([{"translation": row} for row in rows]).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(rows).to_parquet(tmp_path / "b.parquet")
    directions = [("en", "de"), ("en", "cs"), ("de", "en")]
    for name in "ab":
        found = [row for _, row in reader(directions, {})(str(tmp_path / f"{name}.parquet"))]
        assert not [fault for row in found for fault in check_row(row, directions)]
        data = flatten(Splits(train=Dataset.from_list([r | {"id": str(i)} for i, r in enumerate(found)])), directions)
        assert data["train"]["pair"][:] == ["en-de", "de-en", "en-cs"]
        assert data["train"]["target"][:] == ["b", "a", "d"]


def test_old_rows_stay_marked(tmp_path):
    rows = [{"translation": {"en": text, "de": text.upper()}} for text in "abcd"]
    files = {
        f"{name}_file": write_jsonl(tmp_path / f"{name}.jsonl", rows) for name in ("train", "validation", "replay")
    }
    data, _ = train.TranslationDataArguments(**files, source_lang="en", target_lang="de").load()
    assert data["train"]["old"][:] == [False] * 4 + [True] * 4


def test_a_carved_validation_split_shares_no_source(tmp_path):
    rows = [{"translation": {"en": f"a cat {n // 3}", "de": f"eine Katze, {n}"}} for n in range(60)]
    file = write_jsonl(tmp_path / "t.jsonl", rows)
    data, _ = train.TranslationDataArguments(train_file=file, source_lang="en", target_lang="de").load()
    assert len(data["validation"]) == 6
    assert not {*data["validation"]["source"]} & {*data["train"]["source"]}


def test_a_carved_validation_split_of_several_pairs_shares_no_source(tmp_path):
    rows = [{"translation": {"en": f"a cat {n // 2}", ("de", "cs")[n % 2]: f"Katze, {n}"}} for n in range(60)]
    file = write_jsonl(tmp_path / "t.jsonl", rows)
    data, _ = train.TranslationDataArguments(train_file=file, pairs=["en-de", "en-cs"]).load()
    assert len(data["validation"]) == 6
    assert not {*data["validation"]["source"]} & {*data["train"]["source"]}


def test_rare_pairs_are_drawn_more_often_by_temperature():
    pairs = ["a"] * 100 + ["b"] * 10 + ["c"] * 40
    assert upsampled(pairs, 1, 0).tolist() == list(range(150))
    for temperature, wanted in ((5, [100, 63, 83]), (1e9, [100, 100, 100])):  # 100 * 0.1 ** 0.2 = 63.1
        rows = upsampled(pairs, temperature, 0)
        assert [sum(pairs[i] == name for i in rows) for name in "abc"] == wanted
        times = np.bincount(rows, minlength=150)
        assert set(times[:100]) == {1}
        assert times[100:110].max() - times[100:110].min() <= 1
        assert times[110:].max() - times[110:].min() <= 1
    assert upsampled(pairs, 5, 0).tolist() == upsampled(pairs, 5, 0).tolist() != upsampled(pairs, 5, 1).tolist()


def test_evaluation_by_loss_alone_or_on_a_few_rows(arguments, tmp_path):
    train.main([*arguments, "--predict_with_generate", "false", "--metric_for_best_model", "loss"])
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    evaluations = [entry for entry in log if "eval_loss" in entry]
    assert len(evaluations) == 2
    assert not any("eval_bleu" in entry for entry in evaluations)
    assert results(tmp_path / "out")["eval_samples"] == 20
    train.main([*arguments, "--eval_generate_samples", "5", "--output_dir", str(tmp_path / "b")])
    log = json.loads((tmp_path / "b" / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in log if "eval_bleu" in entry and "eval_loss" not in entry]) == 2
    assert results(tmp_path / "b")["eval_samples"] == 20


@pytest.mark.soak
def test_bf16_saves_float32_and_generates_as_the_saved_model_does_in_bf16(arguments, tmp_path):
    train.main([*arguments, "--precision", "bf16", "--num_train_epochs", "12", "--num_beams", "1"])
    out = tmp_path / "out"
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.float32}
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    rows = read_jsonl(out / "predictions_test.jsonl")
    same = 0
    for row in rows:
        with torch.autocast("cpu", torch.bfloat16):
            ids = model.generate(**tokenizer([row["source"]], return_tensors="pt"))
        same += tokenizer.decode(ids[0], skip_special_tokens=True).strip() == row["predicted"]
    assert same >= 0.7 * len(rows)  # padding changes rounding, and this model has small margins


def test_generates_in_the_precision_asked_for(arguments, tmp_path):
    train.main([*arguments, "--num_beams", "1"])
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    seen = set()
    model.get_output_embeddings().register_forward_hook(lambda layer, args, output: seen.add(output.dtype))
    for asked, dtype in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (None, torch.float32)):
        seen.clear()
        with torch.no_grad(), generating(model, asked):
            model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3)
        assert seen == {dtype}


def test_predictions_of_another_run_are_compared(arguments, tmp_path):
    train.main([*arguments, "--num_beams", "1"])
    other = str(tmp_path / "out" / "predictions_test.jsonl")
    more = ["--num_beams", "1", "--num_train_epochs", "1", "--output_dir", str(tmp_path / "b")]
    metrics = train.main([*arguments, *more, "--compare_to", other])
    assert 0 < metrics["test_compared_p"] <= 1
    assert metrics["test_compared_bleu"] == pytest.approx(results(tmp_path / "out")["test_bleu"])
    rows = read_jsonl(Path(other))
    others = (
        (rows[1:], "has 19 rows"),
        ([{"a": 1}], ":1: lacks `target` or `predicted`"),
        (rows[::-1], ":1: belongs to another"),
    )
    for bad, message in others:
        file = write_jsonl(tmp_path / "other.jsonl", bad)
        with pytest.raises(InputError, match=message):
            train.main([*arguments, *more, "--compare_to", file])


def test_arguments_that_make_no_sense_are_refused(arguments, tmp_path):
    for more, message in (
        (["--max_tokens_per_batch", "32"], "a row may have 64 tokens"),
        (["--from_scratch", "tiny", "--model_name_or_path", "x/y"], "exclude each other"),
        (["--source_column_name", "a"], "give both"),
        (["--bleu_tokenize", "x"], "must be auto or one of"),
        (["--auto_find_batch_size", "true"], "counts rows, not tokens"),
        (["--metric_for_best_model", "bleau"], "did you mean bleu"),
        (["--predict_with_generate", "false"], "add --metric_for_best_model loss"),
        (["--test_target_file", str(tmp_path / "none")], "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            train.main([*arguments, *more])
    with pytest.raises(InputError, match="name both languages"):
        train.main(["--train_file", arguments[1]])


def test_a_loss_that_is_not_finite_stops_the_run(arguments):
    with pytest.raises(RunStopped, match="not a finite number; rows of"):
        train.main([*arguments, "--learning_rate", "1e30", "--max_grad_norm", "0", "--optim", "sgd"])


# Prediction


def test_predict_keeps_order_splits_documents_and_gives_the_n_best(arguments, tmp_path, capsys):
    train.main([*arguments, "--num_train_epochs", "6"])
    out = str(tmp_path / "out")
    document = "May 5, 1999.\n\n" + "On Monday we met 12 people. " * 30 + "The end, at last\n"
    rows = [{"text": "May 5", "n": 0}, {"text": document, "n": 1}, {"text": " ", "n": 2}, {"text": "x" * 500, "n": 3}]
    rows += [{"translation": {"en": f"{n} meters"}, "n": n} for n in range(4, 12)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    command = ["--model", out, "--input", source, "--precision", "fp32"]
    predict.main([*command, "--output", str(tmp_path / "a.jsonl"), "--n_best", "2"])
    found = read_jsonl(tmp_path / "a.jsonl")
    assert [{k: v for k, v in row.items() if k in ("text", "translation", "n")} for row in found] == rows
    assert [row["pieces"] for row in found[:1] + found[2:3] + found[4:]] == [1] * 10
    assert found[1]["pieces"] > 5
    assert found[1]["predicted"].count("\n") == 3
    assert found[3]["pieces"] > 2
    assert found[2]["predicted"] == " "  # unchanged
    empty = sum(not row["predicted"].strip() for row in found)
    assert f"a.jsonl, {empty} of them with an empty prediction" in capsys.readouterr().out
    for row in found:
        assert len(row["n_best"]) == 2
        assert row["n_best"][0]["predicted"] == row["predicted"]
    predict.main([*command, "--output", str(tmp_path / "b.jsonl"), "--buffer_rows", "2", "--batch_tokens", "1"])
    for row, other in zip(found, read_jsonl(tmp_path / "b.jsonl"), strict=True):
        assert row["predicted"] == other["predicted"]
        assert row["score"] == pytest.approx(other["score"], abs=2e-4)

    translator = predict.Translator(out, precision="fp32")
    (best,) = translator(["May 5"])
    model, tokenizer = translator.model, translator.tokenizer
    inputs = tokenizer("May 5", return_tensors="pt")
    with torch.no_grad():
        labels = model.generate(**inputs, **translator.search)[:, 1:]
        assert best[0]["score"] == pytest.approx(-model(**inputs, labels=labels).loss.item(), abs=2e-4)

    (tmp_path / "t.txt").write_text("May 5\nMay 6\n", encoding="utf-8")
    predict.main(["--model", out, "--input", str(tmp_path / "t.txt"), "--output", str(tmp_path / "c.jsonl")])
    assert [row["text"] for row in read_jsonl(tmp_path / "c.jsonl")] == ["May 5", "May 6"]
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "a"}, {"txt": "a"}, {"text": "a", "predicted": "b"}])
    with pytest.raises(InputError) as error:
        predict.main(["--model", out, "--input", bad, "--output", str(tmp_path / "d.jsonl")])
    assert [line.split(":")[1] for line in str(error.value).splitlines()] == ["2", "3"]
    with pytest.raises(InputError, match="exceeds the 2 beams of the search; give --num_beams 3"):
        predict.main([*command, "--output", str(tmp_path / "e.jsonl"), "--n_best", "3"])


# Families

TEXTS = ["The cat is here.", "Two cats sat on the mat.", "A dog was there with the cat."]
SIZES = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 128,
}  # fmt: skip


def spm(folder: Path, name: str) -> str:
    """Train a sentencepiece model of 60 pieces for the slow tokenizers."""
    folder.mkdir(exist_ok=True)
    corpus = folder.parent / "corpus.txt"
    corpus.write_text("\n".join(TEXTS * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "new"), vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    (folder / "new.model").rename(folder / name)
    (folder / "new.vocab").unlink()
    return str(folder / name)


def vocabulary(file: str, first: list[str]) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_file=file)
    there = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    return first + [piece for piece in there if piece not in first]


def family(name: str, folder: Path) -> None:
    """Save a tiny checkpoint of a family, with a tokenizer of the right class."""
    unigram = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    unigram += [(c, -3.0) for c in sorted({c for text in TEXTS for c in text if c != " "})]
    if name in ("mbart", "mbart50"):
        kind = MBartTokenizer if name == "mbart" else MBart50Tokenizer
        tokenizer = kind(vocab=unigram)
    elif name == "nllb":
        vocab = {piece: i for i, (piece, _) in enumerate(unigram)}
        tokenizer = NllbTokenizer(vocab=vocab, merges=[])
    elif name in ("t5", "mt5"):
        vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *unigram[4:]]
        tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    elif name == "byt5":
        tokenizer = ByT5Tokenizer()
    elif name == "pegasus":
        vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<mask_1>", 0.0), ("<mask_2>", 0.0), ("<unk>", 0.0), *unigram[4:]]
        tokenizer = PegasusTokenizer(vocab=vocab, offset=4)
    elif name in ("bart", "led"):
        model = Tokenizer(models.WordLevel({p: i for i, (p, _) in enumerate(unigram)}, unk_token="<unk>"))
        model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        ends = [("<s>", 0), ("</s>", 2)]
        model.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
        )
    elif name == "m2m_100":
        file = spm(folder, "sentencepiece.bpe.model")
        pieces = vocabulary(file, ["<s>", "<pad>", "</s>", "<unk>"])
        (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
        tokenizer = M2M100Tokenizer(str(folder / "vocab.json"), file)
    else:
        file = spm(folder, "source.spm")
        shutil.copy(file, folder / "target.spm")
        tags = [">>deu<<", ">>fra<<"] if name == "marian-multi" else []
        pieces = [*vocabulary(file, ["</s>", "<unk>", *tags]), "<pad>"]
        (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
        tokenizer = MarianTokenizer(str(folder / "source.spm"), str(folder / "target.spm"), str(folder / "vocab.json"))
    kind = {"mbart50": "mbart", "nllb": "m2m_100", "marian-multi": "marian", "byt5": "t5"}.get(name, name)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if kind in ("t5", "mt5"):
        sizes = {"d_model": 32, "d_kv": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "d_ff": 32}
        ids["decoder_start_token_id"] = tokenizer.pad_token_id
    else:
        sizes = SIZES
        if kind == "led":
            sizes = SIZES | {"attention_window": 8, "max_encoder_position_embeddings": 128}
            sizes = {k: v for k, v in sizes.items() if k != "max_position_embeddings"}
            sizes["max_decoder_position_embeddings"] = 64
        starts = tokenizer.pad_token_id if kind in ("marian", "pegasus") else tokenizer.eos_token_id
        ids["decoder_start_token_id"] = starts
    vocab = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1) + (128 if name == "m2m_100" else 0)
    config = AutoConfig.for_model(kind, vocab_size=vocab, **sizes, **ids)
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


FAMILIES = (
    "t5", "mt5", "byt5", "bart", "mbart", "mbart50", "nllb", "m2m_100", "marian", "marian-multi", "pegasus", "led"
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_told_the_languages_in_their_own_way(name, arguments, tmp_path):
    family(name, tmp_path / "base")
    file = write_jsonl(tmp_path / "f.jsonl", [{"translation": {"en": t, "de": t[::-1]}} for t in TEXTS * 4])
    at = arguments.index("--vocab_size")
    arguments[at : at + 6] = []
    for split in ("train", "validation", "test"):
        arguments[arguments.index(f"--{split}_file") + 1] = file
    base = ["--model_name_or_path", str(tmp_path / "base"), "--num_train_epochs", "1", "--num_beams", "1"]
    train.main([*arguments, *base])
    out = tmp_path / "out"
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForSeq2SeqLM.from_pretrained(out)
    way = direction(tokenizer, model, "en", "de")
    assert model.config.translation == [way.__dict__]
    set_direction(tokenizer, model, way)
    codes = {"mbart": "de_DE", "mbart50": "de_DE", "nllb": "deu_Latn", "m2m_100": "de"}
    prefixes = {"t5": "translate English to German: ", "marian-multi": ">>deu<< "}
    assert (way.target_code, way.source_prefix) == (codes.get(name, ""), prefixes.get(name, ""))
    source = tokenizer(way.source_prefix + "The cat")["input_ids"]
    target = tokenizer(text_target="The cat")["input_ids"]
    ids = model.generate(input_ids=torch.tensor([source]))[0]
    if name in codes:
        code = target_id(tokenizer, way.target_code)
        assert target_id(tokenizer, way.source_code) in source
        assert code in target
        assert ids[0 if name == "mbart" else 1] == code
    if name == "marian-multi":
        assert source[0] == tokenizer.get_vocab()[">>deu<<"]
    predict.main(["--model", str(out), "--input", file, "--output", str(tmp_path / "p.jsonl"), "--precision", "fp32"])
    assert_as_reported(tmp_path / "p.jsonl", read_jsonl(out / "predictions_test.jsonl"), out)


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "m2m_100", "marian-multi"])
def test_families_are_told_several_targets_row_by_row(name, arguments, pairs, tmp_path):
    family(name, tmp_path / "base")
    data = in_two_files(pairs, tmp_path, languages=("de", "fr"))
    few = without_data(arguments, "vocab_size", "config_overrides", "dropout")
    few += ["--model_name_or_path", str(tmp_path / "base"), "--max_steps", "4", "--eval_strategy", "no"]
    train.main([*few, *data, "--max_target_length", "12", "--max_source_length", "100", "--num_beams", "1"])
    out = tmp_path / "out"
    rows = read_jsonl(out / "predictions_test.jsonl")
    for target, own in (("de", rows[:8]), ("fr", rows[8:])):
        source = write_jsonl(tmp_path / f"{target}.jsonl", [{"text": row["source"]} for row in own])
        command = ["--model", str(out), "--input", source, "--output", str(tmp_path / f"{target}.out")]
        predict.main([*command, "--target_lang", target, "--precision", "fp32"])
        assert_as_reported(tmp_path / f"{target}.out", own, out, target)
    directions = AutoConfig.from_pretrained(out).translation
    told = {"t5": "translate English to French: ", "bart": "<2fr> ", "marian-multi": ">>fra<< "}
    assert directions[1]["source_prefix"] == told.get(name, "")
    assert directions[1]["target_code"] == {"mbart": "fr_XX", "m2m_100": "fr"}.get(name, "")


def test_languages_a_model_does_not_know_or_knows_twice_are_refused(tmp_path):
    family("nllb", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="--target_code: the model has several codes for 'zh'; give one of: zho_Han"):
        direction(tokenizer, model, "en", "zh")
    assert direction(tokenizer, model, "en", "zh", target_code="zho_Hans").target_code == "zho_Hans"
    with pytest.raises(InputError, match="--source_code: the model has no code for 'qq'"):
        direction(tokenizer, model, "qq", "de")


def test_a_model_without_decoder_and_arguments_of_another_kind_of_model_are_refused(tiny, arguments):
    with pytest.raises(InputError, match="--vocab_size: applies to new models only"):
        train.main([*arguments, "--model_name_or_path", tiny])
    at = arguments.index("--vocab_size")
    arguments[at : at + 4] = []
    with pytest.raises(InputError, match="add a decoder with --warm_start both"):
        train.main([*arguments, "--model_name_or_path", tiny])
    with pytest.raises(InputError, match="new weights need full training"):
        train.main([*arguments, "--model_name_or_path", tiny, "--warm_start", "both", "--lora_r", "4"])
    longer = ["--max_source_length", "200", "--max_tokens_per_batch", "0"]
    with pytest.raises(InputError, match="a source has at most 128 tokens; lower --max_source_length"):
        train.main([*arguments, "--model_name_or_path", tiny, "--warm_start", "both", *longer])


def test_a_model_made_of_two_has_the_kernel_that_their_dropout_wants(tiny, tmp_path):
    """Test the kernel of an encoder-decoder pair. SDPA with dropout keeps several copies of all scores."""
    tokenizer = load_seq2seq_tokenizer(tiny)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    own = BertConfig(vocab_size=len(tokenizer), **sizes)
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(own, own))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    training = Seq2SeqTrainingArguments(output_dir=str(tmp_path / "out"), precision="fp32")
    for dropout, kernel in ((None, "eager"), (0.0, "sdpa"), (0.2, "eager")):
        args = Seq2SeqModelArguments(model_name_or_path=str(tmp_path), attention_dropout=dropout)
        loaded = load_encoder_decoder(args, tokenizer, 512, 40)
        apply(loaded, training)
        for config in (loaded.model.encoder.config, loaded.model.decoder.config):
            assert config._attn_implementation == kernel
            assert config.attention_probs_dropout_prob == (0.1 if dropout is None else dropout)


def test_an_encoder_is_given_a_decoder(tiny, arguments, tmp_path, capfd):
    at = arguments.index("--vocab_size")
    arguments[at : at + 6] = []
    tokenizer = load_seq2seq_tokenizer(tiny)
    encoder = AutoModel.from_pretrained(tiny).state_dict()
    for how in ("both", "encoder"):
        args = Seq2SeqModelArguments(model_name_or_path=tiny, warm_start=how)
        model = load_encoder_decoder(args, tokenizer, 64, 40).model.state_dict()
        same = {k: torch.equal(v, model[f"decoder.bert.{k}"]) for k, v in encoder.items() if "pooler" not in k}
        assert all(torch.equal(v, model[f"encoder.{k}"]) for k, v in encoder.items())
        assert same["embeddings.word_embeddings.weight"]
        words = "embeddings.word_embeddings.weight"
        assert torch.equal(model["decoder.cls.predictions.decoder.weight"], encoder[words])
        drawn = [k for k, equal in same.items() if not equal]
        assert bool(drawn) == (how == "encoder")
        assert "decoder.bert.encoder.layer.0.crossattention.self.query.weight" in model
    arguments += ["--num_beams", "1"]
    train.main([*arguments, "--model_name_or_path", tiny, "--warm_start", "both", "--num_train_epochs", "1"])
    assert "missing keys" not in capfd.readouterr().err  # tied weights, when the best checkpoint is restored
    out = tmp_path / "out"
    saved = AutoModelForSeq2SeqLM.from_pretrained(out)
    source = read_jsonl(out / "predictions_test.jsonl")
    ids = saved.generate(**AutoTokenizer.from_pretrained(out)([source[0]["source"]], return_tensors="pt"))
    assert ids[0, 0] == tokenizer.cls_token_id
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == source[0]["predicted"]
    plain = tokenizer("a number", add_special_tokens=False)["input_ids"]
    labels = label_ids(tokenizer, ["a number"], saved.config.decoder_start_token_id)
    assert labels == [[*plain, tokenizer.sep_token_id]]
    labels = label_ids(tokenizer, ["a number"], saved.config.decoder_start_token_id, 2)
    assert labels == [[plain[0], tokenizer.sep_token_id]]
    file = arguments[arguments.index("--test_file") + 1]
    predict.main(["--model", str(out), "--input", file, "--output", str(tmp_path / "p.jsonl"), "--precision", "fp32"])
    assert_as_reported(tmp_path / "p.jsonl", source, out)
    # start from the model of this run
    train.main([*arguments, "--model_name_or_path", str(out), "--output_dir", str(tmp_path / "b"), "--max_steps", "1"])


def test_the_usage_in_the_model_card_runs(arguments, tmp_path, monkeypatch):
    train.main([*arguments, "--num_train_epochs", "1"])
    card = (tmp_path / "out" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    exec(code, {})  # the usage from the model card
