"""What commands set in their process before jax starts, and what leaves it alone."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
from jemjax import runtime
runtime.prepare_process()
import os
import jax
jax.jit(lambda x: x * 2)(1.0)
print(runtime.settings())
print(os.environ.get("XLA_FLAGS", ""))
"""


def prepared(tmp_path, **environment):
    """The settings in words, and XLA's flags, of a process with this environment."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "MALLOC_ARENA_MAX", "JAX_COMPILATION_CACHE_DIR")
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=inherited
        | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
        | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    said, flags = done.stdout.splitlines()
    return said, flags, list(tmp_path.glob("jemjax/programs/*"))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_command_keeps_memory_and_programs_and_says_so(tmp_path):
    said, flags, programs = prepared(tmp_path)
    assert "freed memory is kept" in said
    assert f"programs kept in {tmp_path}/jemjax/programs" in said
    assert "individual_convolution" in flags
    assert "convolutions by XLA's older path" in said
    assert programs


def test_the_environment_can_leave_all_as_it_is(tmp_path):
    said, flags, programs = prepared(
        tmp_path, JEMJAX_TUNE_CPU="0", JAX_ENABLE_COMPILATION_CACHE="0"
    )
    assert (said, flags, programs) == ("as the environment has them", "", [])


def test_flags_of_the_user_stay(tmp_path):
    mine = "--xla_cpu_experimental_ynn_fusion_type=-individual_dot"
    said, flags, _ = prepared(tmp_path, XLA_FLAGS=mine, MALLOC_ARENA_MAX="4")
    assert flags == mine
    assert "convolutions" not in said and "memory" not in said


def test_accelerators_are_not_tuned(tmp_path, monkeypatch):
    from jemjax import runtime

    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert not runtime._on_cpu()
    monkeypatch.setenv("JAX_PLATFORMS", "")
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(runtime, "_ACCELERATORS", (str(tmp_path / "accel*"),))
    assert not runtime._on_cpu()
    (tmp_path / "accel0").unlink()
    assert runtime._on_cpu()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "jemjax").write_text("a file where the folder would be")
    said, _, _ = prepared(tmp_path)
    assert "programs" not in said
