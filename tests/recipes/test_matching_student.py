"""Test `--teacher` of matching: the loss, the scores, new vocabularies, and models that sentence-transformers loads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import TranslationEvaluator
from sentence_transformers.sentence_transformer.losses import MSELoss
from transformers import AutoModel, AutoTokenizer

from common.errors import InputError
from recipes.matching import train
from recipes.matching.losses import translation_losses
from recipes.matching.transfer import row_statistics
from tests.conftest import ROOT, read_jsonl, write_jsonl
from tests.faults import Job, difference

SAMPLE = ROOT / "recipes" / "matching" / "sample"
NEW = ("--tokenizer_train", "wordpiece", "--vocab_size", "400")


def turned(text: str) -> str:
    """Return a text in another language: the same words with their letters turned around."""
    return " ".join(word[::-1] for word in text.split())


@pytest.fixture
def words(tiny, tmp_path):
    """Return arguments of a run on 24 translations, the teacher of which is a tiny model."""
    texts = [row["text"][:60] for row in read_jsonl(SAMPLE / "corpus.jsonl")[:24]]
    rows = [{"translation": {"en": text, "xx": turned(text), "de": None}} for text in texts]
    files = [
        w for s in ("train", "validation", "test") for w in (f"--{s}_file", write_jsonl(tmp_path / f"{s}.jsonl", rows))
    ]
    return [
        *files, "--text_column_name", "en", "--text_pair_column_name", "xx", "--model_name_or_path", tiny, "--teacher",
        tiny, "--output_dir", str(tmp_path / "out"), "--overwrite", "true", "--max_seq_length", "64", "--precision",
        "fp32", "--learning_rate", "2e-3", "--per_device_train_batch_size", "8", "--disable_tqdm", "true", "--use_cpu",
        "true", "--eval_strategy", "no", "--save_strategy", "no",
    ]  # fmt: skip


def test_the_loss_is_that_of_sentence_transformers():
    torch.manual_seed(0)
    one, other, gold = torch.randn(5, 8), torch.randn(5, 8), torch.randn(9, 8)
    rows = torch.tensor([3, 0, 8, 4, 1])
    theirs = MSELoss(torch.nn.Identity()).compute_loss_from_embeddings([one, other], [gold[rows]] * 2)
    ours = translation_losses(torch.cat([one, other]), rows, 0.0, gold.numpy())
    assert ours.mean().item() == pytest.approx(theirs.item() * 2 * 8, rel=1e-5)
    rows[2] = -100
    assert translation_losses(torch.cat([one, other]), rows, 0.0, gold.numpy())[2] == 0


def test_a_student_with_a_new_vocabulary_finds_translations(words, tiny, tmp_path, capsys):
    metrics = train.main([*words, *NEW, "--num_train_epochs", "40"])
    assert metrics["test_accuracy"] > 0.95
    assert metrics["test_accuracy"] > max(metrics["test_teacher_accuracy"], metrics["test_frozen_accuracy"])
    assert metrics["test_teacher_forward"] < 1
    assert "before training" in capsys.readouterr().out
    out = str(tmp_path / "out")
    encoder = SentenceTransformer(out, device="cpu")
    report = read_jsonl(Path(out, "predictions_test.jsonl"))
    one, other = ([row[name] for row in report] for name in ("text", "text_pair"))
    theirs = TranslationEvaluator(one, other)(encoder)
    assert metrics["test_forward"] == pytest.approx(theirs["src2trg_accuracy"])
    assert metrics["test_backward"] == pytest.approx(theirs["trg2src_accuracy"])
    assert row_statistics(report, "accuracy").of_all() == pytest.approx(metrics["test_accuracy"])
    assert [row["found_forward"] == row["text_pair"] for row in report] == [bool(row["forward"]) for row in report]
    gold = SentenceTransformer(tiny, device="cpu").encode(one, normalize_embeddings=True)
    distance = sum(np.square(encoder.encode(texts) - gold).sum(1) for texts in (one, other))
    assert metrics["test_loss"] == pytest.approx(distance.mean(), rel=1e-3)


def test_a_new_student_starts_with_the_weights_of_its_checkpoint(words, tiny, tmp_path):
    train.main([*words, *NEW, "--max_steps", "1", "--learning_rate", "0"])
    out = tmp_path / "out"
    student, base = AutoModel.from_pretrained(out), AutoModel.from_pretrained(tiny)
    before = dict(base.named_parameters())
    for name, weight in student.named_parameters():
        assert torch.equal(weight, before[name]) or "word_embeddings" in name or "pooler" in name, name
    new, old = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(tiny)
    assert new.get_vocab() != old.get_vocab()
    ours, theirs = student.get_input_embeddings().weight, base.get_input_embeddings().weight
    shared = [token for token in new.get_vocab() if token in old.get_vocab()]
    assert len(shared) > 30
    for token in shared:
        assert torch.equal(ours[new.get_vocab()[token]], theirs[old.get_vocab()[token]])
    number, pieces = next(
        (n, ids) for t, n in new.get_vocab().items()
        if not t.startswith(("##", "[")) and t.lower() not in old.get_vocab()
        and len(ids := old(t, add_special_tokens=False)["input_ids"]) > 1
    )  # fmt: skip
    assert torch.allclose(ours[number], theirs[pieces].mean(0))


def test_what_a_teacher_cannot_use_is_refused(words, tmp_path):
    without = words[: words.index("--teacher")] + words[words.index("--teacher") + 2 :]
    with pytest.raises(
        InputError, match=r"a new model learns from a teacher; add --teacher, or pretrain it by make mlm"
    ):
        train.main([*without, *NEW])
    with pytest.raises(InputError, match=r"its vectors have 64 values, those of the student 32; .* hidden_size=64"):
        train.main([*words, *NEW, "--config_overrides", "hidden_size=32"])
    with pytest.raises(InputError, match=r"--teacher: reads pairs of sentences; remove --rows"):
        train.main([*words, "--rows", "score"])
    with pytest.raises(InputError, match=r"--tuning lora: a new model has no pretrained weights"):
        train.main([*words, *NEW, "--tuning", "lora"])
    with pytest.raises(InputError, match=r"nowhere/model: no such folder"):
        train.main([*words, "--teacher", "./nowhere/model"])
    file = Path(words[1])
    rows = read_jsonl(file)
    write_jsonl(file, [rows[0], {"translation": {"en": " ", "xx": 3}}, {"translation": {"en": "a"}}])
    with pytest.raises(InputError) as error:
        train.main(words)
    told = str(error.value).splitlines()
    assert [line.split(":")[1] for line in told] == ["2", "2", "3"]
    assert "no column xx; columns here: " in told[2]
    assert "--text_pair_column_name" in told[2]


@pytest.mark.soak
def test_a_killed_run_with_a_new_vocabulary_resumes_exactly(words, tmp_path):
    # a vocabulary of wordpiece differs from process to process (tokenizers 0.23)
    more = ("--tokenizer_train", "bpe", "--vocab_size", "400", "--save_strategy", "steps", "--save_steps", "2")
    more += ("--save_min_seconds", "0", "--max_steps", "6")
    train.main([*words, *more, "--output_dir", str(tmp_path / "whole")])
    assert Job([*words, *more], tmp_path / "log", kill_at=3, main=train.main).ends() == [-9]
    again = [word for i, word in enumerate(words) if "--overwrite" not in words[max(0, i - 1) : i + 1]]
    Job([*again, *more, "--resume_from_checkpoint", "true"], tmp_path / "log", main=train.main).succeeds()
    assert difference(tmp_path / "whole", tmp_path / "out") == 0
