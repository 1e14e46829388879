import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jemjax.methods.base import Optimization
from jemjax.training.step.optimizers import (
    OPTIMIZERS,
    clip_by_norm,
    larc,
    lars,
    make_optimizer,
    scale_biases,
)
from jemjax.training.step.sharding import make_mesh

BOTH = pytest.mark.parametrize("x64", [False, True])
EVERY = pytest.mark.parametrize("name", OPTIMIZERS)


def _run(optimizer, params, gradients):
    """The parameters after each step; `gradients` has them stacked."""

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    def run(params, gradients):
        return jax.lax.scan(step, (params, optimizer.init(params)), gradients)[1]

    return jax.jit(run)(params, gradients)


def _check_golden(z, make, variant, names, x64, rtol=1e-6, atol=1e-6):
    with jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        rates = jnp.asarray(z["lr"], dtype)
        optimizer = make(
            lambda step: rates[step],
            weight_decay=float(z["weight_decay"]),
            momentum=float(z["momentum"]),
            trust_coefficient=float(z["eta"]),
        )
        params = {name: jnp.asarray(z[f"p0/{name}"], dtype) for name in names}
        gradients = {name: jnp.asarray(z[f"g/{name}"], dtype) for name in names}
        after = _run(optimizer, params, gradients)
        for name in names:
            assert after[name].dtype == dtype
            np.testing.assert_allclose(
                after[name],
                z[f"{variant}/{name}"],
                rtol=rtol,
                atol=0 if x64 else atol,
                err_msg=name,
            )


def _no_filter(*args, **options):
    return lars(*args, **options, decay_all=True)


def _barlow(*args, **options):
    return optax.chain(lars(*args, **options), scale_biases(0.0048 / 0.2))


@BOTH
@pytest.mark.parametrize(
    ("variant", "make"),
    [
        ("vicreg", lars),
        ("dino", lars),
        ("mocov3", lars),
        ("vicreg_nofilter", _no_filter),
        ("barlow", _barlow),
        ("swav_larc", larc),
    ],
)
def test_lars_and_larc_equal_the_official_code(golden, variant, make, x64):
    names = ("w", "conv", "b", "bn", "w0", "wg0")
    _check_golden(golden("lars"), make, variant, names, x64)


@BOTH
def test_lars_equals_the_official_code_of_byol(golden, x64):
    names = (
        "res/conv/w",
        "mlp/linear/w",
        "mlp/linear/b",
        "mlp/batch_norm/scale",
        "mlp/batch_norm/offset",
        "zero/linear/w",
    )
    _check_golden(golden("lars_byol"), lars, "after", names, x64)


def test_lars_with_the_rate_in_its_momentum_equals_the_official_code_of_simclr(golden):
    names = (
        "dense/kernel",
        "conv/kernel",
        "dense/bias",
        "batch_normalization/gamma",
        "zero/kernel",
    )

    def make(*args, **options):
        return lars(*args, **options, rate_in_momentum=True)

    z = golden("lars_simclr")
    _check_golden(z, make, "classic", names, x64=False, rtol=2e-5, atol=1e-7)


@BOTH
def test_clipping_equals_the_official_code_of_dino(golden, x64):
    z = golden("dino_clip_gradients")
    with jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        gradients = {name: jnp.asarray(z[f"g/{name}"], dtype) for name in "abc"}
        clip = clip_by_norm(float(z["clip"]))
        clipped, _ = clip.update(gradients, clip.init(gradients))
        for name in "abc":
            np.testing.assert_allclose(clipped[name], z[f"clipped/{name}"], rtol=1e-6)


def test_clipping_by_the_common_norm():
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    for limit, factor in ((1.0, 0.2), (10.0, 1.0)):
        clip = clip_by_norm(limit, each=False)
        clipped, _ = clip.update(gradients, clip.init(gradients))
        np.testing.assert_allclose(clipped["a"], [3 * factor, 0], rtol=1e-6)
        np.testing.assert_allclose(clipped["b"], [[4 * factor]], rtol=1e-6)


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_clipping_hides_nothing(each, bad):
    gradients = {"a": jnp.array([bad, 1.0])}
    clip = clip_by_norm(1.0, each=each)
    clipped, _ = clip.update(gradients, clip.init(gradients))
    assert not np.isfinite(clipped["a"]).all()


# What a method publishes, as one optimizer.

OPTIONS = Optimization("adamw", 0.1, 0.05, 0.0, 0.0)


def _make(optimization=OPTIONS, **changes):
    arguments = {"batch_size": 256, "total_steps": 12, "steps_per_epoch": 3.0}
    return make_optimizer(optimization, **{**arguments, **changes})


