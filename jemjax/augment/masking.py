"""Which patches of an image are hidden: scattered ones, blocks, or what is predicted.

A mask is bool (N, T), True = masked, over the T patches of a grid, row by row. Each
example draws from a key of its own, and every loop has a fixed length.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.core import Tracer

from jemjax.augment.inputs import (
    Array,
    Number,
    Range,
    Scalar,
    Size,
    Whole,
    check_number,
    check_range,
    check_size,
    example_keys,
    is_whole,
    rows_as,
    uniforms,
)

# Blocks that are tried for a mask, and how many in a row that do not fit end it.
TRIES = 64
TRIES_IN_VAIN = 10


@dataclasses.dataclass(frozen=True)
class MaskRecipe:
    """How the patches of an image are masked."""

    kind: Literal["random", "block", "drop"]
    """random: scattered patches; block: rectangles, BEiT's and data2vec's; drop:
    scattered ones, which a transformer leaves out, MAE's"""
    ratio: float | tuple[float, float] = 0.6
    """share of the patches that are masked, in [0, 1]; of blocks, at most, and drawn by
    each example between the two of a pair, as in iBOT"""
    min_block: int | None = None
    """smallest number of patches of a block; None: the published 16 of 14 x 14 patches,
    as a share of the grid: 5 of 8 x 8, 1 of 4 x 4"""

    def __post_init__(self) -> None:
        """Refuses what no grid could be masked by."""
        if self.kind not in ("random", "block", "drop"):
            raise ValueError(
                f'kind: got {self.kind!r}, expected "random", "block" or "drop"'
            )
        if not isinstance(self.ratio, tuple):
            check_number("ratio", self.ratio, 0, 1)
        elif self.kind == "block":
            check_range("ratio", self.ratio, high=1.0)
        else:
            raise ValueError(
                f"ratio: got {self.ratio}, expected one number for masks without blocks"
            )
        if self.min_block is not None:
            if self.kind != "block":
                raise ValueError(
                    f"min_block: got {self.min_block}, expected None for masks without"
                    " blocks"
                )
            _check_count("min_block", self.min_block, 1)

    def __str__(self) -> str:
        """What the line of a recipe's table says."""
        how = {"random": "scattered", "block": "in blocks", "drop": "left out"}
        ratio = self.ratio if isinstance(self.ratio, tuple) else (self.ratio,)
        share = " to ".join(f"{end:.0%}" for end in ratio)
        return f"{share} of the patches, {how[self.kind]}"


def make_masks(
    key: Array, batch_size: Whole, grid: Size, recipe: MaskRecipe
) -> jax.Array:
    """The masks of a batch.

    Args:
        key: one key, folded with each row's index, or `batch_size` keys; inside
            `shard_map` give keys, as in `make_views`.
        batch_size: N.
        grid: rows and columns of patches.
        recipe: what to do.

    Returns:
        (N, rows * columns) bool, True = masked.

    Raises:
        ValueError: for wrong arguments.
    """
    rows, columns = check_size("grid", grid)
    patches = rows * columns
    ratio = recipe.ratio
    if recipe.kind != "block":
        assert not isinstance(ratio, tuple)
        return random_patch_mask(key, batch_size, patches, ratio=ratio)
    min_block = recipe.min_block
    if min_block is None:
        min_block = max(1, round(patches * 16 / 14**2))
    if isinstance(ratio, tuple):
        keys = example_keys(key, batch_size)
        key, for_ratio = jax.vmap(jax.random.split, out_axes=1)(keys)  # (N,) each
        (uniform,) = uniforms(for_ratio, 1)
        num_masked = patches * (ratio[0] + (ratio[1] - ratio[0]) * uniform)  # (N,)
    else:
        num_masked = round(ratio * patches)
    return block_mask(key, batch_size, grid, num_masked=num_masked, min_block=min_block)


def random_patch_mask(
    key: Array, batch_size: Whole, num_patches: Whole, *, ratio: Number | Array
) -> jax.Array:
    """Masks patches at random, the same number in every example.

    Args:
        key: one key, folded with each row's index, or `batch_size` keys; inside
            `shard_map` give keys, as in `make_views`.
        batch_size: N.
        num_patches: T.
        ratio: share of the patches that are masked, in [0, 1]; see `num_kept_patches`.

    Returns:
        (N, T) bool, True = masked.

    Raises:
        ValueError: for wrong arguments.

    References:
        He et al., 2022, Masked autoencoders (arXiv:2111.06377).
    """
    _check_batch_size(batch_size)
    _check_count("num_patches", num_patches, 1)
    draw = jax.vmap(
        lambda key: jax.random.uniform(key, (int(num_patches),), jnp.float32)
    )
    return mask_of_noise(draw(example_keys(key, batch_size)), ratio)


