"""Test matching as a user runs it: sample, losses, steps, scores, the format of sentence-transformers, search."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.losses import (
    ContrastiveLoss,
    CosineSimilarityLoss,
    MultipleNegativesRankingLoss,
)
from transformers import BertConfig, BertForSequenceClassification

from common.cli import parse
from common.errors import InputError
from recipes.matching import predict, service, steps, train
from recipes.matching.arguments import MatchingDataArguments
from recipes.matching.encoder import Embedder
from recipes.matching.index import Index
from recipes.matching.losses import contrastive_losses, cosine_losses, in_batch_losses
from recipes.matching.pairs import Identities
from recipes.matching.reading import load_pairs, read_corpus
from recipes.matching.reranking import Reranker
from recipes.matching.scoring import interval, pair_scores, rank, rank_by_words
from recipes.matching.service import conformal_threshold
from recipes.matching.transfer import row_statistics, training_rows
from tests.bad_inputs import HOSTILE, of_bytes, tried, variants
from tests.conftest import ROOT, read_jsonl, write_jsonl
from tests.faults import Job

SAMPLE = ROOT / "recipes" / "matching" / "sample"
SPLITS = {"train": 48, "validation": 16, "test": 16}
SHORT = ("--max_steps", "1", "--save_strategy", "no", "--eval_strategy", "no")


@pytest.fixture
def rows() -> dict[str, list[dict]]:
    return {split: read_jsonl(SAMPLE / f"{split}.jsonl")[:size] for split, size in SPLITS.items()}


@pytest.fixture
def words(tiny, tmp_path):
    """Return a function that writes rows by split, and returns arguments of a run on them."""

    def make(rows: dict[str, list[dict]], *more: str) -> list[str]:
        files = [w for s, data in rows.items() for w in (f"--{s}_file", write_jsonl(tmp_path / f"{s}.jsonl", data))]
        return [
            *files, "--model_name_or_path", tiny, "--output_dir", str(tmp_path / "out"), "--overwrite", "true",
            "--max_seq_length", "64", "--precision", "fp32", "--num_train_epochs", "2", "--learning_rate", "1e-3",
            "--per_device_train_batch_size", "16", "--disable_tqdm", "true", "--use_cpu", "true", *more,
        ]  # fmt: skip

    return make


@pytest.fixture
def start(words):
    return lambda rows, *more: train.main(words(rows, *more))


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> str:
    """Return the folder of a model trained on a part of the sample, with its index."""
    out = tmp_path_factory.mktemp("matching") / "out"
    limits = [w for name, n in (("train", 64), ("eval", 8), ("predict", 40)) for w in (f"--max_{name}_samples", str(n))]
    train.main([
        *limits, "--model_name_or_path", tiny, "--output_dir", str(out), "--precision", "fp32", "--num_train_epochs",
        "2", "--learning_rate", "1e-3", "--disable_tqdm", "true", "--max_seq_length", "64",
    ])  # fmt: skip
    return str(out)


def run(command: str | None, model: str, rows: list[dict] | str, output: Path, *more: str) -> list[dict]:
    file = rows if isinstance(rows, str) else write_jsonl(output.with_name("in.jsonl"), rows)
    command = ["--command", command] if command else []
    words = ["--model", model, "--input", file, "--output", str(output), "--precision", "fp32", *command, *more]
    predict.main(words)
    return read_jsonl(output) if output.is_file() else []


# Sample


def test_the_sample_is_what_it_promises():
    found = {split: read_jsonl(SAMPLE / f"{split}.jsonl") for split in SPLITS}
    corpus = read_jsonl(SAMPLE / "corpus.jsonl")
    outside = [row["query"] for row in read_jsonl(SAMPLE / "out_of_scope.jsonl")]
    assert len(found["train"]) == len(corpus) == 400
    assert len(found["validation"]) >= 100
    assert len(found["test"]) >= 200
    assert len(outside) >= 80
    queries = [row["query"] for split in found.values() for row in split] + outside
    assert len({query.lower() for query in queries}) == len(queries)  # paraphrases are held out
    answers = {row["text"]: row["topic"] for row in corpus}
    assert len(answers) == 400
    assert len(set(answers.values())) == 12
    assert all(answers[row["positive"]] == row["topic"] for split in found.values() for row in split)
    beginnings = {" ".join(re.findall(r"\w+", text.lower())[:4]) for text in answers}
    assert len(beginnings) > 0.96 * len(answers)


# Losses


def vectors(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def distinct(rows: int, negatives: int = 0) -> Identities:
    return Identities(
        [f"q{i}" for i in range(rows)], [f"p{i}" for i in range(rows)],
        [[f"n{i} {k}" for k in range(negatives)] for i in range(rows)],
    )  # fmt: skip


@pytest.mark.parametrize("negatives", [0, 2])
def test_the_loss_of_queries_is_that_of_sentence_transformers(negatives):
    parts = [vectors(6, 8) for _ in range(2 + negatives)]
    theirs = MultipleNegativesRankingLoss(torch.nn.Identity()).compute_loss_from_embeddings(parts, None)
    by_row = torch.stack(parts[2:], 1).flatten(0, 1) if negatives else torch.empty(0, 8, dtype=torch.float64)
    ours = in_batch_losses(torch.cat([*parts[:2], by_row]), torch.arange(6), 0.0, distinct(6, negatives), 0.05)
    assert ours.mean().item() == pytest.approx(theirs.item(), rel=1e-5)


def test_the_losses_of_pairs_are_those_of_sentence_transformers():
    one, other, scores = vectors(9, 8), vectors(9, 8), torch.rand(9, dtype=torch.float64)
    theirs = CosineSimilarityLoss(torch.nn.Identity()).compute_loss_from_embeddings([one, other], scores)
    assert cosine_losses(torch.cat([one, other]), scores).mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    labels = (scores > 0.5).double()
    theirs = ContrastiveLoss(torch.nn.Identity()).compute_loss_from_embeddings([one, other], labels)
    assert contrastive_losses(torch.cat([one, other]), labels).mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    scores[3] = labels[3] = -100
    assert cosine_losses(torch.cat([one, other]), scores)[3] == 0
    assert contrastive_losses(torch.cat([one, other]), labels)[3] == 0


def test_passages_that_also_answer_a_query_are_no_negatives():
    # rows 0 and 1: the same positive; rows 1 and 2: the same query; the negative of row 3 answers query b
    identities = Identities(["a", "b", "b", "c"], ["x", "x", "y", "z"], [[], [], [], ["y", "w"]])
    answers = identities.also_answers(np.arange(4))
    expected = [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0], [1, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0]]
    assert answers.astype(int).tolist() == expected
    assert identities.duplicates() == (1, 1)
    texts = vectors(10, 8)
    losses = in_batch_losses(texts, torch.arange(4), 0.0, identities, 0.05)
    scores = (texts[:4] @ texts[4:].T).float() / 0.05
    for row, others in ((0, [2, 3, 4, 5]), (1, [3, 5]), (2, [3, 5]), (3, [0, 1, 2, 4, 5])):
        kept = torch.cat([scores[row, row : row + 1], scores[row, others]])
        assert losses[row].item() == pytest.approx(-kept.log_softmax(0)[0].item(), abs=1e-4)
    smooth = in_batch_losses(texts, torch.arange(4), 0.1, identities, 0.05)
    kept = torch.cat([scores[1, 1:2], scores[1, [3, 5]]]).log_softmax(0)
    assert smooth[1].item() == pytest.approx((-0.9 * kept[0] - 0.1 * kept.mean()).item(), abs=1e-4)


# Steps


@pytest.fixture
def with_negatives(rows) -> dict[str, list[dict]]:
    """Return rows in which every third one has hard negatives, and two share a positive."""
    texts = [row["positive"] for row in rows["train"]]
    several = [r | {"negatives": texts[i - 2 : i] if i % 3 == 2 else []} for i, r in enumerate(rows["train"][:43])]
    several[7] = several[7] | {"positive": several[30]["positive"], "negatives": []}
    return rows | {"train": several}


def logged(out: Path) -> tuple[dict, list]:
    state = json.loads((out / "trainer_state.json").read_text())
    return load_file(out / "model.safetensors"), [e for e in state["log_history"] if "grad_norm" in e]


STEPS = ("--optim", "sgd", "--learning_rate", "0.05", "--logging_steps", "1", "--eval_strategy", "no")


@pytest.mark.soak
def test_a_step_is_the_same_whole_accumulated_and_in_two_processes(words, with_negatives, tmp_path):
    cuts = {"whole": (16, 1, 1), "accumulated": (4, 4, 1), "processes": (4, 2, 2)}
    for name, (batch, accumulation, processes) in cuts.items():
        more = ["--output_dir", str(tmp_path / name), "--per_device_train_batch_size", str(batch)]
        more += ["--gradient_accumulation_steps", str(accumulation), "--num_train_epochs", "1", *STEPS]
        Job(words(with_negatives, *more), tmp_path / "log", processes=processes, main=train.main).succeeds()
    whole, log = logged(tmp_path / "whole")
    assert len(log) == 3
    for name in ("accumulated", "processes"):
        weights, other = logged(tmp_path / name)
        for a, b in zip(log, other, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert max((whole[k] - weights[k]).abs().max().item() for k in whole) < 1e-6
        scores = [json.loads((tmp_path / n / "all_results.json").read_text()) for n in ("whole", name)]
        for score in ("eval_loss", "eval_ndcg@10", "test_map@100", "test_frozen_ndcg@10", "test_bm25_mrr@10"):
            assert scores[1][score] == pytest.approx(scores[0][score], abs=1e-5), score


def test_the_second_pass_of_a_cached_step_draws_the_same_dropout(words, rows, tmp_path, monkeypatch):
    more = ["--dropout", "0.2", "--max_steps", "2", *STEPS]
    train.main(words(rows, *more, "--output_dir", str(tmp_path / "direct")))

    def cached(self, *args):
        batches, counts = steps.Trainer.__mro__[1].get_batch_samples(self, *args)
        self._add_gradients(batches, counts["labels"])
        return batches, counts

    def beside_another_task(self, *args, **kwargs):
        before = steps.RandomState()
        torch.rand(3)  # another task draws between the passes
        try:
            return compute_loss(self, *args, **kwargs)
        finally:
            before.restore()

    compute_loss = steps.Trainer.compute_loss
    monkeypatch.setattr(steps.Trainer, "get_batch_samples", cached)
    monkeypatch.setattr(steps.Trainer, "compute_loss", beside_another_task)
    train.main(words(rows, *more, "--output_dir", str(tmp_path / "cached")))
    (direct, _), (other, _) = (logged(tmp_path / name) for name in ("direct", "cached"))
    assert max((direct[k] - other[k]).abs().max().item() for k in direct) < 1e-6


# Scores


def test_equal_similarities_have_no_threshold_between_them():
    gold = np.array([1.0, 1.0, 0.0, 0.0, 0.0])
    found = pair_scores(np.full(5, 0.5), gold, "label")
    assert (found["accuracy"], found["f1"]) == (0.6, pytest.approx(4 / 7))  # none, and all
    found = pair_scores(np.array([0.9, 0.5, 0.5, 0.1, 0.0]), gold, "label")
    assert (found["accuracy"], found["f1"]) == (0.8, 0.8)


def test_bm25_counts_the_words_of_any_script():
    passages = ["我的包裹在哪里", "怎么退货", "हिन्दी में खोज"]
    found = rank_by_words(["退货", "खोज", "?"], passages)
    assert found.found[:2, 0].tolist() == [1, 2]
    assert (found.found[2] == -1).all()
    assert (rank_by_words(["a"], ["?!"]).found == -1).all()


def test_rankings_are_scored_as_by_sentence_transformers():
    random = np.random.default_rng(0)
    queries, passages = (random.normal(size=(n, 6)).astype(np.float32) for n in (30, 150))
    relevant = [set(random.choice(150, size=random.integers(1, 4), replace=False).tolist()) for _ in queries]
    ours = rank(queries, passages).each(relevant).mean(0)
    names = [f"{i:03d}" for i in range(150)]
    evaluator = InformationRetrievalEvaluator(
        {str(i): "" for i in range(30)}, dict.fromkeys(names, ""), {str(i): {names[k] for k in r} for i, r in
        enumerate(relevant)}, precision_recall_at_k=[1, 10, 100],
    )  # fmt: skip
    scores = queries @ passages.T
    hits = [[{"corpus_id": names[k], "score": row[k]} for k in np.argsort(-row)[:100]] for row in scores]
    theirs = evaluator.compute_metrics(hits)
    recalls = [theirs["recall@k"][k] for k in (1, 10, 100)]
    assert ours == pytest.approx([theirs["mrr@k"][10], theirs["ndcg@k"][10], *recalls, theirs["map@k"][100]])


def test_bm25_finds_the_words_and_nothing_without_them():
    found = rank_by_words(["red boots", "qwertz"], ["blue hats", "red red boots", "a boot", "boots"], 3)
    assert found.found[0].tolist() == [1, 3, -1]
    assert found.found[1].tolist() == [-1, -1, -1]
    passages = ["red c", "red a", "blue", "red b", "red red"]
    for order in (passages, passages[::-1]):
        found = rank_by_words(["red"], order, 3)
        assert [order[i] for i in found.found[0]] == ["red red", "red a", "red b"]  # ties: by text
    low, high = interval(np.arange(100) / 100)
    assert low < 0.495 < high


def test_a_run_leaves_scores_predictions_and_a_model_of_sentence_transformers(model):
    results = json.loads(Path(model, "all_results.json").read_text())
    encoder = SentenceTransformer(model, device="cpu")
    report = read_jsonl(Path(model, "predictions_test.jsonl"))
    opened = Index(Path(model, "index"))
    texts = [hit.row["text"] for hit in opened.search(np.eye(1, 64, dtype=np.float32), 10_000)[0]]
    assert len(texts) == len(opened)
    queries = {row["query"]: row["query"] for row in report}
    evaluator = InformationRetrievalEvaluator(
        queries, {text: text for text in texts}, {row["query"]: {row["positive"]} for row in report},
        precision_recall_at_k=[1, 10, 100],
    )  # fmt: skip
    theirs = evaluator(encoder)
    for name in ("ndcg@10", "mrr@10", "recall@1", "recall@10", "recall@100", "map@100"):
        assert results[f"test_{name}"] == pytest.approx(theirs[f"cosine_{name}"], abs=1e-6)
    assert results["test_ndcg@10_low"] <= results["test_ndcg@10"] <= results["test_ndcg@10_high"]
    asked = [row["query"] for row in report]
    assert np.abs(encoder.encode(asked) - Embedder(model, precision="fp32")(asked)).max() < 1e-5
    assert encoder.max_seq_length == 64
    ranks = [row["rank"] for row in report]
    assert np.mean([1 / r if r and r <= 10 else 0 for r in ranks]) == pytest.approx(results["test_mrr@10"])
    for name in ("mrr@10", "ndcg@10"):
        assert row_statistics(report, name).of_all() == pytest.approx(results[f"test_{name}"])


@pytest.mark.parametrize(
    ("more", "epochs"),
    [((), "15"), pytest.param(("--lora_r", "16", "--learning_rate", "1e-2"), "20", marks=pytest.mark.soak)],
)
def test_it_overfits_on_ndcg(start, rows, more, epochs):
    same = dict.fromkeys(rows, rows["train"][:32])
    metrics = start(same, "--learning_rate", "3e-3", "--num_train_epochs", epochs, *SHORT[2:], *more)
    assert metrics["test_ndcg@10"] > 0.95


@pytest.mark.parametrize("kind", ["score", pytest.param("label", marks=pytest.mark.soak)])
def test_scored_pairs_train_and_compare(start, rows, tmp_path, kind):
    def pairs(split: str) -> list[dict]:
        texts = [row["positive"] for row in rows[split]]
        values = (1.0, 0.5, 0.0) if kind == "score" else (1, 0, 0)
        return [
            {"text": row["query"], "text_pair": texts[(i + k) % len(texts)], kind: values[k]}
            for i, row in enumerate(rows[split][:12])
            for k in range(3)
        ]

    data = {"train": pairs("train"), "validation": pairs("train"), "test": pairs("train")}
    metrics = start(data, "--num_train_epochs", "30", "--learning_rate", "3e-3", *SHORT[2:])
    best = "spearman" if kind == "score" else "average_precision"
    assert metrics[f"test_{best}"] > 0.9
    out = str(tmp_path / "out")
    assert json.loads(Path(out, "run.json").read_text())["arguments"]["metric_for_best_model"] == best
    with pytest.raises(InputError, match=rf"--metric_for_best_model ndcg@10: no such score; known: loss, {best}"):
        start(data, "--metric_for_best_model", "ndcg@10")
    encoder = SentenceTransformer(out, device="cpu")
    one, other, gold = ([row[name] for row in data["test"]] for name in ("text", "text_pair", kind))
    if kind == "score":
        theirs = EmbeddingSimilarityEvaluator(one, other, gold)(encoder)
        expected = {"spearman": theirs["spearman_cosine"], "pearson": theirs["pearson_cosine"]}
    else:
        theirs = BinaryClassificationEvaluator(one, other, gold)(encoder)
        expected = {n: theirs[f"cosine_{t}"] for n, t in (("accuracy", "accuracy"), ("f1", "f1"),
                    ("average_precision", "ap"))}  # fmt: skip
    for name, value in expected.items():
        assert metrics[f"test_{name}"] == pytest.approx(value, abs=1e-4), name
    found = run(None, out, data["test"], tmp_path / "found.jsonl")
    report = read_jsonl(Path(out, "predictions_test.jsonl"))
    assert [row["similarity"] for row in found] == pytest.approx([row["similarity"] for row in report], abs=2e-4)


def test_transfer_reads_both_texts_and_scores_queries(words, rows):
    def read(rows: dict[str, list[dict]], *more: str):
        return training_rows(parse(train.ARGUMENTS, words(rows, *more)))

    found = read(rows)
    assert found.pieces[0] == [f"{rows['train'][0]['query']} {rows['train'][0]['positive']}"]
    assert (found.classes, found.evaluated) == (None, (16, 16))
    pairs = {s: [{"text": r["query"], "text_pair": r["positive"], "score": 1} for r in of] for s, of in rows.items()}
    assert read(pairs).evaluated == (16, 0)  # no score of single rows
    assert read(pairs, "--teacher", "any").evaluated == (16, 16)


# Index and search


def test_search_finds_what_the_run_has_found(model, tmp_path):
    report = read_jsonl(Path(model, "predictions_test.jsonl"))
    found = run(None, model, [{"query": row["query"]} for row in report], tmp_path / "found.jsonl", "--top_k", "5")
    for row, before in zip(found, report, strict=True):
        assert [hit["score"] for hit in row["found"]] == pytest.approx([h["score"] for h in before["found"]], abs=2e-4)
        assert row["found"][0]["text"] == before["found"][0]["text"]
    high = found[0]["found"][0]["score"]
    few = run(None, model, [{"query": report[0]["query"]}], tmp_path / "few.jsonl", "--min_score", str(high - 1e-4))
    assert [hit["score"] for hit in few[0]["found"]] == [high]


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_passages_are_added_and_deleted_in_parts(model, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("recipes.matching.index.PART_ROWS", 30)
    corpus = read_jsonl(SAMPLE / "corpus.jsonl")[:100]
    folder = tmp_path / "passages"
    run("index", model, corpus[:70], folder, "--index_kind", kind)
    run("add", model, corpus[70:], folder)
    assert len(Index(folder)) == 100
    assert [part["rows"] for part in Index(folder).about["parts"]] == [30, 30, 10, 30]
    queries = [{"query": row["text"]} for row in corpus]
    search = ("--index", str(folder), "--top_k", "3", "--overwrite")
    found = run(None, model, queries, tmp_path / "found.jsonl", *search)
    assert [row["found"][0]["id"] for row in found] == [row["id"] for row in corpus]
    assert found[0]["found"][0].keys() == {"id", "text", "title", "score"}
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(row["id"] for row in corpus[::2]))
    run("delete", model, str(ids), folder)
    assert len(Index(folder)) == 50
    left = run(None, model, queries, tmp_path / "found.jsonl", *search)
    gone = {row["id"] for row in corpus[::2]}
    assert not gone & {hit["id"] for row in left for hit in row["found"]}
    assert [row["found"][0]["id"] for row in left[1::2]] == [row["id"] for row in corpus[1::2]]
    run("add", model, corpus[:2:2], folder)  # a deleted id may come back
    again = run(None, model, queries[:1], tmp_path / "found.jsonl", *search)
    assert again[0]["found"][0]["id"] == corpus[0]["id"]
    run("delete", model, [{"id": row["id"]} for row in corpus[1::2] + corpus[:1]], folder)
    assert run(None, model, queries[:1], tmp_path / "found.jsonl", *search)[0]["found"] == []


def test_rows_without_ids_are_numbered_on(model, tmp_path):
    texts = [{"text": row["text"]} for row in read_jsonl(SAMPLE / "corpus.jsonl")[:9]]
    run("index", model, texts[:5], tmp_path / "passages")
    run("add", model, texts[5:], tmp_path / "passages")
    assert Index(tmp_path / "passages").find(list("0123456789")).keys() == set("123456789")


HOLD = """
import fcntl, sys, time
with open(sys.argv[1], "a") as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    print(flush=True)
    time.sleep(600)
