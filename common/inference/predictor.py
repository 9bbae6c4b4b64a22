"""Run a saved model over a file of any size and append predictions to the rows."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import ModelOutput

from common.args import FileArguments, SpeedArguments
from common.data.files import TABLES, FileReader, check_output, fresh_file, read_file, too_long
from common.data.source import COMPRESSED, Row
from common.data.tables import MissingColumn
from common.errors import InputError, Problems, check_file_exists, quiet, tell
from common.hardware import accelerator, native_bf16, reraise_out_of_memory
from common.models.generation_settings import loadable_generation
from common.models.load import LoadedModel, load_config, load_tokenizer, resolve_model
from common.models.sizes import positions_of
from common.models.structure import check_bf16
from common.models.weights import loading
from common.speed import apply
from common.tuning.adapters import gate_of, load_adapters


@dataclass
class PredictArguments(SpeedArguments, FileArguments):
    """Define the arguments of every `predict`."""

    model: str | None = field(default=None, metadata={"help": "folder that train saved, or a hub id"})
    input: str | None = field(default=None, metadata={"help": "file of rows, in a format that train reads, or .txt"})
    output: str | None = field(default=None, metadata={"help": "JSON Lines file to write"})
    overwrite: bool = field(default=False, metadata={"help": "replace an existing output file"})
    buffer_rows: int = field(default=4096, metadata={"help": "rows read and sorted by length at a time"})
    batch_tokens: int = field(default=4096, metadata={"help": "tokens in a batch, padding included"})
    precision: Literal["auto", "bf16", "fp32"] = field(
        default="auto", metadata={"help": "auto: bf16 if the hardware computes it natively, else fp32"}
    )
    allow_special_tokens: bool | None = field(
        default=None,
        metadata={"help": "special tokens in texts, such as </s>, act as special tokens; default: as in training"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input is None or self.output is None:
            raise InputError("give --input FILE and --output FILE (with make: INPUT=FILE OUTPUT=FILE)")
        self.check_input()
        if min(self.buffer_rows, self.batch_tokens) < 1:
            raise InputError("--buffer_rows and --batch_tokens must be at least 1")
        self.check_output()

    def settings(self) -> dict[str, Any]:
        """Return the arguments of a `Predictor` but the model."""
        return {name: getattr(self, name) for name in ("batch_tokens", "precision", "speed", "allow_special_tokens")}

    def check_input(self) -> None:
        """Raise `InputError` unless `--input` is a file."""
        check_file_exists("input", self.input or "")

    def check_output(self) -> None:
        """Raise `InputError` unless `--output` can be written."""
        output = self.output or ""
        if Path(output).suffix.lower() in {*TABLES, *COMPRESSED} - {".json", ".jsonl"}:
            raise InputError(f"--output {output}: predict writes JSON Lines; choose a name that ends in .jsonl")
        check_output(output, self.overwrite)


@dataclass
class DomainPredictArguments(PredictArguments):
    """Define the arguments of a `predict` whose model may have an adapter for each domain (`--tuning domains`)."""

    domain: str | None = field(
        default=None,
        metadata={"help": "domain of all rows, for a model of --tuning domains; default: the gate mixes the adapters"},
    )

    def settings(self) -> dict[str, Any]:
        """Return the arguments of a `Predictor` but the model."""
        return super().settings() | {"domain": self.domain}


class InputRows:
    """The rows of `--input`, without rows that `--skip_bad_rows` drops. Each iteration reads the file again."""

    def __init__(
        self, args: PredictArguments, check: Callable[[Row], Iterable[str]], read: FileReader | None = None
    ) -> None:
        """Read the file once and check its rows.

        Args:
            args: the arguments of `predict`.
            check: yields the problems of a row.
            read: reads the file, instead of `read_file`.

        Raises:
            InputError: up to ten problems, each with file and line.
        """
        self._read = partial(read or partial(read_file, args=args), args.input or "")
        self._dropped: set[int] = set()
        problems = Problems(args.skip_bad_rows)
        for number, (where, row) in enumerate(self._read()):
            if isinstance(row, str):
                messages = [row]
            else:
                messages = [*check(row), *too_long(row, args.max_chars)]
                lacks = [message for message in messages if isinstance(message, MissingColumn)]
                where = lacks[0].place(row, where) if lacks else where
            if messages:
                self._dropped.add(number)
                problems.reject(where, messages)
        problems.check()

    def __iter__(self) -> Iterator[Row]:
        rows = (row for number, (_, row) in enumerate(self._read()) if number not in self._dropped)
        return (row for row in rows if isinstance(row, dict))


def load_saved(auto_class: type[Any], folder: str) -> PreTrainedModel:
    """Load the model in a folder that train saved, in float32, with its adapter or virtual tokens."""
    path, adapter = Path(folder), Path(folder, "adapter")
    apart = (path / "base").is_dir() and adapter.is_dir()
    base = str(path / "base" if apart else path)
    generation = loadable_generation(base)
    with loading(base, base, load_config(base), f"by {auto_class.__name__}"), quiet():
        model = auto_class.from_pretrained(
            base,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            **generation,
        )
    if not apart:
        return model
    if not (adapter / "adapter_config.json").is_file():
        load_adapters(model, adapter)
        return model
    if not (adapter / "adapter_model.safetensors").is_file():
        raise InputError(f"{adapter}: has no adapter_model.safetensors; name a folder that train saved")
    from peft import PeftModel  # the import takes seconds, and few models need it

    from common.tuning.virtual_tokens import hide_virtual_tokens

    wrapped = PeftModel.from_pretrained(model, str(adapter))
    hide_virtual_tokens(wrapped)
    return cast(PreTrainedModel, wrapped)  # it passes on the attributes of the model inside


def choose_domain(model: PreTrainedModel, name: str, domain: str) -> None:
    """Let a model of `--tuning domains` read all texts with the adapter of one domain.

    Raises:
        InputError: the model has no adapters of domains, or not this one.
    """
    gate = gate_of(model)
    if gate is None:
        raise InputError(f"--domain {domain}: {name} has no adapters of domains; leave it out")
    if domain not in gate.domains:
        raise InputError(
            f"--domain {domain}: {name} was trained on {', '.join(gate.domains)}; name one of them, or leave it out"
        )
    gate.fixed = domain


def virtual_tokens(folder: str) -> int:
    """Return the number of virtual tokens of a saved model, which take positions of the text."""
    about = Path(folder, "adapter", "adapter_config.json")
    if not Path(folder, "base").is_dir() or not about.is_file():
        return 0
    return json.loads(about.read_text(encoding="utf-8"))["num_virtual_tokens"]


class Predictor:
    """A saved model with its tokenizer on the device of this machine."""

    def __init__(
        self,
        auto_class: type[Any],
        head: str | tuple[str, ...],
        model: str,
        batch_tokens: int = 4096,
        precision: str = "auto",
        speed: Literal["auto", "off"] = "auto",
        allow_special_tokens: bool | None = None,
        domain: str | None = None,
    ):
        """Load the model.

        Args:
            auto_class: class of transformers that loads the model.
            head: required end of the name of the architecture, such as `ForTokenClassification`; or several.
            model: folder that train saved, or a hub id.
            batch_tokens: tokens in a batch, padding included.
            precision: "auto" is bf16 if the hardware computes it natively.
            speed: see `--speed`.
            allow_special_tokens: whether special tokens in texts act as such; None: as in training.
            domain: see `--domain`.

        Raises:
            InputError: the model has another head, or no adapter for `domain`.
        """
        path = resolve_model(model)
        self.device = accelerator()
        self.tokenizer: PreTrainedTokenizerFast = load_tokenizer(path, allow_special_tokens)
        self.config: PretrainedConfig = load_config(path)
        if not any(name.endswith(head) for name in self.config.architectures or []):
            wanted = head if isinstance(head, str) else " or ".join(head)
            kind = ", ".join(self.config.architectures or []) or "a model without a head"
            raise InputError(
                f"--model {model}: is {kind}, not {wanted}; name a model of this recipe, or RECIPE= of the model"
            )
        self.model: PreTrainedModel = load_saved(auto_class, path).eval().to(self.device)
        if domain is not None:
            choose_domain(self.model, model, domain)
        self.speed = apply(LoadedModel(self.model, self.tokenizer), SpeedArguments(speed))
        positions = min(self.tokenizer.model_max_length, positions_of(self.model) or 512)
        positions -= virtual_tokens(path)
        self.max_length = getattr(self.config, "max_seq_length", positions)
        self.labels = self.model.config.id2label
        self.batch_tokens = batch_tokens
        self.bf16 = precision == "bf16" or (precision == "auto" and native_bf16(self.device.type == "cpu"))
        check_bf16(self.config, self.bf16)

    def logits(self, columns: dict[str, list[list[int]]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield row numbers and logits in float32, as `outputs`."""
        for batch, outputs in self.outputs(columns):
            yield batch, outputs["logits"].float()

    @torch.inference_mode()
    def outputs(self, columns: dict[str, list[list[int]]]) -> Iterator[tuple[list[int], ModelOutput]]:
        """Run the model over encoded rows in batches, longest rows first.

        Args:
            columns: `input_ids`, and `token_type_ids` if the model takes them: one list a row.

        Yields:
            The row numbers of a batch, and the outputs of the model. Each row comes once.
        """
        rows = [torch.tensor(ids) for ids in columns["input_ids"]]
        others = {name: values for name, values in columns.items() if name in ("token_type_ids",)}
        for batch in token_batches([len(row) for row in rows], self.batch_tokens):
            inputs = {"input_ids": self._padded([rows[i] for i in batch], self.tokenizer.pad_token_id)}
            for name, values in others.items():
                inputs[name] = self._padded([torch.tensor(values[i]) for i in batch], 0)
            lengths = torch.tensor([len(rows[i]) for i in batch], device=self.device)
            inputs["attention_mask"] = (
                torch.arange(inputs["input_ids"].shape[1], device=self.device) < lengths[:, None]
            ).long()
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
                outputs = self.model(**inputs)
            yield batch, outputs

    def _padded(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value).to(self.device)


