"""Define the data arguments of translation: files, languages, columns, codes and scores."""

import glob
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import Dataset, DatasetDict

from common.args import LabeledDataArguments
from common.data.corpus import files_of
from common.data.files import TABLES
from common.data.mapping import map_rows
from common.data.rows import SPLITS, UNLABELED, Gold, load_splits
from common.data.source import ending_of
from common.errors import InputError

from .localisation import LANGUAGES, sample_files
from .pairs import (
    check_row,
    check_source,
    check_splits,
    first_source,
    flatten,
    in_columns,
    lacks_target,
    line_readers,
    reader,
    source_of,
)
from .scoring import TOKENIZE


@dataclass
class TranslationDataArguments(LabeledDataArguments):
    """Arguments for the source of the pairs, their languages and their scores."""

    source_lang: str | None = field(default=None, metadata={"help": "source language, such as en", "resume": "fixed"})
    target_lang: str | None = field(default=None, metadata={"help": "target language, such as de", "resume": "fixed"})
    pairs: list[str] | None = field(
        default=None,
        metadata={
            "help": "several language pairs for one model, such as: en-de en-cs de-en; replaces --source_lang",
            "resume": "fixed",
        },
    )
    sampling_temperature: float | None = field(
        default=None,
        metadata={
            "help": "with several pairs: above 1 repeats rows of rare pairs; default: 1, no repetition",
            "resume": "fixed",
        },
    )
    train_target_file: str | None = field(
        default=None, metadata={"help": "file of target lines, parallel to the source lines of --train_file"}
    )
    validation_target_file: str | None = field(
        default=None, metadata={"help": "file of target lines for --validation_file"}
    )
    test_target_file: str | None = field(default=None, metadata={"help": "file of target lines for --test_file"})
    source_column_name: str | None = field(
        default=None, metadata={"help": "column of the sources, for rows without a `translation` object"}
    )
    target_column_name: str | None = field(
        default=None, metadata={"help": "column of the targets, with --source_column_name"}
    )
    group_column_name: str | None = field(
        default=None, metadata={"help": "column with the domain of a row; each domain also gets its own scores"}
    )
    source_code: str | None = field(
        default=None,
        metadata={"help": "the model's source language code, such as eng_Latn; default: from --source_lang"},
    )
    target_code: str | None = field(
        default=None,
        metadata={"help": "the model's target language code, such as deu_Latn; default: from --target_lang"},
    )
    source_prefix: str | None = field(
        default=None, metadata={"help": "text in front of each source; default: the prefix of T5 or Marian"}
    )
    bleu_tokenize: str = field(default="auto", metadata={"help": f"tokenizer of BLEU: auto, {', '.join(TOKENIZE)}"})
    compare_to: str | None = field(
        default=None, metadata={"help": "predictions_test.jsonl of another run, for a significance test of BLEU"}
    )

    def __post_init__(self) -> None:
        if not self.has_source():
            if self.source_lang or self.target_lang or self.pairs or self.targets():
                raise InputError("--source_lang, --target_lang and --pairs need --train_file or --dataset_name")
            self.source_lang, self.target_lang = LANGUAGES
            self.group_column_name = "held_out"
        super().__post_init__()
        self._check_languages()
        if bool(self.source_column_name) != bool(self.target_column_name):
            raise InputError("--source_column_name and --target_column_name: give both, or neither")
        for split in SPLITS:
            file, target = getattr(self, f"{split}_file"), getattr(self, f"{split}_target_file")
            if target and not file:
                raise InputError(f"--{split}_target_file: add --{split}_file with the source lines")
            if target and not Path(target).is_file():
                raise InputError(f"--{split}_target_file {target}: no such file")
            if file and not (target or split == "test" or self.pairs) and self._has_lines(file):
                raise InputError(
                    f"--{split}_file {file}: has lines of one language; add the others by --{split}_target_file"
                )
        if self.bleu_tokenize not in ("auto", *TOKENIZE):
            raise InputError(f"--bleu_tokenize {self.bleu_tokenize}: must be auto or one of {', '.join(TOKENIZE)}")

    def _has_lines(self, file: str) -> bool:
        languages = list(self.directions()[0])
        return not glob.has_magic(file) and ending_of(Path(file)) in line_readers(languages).keys() - TABLES.keys()

    def sample_files(self) -> dict[str, str]:
        """Return the sample file of each split; the files are generated from Babel's tables."""
        return sample_files()

    def _check_languages(self) -> None:
        if self.pairs and (self.source_lang or self.target_lang):
            raise InputError("--pairs: names the languages already; leave --source_lang and --target_lang out")
        if not self.pairs and not (self.source_lang and self.target_lang):
            raise InputError("--source_lang and --target_lang: name both languages, such as en and de; or --pairs")
        for pair in self.pairs or ():
            if len(pair.split("-")) != 2 or not all(pair.split("-")):
                raise InputError(f"--pairs {pair}: must be two languages, such as en-de (en-zh_Hans)")
            if self.pairs.count(pair) > 1:
                raise InputError(f"--pairs {pair}: is repeated; name each pair once")
        several = len(self.directions()) > 1
        if self.sampling_temperature is not None and (self.sampling_temperature < 1 or not several):
            raise InputError("--sampling_temperature: must be at least 1, and needs several --pairs")
        if several and (self.targets() or self.source_column_name):
            raise InputError("--pairs: rows must name their languages; use files with `translation` objects")
        for name in ("source_code", "target_code", "source_prefix", "compare_to"):
            if several and getattr(self, name) is not None:
                remedy = "leave it out" if name == "compare_to" else "name the model's codes in --pairs"
                raise InputError(f"--{name}: works with one pair only; {remedy}")

    def directions(self) -> list[tuple[str, str]]:
        """Return the source and target language of each pair."""
        if not self.pairs:
            return [(self.source_lang, self.target_lang)]
        return [tuple(pair.split("-")) for pair in self.pairs]

    def check_path(self, name: str, path: str) -> None:
        """Raise `InputError` unless `path` is a file, or a pattern that matches a file."""
        if Path(path).is_file() or not glob.has_magic(path):
            super().check_path(name, path)
        else:
            files_of(path)

    def targets(self) -> dict[str, str]:
        """Return a dict from each file of source lines to the file of target lines."""
        files = [(getattr(self, f"{split}_file"), getattr(self, f"{split}_target_file")) for split in SPLITS]
        return {file: target for file, target in files if target}

    def files(self) -> dict[str, str]:
        """Return the files of the run by the name of their argument, numbered if there are several."""
        named = super().files() | {f"{split}_target_file": getattr(self, f"{split}_target_file") for split in SPLITS}
        matched = {name: files_of(path) for name, path in named.items() if path}
        return {
            name if len(files) == 1 else f"{name} {number}": str(file)
            for name, files in matched.items()
            for number, file in enumerate(files, 1)
        }

    def load(self) -> tuple[DatasetDict, Dataset | None]:
        """Load and check the splits; the columns are `source`, `target`, `pair` and optionally `group`.

        Returns:
            The splits; the test rows, with the source as `text`, if they have no targets, else None.
        """
        pairs = self.directions()
        read, check = reader(pairs, self.targets(), self), partial(check_row, directions=pairs)
        names = (partial(function, language_pair=pairs[0]) for function in (lacks_target, check_source))
        columns = ("target",) if self.source_column_name else ()
        gold = (
            Gold(f"target ({pairs[0][1]})", columns, *names, drop=bool(self.drop_unlabeled))
            if len(pairs) == 1
            else None
        )
        convert = partial(in_columns, language_pair=pairs[0]) if gold else None
        source = partial(first_source, directions=pairs)
        data = load_splits(self, self.columns(), check, read=read, carve_by=source, gold=gold, convert=convert)
        unlabeled = data.pop(UNLABELED, None)
        data = flatten(data, pairs)
        check_splits(data, pairs)
        if unlabeled is not None:
            inputs = [name for name in ("translation", "source") if name in unlabeled.column_names]
            unlabeled = map_rows(unlabeled, lambda row: {"text": source_of(row, pairs[0])}, remove_columns=inputs)
        return data, unlabeled

    def predict_arguments(self) -> list[str]:
        """Return the arguments that choose one of several pairs in predict."""
        source, target = self.directions()[0]
        return ["--source_lang", source, "--target_lang", target] if self.pairs and len(self.pairs) > 1 else []

    def columns(self) -> dict[str, str]:
        """Return the columns that `load_splits` reads, under the names that the recipe uses."""
        group = {"group": self.group_column_name} if self.group_column_name else {}
        if self.source_column_name:
            return {"source": self.source_column_name, "target": self.target_column_name} | group
        return {"translation": "translation"} | group
