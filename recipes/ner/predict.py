"""Find the entities in a file of texts with a model that `train` saved.

    make predict RECIPE=ner MODEL=outputs/ner INPUT=texts.jsonl OUTPUT=entities.jsonl
    python -m recipes.ner.predict --model outputs/ner --input texts.txt --output entities.jsonl

The input is JSON Lines of {"text": ...} or {"tokens": [...]}, or a .txt file with a text a line. The output has the
same rows in the same order, each with `entities`: label, text, start and end (characters of the text, or of the tokens
joined by spaces) and score (mean probability of the tags of its words). Memory does not grow with the file.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForTokenClassification

from common.args import native_bf16, parse
from common.data import Row, check_file, read_file
from common.errors import InputError, command_line, quiet, tell
from common.models import load_config, load_tokenizer, resolve_model
from common.outputs import fresh_file

from .tagging import cut_windows, entity_spans, split_words


@dataclass
class PredictArguments:
    model: str = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder that train saved, or a hub id"},
    )
    input: str | None = field(default=None, metadata={"help": "texts: .jsonl, .json, .csv, .parquet or .txt"})
    output: str | None = field(default=None, metadata={"help": "JSON Lines file to write"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output file if it is there"})
    max_chars: int = field(default=1_000_000, metadata={"help": "characters a row may have"})
    buffer_rows: int = field(default=4096, metadata={"help": "rows sorted by length together"})
    batch_tokens: int = field(default=4096, metadata={"help": "sub-tokens, padding included, in a batch"})
    precision: Literal["auto", "bf16", "fp32"] = field(
        default="auto", metadata={"help": "auto is bf16 where the hardware computes it natively"}
    )

    def __post_init__(self) -> None:
        if self.input is None or self.output is None:
            raise InputError("give --input FILE and --output FILE (with make: INPUT=FILE OUTPUT=FILE)")
        if min(self.buffer_rows, self.batch_tokens) < 1:
            raise InputError("--buffer_rows and --batch_tokens must be at least 1")


ARGUMENTS = (PredictArguments,)


class Tagger:
    """A saved model that tags words, in windows cut as in training. `batch_tokens` bounds a batch, padding included."""

    def __init__(self, model: str, batch_tokens: int = 4096, precision: str = "auto"):
        path = resolve_model(model)
        self.device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self.tokenizer = load_tokenizer(path)
        config = load_config(path)
        if not any(name.endswith("ForTokenClassification") for name in config.architectures or []):
            raise InputError(f"--model {model}: has no token-classification head; name a folder that train saved")
        with quiet():
            self.model = AutoModelForTokenClassification.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
        self.model.to(self.device).eval()
        positions = min(self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512))
        self.max_length = getattr(config, "max_seq_length", positions)
        self.doc_stride = getattr(config, "doc_stride", self.max_length // 4)
        self.labels = self.model.config.id2label
        self.batch_tokens = batch_tokens
        self.bf16 = precision == "bf16" or (precision == "auto" and native_bf16(self.device.type == "cpu"))

    @torch.inference_mode()
    def __call__(self, sentences: list[list[str]]) -> list[tuple[list[str], list[float]]]:
        """For each word list the tag of each word and its probability."""
        if not sentences:
            return []
        windows = cut_windows(sentences, self.tokenizer, self.max_length, self.doc_stride)
        rows = [torch.tensor(ids) for ids in windows["input_ids"]]
        found: list = [None] * len(rows)
        for batch in self._batches([len(row) for row in rows]):
            ids = pad_sequence([rows[i] for i in batch], batch_first=True, padding_value=self.tokenizer.pad_token_id)
            lengths = torch.tensor([len(rows[i]) for i in batch])
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
                logits = self.model(input_ids=ids.to(self.device), attention_mask=mask.long().to(self.device)).logits
            scores, tags = (t.cpu().numpy() for t in logits.float().softmax(-1).max(-1))
            for i, row_tags, row_scores in zip(batch, tags, scores, strict=True):
                at = windows["positions"][i]
                found[i] = (row_tags[at].tolist(), row_scores[at].tolist())
        results: list[tuple[list[str], list[float]]] = [([], []) for _ in sentences]
        for sentence, (tags, scores) in zip(windows["sentence"], found, strict=True):
            results[sentence][0].extend(self.labels[tag] for tag in tags)
            results[sentence][1].extend(scores)
        return results

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Row numbers in batches of like length, the longest first."""
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batch and (len(batch) + 1) * lengths[batch[0]] > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        yield batch


def check_row(row: Row) -> Iterator[str]:
    """A sentence for each thing that is wrong with an input row."""
    text, tokens = row.get("text"), row.get("tokens")
    if "entities" in row:
        yield 'has "entities" already, which would be lost; rename that column'
    elif tokens is not None:
        if not isinstance(tokens, list) or not all(isinstance(token, str) and token.strip() for token in tokens):
            yield "tokens must be a list of texts that are not blank"
    elif not isinstance(text, str):
        yield f'needs "text" (a text) or "tokens" (a list of texts); columns here: {", ".join(row) or "none"}'


def words_of(row: Row) -> tuple[str, list[tuple[int, int]]]:
    """The text of a row and the character spans of its words."""
    if row.get("tokens") is None:
        return row["text"], split_words(row["text"])
    ends = accumulate(len(token) + 1 for token in row["tokens"])
    spans = [(end - 1 - len(token), end - 1) for token, end in zip(row["tokens"], ends, strict=True)]
    return " ".join(row["tokens"]), spans


def with_entities(rows: list[Row], tagger: Tagger) -> Iterator[Row]:
    """The rows, each with its `entities`."""
    texts = [words_of(row) for row in rows]
    tagged = tagger([[text[start:end] for start, end in spans] for text, spans in texts if spans])
    results = iter(tagged)
    for row, (text, spans) in zip(rows, texts, strict=True):
        tags, scores = next(results) if spans else ([], [])
        entities = []
        for label, first, last in entity_spans(tags):
            start, end = spans[first][0], spans[last - 1][1]
            score = round(sum(scores[first:last]) / (last - first), 4)
            entities.append({"label": label, "text": text[start:end], "start": start, "end": end, "score": score})
        yield row | {"entities": entities}


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    check_file(args.input, check_row, args.max_chars)
    tagger = Tagger(args.model, args.batch_tokens, args.precision)
    count = 0
    with fresh_file(args.output, args.overwrite) as file, tqdm(unit=" rows") as bar:
        rows = (row for _, row in read_file(args.input))
        while buffer := list(islice(rows, args.buffer_rows)):
            for row in with_entities(buffer, tagger):
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            count += len(buffer)
            bar.update(len(buffer))
    tell(f"{count} rows written to {args.output}")
    return count


if __name__ == "__main__":
    command_line(main)
