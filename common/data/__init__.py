"""Read files into checked rows."""

from common.data.files import (
    NOT_UTF8,
    READERS,
    TABLES,
    Located,
    Readers,
    Row,
    check_file,
    json_fault,
    numbered_lines,
    parse_json,
    read_file,
)
from common.data.labels import MOST_LABELS, label_names
from common.data.packing import Blocks, find_blocks
from common.data.rows import UNLABELED, Gold, load_splits
from common.data.stream import Corpus, open_corpus

__all__ = [
    "MOST_LABELS",
    "NOT_UTF8",
    "READERS",
    "TABLES",
    "UNLABELED",
    "Blocks",
    "Corpus",
    "Gold",
    "Located",
    "Readers",
    "Row",
    "check_file",
    "find_blocks",
    "json_fault",
    "label_names",
    "load_splits",
    "numbered_lines",
    "open_corpus",
    "parse_json",
    "read_file",
]
