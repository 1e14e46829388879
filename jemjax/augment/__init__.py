"""Augmentations: random views of images, made on the device inside a jitted step.

They import jax only, and are pure functions of a key and a batch of images
(N, H, W, C), C = 1 or 3, floating point in [0, 1] or uint8, to float32. Shapes are
static, and each example draws from a key of its own, so that its view depends neither
on the rest of the batch nor on the number of devices.

One key is folded with the row that an example has in the array, which in `jit` is that
of the global batch. Inside `shard_map` it is that of the shard, and with one key all
shards draw the same: give the rows their keys there, as `make_views` says. On a mesh
of Explicit axes, which is set by `jax.set_mesh`, views lie as the images do.

Under `jax.transfer_guard("disallow")` call these inside `jit`: outside of it JAX sends
each number of a program, such as the 1 of `1 - x`, to the device by itself.

`random_*` and `color_jitter` draw for each example what the deterministic operations
apply; `make_views` applies a `ViewRecipe`. The arithmetic is torchvision's, or by name
SimCLR's or BYOL's.
"""

from jemjax.augment.blur import gaussian_blur, random_gaussian_blur
from jemjax.augment.color import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    color_jitter,
    denormalize,
    normalize,
    random_grayscale,
    random_solarize,
    solarize,
    to_grayscale,
)
from jemjax.augment.geometry import (
    crop_and_resize,
    random_boxes,
    random_flip,
    random_resized_crop,
)
from jemjax.augment.masking import (
    MaskRecipe,
    MultiBlockMasks,
    block_mask,
    fill_masked,
    make_masks,
    mask_of_noise,
    multi_block_masks,
    num_kept_patches,
    random_patch_mask,
)
from jemjax.augment.published import (
    byol_imagenet,
    byol_small,
    data2vec_imagenet,
    data2vec_small,
    dino_imagenet,
    dino_small,
    dinov2_imagenet,
    ijepa_imagenet,
    lejepa_imagenet,
    lejepa_small,
    mae_imagenet,
    moco_imagenet,
    moco_small,
    mocov3_imagenet,
    simclr_imagenet,
    simclr_small,
    swav_imagenet,
    swav_small,
    vicreg_imagenet,
    vicreg_small,
)
from jemjax.augment.recipes import (
    View,
    ViewRecipe,
    evaluation_view,
    finish_views,
    make_views,
)

__all__ = [
    "MaskRecipe",
    "MultiBlockMasks",
    "View",
    "ViewRecipe",
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "block_mask",
    "byol_imagenet",
    "byol_small",
    "color_jitter",
    "crop_and_resize",
    "data2vec_imagenet",
    "data2vec_small",
    "denormalize",
    "dino_imagenet",
    "dino_small",
    "dinov2_imagenet",
    "evaluation_view",
    "fill_masked",
    "finish_views",
    "gaussian_blur",
    "ijepa_imagenet",
    "lejepa_imagenet",
    "lejepa_small",
    "mae_imagenet",
    "make_masks",
    "make_views",
    "mask_of_noise",
    "moco_imagenet",
    "moco_small",
    "mocov3_imagenet",
    "multi_block_masks",
    "normalize",
    "num_kept_patches",
    "random_boxes",
    "random_flip",
    "random_gaussian_blur",
    "random_grayscale",
    "random_patch_mask",
    "random_resized_crop",
    "random_solarize",
    "simclr_imagenet",
    "simclr_small",
    "solarize",
    "swav_imagenet",
    "swav_small",
    "to_grayscale",
    "vicreg_imagenet",
    "vicreg_small",
]
