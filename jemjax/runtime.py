"""Settings of the process: what makes XLA on CPUs fast, and where programs are kept.

They are the command line's, which makes them before jax starts; to import the library
changes nothing.
"""

import ctypes
import glob
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

_DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops"
_CONVOLUTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# Device files of GPUs (NVIDIA, AMD) and TPUs.
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")

# What was set in this process, for a run's header.
_settings: list[str] = []


def quick_compilation() -> dict[str, Any]:
    """Options of `jax.jit` for what runs once: compiled eight times as fast on a CPU.

    They turn off optimizations of the machine code, and none of the program's.
    """
    import jax

    if jax.default_backend() != "cpu":
        return {}
    return {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }


def prepare_process() -> None:
    """What every command does first: `tune_cpu`, and `keep_programs`."""
    tune_cpu()
    keep_programs()


def settings() -> str:
    """What `tune_cpu` and `keep_programs` have set, in words."""
    return "; ".join(_settings) or "as the environment has them"


def tune_cpu() -> None:
    """Makes training on CPUs up to twice as fast. Call it before jax is used.

    Two settings, each of which the environment can override:

    * memory that XLA frees stays with the process, where glibc would return every
      large buffer to the system after each step and fault it in again (the process
      keeps its peak memory; `MALLOC_ARENA_MAX` set by the user turns this off);
    * convolutions take XLA's older, faster path (only for the jaxlib versions that
      know the flag, since XLA aborts on an unknown one; naming it in `XLA_FLAGS`
      turns this off).

    `JEMJAX_TUNE_CPU=0` turns both off. It does nothing on systems without glibc, and
    where jax would use a GPU or a TPU.
    """
    if os.environ.get("JEMJAX_TUNE_CPU") == "0" or not _on_cpu():
        return
    if sys.platform != "linux":
        return
    if "MALLOC_ARENA_MAX" not in os.environ:
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):
            pass
        else:
            mallopt(-4, 0)  # M_MMAP_MAX: no buffer is a mapping of its own
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is not trimmed
            mallopt(-8, 1)  # M_ARENA_MAX: XLA's threads share the heap
            _note("freed memory is kept")
    version = importlib.metadata.version("jaxlib").split(".")[:2]
    flags = os.environ.get("XLA_FLAGS", "")
    flag = f"{_CONVOLUTION_FLAG}=-individual_convolution"
    if version in (["0", "10"], ["0", "12"]) and _CONVOLUTION_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
    if flag in os.environ.get("XLA_FLAGS", ""):
        _note("convolutions by XLA's older path")
    if _settings:
        _note("JEMJAX_TUNE_CPU=0 leaves both alone")


def keep_programs() -> None:
    """Compiled programs are kept on disk, where the next run finds them.

    In `$XDG_CACHE_HOME/jemjax/programs`, by default `~/.cache/jemjax/programs`.
    `JAX_COMPILATION_CACHE_DIR` says another folder, `JAX_ENABLE_COMPILATION_CACHE=0`
    that nothing is kept; the folder may be deleted at any time. Call it before jax is
    imported.
    """
    environment = os.environ
    if environment.get("JAX_ENABLE_COMPILATION_CACHE", "1").lower() in ("0", "false"):
        return
    folder = environment.get("JAX_COMPILATION_CACHE_DIR")
    if not folder:
        caches = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = str(caches / "jemjax" / "programs")
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError:  # a home that cannot be written: programs are not kept
            return
        environment["JAX_COMPILATION_CACHE_DIR"] = folder
    # A run compiles some sixty programs, most of them small; together they take time.
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    _note(f"programs kept in {folder}")


def _on_cpu() -> bool:
    """Whether jax will use a CPU, as far as can be told before it starts."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(glob.glob(pattern) for pattern in _ACCELERATORS)


def _note(setting: str) -> None:
    if setting not in _settings:
        _settings.append(setting)


def make_deterministic() -> None:
    """Makes GPUs give the same bytes each time. Call it before a device is used.

    XLA then takes no kernel that adds in an order that is not fixed, which costs speed,
    and refuses what has no other. Naming the flag in `XLA_FLAGS` turns this off. CPUs
    are deterministic without it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _DETERMINISTIC_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC_FLAG}=true".strip()


def idle_accelerator() -> str | None:
    """A warning where the machine seems to have an accelerator that jax does not use.

    None where jax uses one, where there is no sign of one, or where `JAX_PLATFORMS`
    says that the CPU is meant.
    """
    import jax

    if jax.default_backend() != "cpu" or jax.config.jax_platforms:
        return None
    if not any(glob.glob(pattern) for pattern in _ACCELERATORS):
        return None
    return (
        f"warning: only {jax.devices()} is used, but there seems to be more; for a GPU"
        " install jax[cuda13], for a TPU jax[tpu]"
    )