def mask_of_noise(noise: Array, ratio: Number | Array) -> jax.Array:
    """Keeps the patches of least noise: (N, T) numbers -> (N, T) bool, True = masked.

    Args:
        noise: (N, T).
        ratio: share of the patches that are masked, in [0, 1], known at trace time.

    Returns:
        (N, T) bool, with `num_kept_patches(T, ratio)` False in each row.

    Raises:
        ValueError: for another rank, or a ratio out of range.
    """
    if noise.ndim != 2:
        raise ValueError(f"noise: got shape {noise.shape}, expected (N, T)")
    ranks = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    return ranks >= num_kept_patches(noise.shape[1], ratio)


def num_kept_patches(num_patches: Whole, ratio: Number | Array) -> int:
    """How many patches a random mask leaves: floor(num_patches (1 - ratio)).

    Args:
        num_patches: T >= 1.
        ratio: share of the patches that are masked, in [0, 1], known at trace
            time.

    Returns:
        0 to T.

    Raises:
        ValueError: for arguments out of range.
    """
    _check_count("num_patches", num_patches, 1)
    if isinstance(ratio, Tracer):
        raise ValueError(f"ratio: got {ratio}, expected a number: it fixes a shape")
    if getattr(ratio, "shape", None) == ():
        ratio = float(ratio)
    ratio = check_number("ratio", ratio, 0, 1)
    # In floating point, 10 * (1 - 0.9) falls just short of 1.
    return math.floor(num_patches * (1 - ratio) + 1e-6)


def block_mask(
    key: Array,
    batch_size: Whole,
    grid: Size,
    *,
    num_masked: Scalar,
    min_block: Whole = 16,
    max_block: Whole | None = None,
    aspect: Range = (0.3, 1 / 0.3),
) -> jax.Array:
    """Masks rectangles, which may overlap, up to a number of patches.

    Blocks are tried one after the other: area uniform between `min_block` and what is
    left to mask, height / width log-uniform, position uniform. A block is taken if it
    masks something new, but no more than is left. It ends when nothing is left, when
    ten in a row are not taken, and in any case after 64: `num_masked` is not always
    reached, and never exceeded. A block is less high and less wide than the grid.

    Args:
        key: one key, folded with each row's index, or `batch_size` keys; inside
            `shard_map` give keys, as in `make_views`.
        batch_size: N.
        grid: rows and columns of patches.
        num_masked: patches to mask in each example, 0 to rows * columns; or (N,), for
            each example its own, whole numbers or not.
        min_block: smallest number of patches of a block, >= 1, before its sides are
            rounded. Where less than this is left, it is the largest.
        max_block: largest number of patches of a block, and of new ones it masks; None:
            what is left.
        aspect: smallest and largest height / width.

    Returns:
        (N, rows * columns) bool, True = masked.

    Raises:
        ValueError: for wrong arguments.

    References:
        Bao et al., 2022, BEiT (arXiv:2106.08254), algorithm 1, as in its code; Baevski
        et al., 2022, data2vec (arXiv:2202.03555): 120 of 14 x 14 patches; Zhou et al.,
        2022, iBOT (arXiv:2111.07832): 10 % to 50 % of them, drawn for each example.
    """
    _check_batch_size(batch_size)
    rows, columns = check_size("grid", grid)
    if getattr(num_masked, "shape", None) != (batch_size,):
        _check_count("num_masked", num_masked, 0, rows * columns)
    _check_count("min_block", min_block, 1)
    if max_block is not None:
        _check_count("max_block", max_block, min_block)
    low, high = (math.log(side) for side in check_range("aspect", aspect))

    def mask_one(key: jax.Array, num_masked: jax.Array) -> jax.Array:
        def attempt(carry, uniform):
            mask, in_vain = carry
            left = num_masked - jnp.sum(mask, dtype=jnp.float32)
            if max_block is not None:
                left = jnp.minimum(left, max_block)
            area = min_block + (left - min_block) * uniform[0]
            root = jnp.exp(0.5 * (low + (high - low) * uniform[1]))
            height = jnp.round(jnp.sqrt(area) * root)
            width = jnp.round(jnp.sqrt(area) / root)
            top = jnp.floor(uniform[2] * (rows - height + 1))
            first = jnp.floor(uniform[3] * (columns - width + 1))
            block = _block((top, first), (height, width), (rows, columns))
            new = jnp.sum(block & ~mask, dtype=jnp.float32)
            fits = (height < rows) & (width < columns) & (0 < new) & (new <= left)
            taken = fits & (in_vain < TRIES_IN_VAIN)
            in_vain = jnp.where(taken, 0, in_vain + 1)
            return (mask | (block & taken), in_vain), None

        uniforms = jax.random.uniform(key, (TRIES, 4), jnp.float32)
        # Zeros of what varies between the examples, as a scan's carry has to from the
        # start, inside `shard_map` and on an Explicit mesh.
        none = jnp.zeros_like(uniforms[0, 0] + num_masked, jnp.int32)
        start = (jnp.full((rows, columns), none, bool), none)
        (mask, _), _ = lax.scan(attempt, start, uniforms)
        return mask.reshape(-1)

    numbers = jnp.broadcast_to(jnp.asarray(num_masked, jnp.float32), (batch_size,))
    keys = example_keys(key, batch_size)
    return jax.vmap(mask_one)(keys, rows_as(keys, numbers))


