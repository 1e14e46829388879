"""What the views of an image are: a table of numbers, and the function that obeys it.

A `ViewRecipe` is data: frozen, hashable, printable. `make_views` applies the operations
of each of its rows in the order: crop, flip, color jitter, grayscale, blur, solarize,
normalize. An operation with probability 0 leaves nothing in the program.

The published recipes follow, and their forms for images up to 64 pixels: larger crops
and no blur, as in the CIFAR recipes of da Costa et al., 2022, solo-learn
(arXiv:2108.01775). The numbers are each method's own, the arithmetic is torchvision's.
"""

import dataclasses
import math

import jax

from jemjax.augment.blur import random_gaussian_blur
from jemjax.augment.color import (
    color_jitter,
    normalize,
    random_grayscale,
    random_solarize,
)
from jemjax.augment.geometry import (
    Method,
    check_method,
    random_flip,
    random_resized_crop,
    resize,
)
from jemjax.augment.inputs import (
    check_images,
    check_number,
    check_range,
    check_size,
    example_keys,
    is_number,
    is_whole,
)
from jemjax.augment.masking import MaskRecipe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# All published weights of SwAV were trained with this first number.
SWAV_STD = (0.228, 0.224, 0.225)

# What `ViewRecipe.without` can switch off, and the field that does it.
PARTS = {
    "crop": "crop_scale",
    "flip": "flip_probability",
    "jitter": "jitter_probability",
    "grayscale": "grayscale_probability",
    "blur": "blur_probability",
    "solarize": "solarize_probability",
}


@dataclasses.dataclass(frozen=True)
class View:
    """What happens to an image on its way to one view, in this order."""

    size: int
    """height and width of the view in pixels"""
    crop_scale: tuple[float, float] | None
    """smallest and largest area of the crop as a share of the image; None: the whole
    image, resized"""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """smallest and largest width / height of the crop"""
    interpolation: Method = "bicubic"
    """of resizing: bilinear or bicubic"""
    flip_probability: float = 0.5
    """of mirroring left to right"""
    jitter_probability: float = 0.8
    """of the four changes of color that follow, in random order"""
    brightness: float = 0.4
    """strength: the factor is uniform between 1 - this and 1 + this"""
    contrast: float = 0.4
    """strength, as of brightness"""
    saturation: float = 0.2
    """strength, as of brightness"""
    hue: float = 0.1
    """strength, in full turns"""
    grayscale_probability: float = 0.2
    """of removing color"""
    blur_probability: float = 0.0
    """of Gaussian blur"""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """smallest and largest standard deviation in pixels"""
    solarize_probability: float = 0.0
    """of inverting bright values"""
    solarize_threshold: float = 0.5
    """values from here on are inverted"""
    mean: tuple[float, ...] | float = IMAGENET_MEAN
    """of each channel, subtracted; averaged over them for one-channel images"""
    std: tuple[float, ...] | float = IMAGENET_STD
    """of each channel, divided by; averaged over them for one-channel images"""

    def __post_init__(self) -> None:
        """Refuses what no image could be treated with."""
        check_size("size", self.size)
        if self.crop_scale is not None:
            check_range("crop_scale", self.crop_scale, high=1.0)
        check_range("crop_ratio", self.crop_ratio)
        check_method("interpolation", self.interpolation)
        for part in ("flip", "jitter", "grayscale", "blur", "solarize"):
            check_number(PARTS[part], getattr(self, PARTS[part]), 0, 1)
        for name in ("brightness", "contrast", "saturation"):
            check_number(name, getattr(self, name), 0)
        check_number("hue", self.hue, 0, 0.5)
        check_range("blur_sigma", self.blur_sigma)
        check_number("solarize_threshold", self.solarize_threshold, 0, 1)
        _check_channels("mean", self.mean, -math.inf)
        _check_channels("std", self.std, 0)


