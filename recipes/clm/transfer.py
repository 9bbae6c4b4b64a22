"""Tell `make transfer` the texts of this recipe, which is a source of other tasks (`common.run.transferable`)."""

from typing import Any

from transformers import AutoModelForCausalLM

from common.run.transferable import TaskRows

from .texts import load, texts_to_learn


def training_rows(parsed: tuple[Any, ...]) -> TaskRows:
    """Return the training texts; of a stream the first ones."""
    data_args, args = parsed[2], parsed[-1]
    corpus = load(data_args, args)
    return TaskRows(
        pieces=[[text] for text in texts_to_learn(corpus, data_args)["text"][:]],
        classes=None,
        head=AutoModelForCausalLM,
        evaluated=(len(corpus.texts["validation"]), len(corpus.texts.get("test", []))),
    )
