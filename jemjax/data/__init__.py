"""Images and their labels, loaded by Grain. It imports neither jax nor TensorFlow."""

from jemjax.data.crops import Crop
from jemjax.data.folders import FolderSource
from jemjax.data.headers import spread
from jemjax.data.images import Reading, read_image
from jemjax.data.open import open_data
from jemjax.data.pipeline import batches
from jemjax.data.sources import (
    ArraySource,
    EncodedSource,
    Source,
    in_memory,
    load_arrays,
)
from jemjax.data.tfds import TFDSSource
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
