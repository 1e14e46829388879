"""The same step on any number of devices, in parts, and with sharded parameters."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.setups import (
    BATCH,
    HEADLESS,
    SIZE,
    TINY,
    Setup,
    every_method,
    setup_of,
    setup_without_batch_norm,
    tiny_method,
)

from jemjax import wire
from jemjax.augment import (
    MaskRecipe,
    byol_small,
    make_masks,
    make_views,
    random_boxes,
    random_patch_mask,
)
from jemjax.augment.color import JITTER_DRAWS, random_jitter
from jemjax.augment.inputs import example_keys, uniforms
from jemjax.evaluation import normalized_std
from jemjax.methods import VICReg
from jemjax.models import ViT
from jemjax.runtime import quick_compilation
from jemjax.training.step import sharding
from jemjax.training.step.branch import Branches, Statistics
from jemjax.training.step.sharding import batch_sharding, make_mesh, to_devices
from jemjax.training.step.state import Skipped
from jemjax.training.storage.checkpoints import Checkpoints, fingerprint

METHODS = every_method()


def _slow(*names):
    """Parameters of a test that are left to those who run the slow ones."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def _paths(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


# Biases before a normalization, or a loss that subtracts the mean: their exact gradient
# is zero, and what is left of it is rounding, which the optimizers scale up. So is the
# mean of what is made, without a bias, of centered numbers.
ROUNDING = {
    "vicreg": ["projector/Dense_0/bias"],
    "swav": ["projector/Dense_0/bias"],
    "byol": ["projector/Dense_0/bias", "predictor/Dense_0/bias"],
    "dino": ["projector/Dense_0/bias", "projector/Dense_1/bias"],
    "simsiam": ["predictor/BatchNorm_0/mean"],
    "moco-v3": ["predictor/BatchNorm_0/mean"],
}
# Of the attention's biases those of the keys: a softmax does not see them.
ATTENTION = ["backbone/blocks_0/qkv/bias", "backbone/blocks_1/qkv/bias"]
ROUNDING_WITHOUT_HEADS = {
    "vicreg": ["backbone/norm/bias"],
    "barlow-twins": ["backbone/norm/bias"],
    "dino": ATTENTION,
    "moco-v3": ATTENTION,
}


FIELDS = ("params", "batch_stats", "target_params", "target_batch_stats", "loss_state")


def _check_same(run, other, rounding=()):
    """Losses to 1e-5 and states, but what is rounding, to 1e-4."""
    (losses, state), (other_losses, other_state) = run, other
    # Of the largest: a mean of cosines may be nearly zero.
    largest = np.abs(losses).max()
    np.testing.assert_allclose(other_losses, losses, rtol=0, atol=1e-5 * largest)
    for field in FIELDS:
        others = _paths(getattr(other_state, field))
        for path, leaf in _paths(getattr(state, field)).items():
            if path in rounding:
                continue
            difference = np.linalg.norm(others[path] - leaf)
            assert difference <= 1e-4 * np.linalg.norm(leaf), (field, path)


@pytest.mark.parametrize("name", [*_slow("vicreg", "swav"), "dino", "moco"])
def test_one_and_eight_devices_take_the_same_steps(name):
    # Past the first epoch, in which prototypes stand still and the queue is not used.
    _check_same(setup_of(name).run(8), setup_of(name, 8).run(8), ROUNDING.get(name, ()))


@functools.cache
def _twenty_steps(name):
    return Setup(tiny_method(name)).run(20)


@pytest.mark.slow
@METHODS
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_any_number_of_devices_takes_the_same_twenty_steps(name, devices):
    # Not kept: a process that holds very many programs is ended by XLA.
    other = Setup(tiny_method(name), devices).run(20)
    _check_same(_twenty_steps(name), other, ROUNDING.get(name, ()))


