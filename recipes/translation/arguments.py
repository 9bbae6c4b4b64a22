"""What a run of translation is told of its data: files, languages, columns, codes, scores."""

import glob
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import DatasetDict

from common.args import DataArguments
from common.data.corpus import files_of
from common.data.rows import SPLITS, load_splits
from common.errors import InputError

from .localisation import LANGUAGES, sample_files
from .pairs import check_row, check_splits, flatten, reader
from .scoring import TOKENIZE


@dataclass
class TranslationDataArguments(DataArguments):
    """Where the pairs come from, in which languages they are, and how they are scored."""

    source_lang: str | None = field(
        default=None, metadata={"help": "language of the sources, such as en", "resume": "fixed"}
    )
    target_lang: str | None = field(
        default=None, metadata={"help": "language to translate to, such as de", "resume": "fixed"}
    )
    pairs: list[str] | None = field(
        default=None,
        metadata={
            "help": "in place of these, several pairs for one model, such as: en-de en-cs de-en",
            "resume": "fixed",
        },
    )
    sampling_temperature: float | None = field(
        default=None,
        metadata={
            "help": "of several pairs: repeat rows of rare ones, the more the higher; 1 (default): as they are",
            "resume": "fixed",
        },
    )
    train_target_file: str | None = field(
        default=None, metadata={"help": "lines of the target, where --train_file has the lines of the source"}
    )
    validation_target_file: str | None = field(default=None, metadata={"help": "the same for validation"})
    test_target_file: str | None = field(default=None, metadata={"help": "the same for test"})
    source_column_name: str | None = field(
        default=None, metadata={"help": "column of the sources, where rows have no `translation` object"}
    )
    target_column_name: str | None = field(default=None, metadata={"help": "column of the targets, beside that"})
    group_column_name: str | None = field(
        default=None, metadata={"help": "column with the domain of a row; each is scored for itself too"}
    )
    source_code: str | None = field(
        default=None, metadata={"help": "the model's code for the source, such as eng_Latn; found when not given"}
    )
    target_code: str | None = field(default=None, metadata={"help": "the same for the target"})
    source_prefix: str | None = field(
        default=None, metadata={"help": "text in front of each source; that of T5 and Marian is known"}
    )
    bleu_tokenize: str = field(default="auto", metadata={"help": f"words of BLEU: auto, {', '.join(TOKENIZE)}"})
    compare_to: str | None = field(
        default=None, metadata={"help": "predictions_test.jsonl of another run: is the difference in BLEU chance?"}
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
                raise InputError(f"--{split}_target_file needs --{split}_file beside it, with the lines of the source")
            if target and not Path(target).is_file():
                raise InputError(f"--{split}_target_file {target}: no such file")
        if self.bleu_tokenize not in ("auto", *TOKENIZE):
            raise InputError(f"--bleu_tokenize {self.bleu_tokenize}: must be auto or one of {', '.join(TOKENIZE)}")

    def sample_files(self) -> dict[str, str]:
        """Return the sample's file for each split; the files are made from tables of Babel."""
        return sample_files()

    def _check_languages(self) -> None:
        if self.pairs and (self.source_lang or self.target_lang):
            raise InputError("--pairs names the languages; leave --source_lang and --target_lang out")
        if not self.pairs and not (self.source_lang and self.target_lang):
            raise InputError("--source_lang and --target_lang: name both languages, such as en and de; or --pairs")
        for pair in self.pairs or ():
            if len(pair.split("-")) != 2 or not all(pair.split("-")):
                raise InputError(f"--pairs {pair}: must be two languages, such as en-de (en-zh_Hans)")
            if self.pairs.count(pair) > 1:
                raise InputError(f"--pairs {pair}: is named twice")
        several = len(self.directions()) > 1
        if self.sampling_temperature is not None and (self.sampling_temperature < 1 or not several):
            raise InputError("--sampling_temperature: must be at least 1, and is of several --pairs")
        if several and (self.targets() or self.source_column_name):
            raise InputError("--pairs: rows must name their languages; give files of `translation` objects")
        for name in ("source_code", "target_code", "source_prefix", "compare_to"):
            if several and getattr(self, name) is not None:
                more = "" if name == "compare_to" else "; several may be named by the model's codes in --pairs"
                raise InputError(f"--{name}: is of one pair{more}")

    def directions(self) -> list[tuple[str, str]]:
        """Source and target language of each pair."""
        if not self.pairs:
            return [(self.source_lang, self.target_lang)]
        return [tuple(pair.split("-")) for pair in self.pairs]

    def check_path(self, name: str, path: str) -> None:
        """Raise `InputError` unless `path` names a file, or a pattern that some file matches."""
        if Path(path).is_file() or not glob.has_magic(path):
            super().check_path(name, path)
        else:
            files_of(path)

    def targets(self) -> dict[str, str]:
        """The file of target lines of each file of source lines."""
        files = [(getattr(self, f"{split}_file"), getattr(self, f"{split}_target_file")) for split in SPLITS]
        return {file: target for file, target in files if target}

    def files(self) -> dict[str, str]:
        """The files of the run, each under the argument that names it."""
        named = super().files() | {f"{split}_target_file": getattr(self, f"{split}_target_file") for split in SPLITS}
        found = {name: files_of(path) for name, path in named.items() if path}
        return {
            name if len(files) == 1 else f"{name} {number}": str(file)
            for name, files in found.items()
            for number, file in enumerate(files, 1)
        }

    def load(self) -> DatasetDict:
        """Load the splits with columns `source`, `target`, `pair` and perhaps `group`, every row checked."""
        pairs = self.directions()
        read, check = reader(pairs, targets=self.targets()), partial(check_row, directions=pairs)
        data = flatten(load_splits(self, self.columns(), check, read=read), pairs)
        check_splits(data, pairs)
        return data

    def columns(self) -> dict[str, str]:
        """What `load_splits` is to read."""
        group = {"group": self.group_column_name} if self.group_column_name else {}
        if self.source_column_name:
            return {"source": self.source_column_name, "target": self.target_column_name} | group
        return {"translation": "translation"} | group