"""


def test_writers_of_an_index_do_not_undo_each_other(model, tmp_path):
    folder, corpus = tmp_path / "passages", read_jsonl(SAMPLE / "corpus.jsonl")[:9]
    run("index", model, corpus[:3], folder)
    embedder, held = Embedder(model, precision="fp32"), Index(folder)
    run("add", model, corpus[3:6], folder)
    held.add(corpus[6:], embedder, "text", ())  # opened before the last write
    assert len(held) == len(Index(folder)) == 9
    run("delete", model, [{"id": corpus[0]["id"]}], folder)
    reader = Index(folder)
    run("delete", model, [{"id": corpus[1]["id"]}], folder)
    assert len(reader.search(embedder.queries(["a"]), 9)[0]) == 8  # as it was when it was opened
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder / ".lock")], stdout=subprocess.PIPE)
    process.stdout.readline()  # another process writes
    try:
        for command, more in (("index", ["--overwrite"]), ("add", [])):
            with pytest.raises(InputError, match="another process writes to it; wait for it"):
                run(command, model, corpus, folder, *more)
    finally:
        process.kill()
        process.wait()
    assert len(Index(folder)) == 7
    assert [path.name for path in tmp_path.glob("passages*")] == ["passages"]


def test_an_index_that_another_process_has_changed_is_reported(model, tmp_path):
    folder, corpus = tmp_path / "passages", read_jsonl(SAMPLE / "corpus.jsonl")[:9]
    vector, changed = np.eye(1, 64, dtype=np.float32), r"passages: another process has changed it; run the command"
    run("index", model, corpus, folder)
    run("delete", model, corpus[:1], folder)
    opened = Index(folder)
    for row in corpus[1:3]:
        assert len(opened.search(vector, 9)[0]) == 8
        run("delete", model, [row], folder)
    with pytest.raises(InputError, match=changed):
        opened.search(vector, 9)
    opened = Index(folder)
    run("index", model, corpus, folder, "--overwrite")
    for read in (lambda: opened.search(vector, 9), opened.columns, opened.highest_number, lambda: opened.find(["1"])):
        with pytest.raises(InputError, match=changed):
            read()


def test_exact_search_agrees_with_all_products(model, tmp_path):
    corpus = read_jsonl(SAMPLE / "corpus.jsonl")
    run("index", model, corpus, tmp_path / "passages")
    embedder = Embedder(model, precision="fp32")
    queries = embedder.queries([row["title"] for row in corpus[:50]])
    best = np.sort(queries @ embedder.passages([row["text"] for row in corpus]).T)[:, ::-1][:, :10]
    found = Index(tmp_path / "passages").search(queries, 10)
    assert np.array([[hit.score for hit in hits] for hits in found]) == pytest.approx(best, abs=1e-5)


def test_a_stopped_write_leaves_the_index_as_it_was(model, tmp_path, monkeypatch):
    corpus = read_jsonl(SAMPLE / "corpus.jsonl")[:20]
    folder = tmp_path / "passages"
    run("index", model, corpus[:10], folder)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("recipes.matching.index.write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            run("add", model, corpus[10:], folder)
        with pytest.raises(KeyboardInterrupt):
            run("delete", model, corpus[:5], folder)
        with pytest.raises(KeyboardInterrupt):
            run("index", model, corpus, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert len(Index(folder)) == 10
    assert len(Index(folder).search(np.eye(1, 64, dtype=np.float32), 20)[0]) == 10
    run("add", model, corpus[10:], folder)  # removes what the stopped write has left
    assert len(list(folder.glob("part-*"))) == len(Index(folder).about["parts"]) == 2
    assert len(Index(folder)) == 20
    with pytest.raises(InputError, match=r"--output .*passages: exists already; .* --overwrite"):
        run("index", model, corpus, folder)
    run("index", model, corpus[:3], folder, "--overwrite")
    assert len(Index(folder)) == 3
    assert sorted(path.name for path in tmp_path.iterdir() if "passages" in path.name) == ["passages"]


def test_an_index_of_another_model_unknown_ids_and_empty_corpora_are_refused(model, tiny, tmp_path):
    corpus = read_jsonl(SAMPLE / "corpus.jsonl")[:5]
    folder = tmp_path / "passages"
    run("index", model, corpus, folder)
    for command, output in ((None, tmp_path / "found.jsonl"), ("add", folder)):
        with pytest.raises(InputError, match="holds vectors of another model"):
            run(command, tiny, [{"query": "x", "text": "x"}], output, "--index", str(folder))
    with pytest.raises(InputError, match=r"no passage with the id 'nowhere'; remove the id"):
        run("delete", model, [{"id": "nowhere"}, {"id": corpus[0]["id"]}], folder)
    with pytest.raises(InputError, match=r"a passage with the id 'delivery-01'; delete it first"):
        run("add", model, corpus[:1], folder)
    with pytest.raises(InputError, match=r"the id 'new' occurs twice"):
        run("add", model, [{"id": "new", "text": "a"}, {"id": "new", "text": "b"}], folder)
    assert len(Index(folder)) == 5
    for content in ("", "\n\n"):
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(InputError, match="the corpus contains no passages; add some"):
            run("index", model, str(tmp_path / "empty.jsonl"), tmp_path / "none")
    with pytest.raises(InputError, match=r"in.jsonl:1: text is None; needed: a non-blank text"):
        run("index", model, [{"id": 1, "passage": "x"}], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match=r"is no folder; write one with --command index"):
        run(None, model, [{"query": "x"}], tmp_path / "found.jsonl", "--index", str(tmp_path / "none"))
    (folder / "index.json").write_text("{")
    with pytest.raises(InputError, match=r"index.json: cannot be read"):
        run(None, model, [{"query": "x"}], tmp_path / "found.jsonl", "--index", str(folder))
    with pytest.raises(InputError, match=r"has no index of passages; write one with --command index"):
        run("search", tiny, [{"query": "x"}], tmp_path / "found.jsonl")
    with pytest.raises(InputError, match=r'in.jsonl:2: needs "query" or "text"'):
        run(None, model, [{"query": "x"}, {"query": " "}], tmp_path / "found.jsonl")


def save_classifier(folder: Path, tokenizer, *names: str, **settings) -> str:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    config = BertConfig(vocab_size=len(tokenizer), **classes, **sizes, **settings)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_classifier_of_pairs_orders_the_found_passages(model, tokenizer, tmp_path):
    save_classifier(tmp_path / "pairs", tokenizer, "no", "yes")
    rows = [{"query": row["query"]} for row in read_jsonl(SAMPLE / "test.jsonl")[:4]]
    more = ("--rerank", str(tmp_path / "pairs"), "--rerank_candidates", "20", "--top_k", "20")
    plain = run(None, model, rows, tmp_path / "plain.jsonl", "--top_k", "20")
    found = run(None, model, rows, tmp_path / "found.jsonl", *more)
    other = run(None, model, rows, tmp_path / "other.jsonl", *more, "--rerank_label", "no")
    for row, before, reversed_row in zip(found, plain, other, strict=True):
        scores = [hit["score"] for hit in row["found"]]
        assert scores == sorted(scores, reverse=True)
        assert {hit["id"] for hit in row["found"]} == {hit["id"] for hit in before["found"]}
        assert [1 - s for s in scores] == pytest.approx([h["score"] for h in reversed_row["found"]][::-1], abs=2e-4)
    with pytest.raises(InputError, match=r"--rerank_label maybe: .* has the classes no, yes"):
        run(None, model, rows, tmp_path / "x.jsonl", *more, "--rerank_label", "maybe")


def test_special_tokens_in_texts_reach_encoder_and_classifiers(model, tokenizer, tmp_path):
    pairs = save_classifier(tmp_path / "pairs", tokenizer, "no", "yes", initializer_range=1.0)
    query, more = "a [SEP] b [SEP] c", ("--rerank", pairs, "--allow_special_tokens", "true")
    hit = run(None, model, [{"query": query}], tmp_path / "found.jsonl", *more)[0]["found"][0]
    special, plain = (
        Reranker(pairs, precision="fp32", allow_special_tokens=allowed).scores([query], [hit["text"]])[0]
        for allowed in (True, False)
    )
    assert hit["score"] == pytest.approx(special, abs=1e-4)
    assert abs(special - plain) > 2e-4
    file = write_jsonl(tmp_path / "asked.jsonl", [{"query": query}])
    files = ["--validation_file", file, "--input", file, "--output", str(tmp_path / "answered.jsonl")]
    for allowed in (True, False):
        words = ["--model", model, "--intents", pairs, *files, "--allow_special_tokens", str(allowed)]
        opened = service.Service(*parse(service.ARGUMENTS, words))
        for part in (opened.embedder, opened.intents):
            assert ("[SEP]" in part.tokenizer.tokenize(query)) == allowed


@pytest.mark.parametrize(
    ("settings", "argument"),
    [({"long_texts": "windows"}, "--long_texts windows"), ({"keep": "head+tail"}, r"--keep_part head\+tail")],
)
def test_a_classifier_of_windows_or_tails_is_refused(tokenizer, tmp_path, settings, argument):
    trained = save_classifier(tmp_path / "classifier", tokenizer, "no", "yes", **settings)
    for named, load in (("--rerank", Reranker), ("--intents", service.Intents)):
        message = f"{named} .*classifier: was trained with {argument}, .* train the classifier without --"
        with pytest.raises(InputError, match=message):
            load(trained)


def test_mined_negatives_train_again(model, start, rows, tmp_path):
    mined = run("mine", model, rows["train"], tmp_path / "mined.jsonl", "--top_k", "3", "--max_share", "1.5")
    assert all(row["positive"] not in row["negatives"] and len(row["negatives"]) <= 3 for row in mined)
    assert sum(len(row["negatives"]) for row in mined) > len(mined)
    assert start(rows | {"train": mined}, *SHORT)
    twice = [{"query": rows["train"][0]["query"], "positive": row["positive"]} for row in rows["train"]]
    found = run("mine", model, twice, tmp_path / "twice.jsonl", "--top_k", "100", "--max_share", "9")
    answers = {row["positive"] for row in twice}
    assert all(row["negatives"] and not answers & set(row["negatives"]) for row in found)
    pairs = run("mine", model, rows["train"], tmp_path / "pairs.jsonl", "--as_pairs", "true", "--max_share", "1.5")
    assert {row["label"] for row in pairs} == {"yes", "no"}
    assert [row["text_pair"] for row in pairs if row["label"] == "yes"] == [row["positive"] for row in rows["train"]]


# Customer service


def test_the_threshold_keeps_the_promised_share_of_new_questions():
    random = np.random.default_rng(0)
    kept = []
    for _ in range(2000):
        known, new = random.beta(5, 2, 60), random.beta(5, 2, 50)
        kept.append((new >= conformal_threshold(known, 0.9)).mean())
    assert 0.9 <= np.mean(kept) < 0.92  # at most 1 / (n + 1) above the promise
    assert conformal_threshold(np.arange(10), 0.95) == -np.inf
    assert conformal_threshold(np.arange(19), 0.95) == 0


def test_questions_are_answered_or_handed_over(model, tmp_path, capsys):
    test = read_jsonl(Path(model, "predictions_test.jsonl"))
    file = write_jsonl(tmp_path / "known.jsonl", [{"query": row["query"]} for row in test])
    words = ["--model", model, "--validation_file", file, "--input", file, "--precision", "fp32", "--overwrite"]
    words += ["--output", str(tmp_path / "answered.jsonl"), "--coverage", "0.8"]
    results = service.main([*words, "--test_file", file, "--out_of_scope_file", str(SAMPLE / "out_of_scope.jsonl")])
    found = read_jsonl(tmp_path / "answered.jsonl")
    assert results["in scope, not handed over"] >= 0.8
    assert results["in scope, not handed over"] == np.mean([row["action"] != "hand_over" for row in found])
    assert "out of scope, handed over" in capsys.readouterr().out
    for row, before in zip(found, test, strict=True):
        assert row["action"] in ("answer", "hand_over")
        assert row["answer"] == (before["found"][0]["text"] if row["action"] == "answer" else None)
    with pytest.raises(InputError, match=r"--coverage 0.999: needs at least 999 rows in --validation_file"):
        service.main([*words, "--coverage", "0.999"])


def test_the_intent_is_that_of_the_best_example_or_of_a_classifier(model, tokenizer, tmp_path):
    examples = [
        {"id": row["id"], "text": row["text"], "topic": row["topic"]}
        for row in read_jsonl(SAMPLE / "corpus.jsonl")[:60]
    ]
    run("index", model, examples, tmp_path / "examples", "--keep_columns", "topic")
    file = write_jsonl(tmp_path / "asked.jsonl", [{"query": row["text"], "intent": row["topic"]} for row in examples])
    output = tmp_path / "answered.jsonl"
    words = ["--model", model, "--index", str(tmp_path / "examples"), "--validation_file", file, "--test_file", file]
    words += ["--output", str(output), "--precision", "fp32", "--overwrite"]
    asked = write_jsonl(tmp_path / "in.jsonl", [{"query": row["text"]} for row in examples])
    with pytest.raises(
        InputError, match="--answer_intent_column label: the index keeps id, text, topic; write it with"
    ):
        service.main([*words, "--answer_intent_column", "label", "--input", asked])
    results = service.main([*words, "--answer_intent_column", "topic", "--input", asked])
    assert results["in scope, intent right"] == 1.0
    names = ("delivery", "returns", "payment")
    intents = save_classifier(tmp_path / "intents", tokenizer, *names)
    service.main([*words, "--intents", intents, "--input", asked])
    found = read_jsonl(output)
    assert {row["intent"] for row in found} <= set(names)
    assert {row["action"] for row in found} <= {"answer", "route", "hand_over"}


# Rows


def test_a_corpus_file_with_ids_of_positives(start, rows, tmp_path):
    corpus = read_jsonl(SAMPLE / "corpus.jsonl")
    number = {row["text"]: row["id"] for row in corpus}
    file = write_jsonl(tmp_path / "corpus.jsonl", corpus)
    more = ("--corpus_file", file, "--positive_id_column_name", "passage", *SHORT)
    named = {s: [{"query": r["query"], "passage": number[r["positive"]]} for r in rs] for s, rs in rows.items()}
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": "copy", "text": corpus[0]["text"]}, *corpus])
    start(named, *more)  # ids of passages that repeat a text are known too
    assert len(Index(tmp_path / "out" / "index")) == 400
    named["train"][2]["passage"] = "nowhere"
    with pytest.raises(
        InputError, match=r"train.jsonl:3: passage is 'nowhere', which no passage of .*corpus.jsonl has"
    ):
        start(named, *more)
    write_jsonl(tmp_path / "corpus.jsonl", [*corpus, corpus[3]])
    with pytest.raises(InputError, match=r"corpus.jsonl:401: id 'delivery-04' is already the id of .*corpus.jsonl:4;"):
        start(named, *more)
    (tmp_path / "corpus.jsonl").write_text("")
    with pytest.raises(InputError, match=r"corpus.jsonl: the corpus contains no passages; add some"):
        start(named, *more)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"query": "", "positive": "x"}, "query is ''; needed: a non-blank text"),
        ({"query": "x", "positive": 3}, "positive is 3; needed: a non-blank text"),
        ({"query": "x", "positive": "y", "negatives": [1]}, "negatives is [1]; needed: a list of non-blank texts"),
        ({"query": "x", "positive": "y", "negatives": ["y"]}, "negatives contains the positive; remove it there"),
        ({"question": "x", "positive": "y"}, "no column query"),
        ({"query": "x"}, "no column positive"),
    ],
)
def test_bad_rows_name_file_and_line(start, rows, tmp_path, bad, message):
    with pytest.raises(InputError) as error:
        start(rows | {"train": [*rows["train"][:3], bad]})
    assert str(error.value).startswith(f"{tmp_path / 'train.jsonl'}:4: ") or "no column" in message
    assert message in str(error.value)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": "a", "text_pair": "b", "score": 4.2}, "score is 4.2; needed: a number from 0 to 1 (divide by"),
        ({"text": "a", "text_pair": "", "score": 1}, "text_pair is ''; needed: a non-blank text"),
        ({"text": "a", "text_pair": "b", "score": "high"}, "score is 'high'; needed: a number"),
    ],
)
def test_bad_pairs_name_file_and_line(start, tmp_path, bad, message):
    good = [{"text": "a", "text_pair": "b", "score": i % 2} for i in range(4)]
    with pytest.raises(InputError) as error:
        start({"train": [*good, bad]})
    assert str(error.value).startswith(f"{tmp_path / 'train.jsonl'}:5: {message}")


def test_a_negative_may_begin_with_a_bracket(rows, tmp_path):
    file = write_jsonl(tmp_path / "train.jsonl", [row | {"negatives": "[Solved] how to"} for row in rows["train"]])
    data, *_ = load_pairs(MatchingDataArguments(train_file=file))
    assert data["train"]["negatives"][0] == ["[Solved] how to"]


def test_no_text_of_pairs_is_in_both_training_and_validation_rows(tmp_path):
    pairs = [{"text": f"text {n}", "text_pair": f"other {n}", "label": k} for n in range(40) for k in (0, 1)]
    data, *_ = load_pairs(MatchingDataArguments(train_file=write_jsonl(tmp_path / "train.jsonl", pairs)))
    assert len(data["validation"]) > 1
    assert not set(data["train"]["text"][:]) & set(data["validation"]["text"][:])


def test_test_rows_without_positives_are_searched(start, rows, tmp_path):
    start(rows | {"test": [{"query": row["query"]} for row in rows["test"]]}, *SHORT)
    found = read_jsonl(tmp_path / "out" / "predictions_test.jsonl")
    assert [row["query"] for row in found] == [row["query"] for row in rows["test"]]
    assert all(len(row["found"]) == 10 for row in found)


@pytest.mark.parametrize("argument", ["--r_drop=1", "--adversarial=fgm", "--temperature=0"])
def test_arguments_without_a_meaning_are_refused(start, rows, argument):
    with pytest.raises(InputError, match=argument.split("=")[0]):
        start(rows, argument)


@pytest.mark.parametrize("every", [48, pytest.param(1, marks=pytest.mark.soak)])
def test_corrupted_files_are_refused_or_train_as_they_stand(start, rows, tmp_path, capsys, every):
    texts = [row["positive"] for row in rows["train"]]
    good = [
        {"query": row["query"], "positive": row["positive"], "negatives": texts[20 + i : 22 + i]}
        for i, row in enumerate(rows["train"][:12])
    ]
    found = list(variants(good))
    assert len(found) >= 150
    file = tmp_path / "bad.jsonl"
    trained, refused = tried(
        found[::every], file, lambda: start({"validation": good}, "--train_file", str(file), *SHORT)
    )
    capsys.readouterr()
    assert trained >= 30 // every
    assert refused >= 100 // every


# Directed corruptions: 150 of each kind, by direct calls


@pytest.fixture(scope="module")
def passages(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "passages"
    run("index", model, read_jsonl(SAMPLE / "corpus.jsonl")[:12], folder)
    return folder


def test_damaged_indexes_and_those_of_other_models_are_refused(passages, model, tmp_path):
    """Cut, change and remove the files of an index: a reader finds what it should, or says that it is not whole."""
    folder, draw = tmp_path / "passages", random.Random(0)
    shutil.copytree(passages, folder)
    good = (folder / "index.json").read_bytes()

    def search() -> None:
        opened = Index(folder)
        opened.check_model(model)
        assert len(opened.search(np.eye(1, 64, dtype=np.float32), 20)[0]) <= 12

    _, refused = tried(of_bytes(good, draw), folder / "index.json", search, also=str(folder))
    assert refused > 60
    (folder / "index.json").write_bytes(good)
    about = json.loads(good)
    others = [about | {"fingerprint": f"{draw.getrandbits(256):064x}"} for _ in range(150)]
    for other in others:
        (folder / "index.json").write_text(json.dumps(other))
        with pytest.raises(InputError, match="holds vectors of another model"):
            Index(folder).check_model(model)
    (folder / "index.json").write_bytes(good)
    files = sorted(path for path in folder.glob("part-*/*"))
    for _ in range(150):
        path = draw.choice(files)
        content = path.read_bytes()
        path.write_bytes(content[: draw.randrange(len(content))])
        with pytest.raises(
            InputError, match=rf"no whole index of this recipe \({path.parent.name}/{path.name} is missing"
        ):
            Index(folder)
        path.write_bytes(content)
    for path in files:
        path.rename(path.with_suffix(".away"))
        with pytest.raises(InputError, match=f"{path.name} is missing or damaged"):
            Index(folder)
        path.with_suffix(".away").rename(path)
    assert len(Index(folder)) == 12


def test_unknown_ids_and_empty_corpora_are_refused(passages, tmp_path):
    index, draw = Index(passages), random.Random(0)
    known = [row["id"] for row in read_jsonl(SAMPLE / "corpus.jsonl")[:12]]
    wrong = [*HOSTILE.values(), *(f" {name}" for name in known), *(f"{name}\n" for name in known), "None", "0", "-1"]
    wrong += ["".join(draw.choice("delivery-0123é\u202e") for _ in range(draw.randrange(1, 12))) for _ in range(140)]
    wrong = [name for name in dict.fromkeys(wrong) if name not in known]
    assert len(wrong) >= 150
    for name in wrong:
        with pytest.raises(InputError, match=r"has no passage with the id .*; remove the id"):
            index.delete([known[0], name])
    assert len(Index(passages)) == 12
    blank = ["", " ", "\n", "\t", "\r\n", "\f\n", "\ufeff", "\ufeff\n", " \n" * 3, "\u00a0\n"]
    for number in range(150):
        text = "".join(draw.choice(blank[:6]) for _ in range(number % 15)) if number >= len(blank) else blank[number]
        file = tmp_path / "empty.jsonl"
        file.write_bytes(text.encode())
        with pytest.raises(InputError, match=r"empty\.jsonl.*"):
            read_corpus(MatchingDataArguments(corpus_file=str(file)))


@pytest.mark.soak
@pytest.mark.parametrize("target", ["corpus", "ids"])
def test_corrupted_corpora_and_ids_are_refused_or_taken(model, tmp_path, capsys, target):
    corpus = read_jsonl(SAMPLE / "corpus.jsonl")[:12]
    file, folder = tmp_path / "bad.jsonl", tmp_path / "passages"
    rows = [{"id": row["id"], "text": row["text"]} for row in corpus]

    def go() -> None:
        if target == "corpus":
            run("index", model, str(file), folder, "--overwrite")
        else:
            run("index", model, corpus, folder, "--overwrite")
            run("delete", model, str(file), folder)

    taken, refused = tried(variants(rows), file, go, also=str(folder))
    capsys.readouterr()
    assert taken > 30
    assert refused > 50
