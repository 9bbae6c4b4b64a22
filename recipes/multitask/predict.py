"""Let the tasks of a model saved by `train` answer a file of rows, or one text.

    make predict RECIPE=multitask MODEL=outputs/multitask INPUT=rows.jsonl OUTPUT=answers.jsonl
    make predict RECIPE=multitask MODEL=outputs/multitask INPUT=rows.jsonl OUTPUT=answers.jsonl ARGS="--task entities"
    python -m recipes.multitask.predict --model outputs/multitask --text "Ada Lovelace was a delight to work with."

The input has the columns that the tasks read in their own recipes; a `.txt` file has one text per line. The output has
the same rows in the same order. Each row gets a column for each task, with what the predict of its recipe adds to the
row. A task whose columns the rows lack is left out, and named. Memory use does not grow with the file.
"""

import io
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from common.cli import command_line, given_values, parse
from common.data.source import Row
from common.errors import InputError, warn
from common.inference.predictor import InputRows, PredictArguments, predict_file
from common.models.load import load_config, resolve_model

from .reading import module_of, words_of

#: arguments that the predict of a recipe does not get
OWN = ("model", "input", "output", "overwrite", "text", "task", "config")


@dataclass
class MultitaskPredictArguments(PredictArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder that train saved"},
    )
    task: str | None = field(default=None, metadata={"help": "name of one task to run; default: all tasks"})
    text: str | None = field(default=None, metadata={"help": "one text instead of files; the answers are printed"})

    def __post_init__(self) -> None:
        if self.text is not None:
            if self.input or self.output:
                raise InputError("--text: has no file; leave --input and --output out")
            self.folder = tempfile.TemporaryDirectory()
            self.input, self.output = (str(Path(self.folder.name, name)) for name in ("text.jsonl", "answer.jsonl"))
            Path(self.input).write_text(json.dumps({"text": self.text}) + "\n", encoding="utf-8")
        super().__post_init__()
        if self.skip_bad_rows:
            raise InputError("--skip_bad_rows: tasks may drop different rows; correct the rows, and leave it out")


ARGUMENTS = (MultitaskPredictArguments,)


def tasks_of(args: MultitaskPredictArguments) -> dict[str, str]:
    """Return the recipe of each task to run, by the name of the task.

    Raises:
        InputError: the model has no tasks, or not the one that `--task` names.
    """
    tasks = getattr(load_config(resolve_model(args.model)), "tasks", None)
    if not isinstance(tasks, dict):
        raise InputError(f"--model {args.model}: has no tasks; name a model of this recipe, or RECIPE= of the model")
    if args.task is not None and args.task not in tasks:
        raise InputError(f"--task {args.task}: the model has no such task; give one of {', '.join(tasks)}")
    return tasks if args.task is None else {args.task: tasks[args.task]}


def answer(args: MultitaskPredictArguments, tasks: dict[str, str], words: list[str], folder: Path) -> dict[str, Path]:
    """Let each task answer the input by the predict of its recipe; return the file of each.

    Raises:
        InputError: no task can read the rows.
    """
    found, problems = {}, []
    for name, recipe in tasks.items():
        model, output = Path(resolve_model(args.model), name), folder / f"{name}.jsonl"
        files = ["--model", str(model), "--input", args.input, "--output", str(output)]
        try:
            with redirect_stdout(io.StringIO()):
                module_of(recipe, "predict").main([*files, *words])
            found[name] = output
        except InputError as error:
            problems.append(f"task {name}: {str(error).splitlines()[0]}")
    if not found:
        raise InputError(*problems)
    for problem in problems:
        warn(f"{problem}; the task is left out")
    return found


def lines_of(file: Path) -> Iterator[Row]:
    """Yield the rows of a JSON Lines file."""
    with open(file, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    tasks, given = tasks_of(args), given_values(ARGUMENTS, argv)
    words = words_of({name: value for name, value in given.items() if name not in OWN})
    rows = InputRows(args, lambda row: (f'has a column "{name}"; rename it' for name in tasks if name in row))
    with tempfile.TemporaryDirectory() as folder:
        answers = {name: lines_of(file) for name, file in answer(args, tasks, words, Path(folder)).items()}

        def answered(some: list[Row]) -> Iterator[Row]:
            for row in some:
                added = {name: next(lines) for name, lines in answers.items()}
                yield row | {name: {k: v for k, v in new.items() if k not in row} for name, new in added.items()}

        with redirect_stdout(io.StringIO() if args.text is not None else sys.stdout):
            count = predict_file(args, answered, rows)
    if args.text is not None:
        print(json.dumps(next(lines_of(Path(args.output))), ensure_ascii=False, indent=1))
    return count


if __name__ == "__main__":
    command_line(main)
