"""The same step on one and on eight devices, and what crosses between them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.setups import BATCH, SIZE, TINY, Setup, setup_of, tiny_method

from jemjax.augment import make_views, vicreg_small
from jemjax.evaluation import normalized_std
from jemjax.methods import VICReg
from jemjax.training.checkpoints import Checkpoints, fingerprint
from jemjax.training.mesh import make_mesh, to_devices

METHODS = pytest.mark.parametrize("name", TINY)


def _paths(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


# Biases before a normalization: their exact gradient is zero, and what is left of it
# is rounding, which the optimizers scale up.
ROUNDING = {
    "vicreg": ["projector/Dense_0/bias"],
    "swav": ["projector/Dense_0/bias"],
    "byol": ["projector/Dense_0/bias", "predictor/Dense_0/bias"],
}


def _check_devices(name, devices, steps):
    losses, state = setup_of(name).run(steps)
    sharded_losses, sharded = setup_of(name, devices).run(steps)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)
    everything = ("params", "batch_stats", "target_params", "target_batch_stats")
    for field in (*everything, "loss_state"):
        others = _paths(getattr(sharded, field))
        for path, leaf in _paths(getattr(state, field)).items():
            if path in ROUNDING.get(name, ()):
                continue
            difference = np.linalg.norm(others[path] - leaf)
            assert difference <= 1e-4 * np.linalg.norm(leaf), (field, path)


@pytest.mark.parametrize("name", ["vicreg", "swav", "dino", "moco"])
def test_one_and_eight_devices_take_the_same_steps(name):
    # Past the first epoch, in which prototypes stand still and the queue is not used.
    _check_devices(name, 8, 8)


@pytest.mark.slow
@METHODS
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_any_number_of_devices_takes_the_same_twenty_steps(name, devices):
    _check_devices(name, devices, 20)


def test_the_views_do_not_depend_on_the_number_of_devices(key):
    images = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)
    views = jax.jit(lambda images: make_views(key, images, vicreg_small(SIZE)))
    one, eight = (views(to_devices(images, make_mesh(devices))) for devices in (1, 8))
    for view, other in zip(one, eight, strict=True):
        np.testing.assert_allclose(other, view, atol=1e-6)


def test_the_compiled_step_holds_the_collectives_of_the_loss():
    setup = setup_of("vicreg", 8)
    lowered = setup.lower()
    text = setup.compiled.as_text()
    assert "all-to-all" in text  # rows for features: 40 features, a batch of 16
    assert f"f32[{BATCH},{BATCH}]" in text  # the summed matrix of the examples
    reduced = [line for line in text.splitlines() if " all-reduce(" in line]
    assert reduced and not [line for line in reduced if "f32[40,40]" in line]
    text = lowered.as_text()
    assert "all_to_all" in text and "all_reduce" in text


@METHODS
def test_a_resumed_run_ends_in_the_same_bytes(name, tmp_path):
    setup = setup_of(name)
    undisturbed, _ = setup.steps(setup.init(), range(8))
    state, _ = setup.steps(setup.init(), range(6))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(6, state)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore(setup.init())
    checkpoints.close()
    assert int(restored.step) == 6
    resumed, _ = setup.steps(restored, range(6, 8))
    assert fingerprint(resumed) == fingerprint(undisturbed)


@METHODS
def test_a_step_changes_what_it_should(name):
    setup = setup_of(name)
    state = setup.init()
    before = jax.device_get(state.replace(key=None))
    # Beyond the first epoch, where warm-ups start from zero.
    state, metrics = setup.steps(state, range(6))
    assert int(state.step) == 6
    assert all(np.isfinite(value) for value in metrics[-1].values())
    fields = ["params", "opt_state"]
    fields += [] if name == "data2vec" else ["batch_stats"]
    fields += ["target_params"] if setup.method.target == "momentum" else []
    fields += ["loss_state"] if name in ("swav", "dino", "moco") else []
    for field in fields:
        after = jax.tree.leaves(getattr(state, field))
        pairs = zip(jax.tree.leaves(getattr(before, field)), after, strict=True)
        assert any(np.any(a != np.asarray(b)) for a, b in pairs), field
    # Every trained parameter moves, but for a mask token where nothing is masked.
    for path, leaf in _paths(before.params).items():
        assert np.any(leaf != np.asarray(_paths(state.params)[path])), path


def test_the_terms_add_up_to_the_loss():
    setup = setup_of("vicreg")
    _, (metrics,) = setup.steps(setup.init(), [0])
    weights = {"invariance": 25, "variance": 25, "covariance": 1}
    total = sum(weight * float(metrics[name]) for name, weight in weights.items())
    np.testing.assert_allclose(float(metrics["loss"]), total, rtol=1e-5)


def test_bfloat16_computes_in_it_and_keeps_float32():
    setup = Setup(tiny_method("byol"), dtype=jnp.bfloat16)
    text = setup.lower().as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convo" in line]
    assert convolutions and all("bf16" in line for line in convolutions)
    state, (metrics,) = setup.steps(setup.init(), [0])
    assert np.isfinite(metrics["loss"])
    kept = jax.tree.leaves(state.replace(key=None))
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
    setup = setup_of("vicreg")
    state, images = setup.init(), setup.images(0)
    view_key = jax.random.split(jax.random.fold_in(state.key, 0), 3)[0]
    view = make_views(view_key, images, setup.recipe)[0]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    outputs, _ = setup.network.apply(
        variables, view, train=True, mutable=["batch_stats"]
    )
    spread = normalized_std(outputs.embedding)
    _, (metrics,) = setup.steps(state, [0])
    np.testing.assert_allclose(metrics["embedding_std"], spread, rtol=1e-4)
