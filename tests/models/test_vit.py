"""The transformer against DINO's, with its weights, and what masks do to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jemjax.models import ViT, vit_base, vit_narrow, vit_small, vit_tiny

TINY = ViT(patch_size=4, image_size=16, width=12, depth=2, num_heads=2)


@functools.cache
def _compiled(model, train, num_kept, method):
    static = {"train": train, "method": method}
    if method is None:
        static["num_kept"] = num_kept
    return jax.jit(functools.partial(model.apply, **static))


def _apply(
    model, variables, images, *, train=False, num_kept=None, method=None, **arrays
):
    return _compiled(model, train, num_kept, method)(variables, images, **arrays)


def _shapes(model, **keywords):
    size = model.image_size
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    init = functools.partial(model.init, train=True, **keywords)
    return jax.eval_shape(init, jax.random.key(0), images)


def _random_variables(model):
    """Parameters that are far from symmetric, so that tokens differ visibly."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype),
        _shapes(model),
    )


def _linear(z, path):
    return {"kernel": z[f"{path}/weight"].T, "bias": z[f"{path}/bias"]}


def _norm(z, path):
    return {"scale": z[f"{path}/weight"], "bias": z[f"{path}/bias"]}


@pytest.fixture
def dino(golden):
    """DINO's tiny transformer, its parameters, and the golden file."""
    z = golden("dino_vit_tiny")
    patch_size, width = int(z["patch_size"]), z["param/cls_token"].shape[-1]
    model = ViT(
        patch_size=patch_size,
        image_size=z["x"].shape[-1],
        width=width,
        depth=int(z["depth"]),
        num_heads=int(z["num_heads"]),
        mlp_ratio=float(z["mlp_ratio"]),
    )
    kernel = z["param/patch_embed/proj/weight"].transpose(2, 3, 1, 0)
    params = {
        "class_token": z["param/cls_token"][0],
        "mask_token": np.zeros((1, width), np.float32),
        "position_embedding": z["param/pos_embed"][0],
        "patch_embedding": {
            "kernel": kernel.reshape(-1, width),
            "bias": z["param/patch_embed/proj/bias"],
        },
        "norm": _norm(z, "param/norm"),
    }
    for index in range(model.depth):
        block = f"param/blocks/{index}"
        params[f"blocks_{index}"] = {
            "attention_norm": _norm(z, f"{block}/norm1"),
            "qkv": _linear(z, f"{block}/attn/qkv"),
            "attention_output": _linear(z, f"{block}/attn/proj"),
            "mlp_norm": _norm(z, f"{block}/norm2"),
            "hidden": _linear(z, f"{block}/mlp/fc1"),
            "mlp_output": _linear(z, f"{block}/mlp/fc2"),
        }
    return model, {"params": params}, z


