"""Each front door brings only what it needs."""

import subprocess
import sys

import pytest


def _imported(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


HEAVY = {"flax", "optax", "orbax", "grain", "tensorflow_datasets", "tensorflow", "PIL"}


@pytest.mark.parametrize("package", ["losses", "augment"])
def test_arrays_in_arrays_out_needs_jax_only(package):
    modules = _imported(f"import jemjax.{package}")
    assert "jax" in modules
    assert not modules & (HEAVY | {"chex", "sklearn", "tyro"})


def test_the_proof_kit_needs_no_network():
    assert not _imported("import jemjax.testing") & HEAVY


def test_the_data_package_needs_no_jax():
    modules = _imported("import jemjax.data")
    assert not modules & {"jax", "flax", "tensorflow"}


def test_the_package_itself_is_nearly_free():
    modules = _imported("import jemjax")
    assert not modules & (HEAVY | {"jax", "numpy"})