def _params(dtype=np.float32):
    rng = np.random.default_rng(0)

    def layer(rows):
        return {
            "kernel": rng.standard_normal((rows, 4)).astype(dtype),
            "bias": rng.standard_normal(4).astype(dtype),
        }

    return {
        "backbone": {"patch_embedding": layer(6), "patch_embedding_2": layer(3)},
        "predictor": layer(5),
        "prototypes": layer(8),
    }


def _gradients(count, dtype=np.float32):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda p: rng.standard_normal((count, *p.shape)).astype(dtype), _params()
    )


def _flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_dinos_optimizer_is_the_one_of_its_formulas():
    # AdamW by hand: clipped tensor by tensor, a decay that grows, a warm-up with both
    # ends, and prototypes that are left alone for the first five steps.
    count, hold = 12, 5
    optimization = Optimization(
        "adamw",
        learning_rate=0.1,
        weight_decay=0.04,
        warmup_epochs=1.0,
        final_fraction=0.01,
        schedule="linspace",
        final_weight_decay=0.4,
        clip_norm=2.0,
        b2=0.99,
    )
    with jax.enable_x64(True):
        optimizer, schedule = _make(
            optimization, batch_size=512, frozen_for={"prototypes": hold}
        )
        params, gradients = _params(np.float64), _gradients(count, np.float64)
        rates = np.array([schedule(step) for step in range(count)])
        after = _flat(_run(optimizer, params, gradients))
    expected_rates = 0.002 + 0.198 * (1 + np.cos(np.pi * np.arange(9) / 9)) / 2
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, *expected_rates], rtol=1e-9)
    gradients = _flat(gradients)
    for name, p in _flat(params).items():
        m = v = updates = 0
        for step in range(count):
            if name.startswith("prototypes") and step < hold:
                np.testing.assert_array_equal(after[name][step], p)
                continue
            g, updates = gradients[name][step], updates + 1
            g = g * min(1, 2 / (np.linalg.norm(g) + 1e-6))
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
            decay = 0.4 - 0.36 * (1 + np.cos(np.pi * step / count)) / 2
            adam = m / (1 - 0.9**updates)
            adam = adam / (np.sqrt(v / (1 - 0.99**updates)) + 1e-8)
            p = p - rates[step] * (adam + decay * p * (p.ndim > 1))
            np.testing.assert_allclose(
                after[name][step], p, rtol=1e-7, atol=1e-9, err_msg=f"{name} {step}"
            )


