"""Images and their labels, loaded by Grain. It imports neither jax nor TensorFlow."""

from jemjax.data.pipeline import batches
from jemjax.data.sources import (
    ArraySource,
    DataError,
    FolderSource,
    Source,
    TFDSSource,
    in_memory,
    load_arrays,
    open_data,
    spread,
)

__all__ = [
    "ArraySource",
    "DataError",
    "FolderSource",
    "Source",
    "TFDSSource",
    "batches",
    "in_memory",
    "load_arrays",
    "open_data",
    "spread",
]
