"""Test that `--speed off` is plain transformers, and that `auto` trains to the same losses and predictions."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import TaskType
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.modeling_outputs import TokenClassifierOutput

from common.args import SpeedArguments, TrainingArguments
from common.models.load import LoadedModel
from common.models.structure import set_dropout
from common.speed import apply
from common.speed.head import HEAD_AT_LABELS
from common.speed.padding_free import PADDING_FREE
from common.training import (
    LanguageArguments,
    LanguageTrainer,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    label_losses,
    losses_at_labels,
)
from common.tuning import TuningArguments, tune
from tests.common.speed.models import CAUSAL, MASKED, NO_DROPOUT, OWN, SIZES, language_model

TASK_TYPES = {"clm": TaskType.CAUSAL_LM, "seq2seq": TaskType.SEQ_2_SEQ_LM}
on_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="a CPU has these features")


class OwnHead(nn.Module):
    """Custom head around an encoder, which also reads the mean of all vectors."""

    def __init__(self):
        super().__init__()
        self.encoder = AutoModel.from_config(AutoConfig.for_model("bert", **SIZES | NO_DROPOUT))
        self.config = self.encoder.config
        self.classifier = nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> TokenClassifierOutput:
        vectors = self.encoder(input_ids, attention_mask=attention_mask)[0]
        return TokenClassifierOutput(logits=self.classifier(vectors + vectors.mean(1, keepdim=True)))


def tagger(kind: str = "bert", auto_class: type = AutoModelForTokenClassification):
    return auto_class.from_config(AutoConfig.for_model(kind, **SIZES | NO_DROPOUT, num_labels=3))


MODELS = {
    "ner": tagger,
    "ner, a type that is not listed": lambda: tagger("deberta-v2"),
    "ner, own head": OwnHead,
    "mlm": lambda: language_model("bert"),
    "clm": lambda: language_model("gpt2"),
    "clm, rotary positions": lambda: language_model("llama"),
    "seq2seq": lambda: language_model("m2m_100"),
    "seq2seq, warm-started": lambda: language_model("encoder-decoder"),
    "seq2seq, a type that is not listed": lambda: language_model("t5"),
}


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    set_dropout(model, 0.0)
    if model.can_generate():
        model.generation_config.decoder_start_token_id = 0  # that of Marian exceeds the vocabulary
    return model


def every_architecture() -> dict:
    """Return task and model type -> model, for every model type that a feature of `common.speed` allows."""
    made = {}
    for kind in sorted(HEAD_AT_LABELS):
        task = "mlm" if kind in MASKED else "clm" if kind in CAUSAL else "seq2seq"
        made[f"{task}, {kind}"] = lambda kind=kind: without_dropout(language_model(kind))
    for kind in sorted(PADDING_FREE - {"opt", "gpt2", "biogpt"}):
        made[f"ner, {kind}"] = lambda kind=kind: without_dropout(
            AutoModelForTokenClassification.from_config(
                AutoConfig.for_model(kind, **OWN.get(kind, SIZES | NO_DROPOUT), num_labels=3)
            )
        )
    return made


EVERY = every_architecture()


def rows() -> Dataset:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (24,), generator=random).tolist()
    ids = [torch.randint(5, 200, (n,), generator=random).tolist() for n in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def collate_for(task: str):
    """Pad a batch and add labels: a class, labels at some tokens, the next token, or a target."""

    def collate(features: list[dict]) -> dict[str, Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in features]
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=1)
        labels = ids.masked_fill(mask == 0, -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if task == "ner":
            batch["labels"] = torch.where(labels == -100, labels, labels % 3)
        elif task == "mlm":
            batch["labels"] = labels.masked_fill(ids % 4 != 0, -100)
        elif task == "clm":
            batch["labels"] = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        else:
            batch["decoder_input_ids"] = nn.functional.pad(ids[:, :-1], (1, 0), value=0)
        return batch

    return collate


def trained(name: str, speed: str, folder: Path, method: str = "full", **settings) -> Trainer:
    torch.manual_seed(0)
    task = name.split(",")[0]
    kinds = {"mlm": LanguageArguments, "clm": LanguageArguments, "seq2seq": Seq2SeqTrainingArguments}
    values = {
        "precision": "fp32", "disable_tqdm": True, "max_steps": 6, "logging_steps": 1, "learning_rate": 1e-3,
        "per_device_train_batch_size": 8, "train_sampling_strategy": "random", "eval_strategy": "no",
        "save_strategy": "no", "remove_unused_columns": False, "warmup_steps": 0, "label_smoothing_factor": 0.1,
    }  # fmt: skip
    values |= {"predict_with_generate": False, "metric_for_best_model": "loss"} if task == "seq2seq" else {}
    args = kinds.get(task, TrainingArguments)(output_dir=str(folder), speed=speed, **values | settings)
    model = (MODELS | EVERY)[name]()
    loaded = LoadedModel(model, None, source="a checkpoint", read_length=30)
    tuning = TuningArguments(tuning=method, **({"lora_dropout": 0.0} if method == "lora" else {}))
    tuned = tune(loaded, tuning, TASK_TYPES.get(task))
    trainer_class = {"mlm": LanguageTrainer, "clm": LanguageTrainer, "seq2seq": Seq2SeqTrainer}.get(task, Trainer)
    losses = label_losses if task == "ner" else losses_at_labels
    trainer = trainer_class(tuned, args, train_dataset=rows(), data_collator=collate_for(task), losses=losses)
    trainer.train()
    return trainer


def compare(name: str, tmp_path: Path, method: str = "full", **settings) -> list[Trainer]:
    """Train with `off` and with `auto`; compare losses, weights and an evaluation."""
    trainers = [trained(name, speed, tmp_path / speed, method, **settings) for speed in ("off", "auto")]
    off, auto = ([log["loss"] for log in t.state.log_history if "loss" in log] for t in trainers)
    assert len(off) == 6
    assert auto == pytest.approx(off, rel=1e-4)
    for one, other in zip(*(t.model.parameters() for t in trainers), strict=True):
        # AdamW turns a gradient that is 0 but for rounding into a whole step
        assert ((one - other).abs() > 2e-4).float().mean() < 1e-4
    losses = [t.evaluate(rows())["eval_loss"] for t in trainers]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    return trainers


@on_cpu
@pytest.mark.parametrize("name", MODELS)
def test_off_and_auto_train_to_the_same_losses_and_predictions(name, tmp_path, capsys):
    off, auto = compare(name, tmp_path)
    assert off.speed.record() == {"applied": [], "fell_back": {}}
    plain = MODELS[name]()
    assert {type(m) for m in off.model.modules()} == {type(m) for m in plain.modules()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in off.model.modules())
    record = auto.speed.record()
    assert "dropout" in record["applied"]
    printed = capsys.readouterr().out
    assert [line for line in printed.split("\n") if line.startswith("speed: ")] == [auto.speed.line()]
    expected = {
        "ner": ({"padding_free"}, {}),
        "ner, a type that is not listed": (set(), {"padding_free": "not tested with deberta-v2"}),
        "ner, own head": (set(), {"padding_free": "not tested with OwnHead"}),
        "mlm": ({"padding_free", "head_at_labels", "last_layer_at_labels", "head_losses"}, {}),
        "clm": ({"padding_free", "head_at_labels", "head_losses"}, {}),
        "clm, rotary positions": ({"head_at_labels", "head_losses"}, {"padding_free": "not tested with llama"}),
        "seq2seq": ({"padding_free", "functional_dropout", "head_at_labels", "head_losses"}, {}),
        "seq2seq, warm-started": ({"padding_free", "head_at_labels", "head_losses"}, {}),
        "seq2seq, a type that is not listed": ({"head_losses"}, {"padding_free": "not tested with t5"}),
    }
    applied, fell_back = expected[name]
    assert applied <= set(record["applied"])
    assert record["fell_back"] == fell_back
    if name == "ner, own head":
        return
    batch = collate_for(name.split(",")[0])(rows().to_list())
    batch.pop("labels")
    logits = []
    for trainer, folder in ((off, tmp_path / "a"), (auto, tmp_path / "b")):
        trainer.save_model(str(folder))
        loaded = type(plain).from_pretrained(folder).eval()
        with torch.no_grad():
            logits.append(loaded(**batch).logits[batch["attention_mask"].bool()])
    assert torch.allclose(*logits, atol=2e-3)
    if name.startswith("seq2seq"):
        return
    model = loaded
    with torch.no_grad():  # inference also computes real tokens only
        speed = apply(LoadedModel(model, None), SpeedArguments())
        assert speed.without_padding is ("padding_free" in applied)
        assert torch.allclose(model(**batch).logits[batch["attention_mask"].bool()], logits[1], atol=1e-4)


@on_cpu
@pytest.mark.soak
@pytest.mark.parametrize("name", EVERY)
def test_off_and_auto_train_to_the_same_losses_on_every_architecture(name, tmp_path):
    compare(name, tmp_path)


@on_cpu
@pytest.mark.parametrize("method", ["head", "top:1", "lora"])
@pytest.mark.parametrize("name", ["ner", "ner, own head"])
def test_off_and_auto_agree_under_tuning(name, method, tmp_path):
    compare(name, tmp_path, method)


@on_cpu
@pytest.mark.parametrize("name", ["mlm", "clm", "seq2seq"])
def test_off_and_auto_agree_where_activations_are_computed_again(name, tmp_path):
    _, auto = compare(name, tmp_path, gradient_checkpointing=True)
    reason = "--gradient_checkpointing computes layers twice"
    fell_back = {"padding_free", "functional_dropout"} if name == "seq2seq" else set()
    assert {k for k, value in auto.speed.fell_back.items() if value == reason} == fell_back


@on_cpu
@pytest.mark.parametrize("name", ["mlm", "clm", "seq2seq"])
def test_off_and_auto_agree_under_r_drop(name, tmp_path):
    """R-Drop compares scores, which the head must return. (The argument needs a dropout; the models have none.)"""
    _, auto = compare(name, tmp_path, r_drop=0.5, dropout=0.1)
    assert auto.speed.fell_back["head_losses"] == "--r_drop compares scores"
    assert "head_at_labels" in auto.speed.applied


@on_cpu
def test_what_a_user_chose_stays():
    args = TrainingArguments(output_dir="unused", report_to=["none"])
    model = tagger()
    speed = apply(LoadedModel(model, None, attn_implementation="sdpa"), args)
    assert speed.fell_back == {"padding_free": "attn_implementation is sdpa"}
    assert model.config._attn_implementation == "sdpa"


@on_cpu
def test_a_sequence_classifier_computes_first_tokens_in_its_last_layer():
    model = tagger(auto_class=AutoModelForSequenceClassification).eval()
    plain = copy.deepcopy(model)
    speed = apply(LoadedModel(model, None), SpeedArguments())
    assert speed.applied == ["padding_free", "last_layer_at_first_token", "dropout"]
    assert speed.line() == (
        "speed: same results faster by padding_free, last_layer_at_first_token, dropout (--speed off: without)"
    )
    batch = collate_for("ner")(rows().to_list())
    batch.pop("labels")
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, plain(**batch).logits, atol=1e-5)


@on_cpu
@pytest.mark.parametrize("name", ["ner", "ner, own head", "mlm", "clm", "seq2seq"])
def test_a_second_trainer_of_one_model_computes_the_same(name, tmp_path):
    trainer = trained(name, "auto", tmp_path / "first")
    before = trainer.evaluate(rows())["eval_loss"]
    again = type(trainer)(
        trainer.tuned, trainer.args, train_dataset=rows(), data_collator=trainer.data_collator, losses=trainer.losses
    )
    assert again.evaluate(rows())["eval_loss"] == pytest.approx(before, rel=1e-4)
    again.train()


@on_cpu
def test_an_encoder_decoder_under_lora_leaves_out_padding(tmp_path):
    _, auto = compare("seq2seq", tmp_path, "lora")
    assert {"padding_free", "head_at_labels", "head_losses"} <= set(auto.speed.applied)
