"""Read files into checked rows."""

from common.data.columns import Columns
from common.data.files import READERS, TABLES, Reader, Readers, read_file, read_text
from common.data.json_files import json_fault, parse_cell, parse_json
from common.data.labels import MOST_LABELS, label_names
from common.data.packing import Blocks, find_blocks
from common.data.rows import UNLABELED, Gold, load_splits
from common.data.source import Located, Row, Source
from common.data.stream import Corpus, open_corpus

__all__ = [
    "MOST_LABELS",
    "READERS",
    "TABLES",
    "UNLABELED",
    "Blocks",
    "Columns",
    "Corpus",
    "Gold",
    "Located",
    "Reader",
    "Readers",
    "Row",
    "Source",
    "find_blocks",
    "json_fault",
    "label_names",
    "load_splits",
    "open_corpus",
    "parse_cell",
    "parse_json",
    "read_file",
    "read_text",
]
