"""One image file to pixels: all of it as it is meant, or an error that names it."""

import contextlib
import dataclasses
import errno
import functools
import io
import math
import os
import stat
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jemjax.errors import DataError, printable

# What Pillow reads by itself. Formats that it only stubs (HDF5, GRIB) or hands to
# another program (EPS) are left out, whatever a file of theirs is called.
EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm"
    " .pnm .jp2 .j2k .jpx .avif .tga .pcx .sgi .ico .icns .qoi".split()
)
_FORMATS = (
    "JPEG MPO PNG WEBP GIF BMP DIB TIFF PPM JPEG2000 AVIF TGA PCX SGI ICO ICNS QOI"
).split()
ORIENTATION = 0x0112  # of EXIF
_GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"}
_SIGNATURES = {
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"GIF8": "a GIF image",
    b"BM": "a BMP image",
    b"RIFF": "a WebP image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
}
# The warning is an error where somebody wants warnings to be.
_BOMBS = Image.DecompressionBombError, Image.DecompressionBombWarning
# The mean color of ImageNet, which normalization of photographs makes zero.
_MEAN_COLOR = (124, 116, 104)
# What opening a file says of the file, and will say again; else it is the disk.
_LASTING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR}


class UnreadableImage(DataError):
    """A file that is no image, damaged, or not to be read as the settings are."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How image files are read where they leave a choice, or cannot be read."""

    on_bad_image: Literal["refuse", "skip"] = "refuse"
    """what follows on an image that cannot be read: the run is refused, or the next
    image takes its place, always the same one"""
    max_bad_share: float = 0.01
    """of all images, that skip puts up with"""
    alpha: Literal["white", "black", "mean"] = "white"
    """what shows through transparent pixels; mean: the mean color of ImageNet"""
    value_range: tuple[float, float] | None = None
    """of images of more than 8 bits, the values that become black and white, between
    which others are scaled; unless given, 0 65535 of 16 bits and 0 1 of floats, and
    images with other values are refused"""
    max_pixels: int = 89_478_485
    """of an image; one of more is not decoded, however small its file"""

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, each in a sentence."""
        if self.on_bad_image not in ("refuse", "skip"):
            yield (
                f"--on-bad-image: got {self.on_bad_image!r}, expected refuse or skip"
            )
        if not 0 <= self.max_bad_share <= 1:
            yield (
                f"--max-bad-share: got {self.max_bad_share}, expected a number in"
                " [0, 1]"
            )
        if self.alpha not in ("white", "black", "mean"):
            yield f"--alpha: got {self.alpha!r}, expected white, black or mean"
        if self.value_range is not None:
            low, high = self.value_range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                yield (
                    f"--value-range: got {low} {high}, expected two finite numbers,"
                    " the smaller one first"
                )
        if self.max_pixels < 1:
            yield f"--max-pixels: got {self.max_pixels}, expected at least 1"


DEFAULT_READING = Reading()


class Header(NamedTuple):
    """What an image file says before its pixels."""

    height: int
    """upright"""
    width: int
    grey: bool
    mode: str
    """Pillow's"""
    format: str
    frames: bool
    """whether there are several"""


# The image that each thread reads, for messages about what takes too long.
now_reading: dict[int, str] = {}
# What is told the name of each image before it is opened, in a worker process.
on_opening: Callable[[str], None] | None = None


@contextlib.contextmanager
def opened(
    file: str | io.BytesIO, where: str, reading: Reading = DEFAULT_READING
) -> Iterator[Image.Image]:
    """An image of which the header is read; what is found wrong with it is named.

    Args:
        file: a path, or a file in memory.
        where: the name of the image in error messages.
        reading: the limit of pixels.

    Raises:
        UnreadableImage: if it is no image, damaged, too large, or not finite.
        DataError: if the disk cannot be read, or memory does not suffice.
    """
    now_reading[threading.get_ident()] = where
    if on_opening is not None:
        on_opening(where)
    _lift_limit(reading.max_pixels)
    try:
        if isinstance(file, str) and not stat.S_ISREG(os.stat(file).st_mode):
            raise UnreadableImage(f"{where}: is no regular file, expected an image")
        with Image.open(file, formats=_formats()) as image:
            if image.width * image.height > reading.max_pixels:
                raise Image.DecompressionBombError
            yield image
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{where}: memory does not suffice to decode it") from error
    except OSError as error:
        if error.errno is None or error.errno in _LASTING:
            raise _unreadable(file, where, error, reading) from error
        raise DataError(f"{where}: cannot be read ({error.strerror})") from error
    except Exception as error:  # Pillow's decoders raise almost anything
        raise _unreadable(file, where, error, reading) from error
    finally:
        now_reading.pop(threading.get_ident(), None)


def _lift_limit(max_pixels: int) -> None:
    """Pillow's own limit, of the whole process, is raised where a user raises ours."""
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def read_header(
    file: str | io.BytesIO, where: str, reading: Reading = DEFAULT_READING
) -> Header:
    """What there is to know without decoding the pixels; raises as `opened`."""
    with opened(file, where, reading) as image:
        return _header(image)


def _header(image: Image.Image) -> Header:
    return Header(
        *upright_size(image),
        grey=image.mode in _GREY_MODES,
        mode=image.mode,
        format=image.format or "",
        # A photograph beside which a camera keeps a preview is no animation.
        frames=image.format != "MPO" and getattr(image, "is_animated", False),
    )


class Inspection(NamedTuple):
    """What an image says that was decoded."""

    header: Header
    transparent: bool
    extremes: tuple[float, float] | None
    """the least and the greatest value, of more than 8 bits"""