def test_equals_dinos(dino):
    model, variables, z = dino
    x = z["x"].transpose(0, 2, 3, 1)
    features = _apply(model, variables, x)
    np.testing.assert_allclose(features, z["cls"], rtol=1e-4, atol=1e-5)
    final, layers = _apply(model, variables, x, method="tokens")
    assert layers.shape == (model.depth, *final.shape)
    norm = variables["params"]["norm"]
    centered = layers - layers.mean(-1, keepdims=True)
    std = np.sqrt(np.square(centered).mean(-1, keepdims=True) + z["ln_eps"])
    normed = centered / std * norm["scale"] + norm["bias"]
    golden = z["tokens_last2"][:, :, 1:]
    np.testing.assert_allclose(normed, golden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(final, golden[-1], rtol=1e-4, atol=1e-5)
    mean = _apply(model.clone(pooling="mean"), variables, x)
    np.testing.assert_allclose(mean, golden[-1].mean(1), rtol=1e-4, atol=1e-5)


def test_local_crops_are_close_to_dinos(dino):
    # Another cubic kernel and no offset of 0.1: close, not equal.
    model, variables, z = dino
    local = z["xl"].transpose(0, 2, 3, 1)
    features = _apply(model, variables, local)
    assert np.abs(features - z["cls_local"]).max() < 0.1 * np.std(z["cls_local"])


@pytest.mark.parametrize(
    ("constructor", "parameters"),
    # Published, 5.5, 21.7 and 85.8 million, and our mask token.
    [
        (vit_tiny, 5_524_416 + 192),
        (vit_small, 21_665_664 + 384),
        (vit_base, 85_798_656 + 768),
    ],
)
def test_parameters_of_the_published_networks(constructor, parameters):
    model = constructor(patch_size=16, image_size=224)
    params = _shapes(model)["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == parameters
    assert model.num_features == params["norm"]["scale"].size


@pytest.fixture(scope="module")
def variables():
    return _random_variables(TINY)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(1)
    return rng.normal(size=(3, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def mask():
    return np.arange(48).reshape(3, 16) % 4 != 1  # 4 of 16 patches left


def _with_masked_pixels(images, mask, value):
    pixels = mask.reshape(-1, 4, 4, 1).repeat(4, axis=1).repeat(4, axis=2)
    return np.where(pixels, value, images).astype(np.float32)


@pytest.mark.parametrize("num_kept", [None, 4])
def test_what_is_masked_has_no_influence(variables, images, mask, num_kept):
    apply = functools.partial(_apply, TINY, variables, mask=mask, num_kept=num_kept)
    features = apply(images)
    other = _with_masked_pixels(images, mask, 7.0)
    np.testing.assert_array_equal(features, apply(other))
    changed = _with_masked_pixels(images, ~mask, 7.0)
    assert (jnp.abs(features - apply(changed)).max(axis=1) > 1e-3).all()


def test_masked_patches_get_the_mask_token(variables, images, mask):
    params = variables["params"]
    # A patch of which the pixels give the mask token by themselves.
    kernel, bias = (
        params["patch_embedding"]["kernel"],
        params["patch_embedding"]["bias"],
    )
    pixels = np.linalg.lstsq(kernel.T, (params["mask_token"] - bias)[0])[0]
    patch = np.tile(pixels.reshape(4, 4, 3), (4, 4, 1))
    expected = _apply(TINY, variables, _with_masked_pixels(images, mask, patch))
    features = _apply(TINY, variables, images, mask=mask)
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4)
    final, _ = _apply(TINY, variables, images, mask=mask, method="tokens")
    unmasked, _ = _apply(TINY, variables, images, method="tokens")
    assert (jnp.abs(final - unmasked).max(axis=-1) > 1e-4).all()  # attention mixes


def test_dropped_tokens_are_not_computed(variables, images, mask):
    """The features are those of a network without attention to masked tokens."""

    def cost(num_kept):
        compiled = _compiled(TINY, False, num_kept, None)
        lowered = compiled.lower(variables, images, mask=mask)
        return lowered.cost_analysis()["flops"]

    assert cost(4) < 0.5 * cost(None)
    # All are kept: as without a mask, in the order of the mask, which does not matter.
    kept = _apply(TINY, variables, images, mask=mask, num_kept=16)
    whole = _apply(TINY, variables, images)
    np.testing.assert_allclose(kept, whole, rtol=1e-4, atol=1e-5)


def test_too_few_or_too_many_unmasked_tokens(variables, images):
    """The first are kept, whatever their number: shapes are static."""
    mask = np.zeros((3, 16), bool)
    first = _apply(TINY, variables, images, mask=mask, num_kept=4)
    only_first = np.arange(16) >= np.full((3, 1), 4)
    expected = _apply(TINY, variables, images, mask=only_first, num_kept=4)
    np.testing.assert_array_equal(first, expected)
    two = np.arange(16) >= np.full((3, 1), 2)  # then the first of the masked
    padded = _apply(TINY, variables, images, mask=two, num_kept=4)
    np.testing.assert_array_equal(padded, expected)


def test_positions_count_and_are_interpolated(variables, images):
    whole = _apply(TINY, variables, images)
    moved = _apply(TINY, variables, np.roll(images, 4, axis=1))
    assert jnp.abs(whole - moved).max() > 1e-3
    # Cubic weights between two pixels, without those beyond the border.
    half = np.array([[9, 9, -1, 0], [0, -1, 9, 9]], np.float32) / 17
    params = dict(variables["params"])
    class_position, positions = np.split(params["position_embedding"], [1])
    resized = np.einsum("yh,xw,hwd->yxd", half, half, positions.reshape(4, 4, -1))
    params["position_embedding"] = np.concatenate(
        [class_position, resized.reshape(4, -1)]
    )
    small = images[:, :8, :8]
    expected = _apply(TINY.clone(image_size=8), {"params": params}, small)
    features = _apply(TINY, variables, small)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    assert _apply(TINY, variables, images[:, :12]).shape == (3, 12)


def test_paths_are_dropped_in_training_with_keys_only(variables, images):
    model = TINY.clone(drop_path=0.5)
    apply = functools.partial(_apply, model)
    plain = _apply(TINY, variables, images)
    keys = jax.random.split(jax.random.key(0), 50 * len(images))
    for keywords in (
        {"train": True},
        {"train": False, "drop_keys": keys[: len(images)]},
    ):
        features = apply(variables, images, **keywords)
        np.testing.assert_allclose(features, plain, rtol=1e-5, atol=1e-6)
    # Of the last of two blocks both branches, the others never: four outcomes each.
    repeated = np.repeat(images, 50, axis=0)
    features = apply(variables, repeated, train=True, drop_keys=keys)
    rounded = np.asarray(features).reshape(3, 50, -1).round(4)
    outcomes = [len(np.unique(rows, axis=0)) for rows in rounded]
    assert outcomes == [4, 4, 4]
    # An example's draws are its key's, whatever the rest of the batch.
    part = apply(variables, repeated[30:90], train=True, drop_keys=keys[30:90])
    np.testing.assert_allclose(part, features[30:90], rtol=1e-4, atol=1e-5)


def test_dropping_a_path_keeps_the_mean():
    model = TINY.clone(drop_path=0.25)
    images = np.ones((4000, 16, 16, 3))
    # Only the attention branch of the last block adds anything: a constant.
    variables = jax.tree.map(np.zeros_like, _random_variables(model))
    variables["params"]["blocks_1"]["attention_output"]["bias"] += 1
    keys = jax.random.split(jax.random.key(0), len(images))
    _, layers = _apply(
        model, variables, images, train=True, drop_keys=keys, method="tokens"
    )
    added = np.asarray(layers[1, :, 0, 0])
    np.testing.assert_allclose(np.unique(added), [0, 4 / 3], rtol=1e-6)
    assert abs(added.mean() - 1) < 4 * (4 / 3) * np.sqrt(0.25 * 0.75 / 4000)


def test_initial_values(key, images):
    model = TINY.clone(depth=1, layer_scale=1e-4)
    params = jax.jit(functools.partial(model.init, train=True))(key, images)["params"]
    block = params["blocks_0"]
    for kernel in (block["qkv"]["kernel"], params["position_embedding"]):
        np.testing.assert_allclose(jnp.std(kernel), 0.02, rtol=0.15)
        assert jnp.abs(kernel).max() < 0.05  # cut off at two standard deviations
    for name in ("attention_scale", "mlp_scale"):
        np.testing.assert_array_equal(block[name], np.full(12, 1e-4, np.float32))


def test_blocks_of_a_narrow_network_begin_by_their_width(key):
    model = vit_narrow(patch_size=2, image_size=8, depth=1)
    init = jax.jit(functools.partial(model.init, train=True))
    block = init(key, jnp.zeros((1, 8, 8, 3)))["params"]["blocks_0"]
    for name, fan_in in (("qkv", 96), ("mlp_output", 384)):
        np.testing.assert_allclose(jnp.std(block[name]["kernel"]), fan_in**-0.5, 0.05)


def test_layer_scale_multiplies_branches(images):
    model = TINY.clone(layer_scale=1e-4)
    variables = _random_variables(model)
    for block in ("blocks_0", "blocks_1"):
        for name in ("attention_scale", "mlp_scale"):
            variables["params"][block][name] *= 1e-4
    _, layers = _apply(model, variables, images, method="tokens")
    assert 0 < jnp.abs(layers[1] - layers[0]).max() < 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(variables, images, dtype):
    model = TINY.clone(dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(_shapes(model))} == {jnp.dtype("float32")}
    features = _apply(model, variables, images)
    assert features.dtype == jnp.float32
    reference = _apply(TINY, variables, images)
    np.testing.assert_allclose(features, reference, atol=0.1)
    tokens = _apply(model, variables, images, method="tokens")
    assert {x.dtype for x in tokens} == {jnp.dtype("float32")}
    if dtype == jnp.bfloat16:
        lowered = _compiled(model, False, None, None).lower(variables, images)
        lines = lowered.as_text().splitlines()
        products = [line for line in lines if "dot_general" in line]
        assert products and all("bf16" in line for line in products)


def test_the_parameters_do_not_depend_on_the_call():
    mask = jnp.zeros((2, 16), bool)
    shapes = _shapes(TINY)
    assert _shapes(TINY, mask=mask) == shapes
    assert _shapes(TINY, mask=mask, num_kept=4) == shapes
    assert _shapes(TINY, mask=mask, method="tokens") == shapes


IMAGES = jnp.zeros((2, 16, 16, 3))
MASK = jnp.zeros((2, 16), bool)


@pytest.mark.parametrize(
    ("changes", "images", "keywords", "message"),
    [
        ({}, jnp.zeros((2, 16, 18, 3)), {}, "images: got 16 x 18 pixels"),
        ({}, jnp.zeros((16, 16, 3)), {}, "images: got float32 of shape"),
        ({}, jnp.zeros((2, 16, 16, 3), jnp.uint8), {}, "images: got uint8"),
        ({}, IMAGES, {"mask": MASK[:, 1:]}, "mask: got bool of shape"),
        ({}, IMAGES, {"mask": MASK[:1]}, "mask: got bool of shape"),
        ({}, IMAGES, {"mask": MASK.astype(int)}, "mask: got int"),
        ({}, IMAGES, {"num_kept": 4}, "num_kept: got 4 without a mask"),
        (
            {},
            IMAGES,
            {"num_kept": 0, "mask": MASK},
            "num_kept: got 0, expected 1 to 16",
        ),
        ({}, IMAGES, {"num_kept": 17, "mask": MASK}, "num_kept: got 17"),
        ({"image_size": 18}, IMAGES, {}, "image_size: got 18, expected a multiple"),
        ({"num_heads": 5}, IMAGES, {}, "width: got 12, expected a multiple"),
        ({"drop_path": 1.0}, IMAGES, {}, "drop_path: got 1.0"),
        ({"pooling": "max"}, IMAGES, {}, "pooling: got 'max'"),
        ({"kernel_init": "small"}, IMAGES, {}, "kernel_init: got 'small'"),
        ({"patch_size": 0}, IMAGES, {}, "patch_size: got 0"),
        ({"depth": 0}, IMAGES, {}, "depth: got 0"),
    ],
)
def test_refusals(key, changes, images, keywords, message):
    init = functools.partial(TINY.clone(**changes).init, train=True, **keywords)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(init, key, images)
