"""What every recipe shares: arguments, data, models, tuning, batching, metrics, trainer and reports."""

import os

# On a CPU oneDNN keeps what it has compiled for each shape of a product, up to 1,024 of them, which batches of many
# lengths fill with hundreds of MiB; 64 are as fast (tests/benchmarks/NOTES.md). Read when the first is computed.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
