"""Every context in which people call a loss, as one function from a loss to results.

A context, called as `context(loss, parameter, arrays, devices)`, returns the loss of
the global batch, its gradient with respect to a parameter of a function before the
loss (a stand-in for the network), and that with respect to each array. All of them
must equal those of the bare call on one device.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def _network(loss, **keywords):
    def function(parameter, *arrays):
        embeddings = [array + jnp.tanh(array * parameter) for array in arrays]
        return loss(*embeddings, **keywords)

    return function


def _value_and_gradients(function, parameter, arrays):
    numbers = tuple(range(1 + len(arrays)))
    value, (of_parameter, *of_arrays) = jax.value_and_grad(function, numbers)(
        parameter, *arrays
    )
    return value, of_parameter, of_arrays


def _mesh(devices, axis_type, two_axes=False):
    shape, names = ((devices,), ("data",))
    if two_axes:
        shape, names = ((2, devices // 2), ("replica", "data"))
    return jax.make_mesh(
        shape,
        names,
        axis_types=(axis_type,) * len(shape),
        devices=jax.devices()[:devices],
    )


def bare(loss, parameter, arrays, devices):
    return _value_and_gradients(_network(loss), parameter, arrays)


def jit(loss, parameter, arrays, devices):
    run = jax.jit(lambda p, a: _value_and_gradients(_network(loss), p, a))
    return run(parameter, arrays)


def global_view(axis_type):
    """The whole batch, sharded: the partitioner, or the types, place the sums."""

    def run(loss, parameter, arrays, devices):
        mesh = _mesh(devices, axis_type)
        with jax.set_mesh(mesh):
            arrays = jax.device_put(arrays, NamedSharding(mesh, P("data")))
            parameter = jax.device_put(parameter, NamedSharding(mesh, P()))
            return jit(loss, parameter, arrays, devices)

    return run


def grad_of_shard_map(axis_type, check_vma, two_axes=False):
    def run(loss, parameter, arrays, devices):
        mesh = _mesh(devices, axis_type, two_axes)
        axis = ("replica", "data") if two_axes else "data"
        sharded = jax.shard_map(
            _network(loss, axis_name=axis),
            mesh=mesh,
            in_specs=(P(), *[P(axis)] * len(arrays)),
            out_specs=P(),
            check_vma=check_vma,
        )
        arrays = jax.device_put(arrays, NamedSharding(mesh, P(axis)))
        parameter = jax.device_put(parameter, NamedSharding(mesh, P()))
        return jax.jit(lambda p, a: _value_and_gradients(sharded, p, a))(
            parameter, arrays
        )

    return run


def shard_map_of_grad(check_vma, two_axes=False):
    """The hand-written data-parallel step: gradients inside, then their mean."""

    def run(loss, parameter, arrays, devices):
        mesh = _mesh(devices, AxisType.Auto, two_axes)
        axis = ("replica", "data") if two_axes else "data"
        # Without the check a shard's own rows get `devices` times their gradient: the
        # convention under which the mean over the shards is right for parameters.
        own_rows = 1 if check_vma else devices

        def step(parameter, *arrays):
            value, of_parameter, of_arrays = _value_and_gradients(
                _network(loss, axis_name=axis), parameter, arrays
            )
            of_arrays = [gradient / own_rows for gradient in of_arrays]
            return value, jax.lax.pmean(of_parameter, axis), of_arrays

        return jax.jit(
            jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(P(), *[P(axis)] * len(arrays)),
                out_specs=(P(), P(), [P(axis)] * len(arrays)),
                check_vma=check_vma,
            )
        )(parameter, *arrays)

    return run


def mapped(transform):
    """`pmap` or `vmap` with an axis name, and the mean of the parameters' gradients."""

    def run(loss, parameter, arrays, devices):
        def step(*arrays):
            value, of_parameter, of_arrays = _value_and_gradients(
                _network(loss, axis_name="data"), parameter, arrays
            )
            return value, jax.lax.pmean(of_parameter, "data"), of_arrays

        shards = [a.reshape(devices, -1, *a.shape[1:]) for a in arrays]
        values, of_parameter, of_arrays = transform(step, axis_name="data")(*shards)
        assert jnp.all(values == values[0]), "the loss differs between shards"
        of_arrays = [
            (g / devices).reshape(a.shape)
            for g, a in zip(of_arrays, arrays, strict=True)
        ]
        return values[0], of_parameter[0], of_arrays

    return run


CONTEXTS = {
    "bare": bare,
    "jit": jit,
    "global view, Auto": global_view(AxisType.Auto),
    "global view, Explicit": global_view(AxisType.Explicit),
    "grad of shard_map": grad_of_shard_map(AxisType.Auto, True),
    "grad of shard_map, unchecked": grad_of_shard_map(AxisType.Auto, False),
    "grad of shard_map, Explicit": grad_of_shard_map(AxisType.Explicit, True),
    "grad of shard_map, two axes": grad_of_shard_map(AxisType.Auto, True, True),
    "shard_map of grad": shard_map_of_grad(True),
    "shard_map of grad, unchecked": shard_map_of_grad(False),
    "shard_map of grad, two axes": shard_map_of_grad(True, True),
    "vmap": mapped(
        lambda step, axis_name: jax.jit(jax.vmap(step, axis_name=axis_name))
    ),
    "pmap": mapped(jax.pmap),
}
