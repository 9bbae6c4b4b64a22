"""Test matching as a task beside another one on the same encoder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from common.errors import InputError
from recipes.matching.encoder import Embedder
from recipes.matching.transfer import row_statistics
from recipes.multitask import train
from tests.conftest import ROOT, read_jsonl, write_jsonl

SAMPLE = ROOT / "recipes" / "matching" / "sample"
LABELS = read_jsonl(ROOT / "recipes" / "sentiment" / "sample" / "train.jsonl")


@pytest.fixture
def rows() -> dict[str, list[dict]]:
    return {split: read_jsonl(SAMPLE / f"{split}.jsonl")[:16] for split in ("train", "validation", "test")}


def words(tiny: str, folder: Path, rows: dict[str, list[dict]], *more: str) -> list[str]:
    """Return the arguments of four steps on rows of this recipe and on reviews."""
    lines = ["search:", "  recipe: matching", "  max_seq_length: 64", *more]
    lines += [f"  {split}_file: {write_jsonl(folder / f'{split}.jsonl', of)}" for split, of in rows.items()]
    lines += ["reviews:", "  recipe: sentiment", "  max_seq_length: 64"]
    for i, split in enumerate(rows):
        lines.append(f"  {split}_file: {write_jsonl(folder / f'r-{split}.jsonl', LABELS[30 * i : 30 * i + 24])}")
    (folder / "tasks.yaml").write_text("\n".join(lines))
    return [
        *("--tasks", str(folder / "tasks.yaml"), "--model_name_or_path", tiny, "--output_dir", str(folder / "out")),
        *("--precision", "fp32", "--use_cpu", "true", "--disable_tqdm", "true", "--max_steps", "4"),
        *("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--eval_strategy", "no"),
        *("--save_strategy", "no", "--learning_rate", "1e-3"),
    ]


def test_search_is_trained_beside_another_task(rows, tiny, tmp_path):
    metrics = train.main(words(tiny, tmp_path, rows))
    out = tmp_path / "out"
    report = read_jsonl(out / "search" / "predictions_test.jsonl")
    assert row_statistics(report, "ndcg@10").of_all() == pytest.approx(metrics["test_search_ndcg@10"])
    assert (out / "search" / "index" / "index.json").is_file()
    texts = [row["positive"] for row in rows["test"]]
    encoder = SentenceTransformer(str(out / "search"), device="cpu")
    found = Embedder(str(out / "search"), precision="fp32")(texts)
    assert np.abs(encoder.encode(texts) - found).max() < 1e-5
    shared, own = (load_file(folder / "model.safetensors") for folder in (out, out / "search"))
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(shared[name], own[name])
    assert not torch.equal(own[name], load_file(Path(tiny, "model.safetensors"))[name])


@pytest.mark.soak
def test_scored_pairs_are_trained_beside_another_task(rows, tiny, tmp_path):
    pairs = {
        split: [{"text": r["query"], "text_pair": r["positive"], "score": n % 2} for n, r in enumerate(of)]
        for split, of in rows.items()
    }
    metrics = train.main(words(tiny, tmp_path, pairs))
    assert -1 <= metrics["test_search_spearman"] <= 1


def test_arguments_that_a_task_cannot_have_are_refused(rows, tiny, tmp_path):
    for more, message in (
        (f"  teacher: {tiny}", "teacher"),
        ("  temperature: 0", "--temperature 0.0: must be above 0"),
    ):
        with pytest.raises(InputError, match=rf"tasks.yaml:.*search.*{message}"):
            train.main(words(tiny, tmp_path, rows, more))
