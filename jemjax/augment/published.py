"""The published view recipes, and their forms for images up to 64 pixels.

The small forms have larger crops and no blur, as in the CIFAR recipes of da Costa et
al., 2022, solo-learn (arXiv:2108.01775). The numbers are each method's own, the
arithmetic is torchvision's.

All views are made in the order of `View`. MoCo v2 and v3, SimSiam and LeJEPA mirror
last, data2vec first: the views are distributed alike, since a crop is as likely as its
mirror image, and what follows treats left and right alike. The one order that matters
is data2vec's jitter before the crop, of which its recipe says more.
"""

import dataclasses

from jemjax.augment.inputs import is_whole
from jemjax.augment.masking import MaskRecipe
from jemjax.augment.recipes import View, ViewRecipe

# All published weights of SwAV were trained with this first number.
SWAV_STD = (0.228, 0.224, 0.225)


def vicreg_imagenet(size: int = 224) -> ViewRecipe:
    """The views of photographs of VICReg and Barlow Twins: BYOL's pair.

    One view is always blurred; the other seldom, but solarized at times. Bardes et al.,
    2022, VICReg (arXiv:2105.04906).

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


def byol_imagenet(size: int = 224) -> ViewRecipe:
    """The views of photographs of BYOL, in the arithmetic of its own code.

    Grill et al., 2020, BYOL (arXiv:2006.07733).

    Args:
        size: height and width of a view in pixels.
    """
    return ViewRecipe(
        tuple(
            dataclasses.replace(view, arithmetic="byol")
            for view in vicreg_imagenet(size).views
        )
    )


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

    Chen et al., 2020, SimCLR (arXiv:2002.05709), with its color strength of 1, in the
    arithmetic of its own code.

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
        arithmetic="simclr",
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

    Chen et al., 2020, MoCo v2 (arXiv:2003.04297).

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

    Caron et al., 2021, DINO (arXiv:2104.14294). iBOT has the same; it masks blocks of
    the large ones: `MaskRecipe("block", (0.1, 0.5))` in half of the images.

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


def dinov2_imagenet(
    size: int = 224, local_size: int | None = None, num_local: int = 8
) -> ViewRecipe:
    """DINOv2's views of photographs: DINO's, of which others are blurred.

    Oquab et al., 2023, DINOv2 (arXiv:2304.07193). Its code blurs with one minus the
    probability that it names: the published weights saw the first view always sharp and
    the second blurred nine times in ten, and so does this recipe. What was meant is
    `dino_imagenet(smallest_crop=0.32)`, but for the size of the kernel.

    Args:
        size: height and width of the two global views in pixels.
        local_size: height and width of a local view in pixels; unless given, 96 for
            224, and in proportion, in steps of 16, for other sizes.
        num_local: number of local views, >= 0.
    """
    recipe = dino_imagenet(size, local_size, num_local, smallest_crop=0.32)
    views = tuple(
        dataclasses.replace(
            view, blur_probability=1 - view.blur_probability, blur_kernel_size=9
        )
        for view in recipe.views
    )
    return dataclasses.replace(recipe, views=views)


def mae_imagenet(size: int = 224) -> ViewRecipe:
    """MAE's one view: crop and flip, and three quarters of the patches left out.

    He et al., 2022, Masked autoencoders (arXiv:2111.06377). Of small images it is the
    same.

    Args:
        size: height and width of the view in pixels.
    """
    view = View(
        size=size,
        crop_scale=(0.2, 1.0),
        jitter_probability=0.0,
        grayscale_probability=0.0,
    )
    return ViewRecipe((view,), MaskRecipe("drop", 0.75))


def ijepa_imagenet(size: int = 224) -> ViewRecipe:
    """I-JEPA's one view: a crop, and nothing else.

    Assran et al., 2023, I-JEPA (arXiv:2301.08243). What is hidden of it, and what is
    predicted, is drawn by `multi_block_masks`. Of small images it is the same.

    Args:
        size: height and width of the view in pixels.
    """
    view = View(
        size=size,
        crop_scale=(0.3, 1.0),
        interpolation="bilinear",
        flip_probability=0.0,
        jitter_probability=0.0,
        grayscale_probability=0.0,
    )
    return ViewRecipe((view,))


def lejepa_imagenet(
    size: int = 224, local_size: int | None = None, num_local: int = 6
) -> ViewRecipe:
    """LeJEPA's views of photographs: large crops and small ones, all treated alike.

    Balestriero, LeCun, 2025, LeJEPA (arXiv:2511.08544).

    Args:
        size: height and width of the two global views in pixels.
        local_size: height and width of a local view in pixels; unless given, 98 for
            224, and in proportion, in steps of 14, for other sizes.
        num_local: number of local views, >= 0.
    """
    view = View(
        size=size,
        crop_scale=(0.3, 1.0),
        interpolation="bilinear",
        blur_probability=0.5,
        blur_kernel_size=7,
        solarize_probability=0.2,
    )
    local = dataclasses.replace(
        view, size=local_size or _local_size(size, 98, 14), crop_scale=(0.05, 0.3)
    )
    return _with_local((view, view), local, num_local)


def lejepa_small(size: int = 32, num_local: int = 0) -> ViewRecipe:
    """LeJEPA's views of small images: no blur.

    Args:
        size: height and width of the two global views in pixels; local views have half
            of it.
        num_local: number of local views, >= 0; with any, crops as of photographs.
    """
    view = View(
        size=size,
        crop_scale=(0.3, 1.0) if num_local else (0.2, 1.0),
        solarize_probability=0.2,
    )
    local = dataclasses.replace(view, size=size // 2, crop_scale=(0.05, 0.3))
    return _with_local((view, view), local, num_local)


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


def _local_size(size: int, published: int = 96, step: int = 16) -> int:
    return max(1, size * published // 224 // step) * step


def _with_local(
    global_views: tuple[View, ...], local: View, num_local: int
) -> ViewRecipe:
    if not is_whole(num_local) or num_local < 0:
        raise ValueError(f"num_local: got {num_local!r}, expected an integer >= 0")
    return ViewRecipe(global_views + (local,) * num_local)
