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
from common.data.columns import Columns
from common.data.source import Row
from common.errors import InputError
from common.inference.filling import Filler
from common.inference.predictor import InputRows, PredictArguments, Predictor, predict_file
from common.models.load import load_config, resolve_model

MASK = "[MASK]"
COLUMNS = {"text": ("text",)}


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

    def __init__(self, model: str, batch_tokens: int = 4096, precision: str = "auto", speed: str = "auto", **more):
        super().__init__(
            AutoModelForMaskedLM, ("ForMaskedLM", "ForPreTraining"), model, batch_tokens, precision, speed, **more
        )
        self.columns = Columns(self.config, **COLUMNS)
        self.fill = Filler(self.model, self.tokenizer, self.speed, self.max_length)

    def __call__(self, texts: list[str], top: int) -> list[list[list[dict]]]:
        """Return the `top` fills for each mask of each text, with `token` and `probability`."""
        texts = [text.replace(MASK, self.tokenizer.mask_token) for text in texts]
        filled = self.fill(texts, min(top, len(self.tokenizer)), self.batch_tokens, self.bf16)
        return [
            [[{"token": token, "probability": prob} for token, prob in fills] for fills in fills_of_text]
            for fills_of_text in filled
        ]


def check_row(row: Row, columns: Columns) -> Iterator[str]:
    """Yield a message for each error in an input row."""
    if "fills" in row:
        yield 'already has "fills", which would be overwritten; rename that column'
    if not isinstance(columns.value(row, "text"), str):
        yield columns.problem(row, "text")


def with_fills(rows: list[Row], model: FillMask, top: int) -> Iterator[Row]:
    """Yield the rows with their `fills`."""
    for row, fills in zip(rows, model([model.columns.value(row, "text") for row in rows], top), strict=True):
        yield row | {"fills": fills}


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    columns = Columns(load_config(resolve_model(args.model)), **COLUMNS)
    rows = InputRows(args, lambda row: check_row(row, columns))
    model = FillMask(args.model, **args.settings())
    return predict_file(args, lambda some: with_fills(some, model, args.top), rows)


if __name__ == "__main__":
    command_line(main)
