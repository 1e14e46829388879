"""Eight virtual CPU devices for every test, one key, and the golden files."""

import os
import pathlib
import tempfile

# Most of the time would be compilation. LLVM's optimizations are left out, of programs
# that tests start too; XLA's own are not. JAX_DISABLE_MOST_OPTIMIZATIONS=0 keeps them,
# as CI does for the golden values, the contract and a run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import numpy as np
import pytest
from hypothesis import settings

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

settings.register_profile("jemjax", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("jemjax")

# Programs that commands keep: those of all tests, since both of pytest's processes
# inherit the folder, and none of the user's.
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ["XDG_CACHE_HOME"] = CACHE.name

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def golden():
    """`golden("vicreg_Nltd")`: the arrays of one file of reference values."""

    def load(name):
        with np.load(GOLDEN / f"{name}.npz") as file:
            return dict(file)

    return load
