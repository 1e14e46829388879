"""Every loop of docs/loops.md trains, and its gradient is that of the plain loss."""

import functools
import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jemjax import losses

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "loops.md").read_text()
SECTIONS = {
    section.split("\n", 1)[0].replace("`", ""): section
    for section in PAGE.split("\n## ")[1:]
}
BLOCKS = {
    heading: re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    for heading, section in SECTIONS.items()
}
LOOPS = [heading for heading in BLOCKS if heading != "Settings"]


def _execute(code):
    names = {"__name__": "loop"}
    exec(compile(code, "docs/loops.md", "exec"), names)
    return names


@functools.cache
def _run(heading):
    """The names of a block after it ran, which the tests below share."""
    (code,) = BLOCKS[heading]
    # Kept for all tests, whichever asks first; Adam needs the standard promotion.
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("standard"):
        return _execute(code)


def _assert_falls(values):
    assert len(values) >= 10 and np.isfinite(values).all()
    assert values[-1] < 0.9 * values[0]


def _assert_same(got, expected):
    """Of a value or a gradient, to 1e-5 of its largest entry."""
    got, expected = jax.device_get((got, expected))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    leaves = jax.tree.leaves(expected)
    largest = max(np.abs(leaf).max() for leaf in leaves)
    for one, other in zip(jax.tree.leaves(got), leaves, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * largest)


def _assert_both_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        _assert_same(one, other)


def test_every_section_has_one_loop():
    assert len(LOOPS) == 9
    assert {heading: len(blocks) for heading, blocks in BLOCKS.items()} == {
        **dict.fromkeys(LOOPS, 1),
        "Settings": 0,
    }


@pytest.mark.parametrize("heading", LOOPS)
def test_the_loss_falls(heading):
    _assert_falls(_run(heading)["values"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    ["jax_enable_x64", "jax_debug_nans", "jax_check_tracer_leaks", "jax_debug_infs"],
)
@pytest.mark.parametrize("heading", LOOPS)
def test_settings(heading, setting):
    if (heading, setting) == ("optax.lbfgs", "jax_debug_infs"):
        pytest.skip("the state of optax's L-BFGS begins with an infinite value")
    jax.config.update(setting, True)
    try:
        _assert_falls(_execute(*BLOCKS[heading])["values"])
    finally:
        jax.config.update(setting, False)


def test_the_block_of_the_readme(capsys):
    (code,) = re.findall(
        r"^```python\n(.*?)^```",
        (ROOT / "README.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    _execute(code)
    assert np.isfinite(float(capsys.readouterr().out))


# The same gradient through a library as without it


def _perceptron(weights, x):
    first, second = weights
    hidden = jax.nn.relu(x @ first["w"] + first["b"][None])
    return hidden @ second["w"] + second["b"][None]


def _of_equinox(model):
    return [{"w": layer.weight.T, "b": layer.bias} for layer in model.layers]


def _of_nnx(state):
    layers = state["layers"]
    return [
        {"w": layers[i]["kernel"].get_value(), "b": layers[i]["bias"].get_value()}
        for i in (0, 2)
    ]


def _of_haiku(parameters):
    return [parameters[f"mlp/~/linear_{i}"] for i in (0, 1)]


@pytest.fixture
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def test_equinox_and_plain_jax_agree(strict):
    names = _run("Equinox")
    views = names["view_1"], names["view_2"]
    run = eqx.filter_jit(eqx.filter_value_and_grad(names["loss"]))
    value, gradient = run(names["model"], *views)

    def plain(weights, view_1, view_2):
        return losses.vicreg(_perceptron(weights, view_1), _perceptron(weights, view_2))

    weights = _of_equinox(names["model"])
    expected = jax.jit(jax.value_and_grad(plain))(weights, *views)
    _assert_both_same((value, _of_equinox(gradient)), expected)


def test_nnx_and_plain_jax_agree(strict):
    names = _run("Flax NNX")
    views = names["view_1"], names["view_2"]
    run = nnx.jit(nnx.value_and_grad(names["loss"]))
    value, gradient = run(names["model"], *views)

    def plain(weights, view_1, view_2):
        return losses.barlow_twins(
            _perceptron(weights, view_1), _perceptron(weights, view_2)
        )

    weights = _of_nnx(nnx.state(names["model"], nnx.Param))
    expected = jax.jit(jax.value_and_grad(plain))(weights, *views)
    _assert_both_same((value, _of_nnx(gradient)), expected)


def test_haiku_and_plain_jax_agree(strict):
    names = _run("Haiku")
    arrays = names["target"], names["view_1"], names["view_2"]
    run = jax.jit(jax.value_and_grad(names["loss"], (0, 1)))
    value, (gradient, of_target) = run(names["online"], *arrays)

    def plain(online, target, view_1, view_2):
        net, predictor = online

        def one_direction(x, y):
            prediction = _perceptron(predictor, _perceptron(net, x))
            return losses.byol(prediction, _perceptron(target, y))

        return one_direction(view_1, view_2) + one_direction(view_2, view_1)

    def weights(online):
        return [_of_haiku(online[part]) for part in ("net", "predictor")]

    expected = jax.jit(jax.value_and_grad(plain))(
        weights(names["online"]), _of_haiku(arrays[0]), *arrays[1:]
    )
    _assert_both_same((value, weights(gradient)), expected)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_target))


# Small batches


def _after(loss, weights, batches):
    """The weights that `MultiSteps` makes of one step of gradient descent."""
    optimizer = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=len(batches))

    @jax.jit
    def step(weights, state, batch):
        gradient = jax.grad(loss)(weights, batch)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state

    state = optimizer.init(weights)
    for batch in batches:
        weights, state = step(weights, state, batch)
    return weights


