"""Load or create models and tokenizers, and set up generation."""

from common.models.decoding import GenerationArguments, decoded, forced_ids, label_ids, set_generation
from common.models.encoder_decoder import Seq2SeqModelArguments, load_seq2seq
from common.models.load import LoadedModel, load_model, load_tokenizer, resolve_model
from common.models.new import ScratchArguments, load_or_train_tokenizer, new_model

__all__ = [
    "GenerationArguments",
    "LoadedModel",
    "ScratchArguments",
    "Seq2SeqModelArguments",
    "decoded",
    "forced_ids",
    "label_ids",
    "load_model",
    "load_or_train_tokenizer",
    "load_seq2seq",
    "load_tokenizer",
    "new_model",
    "resolve_model",
    "set_generation",
]
