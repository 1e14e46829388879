"""A TensorFlow Datasets set in ArrayRecord form, written without TensorFlow."""

import contextlib
import functools
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jemjax.data.sources import Progress
from jemjax.errors import DataError, printable

Example = dict[str, Any]


class RawSet(NamedTuple):
    """What is to be written.

    Attributes:
        image_shape: (H, W, C); None where it differs between images.
        class_names: by label feature; the features are in this order.
        has_ids: whether examples have an "id", as CIFAR's do.
        sizes: the number of examples by split.
        examples: by split, a function that gives them.
    """

    image_shape: tuple[int | None, int | None, int]
    class_names: dict[str, tuple[str, ...]]
    has_ids: bool
    sizes: dict[str, int]
    examples: dict[str, Callable[[], Iterator[Example]]]


def by_split(
    examples: Callable[[str], Iterator[Example]], splits: dict[str, Any]
) -> dict[str, Callable[[], Iterator[Example]]]:
    """`examples` as `RawSet` has it: a function for each split."""
    return {split: functools.partial(examples, split) for split in splits}


def write(
    tfds, raw_set: RawSet, name: str, version: str, out: Path, progress: Progress | None
) -> None:
    """Writes a set into OUT/NAME/VERSION.

    Args:
        tfds: tensorflow_datasets.
        raw_set: what is written.
        name: of the set.
        version: MAJOR.MINOR.PATCH.
        out: the folder of prepared sets.
        progress: called with how many examples are written, and of how many.

    Raises:
        DataError: if the folder cannot be written.
    """
    total = sum(raw_set.sizes.values())
    set_name, set_version = name, version

    base: Any = tfds.core.GeneratorBasedBuilder

    class Builder(base, skip_registration=True):  # pyright: ignore
        name = set_name
        VERSION = tfds.core.Version(set_version)
        done = 0

        def _info(self):
            features: dict[str, Any] = {}
            if raw_set.has_ids:
                features["id"] = tfds.features.Text()
            features["image"] = tfds.features.Image(shape=raw_set.image_shape)
            for key, names in raw_set.class_names.items():
                features[key] = tfds.features.ClassLabel(names=list(names))
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label") if raw_set.class_names else None,
            )

        def _split_generators(self, dl_manager):
            del dl_manager  # nothing is downloaded
            return {split: self._generate_examples(split) for split in raw_set.examples}

        def _generate_examples(self, split):
            for key, example in enumerate(raw_set.examples[split]()):
                yield key, example
                self.done += 1
                if progress is not None:
                    progress(self.done, total)

    settings = tfds.download.DownloadConfig(
        compute_stats=tfds.download.ComputeStatsMode.SKIP
    )
    try:
        with (
            tempfile.TemporaryDirectory() as downloads,
            contextlib.redirect_stdout(io.StringIO()),
            _no_progress_bar(tfds),
        ):
            Builder(data_dir=out, file_format="array_record").download_and_prepare(
                download_dir=downloads, download_config=settings
            )
    except OSError as error:
        raise DataError(
            f"{printable(out)}: cannot be written ({error.strerror or error})"
        ) from error


@contextlib.contextmanager
def _no_progress_bar(tfds) -> Iterator[None]:
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.enable_progress_bar()
