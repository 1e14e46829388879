"""Two SimCLR views of each image of a uint8 batch: ours, and peers'.

A random resized crop of 8 to 100 % of the image, bilinear; a flip; with probability 0.8
brightness, contrast and saturation by 0.4 and hue by 0.1; gray with probability 0.2;
at 224 pixels a blur with probability 0.5; normalized. Where a peer has no such
operation, its nearest is taken, and said here.
"""

import itertools
import math
import os

from harness import JEMJAX, Contender, Workload

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_SCALE = (0.08, 1.0)


def photos(batch_size, size):
    """(N, size, size, 3) uint8: smooth, so that no operation has nothing to do."""
    import numpy as np

    generator = np.random.default_rng(0)
    coarse = generator.uniform(0, 255, (batch_size, 8, 8, 3))
    rows = np.linspace(0, 7, size)
    low = np.minimum(rows.astype(int), 6)
    mix = rows - low
    for axis in (1, 2):
        shape = [1, 1, 1, 1]
        shape[axis] = size
        weight = mix.reshape(shape)
        coarse = (1 - weight) * coarse.take(low, axis) + weight * coarse.take(
            low + 1, axis
        )
    return coarse.astype(np.uint8)


def of_steps(make, images):
    """A call that makes the views of the next step: make(key, images), compiled.

    The key is made of the step's number inside the program, as a training step does it.
    """
    import jax

    images = jax.device_put(images)
    key = jax.random.key(0)
    steps = itertools.count()
    compiled = jax.jit(lambda step, images: make(jax.random.fold_in(key, step), images))
    return lambda: compiled(next(steps), images)


def made_by_recipe(recipe, images):
    """Ours."""
    from jemjax.augment import make_views

    return of_steps(lambda key, images: make_views(key, images, recipe), images)


def jemjax(color, batch_size, size, blur):
    """The recipe of all contenders, with color changes in one of the two forms."""
    from jemjax import augment

    view = augment.View(
        size=size,
        crop_scale=CROP_SCALE,
        interpolation="bilinear",
        saturation=0.4,
        blur_probability=0.5 if blur else 0.0,
        color=color,
    )
    return made_by_recipe(augment.ViewRecipe((view, view)), photos(batch_size, size))


def jemjax_fused(**sizes):
    """Color changes as one matrix an image."""
    return jemjax("fused", **sizes)


def jemjax_faithful(**sizes):
    """Color changes one by one, as published."""
    return jemjax("faithful", **sizes)


class Repeated:
    """So many Pillow images with a transform, as a data set of torch."""

    def __init__(self, images, transform, batches):
        from PIL import Image

        self.images = [Image.fromarray(image) for image in images]
        self.transform, self.batches = transform, batches

    def __len__(self):
        return self.batches * len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index % len(self.images)])


def loader(transform, batch_size, size, batches):
    """All batches of a pass of a DataLoader, its workers kept, and idle between."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        Repeated(photos(batch_size, size), transform, batches),
        batch_size=batch_size,
        num_workers=os.cpu_count() or 1,
        persistent_workers=True,
    )
    return lambda: list(loader)


def lightly(batch_size, size, blur, batches):
    """Lightly's transform of Pillow images, in loader workers."""
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(
        input_size=size, cj_strength=0.5, gaussian_blur=0.5 if blur else 0.0
    )
    return loader(transform, batch_size, size, batches)


