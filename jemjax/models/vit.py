"""Vision transformers, whole or on the patches that a mask leaves.

Dosovitskiy et al., 2021, An image is worth 16x16 words (arXiv:2010.11929), in the form
of Touvron et al., 2021, DeiT (arXiv:2012.12877), which DINO, MAE and data2vec share.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

# Two-pass statistics in float32, whatever the dtype of the activations.
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)
Init = Literal["truncated_normal", "lecun_normal"]
KERNEL_INITS: dict[str, nn.initializers.Initializer] = {
    "truncated_normal": nn.initializers.truncated_normal(0.02),
    "lecun_normal": nn.initializers.lecun_normal(),
}


class Block(nn.Module):
    """Attention, then two linear layers, each normalized first, beside a shortcut."""

    num_heads: int
    mlp_ratio: float
    drop_path: float
    layer_scale: float | None
    kernel_init: Init
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, uniforms: jax.Array | None) -> jax.Array:
        """(N, T, width), and in training two uniform numbers for each example."""
        width = x.shape[-1]
        linear = functools.partial(
            nn.Dense, kernel_init=KERNEL_INITS[self.kernel_init], dtype=self.dtype
        )
        norm = functools.partial(LayerNorm, dtype=self.dtype)
        y = linear(3 * width, name="qkv")(norm(name="attention_norm")(x))
        y = y.reshape(*x.shape[:2], 3, self.num_heads, width // self.num_heads)
        query, key, value = jnp.moveaxis(y, 2, 0)  # (N, T, heads, width / heads) each
        y = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        y = linear(width, name="attention_output")(y)
        attention, mlp = (None, None) if uniforms is None else uniforms.T  # (N,) each
        x = x + self._branch(y, attention, "attention_scale")
        y = linear(int(self.mlp_ratio * width), name="hidden")(norm(name="mlp_norm")(x))
        y = linear(width, name="mlp_output")(nn.gelu(y, approximate=False))
        return x + self._branch(y, mlp, "mlp_scale")

    def _branch(
        self, y: jax.Array, uniform: jax.Array | None, scale_name: str
    ) -> jax.Array:
        """What is added to the shortcut: scaled, and in some examples dropped."""
        if self.layer_scale is not None:
            init = nn.initializers.constant(self.layer_scale)
            y = y * self.param(scale_name, init, y.shape[-1:]).astype(self.dtype)
        if uniform is not None and self.drop_path > 0:
            kept = (uniform >= self.drop_path)[:, None, None]  # (N, 1, 1)
            y = jnp.where(kept, y / (1 - self.drop_path), 0)
        return y


class ViT(nn.Module):
    """A vision transformer with a class token, without its classifier.

    The names of parameters do not depend on how it is called: there is a mask token
    even if nothing is masked.

    Attributes:
        patch_size: height and width of a patch in pixels.
        image_size: height and width in pixels of the images to whose grid of patches
            the position embeddings belong; for other sizes they are interpolated.
        width: of the tokens.
        depth: number of blocks.
        num_heads: of the attention; divides the width.
        mlp_ratio: width of a block's hidden layer / width.
        drop_path: probability in [0, 1) that an example skips a branch of the last
            block; it falls linearly to 0 at the first. It acts only in training, and
            only where keys are given.
        layer_scale: where the factors of the branches begin; None: no such factors.
        pooling: which features are returned: "class", the class token, or "mean", that
            of the patch tokens.
        kernel_init: of the blocks' linear layers: "truncated_normal" with a standard
            deviation of 0.02, as published, or "lecun_normal". Published networks are
            wide; in one 96 wide, blocks of 0.02 add little, so that it begins as a
            mean of its patches.
        dtype: of the activations; parameters and statistics are float32.
    """

    patch_size: int
    image_size: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    pooling: Literal["class", "mean"] = "class"
    kernel_init: Init = "truncated_normal"
    dtype: Any = jnp.float32

    @property
    def num_features(self) -> int:
        """Width of the output."""
        return self.width

    def grid(self, image_size: int) -> int:
        """Patches in a row, and in a column, of images of this size."""
        return image_size // self.patch_size

    def setup(self) -> None:
        """The parameters, after their checks."""
        for name in ("patch_size", "width", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 1")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size: got {self.image_size}, expected a multiple of the patch"
                f" size, {self.patch_size}"
            )
        if self.width % self.num_heads:
            raise ValueError(
                f"width: got {self.width}, expected a multiple of the number of heads,"
                f" {self.num_heads}"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: got {self.drop_path}, expected 0 <= p < 1")
        if self.pooling not in ("class", "mean"):
            raise ValueError(
                f'pooling: got {self.pooling!r}, expected "class" or "mean"'
            )
        if self.kernel_init not in KERNEL_INITS:
            raise ValueError(
                f"kernel_init: got {self.kernel_init!r}, expected one of"
                f" {', '.join(KERNEL_INITS)}"
            )
        small = nn.initializers.truncated_normal(0.02)
        positions = 1 + (self.image_size // self.patch_size) ** 2
        self.class_token = self.param("class_token", small, (1, self.width))
        self.mask_token = self.param("mask_token", small, (1, self.width))
        self.position_embedding = self.param(
            "position_embedding", small, (positions, self.width)
        )
        self.patch_embedding = nn.Dense(self.width, dtype=self.dtype)
        self.blocks = [
            Block(
                num_heads=self.num_heads,
                mlp_ratio=self.mlp_ratio,
                drop_path=self.drop_path * index / max(1, self.depth - 1),
                layer_scale=self.layer_scale,
                kernel_init=self.kernel_init,
                dtype=self.dtype,
            )
            for index in range(self.depth)
        ]
        self.norm = LayerNorm()

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        num_kept: int | None = None,
        drop_keys: jax.Array | None = None,
    ) -> jax.Array:
        """The features of images, or of what a mask leaves of them.

        Args:
            images: (N, H, W, C) normalized images; H and W multiples of the patch size.
            train: whether branches are dropped.
            mask: (N, T) bool, True = masked, T = H / patch size * W / patch size,
                row by row. Masked patches are replaced by the mask token.
            num_kept: drop masked tokens instead, and keep this many of each example:
                the first that are not masked, and where they are too few, the first
                that are.
            drop_keys: (N,) keys, by which each example's branches are dropped.

        Returns:
            (N, width) float32 features.

        Raises:
            ValueError: for wrong shapes, dtypes, or numbers of tokens to keep.
        """
        x = self._embed(images, mask, num_kept)
        draws = self._draw(drop_keys, train)
        for block, uniforms in zip(self.blocks, draws, strict=True):
            x = block(x, uniforms)
        if self.pooling == "class":
            return self.norm(x[:, 0].astype(jnp.float32))  # (N, width)
        return jnp.mean(self.norm(x[:, 1:].astype(jnp.float32)), axis=1)

    def tokens(
        self,
        images: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        drop_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The tokens of the patches, behind the last normalization and behind blocks.

        Args:
            images: (N, H, W, C) normalized images; H and W multiples of the patch size.
            train: whether branches are dropped.
            mask: (N, T) bool, True = replaced by the mask token.
            drop_keys: (N,) keys, by which each example's branches are dropped.

        Returns:
            (N, T, width) float32, normalized, and (depth, N, T, width) float32, the
            output of each block with its shortcut, not normalized.

        Raises:
            ValueError: for wrong shapes or dtypes.
        """
        x = self._embed(images, mask, None)
        layers = []
        draws = self._draw(drop_keys, train)
        for block, uniforms in zip(self.blocks, draws, strict=True):
            x = block(x, uniforms)
            layers.append(x[:, 1:].astype(jnp.float32))  # (N, T, width)
        return self.norm(layers[-1]), jnp.stack(layers)

    def _draw(
        self, drop_keys: jax.Array | None, train: bool
    ) -> Sequence[jax.Array | None]:
        """Two uniform numbers in [0, 1) for each block and example: depth of (N, 2)."""
        if drop_keys is None or not train or self.drop_path == 0:
            return [None] * self.depth
        shape = (self.depth, 2)
        draw = jax.vmap(lambda key: jax.random.uniform(key, shape), out_axes=1)
        return list(draw(drop_keys))

    def _embed(
        self, images: jax.Array, mask: jax.Array | None, num_kept: int | None
    ) -> jax.Array:
        """(N, H, W, C) -> (N, 1 + T, width): class token, and patches at positions."""
        patches, grid = self._cut(images)  # (N, T, pixels)
        count, num_patches, _ = patches.shape
        self._check_mask(mask, num_kept, (count, num_patches))
        x = self.patch_embedding(patches)  # (N, T, width)
        if mask is not None and num_kept is None:
            x = jnp.where(mask[:, :, None], self.mask_token.astype(self.dtype), x)
        class_position, positions = self._positions(grid)
        x = x + positions.astype(self.dtype)
        if mask is not None and num_kept is not None:
            first = jnp.argsort(mask, axis=1, stable=True)[:, :num_kept]
            x = jnp.take_along_axis(x, first[:, :, None], axis=1)  # (N, kept, width)
        token = (self.class_token + class_position).astype(self.dtype)
        token = jnp.broadcast_to(token, (count, 1, self.width))
        return jnp.concatenate([token, x], axis=1)

    def _cut(self, images: jax.Array) -> tuple[jax.Array, tuple[int, int]]:
        """(N, H, W, C) -> (N, T, patch_size^2 C) pixels of each patch, and the grid."""
        if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images: got {images.dtype} of shape {images.shape}, expected floating"
                " point of shape (N, H, W, C)"
            )
        count, height, width, channels = images.shape
        size = self.patch_size
        if height % size or width % size:
            raise ValueError(
                f"images: got {height} x {width} pixels, expected multiples of the"
                f" patch size, {size}"
            )
        rows, columns = height // size, width // size
        x = images.astype(self.dtype).reshape(count, rows, size, columns, size, -1)
        x = x.swapaxes(2, 3)  # (N, rows, columns, size, size, C)
        return x.reshape(count, -1, size * size * channels), (rows, columns)

    def _positions(self, grid: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """Embeddings of the class token's position, (1, width), and of the patches'."""
        side = self.image_size // self.patch_size
        class_position, positions = jnp.split(self.position_embedding, [1])
        if grid != (side, side):
            positions = jax.image.resize(
                positions.reshape(side, side, self.width),
                (*grid, self.width),
                "bicubic",
                antialias=False,
            ).reshape(-1, self.width)  # (T, width)
        return class_position, positions

    def _check_mask(
        self, mask: jax.Array | None, num_kept: int | None, shape: tuple[int, int]
    ) -> None:
        if mask is not None and (mask.shape != shape or mask.dtype != jnp.bool_):
            raise ValueError(
                f"mask: got {mask.dtype} of shape {mask.shape}, expected bool of shape"
                f" {shape}, one for each patch"
            )
        if num_kept is None:
            return
        if mask is None:
            raise ValueError(f"num_kept: got {num_kept} without a mask, expected one")
        if not 1 <= num_kept <= shape[1]:
            raise ValueError(
                f"num_kept: got {num_kept}, expected 1 to {shape[1]}, of all patches"
            )


vit_tiny = functools.partial(ViT, width=192, depth=12, num_heads=3)
vit_small = functools.partial(ViT, width=384, depth=12, num_heads=6)
vit_base = functools.partial(ViT, width=768, depth=12, num_heads=12)
# Trains on two cores.
vit_narrow = functools.partial(
    ViT, width=96, depth=6, num_heads=3, kernel_init="lecun_normal"
)
