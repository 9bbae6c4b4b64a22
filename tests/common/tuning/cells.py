"""Run a tuning method on a tiny model of a task, in one process or two, for tests/common/tuning/test_tune.py.

python -m tests.common.tuning.cells: compares the outputs of saved folders, one line of JSON each.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel, TaskType
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
)

from common.args import ModelArguments, TrainingArguments
from common.inference.predictor import load_saved
from common.models.encoder_decoder import Seq2SeqModelArguments, load_encoder_decoder, load_seq2seq_tokenizer
from common.models.load import load_model
from common.models.structure import set_dropout
from common.training import label_losses, losses_at_labels
from common.training.language_model import LanguageArguments, LanguageTrainer
from common.training.seq2seq import Seq2SeqTrainer, Seq2SeqTrainingArguments
from common.training.trainer import Trainer
from common.tuning.methods import ONLY, TuningArguments
from common.tuning.tune import tune
from recipes.qa.spans import answer_in_context, span_losses
from tests.conftest import build_tokenizer

WIDTH, INNER, LAYERS, HEADS, VOCAB, POSITIONS = 16, 32, 2, 2, 600, 64
PAD, MASK, ROWS, EPOCHS = 0, 4, 16, 3
BERT = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": INNER, "max_position_embeddings": POSITIONS, "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1, "initializer_range": 0.3,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": INNER,
    "n_positions": POSITIONS, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": PAD,
    "initializer_range": 0.3,
}  # fmt: skip
BART = {
    "vocab_size": VOCAB, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER, "max_position_embeddings": POSITIONS, "pad_token_id": PAD, "bos_token_id": 2,
    "eos_token_id": 3, "decoder_start_token_id": 3, "forced_eos_token_id": None, "init_std": 0.3,
}  # fmt: skip


#: settings that divide the same rows differently, and give the same weights up to rounding
EXACT = {"optim": "sgd", "learning_rate": 0.05, "save_strategy": "no", "dropout": 0.0, "tuning": {"lora_dropout": 0.0}}


class Task(NamedTuple):
    auto_class: type
    config: object
    labels: list[str] | None
    task_type: TaskType | None


TASKS = {
    "classification": Task(
        AutoModelForSequenceClassification, BertConfig(**BERT), ["a", "b", "c"], TaskType.SEQ_CLS
    ),
    "ner": Task(AutoModelForTokenClassification, BertConfig(**BERT), ["a", "b", "c"], TaskType.TOKEN_CLS),
    "qa": Task(AutoModelForQuestionAnswering, BertConfig(**BERT), ["LABEL_0", "LABEL_1"], TaskType.QUESTION_ANS),
    "mlm": Task(AutoModelForMaskedLM, BertConfig(**BERT), None, None),
    "clm": Task(AutoModelForCausalLM, GPT2Config(**GPT2), None, TaskType.CAUSAL_LM),
    "seq2seq": Task(AutoModelForSeq2SeqLM, BartConfig(**BART), None, TaskType.SEQ_2_SEQ_LM),
}  # fmt: skip


def make_checkpoints(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Make a random "pretrained" model for each task; models of tasks with labels get another head."""
    for name, task in TASKS.items():
        torch.manual_seed(0)
        if task.labels:
            task.config.id2label = dict(enumerate(["x", "y"]))
        task.auto_class.from_config(task.config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def load(folder: Path, task: str, attention: str = "sdpa"):
    """Load the pretrained model of a task as a recipe does."""
    path = str(folder / task)
    torch.manual_seed(1)
    if task == "seq2seq":
        args = Seq2SeqModelArguments(path, attn_implementation=attention)
        return load_encoder_decoder(args, load_seq2seq_tokenizer(path), 16, 16)
    args = ModelArguments(path, attn_implementation=attention)
    return load_model(TASKS[task].auto_class, args, TASKS[task].labels, 16)


def data(task: str) -> Dataset:
    """Return rows of different length with something to learn: the tokens determine the labels."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(ROWS):
        ids = random.integers(10, 40, size=4 + i % 9)
        if task == "classification":
            labels = i % 3
        elif task == "ner":
            labels = (ids % 3).tolist()
        elif task == "qa":
            labels = [1 + i % 2, 2 + i % 2]
        elif task == "mlm":
            labels = [int(token) if j % 3 == 1 else -100 for j, token in enumerate(ids)]
            ids[1::3] = MASK
        else:
            labels = [*ids[1:].tolist(), 3]
        rows.append({"input_ids": ids.tolist(), "labels": labels})
    return Dataset.from_list(rows)


def collate(rows: list[dict]) -> dict[str, Tensor]:
    """Pad rows to the longest; a row has one label, two labels, or one label per token."""
    length = max(len(row["input_ids"]) for row in rows)

    def filled(values: list[int], value: int) -> list[int]:
        return values + [value] * (length - len(values))

    batch = {
        "input_ids": torch.tensor([filled(row["input_ids"], PAD) for row in rows]),
        "attention_mask": torch.tensor([filled([1] * len(row["input_ids"]), 0) for row in rows]),
    }
    one = rows[0]["labels"]
    each = isinstance(one, int) or all(len(row["labels"]) == 2 for row in rows)
    batch["labels"] = torch.tensor([row["labels"] if each else filled(row["labels"], -100) for row in rows])
    return batch


def collate_windows(rows: list[dict]) -> dict[str, Tensor]:
    batch = collate(rows)
    return batch | {"context_mask": batch["attention_mask"].bool()}


def collate_pairs(rows: list[dict]) -> dict[str, Tensor]:
    batch = collate(rows)
    first = torch.full_like(batch["labels"][:, :1], 3)
    moved = torch.cat([first, batch["labels"][:, :-1]], 1)
    return batch | {"decoder_input_ids": moved.masked_fill(moved == -100, PAD)}


COLLATORS = {"seq2seq": collate_pairs, "qa": collate_windows}


class Cell:
    """A method on a task, ready to train. `weights` holds the trained weights after each epoch."""

    def __init__(
        self,
        checkpoints: Path,
        task: str,
        method: str,
        folder: Path,
        tokenizer: PreTrainedTokenizerFast,
        attention: str = "sdpa",
        scores: tuple[float, ...] = (0.1, 0.9, 0.2),
        tuning: dict | None = None,
        dropout: float | None = None,
        **settings,
    ):
        self.task, self.method = task, method
        loaded = load(checkpoints, task, attention)
        self.plain = loaded.model
        sizes = {"lora_r": 4, "num_virtual_tokens": 5, "adapter_reduction": 4}
        more = {name: value for name, value in (sizes | (tuning or {})).items() if method in ONLY.get(name, (method,))}
        self.args = TuningArguments(tuning=method, **more)
        set_dropout(self.plain, dropout)
        if task == "qa":
            answer_in_context(self.plain)
        torch.manual_seed(2)
        self.tuned = tune(loaded, self.args, TASKS[task].task_type)
        self.model = self.tuned.model
        kinds = {"seq2seq": Seq2SeqTrainingArguments, "mlm": LanguageArguments, "clm": LanguageArguments}
        values = {
            "precision": "fp32", "disable_tqdm": True, "num_train_epochs": EPOCHS, "logging_steps": 1,
            "per_device_train_batch_size": 4, "save_min_seconds": 0, "save_total_limit": None,
            "metric_for_best_model": "scripted", "greater_is_better": True, "remove_unused_columns": False,
            "learning_rate": self.args.rate(full=5e-4), "warmup_steps": 0,
        }  # fmt: skip
        values |= {"seq2seq": {"predict_with_generate": False}, "clm": {"loss_chunk": 8}}.get(task, {})
        args = kinds.get(task, TrainingArguments)(output_dir=str(folder), **values | settings)
        given = {"model": self.tuned, "args": args, "train_dataset": data(task), "eval_dataset": data(task)}
        given |= {"data_collator": COLLATORS.get(task, collate)}
        if task == "seq2seq":
            self.trainer = Seq2SeqTrainer(**given, losses=losses_at_labels)
        elif task in ("mlm", "clm"):
            self.trainer = LanguageTrainer(**given, losses=losses_at_labels)
        else:
            self.trainer = Trainer(**given, losses=span_losses if task == "qa" else label_losses)
        self.start = self.state()
        self.weights: list[dict[str, Tensor]] = []
        self.trainer.compute_metrics = self._scripted(self.trainer.compute_metrics, scores)

    def _scripted(self, metrics: Callable, scores: tuple[float, ...]) -> Callable:
        """Return metrics with a score that makes the second epoch the best."""

        def scripted(prediction) -> dict[str, float]:
            found = metrics(prediction)
            if not self.trainer.is_in_train:
                return found
            self.weights.append(self.state())
            epoch = round(self.trainer.state.epoch)
            return found | {"scripted": scores[epoch - 1]}

        return scripted

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

    @torch.no_grad()
    def logits(self, model=None) -> list[Tensor]:
        return logits(self.task, self.trainer.model if model is None else model)


@torch.no_grad()
def logits(task: str, model) -> list[Tensor]:
    """Return the outputs of a model for the rows of a task, batch by batch."""
    rows = data(task).to_list()
    collator = collate_pairs if task == "seq2seq" else collate
    model.eval()
    found = []
    for i in range(0, len(rows), 8):
        batch = collator(rows[i : i + 8])
        batch.pop("labels")
        outputs = model(**batch)
        found.append(torch.cat([outputs.start_logits, outputs.end_logits]) if task == "qa" else outputs.logits)
    return found


def serve() -> None:
    """Print a line for each request: whether a saved folder computes the outputs of another process."""
    for line in sys.stdin:
        request = json.loads(line)
        task, folder = request["task"], Path(request["folder"])
        with contextlib.redirect_stdout(sys.stderr):
            answer = {"saved": compare(task, load_saved(TASKS[task].auto_class, str(folder)), folder)}
            with contextlib.suppress(OSError):  # the folder has no weights if the method saves its weights elsewhere
                answer["plain"] = compare(task, TASKS[task].auto_class.from_pretrained(folder), folder)
            if request["merged"]:
                base = load(Path(request["checkpoints"]), task).model
                answer["peft"] = compare(task, PeftModel.from_pretrained(base, str(folder / "adapter")), folder)
        print(json.dumps(answer), flush=True)


def compare(task: str, model, folder: Path) -> float:
    """Return the maximum difference from the logits in the folder."""
    expected = load_file(folder / "logits" / "logits.safetensors")
    return max((found - expected[str(i)]).abs().max().item() for i, found in enumerate(logits(task, model)))


def train_on_both(words: list[str]) -> None:
    """Train cells, each on all processes, and keep the trained weights. `words` are a folder and the cells."""
    folder, tokenizer = Path(words[0]), build_tokenizer()
    for name in words[1:]:
        method, task = name.split("/")
        half = {"per_device_train_batch_size": 2} | EXACT
        cell = Cell(folder / "checkpoints", task, method, folder / "two" / name, tokenizer, **half)
        cell.trainer.train()
        if cell.trainer.is_world_process_zero():
            (folder / "two" / method).mkdir(parents=True, exist_ok=True)
            save_file(
                {k: v.contiguous() for k, v in cell.weights[-1].items()},
                folder / "two" / method / f"{task}.safetensors",
            )
    state = PartialState()
    state.wait_for_everyone()  # an early exit of one process would close the connection of the other
    state.destroy_process_group()


if __name__ == "__main__":
    serve()
