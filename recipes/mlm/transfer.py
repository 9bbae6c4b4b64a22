"""Tell `make transfer` the texts of this recipe, which is a source of other tasks (`common.run.transferable`)."""

from typing import Any

from transformers import AutoModelForMaskedLM

from common.data import open_corpus
from common.run.transferable import TaskRows


def training_rows(parsed: tuple[Any, ...]) -> TaskRows:
    """Return the training texts; of a stream the first ones."""
    data_args, args = parsed[2], parsed[-1]
    corpus = open_corpus(data_args, args)
    return TaskRows(
        pieces=[[text] for text in corpus.training_texts(data_args)["text"][:]],
        classes=None,
        head=AutoModelForMaskedLM,
        evaluated=(len(corpus.texts["validation"]), len(corpus.texts.get("test", []))),
    )
