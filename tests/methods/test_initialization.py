"""What the lecture says of a trivial initialization, and of what comes after it.

Where every branch emits one and the same vector no method has a gradient. Whether a
small step from nearly equal outputs widens their spread is what tells the methods whose
loss prevents collapse from those that are kept from it by something else.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.setups import TINY, tiny_method

from jemjax import losses
from jemjax.models import MaskedTokens

N, D, K = 64, 8, 10
METHODS = pytest.mark.parametrize("name", TINY)
# The loss itself pushes embeddings apart; in the others something outside of it does.
WIDENS = {"vicreg", "barlow-twins", "swav", "dino", "simclr", "moco", "moco-v3"}
# The methods that compare scores of prototypes, not embeddings.
SCORES = {"swav", "dino"}


def _equal(name):
    """The one vector: scores that are equal, or any embedding."""
    if name in SCORES:
        return jnp.zeros(K)
    return jnp.linspace(-0.7, 1.1, D)


def _memory(method, vector):
    if method.name == "moco":
        unit = vector / jnp.linalg.norm(vector)
        return {"queue": jnp.broadcast_to(unit, (32, D))}
    return {}


def _loss(method, memory, online, target):
    """The method's loss of (V, N, D) outputs of both branches."""
    if method.name == "data2vec":
        # One view; the last layers of the target, each of 4 patches, 2 of them masked.
        mask = jnp.tile(jnp.array([True, True, False, False]), (len(online[0]), 1))
        tokens = jnp.repeat(online[0][:, None], 4, axis=1)  # (N, 4, D)
        layers = jnp.repeat(target[0][:, None, None], 4, axis=2)  # (N, 1, 4, D)
        return method.loss((MaskedTokens(tokens, mask),), (layers,), memory)[0]
    if method.name == "moco":
        return method.loss((online[0],), (target[1],), memory)[0]
    return method.loss(tuple(online), tuple(target), memory)[0]


def _gradients(method, online, target, memory):
    if method.target == "shared":  # one branch: both arguments are the same arrays
        both = lambda arrays: _loss(method, memory, arrays, arrays)  # noqa: E731
        return jax.grad(both)(online)
    return jax.grad(lambda arrays: _loss(method, memory, arrays, target))(online)


def _equal_outputs(name):
    """(V, N, D) of the online branch and of the target."""
    vector = _equal(name)
    outputs = target = jnp.broadcast_to(vector, (2, N, len(vector)))
    if name == "data2vec":  # what it predicts is normalized: so is what predicts it
        normalized = losses.data2vec_target(target[:1, :, None])[:, 0]  # (N, D)
        outputs = jnp.broadcast_to(normalized, target.shape)
    return vector, outputs, target


@METHODS
def test_the_collapsed_loss_is_that_of_equal_outputs(name):
    vector, outputs, target = _equal_outputs(name)
    swaps = {"num_prototypes": len(vector)} if name in SCORES else {}
    method = tiny_method(name, **swaps)
    loss = _loss(method, _memory(method, vector), outputs, target)
    np.testing.assert_allclose(
        loss, method.collapsed_loss(N, len(vector)), rtol=1e-5, atol=1e-5
    )


@METHODS
def test_equal_outputs_have_no_gradient(name):
    method = tiny_method(name)
    vector, outputs, target = _equal_outputs(name)
    gradient = _gradients(method, outputs, target, _memory(method, vector))
    assert float(jnp.abs(gradient).max()) <= 1e-6


def _spread(outputs):
    return float(jnp.mean(jnp.std(outputs, axis=1)))


@METHODS
def test_whether_a_step_from_nearly_equal_outputs_widens_their_spread(name):
    method = tiny_method(name)
    vector = _equal(name)
    rng = np.random.default_rng(0)
    # What tells images apart, and a tenth of it what tells their views apart.
    image = rng.standard_normal((1, N, len(vector)))
    view = 0.1 * rng.standard_normal((2, N, len(vector)))
    outputs = vector + jnp.asarray(1e-3 * (image + view), jnp.float32)
    memory = _memory(method, vector)
    gradient = _gradients(method, outputs, outputs, memory)
    step = 1e-4 / float(jnp.sqrt(jnp.mean(gradient[0] ** 2)))
    if name == "moco":  # of the two views only the query has a gradient
        outputs, gradient = outputs[:1], gradient[:1]
    if name == "data2vec":
        outputs, gradient = outputs[:1], gradient[:1]
    before, after = _spread(outputs), _spread(outputs - step * gradient)
    assert (after > before * (1 + 1e-3)) == (name in WIDENS), (before, after)