@dataclasses.dataclass(frozen=True)
class ViewRecipe:
    """The views that are made of each image, one row a view.

    Where there are global and local views, the global ones come first: those of the
    size of the first view.
    """

    views: tuple[View, ...]
    mask: MaskRecipe | None = None
    """which patches of a view are hidden from the branch that is trained"""

    def __post_init__(self) -> None:
        """Refuses a recipe without views."""
        if not self.views or not all(isinstance(view, View) for view in self.views):
            raise ValueError(f"views: got {self.views!r}, expected a tuple of Views")

    @property
    def num_global(self) -> int:
        """Number of global views: those of the first one's size."""
        return sum(view.size == self.views[0].size for view in self.views)

    def without(self, part: str) -> "ViewRecipe":
        """The recipe with one part switched off in every view.

        Args:
            part: "crop" (the whole image is resized instead), "flip", "jitter",
                "grayscale", "blur" or "solarize".

        Raises:
            ValueError: for another name.
        """
        if part not in PARTS:
            raise ValueError(f"part: got {part!r}, expected one of {', '.join(PARTS)}")
        off = {PARTS[part]: None if part == "crop" else 0.0}
        views = tuple(dataclasses.replace(view, **off) for view in self.views)
        return dataclasses.replace(self, views=views)

    def __str__(self) -> str:
        """A plain-text table, one row a view; the numbers after p are probabilities."""
        header = ("view", "size", "crop", *list(PARTS)[1:])
        rows = [
            (str(number), *_describe(view)) for number, view in enumerate(self.views, 1)
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(map(str.ljust, row, widths)).rstrip() for row in (header, *rows)
        ]
        if self.mask is not None:
            lines.append(f"masked: {self.mask}")
        return "\n".join(lines)


def vicreg_imagenet(size: int = 224) -> ViewRecipe:
    """The views of photographs of VICReg, Barlow Twins and, first, BYOL.

    One view is always blurred; the other seldom, but solarized at times. Grill et al.,
    2020, BYOL (arXiv:2006.07733); Bardes et al., 2022, VICReg (arXiv:2105.04906).

    Args:
        size: height and width of a view in pixels.
    """
    view = View(size=size, crop_scale=(0.08, 1.0))
    return ViewRecipe(
        (
            dataclasses.replace(view, blur_probability=1.0),
            dataclasses.replace(view, blur_probability=0.1, solarize_probability=0.2),
        )
    )


def vicreg_small(size: int = 32) -> ViewRecipe:
    """VICReg's views of small images, up to 64 pixels: larger crops and no blur.

    The CIFAR form of da Costa et al., 2022, solo-learn (arXiv:2108.01775).

    Args:
        size: height and width of a view in pixels.
    """
    view = View(size=size, crop_scale=(0.2, 1.0), solarize_probability=0.1)
    return ViewRecipe((view, view))


def byol_small(size: int = 32) -> ViewRecipe:
    """The views of small images of BYOL, Barlow Twins and MoCo v3.

    The pair of `vicreg_imagenet` with larger crops and no blur: the second view alone
    is solarized at times.

    Args:
        size: height and width of a view in pixels.
    """
    view = View(size=size, crop_scale=(0.2, 1.0))
    return ViewRecipe((view, dataclasses.replace(view, solarize_probability=0.2)))


def simclr_imagenet(size: int = 224) -> ViewRecipe:
    """SimCLR's views of photographs: strong changes of color, and pixels in [0, 1].

    Chen et al., 2020, SimCLR (arXiv:2002.05709), with its color strength of 1.

    Args:
        size: height and width of a view in pixels.
    """
    view = View(
        size=size,
        crop_scale=(0.08, 1.0),
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.2,
        blur_probability=0.5,
        mean=0.0,
        std=1.0,
    )
    return ViewRecipe((view, view))


def simclr_small(size: int = 32) -> ViewRecipe:
    """SimCLR's views of small images: its CIFAR form, with half the color strength.

    Args:
        size: height and width of a view in pixels.
    """
    view = View(
        size=size, crop_scale=(0.2, 1.0), saturation=0.4, hue=0.1, mean=0.0, std=1.0
    )
    return ViewRecipe((view, view))


def moco_imagenet(size: int = 224) -> ViewRecipe:
    """The views of photographs of MoCo v2 and SimSiam, two alike.

    Chen et al., 2020, MoCo v2 (arXiv:2003.04297). Published with the flip last: it
    commutes with everything after the crop.

    Args:
        size: height and width of a view in pixels.
    """
    view = View(
        size=size,
        crop_scale=(0.2, 1.0),
        interpolation="bilinear",
        saturation=0.4,
        blur_probability=0.5,
    )
    return ViewRecipe((view, view))


def moco_small(size: int = 32) -> ViewRecipe:
    """The views of small images of MoCo v2 and SimSiam: no blur.

    Args:
        size: height and width of a view in pixels.
    """
    view = View(size=size, crop_scale=(0.2, 1.0), saturation=0.4)
    return ViewRecipe((view, view))


def mocov3_imagenet(size: int = 224, smallest_crop: float = 0.2) -> ViewRecipe:
    """MoCo v3's views of photographs: BYOL's pair, with bilinear crops.

    Chen, Xie, He, 2021, MoCo v3 (arXiv:2104.02057).

    Args:
        size: height and width of a view in pixels.
        smallest_crop: as a share of the image: 0.2 for ResNets, 0.08 for transformers.
    """
    return ViewRecipe(
        tuple(
            dataclasses.replace(
                view, crop_scale=(smallest_crop, 1.0), interpolation="bilinear"
            )
            for view in vicreg_imagenet(size).views
        )
    )


