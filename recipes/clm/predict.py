"""Complete the prompts in a file with a model that `train` saved.

    make predict RECIPE=clm MODEL=outputs/clm INPUT=prompts.jsonl OUTPUT=completed.jsonl
    python -m recipes.clm.predict --model outputs/clm --input prompts.txt --output completed.jsonl --temperature 0.8

The input has rows of {"prompt": ...} or {"text": ...}, dialogues or instructions as in training, or is a .txt file with
one prompt per line. A dialogue that ends with an answer is completed without this answer. The output has the same rows
in the same order, each with `completion` (`predicted_completion` if the input has that column).
Memory use does not grow with the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM, set_seed

from common.cli import command_line, parse
from common.data.columns import Columns
from common.data.source import Row
from common.errors import InputError, tell
from common.inference.predictor import InputRows, PredictArguments, Predictor, predict_file
from common.models.load import load_config, resolve_model

from .completing import Completer, Prompt
from .dialogues import is_dialogue, to_messages

COLUMNS = {"prompt": ("prompt",), "text": ("text",)}


@dataclass
class ClmPredictArguments(PredictArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder that train saved, or a hub id"},
    )
    max_new_tokens: int = field(default=64, metadata={"help": "maximum number of tokens in a completion"})
    temperature: float = field(default=0.0, metadata={"help": "0: greedy decoding; above 0: sampling"})
    top_p: float = field(default=0.95, metadata={"help": "sample from the top tokens with this probability mass"})
    seed: int = field(default=42, metadata={"help": "seed of the sampling"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise InputError("--max_new_tokens must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise InputError("--temperature must be at least 0, and --top_p above 0 and at most 1")
        if self.precision == "bf16":
            raise InputError("--precision bf16: completions are computed in float32; leave --precision out")


ARGUMENTS = (ClmPredictArguments,)


class Completion(Predictor):
    """Load a saved model and complete prompts with `self.complete`."""

    def __init__(self, model: str, batch_tokens: int = 4096, speed: str = "auto", **more):
        super().__init__(
            AutoModelForCausalLM, ("ForCausalLM", "LMHeadModel"), model, batch_tokens, "fp32", speed, **more
        )
        self.complete = Completer(self.model, self.tokenizer, self.max_length)
        self.columns = Columns(self.config, **COLUMNS)
        self.rows = max(1, batch_tokens // self.max_length)


def prompt_of(row: Row, columns: Columns) -> Prompt | None:
    """Return the text to complete or the messages to answer, or None if the row has neither.

    Raises:
        InputError: the row has no valid dialogue.
    """
    prompt = columns.value(row, "prompt")
    if not isinstance(prompt, str) and (is_dialogue(row) or "instruction" in row):
        return to_messages(row, answered=False)
    text = columns.value(row, "text") if prompt is None else prompt
    return text if isinstance(text, str) else None


def check_row(row: Row, columns: Columns) -> Iterator[str]:
    """Yield a message for each problem in an input row."""
    if {"completion", "predicted_completion"} <= row.keys():
        yield 'already has "predicted_completion", which would be overwritten; rename that column'
    try:
        if prompt_of(row, columns) is None:
            yield columns.problem(row, "prompt", 'a string), "text", or messages (a list')
    except InputError as error:
        yield str(error)


def with_completions(
    rows: list[Row], model: Completion, args: ClmPredictArguments, column: str = "completion"
) -> Iterator[Row]:
    """Yield the rows, each with its completion in `column`."""
    prompts = [prompt_of(row, model.columns) for row in rows]
    completions = model.complete(prompts, args.max_new_tokens, args.temperature, args.top_p, model.rows)
    for row, completion in zip(rows, completions, strict=True):
        yield row | {column: completion}


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    column = "completion"

    def check(row: Row) -> Iterator[str]:
        nonlocal column
        column = "predicted_completion" if "completion" in row else column
        yield from check_row(row, columns)

    columns = Columns(load_config(resolve_model(args.model)), **COLUMNS)
    rows = InputRows(args, check)
    if column != "completion":
        tell(f"{args.input}: has a column completion, which is kept; the predictions are in {column}")
    set_seed(args.seed)
    model = Completion(args.model, args.batch_tokens, args.speed, allow_special_tokens=args.allow_special_tokens)
    most = model.complete.most_new
    if args.max_new_tokens > most:
        tell(f"--max_new_tokens {args.max_new_tokens}: at most {most} are generated, half of what the model takes")
    return predict_file(args, lambda some: with_completions(some, model, args, column), rows)


if __name__ == "__main__":
    command_line(main)
