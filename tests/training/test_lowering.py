"""The step of every method lowers for TPU and GPU where there is neither."""

import jax
import jax.numpy as jnp
import pytest
from lowered import lowered
from training.setups import (
    BATCH,
    SIZE,
    TINY,
    Setup,
    every_method,
    setup_of,
    tiny_method,
)

from jemjax.methods import VICReg


def _lowered(setup, crops_of=lambda shape: shape):
    images = setup.images(0)
    shape = jax.ShapeDtypeStruct(images.shape, images.dtype, sharding=images.sharding)
    return lowered(setup.step, setup.state_shapes(), crops_of(shape))


@every_method()
def test_every_method_on_eight_devices(name):
    text = _lowered(setup_of(name, 8))
    assert '"data"=8' in text
    assert "stablehlo.all_reduce" in text  # of the loss
    assert "jax.buffer_donor = true" in text  # of the state


@pytest.mark.parametrize("name", ["vicreg", "data2vec"])
def test_sharded_parameters_with_batches_in_parts_in_bfloat16(name):
    setup = Setup(tiny_method(name), 8, dtype=jnp.bfloat16, fsdp=2, accumulate=2)
    text = _lowered(setup)
    assert '"data"=4, "fsdp"=2' in text
    assert "xbf16>" in text


def test_crops_made_by_the_loader():
    setup = Setup(tiny_method("vicreg"), 8, accumulate=2)
    text = _lowered(setup, lambda shape: (shape, shape))
    assert text.count("x8x8x3xui8>") > _lowered(setup).count("x8x8x3xui8>")


class Printing(VICReg):
    def loss(self, *arguments, **keywords):
        value, terms = super().loss(*arguments, **keywords)
        jax.debug.print("{}", value)
        return value, terms


class Doubling(VICReg):
    def loss(self, *arguments, **keywords):
        value, terms = super().loss(*arguments, **keywords)
        with jax.enable_x64(True):
            doubled = jnp.stack([value, value]).astype("float64").sum()
            return doubled.astype("float32") / 2, terms


@pytest.mark.parametrize(
    ("method", "said"), [(Printing, "calls of the host"), (Doubling, "float64")]
)
def test_a_planted_fault_is_found(method, said):
    planted = method(**TINY["vicreg"]).resolve(SIZE, BATCH, 100)
    with pytest.raises(AssertionError, match=said):
        _lowered(Setup(planted, 8))
