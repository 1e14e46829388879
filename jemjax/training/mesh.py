"""Where arrays live: one mesh axis, `data`, over which batches are sharded."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh of the first `devices` devices (all, unless given), axis `data`.

    Its axis type is Auto: the step is written for the whole batch, so that BatchNorm
    sees the global batch, and the partitioner adds the sums over devices.
    """
    chosen = jax.devices()[:devices]
    return jax.make_mesh(
        (len(chosen),), ("data",), axis_types=(AxisType.Auto,), devices=chosen
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, P())


def to_devices(batch: Any, mesh: Mesh) -> Any:
    """Makes global arrays of this host's rows of a batch, sharded over `data`."""
    sharding = NamedSharding(mesh, P("data"))
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)),
        batch,
    )