def test_multi_steps_are_exact_for_means_over_examples_only():
    names = _run("Small batches: optax.MultiSteps")
    student, parts, views = names["student"], names["parts"], names["views"]

    def dino(student, views):
        return names["loss"](student, names["teacher"], names["center"], views)

    def vicreg(student, views):
        return losses.vicreg(*views @ student)

    _assert_same(_after(dino, student, parts), _after(dino, student, [views]))
    got, expected = (_after(vicreg, student, batch) for batch in (parts, [views]))
    assert np.abs(got - expected).max() > 0.1 * np.abs(student - expected).max()


@pytest.mark.parametrize(
    "loss",
    [
        losses.byol,
        losses.negative_cosine,
        losses.cross_entropy,
        lambda x, y: losses.info_nce(x, y, jnp.eye(4)),
        lambda x, y: losses.smooth_l1(x[:, None], y[:, None]),
    ],
)
def test_what_the_page_calls_a_mean_over_examples(loss):
    x, y = np.random.default_rng(0).standard_normal((2, 8, 4)).astype(np.float32)
    parts = [float(loss(x[i : i + 2], y[i : i + 2])) for i in range(0, 8, 2)]
    np.testing.assert_allclose(np.mean(parts), loss(x, y), rtol=1e-5)


def test_accumulation_by_hand_is_exact():
    names = _run("Small batches, exactly")
    views = jnp.concatenate(names["parts"], axis=1)

    def whole(w, views):
        return losses.vicreg(*names["embed"](w, views))

    w = names["w"]
    got = jax.jit(names["value_and_gradient"])(w, names["parts"])
    _assert_both_same(got, jax.jit(jax.value_and_grad(whole))(w, views))


# Optimizers that ask for the loss themselves


def test_sam_takes_the_gradient_at_worse_weights():
    names = _run("optax.contrib.sam")
    views = names["view_1"], names["view_2"]
    w, gradient = names["w"], jax.jit(jax.grad(names["loss"]))
    state = names["optimizer"].init(w)
    got, *_ = names["step"](w, state, *views)
    at_w = gradient(w, *views)
    worse = w + 0.05 * at_w / jnp.linalg.norm(at_w)
    adam = optax.adam(1e-2)
    updates, _ = adam.update(gradient(worse, *views), adam.init(w), w)
    _assert_same(got, w + updates)


def test_lbfgs_never_gets_worse():
    names = _run("optax.lbfgs")
    assert (np.diff(names["values"]) <= 0).all()


# Shards


def test_the_mean_of_the_gradients_is_that_of_one_device():
    names = _run("Many devices: jax.shard_map")
    w, state, views, mesh = (names[key] for key in ("w", "state", "views", "mesh"))
    assert mesh.size == 8
    whole = jax.jit(jax.value_and_grad(names["loss"]))
    value, gradient = whole(*jax.device_get((w, views)))

    # Of the block, where the mean changes nothing.
    updates, _ = names["optimizer"].update(gradient, jax.device_get(state))
    expected = optax.apply_updates(jax.device_get(w), updates)
    got = names["step"](w, state, views)
    _assert_both_same((got[2], got[0]), (value, expected))

    # Where it is needed.
    unchecked = jax.shard_map(
        lambda w, views: jax.lax.pmean(
            jax.grad(names["loss"])(w, views, axis_name="data"), "data"
        ),
        mesh=mesh,
        in_specs=(jax.P(), jax.P(None, "data")),
        out_specs=jax.P(),
        check_vma=False,
    )
    _assert_same(jax.jit(unchecked)(w, views), gradient)