class MultiBlockMasks(NamedTuple):
    """What of each image is hidden, and which blocks of that are to be predicted."""

    hidden: jax.Array
    """(N, T) bool, True = masked: all but the context"""
    targets: jax.Array
    """(N, B, T) bool, True = in the block; what is in a block is hidden"""


def multi_block_masks(
    key: Array,
    batch_size: Whole,
    grid: Size,
    *,
    num_targets: Whole = 4,
    target_scale: Range = (0.15, 0.2),
    target_aspect: Range = (0.75, 1.5),
    context_scale: Range = (0.85, 1.0),
) -> MultiBlockMasks:
    """I-JEPA's masks: from a large block without some smaller ones, predict those.

    context = context block without the targets. The targets of an example are of one
    size, each at a place of its own, and may overlap; sizes are those of `block_size`,
    places are uniform. As in the official code, no block reaches the last row or the
    last column.

    The official code draws one size for all images of a batch, and cuts all contexts
    to the length of the batch's shortest, by their last patches. Here each example
    draws its own sizes and keeps its whole context, since its masks must follow from
    its key, whatever its batch and the devices are. But for that cut, the masks of an
    example are distributed alike. To compute a fixed number of patches of each context,
    take the first of `jnp.argsort(hidden, stable=True)`.

    Args:
        key: one key, folded with each row's index, or `batch_size` keys; inside
            `shard_map` give keys, as in `make_views`.
        batch_size: N.
        grid: rows and columns of patches, each >= 2.
        num_targets: B, the number of blocks that are predicted, >= 1.
        target_scale: smallest and largest area of a target as a share of the grid, in
            (0, 1].
        target_aspect: smallest and largest height / width of a target.
        context_scale: as of targets, of the square block of the context. Targets may
            cover all of it, but for the published numbers of 14 x 14 or 16 x 16.

    Returns:
        `MultiBlockMasks`.

    Raises:
        ValueError: for wrong arguments.

    References:
        Assran et al., 2023, I-JEPA (arXiv:2301.08243).
    """
    _check_batch_size(batch_size)
    _check_count("num_targets", num_targets, 1)
    rows, columns = check_size("grid", grid)
    if min(rows, columns) < 2:
        raise ValueError(f"grid: got {grid}, expected at least 2 rows and columns")
    target_scale = check_range("target_scale", target_scale, high=1.0)
    target_aspect = check_range("target_aspect", target_aspect)
    context_scale = check_range("context_scale", context_scale, high=1.0)

    def mask_one(uniform: jax.Array) -> MultiBlockMasks:
        def block(size, place):
            height, width = size
            top = jnp.floor(place[0] * (rows - height))
            first = jnp.floor(place[1] * (columns - width))
            return _block((top, first), size, (rows, columns)).reshape(-1)

        sizes, places = uniform[:2], uniform[2:].reshape(-1, 2)
        size = block_size(sizes[0], (rows, columns), target_scale, target_aspect)
        targets = jax.vmap(lambda place: block(size, place))(places[1:])  # (B, T)
        size = block_size(sizes[1], (rows, columns), context_scale, (1.0, 1.0))
        context = block(size, places[0])  # (T,)
        return MultiBlockMasks(~context | jnp.any(targets, axis=0), targets)

    numbers = uniforms(example_keys(key, batch_size), 2 + 2 * (1 + num_targets))
    return jax.vmap(mask_one, in_axes=1)(numbers)


