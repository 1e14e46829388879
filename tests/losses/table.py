"""The losses, as the contract and the device contexts see them."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jemjax import losses


class Loss(NamedTuple):
    """A loss of arrays that are all (N, D), and what it promises.

    Attributes:
        function: of one or two arrays (N, D), and `axis_name`.
        arguments: the names of its arrays.
        constants: how many of the last arrays have no gradient.
        collapsed: the value for one same row (..., c, c, c), c != 0, in N rows of D.
        collapsed_at_zero: the value for zeros, where it is another.
        blind: whether that is no more than the value of embeddings that are spread.
        wide: whether batches of fewer rows than columns take another route.
        sized: whether the value at collapse depends on the number of rows.
        ordered: whether the rows play different parts.
        normalizing: whether it is finite up to 1e20; the others are up to 1e8.
        symmetric: whether the two arrays may be swapped.
        translated: whether one shift of all the entries does not matter.
        scaled: whether a factor for each row does not matter.
        own_constants: whether it makes constants of parts of an array that also has a
            gradient, which is then not the derivative of the value.
        of_each: whether it is a mean of what single examples have.
        direct: whether `function` is the loss itself, and so refuses what it refuses.
    """

    function: Callable[..., jax.Array]
    arguments: tuple[str, ...]
    constants: int = 0
    collapsed: Callable[[int, int], float] | None = None
    collapsed_at_zero: float | None = None
    blind: bool = False
    wide: bool = False
    sized: bool = False
    ordered: bool = False
    normalizing: bool = False
    symmetric: bool = False
    translated: bool = False
    scaled: bool = False
    own_constants: bool = False
    of_each: bool = False
    direct: bool = True

    @property
    def count(self) -> int:
        """The number of arrays."""
        return len(self.arguments)

    @property
    def varied(self) -> int:
        """The number of arrays that have a gradient."""
        return self.count - self.constants

    def contract(self, shape: tuple[int, int]) -> dict[str, Any]:
        """The arguments of `assert_loss_contract`, for arrays of that shape."""
        return {
            "shapes": [shape] * self.count,
            "constants": range(self.varied, self.count),
            "collapsed": self.collapsed(*shape) if self.blind else None,
            "permutation": not self.ordered,
            "numerical_gradients": not self.own_constants,
            "largest": 1e20 if self.normalizing else 1e8,
        }


def _views(x, count):
    """(N, D) -> (count, N, D): views that differ by factors exact in any dtype."""
    return jnp.stack([x * 0.5**view for view in range(count)])


def _dino(x, y, *, student_views, **keywords):
    center = jnp.linspace(-0.5, 0.5, x.shape[1])
    return losses.dino(_views(x, student_views), _views(y, 2), center, **keywords)


def _swav(x, y, **keywords):
    return losses.swav(jnp.stack([x, y]), **keywords)


def _smooth_l1(x, y, *, masked=False, **keywords):
    """Of tokens (N, 2, D)."""
    if masked:
        # A shard has its rows of the mask, and so its own number of masked tokens.
        rows = x.shape[0]
        axis_name = keywords.get("axis_name")
        first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * rows
        row = first + jnp.arange(rows)
        keywords["mask"] = jnp.stack([row % 3 == 0, row < 5], axis=1)
    tokens = [jnp.stack([array, 0.5 * array], axis=1) for array in (x, y)]
    return losses.smooth_l1(*tokens, **keywords)


def _queue(features):
    rows = np.random.default_rng(7).standard_normal((9, features)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _queued(x, y, **keywords):
    return losses.info_nce(x, y, _queue(x.shape[1]), **keywords)


X, XY = ("h",), ("x", "y")
DISTILLED = ("student_logits", "teacher_logits")
REGRESSED = ("prediction", "target")
MATCHED = ("query", "key")

TABLE = {
    "vicreg": Loss(
        losses.vicreg,
        XY,
        collapsed=lambda n, d: 24.75,
        wide=True,
        symmetric=True,
        translated=True,
    ),
    "lecture_energy": Loss(
        losses.lecture_energy,
        XY,
        collapsed=lambda n, d: 2.0,
        wide=True,
        symmetric=True,
        translated=True,
    ),
    "lecture_energy, uncentered": Loss(
        functools.partial(losses.lecture_energy, center=False),
        XY,
        wide=True,
        symmetric=True,
    ),
    "barlow_twins": Loss(
        losses.barlow_twins,
        XY,
        wide=True,
        collapsed=lambda n, d: d,
        normalizing=True,
        symmetric=True,
        translated=True,
    ),
    "variance_hinge": Loss(
        losses.variance_hinge, X, collapsed=lambda n, d: 0.99, translated=True
    ),
    "variance_hinge, on variance": Loss(
        functools.partial(losses.variance_hinge, on="variance"),
        X,
        collapsed=lambda n, d: 1.0,
        translated=True,
    ),
    "covariance_penalty": Loss(
        losses.covariance_penalty,
        X,
        collapsed=lambda n, d: 0.0,
        blind=True,
        wide=True,
        translated=True,
    ),
    "swav": Loss(
        _swav,
        ("scores", "scores"),
        own_constants=True,
        collapsed=lambda n, d: math.log(d),
        normalizing=True,
        symmetric=True,
        translated=True,
        direct=False,
    ),
    "cross_entropy": Loss(
        losses.cross_entropy,
        DISTILLED,
        constants=1,
        collapsed=lambda n, d: math.log(d),
        normalizing=True,
        translated=True,
        of_each=True,
    ),
    "dino": Loss(
        functools.partial(_dino, student_views=2),
        DISTILLED,
        constants=1,
        collapsed=lambda n, d: math.log(d),
        normalizing=True,
        translated=True,
        direct=False,
        of_each=True,
    ),
    "dino, local views": Loss(
        functools.partial(_dino, student_views=4),
        DISTILLED,
        constants=1,
        collapsed=lambda n, d: math.log(d),
        normalizing=True,
        translated=True,
        direct=False,
        of_each=True,
    ),
    "byol": Loss(
        losses.byol,
        REGRESSED,
        constants=1,
        collapsed=lambda n, d: 0.0,
        blind=True,
        normalizing=True,
        scaled=True,
        of_each=True,
    ),
    "negative_cosine": Loss(
        losses.negative_cosine,
        REGRESSED,
        constants=1,
        collapsed=lambda n, d: -1.0,
        blind=True,
        collapsed_at_zero=0.0,
        normalizing=True,
        scaled=True,
        of_each=True,
    ),
    "smooth_l1": Loss(
        _smooth_l1,
        REGRESSED,
        constants=1,
        collapsed=lambda n, d: 0.0,
        blind=True,
        normalizing=True,
        translated=True,
        direct=False,
        of_each=True,
    ),
    "smooth_l1, masked": Loss(
        functools.partial(_smooth_l1, masked=True),
        REGRESSED,
        constants=1,
        collapsed=lambda n, d: 0.0,
        blind=True,
        normalizing=True,
        translated=True,
        ordered=True,
        direct=False,
    ),
    "smooth_l1, squared": Loss(
        functools.partial(_smooth_l1, beta=0),
        REGRESSED,
        constants=1,
        collapsed=lambda n, d: 0.0,
        blind=True,
        translated=True,
        direct=False,
        of_each=True,
    ),
    "nt_xent": Loss(
        losses.nt_xent,
        XY,
        collapsed=lambda n, d: math.log(2 * n - 1),
        sized=True,
        normalizing=True,
        symmetric=True,
        scaled=True,
    ),
    "info_nce": Loss(
        losses.info_nce,
        MATCHED,
        constants=1,
        collapsed=lambda n, d: math.log(n),
        sized=True,
        normalizing=True,
        scaled=True,
    ),
    "info_nce, both sides": Loss(
        functools.partial(losses.info_nce, stop_gradient=False),
        MATCHED,
        collapsed=lambda n, d: math.log(n),
        sized=True,
        normalizing=True,
        scaled=True,
    ),
    "info_nce, queue": Loss(
        _queued,
        MATCHED,
        constants=1,
        normalizing=True,
        scaled=True,
        of_each=True,
        direct=False,
    ),
}


def _normalized_queue(query, key, queue, **keywords):
    queue = queue.astype(jnp.float32)
    lengths = jnp.sqrt(jnp.sum(jnp.square(queue), axis=1, keepdims=True) + 1e-12)
    return losses.info_nce(query, key, queue / lengths, **keywords)


# In the shapes of their own: a loss, the shapes of its arrays, what it promises.
NATURAL = {
    "swav": (
        losses.swav,
        [(2, 16, 12)],
        {"batch_axes": 1, "numerical_gradients": False, "largest": 1e20},
    ),
    "dino": (
        losses.dino,
        [(3, 16, 12), (2, 16, 12), (12,)],
        {"batch_axes": (1, 1, None), "constants": (1, 2), "largest": 1e20},
    ),
    "smooth_l1": (
        losses.smooth_l1,
        [(16, 3, 12), (16, 3, 12)],
        {"batch_axes": 0, "constants": (1,), "collapsed": 0.0, "largest": 1e20},
    ),
    "info_nce, queue": (
        _normalized_queue,
        [(16, 12), (16, 12), (9, 12)],
        {"batch_axes": (0, 0, None), "constants": (1, 2)},
    ),
}
