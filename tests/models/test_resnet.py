import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jemjax.models import resnet18, resnet34, resnet50, resnet_narrow
from jemjax.models.resnet import BasicBlock, Bottleneck, ResNet


def _shapes(model, size=64):
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    init = functools.partial(model.init, train=True)
    return jax.eval_shape(init, jax.random.key(0), images)


@pytest.mark.parametrize(
    ("constructor", "parameters", "features"),
    [
        (resnet18, 11_176_512, 512),
        (resnet34, 21_284_672, 512),
        (resnet50, 23_508_032, 2048),
    ],
)
def test_parameters_of_the_published_networks(constructor, parameters, features):
    model = constructor()
    params = _shapes(model)["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == parameters
    assert model.num_features == features


@pytest.mark.parametrize("stem", ["imagenet", "small", "patch"])
@pytest.mark.parametrize("size", [16, 25, 31, 96])
def test_tokens_are_the_positions_before_the_mean(stem, size):
    model = ResNet((1, 1), BasicBlock, width=4, stem=stem)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)

    def tokens(images):
        call = functools.partial(model.init_with_output, jax.random.key(0), train=True)
        return call(images, method="tokens")[0]

    final, layers = jax.eval_shape(tokens, images)
    grid = model.grid(size)
    assert final.shape == (2, grid * grid, 8) and layers.shape == (1, *final.shape)
    assert final.dtype == layers.dtype == jnp.float32


def test_stems_differ_in_resolution(key):
    kernels = {}
    for stem in ("imagenet", "small", "patch"):
        model = ResNet((1,), BasicBlock, width=4, stem=stem)
        kernels[stem] = _shapes(model)["params"]["Conv_0"]["kernel"].shape
    assert kernels == {
        "imagenet": (7, 7, 3, 4),
        "small": (3, 3, 3, 4),
        "patch": (2, 2, 3, 4),
    }


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_residual_branches_start_at_zero(key, block):
    module = block(width=4 // block.expansion, stride=1, dtype=jnp.float32)
    x = jax.random.normal(key, (2, 4, 4, 4))
    y, _ = module.init_with_output(key, x, train=True)
    np.testing.assert_array_equal(y, jax.nn.relu(x))
    # But in the narrow network, which has three blocks and little time.
    y, _ = module.clone(zero_init=False).init_with_output(key, x, train=True)
    assert np.abs(y - jax.nn.relu(x)).max() > 0.1
    assert not resnet_narrow().zero_init


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_and_statistics_are_float32(key, dtype):
    model = ResNet((1, 1), BasicBlock, width=4, stem="small", dtype=dtype)
    images = jax.random.normal(key, (4, 8, 8, 3))
    features, variables = model.init_with_output(key, images, train=True)
    assert features.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_evaluation_changes_nothing_and_uses_the_running_statistics(key):
    model = ResNet((1,), BasicBlock, width=4, stem="small")
    images = jax.random.normal(key, (4, 8, 8, 3))
    variables = model.init(key, images, train=True)
    alone = model.apply(variables, images[:1], train=False)
    together = model.apply(variables, images, train=False)
    np.testing.assert_allclose(alone, together[:1], rtol=1e-5, atol=1e-6)
    final, _ = model.apply(variables, images, train=False, method="tokens")
    np.testing.assert_allclose(final.mean(axis=1), together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "images", [jnp.zeros((2, 8, 8, 3), jnp.uint8), jnp.zeros((8, 8, 3))], ids=str
)
def test_integers_and_wrong_ranks_are_refused(key, images):
    model = ResNet((1,), BasicBlock, width=4, stem="small")
    with pytest.raises(ValueError, match="images: got"):
        model.init(key, images, train=True)


def test_unknown_stems_are_refused(key):
    with pytest.raises(ValueError, match="stem: got 'large'"):
        ResNet((1,), BasicBlock, stem="large").init(
            key, jnp.zeros((1, 8, 8, 3)), train=True
        )
