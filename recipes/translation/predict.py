"""Translate a file of sentences or documents with a model that `train` saved.

    make predict RECIPE=translation MODEL=outputs/translation INPUT=texts.jsonl OUTPUT=translated.jsonl
    python -m recipes.translation.predict --model outputs/translation --input t.txt --output t.jsonl --n_best 3

The input is JSON Lines of {"text": ...}, or of {"translation": {"en": ...}} with the model's source language, or a
.txt file with one text per line; such a file may also end in the source language, for example in .en. A model for
several pairs needs --target_lang, and --source_lang if several pairs have this target. The output has the same rows in
the same order, with four more columns:

- `predicted`: the translation;
- `score`: mean log-probability of its tokens;
- `pieces`: number of pieces, as a text too long for the model is split by line and sentence;
- `ended`: false if a translation was cut off at the maximum length.

Memory use does not grow with the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common.cli import command_line, parse
from common.data.columns import Columns
from common.data.files import read_file
from common.data.language_codes import Direction
from common.data.source import Row
from common.errors import InputError
from common.inference import translator
from common.inference.generation import SearchArguments
from common.inference.predictor import InputRows, predict_file
from common.models.load import load_config, resolve_model

from .pairs import line_readers, with_object

WRITTEN = ("predicted", "score", "pieces", "ended", "n_best")
COLUMNS = {"source": ("text",)}


@dataclass
class TranslationPredictArguments(SearchArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder that train saved"},
    )
    target_lang: str | None = field(
        default=None, metadata={"help": "target language; needed for a model with several pairs"}
    )
    source_lang: str | None = field(
        default=None, metadata={"help": "source language; needed if several pairs have the target"}
    )


ARGUMENTS = (TranslationPredictArguments,)


class Translator(translator.Translator):
    """Load a saved model and translate texts of any length.

    `source_lang` and `target_lang` select one of the pairs that the model was trained on. `Generator` documents the
    other arguments.
    """

    def __init__(self, model: str, *args, source_lang: str | None = None, target_lang: str | None = None, **kwargs):
        direction = pick(translator.saved_directions(model), source_lang, target_lang)
        super().__init__(model, direction, *args, **kwargs)
        self.columns = Columns(load_config(resolve_model(model)), **COLUMNS)


def pick(directions: list[Direction], source_lang: str | None, target_lang: str | None) -> Direction:
    """Return the direction with these languages; None matches any language.

    Raises:
        InputError: no direction matches, or several match.
    """
    matches = [d for d in directions if source_lang in (None, d.source_lang) and target_lang in (None, d.target_lang)]
    if len(matches) == 1:
        return matches[0]
    known = ", ".join(f"{d.source_lang}-{d.target_lang}" for d in matches or directions)
    named = [f"--{name} {x}" for name, x in (("source_lang", source_lang), ("target_lang", target_lang)) if x]
    if matches:
        raise InputError(
            f"{' '.join(named) or '--target_lang'}: matches several pairs of the model; choose one of: {known}"
        )
    raise InputError(f"{' '.join(named)}: the model was not trained on this pair; choose one of: {known}")


def source_of(row: Row, columns: Columns, source_lang: str) -> str | None:
    """Return the text of an input row, or None."""
    text = columns.value(row, "source")
    translation = with_object(row).get("translation")
    if text is None and isinstance(translation, dict):
        text = translation.get(source_lang)
    text = row.get(source_lang) if text is None else text
    return text if isinstance(text, str) else None


def check_row(row: Row, columns: Columns, source_lang: str) -> Iterator[str]:
    """Yield a message for each problem in an input row."""
    for name in WRITTEN:
        if name in row:
            yield f'has "{name}" already, and predict would overwrite it; rename that column'
    if source_of(row, columns, source_lang) is None:
        others = f'"{source_lang}", or "translation" (an object with "{source_lang}"'
        yield columns.problem(row, "source", f"a string), {others}")


def with_translations(rows: list[Row], model: Translator, n_best: int = 0) -> Iterator[Row]:
    """Yield the rows, each with its translation, and with the `n_best` translations if `n_best` is above 0."""
    texts = [source_of(row, model.columns, model.direction.source_lang) for row in rows]
    for row, options in zip(rows, model(texts, max(1, n_best)), strict=True):
        yield row | options[0] | ({"n_best": options} if n_best else {})


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    options = {"source_lang": args.source_lang, "target_lang": args.target_lang, "speed": args.speed}
    options["allow_special_tokens"] = args.allow_special_tokens
    search = args.num_beams, args.length_penalty
    model = Translator(args.model, args.batch_tokens, args.precision, *search, **options)
    model.check_n_best(args.n_best)
    source_lang = model.direction.source_lang
    read = partial(read_file, readers=line_readers([source_lang]), args=args)
    rows = InputRows(args, lambda row: check_row(row, model.columns, source_lang), read)
    return predict_file(args, lambda some: with_translations(some, model, args.n_best), rows)


if __name__ == "__main__":
    command_line(main)
