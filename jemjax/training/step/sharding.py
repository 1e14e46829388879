"""Where arrays live: batches over all devices, and large parameters over some.

The mesh has two axes. Every device has a part of the batch: the first axis times the
second. Along `data` all devices hold the same parameters; along `fsdp` each holds a
part of every large one, which is put together where it is used. With `fsdp` of size 1
every device holds all of them.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jemjax.training.step.state import TrainState

# The axes over which a batch is sharded: all of them.
BATCH_AXES = ("data", "fsdp")
# Arrays of fewer elements stay whole: to send them costs more than their memory.
MINIMUM_SHARDED = 2**12


def make_mesh(devices: int | None = None, *, fsdp: int = 1) -> Mesh:
    """A mesh of the first `devices` devices (all, unless given), host after host.

    Its axis types are Auto: the step is written for the whole batch, so that BatchNorm
    sees the global batch, and the partitioner adds the sums over devices.

    Args:
        devices: how many.
        fsdp: over how many devices large parameters are sharded, a divisor of them.

    Returns:
        A mesh of shape (devices / fsdp, fsdp), with the axes `data` and `fsdp`.

    Raises:
        ValueError: if `fsdp` is not a divisor.
    """
    chosen = list(jax.devices()[:devices])
    if fsdp < 1 or len(chosen) % fsdp:
        raise ValueError(
            f"fsdp: got {fsdp}, expected a divisor of the {len(chosen)} devices"
        )
    # Not jax.make_mesh, which orders the chips of a TPU slice by their places: a host's
    # rows of a batch would then not be those that it has in the global batch.
    chosen.sort(key=lambda device: (device.process_index, device.id))
    shape = (len(chosen) // fsdp, fsdp)
    return Mesh(
        np.array(chosen).reshape(shape), BATCH_AXES, axis_types=(AxisType.Auto,) * 2
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of arrays of which an axis is the batch."""
    return NamedSharding(mesh, batch_spec(axis))


def batch_spec(axis: int = 0) -> P:
    """The partition of arrays of which an axis is the batch."""
    return P(*[None] * axis, BATCH_AXES)


def parameter_spec(shape: tuple[int, ...], fsdp: int) -> P:
    """The partition of a parameter: its longest axis that `fsdp` divides.

    Of equally long axes it is the last; small parameters, and those of which no axis
    can be divided, stay whole.

    Args:
        shape: of the parameter.
        fsdp: the number of parts.
    """
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not axes or np.prod(shape) < MINIMUM_SHARDED:
        return P()
    longest = max(axes, key=lambda axis: (shape[axis], axis))
    return P(*[None] * longest, "fsdp")


def state_sharding(state: TrainState, mesh: Mesh) -> TrainState:
    """Where each array of a state lives.

    Parameters, targets and the optimizer's state follow `parameter_spec`, by their
    shapes: so each moment lies with its parameter. All the rest is small, or needed
    whole on every device, as queues are.

    Args:
        state: of arrays, or of their shapes.
        mesh: of `make_mesh`.

    Returns:
        A state of shardings.
    """
    shardings = jax.tree.map(lambda _: replicated(mesh), state)

    def sharded(tree):
        return jax.tree.map(
            lambda x: NamedSharding(mesh, parameter_spec(x.shape, mesh.shape["fsdp"])),
            tree,
        )

    return shardings.replace(
        params=sharded(state.params),
        target_params=sharded(state.target_params),
        opt_state=sharded(state.opt_state),
    )


def shaped(tree: Any, shardings: Any) -> Any:
    """Arrays as shapes, dtypes and shardings only, for compilation and restoring."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def to_devices(batch: Any, mesh: Mesh) -> Any:
    """Makes global arrays of this host's rows of a batch, sharded over all devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)),
        batch,
    )
