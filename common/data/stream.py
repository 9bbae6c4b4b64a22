"""Read, shuffle and pack texts during training, for corpora that exceed memory and disk.

The stream has a fixed number of shares. Row n of a run is the next row of share n modulo `--stream_shares`. The texts
of a row depend only on the files, the seed and `--stream_shares`, not on the number of processes and workers.

A share reads texts in windows of `--shuffle_buffer`, shuffles each window, and packs its texts into rows. The
unfinished row at the end of a window moves to the next window. A checkpoint stores the position
of a share: the start of its window, the unfinished row at that start, and the number of rows since.
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
from common.data.blocks import Marked, empty_row, fill_rows
from common.data.corpus import CorpusArguments, check_text, files_of, load_corpus, load_texts, read_texts
from common.data.rows import UNREADABLE, accepted, checked
from common.data.samples import sample
from common.data.source import Located, Row, ending_of
from common.data.workers import ignore_group_signals
from common.errors import InputError, Problems, tell, warn

HELD_OUT = 1000  # texts held out for validation, and texts read from other splits of a hub data set
TOKENIZER_TEXTS = 100_000  # training texts of a new tokenizer
ENCODED_TOGETHER = 256
STATE = "stream_{}.json"


@dataclass
class Shard:
    """A part of the stream that is read from its start: a file, or a part of a hub data set.

    Attributes:
        name: the file, or the name of the part.
        read: returns the rows from the start.
        bytes: size of the file when the run began; None for a hub data set.
        held_out: number of texts at the start that are kept for validation.
    """

    name: str
    read: Callable[[], Iterator[Located]]
    bytes: int | None = None
    held_out: int = 0

    def texts(self, args: CorpusArguments) -> Iterator[str]:
        """Yield the texts, including blank ones.

        Raises:
            InputError: a row has no valid text, with file and line, or the file changed its size.
        """
        for where, row in self.read():
            text = row.get(args.text_column_name) if isinstance(row, dict) else None
            if isinstance(text, str) and len(text) <= args.max_chars:
                yield text
            else:
                problems = Problems()
                columns = {"text": args.text_column_name}
                accepted(checked([(where, row)], columns, check_text, (), args.max_chars), problems)
                problems.check()
        if self.bytes is None:
            return
        file = Path(self.name)
        size = (
            file.stat().st_size if file.is_file() else None
        )  # a file deleted during reading is still readable to its end
        if size != self.bytes:
            now = "deleted" if size is None else f"changed to {size:,} bytes"
            raise InputError(
                f"{self.name}: {now} during the run, from {self.bytes:,} bytes; texts may be missing; restore the file"
            )


@dataclass
class Texts:
    """The data of a run with `--streaming`: shards for training, and the other splits in memory."""

    shards: list[Shard]
    splits: DatasetDict = field(default_factory=DatasetDict)

    def names(self) -> Dataset:
        """Return the names of the shards, to check that a resumed run reads the same files."""
        return Dataset.from_dict({"shard": [shard.name for shard in self.shards]})

    def sample(self, args: CorpusArguments, count: int = TOKENIZER_TEXTS) -> Dataset:
        """Return the first `count` training texts, as column `text`."""
        texts = chain.from_iterable(islice(shard.texts(args), shard.held_out, None) for shard in self.shards)
        return Dataset.from_dict({"text": list(islice((text for text in texts if text.strip()), count))})


def check_streaming(data_args: CorpusArguments, args: TrainingArguments) -> None:
    """Raise `InputError` for arguments that contradict `--streaming`."""
    if not data_args.streaming:
        if data_args.stream_shares is not None:
            raise InputError("--stream_shares: needs --streaming true")
        return
    if not (data_args.train_file or data_args.dataset_name):
        raise InputError("--streaming: no training data; give --train_file or --dataset_name")
    if data_args.skip_bad_rows:
        raise InputError("--skip_bad_rows: does not work with --streaming; correct the rows")
    for name in ("domain_column", "replay_file"):
        if getattr(data_args, name) is not None:
            raise InputError(f"--{name}: needs all texts in memory; leave --streaming out")
    if args.max_steps < 1:
        raise InputError("--streaming: the length of a stream is unknown; give --max_steps")
    if data_args.max_train_samples is not None:
        raise InputError("--max_train_samples: does not work with --streaming; limit training by --max_steps")


@dataclass
class Corpus:
    """The texts of a run.

    Attributes:
        texts: the splits in memory, without `train` if that is streamed.
        stream: the training texts, if they are streamed.
    """

    texts: DatasetDict
    stream: Texts | None = None

    def recorded(self) -> dict[str, Dataset]:
        """Return the data that identifies the run: its rows, or the names of the streamed shards."""
        return {**self.texts, "train": self.stream.names()} if self.stream else self.texts

    def training_texts(self, args: CorpusArguments) -> Dataset:
        """Return the training texts, or the first texts of a stream."""
        return self.stream.sample(args) if self.stream else self.texts["train"]


def open_corpus(args: CorpusArguments, training: TrainingArguments) -> Corpus:
    """Load the texts that `args` names; with `--streaming`, open the stream of training texts instead.

    Raises:
        InputError: rows are invalid, with file and line, or arguments contradict `--streaming`.
    """
    check_streaming(args, training)
    stream = open_texts(args) if args.streaming else None
    texts = stream.splits if stream else load_corpus(args)
    if args.forgetting_file:
        texts["forgetting"] = load_texts(args.forgetting_file, args)
    return Corpus(texts, stream)


def open_texts(args: CorpusArguments) -> Texts:
    """Open the training shards, check the first text of each, and load the other splits.

    Without validation texts, the first `--max_eval_samples` texts of the stream (1,000 if not given) are held out.

    Raises:
        InputError: a shard has no texts, or an invalid one.
    """
    limits = {"validation": args.max_eval_samples, "test": args.max_predict_samples}
    splits = {}
    if args.dataset_name:
        streams = _hub_splits(args.dataset_name, args)
        shards = streams.pop("train")
        for split in (name for name in limits if name in streams):  # each process evaluates the splits in this order
            texts = chain.from_iterable(shard.texts(args) for shard in streams[split])
            splits[split] = _dataset(islice(texts, limits[split] or HELD_OUT), split)
    else:
        assert args.train_file is not None  # `check_streaming` asks for one of both
        shards = [_file_shard(path, args) for path in files_of(args.train_file)]
        for split in limits:
            if path := getattr(args, f"{split}_file"):
                rows = load_texts(path, args)
                splits[split] = rows.select(sample([None] * len(rows), limits[split] or len(rows)))
    problems = Problems()
    for shard in shards:  # the other texts are checked when they are read
        try:
            if next(shard.texts(args), None) is None:
                problems.add(shard.name, "contains no rows; add some")
        except InputError as error:
            problems.count += 1
            problems.shown.append(str(error))
    problems.check()
    if "validation" not in splits:
        splits["validation"] = _hold_out(shards, args)
    return Texts(shards, DatasetDict(splits))


def _file_shard(path: Path, args: CorpusArguments) -> Shard:
    if ending_of(path) == ".json":
        raise InputError(f"{path}: a .json file cannot be streamed; convert it to .jsonl")
    return Shard(str(path), partial(read_texts, str(path), args.text_unit, args), path.stat().st_size)


def _hold_out(shards: list[Shard], args: CorpusArguments) -> Dataset:
    texts: list[str] = []
    count = args.max_eval_samples or HELD_OUT
    for shard in shards:
        first = list(islice(shard.texts(args), count - len(texts)))
        shard.held_out = len(first)
        texts += first
        if len(texts) == count:
            break
    # drop shards without training texts: a share of only these would yield no rows
    shards[:] = [s for s in shards if not s.held_out or any(True for _ in islice(s.texts(args), s.held_out, None))]
    if not shards:
        raise InputError(
            f"--streaming: all {len(texts)} texts of the stream would be held out for validation; give "
            "--validation_file, or a smaller --max_eval_samples"
        )
    tell(f"no validation data given: the first {len(texts)} texts of the stream are held out for validation")
    return _dataset(texts, "validation")


def _dataset(texts: Iterator[str] | list[str], split: str) -> Dataset:
    kept = [text for text in texts if text.strip()]
    if not kept:
        raise InputError(f"{split}: every text is blank; give texts")
    return Dataset.from_dict({"text": kept, "id": [str(i) for i in range(1, len(kept) + 1)]})


def _hub_splits(name: str, args: CorpusArguments) -> dict[str, list[Shard]]:
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
            loaded = loaded if isinstance(loaded, dict) else {"train": loaded}
            splits = {title: split.to_iterable_dataset() for title, split in loaded.items()}
        else:
            splits = datasets.load_dataset(name, args.dataset_config_name, streaming=True)
    except UNREADABLE as error:
        raise InputError(
            f"--dataset_name {name}: {_first_line(error)}; without a network, give a saved folder, or --train_file"
        ) from None
    if "train" not in splits:
        known = ", ".join(splits)
        raise InputError(f"--dataset_name {name}: no split train; its splits: {known}; choose another data set")
    return {
        title: [
            Shard(f"{name} [{title}] {i}", partial(_hub_rows, stream, i, f"{name} [{title}], part {i}"))
            for i in range(stream.num_shards)
        ]
        for title, stream in splits.items()
    }


def _hub_rows(stream: datasets.IterableDataset, shard: int, place: str) -> Iterator[Located]:
    number = 0
    try:
        for row in stream.shard(num_shards=stream.num_shards, index=shard):
            number += 1
            yield f"{place}, row {number}", row
    except UNREADABLE as error:
        yield f"{place}, row {number + 1}", f"the stream ended early: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# Texts to rows


class _Share:
    """An endless sequence of rows from a share of the texts. Each pass over the texts has another order of shards.

    The end of a pass also ends a window. With at least as many shards as shares, each share gets whole shards.
    Otherwise each share gets a part of the texts of each shard.
    """

    def __init__(self, stream: "TextStream", number: int):
        self.stream, self.number = stream, number

    def rows(self, start: dict[str, Any]) -> Iterator[tuple[Row, dict[str, Any] | None]]:
        """Yield rows from the window `start` on; the first row of each window comes with the start of that window."""
        stream, args = self.stream, self.stream.args
        turn, *place = start["next"]
        texts = self._texts(turn, *place)
        whole, empty = not any(place), True  # the pass is read from its start; the pass has given no row
        while True:
            window = list(islice(texts, args.shuffle_buffer))
            order = np.random.default_rng([stream.seed, self.number, start["window"]]).permutation(len(window))
            shuffled = [window[i][1] for i in order]
            encoded = chain.from_iterable(
                stream.encode(shuffled[i : i + ENCODED_TOGETHER]) for i in range(0, len(shuffled), ENCODED_TOGETHER)
            )
            left = _copied(start["left"])
            rows = fill_rows(self._long_enough(encoded), stream.ends, args.max_seq_length, args.pack, row=left)
            number = start["rows"]
            given: dict[str, Any] | None = start
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
            else:  # the pass ended; the next pass starts a new window
                if whole and empty:
                    raise self._no_text()
                following = [turn + 1, 0, 0]
                turn, whole, empty = turn + 1, True, True
                texts = self._texts(*following)
                if self.number == 0 and turn == 1:
                    tell("end of data: starting another pass with a new shuffle")
            start = {"next": following, "window": start["window"] + 1, "rows": number, "left": left}

    def check(self) -> None:
        """Raise `InputError` if no text is long enough; stop reading at the first that is."""
        texts = (text for _, text in self._texts(0, 0, 0))
        while some := list(islice(texts, 8)):  # the first is long enough in most files
            if any(True for _ in self._long_enough(iter(self.stream.encode(some)))):
                return
        raise self._no_text()

    def _no_text(self) -> InputError:
        stream, names = self.stream, [shard.name for shard in self.stream.shards]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return InputError(
            f"{', '.join(names[:3])}{more}: share {self.number + 1} of {stream.shares} has no text of {stream.least} "
            "or more tokens; give more texts, or lower --stream_shares (default: processes times "
            "--dataloader_num_workers)"
        )

    def _long_enough(self, encoded: Iterator[Marked]) -> Iterator[Marked]:
        return (pair for pair in encoded if len(pair[0]) >= self.stream.least)

    def _texts(self, turn: int, place: int, first: int) -> Iterator[tuple[list[int], str]]:
        """Yield the texts of a pass, each with the place after it: pass, shard in its order, number in the shard."""
        stream, shares = self.stream, self.stream.shares
        order = np.random.default_rng([stream.seed, turn]).permutation(len(stream.shards))
        by_shard = len(order) >= shares
        selected = order[self.number :: shares] if by_shard else order
        for at in range(place, len(selected)):
            shard = stream.shards[selected[at]]
            first = max(first, shard.held_out)
            for number, text in enumerate(islice(shard.texts(stream.args), first, None), first):
                if by_shard or (number + at) % shares == self.number:
                    yield [turn, at, number + 1], text
            first = 0


def _copied(row: Row) -> Row:
    return {name: list(values) for name, values in row.items()}


class _Reader(IterableDataset):
    """The rows of a process from its row `first` on. Each worker reads different shares."""

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
        except InputError as error:  # yield the message: torch wraps an exception of a worker in a traceback
            yield str(error)


class TextStream(TorchDataset):
    """The numbered rows of a run. A process requests rows rank, rank + processes, ... in this order.

    Rows have the columns of `common.data.corpus.blocks_of`, and `row`, their number.

    Args:
        texts: the shards.
        encode: returns tokens and marks of texts, see `common.data.corpus.encode`.
        ends: special tokens before and after each text.
        least: fewest tokens of a text; shorter texts are dropped.
        args: length and packing of rows, shuffle buffer and shares.
        training: seed, processes and workers.

    Raises:
        InputError: `--stream_shares` is not a multiple of the readers, or a share has no text that is long enough.
    """

    #: rows that the data loader can be ahead of the weights; the trainer sets it
    ahead = 0
    _source: Iterator | None

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
                f"--stream_shares {self.shares}: does not divide among {self.processes} processes with "
                f"{self.workers} workers each; give a multiple of {readers}"
            )
        self.rows = 0  # number of rows of the run; the trainer sets it
        for share in range(self.rank, self.shares, self.processes):
            _Share(self, share).check()
        self.go_to(None)

    def __len__(self) -> int:
        return self.rows

    def go_to(self, checkpoint: str | None) -> None:
        """Move to the position that `save` wrote into folder `checkpoint`, or to the first row if None.

        Raises:
            InputError: the checkpoint has another number of shares.
        """
        self.close()
        start: dict[str, Any] = {"next": [0, 0, 0], "window": 0, "rows": 0, "left": empty_row()}
        self._number = self.rank
        places: dict[int, dict[str, Any]] = {share: {"start": start, "taken": 0} for share in range(self.shares)}
        if checkpoint is not None:
            states = [json.loads(path.read_text(encoding="utf-8")) for path in Path(checkpoint).glob(STATE.format("*"))]
            if not states or {state["shares"] for state in states} != {self.shares}:
                shares = states[0]["shares"] if states else "no"
                raise InputError(f"{checkpoint}: its run had {shares} shares; give --stream_shares {shares}")
            for state in states:
                places |= {int(share): place for share, place in state["places"].items()}
            row = states[0]["row"]
            self._number = row + (self.rank - row) % self.processes
            self._warn_of_changes(states[0]["bytes"])
        self._places = places
        assigned = [share for share in range(self.shares) if share % self.processes == self.rank]
        self._windows = {share: [places[share]["start"]] for share in assigned}

    def _warn_of_changes(self, then: dict[str, int | None]) -> None:
        changed = [shard.name for shard in self.shards if shard.bytes != then[shard.name]]
        if changed:
            warn(
                f"{', '.join(changed[:10])}: size changed since the checkpoint; continuing at the same number of texts"
            )

    def save(self, folder: str | Path, row: int) -> None:
        """Write the position of each share of this process at `row` into `folder`."""
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
                raise RuntimeError(f"row {number}: the stream is at row {self._number}; request rows in order")
            item = next(self._source)
            if isinstance(item, str):
                raise InputError(*item.split("\n"))
            row, start = item
            if start is not None:
                self._note(number % self.shares, start, number)
            rows.append({name: np.asarray(values) for name, values in row.items()} | {"row": number})
            self._number += self.processes
        return rows

    def _note(self, share: int, start: dict[str, Any], number: int) -> None:
        """Record the start of a new window, and drop starts that no later checkpoint needs."""
        windows = self._windows[share]
        if windows[-1]["window"] != start["window"]:
            windows.append(start)
        oldest = (number - self.ahead) // self.shares
        while len(windows) > 1 and windows[1]["rows"] < oldest:
            windows.pop(0)

    def close(self) -> None:
        """Stop the workers."""
        self._source = None


def _as_it_is(item):
    return item
