"""Give a student the vectors of a teacher, also for translations (Reimers and Gurevych 2020, arXiv:2004.09813).

The teacher reads the first text of a pair. The student learns to give both texts the teacher's vector, so that it reads
the language of the second text as the teacher reads that of the first.
"""

from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModel, BertConfig

from common.args import ModelArguments, TrainingArguments
from common.data.source import Row
from common.data.tokens import encodings
from common.errors import InputError, tell
from common.models import LoadedModel, ScratchArguments, load_model, load_or_train_tokenizer, new_model
from common.models.structure import input_embeddings, transformer_of
from common.run import print_table
from common.run.report import rows_named

from .encoder import Embedder
from .scoring import rank

#: special tokens of a new vocabulary
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def teacher_of(args: TrainingArguments, student: LoadedModel) -> Embedder | None:
    """Return the encoder of `--teacher`, None without one.

    Raises:
        InputError: its vectors and those of the student differ in width.
    """
    if args.teacher is None:
        return None
    teacher = Embedder(args.teacher, precision="bf16" if args.bf16 else "fp32", speed=args.speed)
    width = student.model.config.hidden_size
    if width != teacher.width:
        raise InputError(
            f"--teacher {teacher.name}: its vectors have {teacher.width} values, those of the student {width}; give a "
            f"--model_name_or_path or --model_size of width {teacher.width}, or --config_overrides "
            f"hidden_size={teacher.width}"
        )
    return teacher


def new_student(
    args: ScratchArguments,
    model_args: ModelArguments,
    rows: Dataset,
    max_seq_length: int,
    dropout: float | None,
    checkpoint: str | None,
) -> LoadedModel:
    """Create a student; without `--model_size` it starts with the weights of `--model_name_or_path`.

    Args:
        args: vocabulary and size.
        model_args: names the checkpoint.
        rows: translations, whose texts a new vocabulary is learned from.
        max_seq_length: longest text, in tokens.
        dropout: see `common.models.structure.set_dropout`.
        checkpoint: folder with the vocabulary of a resumed run; None for a new run.
    """

    def texts() -> Dataset:
        return Dataset.from_dict({"text": rows["text"][:] + rows["text_pair"][:]})

    tokenizer = load_or_train_tokenizer(args, model_args, texts, SPECIAL, checkpoint)
    student = new_model(AutoModel, BertConfig, args, model_args, tokenizer, max_seq_length, dropout)
    if args.model_size is None:
        start_at(student, load_model(AutoModel, model_args, None, max_seq_length))
    return student


@torch.no_grad()
def start_at(student: LoadedModel, base: LoadedModel) -> None:
    """Copy the weights of equal name and shape, and give each token the mean embedding of its pieces in `base`."""
    new, old = (input_embeddings(transformer_of(loaded.model)).weight for loaded in (student, base))
    known = dict(base.model.named_parameters())
    copied = 0
    for name, weight in student.model.named_parameters():
        if name in known and weight is not new and weight.shape == known[name].shape:
            weight.copy_(known[name])
            copied += weight.numel()
    if new.shape[1] != old.shape[1]:
        return
    vocabulary, tokenizer = base.tokenizer.get_vocab(), student.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    texts = [tokenizer.decode([number]).strip().removeprefix("##") for number in range(len(tokens))]
    for number, (token, pieces) in enumerate(zip(tokens, encodings(base.tokenizer, texts), strict=True)):
        exact = vocabulary.get(token, vocabulary.get(token.lower()))
        ids = [exact] if exact is not None else pieces.ids or [base.tokenizer.unk_token_id]
        new[number] = old[ids].mean(0)
    tell(f"{copied / 1e6:.1f} million weights, and embeddings by pieces of words, are those of {base.source}")


class Translations:
    """The translations of a split; see `.scoring.Search` for the attributes."""

    names = ("accuracy", "forward", "backward")

    def __init__(self, rows: Dataset, teacher: Embedder):
        """Prepare a split.

        Args:
            rows: translations.
            teacher: gives the vectors that the student is to give.
        """
        self.rows, self.teacher = rows, teacher
        self.targets = teacher(rows["text"][:])
        self.texts = [[text] for name in ("text", "text_pair") for text in rows[name][:]]
        self.labels = range(len(self.texts))

    def __call__(self, predictions: list[np.ndarray], gold: object = None) -> dict[str, float]:
        """Return the loss, and the share of texts whose nearest text of the other language is their translation.

        `forward` looks for the translation of each first text, `backward` for the first text of each translation, and
        `accuracy` is the mean of both: the accuracies of `TranslationEvaluator` of sentence-transformers.
        """
        one, other = np.split(np.stack(predictions), 2)
        loss = np.square(one - self.targets).sum(1) + np.square(other - self.targets).sum(1)
        return {"loss": float(loss.mean())} | accuracies(one, other)

    def beside(self, predictions: list[np.ndarray], before: list[np.ndarray]) -> dict[str, float]:
        """Return the scores of the student before training, and of the teacher on both languages."""
        rivals = {"frozen": accuracies(*np.split(np.stack(before), 2))}
        rivals["teacher"] = accuracies(self.targets, self.teacher(self.rows["text_pair"][:]))
        return {f"{name}_{score}": value for name, scores in rivals.items() for score, value in scores.items()}

    def report(self, predictions: list[np.ndarray]) -> Iterator[Row]:
        """Yield the rows with the nearest text of the other language in both directions, and whether it is right."""
        one, other = np.split(np.stack(predictions), 2)
        found = {"forward": nearest(one, other), "backward": nearest(other, one)}
        texts = {"forward": self.rows["text_pair"][:], "backward": self.rows["text"][:]}
        for number, row in enumerate(self.rows):
            places = {name: int(of[number]) for name, of in found.items()}
            more = {f"found_{name}": texts[name][place] for name, place in places.items()}
            yield dict(row) | more | {name: int(place == number) for name, place in places.items()}

    def show(self, metrics: dict[str, float], split: str) -> None:
        """Print the scores of a split beside its rivals."""
        tell(f"\n{rows_named(split)}: {len(self.rows):,} translations")
        rivals = {"this model": "", "before training": "frozen_", "teacher": "teacher_"}
        rows = [
            [name, *(metrics[f"{split}_{prefix}{score}"] for score in self.names)]
            for name, prefix in rivals.items()
            if f"{split}_{prefix}accuracy" in metrics
        ]
        print_table(["", *self.names], rows)


def nearest(texts: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the number of the vector in `others` with the largest dot product with each of `texts`."""
    return rank(texts, others, 1).found[:, 0]


def accuracies(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Return the accuracy of `nearest` both ways, and their mean, for vectors of translations, (rows, width) each."""
    numbers = np.arange(len(one))
    forward, backward = (float((nearest(a, b) == numbers).mean()) for a, b in ((one, other), (other, one)))
    return {"accuracy": (forward + backward) / 2, "forward": forward, "backward": backward}
