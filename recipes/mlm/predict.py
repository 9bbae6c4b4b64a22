"""Fill the masks in a file of texts with a model saved by `train`.

    make predict RECIPE=mlm MODEL=outputs/mlm INPUT=texts.jsonl OUTPUT=filled.jsonl
    python -m recipes.mlm.predict --model outputs/mlm --input texts.txt --output filled.jsonl --top 3

The input is JSON Lines of {"text": "The [MASK] is raised."}, or a .txt file with one text per line. [MASK] stands for
the mask token of any model. The output has the same rows in the same order. Each row gets `fills`: for each mask a list
of {token, probability}, the best first. Memory use does not grow with the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForMaskedLM

from common.cli import command_line, parse
from common.data.files import check_file
from common.data.source import Row
from common.errors import InputError
from common.inference.predictor import PredictArguments, Predictor, predict_file

from .filling import Filler

MASK = "[MASK]"


@dataclass
class MlmPredictArguments(PredictArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder that train saved, or a hub id"},
    )
    top: int = field(default=5, metadata={"help": "tokens to write for each mask"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1:
            raise InputError(f"--top {self.top}: must be at least 1")


ARGUMENTS = (MlmPredictArguments,)


class FillMask(Predictor):
    """Fill masks with a saved model. `batch_tokens` limits the tokens of a batch, padding included."""

    def __init__(self, model: str, batch_tokens: int = 4096, precision: str = "auto", speed: str = "auto"):
        super().__init__(AutoModelForMaskedLM, ("ForMaskedLM", "ForPreTraining"), model, batch_tokens, precision, speed)
        self.fill = Filler(self.model, self.tokenizer, self.speed, self.max_length)

    def __call__(self, texts: list[str], top: int) -> list[list[list[dict]]]:
        """Return the `top` fills for each mask of each text, with `token` and `probability`."""
        texts = [text.replace(MASK, self.tokenizer.mask_token) for text in texts]
        filled = self.fill(texts, min(top, len(self.tokenizer)), self.batch_tokens, self.bf16)
        return [
            [[{"token": token, "probability": prob} for token, prob in fills] for fills in fills_of_text]
            for fills_of_text in filled
        ]


def check_row(row: Row) -> Iterator[str]:
    """Yield a message for each error in an input row."""
    if "fills" in row:
        yield 'already has "fills", which would be overwritten; rename that column'
    if not isinstance(row.get("text"), str):
        yield f'needs "text" (a text); columns here: {", ".join(map(str, row)) or "none"}'


def with_fills(rows: list[Row], model: FillMask, top: int) -> Iterator[Row]:
    """Yield the rows with their `fills`."""
    for row, fills in zip(rows, model([row["text"] for row in rows], top), strict=True):
        yield row | {"fills": fills}


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    check_file(args.input, check_row, args.max_chars)
    model = FillMask(args.model, args.batch_tokens, args.precision, args.speed)
    return predict_file(args, lambda rows: with_fills(rows, model, args.top))


if __name__ == "__main__":
    command_line(main)
