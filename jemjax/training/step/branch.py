"""The two branches of a method: what each sees, and what it makes of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jemjax.augment import ViewRecipe, finish_views, make_views
from jemjax.augment.masking import make_masks, num_kept_patches
from jemjax.methods import Method
from jemjax.models import Outputs

# One array of images, or for each view an array of crops that the loader made.
Images = jax.Array | tuple[jax.Array, ...]


class Statistics(NamedTuple):
    """The running statistics of BatchNorm, of both branches."""

    online: Any
    target: Any


class Branches:
    """The two branches of a method: which views each sees, and with which weights.

    They are one and the same where weights are shared with gradients, there is no
    predictor, and nothing is masked. A moving average has a forward pass of its own;
    so has a masked run, in which the target sees the views whole.
    """

    def __init__(self, method: Method, network: nn.Module, recipe: ViewRecipe):
        self.method, self.recipe = method, recipe
        self.network: Any = network
        count = len(recipe.views)
        self.online_views = method.online_views or tuple(range(count))
        self.target_views = method.target_views or tuple(range(recipe.num_global))
        self.separate = method.target == "momentum" or recipe.mask is not None
        self.are_one = (
            not self.separate
            and method.target == "shared"
            and getattr(network, "predictor", None) is None
            and self.online_views == self.target_views
        )

    def see(
        self, keys: jax.Array, images: Images
    ) -> tuple[
        tuple[jax.Array, ...], dict[int, tuple[jax.Array, int | None]], jax.Array
    ]:
        """What a step makes of images: views, masks, and keys to drop paths by.

        Args:
            keys: (N,), of `keys_of_step`.
            images: (N, H, W, C) uint8, or for each view (N, size, size, C) crops.
        """
        view_keys, mask_keys, drop_keys = jax.vmap(
            lambda key: jax.random.split(key, 3), out_axes=1
        )(keys)
        if isinstance(images, tuple):
            views = finish_views(view_keys, images, self.recipe)
        else:
            views = make_views(view_keys, images, self.recipe)
        return views, self.masks(mask_keys), drop_keys

    def masks(self, keys: jax.Array) -> dict[int, tuple[jax.Array, int | None]]:
        """For each online view its mask, and how many patches are left."""
        if self.recipe.mask is None:
            return {}
        masks = {}
        for number in self.online_views:
            side = self.network.backbone.grid(self.recipe.views[number].size)
            mask = make_masks(_fold_in(keys, number), len(keys), side, self.recipe.mask)
            num_kept, ratio = None, self.recipe.mask.ratio
            if self.recipe.mask.kind == "drop":
                assert not isinstance(ratio, tuple)
                num_kept = num_kept_patches(side * side, ratio)
            masks[number] = mask, num_kept
        return masks

    def embed(
        self,
        params: Any,
        target_params: Any,
        statistics: Statistics,
        views: Sequence[jax.Array],
        masks: dict[int, tuple[jax.Array, int | None]],
        drop_keys: jax.Array,
    ) -> tuple[Statistics, tuple[tuple[Outputs, ...], tuple[Outputs, ...]]]:
        """The statistics after these views, and what each branch makes of its own.

        Args:
            params: of the online branch.
            target_params: of a moving average.
            statistics: before these views.
            views: (N, size, size, C) each.
            masks: of the online branch's views.
            drop_keys: (N,), by which the online branch drops paths.
        """
        variables = {"params": params, "batch_stats": statistics.online}
        seen = self.online_views
        if not self.separate:  # one forward pass, of whatever either branch needs
            seen = tuple(sorted({*self.online_views, *self.target_views}))
        outputs, batch_stats = self._forward(
            variables, views, seen, masks, drop_keys=drop_keys
        )
        online = tuple(outputs[number] for number in self.online_views)
        if not self.separate:
            target = tuple(outputs[number] for number in self.target_views)
            return Statistics(batch_stats, statistics.target), (online, target)
        momentum = self.method.target == "momentum"
        if momentum:
            variables = {"params": target_params, "batch_stats": statistics.target}
        else:
            variables = {"params": params, "batch_stats": batch_stats}
        outputs, updated = self._forward(
            variables, views, self.target_views, {}, predict=False
        )
        if momentum:
            statistics = Statistics(batch_stats, updated)
        else:
            statistics = Statistics({**batch_stats, **updated}, statistics.target)
        target = tuple(outputs[number] for number in self.target_views)
        return statistics, (online, target)

    def _forward(
        self, variables, views, numbers, masks, *, predict=True, drop_keys=None
    ):
        """Outputs by the view's number, and the batch statistics after all of them."""

        def apply(*arguments, **keywords):
            nonlocal variables
            made, updates = self.network.apply(
                variables, *arguments, train=True, mutable=["batch_stats"], **keywords
            )
            updated = updates.get("batch_stats", {})
            batch_stats = {
                name: updated.get(name, old)
                for name, old in variables["batch_stats"].items()
            }
            variables = {**variables, "batch_stats": batch_stats}
            return made

        def view(group, **keywords):
            # Side by side for each example, so that no example changes its device.
            images = _interleave([views[number] for number in group])
            if masks:
                keywords["mask"] = _interleave([masks[number][0] for number in group])
                keywords["num_kept"] = masks[group[0]][1]
            if drop_keys is not None:
                of_views = [_fold_in(drop_keys, number) for number in group]
                keywords["drop_keys"] = _interleave(of_views)
            return apply(images, **keywords)

        outputs: dict[int, Outputs] = {}
        if not self.method.views_together:  # each with its own batch statistics
            for number in numbers:
                outputs[number] = view([number], predict=predict)
            return outputs, variables["batch_stats"]
        # Views of one size pass the backbone as one batch, and all of them the heads.
        groups: dict[int, list[int]] = {}
        for number in numbers:
            groups.setdefault(self.recipe.views[number].size, []).append(number)
        features: dict[int, jax.Array] = {}
        for group in groups.values():
            features |= _apart(group, view(group, method="embed"))
        together = _interleave([features[number] for number in numbers])
        made = apply(together, predict=predict, method="heads")
        return _apart(numbers, made), variables["batch_stats"]


def _fold_in(keys: jax.Array, number: int) -> jax.Array:
    """(N,) keys -> (N,) keys."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _interleave(arrays: list[jax.Array]) -> jax.Array:
    """V arrays (N, ...) -> (N V, ...), the views of an example side by side."""
    if len(arrays) == 1:
        return arrays[0]
    stacked = jnp.stack(arrays, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def _apart(numbers: Sequence[int], interleaved: Any) -> dict[int, Any]:
    """The views of interleaved arrays, by number: (N V, ...) -> V of (N, ...)."""
    count = len(numbers)
    return {
        number: jax.tree.map(
            lambda x, place=place: x.reshape(-1, count, *x.shape[1:])[:, place],
            interleaved,
        )
        for place, number in enumerate(numbers)
    }