def inspect_image(
    file: str | io.BytesIO, where: str, reading: Reading = DEFAULT_READING
) -> Inspection:
    """Decodes all of an image; raises as `read_image`."""
    with opened(file, where, reading) as image:
        header, transparent = _header(image), image.has_transparency_data
        ImageOps.exif_transpose(image, in_place=True)
        deep = image.mode.startswith(("I", "F"))
        extremes: Any = image.getextrema() if deep else None
        to_channels(image, 3, reading)
        return Inspection(header, transparent, extremes)


def read_image(
    file: str | io.BytesIO,
    shape: tuple[int | None, int | None, int],
    where: str,
    reading: Reading = DEFAULT_READING,
) -> np.ndarray:
    """Decodes one image.

    EXIF orientation is applied, transparency is laid on a color, 16-bit, 32-bit and
    float images are scaled by their range, and the image is resized (antialiased,
    bicubic) until it covers the shape and cropped to its center.

    Args:
        file: a path, or a file in memory.
        shape: (H, W, C) of the result, C being 1 or 3; H and W of None keep the
            image's own.
        where: the name of the image in error messages.
        reading: the color, the range, and the limit of pixels.

    Returns:
        (H, W, C) uint8.

    Raises:
        UnreadableImage: if it is no image, damaged, too large, not finite, or of
            values whose range is not known.
        DataError: if the disk cannot be read, or memory does not suffice.
    """
    height, width, channels = shape
    with opened(file, where, reading) as image:
        if image.format == "JPEG" and height and width:
            # JPEG decodes to an eighth, a quarter or a half at a fraction of the time;
            # twice the wanted size is kept for the antialiased resize.
            upright = (width, height)
            across, down = upright[::-1] if _lies_on_its_side(image) else upright
            scale = 2 * max(across / image.width, down / image.height)
            image.draft(
                None, (math.ceil(image.width * scale), math.ceil(image.height * scale))
            )
        ImageOps.exif_transpose(image, in_place=True)
        image = to_channels(image, channels, reading)
    with naming(f"resizing {where}"):
        if height and width:
            image = fit(image, height, width)
        return np.array(image, np.uint8).reshape(image.height, image.width, channels)


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """An error in the block says what was being done, and to which file."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while {what}")
        raise


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resizes until (height, width) is covered and crops to the center."""
    if image.size == (width, height):
        return image
    scale = max(height / image.height, width / image.width)
    left = (image.width - width / scale) / 2
    top = (image.height - height / scale) / 2
    box = (left, top, left + width / scale, top + height / scale)
    # Rounding must not put the box a hair outside of the image.
    box = (max(box[0], 0), max(box[1], 0)) + (
        min(box[2], image.width),
        min(box[3], image.height),
    )
    return image.resize((width, height), Image.Resampling.BICUBIC, box)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width after the EXIF orientation is applied, from the header."""
    width, height = image.size
    return (width, height) if _lies_on_its_side(image) else (height, width)


def _lies_on_its_side(image: Image.Image) -> bool:
    """Whether applying the EXIF orientation swaps height and width."""
    # A TIFF's size is upright already; a PNG without EXIF would be decoded to look.
    if image.format == "TIFF" or not {"exif", "xmp"} & image.info.keys():
        return False
    return image.getexif().get(ORIENTATION) in (5, 6, 7, 8)


def to_channels(image: Image.Image, channels: int, reading: Reading) -> Image.Image:
    """Any mode of Pillow to L (one channel) or RGB (three)."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_eight_bits(image, reading))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        color = {"mean": _MEAN_COLOR}.get(reading.alpha, reading.alpha)
        ground = Image.new("RGBA", image.size, color)
        image = Image.alpha_composite(ground, image)
    return image.convert("L" if channels == 1 else "RGB")


class _ValueRange(ValueError):
    """Of values for which no scale is known."""


def _to_eight_bits(image: Image.Image, reading: Reading) -> np.ndarray:
    """Scales by the range of the type, or by that which the user gives.

    Never by the values of the one image: then two images of the same object, one of
    them taken in less light, would no longer differ.
    """
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise FloatingPointError("holds values that are not finite")
    if reading.value_range is not None:
        low, high = reading.value_range
    else:
        low, high = (0, 1) if image.mode == "F" else (0, 65535)
        least, most = values.min(), values.max()
        if least < low or most > high:
            raise _ValueRange(
                f"holds {values.dtype} values from {least:g} to {most:g}, expected"
                f" {low:g} to {high:g}; say with --value-range LOW HIGH which of them"
                " are black and white"
            )
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.round(np.clip(scaled, 0, 255)).astype(np.uint8)


def _unreadable(
    file: str | io.BytesIO, where: str, error: Exception, reading: Reading
) -> UnreadableImage:
    if isinstance(error, _ValueRange):
        return UnreadableImage(f"{where}: {error}")
    return UnreadableImage(
        f"{where}: {_looks_like(file, error, reading)}, expected a readable image;"
        " replace or delete it"
    )


def _looks_like(file: str | io.BytesIO, error: Exception, reading: Reading) -> str:
    if isinstance(file, str) and os.path.islink(file) and not os.path.exists(file):
        return "is a link to a file that does not exist"
    if isinstance(error, _BOMBS):
        limit = f"{reading.max_pixels:,} pixels that --max-pixels allows"
        return f"has more than the {limit}"
    if isinstance(error, FloatingPointError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror})"
    head: Any
    if isinstance(file, str):
        with open(file, "rb") as content:
            head = content.read(512)
    else:
        head = file.getvalue()[:512]
    if not head:
        return "is an empty file"
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            if isinstance(error, UnidentifiedImageError):
                return f"starts as {name} but is damaged or of an unsupported kind"
            detail = printable(str(error)) or type(error).__name__
            return f"starts as {name} but is damaged or cut short ({detail})"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page (HTML)"
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        return "is a text file"
    return "is no image of a known format"
