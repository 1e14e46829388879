"""Prepared TensorFlow Datasets, by their random-access data sources."""

import difflib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jemjax.data.headers import choose_size, spread
from jemjax.data.images import Reading, UnreadableImage, read_header
from jemjax.data.sources import (
    Encoded,
    EncodedSource,
    Split,
    digest_of,
    file_sizes,
)
from jemjax.errors import DataError, printable


class TFDSSource(EncodedSource):
    """One split of a prepared set, through tfds's random-access data source.

    Args:
        records: what `as_data_source` gave, its images still encoded.
        keys: of the image and, if there is one, of the label.
        files: of the split.
        name: how `open_data` calls it.
        class_names: the name of each label.
        image_shape: (H, W, C) to which every image is brought.
        sizes_differ: whether the images themselves are of several sizes.
        reading: how they are read.
    """

    def __init__(
        self,
        records: Any,
        keys: tuple[str, str | None],
        files: Sequence[str],
        **options: Any,
    ):
        super().__init__(**options)
        self.records = records
        self.keys = keys
        self.files = files

    def __len__(self) -> int:
        return len(self.records)

    def encoded(self, indices: np.ndarray) -> list[Encoded]:
        """The records of the examples, read together, which costs half the time."""
        image_key, label_key = self.keys
        places = indices.tolist()
        return [
            Encoded(
                io.BytesIO(record[image_key]),
                f"{self.name}[{index}]",
                int(record[label_key]) if label_key else -1,
            )
            for index, record in zip(
                places, self.records.__getitems__(places), strict=True
            )
        ]

    def fingerprint(self) -> str:
        """Of the number of examples, and of the names and sizes of the files."""
        names = [os.path.basename(path) for path in self.files]
        sizes = file_sizes(self.files)
        return digest_of(self, [str(len(self)), *names, sizes, *self.sample()])


def open_tfds(
    name: str,
    rest: str,
    split: Split,
    image_size: int | None,
    data_dir: str | os.PathLike[str] | None,
    reading: Reading,
) -> TFDSSource:
    """Opens NAME[/CONFIG][:VERSION]; a test part without labels gives way."""
    tfds = import_tfds()
    folder = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    builder = tfds.builder_from_directory(_prepared_folder(name, rest, folder))
    keys = _feature_keys(name, builder.info)

    def records(part: str) -> Any:
        return builder.as_data_source(
            part, decoders={keys[0]: tfds.decode.SkipDecoding()}
        )

    available = list(builder.info.splits)
    wanted = ("train",) if split == "train" else ("test", "validation")
    found = [part for part in wanted if part in available]
    if not found:
        raise DataError(
            f"{name}: no {' or '.join(wanted)} split, only {', '.join(available)}"
        )
    part = found[0]
    try:
        examples = records(part)
    except (NotImplementedError, ValueError) as error:
        raise DataError(
            f"{name}: {builder.data_path} is of the format"
            f" {builder.info.file_format.value}, expected array_record; prepare it"
            f" again, {_how_to_prepare(rest)}"
        ) from error
    if len(found) == 2 and keys[1] and len(examples) and examples[0][keys[1]] < 0:
        part = "validation"  # the test split's labels are withheld
        examples = records(part)
    if not len(examples):
        raise DataError(f"{name}: its split {part} is empty")
    feature = builder.info.features[keys[0]]
    height, width, channels = feature.shape
    if height is None or width is None:
        sizes = set()
        # Each costs a read of the whole record.
        for index in spread(len(examples), 256 if image_size is None else 1):
            encoded = io.BytesIO(examples[int(index)][keys[0]])
            try:
                sizes.add(read_header(encoded, f"{name}[{index}]", reading)[:2])
            except UnreadableImage:
                if reading.on_bad_image == "refuse":
                    raise
    else:
        sizes = {(height, width)}
    return TFDSSource(
        examples,
        keys,
        [os.fspath(path) for path in builder.info.splits[part].filepaths],
        name=name,
        class_names=map(printable, builder.info.features[keys[1]].names or ())
        if keys[1]
        else (),
        image_shape=(*choose_size(sizes, image_size), 1 if channels == 1 else 3),
        sizes_differ=image_size is None and len(sizes) > 1,
        reading=reading,
    )


def import_tfds() -> Any:
    """tensorflow_datasets, which is imported only where it is used."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"TensorFlow Datasets needs {error.name}: install it with pip install"
            " 'jemjax[train]'"
        ) from error
    return tfds


def _prepared_folder(name: str, rest: str, data_dir: Path) -> Path:
    """The newest prepared version: DATA_DIR/NAME[/CONFIG]/VERSION."""
    below, _, version = rest.partition(":")
    if not re.fullmatch(r"\w+(/[\w.+-]+)?", below):
        raise DataError(f"{name}: expected tfds:NAME, tfds:NAME/CONFIG or :VERSION")

    def versions(folder: Path) -> list[tuple[int, ...]]:
        return sorted(
            tuple(map(int, path.parent.name.split(".")))
            for path in folder.glob("*/features.json")
            if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)
        )

    folder = data_dir / below
    found = [".".join(map(str, numbers)) for numbers in versions(folder)]
    if found and (not version or version in found):
        return folder / (version or found[-1])
    if found:
        raise DataError(
            f"{name}: version {version} is not prepared in {data_dir}, only"
            f" {', '.join(found)}"
        )
    configs = sorted(p.name for p in folder.glob("*") if versions(p))
    if len(configs) == 1:
        return _prepared_folder(name, f"{below}/{configs[0]}", data_dir)
    if configs:
        raise DataError(
            f"{name}: has several configurations, choose one: "
            + ", ".join(f"tfds:{below}/{config}" for config in configs)
        )
    prepared = sorted(
        p.name for p in data_dir.glob("*") if any(p.rglob("features.json"))
    )
    near = difflib.get_close_matches(below, prepared, n=1)
    fix = f"did you mean tfds:{near[0]}?" if near else _how_to_prepare(below)
    raise DataError(f"{name}: not prepared in {data_dir}; {fix}")


def _how_to_prepare(below: str) -> str:
    """Nothing is downloaded here: what makes the set, and what reads images as is."""
    if below.split("/")[0] == "imagenet2012":  # not to be had without an account
        return (
            "get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from image-net.org"
            f" and, where TensorFlow is, tfds build {below} --manual_dir=FOLDER_OF_BOTH"
            " --file_format=array_record; or unpack them into train/CLASS/ and"
            " val/CLASS/, and use --data folder:PATH"
        )
    return (
        f"make it of raw files with jemjax data prepare KIND RAW --name {below}, or,"
        f" where TensorFlow is, with tfds build {below} --file_format=array_record; or"
        " use images as they are with --data folder:PATH"
    )


def _feature_keys(name: str, info) -> tuple[str, str | None]:
    """The names of the image and of the class label, if there is one."""
    kinds = {key: type(feature).__name__ for key, feature in info.features.items()}
    images = [key for key, kind in kinds.items() if kind == "Image"]
    labels = [key for key, kind in kinds.items() if kind == "ClassLabel"]
    if "image" not in images and len(images) != 1:
        raise DataError(
            f"{name}: expected a feature called image, got {', '.join(kinds)}"
        )
    image = "image" if "image" in images else images[0]
    if np.dtype(info.features[image].np_dtype).kind != "u":
        raise DataError(
            f"{name}: its images are {info.features[image].np_dtype}, expected uint8"
        )
    supervised = (info.supervised_keys or (None, None))[1]
    label = next((key for key in ("label", supervised) if key in labels), None)
    return image, label