def _draws(keys):
    """Everything that is drawn for views and masks, by one key for each example."""
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    return {
        "boxes": random_boxes(keys, len(keys), (32, 24), scale=(0.08, 1.0)),
        "factors, order, place": random_jitter(
            uniforms(keys, JITTER_DRAWS), probability=0.8, **jitter
        ),
        "chances": uniforms(keys, 5),
        "patches": random_patch_mask(keys, len(keys), 64, ratio=0.6),
        "blocks": make_masks(keys, len(keys), 8, MaskRecipe("block", 0.6)),
        "permutations": jax.vmap(lambda key: jax.random.permutation(key, 9))(keys),
    }


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_draws_are_the_same_bit_for_bit_on_any_number_of_devices(key, devices):
    keys = jax.random.split(key, 64)
    draw = jax.jit(_draws, compiler_options=quick_compilation())
    one = draw(jax.device_put(keys, batch_sharding(make_mesh(1))))
    many = draw(jax.device_put(keys, batch_sharding(make_mesh(devices))))
    jax.tree.map(np.testing.assert_array_equal, many, one)


def test_the_views_do_not_depend_on_the_number_of_devices(key):
    images = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)
    views = jax.jit(lambda images: make_views(key, images, byol_small(SIZE)))
    one, eight = (views(to_devices(images, make_mesh(devices))) for devices in (1, 8))
    for view, other in zip(one, eight, strict=True):
        np.testing.assert_allclose(other, view, atol=1e-6)


def _check_parts(name, devices, parts):
    whole = setup_without_batch_norm(name)
    split = setup_without_batch_norm(name, devices, accumulate=parts)
    _check_same(whole.run(6), split.run(6), ROUNDING_WITHOUT_HEADS.get(name, ()))
    _, of_whole = whole.steps(whole.init(), [0])
    _, of_split = split.steps(split.init(), [0])
    for metric, value in of_whole[0].items():
        np.testing.assert_allclose(of_split[0][metric], value, rtol=2e-5)


# A statistic of the batch, a queue that is balanced with it, and masked patches.
@pytest.mark.parametrize("name", ["vicreg", *_slow("swav", "data2vec")])
def test_a_batch_in_parts_has_the_loss_and_gradient_of_the_whole(name):
    _check_parts(name, 2, 4)


@pytest.mark.slow
@METHODS
@pytest.mark.parametrize(("devices", "parts"), [(1, 2), (1, 16), (8, 2)])
def test_every_method_may_see_its_batch_in_parts(name, devices, parts):
    _check_parts(name, devices, parts)


def test_crops_of_the_loader_are_images_that_the_device_need_not_crop():
    recipe = byol_small(SIZE).without("crop")  # whole images of a view's size
    of_images = Setup(tiny_method("vicreg"), recipe=recipe, accumulate=2)
    of_crops = Setup(tiny_method("vicreg"), 8, recipe=recipe, accumulate=2)
    images = of_crops.images
    of_crops.images = lambda step: (images(step), images(step))
    _check_same(of_images.run(4), of_crops.run(4), ROUNDING["vicreg"])


def test_the_mean_over_parts_would_be_another_loss(key):
    x, y = jax.random.normal(key, (2, BATCH, 12))
    whole, _ = VICReg().loss((x, y))
    parts = [VICReg().loss((x[part::4], y[part::4]))[0] for part in range(4)]
    assert abs(np.mean(parts) - whole) > 0.1 * whole


@pytest.mark.slow
def test_batch_normalization_sees_the_parts_on_any_number_of_devices():
    one, eight = (setup_of("vicreg", n, accumulate=2) for n in (1, 8))
    _check_same(one.run(4), eight.run(4), ROUNDING["vicreg"])
    # The running mean of the first normalization moved twice, once by each part.
    state = one.init()
    keys = example_keys(jax.random.fold_in(state.key, 0), BATCH)
    images, statistics = one.images(0), Statistics(state.batch_stats, {})
    branches = Branches(one.method, one.network, one.recipe)
    for part in (slice(0, None, 2), slice(1, None, 2)):
        view_keys = jax.vmap(lambda key: jax.random.split(key, 3)[0])(keys[part])
        views = make_views(view_keys, images[part], one.recipe)
        statistics, _ = branches.embed(state.params, {}, statistics, views, {}, None)
    after, _ = one.steps(state, [0])
    for path, leaf in _paths(after.batch_stats).items():
        expected = _paths(statistics.online)[path]
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6)


