"""Folders of images, as `folder:PATH` reads them."""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from jemjax.data.folders import FolderSource
from jemjax.data.images import read_image
from jemjax.data.open import open_data
from jemjax.data.prepare.tfds_writer import Example, RawSet, by_split
from jemjax.errors import printable


def read_folder(raw: Path, name: str) -> RawSet:
    """The set of a folder with the parts train and test."""
    del name  # any
    train = open_data(f"folder:{raw}", split="train")
    test = open_data(f"folder:{raw}", split="test")
    assert isinstance(train, FolderSource) and isinstance(test, FolderSource)
    sources = {"train": train, "test": test}
    channels = train.image_shape[2]

    def examples(split: str) -> Iterator[Example]:
        source = sources[split]
        for index in range(len(source)):
            example: Example = {"image": _encode(source.path(index), channels)}
            if train.class_names:
                example["label"] = int(source.labels[index])
            yield example

    return RawSet(
        image_shape=(None, None, channels),
        class_names={"label": train.class_names} if train.class_names else {},
        has_ids=False,
        sizes={split: len(source) for split, source in sources.items()},
        examples=by_split(examples, sources),
    )


def _encode(path: str, channels: int) -> bytes | Image.Image:
    """The file as it is if any reader sees it as we do, else its decoded pixels."""
    pixels = read_image(path, (None, None, channels), printable(path))
    with Image.open(path) as image:
        same = (
            image.format in ("JPEG", "PNG")
            and image.mode == ("L" if channels == 1 else "RGB")
            and not image.has_transparency_data
            and image.getexif().get(0x0112, 1) == 1
        )
    if same:
        return Path(path).read_bytes()
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
