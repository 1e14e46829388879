"""Heads against the official ones, with their weights."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jemjax.models import MLPHead, Prototypes, expander, normalize_rows


class Case(NamedTuple):
    """One of our heads, and where the golden file holds the same one."""

    prefix: str
    head: MLPHead
    inner: str  # path of its layers in the file
    linears: tuple[int, ...]  # positions of its linear layers
    norms: tuple[int, ...]  # and of its normalizations
    columns: slice = slice(None)  # of the golden output that are its own
    inputs: slice | None = None  # of the golden output that it is applied to
    normalized: bool = False  # whether the golden output has rows of unit length


CASES = [
    Case("vicreg_projector", expander((12, 12, 6)), "", (0, 3, 6), (1, 4)),
    Case(
        "simsiam_projector_and_predictor",
        MLPHead((10, 10, 6), hidden_bias=False, output_norm="plain"),
        "enc/fc/",
        (0, 3, 6),
        (1, 4, 7),
        columns=slice(0, 6),
    ),
    Case(
        "simsiam_projector_and_predictor",
        MLPHead((5, 6), hidden_bias=False),
        "pred/",
        (0, 3),
        (1,),
        columns=slice(6, 12),
        inputs=slice(0, 6),
    ),
    Case(
        "mocov3_vit_projector",
        MLPHead((12, 12, 6), hidden_bias=False, output_bias=False, output_norm="plain"),
        "",
        (0, 3, 6),
        (1, 4, 7),
    ),
    Case(
        "mocov3_predictor_resnet",
        MLPHead((12, 6), hidden_bias=False, output_bias=False),
        "",
        (0, 3),
        (1,),
    ),
    Case(
        "swav_head_and_prototypes",
        MLPHead((12, 6)),
        "projection_head/",
        (0, 3),
        (1,),
        columns=slice(0, 6),
        normalized=True,
    ),
]


def _variables(z, case):
    prefix, inner = case.prefix, case.inner
    params, stats = {}, {}
    for index, position in enumerate(case.linears):
        path = f"{prefix}/param/{inner}{position}"
        params[f"Dense_{index}"] = {"kernel": z[f"{path}/weight"].T}
        if f"{path}/bias" in z:
            params[f"Dense_{index}"]["bias"] = z[f"{path}/bias"]
    for index, position in enumerate(case.norms):
        path = f"{prefix}/param/{inner}{position}"
        if f"{path}/weight" in z:
            params[f"BatchNorm_{index}"] = {
                "scale": z[f"{path}/weight"],
                "bias": z[f"{path}/bias"],
            }
        stats[f"BatchNorm_{index}"] = {
            "mean": z[f"{path}/running_mean"],
            "var": z[f"{path}/running_var"],
        }
    return {"params": params, "batch_stats": stats}


def _close(out, case, golden_out):
    if case.normalized:
        out = out / jnp.linalg.norm(out, axis=1, keepdims=True)
    np.testing.assert_allclose(out, golden_out[:, case.columns], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.prefix + case.inner)
def test_equals_the_official_head(golden, case):
    z = golden("heads")
    variables = _variables(z, case)
    golden_train = z[f"{case.prefix}/out_train"]
    golden_eval = z[f"{case.prefix}/out_eval_after_one_update"]

    def inputs(golden_out):
        x = z["x"] if case.inputs is None else golden_out[:, case.inputs]
        return jnp.asarray(x, jnp.float32)

    x = inputs(golden_train)
    out, updates = case.head.apply(variables, x, train=True, mutable=["batch_stats"])
    _close(out, case, golden_train)
    # Flax keeps the biased variance of the batch, torch the unbiased one.
    stats = {}
    for index, position in enumerate(case.norms):
        before = variables["batch_stats"][f"BatchNorm_{index}"]["var"]
        after = updates["batch_stats"][f"BatchNorm_{index}"]
        unbiased = 0.9 * before + (after["var"] - 0.9 * before) * len(x) / (len(x) - 1)
        path = f"{case.prefix}/after/{case.inner}{position}"
        np.testing.assert_allclose(
            after["mean"], z[f"{path}/running_mean"], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(unbiased, z[f"{path}/running_var"], rtol=1e-5)
        stats[f"BatchNorm_{index}"] = {"mean": after["mean"], "var": unbiased}
    variables = {**variables, "batch_stats": stats}
    _close(
        case.head.apply(variables, inputs(golden_eval), train=False), case, golden_eval
    )


@pytest.mark.parametrize(
    "golden_out", ["out_train", "out_eval_after_one_update"], ids=lambda name: name[:8]
)
def test_equals_swavs_scores(golden, golden_out):
    z = golden("heads")
    out = z[f"swav_head_and_prototypes/{golden_out}"]  # embedding and scores
    kernel = z["swav_head_and_prototypes/param/prototypes/weight"]
    # The file's are as they were initialized: official training normalizes them first.
    length = np.linalg.norm(kernel, axis=1)
    scores = Prototypes(5).apply({"params": {"kernel": kernel}}, out[:, :6])
    np.testing.assert_allclose(scores * length, out[:, 6:], rtol=2e-5, atol=2e-6)


DINO_MLP = MLPHead(
    (16, 16, 8), hidden_norm=False, activation="gelu", kernel_init="truncated_normal"
)


def _dino_variables(z):
    mlp = {
        f"Dense_{index}": {
            "kernel": z[f"param/mlp/{position}/weight"].T,
            "bias": z[f"param/mlp/{position}/bias"],
        }
        for index, position in enumerate((0, 2, 4))
    }
    last = {
        "kernel": z["param/last_layer/weight_v"],
        "scale": z["param/last_layer/weight_g"],
    }
    return {"params": mlp}, {"params": last}


@pytest.mark.parametrize("learn_scale", [False, True])
def test_equals_dinos_head(golden, learn_scale):
    z = golden("dino_head")
    mlp, last = _dino_variables(z)
    np.testing.assert_array_equal(last["params"]["scale"], 1)
    if not learn_scale:
        del last["params"]["scale"]
    prototypes = Prototypes(20, "weight", learn_scale=learn_scale)

    @jax.jit
    def head(x):
        return prototypes.apply(last, DINO_MLP.apply(mlp, x, train=True))

    out, vjp = jax.vjp(head, z["x"])
    np.testing.assert_allclose(out, z["out"], rtol=2e-5, atol=2e-6)
    (gradient,) = vjp(jnp.asarray(z["u"]))
    atol = 1e-6 * np.abs(z["grad_x"]).max()
    np.testing.assert_allclose(gradient, z["grad_x"], rtol=2e-4, atol=atol)


def test_swavs_gradient_passes_the_normalization(key):
    x = normalize_rows(jax.random.normal(key, (7, 4)))
    cotangent = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    kernel = 3.0 * jax.random.normal(key, (3, 4))  # not of unit length

    def gradient(prototypes):
        def loss(kernel):
            return jnp.sum(
                cotangent * prototypes.apply({"params": {"kernel": kernel}}, x)
            )

        return jax.grad(loss)(kernel)

    straight = gradient(Prototypes(3))
    np.testing.assert_allclose(straight, cotangent.T @ x, rtol=1e-5, atol=1e-6)
    # That of weight normalization is orthogonal to each prototype, and 1 / ||v|| of it.
    unit = normalize_rows(kernel)
    length = jnp.linalg.norm(kernel, axis=1, keepdims=True)
    along = jnp.sum(straight * unit, axis=1, keepdims=True) * unit
    expected = (straight - along) / length
    weight = gradient(Prototypes(3, "weight"))
    np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "prototypes",
    [Prototypes(6), Prototypes(6, "weight"), Prototypes(6, "weight", learn_scale=True)],
    ids=str,
)
def test_scores_are_cosines_from_the_start(key, prototypes):
    x = 5 * jax.random.normal(key, (7, 4))
    scores, variables = prototypes.init_with_output(key, x)
    assert scores.shape == (7, 6) and scores.dtype == jnp.float32
    params = variables["params"]
    expected = normalize_rows(x) @ normalize_rows(params["kernel"]).T
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    again = prototypes.apply(variables, normalize_rows(x))
    np.testing.assert_allclose(again, scores, rtol=1e-5, atol=1e-6)
    if prototypes.normalization == "straight-through":
        length = jnp.linalg.norm(params["kernel"], axis=1)
        np.testing.assert_allclose(length, 1, rtol=1e-6)
    assert ("scale" in params) == prototypes.learn_scale


def test_a_learned_scale_multiplies_the_scores_of_its_prototype(key):
    prototypes = Prototypes(3, "weight", learn_scale=True)
    x = jax.random.normal(key, (7, 4))
    variables = prototypes.init(key, x)
    params = variables["params"]
    scaled = {**params, "scale": jnp.array([[1.0], [2.0], [-3.0]])}
    np.testing.assert_allclose(
        prototypes.apply({"params": scaled}, x),
        prototypes.apply(variables, x) * jnp.array([1.0, 2.0, -3.0]),
        rtol=1e-6,
    )


_length_and_gradient = jax.jit(
    lambda x, u: (
        jnp.linalg.norm(normalize_rows(x), axis=1),
        jax.grad(lambda x: jnp.sum(u * normalize_rows(x)))(x),
    )
)


@given(exponent=st.integers(-5, 37), seed=st.integers(0, 9))
def test_rows_get_unit_length(exponent, seed):
    x = np.random.default_rng(seed).normal(size=(5, 4))
    x = x / np.abs(x).max(axis=1, keepdims=True) * 10.0**exponent
    x[0] = [10.0**exponent, 0, 0, 0]
    u = np.random.default_rng(seed + 10).normal(size=(5, 4))
    length, gradient = _length_and_gradient(x.astype(np.float32), u.astype(np.float32))
    np.testing.assert_allclose(length, 1, rtol=1e-5)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    unit = x / norm
    expected = u - np.sum(u * unit, axis=1, keepdims=True) * unit
    np.testing.assert_allclose(gradient * norm, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-20, 1e-7])
def test_short_rows_stay_short_with_finite_gradients(value):
    x = np.full((5, 4), value, np.float32)
    length, gradient = _length_and_gradient(x, np.ones((5, 4), np.float32))
    assert (length <= 1).all()
    assert ((length > 0.9) == (value > 5e-7)).all()
    assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() < 2e6


def test_what_is_not_finite_stays_visible():
    x = np.ones((3, 4), np.float32)
    x[0, 1], x[1, 2] = np.nan, np.inf
    finite = np.isfinite(normalize_rows(x)).all(axis=1)
    np.testing.assert_array_equal(finite, [False, False, True])


def test_heads_have_what_they_say(key):
    x = jax.random.normal(key, (8, 4))

    def names(head):
        shapes = jax.eval_shape(lambda: head.init(key, x, train=True))["params"]
        return {module: set(leaves) for module, leaves in shapes.items()}

    assert names(MLPHead((5, 3), output_norm="scale")) == {
        "Dense_0": {"kernel", "bias"},
        "BatchNorm_0": {"scale", "bias"},
        "Dense_1": {"kernel", "bias"},
        "BatchNorm_1": {"scale"},
    }
    assert names(MLPHead((5, 3), hidden_norm=False, hidden_bias=False)) == {
        "Dense_0": {"kernel"},
        "Dense_1": {"kernel", "bias"},
    }


def test_moco_v2_has_relu_only(key):
    head = MLPHead((5, 3), hidden_norm=False)
    x = jax.random.normal(key, (8, 4))
    out, variables = head.init_with_output(key, x, train=True)
    params = variables["params"]
    first, second = params["Dense_0"], params["Dense_1"]
    hidden = np.maximum(x @ first["kernel"] + first["bias"], 0)
    expected = hidden @ second["kernel"] + second["bias"]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_linear_layers_begin_as_in_torch(key):
    x = jnp.zeros((2, 400))
    params = MLPHead((300, 200)).init(key, x, train=True)["params"]
    for layer, fan_in in ((params["Dense_0"], 400), (params["Dense_1"], 300)):
        limit = fan_in**-0.5
        for values in (layer["kernel"], layer["bias"]):
            assert 0.97 * limit < jnp.abs(values).max() <= limit
            np.testing.assert_allclose(jnp.std(values), limit / 3**0.5, rtol=0.1)
    head = MLPHead((300,), kernel_init="truncated_normal")
    layer = head.init(key, x, train=True)["params"]["Dense_0"]
    np.testing.assert_allclose(jnp.std(layer["kernel"]), 0.02, rtol=0.15)
    assert not jnp.any(layer["bias"])


def test_outputs_are_normalized_over_the_batch(key):
    head = MLPHead((5, 3), output_norm="scale")
    x = jax.random.normal(key, (16, 4))
    out, _ = head.init_with_output(key, x, train=True)
    chex.assert_trees_all_close(jnp.mean(out, axis=0), jnp.zeros(3), atol=1e-6)
    chex.assert_trees_all_close(jnp.std(out, axis=0), jnp.ones(3), atol=1e-3)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (MLPHead(()), "widths: got"),
        (MLPHead((4,), activation="tanh"), "activation: got 'tanh', expected one of"),
        (MLPHead((4,), output_norm="layer"), "output_norm: got 'layer'"),
        (MLPHead((4,), kernel_init="zeros"), "kernel_init: got 'zeros'"),
    ],
    ids=str,
)
def test_unknown_options_are_refused(key, head, message):
    with pytest.raises(ValueError, match=message):
        head.init(key, jnp.zeros((2, 3)), train=True)


@pytest.mark.parametrize(
    ("prototypes", "message"),
    [
        (Prototypes(0), "num_prototypes: got 0"),
        (Prototypes(4, "none"), "normalization: got 'none'"),
        (Prototypes(4, learn_scale=True), "learn_scale: got True"),
    ],
    ids=str,
)
def test_wrong_prototypes_are_refused(key, prototypes, message):
    with pytest.raises(ValueError, match=message):
        prototypes.init(key, jnp.zeros((2, 3)))


@pytest.mark.parametrize("widths", [(), (8, 0)])
def test_an_expander_needs_positive_widths(widths):
    with pytest.raises(ValueError, match="widths: got"):
        expander(widths)