def test_parts_take_the_memory_of_one():
    method = tiny_method("vicreg", **HEADLESS)
    backbone = ViT(patch_size=2, image_size=SIZE, width=96, depth=4, num_heads=2)
    temporary = [
        Setup(method, backbone=backbone, accumulate=parts)
        .compiled.memory_analysis()
        .temp_size_in_bytes
        for parts in (1, 4)
    ]
    assert temporary[1] < 0.35 * temporary[0]


def test_sharded_parameters_take_the_same_steps_in_less_memory():
    wide = {"projector": (64, 256)}
    whole, sharded = setup_of("byol", 8, **wide), setup_of("byol", 8, fsdp=4, **wide)
    _check_same(whole.run(4), sharded.run(4), ROUNDING["byol"])
    state = sharded.init()
    for tree in (state.params, state.target_params):
        kernel = tree["projector"]["Dense_1"]["kernel"]
        assert kernel.shape == (64, 256)
        assert kernel.addressable_shards[0].data.shape == (64, 64)

    def of_a_device(setup):
        analysis = setup.compiled.memory_analysis()
        assert analysis.alias_size_in_bytes > 0.9 * analysis.output_size_in_bytes
        return analysis.argument_size_in_bytes

    # Of the state; images and what is small stay as they are.
    state_bytes = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state.replace(key=None))
        for shard in leaf.addressable_shards[:1]
    )
    assert of_a_device(sharded) < 0.5 * of_a_device(whole)
    assert abs(of_a_device(sharded) - state_bytes) < 4096


@pytest.mark.slow
@METHODS
def test_sharded_parameters_take_the_same_twenty_steps(name, monkeypatch):
    monkeypatch.setattr(sharding, "MINIMUM_SHARDED", 1)
    sharded = Setup(tiny_method(name), 8, fsdp=4)
    spec = jax.tree.map(lambda x: x.sharding.spec, sharded.init().params)
    assert any("fsdp" in s for s in jax.tree.leaves(spec, is_leaf=_is_spec))
    _check_same(_twenty_steps(name), sharded.run(20), ROUNDING.get(name, ()))


def _is_spec(x):
    return isinstance(x, jax.P)


@pytest.mark.parametrize(
    ("shape", "fsdp", "expected"),
    [
        ((64, 256), 4, jax.P(None, "fsdp")),
        ((256, 64), 4, jax.P("fsdp")),
        ((3, 3, 64, 64), 8, jax.P(None, None, None, "fsdp")),
        ((100, 63), 4, jax.P("fsdp")),
        ((4096,), 2, jax.P("fsdp")),
        ((4095,), 2, jax.P()),
        ((101, 63), 4, jax.P()),
        ((64, 256), 1, jax.P()),
        ((), 4, jax.P()),
    ],
    ids=str,
)
def test_the_rule_by_which_parameters_are_sharded(shape, fsdp, expected):
    assert sharding.parameter_spec(shape, fsdp) == expected


def test_a_mesh_is_divided_without_rest():
    assert sharding.make_mesh(8, fsdp=2).shape == {"data": 4, "fsdp": 2}
    for fsdp in (0, 3):
        with pytest.raises(ValueError, match=f"fsdp: got {fsdp}, expected a divisor"):
            sharding.make_mesh(8, fsdp=fsdp)


@dataclasses.dataclass(frozen=True)
class _Chip:
    id: int
    process_index: int


