"""The same step on one and on eight devices, and what crosses between them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jemjax.augment import vicreg_small
from jemjax.evaluation import normalized_std
from jemjax.methods import VICReg
from jemjax.models import JointEmbedding, ResNet
from jemjax.models.resnet import BasicBlock
from jemjax.training.mesh import make_mesh, replicated, to_devices
from jemjax.training.optimizers import make_optimizer
from jemjax.training.state import init_state
from jemjax.training.step import make_train_step

BATCH, SIZE = 16, 8


def _setup(devices, dtype=jnp.float32):
    # An embedding wider than the batch, so that the loss exchanges features.
    method = VICReg(expander=(32, 32))
    network = JointEmbedding(
        backbone=ResNet((1, 1), BasicBlock, width=4, stem="small", dtype=dtype),
        projector=method.projector(SIZE),
    )
    optimizer = make_optimizer("lars", 0.5, weight_decay=1e-6)
    mesh = make_mesh(devices)
    step = make_train_step(method, network, vicreg_small(SIZE), optimizer, mesh)

    def init(key):
        return init_state(key, network, optimizer, jnp.zeros((2, SIZE, SIZE, 3)))

    state = jax.jit(init, out_shardings=replicated(mesh))(jax.random.key(0))
    return step, state, mesh


def _images(step):
    rng = np.random.default_rng(step)
    return rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)


def _run(devices, steps):
    step, state, mesh = _setup(devices)
    losses = []
    for number in range(steps):
        state, metrics = step(state, to_devices(_images(number), mesh))
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1, "the step was compiled more than once"
    return np.array(losses), jax.device_get(state.replace(key=None))


def test_one_and_eight_devices_take_the_same_twenty_steps():
    losses, state = _run(1, 20)
    sharded_losses, sharded = _run(8, 20)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)
    for path, leaf in jax.tree.leaves_with_path((state.params, state.batch_stats)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # The exact gradient of a bias before a normalization is zero.
        if "projector" in name and "Dense_0/bias" in name:
            continue
        other = dict(jax.tree.leaves_with_path((sharded.params, sharded.batch_stats)))
        difference = np.linalg.norm(other[path] - leaf)
        assert difference <= 1e-4 * np.linalg.norm(leaf), name


def test_the_views_do_not_depend_on_the_number_of_devices(key):
    from jemjax.augment import make_views

    views = jax.jit(lambda images: make_views(key, images, vicreg_small(SIZE)))
    one, eight = (
        views(to_devices(_images(0), make_mesh(devices))) for devices in (1, 8)
    )
    for view, other in zip(one, eight, strict=True):
        np.testing.assert_allclose(other, view, atol=1e-6)


def test_the_compiled_step_holds_the_collectives_of_the_loss():
    step, state, mesh = _setup(8)
    text = step.lower(state, to_devices(_images(0), mesh)).compile().as_text()
    assert "all-to-all" in text  # rows for features: 32 features, a batch of 16
    assert f"f32[{BATCH},{BATCH}]" in text  # the summed matrix of the examples
    assert "f32[32,32]{1,0} all-reduce" not in text.replace("(", "{")
    text = step.lower(state, to_devices(_images(0), mesh)).as_text()
    assert "all_to_all" in text and "all_reduce" in text


def test_a_step_changes_what_it_should():
    step, state, mesh = _setup(1)
    before = jax.device_get(state.replace(key=None))
    state, metrics = step(state, to_devices(_images(0), mesh))
    assert int(state.step) == 1
    for name in ("params", "batch_stats", "opt_state"):
        pairs = zip(
            jax.tree.leaves(getattr(before, name)),
            jax.tree.leaves(getattr(state, name)),
            strict=True,
        )
        assert any(np.any(a != np.asarray(b)) for a, b in pairs), name
    assert set(metrics) >= {"loss", "invariance", "variance", "covariance"}
    weights = {"invariance": 25, "variance": 25, "covariance": 1}
    total = sum(weight * float(metrics[name]) for name, weight in weights.items())
    np.testing.assert_allclose(float(metrics["loss"]), total, rtol=1e-5)


def test_bfloat16_computes_in_it_and_keeps_float32():
    step, state, mesh = _setup(1, jnp.bfloat16)
    text = step.lower(state, to_devices(_images(0), mesh)).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convo" in line]
    assert convolutions and all("bf16" in line for line in convolutions)
    state, metrics = step(state, to_devices(_images(0), mesh))
    assert np.isfinite(float(metrics["loss"]))
    kept = jax.tree.leaves((state.params, state.batch_stats, state.opt_state))
    assert {x.dtype for x in kept} <= {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.parametrize("weight", ["invariance", "variance", "covariance"])
def test_every_weight_of_the_method_reaches_the_loss(key, weight):
    x, y = jax.random.normal(key, (2, 8, 4))
    method = VICReg()
    value, _ = method.loss((x, y))
    doubled = dataclasses.replace(
        method, **{f"{weight}_weight": 2 * getattr(method, f"{weight}_weight")}
    )
    other, terms = doubled.loss((x, y))
    difference = getattr(method, f"{weight}_weight") * terms[weight]
    np.testing.assert_allclose(other - value, difference, rtol=1e-4)


def test_the_logged_spread_is_that_of_the_first_views_embeddings():
    constant = jnp.ones((BATCH, 4))
    assert float(normalized_std(constant)) < 1e-6
