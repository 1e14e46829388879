"""No broadcast and no promotion of dtypes that the library does not write itself."""

import jax
import pytest


@pytest.fixture(autouse=True)
def no_promotion():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield
