"""Turn ratings and items into rows of this recipe: the history of a user is the query, the next liked item the passage.

    python -m recipes.matching.histories --ratings_file ratings.csv --items_file movies.csv --output outputs/films

The folder gets `train.jsonl`, `validation.jsonl` and `test.jsonl` (rows of queries, with the id of their item),
`corpus.jsonl` (items), `ratings.jsonl` (all ratings by time) and `users.jsonl` (the history of each user today). The
columns of MovieLens are the defaults. RECOMMENDATION.md has the commands that follow.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from common.args import FileArguments
from common.cli import command_line, parse
from common.data import read_file
from common.data.files import check_output, fresh_file
from common.data.json_files import list_of_cell
from common.data.source import Row
from common.data.tables import missing_columns
from common.errors import InputError, Problems, brief, check_file_exists, tell
from common.run import print_table

from .reading import is_text, number_of

#: files of the folder
FILES = {name: f"{name}.jsonl" for name in ("train", "validation", "test", "corpus", "ratings", "users")}
SPLITS = ("train", "validation", "test")
#: entry of MovieLens for an item without genres
NO_GENRES = "(no genres listed)"
#: value of `--rating_column_name` if each row counts as liked
NONE = "none"
#: "Matrix, The (1999)": an article behind the title
ARTICLE = re.compile(r"(.+), (The|A|An|Le|La|Les|Il|El|Der|Die|Das)( \(.*)?")


@dataclass
class HistoryArguments(FileArguments):
    ratings_file: str | None = field(default=None, metadata={"help": "ratings: user, item, rating and time a row"})
    items_file: str | None = field(default=None, metadata={"help": "items: id, title and genres a row"})
    output: str | None = field(default=None, metadata={"help": "folder to write"})
    overwrite: bool = field(default=False, metadata={"help": "replace its files"})
    user_column_name: str = field(default="userId", metadata={"help": "column with the user"})
    item_column_name: str = field(default="movieId", metadata={"help": "column with the item, in both files"})
    rating_column_name: str = field(
        default="rating", metadata={"help": "column with the rating; none: each row counts as liked"}
    )
    time_column_name: str = field(
        default="timestamp", metadata={"help": "column with the time: a number, or a date such as 2018-09-24T14:27:30"}
    )
    title_column_name: str | None = field(
        default=None, metadata={"help": "column with the title of an item; default: title"}
    )
    genres_column_name: str = field(
        default="genres", metadata={"help": "column with its genres: a list, or a text with | between them"}
    )
    min_rating: float = field(default=4.0, metadata={"help": "an item with at least this rating counts as liked"})
    history: int = field(default=5, metadata={"help": "last liked items in a query, the newest first"})
    validation_share: float = field(default=0.1, metadata={"help": "share of the liked ratings, before those of test"})
    test_share: float = field(default=0.1, metadata={"help": "share of the liked ratings, the last ones by time"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ratings_file", "items_file"):
            check_file_exists(name, getattr(self, name) or "")
        self.title_column_name = self.title_column_name or "title"
        if not self.output:
            raise InputError("--output: names the folder to write; give it")
        if self.history < 1:
            raise InputError(f"--history {self.history}: must be at least 1")
        if min(self.validation_share, self.test_share) <= 0 or self.validation_share + self.test_share >= 1:
            raise InputError("--validation_share and --test_share: must be above 0, with a sum below 1")
        for name in FILES.values():
            check_output(Path(self.output, name), self.overwrite)


ARGUMENTS = (HistoryArguments,)


class Rating(NamedTuple):
    """A rating of an item by a user; `liked` if it is high enough and the first one of the pair."""

    time: float
    user: str
    item: str
    liked: bool


def text_of(title: str, genres: list[str]) -> str:
    """Return the text of an item, such as `The Matrix (1999): Action, Sci-Fi`."""
    moved = ARTICLE.fullmatch(title.strip())
    title = f"{moved[2]} {moved[1]}{moved[3] or ''}" if moved else title.strip()
    return f"{title}: {', '.join(genres)}" if genres else title


def genres_of(value: object) -> list[str] | None:
    """Return the genres in a cell; none for an empty one, None for a value of another type."""
    if value is None:
        return []
    if isinstance(value, str):
        value = list_of_cell(value) if value.startswith("[") else value.split("|")
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return None
    return [one.strip() for one in value if one.strip() and one != NO_GENRES]


def time_of(value: object) -> float | None:
    """Return a time in seconds: a number, or a date of ISO 8601; None for anything else."""
    number = number_of(value)
    if number is None and isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except (ValueError, OverflowError):
            return None
    return number


def read_items(args: HistoryArguments) -> tuple[dict[str, str], dict[str, str]]:
    """Return item -> text, without items that repeat the text of another one, and each id -> its item there.

    Raises:
        InputError: an item has no id or title, or an id is repeated.
    """
    problems, texts, places = Problems(args.skip_bad_rows), {}, {}
    same: dict[str, str] = {}
    first: dict[str, str] = {}  # text -> item
    for where, row in read_file(args.items_file or "", args=args):
        messages = list(_item_problems(row, args, places))
        if messages:
            problems.reject(where, messages)
            continue
        name = str(row[args.item_column_name])
        text = text_of(row[args.title_column_name], genres_of(row.get(args.genres_column_name)) or [])
        places[name] = where
        same[name] = first.setdefault(text, name)
        texts.setdefault(same[name], text)
    if not texts and not problems.count:
        problems.add(args.items_file or "", "contains no items; add some")
    problems.check()
    if len(same) > len(texts):
        tell(f"{args.items_file}: {len(same) - len(texts):,} items repeat title and genres of another and count as it")
    return texts, same


def _item_problems(row: Row | str, args: HistoryArguments, places: dict[str, str]) -> Iterator[str]:
    if isinstance(row, str):
        yield row
        return
    columns = {args.item_column_name: "item_column_name", args.title_column_name: "title_column_name"}
    absent = [name for name in columns if name not in row]
    if absent:
        yield missing_columns(row, absent, columns)
        return
    name = row[args.item_column_name]
    if not _is_id(name):
        yield f"{args.item_column_name} is {brief(name)}; needed: an id"
    elif str(name) in places:
        yield f"{args.item_column_name} {brief(name)} is already that of {places[str(name)]}; give each item one row"
    if not is_text(row[args.title_column_name]):
        yield f"{args.title_column_name} is {brief(row[args.title_column_name])}; needed: a non-blank text"
    genres = row.get(args.genres_column_name)
    if genres_of(genres) is None:
        yield f"{args.genres_column_name} is {brief(genres)}; needed: a list of texts, or a text with | between them"


def _is_id(value: object) -> bool:
    return is_text(value) or (isinstance(value, int) and not isinstance(value, bool))


def read_ratings(args: HistoryArguments, same: dict[str, str]) -> list[Rating]:
    """Return the ratings by time; equal times keep the order of the file.

    Args:
        args: names the file and its columns.
        same: id of an item -> the item that it counts as.

    Raises:
        InputError: a row lacks a value, or its item is unknown.
    """
    problems, found = Problems(args.skip_bad_rows), []
    liked: set[tuple[str, str]] = set()
    for where, row in read_file(args.ratings_file or "", args=args):
        messages = list(_rating_problems(row, args, same))
        if messages:
            problems.reject(where, messages)
            continue
        rating = NONE if args.rating_column_name == NONE else number_of(row[args.rating_column_name])
        item = same[str(row[args.item_column_name])]
        high = rating == NONE or rating >= args.min_rating
        found.append(Rating(time_of(row[args.time_column_name]), str(row[args.user_column_name]), item, high))
    problems.check()
    found.sort(key=lambda rating: rating.time)
    for number, rating in enumerate(found):
        if (rating.user, rating.item) in liked:  # a repeated item is no recommendation
            found[number] = rating._replace(liked=False)
        elif rating.liked:
            liked.add((rating.user, rating.item))
    return found


def _rating_problems(row: Row | str, args: HistoryArguments, same: dict[str, str]) -> Iterator[str]:
    if isinstance(row, str):
        yield row
        return
    columns = {getattr(args, name): name for name in (f"{part}_column_name" for part in ("user", "item", "time"))}
    if args.rating_column_name != NONE:
        columns[args.rating_column_name] = "rating_column_name"
    absent = [name for name in columns if name not in row]
    if absent:
        yield missing_columns(row, absent, columns)
        return
    user, item, time = (row[name] for name in list(columns)[:3])
    if not _is_id(user):
        yield f"{args.user_column_name} is {brief(user)}; needed: an id"
    if not _is_id(item) or str(item) not in same:
        yield f"{args.item_column_name} is {brief(item)}, which no row of {args.items_file} has; add it there"
    if time_of(time) is None:
        yield f"{args.time_column_name} is {brief(time)}; needed: a number, or a date such as 2018-09-24T14:27:30"
    if args.rating_column_name != NONE and number_of(row[args.rating_column_name]) is None:
        yield f"{args.rating_column_name} is {brief(row[args.rating_column_name])}; needed: a number"


def split_times(ratings: list[Rating], args: HistoryArguments) -> tuple[float, float]:
    """Return the times at which validation and test begin, by shares of the liked ratings.

    Raises:
        InputError: a split would be empty.
    """
    times = [rating.time for rating in ratings if rating.liked]
    count = len(times)
    begins = [int(count * (1 - share)) for share in (args.validation_share + args.test_share, args.test_share)]
    if count and times[0] < times[begins[0]] < times[begins[1]]:
        return times[begins[0]], times[begins[1]]
    raise InputError(
        f"--ratings_file {args.ratings_file}: {count:,} ratings of at least --min_rating {args.min_rating:g} at "
        "too few different times for three splits; add ratings, or lower --min_rating"
    )


def split_of(time: float, begins: tuple[float, float]) -> str:
    """Return the split of a time."""
    return SPLITS[sum(time >= begin for begin in begins)]


def query_of(history: list[str], texts: dict[str, str], last: int) -> str:
    """Return the text of the last liked items, the newest first."""
    return "; ".join(texts[item] for item in history[: -last - 1 : -1])


def rows_of(ratings: list[Rating], texts: dict[str, str], begins: tuple[float, float], last: int) -> dict[str, Any]:
    """Return name of a file -> its rows.

    A liked item is a row of its split if the user liked another one before. `place` is the number of its rating.
    """
    rows: dict[str, list[Row]] = {name: [] for name in FILES}
    histories: dict[str, list[str]] = defaultdict(list)
    for place, rating in enumerate(ratings):
        split, history = split_of(rating.time, begins), histories[rating.user]
        about = {"user": rating.user, "item": rating.item}
        rows["ratings"].append(about | {"liked": rating.liked, "split": split})
        if rating.liked:
            if history:
                rows[split].append({"query": query_of(history, texts, last), **about, "place": place})
            history.append(rating.item)
    rows["corpus"] = [{"id": item, "text": text} for item, text in texts.items()]
    rows["users"] = [{"user": user, "query": query_of(h, texts, last)} for user, h in histories.items() if h]
    return rows


def seen_in_training(ratings: Iterable[Row]) -> set[str]:
    """Return the items that a user liked in the time of training."""
    return {rating["item"] for rating in ratings if rating["liked"] and rating["split"] == "train"}


def main(argv: list[str] | None = None) -> dict[str, int]:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    texts, same = read_items(args)
    ratings = read_ratings(args, same)
    rows = rows_of(ratings, texts, split_times(ratings, args), args.history)
    for name in SPLITS:
        if not rows[name]:
            raise InputError(f"--ratings_file {args.ratings_file}: the split {name} has no rows; raise its share")
    for name, file in FILES.items():
        with fresh_file(Path(args.output or "", file), args.overwrite) as written:
            written.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name])
    known = seen_in_training(rows["ratings"])
    counts = {}
    for name in SPLITS:
        users, cold = {row["user"] for row in rows[name]}, sum(row["item"] not in known for row in rows[name])
        counts |= {name: len(rows[name]), f"{name}_users": len(users), f"{name}_cold": cold}
    print_table(
        ["split by time", "rows", "users", "rows of items that training lacks"],
        [[name, counts[name], counts[f"{name}_users"], counts[f"{name}_cold"]] for name in SPLITS],
    )
    tell(f"{len(texts):,} items, {len(known):,} of them liked in training; written to {args.output}")
    return counts


if __name__ == "__main__":
    command_line(main)
