"""MoCo's queue: read in blocks, as it is given, and nothing of its size is made."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jemjax import losses
from jemjax.losses import contrastive

N, D, Q = 8, 16, 4096


def _arrays(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(N, D)), jnp.float32) for _ in range(2))
    queue = rng.normal(size=(Q, D))
    queue /= np.linalg.norm(queue, axis=1, keepdims=True)
    return query, key, jnp.asarray(queue, dtype)


def _plain(query, key, queue, temperature):
    query, key = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (query, key))
    positive = jnp.sum(query * key, axis=1, keepdims=True)
    queue = queue.astype(query.dtype)
    logits = jnp.concatenate([positive, query @ queue.T], axis=1) / temperature
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])


# All keys, a divisor of them, and no divisor.
@pytest.fixture(params=[Q, 512, 700])
def block_size(request, monkeypatch):
    """So many keys of the queue at once."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(contrastive, "_BLOCK", N * request.param)
    return request.param


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_queue_in_blocks_is_the_whole_queue(block_size, dtype):
    query, key, queue = _arrays(dtype)

    def ours(query, key, temperature):
        return losses.info_nce(
            query, key, queue, temperature=temperature, stop_gradient=False
        )

    def plain(query, key, temperature):
        return _plain(query, key, queue, temperature)

    arguments = query, key, jnp.float32(0.07)
    value_and_gradients = functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    actual = jax.jit(value_and_gradients(ours))(*arguments)
    expected = value_and_gradients(plain)(*arguments)
    chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=2e-6)
    # And once more, forward over reverse, along the queries.
    tangents = (key, jnp.zeros_like(key), jnp.float32(0))

    def along(loss):
        return jax.jvp(jax.grad(loss), arguments, tangents)[1]

    chex.assert_trees_all_close(along(ours), along(plain), rtol=1e-4, atol=1e-5)


def test_nothing_as_large_as_the_queue_is_made(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(contrastive, "_BLOCK", N * 500)
    query, key, queue = _arrays(jnp.bfloat16)
    loss = jax.value_and_grad(functools.partial(losses.info_nce, temperature=0.2))
    compiled = jax.jit(loss).lower(query, key, queue).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    # A copy of the queue in float32, and the cosines with all of it.
    everything = 4 * Q * (D + N)
    assert temporary < everything / 4


@pytest.mark.parametrize("length", [1e-30, 1e30, 1e36])
def test_blocks_may_have_long_rows(block_size, length):
    query, key, queue = _arrays()
    queue = length * jnp.sign(queue)
    loss = functools.partial(losses.info_nce, temperature=1.0)
    value, gradient = jax.value_and_grad(loss)(query, key, queue)
    unit = query / jnp.linalg.norm(query, axis=1, keepdims=True)
    largest = jnp.max(unit @ queue.T, axis=1)
    if length > 1:
        np.testing.assert_allclose(value, jnp.mean(largest), rtol=1e-5)
    chex.assert_tree_all_finite(gradient)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, Q - 1])
def test_a_bad_key_of_any_block_shows(block_size, bad, row):
    query, key, queue = _arrays()
    value = losses.info_nce(query, key, queue.at[row, 0].set(bad))
    assert not jnp.isfinite(value)


def test_a_call_without_jit_compiles_once(block_size):
    arrays = _arrays()
    losses.info_nce(*arrays)
    compiled = contrastive._log_others_and_mean_key._cache_size()
    losses.info_nce(*arrays)
    assert contrastive._log_others_and_mean_key._cache_size() == compiled
    with jax.disable_jit():
        np.testing.assert_allclose(
            losses.info_nce(*arrays), jax.jit(losses.info_nce)(*arrays), rtol=1e-6
        )