def test_a_mesh_has_host_after_host_wherever_their_chips_are(monkeypatch):
    chips = [_Chip(number, number // 2 % 4) for number in range(16)]
    monkeypatch.setattr(sharding.jax, "devices", lambda: chips)
    monkeypatch.setattr(sharding, "Mesh", lambda devices, *_, **__: devices)
    for fsdp in (1, 4):
        hosts = [chip.process_index for chip in sharding.make_mesh(fsdp=fsdp).flat]
        assert hosts == sorted(hosts)


# MoCo has a queue and a target: all that a state can hold.
@pytest.mark.parametrize(
    ("devices", "fsdp"), [(1, 1), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_a_checkpoint_of_eight_devices_continues_on_fewer(devices, fsdp, tmp_path):
    eight, fewer = setup_of("moco", 8), setup_of("moco", devices, fsdp=fsdp)
    undisturbed = setup_of("moco").run(8)
    state, before = eight.steps(eight.init(), range(6))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(6, state)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(fewer.init())
    assert restored is not None
    state, after = fewer.steps(restored, range(6, 8))
    resumed = [float(metrics["loss"]) for metrics in before + after]
    _check_same(undisturbed, (resumed, jax.device_get(state.replace(key=None))))


def test_the_compiled_step_holds_the_collectives_of_the_loss():
    setup = setup_of("vicreg", 8)
    lowered = setup.lower()
    text = setup.compiled.as_text()
    assert "all-to-all" in text  # rows for features: 48 features, a batch of 16
    assert f"f32[{BATCH},{BATCH}]" in text  # the summed matrix of the examples
    reduced = [line for line in text.splitlines() if " all-reduce(" in line]
    assert reduced and not [line for line in reduced if "f32[48,48]" in line]
    text = lowered.as_text()
    assert "all_to_all" in text and "all_reduce" in text


def test_cropping_large_images_sends_nothing():
    """The step's collectives are those of images that are read whole."""
    setup = setup_of("vicreg", 8)
    shape = setup.images(0)
    large = jax.ShapeDtypeStruct(
        (BATCH, 80, 72, 3), shape.dtype, sharding=shape.sharding
    )
    step = setup.step.lower(setup.state_shapes(), large)
    found = wire.collectives(step.compile(compiler_options=quick_compilation()))
    assert found and found == wire.collectives(setup.compiled)


# A center and a target, and a queue: all that a state can hold.
@pytest.mark.parametrize(
    "name",
    ["dino", "moco", *_slow(*(name for name in TINY if name not in ("dino", "moco")))],
)
def test_a_resumed_run_ends_in_the_same_bytes(name, tmp_path):
    setup = setup_of(name)
    undisturbed, _ = setup.steps(setup.init(), range(8))
    state, _ = setup.steps(setup.init(), range(6))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(6, state)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(setup.init())
    assert restored is not None
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


@METHODS
def test_a_step_that_is_not_finite_changes_nothing_but_counters(name):
    setup = setup_of(name)
    state, _ = setup.steps(setup.init(), range(6))  # queues, moments and centers filled
    path, first = next(iter(_paths(state.params).items()))
    spoilt = jnp.full_like(first, jnp.nan)
    params = jax.tree.map(lambda leaf: spoilt if leaf is first else leaf, state.params)
    assert np.isnan(_paths(params)[path]).all()
    before = jax.device_get(state.replace(key=None, params=params))
    after, metrics = setup.steps(state.replace(params=params), [6, 7])
    # XLA's ReLU for CPUs may make zeros of them, so that only the gradient has some.
    for of_step in metrics:
        assert not np.isfinite(of_step["loss"] + of_step["gradient_norm"])
    after = jax.device_get(after.replace(key=None))
    counters = {"step": after.step, "skipped": after.skipped}
    assert counters == {"step": 8, "skipped": Skipped(steps=2, in_a_row=2, latest=8)}
    chex.assert_trees_all_equal(after, before.replace(**counters))


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
    keys = example_keys(jax.random.fold_in(state.key, 0), BATCH)
    view_keys = jax.vmap(lambda key: jax.random.split(key, 3)[0])(keys)
    view = make_views(view_keys, images, setup.recipe)[0]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    outputs, _ = setup.network.apply(
        variables, view, train=True, mutable=["batch_stats"]
    )
    spread = normalized_std(outputs.embedding)
    _, (metrics,) = setup.steps(state, [0])
    np.testing.assert_allclose(metrics["embedding_std"], spread, rtol=1e-4)
