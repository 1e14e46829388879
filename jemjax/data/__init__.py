"""Images and their labels, loaded by Grain. It imports neither jax nor TensorFlow."""

from jemjax.data.crops import Crop
from jemjax.data.images import Reading, read_image
from jemjax.data.pipeline import batches
from jemjax.data.sources import (
    ArraySource,
    EncodedSource,
    FolderSource,
    Source,
    TFDSSource,
    in_memory,
    load_arrays,
    open_data,
    spread,
)
from jemjax.errors import DataError

__all__ = [
    "ArraySource",
    "Crop",
    "DataError",
    "EncodedSource",
    "FolderSource",
    "Reading",
    "Source",
    "TFDSSource",
    "batches",
    "in_memory",
    "load_arrays",
    "open_data",
    "read_image",
    "spread",
]
