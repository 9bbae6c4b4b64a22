"""Read texts without labels for `--semi`, in the files that predict reads."""

from functools import partial

from datasets import Dataset, DatasetDict

from common.data.pool import key_of, read_pool
from common.data.source import Row
from common.data.tables import missing_columns
from common.errors import InputError

from .arguments import SentimentDataArguments
from .reading import check_texts, read_rows


def read_unlabeled(args: SentimentDataArguments, data: DatasetDict, several: bool) -> Dataset:
    """Return the rows of `--unlabeled_file` in the columns of the training rows, with any class in `label`.

    Raises:
        InputError: rows are invalid, or labelled rows have several labels.
    """
    if several:
        raise InputError("--semi: the rows have several labels each, and only one is supported; leave --semi out")
    placeholder = data["train"]["label"][0]
    named = {"text": args.text_column_name}
    if args.text_pair_column_name:
        named["text_pair"] = args.text_pair_column_name
    arguments = {args.text_column_name: "text_column_name", args.text_pair_column_name: "text_pair_column_name"}

    def convert(row: Row) -> Row | str:
        found = {ours: row.get(theirs, row.get(ours)) for ours, theirs in named.items()}
        missing = [theirs for ours, theirs in named.items() if theirs not in row and ours not in row]
        return missing_columns(row, missing, arguments) if missing else found | {"label": placeholder}

    read = partial(read_rows, args=args, columns=(args.text_column_name, args.label_column_name), predicting=True)
    return read_pool(args, read, convert, check_texts, lambda row: key_of(row["text"], row.get("text_pair")), data)