def token_batches(lengths: list[int], batch_tokens: int, rows: int | None = None) -> Iterator[list[int]]:
    """Yield row numbers in batches of similar length, longest first: at most `batch_tokens` tokens and `rows` rows."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and ((len(batch) + 1) * lengths[batch[0]] > batch_tokens or len(batch) == rows):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def predict_file(
    args: PredictArguments,
    predict: Callable[[list[Row]], Iterable[Row]],
    rows: InputRows,
) -> int:
    """Write the rows that `predict` returns for each buffer of input rows.

    Memory does not grow with the file. The output file appears under its name once it is complete.

    Args:
        args: the arguments of `predict`.
        predict: takes a buffer of rows, and returns them with predictions.
        rows: the rows of the input.

    Returns:
        The number of rows.

    Raises:
        RunStopped: out of memory.
    """
    assert args.input is not None  # `__post_init__` asks for both
    assert args.output is not None
    count = empty = 0

    def too_much() -> str:
        return f"after {count} rows, with up to {args.batch_tokens} tokens at a time; give a smaller --batch_tokens"

    with (
        reraise_out_of_memory(too_much),
        fresh_file(args.output, args.overwrite) as file,
        tqdm(unit=" rows") as bar,
    ):
        remaining = iter(rows)
        while buffer := list(islice(remaining, args.buffer_rows)):
            for row in predict(buffer):
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                empty += not str(row.get("predicted", True)).strip()
            count += len(buffer)
            bar.update(len(buffer))
    tell(
        f"{count} row{'s' * (count != 1)} written to {args.output}"
        + (f", {empty} of them with an empty prediction" if empty else "")
    )
    return count