def test_simsiams_optimizer_is_the_one_of_its_formulas():
    # SGD that decays everything, a rate that changes once an epoch, and a predictor of
    # which it does not.
    count = 12
    optimization = Optimization(
        "sgd", 0.05, 0.1, 0.0, 0.0, schedule="epochs", decay_all=True
    )
    optimizer, schedule = _make(
        optimization, batch_size=512, constant_rate=("predictor",)
    )
    params, gradients = _params(), _gradients(count)
    after, gradients = _flat(_run(optimizer, params, gradients)), _flat(gradients)
    rates = 0.05 * (1 + np.cos(np.pi * (np.arange(count) // 3) / 4))
    np.testing.assert_allclose(
        jax.vmap(schedule)(np.arange(count)), rates, rtol=1e-6, atol=1e-9
    )
    for name, p in _flat(params).items():
        m = 0
        for step in range(count):
            m = 0.9 * m + gradients[name][step] + 0.1 * p
            p = p - (0.1 if name.startswith("predictor") else rates[step]) * m
            np.testing.assert_allclose(
                after[name][step], p, rtol=1e-4, atol=1e-5, err_msg=f"{name} {step}"
            )


@EVERY
def test_a_module_waits_as_if_its_gradients_began_later(name):
    count, hold = 8, 3
    optimization = dataclasses.replace(OPTIONS, name=name, final_fraction=1.0)
    optimizer, _ = _make(optimization, frozen_for={"prototypes": hold})
    params, gradients = _params(), _gradients(count)
    waited = _run(optimizer, params, gradients)
    at_once, _ = _make(optimization)
    whole = _flat(_run(at_once, params, gradients))
    rest = jax.tree.map(lambda g: g[hold:], gradients["prototypes"])
    later = _run(at_once, params["prototypes"], rest)
    for path, got in _flat(waited).items():
        if not path.startswith("prototypes"):
            np.testing.assert_allclose(got, whole[path], rtol=1e-6, err_msg=path)
            continue
        leaf = path.removeprefix("prototypes/")
        start = params["prototypes"][leaf]
        np.testing.assert_array_equal(got[:hold], np.stack([start] * hold))
        np.testing.assert_allclose(got[hold:], later[leaf], rtol=1e-5, atol=1e-6)


@EVERY
def test_the_state_of_a_module_that_waits_does_not_change(name):
    optimizer, _ = _make(
        dataclasses.replace(OPTIONS, name=name), frozen_for={"prototypes": 9}
    )
    params = _params()
    before = optimizer.init(params)
    _, after = optimizer.update(params, before, params)
    before, after = _flat(before), _flat(after)
    waiting = [path for path in before if "scheduled-prototypes/" in path]
    changed = [p for p in waiting if not np.array_equal(before[p], after[p])]
    assert [path.rsplit("/", 1)[1] for path in changed] == ["step"]
    assert len(waiting) > 1


def test_the_structure_of_the_state_does_not_depend_on_numbers_of_steps():
    structures = {
        jax.tree.structure(
            _make(OPTIONS, frozen_for={"prototypes": steps})[0].init(_params())
        )
        for steps in (0, 3, 9)
    }
    assert len(structures) == 1


@EVERY
def test_what_is_frozen_never_moves(name):
    optimization = dataclasses.replace(OPTIONS, name=name)
    optimizer, _ = _make(optimization, frozen=("backbone/patch_embedding", "absent"))
    params = _params()
    after, start = _flat(_run(optimizer, params, _gradients(4))), _flat(params)
    for path, p in start.items():
        still = path.startswith("backbone/patch_embedding/")
        assert np.array_equal(after[path][-1], p) == still, path
    state = _flat(optimizer.init(params))
    assert not any("patch_embedding/" in path for path in state)


def test_what_is_frozen_has_no_part_in_the_common_norm():
    optimization = dataclasses.replace(
        OPTIONS, name="sgd", weight_decay=0.0, clip_norm=1.0, clip_each=False
    )
    optimizer, _ = _make(optimization, frozen=("backbone",))
    params, gradients = _params(), jax.tree.map(jnp.ones_like, _params())
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.1, rtol=1e-5)
    huge = {**gradients, "backbone": jax.tree.map(jnp.copy, gradients["backbone"])}
    huge["backbone"] = jax.tree.map(lambda g: g * jnp.inf, huge["backbone"])
    others, _ = optimizer.update(huge, optimizer.init(params), params)
    for a, b in zip(_flat(others).values(), _flat(updates).values(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "larc"])
@pytest.mark.parametrize("decay_all", [False, True])
def test_biases_and_norms_are_decayed_only_if_the_method_says_so(name, decay_all):
    optimization = dataclasses.replace(OPTIONS, name=name, decay_all=decay_all)
    optimizer, _ = _make(optimization)
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert (np.asarray(updates["kernel"]) < 0).all()
    assert (np.asarray(updates["bias"]) < 0).all() == decay_all


@EVERY
def test_biases_have_a_rate_of_their_own(name):
    params, gradients = _params(), _gradients(5)
    slow, fast = (
        _run(
            _make(dataclasses.replace(OPTIONS, name=name, bias_rate=rate))[0],
            jax.tree.map(lambda p: p * (p.ndim > 1), params),  # moved from 0
            gradients,
        )
        for rate in (0.25, 1.0)
    )
    for path, after in _flat(slow).items():
        # LARC's step of a bias depends on its length, but the first.
        steps = slice(0, 1) if name == "larc" else slice(None)
        factor = 0.25 if path.endswith("bias") else 1.0
        np.testing.assert_allclose(
            after[steps], factor * _flat(fast)[path][steps], rtol=1e-5, err_msg=path
        )


@EVERY
@pytest.mark.parametrize("clip_each", [True, False])
def test_zeros_are_safe(name, clip_each):
    optimization = dataclasses.replace(
        OPTIONS, name=name, clip_norm=3.0, clip_each=clip_each, decay_all=True
    )
    optimizer, _ = _make(optimization)
    update = jax.jit(optimizer.update)
    for p in (0.0, 1.0):
        for g in (0.0, 1.0, 1e-38):
            params = {"kernel": jnp.full((3, 2), p), "bias": jnp.full(2, p)}
            gradients = jax.tree.map(lambda x, g=g: jnp.full_like(x, g), params)
            updates, state = update(gradients, optimizer.init(params), params)
            for path, leaf in _flat((updates, state)).items():
                assert np.isfinite(leaf).all(), (path, p, g)


@EVERY
def test_one_program_and_a_state_of_arrays(name):
    optimization = dataclasses.replace(
        OPTIONS, name=name, final_weight_decay=0.1, clip_norm=1.0
    )
    optimizer, _ = _make(
        optimization,
        constant_rate=("predictor",),
        frozen=("backbone/patch_embedding",),
        frozen_for={"prototypes": 2},
    )
    params, update = _params(), jax.jit(optimizer.update)
    params = jax.tree.map(jnp.asarray, params)
    state, gradients = jax.jit(optimizer.init)(params), _gradients(4)
    structure = jax.tree.structure(state)
    for step in range(4):
        gradient = jax.tree.map(lambda g, step=step: jnp.asarray(g[step]), gradients)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
    assert jax.tree.structure(state) == structure
    for leaf in jax.tree.leaves(state):
        assert isinstance(leaf, jax.Array) and leaf.dtype in (jnp.float32, jnp.int32)


@EVERY
def test_sharded_parameters_take_the_same_step(name):
    optimization = dataclasses.replace(OPTIONS, name=name, clip_norm=1.0)
    optimizer, _ = _make(optimization, frozen_for={"prototypes": 0})
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((16, 4)), "prototypes": np.ones((8, 2))}
    params = jax.tree.map(jnp.float32, params)
    gradients = jax.tree.map(lambda p: p**2 - 0.5, params)
    update = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])
    sharding = NamedSharding(make_mesh(8), P("data"))
    got = update(*jax.device_put((gradients, params), sharding))
    expected = update(gradients, params)
    for path, leaf in _flat(expected).items():
        np.testing.assert_allclose(_flat(got)[path], leaf, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    ("warmup_epochs", "steps"), [(0.0, 0), (1.0, 3), (0.5, 1), (1.5, 4), (100.0, 6)]
)
def test_the_warm_up_is_counted_in_steps_and_at_most_half_the_run(warmup_epochs, steps):
    optimization = dataclasses.replace(
        OPTIONS, warmup_epochs=warmup_epochs, final_fraction=0.5, warmup_start=0.25
    )
    _, schedule = _make(optimization, batch_size=1024, steps_per_epoch=2.6)
    rates = np.array([schedule(step) for step in range(13)])
    assert rates.argmax() == steps
    np.testing.assert_allclose(rates[steps], 0.4, rtol=1e-6)
    np.testing.assert_allclose(rates[0], 0.1 if steps else 0.4, rtol=1e-6)
    np.testing.assert_allclose(rates[12], 0.2, rtol=1e-6)


