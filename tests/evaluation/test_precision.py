"""Accelerators multiply float32 in fewer bits unless they are told not to."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from jemjax.evaluation import effective_rank, knn_predict
from jemjax.evaluation.linear_probe import _fit

ROWS = jax.ShapeDtypeStruct((32, 8), jnp.float32)
LABELS = jax.ShapeDtypeStruct((32,), jnp.int32)
PROGRAMS = {
    "knn": (functools.partial(knn_predict, k=3, num_classes=4), (ROWS, LABELS, ROWS)),
    "linear_probe": (
        functools.partial(_fit, l2=1e-3, num_classes=4, max_iterations=5),
        (ROWS, LABELS, ROWS),
    ),
    "effective_rank": (effective_rank, (ROWS,)),
}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_product_has_the_highest_precision(name, platform):
    function, arguments = PROGRAMS[name]
    traced = jax.jit(function).trace(*arguments)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    products = re.findall(r".*stablehlo\.dot_general.*", text)
    assert products
    assert all("[HIGHEST, HIGHEST]" in product for product in products)