def block_size(
    uniform: jax.Array,
    grid: tuple[int, int],
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[jax.Array, jax.Array]:
    """Height and width of I-JEPA's blocks: one draw sets both area and shape.

    area = floor(rows columns scale(u)), height = round(sqrt(area aspect(u))),
    width = round(sqrt(area / aspect(u))), scale and aspect linear in u; at least 1, and
    less than the grid's.

    Args:
        uniform: u, in [0, 1), of any shape.
        grid: rows and columns of patches, each >= 2.
        scale: the area's share of the grid at u = 0 and u = 1.
        aspect: height / width at u = 0 and u = 1.

    Returns:
        Two float32 arrays of whole numbers, of the shape of u.
    """
    rows, columns = grid
    uniform = jnp.asarray(uniform, jnp.float32)
    area = jnp.floor(rows * columns * (scale[0] + (scale[1] - scale[0]) * uniform))
    ratio = aspect[0] + (aspect[1] - aspect[0]) * uniform
    height = jnp.round(jnp.sqrt(area * ratio))
    width = jnp.round(jnp.sqrt(area / ratio))
    return jnp.clip(height, 1, rows - 1), jnp.clip(width, 1, columns - 1)


def fill_masked(images: Array, mask: Array, grid: Size) -> jax.Array:
    """Hides masked patches behind the mean color of what is left of each image.

    For networks that see pixels, not patches.

    Args:
        images: (N, H, W, C); H and W multiples of the grid's.
        mask: (N, T) bool, True = masked; where all is masked, the color is 0.
        grid: rows and columns of patches, T = rows * columns.

    Returns:
        (N, H, W, C), of the dtype of the images.

    Raises:
        ValueError: for wrong shapes or dtypes.
    """
    rows, columns = check_size("grid", grid)
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images: got {images.dtype} of shape {images.shape}, expected floating"
            " point of shape (N, H, W, C)"
        )
    count, height, width, _ = images.shape
    if height % rows or width % columns:
        raise ValueError(
            f"images: got {height} x {width} pixels, expected multiples of the grid,"
            f" {rows} x {columns}"
        )
    if mask.shape != (count, rows * columns) or mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask: got {mask.dtype} of shape {mask.shape}, expected bool of shape"
            f" {(count, rows * columns)}, one for each patch"
        )
    mask = mask.reshape(count, rows, columns, 1)
    mask = mask.repeat(height // rows, axis=1).repeat(width // columns, axis=2)
    left = jnp.sum(~mask, axis=(1, 2), keepdims=True)  # (N, 1, 1, 1)
    total = jnp.sum(jnp.where(mask, 0, images), axis=(1, 2), keepdims=True)
    mean = total / jnp.maximum(left, 1).astype(images.dtype)  # (N, 1, 1, C)
    return jnp.where(mask, mean, images)  # (N, H, W, C)


def _block(
    start: tuple[jax.Array, jax.Array],
    extent: tuple[jax.Array, jax.Array],
    grid: tuple[int, int],
) -> jax.Array:
    """A rectangle of a grid: (rows, columns) bool."""
    rows, columns = map(_span, start, extent, grid)
    return rows[:, None] & columns[None, :]


def _span(start: jax.Array, extent: jax.Array, size: int) -> jax.Array:
    """Which of `size` numbers are in [start, start + extent): (size,) bool."""
    numbers = jnp.arange(size, dtype=jnp.float32)
    return (start <= numbers) & (numbers < start + extent)


def _check_batch_size(value: Any) -> None:
    if not export.is_symbolic_dim(value):  # which `jax.export` leaves open
        _check_count("batch_size", value, 1)


def _check_count(name: str, value: Any, low: Whole, high: Whole | None = None) -> None:
    if not is_whole(value) or value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: got {value!r}, expected an integer, {limit}")