@EVERY
def test_the_logged_rate_is_the_one_of_the_step(name):
    optimization = dataclasses.replace(
        OPTIONS, name=name, weight_decay=0.0, momentum=0.0, warmup_epochs=1.0
    )
    optimizer, schedule = _make(optimization)
    params = {"bias": jnp.zeros(3)}
    after = _run(optimizer, params, {"bias": np.ones((12, 3), np.float32)})["bias"]
    taken = -np.diff(after, axis=0, prepend=0)[:, 0]
    rates = np.array([schedule(step) for step in range(12)])
    if name == "larc":  # it adapts biases too, as soon as they are not zero
        taken, rates = taken[:2], rates[:2]
    np.testing.assert_allclose(taken, rates, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adam"}, "expected one of lars, lars-simclr, larc, sgd, adamw"),
        ({"schedule": "step"}, "schedule: got 'step'"),
        ({"schedule": "epochs", "warmup_epochs": 1.0}, "warmup_epochs: got 1.0"),
        ({"learning_rate": -1.0}, "learning_rate: got -1"),
        ({"weight_decay": float("nan")}, "weight_decay: got nan"),
        ({"final_weight_decay": -1.0}, "end: got -1"),
        ({"momentum": 1.0}, "momentum: got 1"),
        ({"b2": -0.1}, "b2: got -0.1"),
        ({"clip_norm": 0.0}, "clip_norm: got 0"),
    ],
    ids=str,
)
def test_refused_options(change, message):
    with pytest.raises(ValueError, match=message):
        _make(dataclasses.replace(OPTIONS, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"total_steps": 0}, "total_steps: got 0"),
        ({"steps_per_epoch": 0.0}, "steps_per_epoch: got 0"),
        ({"frozen_for": {"prototypes": 1.5}}, "frozen_for: got 1.5"),
        ({"frozen_for": {"prototypes": -1}}, "frozen_for: got -1"),
    ],
    ids=str,
)
def test_refused_runs(change, message):
    with pytest.raises(ValueError, match=message):
        _make(**change)
