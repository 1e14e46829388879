"""The proof kit passes a loss that is right, and names what is wrong with others."""

import functools
import importlib
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jemjax import losses
from jemjax.testing import assert_device_invariant, assert_loss_contract

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "testing.md"
SOURCE = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
SHAPES = [(16, 8), (16, 8)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _forgets_to_psum(total, axis_name):
    """The mean over the shards; the rule of pmean is a psum of cotangent / devices."""
    return total if axis_name is None else jax.lax.pmean(total, axis_name)


_forgets_to_psum.defvjp(
    lambda total, axis_name: (_forgets_to_psum(total, axis_name), None),
    lambda axis_name, _, cotangent: (
        cotangent / (1 if axis_name is None else jax.lax.axis_size(axis_name)),
    ),
)


@functools.partial(jax.custom_jvp)
def _scaled(x, scale):
    return x * scale


@functools.partial(_scaled.defjvp, symbolic_zeros=True)
def _scaled_jvp(primals, tangents):
    """Its zeros are not known to vary over a mesh's axes, as the arrays do."""
    made = [
        jnp.zeros(primal.shape, primal.dtype)
        if isinstance(tangent, jax.custom_derivatives.SymbolicZero)
        else tangent
        for primal, tangent in zip(primals, tangents, strict=True)
    ]
    return jax.jvp(_scaled.fun, primals, tuple(made))


def _example(replaced):
    """The page's example and its tests, with parts of the text replaced."""
    source = SOURCE
    for old, new in replaced.items():
        assert old in source
        source = source.replace(old, new)
    names = {"_forgets_to_psum": _forgets_to_psum, "_scaled": _scaled}
    exec(source, names)
    return names


def _arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("test", ["test_its_contract", "test_any_number_of_devices"])
def test_the_example_passes(test):
    _example({})[test]()


def test_the_page_shows_a_failure_as_it_is():
    shown = re.search(r"AssertionError: (.*?)\n```", PAGE.read_text(), re.DOTALL)[1]
    test = _example({PMEAN: PMEAN.replace("pmean", "psum")})[
        "test_any_number_of_devices"
    ]
    with pytest.raises(AssertionError) as failure:
        test()

    def words(text):
        return re.sub(r"\d+\.\d+", "number", text).split()

    assert words(str(failure.value)) == words(shown)


PMEAN = "jax.lax.pmean(local, axis_name)"
LAST = "mean(jnp.mean(jnp.square(x - y), axis=1)) + constant"
SQUARES = "jnp.mean(jnp.square(x - y), axis=1)"
CONSTANT = "jax.lax.stop_gradient(1 + x[:, 0])"
UNCHECKED = "shard_map of grad, unchecked"
OF_THE_PARAMETER = "gradient of the parameter: .*"

# What replaces what in the example, a context that shows it, and what is said.
DEVICE_FAULTS = {
    "mean of a shard": (
        {PMEAN: "local"},
        UNCHECKED,
        "value: got .* Each shard has another value",
    ),
    "mean of a shard, checked": (
        {PMEAN: "local"},
        "grad of shard_map",
        "the loss cannot be run: .* does not end in a reduction",
    ),
    "no reduction at the end": (
        {LAST: "jnp.mean(jnp.square(x - y)) + constant"},
        "vmap",
        "value: got .* Each shard has another value: .* does not end in a reduction",
    ),
    "rows are gathered, no reduction at the end": (
        {PMEAN: "jnp.mean(jax.lax.all_gather(local, axis_name), axis=0)"},
        "shard_map of grad",
        OF_THE_PARAMETER + " 8 times .* does not end in a reduction",
    ),
    "the mean is a constant": (
        {PMEAN: f"local + jax.lax.stop_gradient({PMEAN} - local)"},
        UNCHECKED,
        OF_THE_PARAMETER + " left out of the differentiation",
    ),
    "the size of a shard": (
        {PMEAN: "jax.lax.psum(local, axis_name)"},
        "pmap",
        "value: got .* one shard's rows, where the global batch's is meant",
    ),
    "custom_vjp without psum": (
        {LAST: f"_forgets_to_psum({LAST}, axis_name)"},
        UNCHECKED,
        OF_THE_PARAMETER + " 0.125 times .* custom_vjp that forgets to psum",
    ),
    "as many shards as devices": (
        {PMEAN: "jax.lax.psum(local, axis_name) / jax.device_count()"},
        "grad of shard_map, three axes",
        "value: got .*",
    ),
    **{
        f"zeros of its own in a rule, {through}": (
            {LAST: f"mean(_scaled({SQUARES}, {CONSTANT})) + constant"},
            through,
            "the loss cannot be run: ",
        )
        for through in (
            "shard_map of grad of jit",
            "shard_map of grad of scan",
            "grad of shard_map of checkpoint",
        )
    },
    "the index of a shard": (
        {PMEAN: "jax.lax.pmean(local, axis_name) + jax.lax.axis_index(axis_name)"},
        "vmap",
        "value: got .* Each shard has another value: .* depends on the shard's index",
    ),
}


@pytest.mark.parametrize("fault", DEVICE_FAULTS)
def test_faults_on_devices(fault):
    replaced, context, message = DEVICE_FAULTS[fault]
    loss = _example(replaced)["agree_and_vary"]
    with pytest.raises(AssertionError, match=f"^{context} on 8 devices: {message}"):
        assert_device_invariant(loss, *_arrays(*SHAPES), contexts=context, devices=8)


CAST = "a.astype(jnp.promote_types(a.dtype, jnp.float32))"
HINGE = "jax.nn.relu(1 - jnp.sqrt(v + 1e-4))"

CONTRACT_FAULTS = {
    "root of zero": (
        {"v + 1e-4": "v"},
        "finite: .*zeros: gradient of array 0: got nan in 128 of 128",
    ),
    "the arrays' dtype": ({CAST: "a"}, "dtypes: bfloat16 arrays: got bfloat16"),
    "arithmetic in the arrays' dtype": (
        {CAST: "a", LAST: f"({LAST}).astype(jnp.float32)"},
        "dtypes: bfloat16 arrays: value: got .* float32 arithmetic",
    ),
    "no scalar": ({LAST: f"jnp.ones(2) * ({LAST})"}, r"dtypes: .* of shape \(2,\)"),
    "a hidden NaN": (
        {LAST: f"jnp.nan_to_num({LAST})"},
        "not hidden: nan in array 0: value: got 0",
    ),
    "the first row": (
        {LAST: f"{LAST} + 0.1 * jnp.mean(x[0])"},
        "permutation: the rows reversed: value: got",
    ),
    "agreement only": (
        {LAST: LAST.removesuffix(" + constant")},
        "collapse: every entry 0.0: value: got 0, .* say collapsed=0",
    ),
    "collapse is left out": (
        {HINGE: f"jnp.where(v == 0, 0, {HINGE})"},
        "collapse: every entry 0.0: value: got 0, .* does not see collapse",
    ),
    "twice the gradient": (
        {LAST: f"2 * ({LAST}) - jax.lax.stop_gradient({LAST})"},
        "numerical gradients: random rows: gradient of array 0",
    ),
    "twice the gradient, in float32": (
        {
            CAST: "a.astype(jnp.float32)",
            LAST: f"2 * ({LAST}) - jax.lax.stop_gradient({LAST})",
        },
        "numerical gradients: random rows: gradient of array 0",
    ),
    "a term without a gradient": (
        {"square(x - y)": "square(x - jax.lax.stop_gradient(y))"},
        "numerical gradients: random rows: gradient of array 1",
    ),
    "a side without a gradient": (
        {"for a in (x, y))": "for a in (x, jax.lax.stop_gradient(y)))"},
        r"gradients: array 1 gets no gradient, .* say constants=\(1,\)",
    ),
    "a quotient of infinities": (
        {HINGE: "(v + 1) ** 3 / (v + 1) ** 4"},
        "finite: largest: value: got nan",
    ),
}


@pytest.mark.parametrize("fault", CONTRACT_FAULTS)
def test_faults_in_the_contract(fault):
    replaced, message = CONTRACT_FAULTS[fault]
    loss = _example(replaced)["agree_and_vary"]
    with pytest.raises(AssertionError, match="^" + message):
        assert_loss_contract(loss, SHAPES)


def test_a_loss_says_what_it_differs_in():
    def regression(prediction, target):
        return jnp.mean(jnp.square(prediction - jax.lax.stop_gradient(target)))

    def float32(prediction, target):
        return regression(prediction.astype(jnp.float32), target.astype(jnp.float32))

    assert_loss_contract(float32, SHAPES, constants=(1,), collapsed=0.0)
    with pytest.raises(AssertionError, match="every entry 0.1: .* collapsed=1$"):
        assert_loss_contract(float32, SHAPES, constants=(1,), collapsed=1.0)
    with pytest.raises(AssertionError, match="array 0 gets a gradient of up to"):
        assert_loss_contract(float32, SHAPES, constants=(0, 1), collapsed=0.0)
    with pytest.raises(ValueError, match="constants: got .* of the 2 arrays"):
        assert_loss_contract(float32, SHAPES, constants=(2,), collapsed=0.0)


def test_one_array_has_one_shape():
    assert_loss_contract(losses.variance_hinge, (16, 8))


def test_labels_are_sharded_and_a_center_is_not():
    labels = np.arange(16) % 3
    views, center = _arrays((2, 16, 5), (5,))

    def loss(views, labels, center, axis_name=None):
        logits = jax.nn.log_softmax(views - center)
        chosen = jnp.take_along_axis(logits, labels[None, :, None], axis=2)
        local = -jnp.mean(chosen)
        return local if axis_name is None else jax.lax.pmean(local, axis_name)

    arrays = (views, labels, center)
    for context in ("shard_map of grad, unchecked", "grad of shard_map", "vmap"):
        assert_device_invariant(
            loss, *arrays, batch_axes=(1, 0, None), contexts=context, devices=8
        )

    def without_a_gradient(views, labels, center, axis_name=None):
        if axis_name is not None:
            center = jax.lax.stop_gradient(center)
        return loss(views, labels, center, axis_name)

    with pytest.raises(AssertionError, match="gradient of array 2: got 0, expected"):
        assert_device_invariant(
            without_a_gradient,
            *arrays,
            batch_axes=(1, 0, None),
            contexts="vmap",
            devices=8,
        )


def test_devices_that_do_not_exist():
    loss = _example({})["agree_and_vary"]
    arrays = _arrays((16, 3), (16, 3))
    assert_device_invariant(loss, *arrays, contexts="vmap", devices=16)
    with pytest.raises(RuntimeError, match=r"16 devices .* has 8.*num_cpu_devices"):
        assert_device_invariant(loss, *arrays, devices=16)
    with pytest.raises(ValueError, match="devices: got 6, expected .* batch of 16"):
        assert_device_invariant(loss, *arrays, devices=6)
    with pytest.raises(ValueError, match="arrays: got a batch of 15, expected an even"):
        assert_device_invariant(loss, *_arrays((15, 3), (15, 3)))
    with pytest.raises(ValueError, match=r"arrays: got batches of \[8, 16\]"):
        assert_device_invariant(loss, *_arrays((16, 3), (8, 3)))
    with pytest.raises(ValueError, match="contexts: got 'tpu', expected some of"):
        assert_device_invariant(loss, *arrays, contexts=("vmap", "tpu"))


def test_without_hypothesis(monkeypatch):
    monkeypatch.delitem(sys.modules, "jemjax.testing")
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jemjax\[testing\]'"):
        importlib.import_module("jemjax.testing")
