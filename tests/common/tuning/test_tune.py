"""Test each `--tuning` method on each kind of task: trained, saved and loaded weights, and unsupported combinations.

The cells train tiny models with random weights in this process (`cells.py`). One other process loads all saved folders.
Every cell compares a resumed run with an uninterrupted one; the cells of `ON_TWO` compare two processes with one.
"""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    GPT2Config,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from common.args import ModelArguments
from common.errors import InputError
from common.inference.predictor import load_saved
from common.models.load import load_model
from common.models.structure import depths, layer_names, watch
from common.tuning.adapters import Bottleneck, Shape, insert_adapters
from common.tuning.methods import METHODS, ONLY, TuningArguments
from common.tuning.peft_methods import orthogonality
from common.tuning.tune import layer_rates, merge, tune
from tests.common.tuning.cells import (
    BERT,
    EXACT,
    GPT2,
    HEADS,
    INNER,
    LAYERS,
    POSITIONS,
    TASKS,
    VOCAB,
    WIDTH,
    Cell,
    make_checkpoints,
    train_on_both,
)
from tests.common.tuning.cells import logits as cell_logits
from tests.conftest import ROOT, read_jsonl, write_jsonl
from tests.faults import Job

CELLS = [("top:1" if method == "top" else method, task) for method in METHODS if method != "domains" for task in TASKS]
#: a sixth of the cells, with each method and each task; the others are long together
SOME_CELLS = [
    pytest.param(*cell, marks=() if (i // len(TASKS) + i) % 6 == 4 else pytest.mark.soak)
    for i, cell in enumerate(CELLS)
]
#: unsupported cells, and their error
IMPOSSIBLE = {
    ("head", "clm"): "is tied to its input embeddings",
    ("head", "seq2seq"): "is tied to its input embeddings",
}
ON_TWO = [
    "lora/ner", "adalora/classification", "adapter/clm", "gradual/ner", "prefix/classification", "prompt/mlm",
    "ia3/seq2seq", "bias/clm", "lora/qa",
]  # fmt: skip


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    make_checkpoints(folder / "checkpoints", tokenizer)
    return folder / "checkpoints"


@pytest.fixture(scope="session")
def other_process() -> Iterator[subprocess.Popen]:
    """Start the process that loads saved folders; it is shared, because it takes seconds to start."""
    command = [sys.executable, "-m", "tests.common.tuning.cells"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    yield process
    process.stdin.close()
    process.wait(60)


def sizes(task: str) -> dict[str, int]:
    """Return parameter counts of parts of a task's tiny model, from its dimensions."""
    d, f = WIDTH, INNER
    square, feed, norm = d * d + d, d * f + f + f * d + d, 2 * d
    classes = {"classification": 3, "ner": 3, "qa": 2}.get(task, 0)
    found = {"head": classes * (d + 1), "own head": classes * (d + 1), "above": 0}
    if task == "clm":
        layer = d * 3 * d + 3 * d + square + feed + 2 * norm
        found |= {"embeddings": VOCAB * d + POSITIONS * d, "layers": LAYERS * layer, "last": layer, "above": norm}
        found |= {"biases": LAYERS * (3 * d + d + f + d + 2 * d) + d, "norms": norm * (2 * LAYERS + 1)}
        found |= {"attentions": LAYERS, "queries and values": [(d, 3 * d)], "keys and values": 3 * d}
        maps = [[(d, 3 * d), (d, d), (d, f), (f, d)]] * LAYERS
    elif task == "seq2seq":
        layer, above = 4 * square + feed + 2 * norm, 8 * square + feed + 3 * norm
        found |= {"embeddings": VOCAB * d + 2 * (POSITIONS + 2) * d + 2 * norm, "layers": LAYERS * (layer + above)}
        found |= {"last": above, "norms": norm * (2 + 5 * LAYERS)}
        found |= {"biases": 2 * d + LAYERS * (4 * d + f + d + 2 * d + 8 * d + f + d + 3 * d)}
        found |= {"attentions": 3 * LAYERS, "queries and values": [(d, d)] * 2, "keys and values": 2 * d}
        maps = [[(d, d)] * 4 + [(d, f), (f, d)], [(d, d)] * 8 + [(d, f), (f, d)]] * LAYERS
    else:
        layer = 4 * square + feed + 2 * norm
        found |= {"embeddings": (VOCAB + POSITIONS + 2) * d + norm, "layers": LAYERS * layer, "last": layer}
        found |= {"biases": d + LAYERS * (4 * d + f + d + 2 * d), "norms": norm * (1 + 2 * LAYERS)}
        found |= {"attentions": LAYERS, "queries and values": [(d, d)] * 2, "keys and values": 2 * d}
        maps = [[(d, d)] * 4 + [(d, f), (f, d)]] * LAYERS
        if task == "classification":  # the pooler is above the layers
            found |= {"above": square, "biases": found["biases"] + d}
        if task == "mlm":
            found |= {"own head": VOCAB + square + norm, "biases": found["biases"] + VOCAB + 2 * d}
            found["norms"] += norm
    return found | {"maps": maps}


def expected(method: str, task: str) -> int:
    """Return the number of trainable parameters from the formulas of the papers."""
    n, d, r, virtual = sizes(task), WIDTH, 4, 5
    pairs = n["queries and values"] * n["attentions"]
    inner = max(1, d // 4)
    beside = {
        "lora": sum(r * (a + b) for a, b in pairs),
        "dora": sum(r * (a + b) + b for a, b in pairs),
        "vera": sum(r + b for _, b in pairs),
        "adalora": sum(6 * (a + b) + 6 for layer in n["maps"] for a, b in layer),
        "ia3": n["attentions"] * n["keys and values"] + len(n["maps"]) * INNER,
        "prefix": virtual * 2 * LAYERS * d,
        "prompt": virtual * d,
        "ptuning": virtual * d + 3 * (d * d + d),
        "adapter": len(n["maps"]) * (d * inner + inner + inner * d + d),
    }
    beside |= {"rslora": beside["lora"], "pissa": beside["lora"]}
    if method in beside:
        return beside[method] + n["head"]
    if method in ("full", "gradual"):
        return n["embeddings"] + n["layers"] + n["above"] + n["own head"]
    if method == "top:1":
        return n["last"] + n["above"] + n["own head"]
    if method == "head":
        return n["own head"]
    return n["head"] + n[{"bias": "biases", "layernorm": "norms"}[method]]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("method", "task"), SOME_CELLS)
def test_cell(checkpoints, other_process, tmp_path, tokenizer, method, task):
    if (method, task) in IMPOSSIBLE:
        with pytest.raises(InputError, match=IMPOSSIBLE[method, task]):
            Cell(checkpoints, task, method, tmp_path, tokenizer)
        return
    cell = Cell(checkpoints, task, method, tmp_path, tokenizer)
    trainable = {name for name, weight in cell.model.named_parameters() if weight.requires_grad}
    assert sum(w.numel() for w in cell.model.parameters() if w.requires_grad) == expected(method, task)
    start, loss = cell.state(), cell.trainer.evaluate()["eval_loss"]
    cell.trainer.train()

    # trained weights, and no others; the loss; the best epoch
    assert all(torch.equal(start[name], cell.weights[-1][name]) for name in start.keys() - trainable)
    head = {name for name in trainable if name.rpartition("model.")[2].startswith(("classifier", "qa_outputs"))}
    assert bool(head) == (TASKS[task].labels is not None)
    assert all(not torch.equal(start[name], cell.weights[-1][name]) for name in head)
    assert len([entry for entry in cell.trainer.state.log_history if "eval_loss" in entry]) == 3
    assert cell.trainer.state.best_global_step == 8
    assert not same(cell.weights[1], cell.weights[2])
    assert same(cell.state(), cell.weights[1])
    assert cell.trainer.evaluate()["eval_loss"] < loss

    # saved, and loaded by another process
    before = cell.logits()
    cell.trainer.model = merge(cell.tuned, str(tmp_path), save=True)
    cell.trainer.save_model(_internal_call=True)
    saved = METHODS[cell.args.method].saved
    after = before if saved == "apart" else cell.logits()
    assert max((a - b).abs().max().item() for a, b in zip(before, after, strict=True)) < 1e-4
    (tmp_path / "logits").mkdir()
    save_file({str(i): value.contiguous() for i, value in enumerate(after)}, tmp_path / "logits/logits.safetensors")
    request = {"task": task, "folder": str(tmp_path), "checkpoints": str(checkpoints), "merged": saved == "merged"}
    other_process.stdin.write(json.dumps(request) + "\n")

    # meanwhile, resumed from the first epoch
    again = Cell(checkpoints, task, method, tmp_path, tokenizer)
    again.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(again.weights[-1], cell.weights[-1])
    assert same(again.state(), cell.weights[1])

    answer = json.loads(other_process.stdout.readline())
    assert answer["saved"] == 0
    if saved == "apart":
        assert "plain" not in answer  # no process can mistake the model without its adapter for the complete model
    else:
        assert answer["plain"] == 0
    if saved == "merged":
        assert answer["peft"] < 1e-4
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("method", "task"),
    [(m, t) for m, t in CELLS if t == "ner" or (m in ("prefix", "prompt", "adalora") and t in ("clm", "seq2seq"))],
)
def test_each_method_trains_and_predicts_in_bfloat16(checkpoints, tmp_path, tokenizer, method, task):
    cell = Cell(checkpoints, task, method, tmp_path, tokenizer, precision="bf16", num_train_epochs=1, attention="auto")
    loss = cell.trainer.evaluate()["eval_loss"]
    cell.trainer.train()
    assert cell.trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=0.5)
    assert {weight.dtype for weight in cell.model.parameters()} == {torch.float32}
    cell.trainer.model = merge(cell.tuned, str(tmp_path), save=True)
    cell.trainer.save_model(_internal_call=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for logits in cell_logits(task, load_saved(TASKS[task].auto_class, str(tmp_path))):
            assert logits.isfinite().all()


# Methods in more detail


def bert_with(
    name: str,
    folder: Path,
    tokenizer,
    auto_class=AutoModelForTokenClassification,
    config=None,
    labels: tuple[str, ...] | None = ("a", "b", "c"),
    **settings,
):
    """Load a model as a recipe does, from a random checkpoint of a base model."""
    torch.manual_seed(0)
    auto_class.from_config(config or BertConfig(**BERT)).base_model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    labels = None if auto_class is AutoModelForMaskedLM else labels and list(labels)
    return load_model(auto_class, ModelArguments(str(folder / name), **settings), labels, 16)


def test_unfreezing_goes_from_the_top_down(checkpoints, tmp_path, tokenizer):
    cell = Cell(checkpoints, "ner", "gradual", tmp_path, tokenizer, num_train_epochs=4, scores=(0.1, 0.2, 0.3, 0.4))
    start, depth = cell.state(), depths(cell.model, cell.tuned.new_parameters)
    cell.trainer.train()
    for epoch, weights in enumerate(cell.weights):
        moved = {depth[name] for name in start if not torch.equal(start[name], weights[name])}
        assert moved == set(range(LAYERS + 1 - epoch, LAYERS + 2))


def test_the_best_of_an_epoch_without_a_checkpoint_comes_back_whole(checkpoints, tmp_path, tokenizer):
    """Test that gradual unfreezing trains layers that were still frozen in the best epoch."""
    cell = Cell(checkpoints, "ner", "gradual", tmp_path, tokenizer, scores=(0.9, 0.1, 0.2), save_min_seconds=1e6)
    cell.trainer.train()
    assert same(cell.state(), cell.weights[0])


def test_ranks_are_allocated_on_the_way(checkpoints, tmp_path, tokenizer):
    settings = {"num_train_epochs": 10, "scores": tuple(i / 10 for i in range(10))}
    cell = Cell(checkpoints, "ner", "adalora", tmp_path, tokenizer, **settings)
    cell.trainer.train()
    ranks = [
        sum(int((value != 0).sum()) for name, value in weights.items() if "lora_E" in name) for weights in cell.weights
    ]
    maps = 6 * LAYERS
    assert ranks[0] <= 6 * maps
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == 4 * maps  # the target, on average
    per_map = [int((value != 0).sum()) for name, value in cell.weights[-1].items() if "lora_E" in name]
    assert len(set(per_map)) > 1


def test_the_orthogonality_loss_by_hand(checkpoints, tmp_path, tokenizer):
    cell = Cell(checkpoints, "ner", "adalora", tmp_path, tokenizer)
    parts = []
    for name, weight in cell.model.named_parameters():
        if "lora_A" in name:
            parts.append((weight @ weight.T - torch.eye(6)).square().sum().sqrt())
        elif "lora_B" in name:
            parts.append((weight.T @ weight - torch.eye(6)).square().sum().sqrt())
    assert len(parts) == 2 * 6 * LAYERS
    assert orthogonality(cell.model).item() == pytest.approx(0.5 * sum(parts).item() / len(parts), rel=1e-5)


def test_layerwise_rates(checkpoints, tmp_path, tokenizer):
    cell = Cell(checkpoints, "ner", "full", tmp_path, tokenizer, tuning={"layerwise_lr_decay": 0.5}, learning_rate=0.1)
    shares = layer_rates(cell.tuned)
    assert shares["classifier.weight"] == 1
    assert shares["bert.encoder.layer.1.output.dense.bias"] == 0.5
    assert shares["bert.encoder.layer.0.attention.self.query.weight"] == 0.25
    assert shares["bert.embeddings.LayerNorm.weight"] == 0.125
    optimizer = cell.trainer.create_optimizer()
    names = {id(weight): name for name, weight in cell.model.named_parameters()}
    seen = {names[id(w)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for w in g["params"]}
    assert seen.keys() == shares.keys()
    for name, (rate, decay) in seen.items():
        assert rate == pytest.approx(0.1 * shares[name])
        assert decay == (0.0 if "bias" in name or "LayerNorm" in name else 0.01)
    cell.trainer.train()
    assert 0.09 < cell.trainer.state.log_history[0]["learning_rate"] <= 0.1


def test_a_bottleneck_is_that_of_the_paper():
    adapter = Bottleneck(6, 2)
    for weight in adapter.parameters():
        nn.init.normal_(weight)
    h = torch.randn(3, 6)
    inner = (h @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
    assert torch.allclose(adapter(h), h + inner @ adapter.up.weight.T + adapter.up.bias, atol=1e-6)
    fresh = Bottleneck(64, 16)
    assert fresh.down.weight.abs().max() <= 0.02
    assert (fresh(torch.ones(64)) - 1).abs().max() < 0.05


def test_adapters_stand_where_the_papers_put_them(tmp_path, tokenizer):
    model = bert_with("bert", tmp_path, tokenizer, attn_implementation="sdpa").model.eval()
    layer = model.bert.encoder.layer[0]
    hidden = torch.randn(2, 4, WIDTH)
    with torch.no_grad():
        attended = layer.attention.output.dense(layer.attention.self(hidden)[0])
        plain = layer(hidden)
        plain = plain if isinstance(plain, torch.Tensor) else plain[0]
        insert_adapters(model, Shape("houlsby", 4))
        for weight in (w for n, w in model.named_parameters() if "bottleneck" in n):
            nn.init.normal_(weight, std=0.5)
        first, second = layer.attention.output.dense.bottleneck_adapter, layer.output.dense.bottleneck_adapter
        x = layer.attention.output.LayerNorm(first(attended) + hidden)
        inner = nn.functional.gelu(layer.intermediate.dense(x))
        fed = nn.functional.linear(inner, layer.output.dense.weight, layer.output.dense.bias)
        expected = layer.output.LayerNorm(second(fed) + x)
        found = layer(hidden)
        assert torch.allclose(found if isinstance(found, torch.Tensor) else found[0], expected, atol=1e-5)
        model = bert_with("bert", tmp_path, tokenizer, attn_implementation="sdpa").model.eval()
        insert_adapters(model, Shape("pfeiffer", 4))
        adapter = model.bert.encoder.layer[0].bottleneck_adapter
        for weight in adapter.parameters():
            nn.init.normal_(weight, std=0.5)
        found = model.bert.encoder.layer[0](hidden)
        assert torch.allclose(found if isinstance(found, torch.Tensor) else found[0], adapter(plain), atol=1e-5)


def test_houlsby_adapters_number_two_a_layer_and_three_in_a_decoder(checkpoints, tmp_path, tokenizer):
    houlsby = {"adapter_placement": "houlsby"}
    one = WIDTH * 4 + 4 + 4 * WIDTH + WIDTH
    for task, count in (("clm", 2 * LAYERS), ("seq2seq", 5 * LAYERS)):
        model = Cell(checkpoints, task, "adapter", tmp_path, tokenizer, tuning=houlsby).model
        assert sum(w.numel() for w in model.parameters() if w.requires_grad) == count * one


@pytest.mark.parametrize("method", ["lora", "adapter", "prompt"])
def test_a_head_that_the_checkpoint_lacks_is_trained_and_kept(tmp_path, tokenizer, method):
    model = bert_with("bert", tmp_path, tokenizer, AutoModelForMaskedLM, attn_implementation="sdpa")
    model = tune(model, TuningArguments(tuning=method), None).model
    base = model if method == "adapter" else model.get_base_model()
    fresh = {n for n, w in base.named_parameters() if w.requires_grad and n.startswith("cls.")}
    assert fresh == {
        "cls.predictions.bias", "cls.predictions.transform.dense.weight", "cls.predictions.transform.dense.bias",
        "cls.predictions.transform.LayerNorm.weight", "cls.predictions.transform.LayerNorm.bias",
    }  # fmt: skip
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert not base.get_input_embeddings().weight.requires_grad


def test_a_missing_pooler_is_trained(tmp_path, tokenizer):
    torch.manual_seed(0)
    BertModel(BertConfig(**BERT), add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    model = load_model(AutoModelForSequenceClassification, ModelArguments(str(tmp_path / "bert")), ["a", "b"], 16)
    model = tune(model, TuningArguments(lora_r=2), TASKS["classification"].task_type).model
    assert all(weight.requires_grad for weight in model.get_base_model().bert.pooler.parameters())


def test_all_linear_leaves_the_head_out(tmp_path, tokenizer):
    for rank, targets in ((2, ["all-linear"]), (2, None)):
        model = bert_with("bert", tmp_path, tokenizer)
        model = tune(model, TuningArguments(lora_r=rank, lora_target_modules=targets), TASKS["ner"].task_type).model
        adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
        assert len(adapted) == LAYERS * (6 if targets else 2)
        assert not any("classifier" in name for name in adapted)


def test_any_method_of_peft_by_a_file(checkpoints, tmp_path, tokenizer):
    path = tmp_path / "loha.yaml"
    path.write_text("peft_type: loha\nr: 4\nalpha: 8\n")
    cell = Cell(checkpoints, "ner", None, tmp_path / "out", tokenizer, tuning={"peft_config": str(path)})
    cell.trainer.train()
    before = cell.logits()
    cell.trainer.model = merge(cell.tuned, str(tmp_path / "out"), save=True)
    assert max((a - b).abs().max().item() for a, b in zip(before, cell.logits(), strict=True)) < 1e-4


def test_a_peft_file_without_targets_takes_those_of_its_method(checkpoints, tmp_path, tokenizer):
    path = tmp_path / "peft.yaml"

    def tuned(text: str) -> set[str]:
        path.write_text(text)
        model = Cell(checkpoints, "ner", None, tmp_path, tokenizer, tuning={"peft_config": str(path)}).model
        names = {name for name, weight in model.named_parameters() if weight.requires_grad and "classifier" not in name}
        return {
            name.partition(".ln_tuning")[0].partition(".ia3")[0].removeprefix("base_model.model.") for name in names
        }

    norms = ["embeddings.LayerNorm"]
    norms += [f"encoder.layer.{i}.{part}output.LayerNorm" for i in range(LAYERS) for part in ("attention.", "")]
    assert tuned("peft_type: ln_tuning\n") == {f"bert.{name}" for name in norms}
    own = Cell(checkpoints, "ner", "ia3", tmp_path, tokenizer).model
    scaled = {name.partition(".ia3")[0] for name, _ in own.named_parameters() if "ia3" in name}
    assert tuned("peft_type: ia3\n") == {name.removeprefix("base_model.model.") for name in scaled}


def test_virtual_keys_and_values_by_a_file_leave_the_text_as_it_is(checkpoints, tmp_path, tokenizer):
    (tmp_path / "peft.yaml").write_text("peft_type: cartridge\nnum_virtual_tokens: 5\n")
    tuning = {"peft_config": str(tmp_path / "peft.yaml")}
    cell = Cell(checkpoints, "ner", None, tmp_path, tokenizer, tuning=tuning)
    lengths = [logits.shape for logits in Cell(checkpoints, "ner", "full", tmp_path, tokenizer).logits()]
    assert [logits.shape for logits in cell.logits()] == lengths


def test_tokens_of_a_tied_head_are_trained_with_it(checkpoints, tmp_path, tokenizer):
    """Test that the head computes scores itself, without the layer that computes losses in chunks."""
    (tmp_path / "peft.yaml").write_text("peft_type: trainable_tokens\ntoken_indices: [12, 13]\n")
    tuning = {"peft_config": str(tmp_path / "peft.yaml")}
    cell = Cell(checkpoints, "clm", None, tmp_path / "out", tokenizer, tuning=tuning, num_train_epochs=1)
    expected = Cell(checkpoints, "clm", "full", tmp_path / "out", tokenizer).trainer.evaluate()["eval_loss"]
    assert cell.trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    start = cell.plain.get_input_embeddings().weight.detach().clone()
    cell.trainer.train()
    model = merge(cell.tuned, str(tmp_path / "out"), save=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    moved = (model.get_input_embeddings().weight != start).any(-1).nonzero()[:, 0]
    assert moved.tolist() == [12, 13]


@pytest.mark.parametrize(("task", "target"), [("clm", "lm_head"), ("mlm", "word_embeddings"), ("seq2seq", "shared")])
def test_one_of_tied_layers_cannot_be_adapted(checkpoints, tmp_path, tokenizer, task, target):
    with pytest.raises(InputError, match=f"{target} are tied to another layer"):
        Cell(checkpoints, task, "lora", tmp_path, tokenizer, tuning={"lora_target_modules": [target]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r: 4\n", "needs `peft_type`, one of: .*LOHA"),
        ("peft_type: loha\nalhpa: 4\n", "LOHA has no alhpa; did you mean alpha"),
        ("peft_type: poly\n", "POLY needs a task number"),
        ("peft_type: lily\n", "LILY cannot be merged into the weights"),
        ("peft_type: prefix_tuning\n", "PREFIX_TUNING needs num_virtual_tokens"),
        ("peft_type: trainable_tokens\n", "TRAINABLE_TOKENS needs token_indices"),
        ("peft_type: adalora\ntotal_step: 9\n", "total_step of ADALORA follows from the steps of the run"),
        ("peft_type: [\n", "expected"),
        ("peft_type: loha\ntarget_modules: [nothing]\n", "Target modules"),
    ],
)
def test_a_wrong_peft_file_is_an_input_error(checkpoints, tmp_path, tokenizer, text, message):
    (tmp_path / "peft.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        Cell(checkpoints, "ner", None, tmp_path / "out", tokenizer, tuning={"peft_config": str(tmp_path / "peft.yaml")})


def tiny_t5(tmp_path: Path, tokenizer) -> str:
    config = T5Config(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=INNER, num_layers=LAYERS, num_heads=HEADS,
        decoder_start_token_id=0,
    )  # fmt: skip
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "seq2seq")
    tokenizer.save_pretrained(tmp_path / "seq2seq")
    return str(tmp_path)


def test_cells_that_a_model_rules_out(tmp_path, tokenizer):
    with pytest.raises(InputError, match="--tuning bias: a t5 model has no biases"):
        Cell(Path(tiny_t5(tmp_path, tokenizer)), "seq2seq", "bias", tmp_path / "out", tokenizer)
    deberta = DebertaV2Config(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=INNER,
    )  # fmt: skip
    for arguments, message in (
        ({"tuning": "ia3"}, "finds no keys and values in a deberta-v2 model"),
        ({"tuning": "adapter", "adapter_placement": "houlsby"}, "finds no attention in a deberta-v2 model"),
    ):
        model = bert_with("deberta", tmp_path, tokenizer, config=deberta)
        with pytest.raises(InputError, match=message):
            tune(model, TuningArguments(**arguments), TASKS["ner"].task_type)
    model = bert_with("deberta", tmp_path, tokenizer, config=deberta)
    with pytest.raises(InputError, match="a deberta-v2 model takes no virtual tokens of prefix_tuning"):
        tune(model, TuningArguments(tuning="prefix"), TASKS["ner"].task_type)
    opt = OPTConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, ffn_dim=INNER,
    )  # fmt: skip
    model = bert_with("opt", tmp_path, tokenizer, AutoModelForCausalLM, opt, labels=None)
    with pytest.raises(InputError, match="the head of OPTForCausalLM would read virtual tokens as text"):
        tune(model, TuningArguments(tuning="prompt"), TASKS["clm"].task_type)
    model = bert_with("gpt", tmp_path, tokenizer, AutoModelForSequenceClassification, GPT2Config(**GPT2))
    with pytest.raises(InputError, match="GPT2ForSequenceClassification reads padding"):
        tune(model, TuningArguments(tuning="prompt"), TASKS["classification"].task_type)
    model = bert_with("bert", tmp_path, tokenizer)
    with pytest.raises(InputError, match="--tuning top:3: the model has 2 layers"):
        tune(model, TuningArguments(tuning="top:3"), TASKS["ner"].task_type)
    model = bert_with("bert", tmp_path, tokenizer)
    model.read_length = 60
    with pytest.raises(InputError, match="20 virtual tokens and 60 tokens of text exceed the 64 positions"):
        tune(model, TuningArguments(tuning="prefix"), TASKS["ner"].task_type)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tuning": "lroa"}, "--tuning lroa: no such method; did you mean lora"),
        ({"tuning": "top"}, "top takes a number of layers, such as top:2"),
        ({"tuning": "top:0"}, "top takes a number of layers"),
        ({"tuning": "bias:2"}, "and no other method does"),
        ({"tuning": "full", "lora_r": 4}, "--lora_r: full does not use it; use it with --tuning lora, rslora"),
        ({"lora_alpha": 32}, "--lora_alpha: full does not use it"),
        ({"lora_r": 4, "lora_alpha": 0.0}, "--lora_alpha 0.0: must be above 0"),
        ({"tuning": "ia3", "lora_target_modules": ["query"]}, "--lora_target_modules: ia3 does not use it"),
        (
            {"tuning": "lora", "num_virtual_tokens": 4},
            "--num_virtual_tokens: lora does not use it; .* prefix, prompt",
        ),
        ({"peft_config": "x.yaml", "adapter_placement": "houlsby"}, "is set by the file of --peft_config"),
        ({"tuning": "bias", "layerwise_lr_decay": 0.9}, "needs all weights trained, not bias"),
        ({"layerwise_lr_decay": 1.5}, "must be above 0 and at most 1"),
        ({"tuning": "dora", "quantize": "4bit"}, "works with lora and rslora only"),
        ({"tuning": "lora", "peft_config": "x.yaml"}, "names its own method"),
        ({"num_virtual_tokens": 0}, "must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        TuningArguments(**arguments)


def test_a_rank_alone_means_lora_and_each_method_has_a_rate():
    assert TuningArguments(lora_r=4).method == "lora"
    assert TuningArguments().method == "full"
    assert TuningArguments().rate(2e-4) == 2e-4
    assert TuningArguments(lora_r=4).rate(2e-4) == pytest.approx(4e-3)
    for name in METHODS:
        assert TuningArguments(tuning="top:1" if name == "top" else name).rate(1e-4) >= 1e-4


def test_quantized_weights_need_a_gpu(checkpoints, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = ModelArguments(str(checkpoints / "ner"))
    with pytest.raises(InputError, match="--quantize 4bit: needs a CUDA GPU, and this machine has none"):
        load_model(AutoModelForTokenClassification, args, ["a", "b"], 16, quantize="4bit")


@pytest.mark.parametrize("method", ["prompt", "ptuning"])
def test_virtual_tokens_are_as_wide_as_embeddings(tmp_path, tokenizer, method):
    """Test embeddings narrower than the layers (ELECTRA), or with another name for their width (DistilBERT)."""
    narrow = ElectraConfig(**BERT | {"embedding_size": 8})
    distil = DistilBertConfig(vocab_size=VOCAB, dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=INNER)
    for name, config, width in (("electra", narrow, 8), ("distilbert", distil, WIDTH)):
        model = bert_with(name, tmp_path, tokenizer, config=config)
        model = tune(model, TuningArguments(tuning=method, num_virtual_tokens=4), TASKS["ner"].task_type).model
        assert model.active_peft_config.token_dim == width
        found = model(input_ids=torch.ones(2, 6, dtype=torch.int64), attention_mask=torch.ones(2, 6)).logits
        assert found.shape == (2, 6, 3)


def test_ranks_are_allocated_where_steps_leave_layers_out(checkpoints, tmp_path, tokenizer):
    cell = Cell(checkpoints, "seq2seq", "adalora", tmp_path, tokenizer, speed="off")
    cell.plain.model.encoder.layerdrop = cell.plain.model.decoder.layerdrop = 0.5
    cell.trainer.train()
    assert cell.trainer.state.global_step == 12


def test_the_layers_of_a_model_with_capped_scores_are_found(tokenizer):
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, head_dim=8,
        num_key_value_heads=1, intermediate_size=INNER,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert [layer.value for layer in watch(model)] == [[f"model.layers.{i}.self_attn.v_proj"] for i in range(LAYERS)]


def test_layers_are_found_in_their_order(tmp_path, tokenizer):
    model = AutoModelForSeq2SeqLM.from_pretrained(Path(tiny_t5(tmp_path, tokenizer)) / "seq2seq")
    assert layer_names(model) == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


@pytest.mark.soak
def test_two_processes_train_as_one(checkpoints, tmp_path, tokenizer):
    shutil.copytree(checkpoints, tmp_path / "checkpoints")
    Job([str(tmp_path), *ON_TWO], tmp_path / "log", processes=2, main=train_on_both).succeeds()
    for name in ON_TWO:
        method, task = name.split("/")
        cell = Cell(checkpoints, task, method, tmp_path / "one", tokenizer, **EXACT)
        cell.trainer.train()
        two = load_file(tmp_path / "two" / method / f"{task}.safetensors")
        worst = max((two[name] - value).abs().max().item() for name, value in cell.weights[-1].items())
        moved = max((two[name] - cell.start[name]).abs().max().item() for name in two)
        assert worst < 1e-5 < moved, (method, task)


# Recipes


def small_rows(recipe: str) -> list[dict]:
    """Return a few rows for a recipe."""
    if recipe == "translation":
        return [{"translation": {"en": f"{n} apples", "de": f"{n} Äpfel"}} for n in range(12)]
    if recipe in ("mlm", "clm"):
        text = "the {} small houses of the town stand beside the river and the road to {}"
        return [{"text": text.format(n, n + 1)} for n in range(12)]
    if recipe == "summarization":
        text = "The {} small houses stand beside the river. The road leads to {} more. Nobody lives there."
        return [{"document": text.format(n, n + 1), "summary": f"There are {n} houses."} for n in range(12)]
    return read_jsonl(ROOT / "recipes" / recipe / "sample" / "train.jsonl")[:16]


def questions() -> list[dict]:
    text = "Ann Lee met Bob in Rome on Monday."
    answers = [("Who met Bob?", "Ann Lee"), ("Where was it?", "Rome"), ("When was it?", "Monday")]
    found = []
    for i in range(4):
        for question, answer in answers:
            given = {"text": [answer], "answer_start": [text.index(answer)]}
            found.append({"id": f"{i} {question}", "question": question, "context": f"{text} {i}", "answers": given})
    return found


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ("sentiment", "prefix"), ("ner", "adapter"), ("qa", "prompt"), ("mlm", "ptuning"), ("clm", "prompt"),
        ("translation", "prefix"), ("translation", "prompt"), ("mlm", "lora"), ("clm", "gradual"),
        ("summarization", "adapter"), ("summarization-abstractive", "prefix"),
    ],
)  # fmt: skip
def test_each_recipe_takes_the_switch_and_its_predict_the_folder(
    checkpoints, tmp_path, recipe, method, capsys, monkeypatch
):
    recipe, _, kind = recipe.partition("-")
    rows = questions() if recipe == "qa" else small_rows(recipe)
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    writes = recipe == "translation" or kind == "abstractive"
    task = "seq2seq" if writes else {"sentiment": "classification", "summarization": "ner"}.get(recipe, recipe)
    if recipe == "clm" or writes:  # their texts have a start and an end token
        shutil.copytree(checkpoints / task, tmp_path / task)
        ending = PreTrainedTokenizerFast.from_pretrained(tmp_path / task, bos_token="[CLS]", eos_token="[SEP]")
        ending.save_pretrained(tmp_path / task)
        checkpoints = tmp_path
    words = [word for split in ("train", "validation", "test") for word in (f"--{split}_file", file)]
    words += ["--model_name_or_path", str(checkpoints / task), "--output_dir", str(tmp_path / "out")]
    words += ["--tuning", method, "--num_train_epochs", "2", "--precision", "fp32"]
    words += ["--disable_tqdm", "true"]
    length = {"qa": ("--max_seq_length", "48", "--doc_stride", "8", "--max_question_length", "12")}
    length["translation"] = ("--max_source_length", "32", "--source_lang", "en", "--target_lang", "de")
    length["summarization"] = ("--max_source_length", "48")
    words += length.get(recipe, ("--max_seq_length", "48"))
    words += ("--max_target_length", "16") if writes else ()
    script = f"train_{kind}" if kind else "train"
    train, predict = (importlib.import_module(f"recipes.{recipe}.{name}") for name in (script, "predict"))
    train.main([*words, *(["--num_virtual_tokens", "4"] if method in ONLY["num_virtual_tokens"] else [])])
    out = tmp_path / "out"
    assert (out / "base").is_dir() == (METHODS[method].saved == "apart")
    assert ("cannot be merged" in (out / "README.md").read_text()) == (out / "base").is_dir()
    assert json.loads((out / "run.json").read_text())["arguments"]["tuning"] == method
    text = {"mlm": [{"text": "the [MASK] houses"}], "clm": [{"prompt": "the small houses"}]}.get(recipe)
    known = ("label", "ner_tags", "answers", "summary")
    asked = text or [{k: v for k, v in row.items() if k not in known} for row in rows]
    predict.main([
        "--model", str(out), "--input", write_jsonl(tmp_path / "in.jsonl", asked), "--output",
        str(tmp_path / "found.jsonl"), *(() if recipe == "clm" else ("--precision", "fp32")),
    ])  # fmt: skip
    found = read_jsonl(tmp_path / "found.jsonl")
    assert len(found) == len(asked)
    if recipe in ("sentiment", "summarization", "translation"):
        trained = [row["predicted"] for row in read_jsonl(out / "predictions_test.jsonl")]
        assert [row["predicted"] for row in found] == trained
    if recipe == "qa":
        trained = [row["predicted"] for row in read_jsonl(out / "predictions_test.jsonl")]
        assert [row["answer"] for row in found] == trained
    if (out / "base").is_dir():
        with pytest.raises(InputError, match="the adapter is not merged"):
            train.main([*words, "--model_name_or_path", str(out), "--output_dir", str(tmp_path / "more")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--quantize 4bit: needs a CUDA GPU"):
        train.main([*words, "--tuning", "lora", "--quantize", "4bit", "--output_dir", str(tmp_path / "quantized")])
    capsys.readouterr()