def torchvision(batch_size, size, blur, batches):
    """Torchvision's second version, on uint8 tensors, in loader workers."""
    import torch
    from torchvision.transforms import v2

    one = v2.Compose(
        [
            v2.RandomResizedCrop(size, CROP_SCALE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            *([v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], 0.5)] if blur else []),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def two(image):
        image = v2.functional.pil_to_tensor(image)
        return one(image), one(image)

    return loader(two, batch_size, size, batches)


def kornia(batch_size, size, blur):
    """On the batch as a float tensor, with all cores."""
    import torch
    from kornia import augmentation

    torch.set_num_threads(os.cpu_count() or 1)
    transform = torch.nn.Sequential(
        augmentation.RandomResizedCrop((size, size), CROP_SCALE),
        augmentation.RandomHorizontalFlip(),
        augmentation.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        augmentation.RandomGrayscale(p=0.2),
        *(
            [augmentation.RandomGaussianBlur((23, 23), (0.1, 2.0), p=0.5)]
            if blur
            else []
        ),
        augmentation.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )
    images = torch.from_numpy(photos(batch_size, size)).permute(0, 3, 1, 2).contiguous()

    @torch.inference_mode()
    def make():
        floats = images.float() / 255
        return transform(floats), transform(floats)

    return make


def dm_pix(batch_size, size, blur):
    """Each operation for one image, over the batch by vmap; jax.image does the crop."""
    import dm_pix as pix
    import jax
    import jax.numpy as jnp

    def crop(key, image):
        for_area, for_aspect, for_place = jax.random.split(key, 3)
        area = jax.random.uniform(for_area, (), minval=CROP_SCALE[0]) * size**2
        limit = math.log(4 / 3)
        aspect = jnp.exp(
            jax.random.uniform(for_aspect, (), minval=-limit, maxval=limit)
        )
        extent = jnp.sqrt(area * jnp.exp(jnp.stack([-aspect, aspect])))
        extent = jnp.minimum(extent, size)
        start = jax.random.uniform(for_place, (2,)) * (size - extent)
        scale = size / extent
        return jax.image.scale_and_translate(
            image, (size, size, 3), (0, 1), scale, -start * scale, "linear"
        )

    def view(key, image):
        image = image.astype(jnp.float32) / 255
        keys = jax.random.split(key, 10)

        def chance(number, probability, changed, image):
            return jnp.where(
                jax.random.bernoulli(keys[number], probability), changed, image
            )

        image = crop(keys[0], image)
        image = pix.random_flip_left_right(keys[1], image)
        changed = pix.random_brightness(keys[2], image, 0.4)
        changed = pix.random_contrast(keys[3], changed, 0.6, 1.4)
        changed = pix.random_saturation(keys[4], changed, 0.6, 1.4)
        changed = jnp.clip(pix.random_hue(keys[5], changed, 0.1), 0, 1)
        image = chance(6, 0.8, changed, image)
        gray = jnp.broadcast_to(
            pix.rgb_to_grayscale(image, keep_dims=True), image.shape
        )
        image = chance(7, 0.2, gray, image)
        if blur:
            sigma = jax.random.uniform(keys[8], (), minval=0.1, maxval=2.0)
            image = chance(9, 0.5, pix.gaussian_blur(image, sigma, 23), image)
        return (image - jnp.array(MEAN)) / jnp.array(STD)

    return mapped(view, photos(batch_size, size))


def augmax(batch_size, size, blur):
    """A chain for one image over the batch by vmap: square crops, a 4 x 4 blur."""
    import augmax

    chain = augmax.Chain(
        augmax.ByteToFloat(),
        augmax.RandomSizedCrop(size, size, zoom_range=(1.0, CROP_SCALE[0] ** -0.5)),
        augmax.HorizontalFlip(),
        augmax.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        augmax.RandomGrayscale(p=0.2),
        *([augmax.GaussianBlur(2, p=0.5)] if blur else []),
        augmax.Normalize(),
    )
    return mapped(chain, photos(batch_size, size))


def mapped(view, images):
    """Two views of each image, by a function of a key and an image."""
    import jax

    def make(key, images):
        keys = jax.random.split(key, (2, len(images)))
        return jax.vmap(jax.vmap(view), (0, None))(keys, images)

    return of_steps(make, images)


OURS = ("jemjax fused", "jemjax faithful")


def workload(size, batch_size, blur, batches, targets):
    """The views of one size of images; `targets` of the fused form, by peer."""

    def peer(setup, *packages, **options):
        name = setup.__name__
        aims = {OURS[1]: 1.0}
        if name in targets:
            aims[OURS[0]] = targets[name]
        return Contender(name, setup, packages, targets=aims, **options)

    return Workload(
        name=f"views/{size}",
        title=(
            f"Two SimCLR views of each of {batch_size} uint8 images of {size} x {size}"
            f" in memory{', blurred with probability 0.5' if blur else ''}. Images/s"
            " counts images, of which two views each are made. lightly and torchvision"
            " work on Pillow images in a worker for each core, the others on the batch."
        ),
        contenders=(
            Contender(OURS[0], jemjax_fused, JEMJAX, peer=False),
            Contender(OURS[1], jemjax_faithful, JEMJAX, peer=False),
            peer(kornia, "kornia", "torch"),
            peer(lightly, "lightly", "torch", "torchvision", batches=batches),
            peer(torchvision, "torchvision", "torch", batches=batches),
            peer(dm_pix, "dm-pix", "jax", "jaxlib"),
            peer(augmax, "augmax", "jax", "jaxlib"),
        ),
        baselines=OURS,
        sizes={"batch_size": batch_size, "size": size, "blur": blur},
        items=batch_size,
    )


WORKLOADS = (
    workload(
        32,
        256,
        False,
        4,
        {"kornia": 15, "lightly": 50, "dm_pix": 4, "augmax": 9},
    ),
    workload(
        224,
        32,
        True,
        4,
        {"kornia": 6, "lightly": 4, "dm_pix": 15, "augmax": 8},
    ),
)
