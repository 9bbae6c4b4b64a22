"""Translate a file of sentences or documents with a model that `train` saved.

    make predict RECIPE=translation MODEL=outputs/translation INPUT=texts.jsonl OUTPUT=translated.jsonl
    python -m recipes.translation.predict --model outputs/translation --input t.txt --output t.jsonl --n_best 3

The input is JSON Lines of {"text": ...}, of {"translation": {"en": ...}} with the model's source language, or a .txt
file with a text a line. A model for several pairs is told which by --target_lang, and --source_lang where several have
that target. The output has the same rows in the same order, each with `predicted`, `score` (mean
log-probability of its sub-tokens), `pieces` (how many a text too long for the model was split into, by line and
sentence) and `ended` (false where a translation was cut off at the greatest length). Memory does not grow with the
file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.cli import command_line, parse
from common.data.files import Row, check_file
from common.data.language_codes import Direction, set_direction
from common.data.sentences import joined, pieces
from common.errors import InputError
from common.inference.generation import Generator, SearchArguments
from common.inference.predictor import predict_file
from common.models.load import load_config, resolve_model

WRITTEN = ("predicted", "score", "pieces", "ended", "n_best")


@dataclass
class TranslationPredictArguments(SearchArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder that train saved"},
    )
    target_lang: str | None = field(
        default=None, metadata={"help": "language to translate to; needed where the model knows several"}
    )
    source_lang: str | None = field(default=None, metadata={"help": "language of the input; the same"})


ARGUMENTS = (TranslationPredictArguments,)


class Translator(Generator):
    """A saved model that translates texts of any length; takes what `Generator` takes.

    `source_lang` and `target_lang` pick one of the pairs that the model was trained on.
    """

    def __init__(self, model: str, *args, source_lang: str | None = None, target_lang: str | None = None, **kwargs):
        directions = getattr(load_config(resolve_model(model)), "translation", None)
        if not isinstance(directions, list):
            raise InputError(f"--model {model}: names no languages; name a folder that recipes.translation.train saved")
        self.way = pick([Direction(**way) for way in directions], source_lang, target_lang)
        super().__init__(model, *args, prefix=self.way.source_prefix, **kwargs)
        set_direction(self.tokenizer, self.model, self.way)

    def __call__(self, texts: list[str], n_best: int = 1) -> list[list[Row]]:
        """For each text its best translations, the best first: `predicted`, `score`, `pieces` and `ended`.

        Of a text in several pieces the second best is the second best of each piece, and so on.
        """
        self.check_n_best(n_best)
        cut = [pieces(text, self.fits) for text in texts]
        flat = [piece for of_text in cut for piece, _ in of_text]
        found = iter(self.best(flat, n_best))
        results = []
        for of_text in cut:
            own = [next(found) for _ in of_text]  # pieces x n_best x (text, log-probability, sub-tokens, ended)
            options = []
            for rank in range(n_best):
                best = [piece[rank] for piece in own]
                options.append(
                    {
                        "predicted": joined([text for text, *_ in best], of_text),
                        "score": round(sum(total for _, total, *_ in best) / max(1, sum(n for *_, n, _ in best)), 4),
                        "pieces": len(of_text),
                        "ended": all(ended for *_, ended in best),
                    }
                )
            results.append(options)
        return results


def pick(directions: list[Direction], source_lang: str | None, target_lang: str | None) -> Direction:
    """The one of `directions` that has these languages; a language that is not given (None) may be any."""
    found = [w for w in directions if source_lang in (None, w.source_lang) and target_lang in (None, w.target_lang)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{way.source_lang}-{way.target_lang}" for way in found or directions)
    asked = [f"--{name} {x}" for name, x in (("source_lang", source_lang), ("target_lang", target_lang)) if x]
    if found:
        raise InputError(
            f"{' '.join(asked) or '--target_lang'}: the model has several such pairs; name one of: {known}"
        )
    raise InputError(f"{' '.join(asked)}: the model was trained on no such pair; it knows: {known}")


def source_of(row: Row, source_lang: str) -> str | None:
    """The text of an input row; None where it has none."""
    found = row.get("text")
    if found is None and isinstance(row.get("translation"), dict):
        found = row["translation"].get(source_lang)
    return found if isinstance(found, str) else None


def check_row(row: Row, source_lang: str) -> Iterator[str]:
    """A sentence for each thing that is wrong with an input row."""
    for name in WRITTEN:
        if name in row:
            yield f'has "{name}" already, which would be lost; rename that column'
    if source_of(row, source_lang) is None:
        yield (
            f'needs "text" (a text) or "translation" with "{source_lang}"; columns here: '
            f"{', '.join(map(str, row)) or 'none'}"
        )


def with_translations(rows: list[Row], translator: Translator, n_best: int = 0) -> Iterator[Row]:
    """The rows, each with its translation, and `n_best` of them where asked for."""
    texts = [source_of(row, translator.way.source_lang) for row in rows]
    for row, options in zip(rows, translator(texts, max(1, n_best)), strict=True):
        yield row | options[0] | ({"n_best": options} if n_best else {})


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    languages = {"source_lang": args.source_lang, "target_lang": args.target_lang}
    search = args.num_beams, args.length_penalty
    translator = Translator(args.model, args.batch_tokens, args.precision, *search, **languages)
    translator.check_n_best(args.n_best)
    check_file(args.input, lambda row: check_row(row, translator.way.source_lang), args.max_chars)
    return predict_file(args, lambda rows: with_translations(rows, translator, args.n_best))


if __name__ == "__main__":
    command_line(main)