def swav_imagenet(
    size: int = 224, local_size: int | None = None, num_local: int = 6
) -> ViewRecipe:
    """SwAV's views of photographs: two large crops and some small ones, colored alike.

    Caron et al., 2020, SwAV (arXiv:2006.09882). Without local views the two crops are
    from 8 % of the image on.

    Args:
        size: height and width of the two global views in pixels.
        local_size: height and width of a local view in pixels; unless given, 96 for
            224, and in proportion, in steps of 16, for other sizes.
        num_local: number of local views, >= 0.
    """
    view = View(
        size=size,
        crop_scale=(0.14, 1.0) if num_local else (0.08, 1.0),
        interpolation="bilinear",
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.2,
        blur_probability=0.5,
        std=SWAV_STD,
    )
    local = dataclasses.replace(
        view, size=local_size or _local_size(size), crop_scale=(0.05, 0.14)
    )
    return _with_local((view, view), local, num_local)


def swav_small(size: int = 32, num_local: int = 0) -> ViewRecipe:
    """SwAV's views of small images: no blur.

    Args:
        size: height and width of the two global views in pixels; local views have half
            of it.
        num_local: number of local views, >= 0; with any, crops as of photographs.
    """
    view = View(
        size=size,
        crop_scale=(0.14, 1.0) if num_local else (0.2, 1.0),
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.2,
    )
    local = dataclasses.replace(view, size=size // 2, crop_scale=(0.05, 0.14))
    return _with_local((view, view), local, num_local)


def dino_imagenet(
    size: int = 224,
    local_size: int | None = None,
    num_local: int = 8,
    smallest_crop: float | None = None,
) -> ViewRecipe:
    """DINO's views of photographs: BYOL's pair of large crops, and some small ones.

    Caron et al., 2021, DINO (arXiv:2104.14294).

    Args:
        size: height and width of the two global views in pixels.
        local_size: height and width of a local view in pixels; unless given, 96 for
            224, and in proportion, in steps of 16, for other sizes.
        num_local: number of local views, >= 0.
        smallest_crop: the share of the image at which global crops start and local
            ones end. Unless given it is 0.4 with local views, as published for
            transformers (0.14 for ResNets), and 0.14 without.
    """
    if smallest_crop is None:
        smallest_crop = 0.4 if num_local else 0.14
    first, second = (
        dataclasses.replace(view, crop_scale=(smallest_crop, 1.0))
        for view in vicreg_imagenet(size).views
    )
    local = dataclasses.replace(
        first,
        size=local_size or _local_size(size),
        crop_scale=(0.05, smallest_crop),
        blur_probability=0.5,
    )
    return _with_local((first, second), local, num_local)


def dino_small(size: int = 32, num_local: int = 0) -> ViewRecipe:
    """DINO's views of small images: no blur.

    Args:
        size: height and width of the two global views in pixels; local views have half
            of it.
        num_local: number of local views, >= 0; with any, crops as of photographs.
    """
    first, second = byol_small(size).views
    if num_local:
        first = dataclasses.replace(first, crop_scale=(0.4, 1.0))
        second = dataclasses.replace(second, crop_scale=(0.4, 1.0))
    local = dataclasses.replace(first, size=size // 2, crop_scale=(0.05, 0.4))
    return _with_local((first, second), local, num_local)


def data2vec_imagenet(size: int = 224) -> ViewRecipe:
    """data2vec's one view of photographs, of which a part is then masked.

    Baevski et al., 2022, data2vec (arXiv:2202.03555). Published with the colors changed
    before the crop: the contrast was about the whole image's mean.

    Args:
        size: height and width of the view in pixels.
    """
    view = View(
        size=size,
        crop_scale=(0.08, 1.0),
        jitter_probability=1.0,
        saturation=0.4,
        hue=0.0,
        grayscale_probability=0.0,
    )
    return ViewRecipe((view,), MaskRecipe("block", 120 / 196))


def data2vec_small(size: int = 32) -> ViewRecipe:
    """data2vec's one view of small images: larger crops.

    Args:
        size: height and width of the view in pixels.
    """
    recipe = data2vec_imagenet(size)
    (view,) = recipe.views
    view = dataclasses.replace(view, crop_scale=(0.2, 1.0))
    return dataclasses.replace(recipe, views=(view,))


def make_views(
    key: jax.Array, images: jax.Array, recipe: ViewRecipe
) -> tuple[jax.Array, ...]:
    """The random views of each image.

    An example's views depend on its own key and pixels only, not on the batch or on
    the number of devices; the views of an example are drawn independently.

    Args:
        key: one key, folded with each row's index, or N keys.
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        recipe: what to do.

    Returns:
        For each view of the recipe, (N, size, size, C) float32, normalized.

    Raises:
        ValueError: for wrong shapes.
    """
    images = check_images(images)
    # Each operation of each view has its own keys, so that to leave one out changes
    # nothing in the others.
    shape = (len(recipe.views), len(PARTS))
    split = jax.vmap(lambda key: jax.random.split(key, shape), out_axes=2)
    keys = split(example_keys(key, len(images)))  # (V, P, N)
    return tuple(
        _make_view(dict(zip(PARTS, keys[number], strict=True)), images, view)
        for number, view in enumerate(recipe.views)
    )


def evaluation_view(images: jax.Array, recipe: ViewRecipe) -> jax.Array:
    """The whole images as the recipe's first view has them, with nothing random.

    Args:
        images: (N, H, W, C), C = 1 or 3, float in [0, 1] or uint8.
        recipe: gives the size, the interpolation, and mean and std.

    Returns:
        (N, size, size, C) float32, normalized.

    Raises:
        ValueError: for wrong shapes.
    """
    view = recipe.views[0]
    images = resize(check_images(images), view.size, view.interpolation)
    return normalize(images, view.mean, view.std)


def _local_size(size: int) -> int:
    return max(1, size * 96 // 224 // 16) * 16


def _with_local(
    global_views: tuple[View, ...], local: View, num_local: int
) -> ViewRecipe:
    if not is_whole(num_local) or num_local < 0:
        raise ValueError(f"num_local: got {num_local!r}, expected an integer >= 0")
    return ViewRecipe(global_views + (local,) * num_local)


def _make_view(keys: dict[str, jax.Array], images: jax.Array, view: View) -> jax.Array:
    if view.crop_scale is None:
        images = resize(images, view.size, view.interpolation)
    else:
        images = random_resized_crop(
            keys["crop"],
            images,
            view.size,
            scale=view.crop_scale,
            ratio=view.crop_ratio,
            method=view.interpolation,
        )
    if view.flip_probability > 0:
        images = random_flip(keys["flip"], images, probability=view.flip_probability)
    if view.jitter_probability > 0:
        images = color_jitter(
            keys["jitter"],
            images,
            brightness=view.brightness,
            contrast=view.contrast,
            saturation=view.saturation,
            hue=view.hue,
            probability=view.jitter_probability,
        )
    if view.grayscale_probability > 0:
        images = random_grayscale(
            keys["grayscale"], images, probability=view.grayscale_probability
        )
    if view.blur_probability > 0:
        images = random_gaussian_blur(
            keys["blur"],
            images,
            sigma=view.blur_sigma,
            probability=view.blur_probability,
        )
    if view.solarize_probability > 0:
        images = random_solarize(
            keys["solarize"],
            images,
            probability=view.solarize_probability,
            threshold=view.solarize_threshold,
        )
    return normalize(images, view.mean, view.std)


def _describe(view: View) -> tuple[str, ...]:
    """The cells of one row of a recipe's table."""

    def cell(part: str, detail: str = "") -> str:
        probability = getattr(view, PARTS[part])
        return f"p {probability:g}{detail}" if probability > 0 else "-"

    crop = "whole image"
    if view.crop_scale is not None:
        crop = f"{_span(view.crop_scale)} of the area"
        if view.crop_ratio != (3 / 4, 4 / 3):
            crop += f", ratio {_span(view.crop_ratio)}"
    strengths = (view.brightness, view.contrast, view.saturation, view.hue)
    return (
        str(view.size),
        f"{crop}, {view.interpolation}",
        cell("flip"),
        cell("jitter", ": " + " ".join(f"{strength:g}" for strength in strengths)),
        cell("grayscale"),
        cell("blur", f": sigma {_span(view.blur_sigma)}"),
        cell("solarize", f": from {view.solarize_threshold:g}"),
    )


def _span(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.3g}-{bounds[1]:.3g}"


def _check_channels(name: str, values: tuple[float, ...] | float, above: float) -> None:
    numbers = values if isinstance(values, tuple) else (values,)
    valid = len(numbers) in (1, 3) and all(
        is_number(number) and math.isfinite(number) and number > above
        for number in numbers
    )
    if not valid:
        limit = "" if above < 0 else f" > {above:g}"
        raise ValueError(
            f"{name}: got {values!r}, expected a number or a tuple of 1 or 3"
            f" numbers{limit}"
        )
