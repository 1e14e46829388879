"""Is everything there, and does it work on the devices of this machine?"""

import importlib.metadata
import os
import platform
import shutil
import sys

from jemjax import __version__

CORE = ("jax", "jaxlib", "flax", "optax", "chex", "numpy")
TRAIN = (
    "orbax-checkpoint",
    "tensorflow-datasets",
    "grain",
    "pillow",
    "scikit-learn",
    "scipy",
    "tyro",
    "rich",
    "tomli-w",
    "importlib_resources",
)


def doctor() -> int:
    """Prints a report, and returns an exit code: 0 where all is well."""
    print(f"jemjax {__version__}, Python {platform.python_version()}, {sys.platform}")
    missing = [name for name in (*CORE, *TRAIN) if not _report(name)]
    from jemjax import runtime

    runtime.prepare_process()
    import jax
    import numpy as np

    from jemjax import losses

    kinds: dict[str, int] = {}
    for device in jax.devices():
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    print(f"devices: {devices}; default backend {jax.default_backend()}")
    if jax.default_backend() == "cpu":
        print(
            f"  {os.cpu_count()} CPU cores; for a GPU install jax[cuda13], for a TPU"
            " jax[tpu]"
        )
    print(f"settings: {runtime.settings()}")
    print(f"XLA_FLAGS: {os.environ.get('XLA_FLAGS', '(none)')}")
    print(f"free disk here: {shutil.disk_usage('.').free / 1e9:.0f} GB")

    constant = np.ones((8, 4), np.float32)
    value, gradient = jax.value_and_grad(losses.vicreg)(constant, constant)
    right = abs(float(value) - 24.75) < 1e-4 and bool(np.isfinite(gradient).all())
    print(f"VICReg of a collapsed batch: {float(value):.4f}, expected 24.7500")
    if missing:
        print(f"missing: {', '.join(missing)}; pip install 'jemjax[train]' brings them")
    print("all is well" if right and not missing else "something is wrong, see above")
    return 0 if right and not missing else 1


def _report(name: str) -> bool:
    try:
        print(f"  {name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        print(f"  {name} is not installed")
        return False
    return True
