"""Texts that fit neither into memory nor onto the disk: read, shuffled and packed while they are trained on.

The rows of a run are numbered. Which texts are in row n follows from the files, the seed and `--stream_shares` alone,
not from how many processes and workers read them: row n is the next row of share n modulo shares. A share reads its
texts in windows of `--shuffle_buffer`, shuffles each window, and packs its texts into rows; what does not fill a row at
the end of a window goes to the next. So the place of a share is told by where its window began, what was left over
there, and the number of rows taken from it since: a few numbers, which a checkpoint keeps.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from common.args import TrainingArguments
from common.data.corpus import (
    CorpusArguments,
    Marked,
    check_text,
    empty_row,
    files_of,
    fill_rows,
    load_corpus,
    load_texts,
    read_texts,
)
from common.data.files import Located, Row
from common.data.rows import UNREADABLE, checked
from common.data.workers import ignore_group_signals
from common.errors import InputError, Problems, tell, warn

HELD_OUT = 1000  # texts for validation where none are given, and that are read of a hub data set's other splits
TOKENIZER_TEXTS = 100_000  # from which a new tokenizer learns
ENCODED_TOGETHER = 256
STATE = "stream_{}.json"


@dataclass
class Shard:
    """A part of the stream that is read from its beginning: a file, or a part of a hub data set."""

    name: str
    read: Callable[[], Iterator[Located]]
    bytes: int | None = None  # of a file, when the run began
    held_out: int = 0  # texts at its beginning that are kept for validation

    def texts(self, args: CorpusArguments) -> Iterator[str]:
        """The texts, blank ones included. Raises `InputError` with file and line for one that is none."""
        for where, row in self.read():
            text = row.get(args.text_column_name) if isinstance(row, dict) else None
            if isinstance(text, str) and len(text) <= args.max_chars:
                yield text
            else:
                problems = Problems()
                list(
                    checked(
                        [(where, row)], where, {"text": args.text_column_name}, check_text, (), args.max_chars, problems
                    )
                )
                problems.check()
        if self.bytes is None:
            return
        file = Path(self.name)
        size = file.stat().st_size if file.is_file() else None  # it may be gone though it could be read to its end
        if size != self.bytes:
            now = "is gone" if size is None else f"has {size:,} bytes now"
            raise InputError(
                f"{self.name}: {now}, and had {self.bytes:,} bytes when the run began, so that texts may be missing; "
                "put it back as it was"
            )


@dataclass
class Texts:
    """What a run with `--streaming` reads: shards to train on, and other splits in memory."""

    shards: list[Shard]
    splits: DatasetDict = field(default_factory=DatasetDict)

    def names(self) -> Dataset:
        """The names of the shards, by which a run that goes on is known to read the same."""
        return Dataset.from_dict({"shard": [shard.name for shard in self.shards]})

    def sample(self, args: CorpusArguments, count: int = TOKENIZER_TEXTS) -> Dataset:
        """The first texts to train on, as column `text`."""
        found = chain.from_iterable(islice(shard.texts(args), shard.held_out, None) for shard in self.shards)
        return Dataset.from_dict({"text": list(islice((text for text in found if text.strip()), count))})


def check_streaming(data_args: CorpusArguments, args: TrainingArguments) -> None:
    """Raise `InputError` for arguments that do not go together with `--streaming`."""
    if not data_args.streaming:
        if data_args.stream_shares is not None:
            raise InputError("--stream_shares: only with --streaming")
        return
    if not (data_args.train_file or data_args.dataset_name):
        raise InputError("--streaming: give --train_file or --dataset_name")
    if args.max_steps < 1:
        raise InputError("--streaming: give --max_steps, since the length of a stream is not known")
    if data_args.max_train_samples is not None:
        raise InputError("--max_train_samples: not with --streaming; --max_steps says how much is trained on")


@dataclass
class Corpus:
    """The texts of a run.

    Attributes:
        texts: the splits in memory; without `train` if that is a stream.
        stream: the training texts, if they are read while training.
    """

    texts: DatasetDict
    stream: Texts | None = None

    def recorded(self) -> dict[str, Dataset]:
        """Return what identifies the data of the run: its rows, or the names of what is streamed."""
        return {**self.texts, "train": self.stream.names()} if self.stream else self.texts

    def training_texts(self, args: CorpusArguments) -> Dataset:
        """Return the training texts, or the first of a stream."""
        return self.stream.sample(args) if self.stream else self.texts["train"]


def open_corpus(args: CorpusArguments, training: TrainingArguments) -> Corpus:
    """Load the texts that `args` names, or open the stream of training texts under `--streaming`.

    Raises:
        InputError: for broken rows, with file and line; for arguments that do not go with `--streaming`.
    """
    check_streaming(args, training)
    stream = open_texts(args) if args.streaming else None
    texts = stream.splits if stream else load_corpus(args)
    if args.forgetting_file:
        texts["forgetting"] = load_texts(args.forgetting_file, args)
    return Corpus(texts, stream)


def open_texts(args: CorpusArguments) -> Texts:
    """The shards to train on, the first text of each looked at, and the other splits.

    Without `--validation_file`, or a split of that name, the first `--max_eval_samples` texts (1,000) are held out.
    Raises `InputError` where a shard holds no text, or what is there is none.
    """
    limits = {"validation": args.max_eval_samples, "test": args.max_predict_samples}
    splits = {}
    if args.dataset_name:
        streams = _hub_splits(args)
        shards = streams.pop("train")
        for split in limits.keys() & streams.keys():
            texts = chain.from_iterable(shard.texts(args) for shard in streams[split])
            splits[split] = _dataset(islice(texts, limits[split] or HELD_OUT), split)
    else:
        shards = [_file_shard(path, args) for path in files_of(args.train_file)]
        for split in limits:
            if path := getattr(args, f"{split}_file"):
                rows = load_texts(path, args)
                splits[split] = rows.select(range(min(len(rows), limits[split] or len(rows))))
    problems = Problems()
    for shard in shards:  # nothing can be said of the rest before it is read
        try:
            if next(shard.texts(args), None) is None:
                problems.add(shard.name, "holds no rows")
        except InputError as error:
            problems.count += 1
            problems.shown.append(str(error))
    problems.check()
    if "validation" not in splits:
        splits["validation"] = _hold_out(shards, args)
    return Texts(shards, DatasetDict(splits))


def _file_shard(path: Path, args: CorpusArguments) -> Shard:
    if path.suffix.lower() == ".json":
        raise InputError(f"{path}: a .json file is read as a whole, so it cannot be streamed; write it as .jsonl")
    return Shard(str(path), partial(read_texts, str(path), args.text_unit, args.max_chars), path.stat().st_size)


def _hold_out(shards: list[Shard], args: CorpusArguments) -> Dataset:
    found: list[str] = []
    count = args.max_eval_samples or HELD_OUT
    for shard in shards:
        here = list(islice(shard.texts(args), count - len(found)))
        shard.held_out = len(here)
        found += here
        if len(found) == count:
            break
    # a share of shards with nothing left would have nothing to give
    shards[:] = [s for s in shards if not s.held_out or any(True for _ in islice(s.texts(args), s.held_out, None))]
    if not shards:
        raise InputError(
            f"--streaming: all {len(found)} texts of the stream would be held out for validation, and none be trained "
            "on; give --validation_file, or a smaller --max_eval_samples"
        )
    tell(f"no validation data given: the first {len(found)} texts of the stream are held out for it")
    return _dataset(found, "validation")


def _dataset(texts: Iterator[str] | list[str], split: str) -> Dataset:
    kept = [text for text in texts if text.strip()]
    if not kept:
        raise InputError(f"{split}: every text is blank")
    return Dataset.from_dict({"text": kept, "id": [str(i) for i in range(1, len(kept) + 1)]})


def _hub_splits(args: CorpusArguments) -> dict[str, list[Shard]]:
    name = args.dataset_name
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            found = datasets.load_from_disk(name)
            found = found if isinstance(found, dict) else {"train": found}
            found = {title: split.to_iterable_dataset() for title, split in found.items()}
        else:
            found = datasets.load_dataset(name, args.dataset_config_name, streaming=True)
    except UNREADABLE as error:
        raise InputError(
            f"--dataset_name {name}: {_first_line(error)}; without a network give a folder, or --train_file"
        ) from None
    if "train" not in found:
        raise InputError(f"--dataset_name {name}: no training rows; splits there: {', '.join(found)}")
    return {
        title: [
            Shard(f"{name} [{title}] {i}", partial(_hub_rows, stream, i, f"{name} [{title}], part {i}"))
            for i in range(stream.num_shards)
        ]
        for title, stream in found.items()
    }


def _hub_rows(stream: datasets.IterableDataset, shard: int, place: str) -> Iterator[Located]:
    number = 0
    try:
        for row in stream.shard(num_shards=stream.num_shards, index=shard):
            number += 1
            yield f"{place}, row {number}", row
    except UNREADABLE as error:  # of the network, of a missing file, of a row that cannot be read
        yield f"{place}, row {number + 1}", f"the stream ends early: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# Texts to rows


class _Share:
    """A share of the texts as rows, without end: pass after pass, the shards in another order in each.

    A window ends where a pass does. Where there are as many shards as shares or more, shards are dealt out, else the
    texts of each.
    """

    def __init__(self, stream: "TextStream", number: int):
        self.stream, self.number = stream, number

    def rows(self, start: dict[str, Any]) -> Iterator[tuple[Row, dict[str, Any] | None]]:
        """Rows from the beginning of a window on; with the first row of each window its `start`."""
        stream, args = self.stream, self.stream.args
        turn, *place = start["next"]
        texts = self._texts(turn, *place)
        whole, empty = not any(place), True  # whether the pass is seen from its beginning, and has given no row
        while True:
            window = list(islice(texts, args.shuffle_buffer))
            order = np.random.default_rng([stream.seed, self.number, start["window"]]).permutation(len(window))
            shuffled = [window[i][1] for i in order]
            encoded = chain.from_iterable(
                stream.encode(shuffled[i : i + ENCODED_TOGETHER]) for i in range(0, len(shuffled), ENCODED_TOGETHER)
            )
            left = _copied(start["left"])
            rows = fill_rows(self._long_enough(encoded), stream.ends, args.max_seq_length, args.pack, row=left)
            number, given = start["rows"], start
            while True:
                try:
                    row = next(rows)
                except StopIteration as end:
                    left = end.value
                    break
                yield row, given
                number, given = number + 1, None
            empty = empty and number == start["rows"] and left == start["left"]
            if len(window) == args.shuffle_buffer:
                following = window[-1][0]
            else:  # the pass is over, and the next has windows of its own
                if whole and empty:
                    raise InputError(
                        f"share {self.number + 1} of {stream.shares} holds no text of {stream.least} sub-tokens or "
                        "more; give more texts, or fewer --stream_shares (without it, as many as processes times "
                        "--dataloader_num_workers)"
                    )
                following = [turn + 1, 0, 0]
                turn, whole, empty = turn + 1, True, True
                texts = self._texts(*following)
                if self.number == 0 and turn == 1:
                    tell("the training texts have been read once and are begun again, in another order")
            start = {"next": following, "window": start["window"] + 1, "rows": number, "left": left}

    def _long_enough(self, encoded: Iterator[Marked]) -> Iterator[Marked]:
        return (pair for pair in encoded if len(pair[0]) >= self.stream.least)

    def _texts(self, turn: int, place: int, first: int) -> Iterator[tuple[list[int], str]]:
        """Texts of a pass with the place of what comes after: pass, shard in its order, number in the shard."""
        stream, shares = self.stream, self.stream.shares
        order = np.random.default_rng([stream.seed, turn]).permutation(len(stream.shards))
        by_shard = len(order) >= shares
        mine = order[self.number :: shares] if by_shard else order
        for at in range(place, len(mine)):
            shard = stream.shards[mine[at]]
            first = max(first, shard.held_out)
            for number, text in enumerate(islice(shard.texts(stream.args), first, None), first):
                if by_shard or (number + at) % shares == self.number:
                    yield [turn, at, number + 1], text
            first = 0


def _copied(row: Row) -> Row:
    return {name: list(values) for name, values in row.items()}


class _Reader(IterableDataset):
    """The rows of a process, from its row `first` on; of several workers each reads shares of its own."""

    def __init__(self, stream: "TextStream", first: int, places: dict[int, dict[str, Any]]):
        self.stream, self.first, self.places = stream, first, places

    def __iter__(self) -> Iterator[tuple[Row, dict[str, Any] | None] | str]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        shares: dict[int, Iterator] = {}
        number = (self.first + worker) * self.stream.processes + self.stream.rank
        try:
            while True:
                share = number % self.stream.shares
                if share not in shares:
                    place = self.places[share]
                    shares[share] = islice(_Share(self.stream, share).rows(place["start"]), place["taken"], None)
                yield next(shares[share])
                number += workers * self.stream.processes
        except InputError as error:  # as an item: torch would wrap what is raised in a worker into its traceback
            yield str(error)


class TextStream(TorchDataset):
    """The rows of a run by their number; a process asks for its own (rank, rank + processes, ...) one after the other.

    `encode` gives the sub-tokens and marks of texts, as `common.data.corpus.encode`; `ends` the special tokens around a
    text. Rows are those of `common.data.corpus.blocks_of`, all but the last filled up, with their number as `row`.
    """

    def __init__(
        self,
        texts: Texts,
        encode: Callable[[list[str]], list[Marked]],
        ends: tuple[list[int], list[int]],
        least: int,
        args: CorpusArguments,
        training: TrainingArguments,
    ):
        self.shards, self.encode, self.ends, self.least, self.args = texts.shards, encode, ends, least, args
        self.seed = training.seed if training.data_seed is None else training.data_seed
        self.processes, self.rank = training.world_size, training.process_index
        self.workers = training.dataloader_num_workers
        readers = self.processes * max(1, self.workers)
        self.shares = args.stream_shares or readers
        if self.shares % readers:
            raise InputError(
                f"--stream_shares {self.shares}: {self.processes} processes with {self.workers} workers each read "
                f"them; needed: a multiple of {readers}"
            )
        self.rows = 0  # of the run: the trainer sets it
        self.go_to(None)

    def __len__(self) -> int:
        return self.rows

    def go_to(self, checkpoint: str | None) -> None:
        """Begin at the place that `save` kept in a checkpoint folder, or at the first row."""
        self.close()
        start = {"next": [0, 0, 0], "window": 0, "rows": 0, "left": empty_row()}
        self._number = self.rank
        places = {share: {"start": start, "taken": 0} for share in range(self.shares)}
        if checkpoint is not None:
            kept = [json.loads(path.read_text(encoding="utf-8")) for path in Path(checkpoint).glob(STATE.format("*"))]
            if not kept or {state["shares"] for state in kept} != {self.shares}:
                shares = kept[0]["shares"] if kept else "no"
                raise InputError(f"{checkpoint}: its run had {shares} shares; give --stream_shares {shares}")
            for state in kept:
                places |= {int(share): place for share, place in state["places"].items()}
            self._number = kept[0]["row"] + self.rank
            self._warn_of_changes(kept[0]["bytes"])
        self._places = places
        own = [share for share in range(self.shares) if share % self.processes == self.rank]
        self._windows = {share: [places[share]["start"]] for share in own}

    def _warn_of_changes(self, then: dict[str, int | None]) -> None:
        changed = [shard.name for shard in self.shards if shard.bytes != then[shard.name]]
        if changed:
            warn(
                f"{', '.join(changed[:10])}: other bytes than when the run was stopped; goes on by the number of texts"
            )

    def save(self, folder: str | Path, row: int) -> None:
        """Keep the place of each share of this process as of `row`, a multiple of the processes, in `folder`."""
        places = {}
        for share, windows in self._windows.items():
            taken = max(0, -(-(row - share) // self.shares))  # rows of the share before `row`
            while len(windows) > 1 and windows[1]["rows"] <= taken:
                windows.pop(0)
            places[share] = {"start": windows[0], "taken": taken - windows[0]["rows"]}
        state = {
            "row": row,
            "shares": self.shares,
            "places": places,
            "bytes": {shard.name: shard.bytes for shard in self.shards},
        }
        Path(folder, STATE.format(self.rank)).write_text(json.dumps(state), encoding="utf-8")

    def __getitems__(self, numbers: list[int]) -> list[Row]:
        if self._source is None:
            reader = _Reader(self, self._number // self.processes, self._places)
            loader = DataLoader(
                reader,
                batch_size=None,
                num_workers=self.workers,
                collate_fn=_as_it_is,
                worker_init_fn=partial(ignore_group_signals, None),
            )
            self._source = iter(loader)
        rows = []
        for number in numbers:
            if number != self._number:
                raise RuntimeError(f"row {number} was asked for, and the stream is at row {self._number}")
            found = next(self._source)
            if isinstance(found, str):
                raise InputError(*found.split("\n"))
            row, start = found
            if start is not None:
                self._note(number % self.shares, start, number)
            rows.append({name: np.asarray(values) for name, values in row.items()} | {"row": number})
            self._number += self.processes
        return rows

    def _note(self, share: int, start: dict[str, Any], number: int) -> None:
        """Keep the beginning of a window that was come to, and forget those that no checkpoint can need any more."""
        windows = self._windows[share]
        if windows[-1]["window"] != start["window"]:
            windows.append(start)
        oldest = (number - self.ahead) // self.shares
        while len(windows) > 1 and windows[1]["rows"] < oldest:
            windows.pop(0)

    #: rows that the data loader may be ahead of the weights: the trainer sets it
    ahead = 0

    def close(self) -> None:
        """End the workers."""
        self._source = None


def _as_it_is(item):
    return item
