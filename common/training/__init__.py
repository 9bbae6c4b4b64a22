"""Trainers with exact resume, atomic checkpoints and correct losses."""

from common.speed.head import losses_at_labels
from common.training.language_model import LanguageArguments, LanguageTrainer
from common.training.loss import label_losses
from common.training.seq2seq import Seq2SeqCollator, Seq2SeqTrainer, Seq2SeqTrainingArguments
from common.training.trainer import Trainer

__all__ = [
    "LanguageArguments",
    "LanguageTrainer",
    "Seq2SeqCollator",
    "Seq2SeqTrainer",
    "Seq2SeqTrainingArguments",
    "Trainer",
    "label_losses",
    "losses_at_labels",
]
