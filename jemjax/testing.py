"""What jemjax's losses are held to, for losses of your own.

`assert_device_invariant` proves that a loss and its gradients are the same on any
number of devices, in every context in which people call it. `assert_loss_contract`
proves what a loss promises on one: dtypes, finiteness, that nothing is hidden, the
order of the batch, that collapse costs, and the gradients. Both raise an
AssertionError that names the check, the input, what was got and what was expected.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_vjp

from jemjax.losses.collectives import AxisName
from jemjax.runtime import quick_compilation

try:
    import hypothesis
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as hnp
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "jemjax.testing draws arrays with hypothesis: pip install 'jemjax[testing]'"
    ) from None

Results = dict[str, jax.Array]
PARAMETER = "gradient of the parameter"


class _Problem(NamedTuple):
    """A loss, and what it is called with."""

    loss: Callable[..., jax.Array]
    parameter: np.ndarray  # one number a feature
    arrays: list[jax.Array]
    batch_axes: tuple[int | None, ...]


def _floating(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _network(problem: _Problem, **keywords: Any) -> Callable[..., jax.Array]:
    """The loss of what a stand-in for a network, with one parameter, embeds."""

    def embed(parameter, array, batch_axis):
        if batch_axis is None or not _floating(array):
            return array
        width = 1 if batch_axis == array.ndim - 1 else array.shape[-1]
        # Near the given array, so that the loss's terms are active where they were.
        factors = parameter[:width].astype(array.dtype)
        bent = jnp.tanh(array * jnp.expand_dims(factors, range(array.ndim - 1)))
        return array - 0.2 * bent

    def function(parameter, *arrays):
        embedded = map(functools.partial(embed, parameter), arrays, problem.batch_axes)
        return problem.loss(*embedded, **keywords)

    return function


def _differentiated(
    problem: _Problem, function: Callable[..., jax.Array]
) -> Callable[..., Results]:
    """The function's value and gradients, by name."""
    numbers = [i for i, array in enumerate(problem.arrays) if _floating(array)]
    run = jax.value_and_grad(function, (0, *[1 + number for number in numbers]))

    def results(parameter, *arrays):
        value, (of_parameter, *of_arrays) = run(parameter, *arrays)
        named = dict(zip(map(_of_array, numbers), of_arrays, strict=True))
        return {"value": value, PARAMETER: of_parameter, **named}

    return results


def _of_array(number: int) -> str:
    return f"gradient of array {number}"


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(function, compiler_options=quick_compilation())


def _reference(problem: _Problem) -> Results:
    run = _jit(_differentiated(problem, _network(problem)))
    return run(problem.parameter, *problem.arrays)


# The contexts: each from a problem and a number of devices to the results of the global
# batch. A value may be one for each shard, which must all be the same.


def _bare(problem: _Problem, devices: int) -> Results:
    run = _differentiated(problem, _network(problem))
    return run(jnp.asarray(problem.parameter), *problem.arrays)


def _compiled(problem: _Problem, devices: int) -> Results:
    run = jax.jit(_differentiated(problem, _network(problem)))
    return run(problem.parameter, *problem.arrays)


def _mesh(
    devices: int, axis_type: AxisType, axes: int
) -> tuple[jax.sharding.Mesh, AxisName]:
    """A mesh, and its axes of the batch: all but the third."""
    shape, names, axis_name = ((devices,), ("data",), "data")
    if axes > 1:
        others = 2 if axes == 3 and devices > 2 else 1
        shape = (2, devices // 2 // others, others)[:axes]
        names = ("replica", "data", "model")[:axes]
        axis_name = names[:2]
    mesh = jax.make_mesh(
        shape,
        names,
        axis_types=(axis_type,) * len(shape),
        devices=jax.devices()[:devices],
    )
    return mesh, axis_name


def _specs(problem: _Problem, axis_name: AxisName) -> list[P]:
    return [
        P() if axis is None else P(*[None] * axis, axis_name)
        for axis in problem.batch_axes
    ]


def _placed(problem: _Problem, mesh: jax.sharding.Mesh, specs: list[P]) -> tuple:
    """The arguments on the devices: the arrays by their batch, the parameter whole."""
    arguments = (problem.parameter, *problem.arrays)
    return jax.device_put(
        arguments, tuple(NamedSharding(mesh, spec) for spec in (P(), *specs))
    )


def _global_view(problem: _Problem, devices: int, *, axis_type: AxisType) -> Results:
    """The partitioner (Auto), or the types (Explicit), place the sums."""
    mesh, axis_name = _mesh(devices, axis_type, 1)
    with jax.set_mesh(mesh):
        arguments = _placed(problem, mesh, _specs(problem, axis_name))
        return _jit(_differentiated(problem, _network(problem)))(*arguments)


Through = Callable[[Callable[..., Any]], Callable[..., Any]]


def _scanned(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as the one step of a loop."""

    def run(*arguments):
        return jax.lax.scan(lambda *_: (None, function(*arguments)), None, None, 1)[1][
            0
        ]

    return run


def _grad_of_shard_map(
    problem: _Problem,
    devices: int,
    *,
    axis_type: AxisType = AxisType.Auto,
    check_vma: bool = True,
    axes: int = 1,
    through: Through | None = None,
) -> Results:
    mesh, axis_name = _mesh(devices, axis_type, axes)
    specs = _specs(problem, axis_name)
    network = _network(problem, axis_name=axis_name)
    sharded = jax.shard_map(
        through(network) if through else network,
        mesh=mesh,
        in_specs=(P(), *specs),
        out_specs=P(),
        # A third axis is left to the partitioner.
        axis_names=set(mesh.axis_names[:2]),
        check_vma=check_vma,
    )
    arguments = _placed(problem, mesh, specs)
    # First without the gradient, in which JAX words no error of out_specs.
    jax.eval_shape(sharded, *arguments)
    return _jit(_differentiated(problem, sharded))(*arguments)


def _of_a_shard(
    problem: _Problem,
    axis_name: AxisName,
    own_rows: int,
    through: Through | None = None,
) -> Callable[..., Results]:
    """The hand-written data-parallel step: gradients, then the parameters' mean.

    Without `check_vma` the gradient of a shard's own rows is `own_rows` times that of
    the loss: the convention under which the mean is right for parameters.
    """
    network = _network(problem, axis_name=axis_name)
    run = _differentiated(problem, through(network) if through else network)
    names = map(_of_array, range(len(problem.arrays)))
    sharded = {
        name
        for name, axis in zip(names, problem.batch_axes, strict=True)
        if axis is not None
    }

    def step(parameter, *arrays):
        results = run(parameter, *arrays)
        for name, result in results.items():
            if name in sharded:
                results[name] = result / own_rows
            elif name != "value":
                results[name] = jax.lax.pmean(result, axis_name)
        return results

    return step


def _shard_map_of_grad(
    problem: _Problem,
    devices: int,
    *,
    check_vma: bool = True,
    axes: int = 1,
    through: Through | None = None,
) -> Results:
    mesh, axis_name = _mesh(devices, AxisType.Auto, axes)
    specs = _specs(problem, axis_name)
    step = _of_a_shard(problem, axis_name, 1 if check_vma else devices, through)

    def with_all_values(parameter, *arrays):
        results = step(parameter, *arrays)
        return results | {"value": results["value"][None]}

    by_name = dict(zip(map(_of_array, range(len(specs))), specs, strict=True))
    out_specs = {"value": P(axis_name), PARAMETER: P()} | {
        name: spec
        for (name, spec), array in zip(by_name.items(), problem.arrays, strict=True)
        if _floating(array)
    }
    sharded = jax.shard_map(
        with_all_values,
        mesh=mesh,
        in_specs=(P(), *specs),
        out_specs=out_specs,
        check_vma=check_vma,
    )
    return _jit(sharded)(*_placed(problem, mesh, specs))


def _mapped(
    problem: _Problem, devices: int, *, transform: Callable[..., Any]
) -> Results:
    """`vmap` or `pmap` over the shards."""
    step = functools.partial(
        _of_a_shard(problem, "data", devices), jnp.asarray(problem.parameter)
    )
    axes = problem.batch_axes
    shards = [
        array if axis is None else jnp.stack(jnp.split(array, devices, axis))
        for array, axis in zip(problem.arrays, axes, strict=True)
    ]
    in_axes = tuple(None if axis is None else 0 for axis in axes)
    results = transform(step, axis_name="data", in_axes=in_axes)(*shards)
    results[PARAMETER] = results[PARAMETER][0]
    for number, axis in enumerate(axes):
        name = _of_array(number)
        if name in results:
            of_shards = list(results[name])
            results[name] = (
                of_shards[0] if axis is None else jnp.concatenate(of_shards, axis)
            )
    return results


def _vmap(step: Callable[..., Any], **keywords: Any) -> Callable[..., Any]:
    return _jit(jax.vmap(step, **keywords))


_CONTEXTS: Mapping[str, Callable[[_Problem, int], Results]] = {
    "bare": _bare,
    "jit": _compiled,
    # Those inside of shard_map come first: what fails there has the plainest cause.
    "grad of shard_map": _grad_of_shard_map,
    "grad of shard_map, unchecked": functools.partial(
        _grad_of_shard_map, check_vma=False
    ),
    "grad of shard_map, Explicit": functools.partial(
        _grad_of_shard_map, axis_type=AxisType.Explicit
    ),
    "grad of shard_map, two axes": functools.partial(_grad_of_shard_map, axes=2),
    "grad of shard_map, three axes": functools.partial(_grad_of_shard_map, axes=3),
    "grad of shard_map of checkpoint": functools.partial(
        _grad_of_shard_map, through=jax.checkpoint
    ),
    "shard_map of grad": _shard_map_of_grad,
    "shard_map of grad, unchecked": functools.partial(
        _shard_map_of_grad, check_vma=False
    ),
    "shard_map of grad, two axes": functools.partial(_shard_map_of_grad, axes=2),
    "shard_map of grad of jit": functools.partial(_shard_map_of_grad, through=jax.jit),
    "shard_map of grad of scan": functools.partial(
        _shard_map_of_grad, through=_scanned
    ),
    "vmap": functools.partial(_mapped, transform=_vmap),
    "pmap": functools.partial(_mapped, transform=jax.pmap),
    "global view, Auto": functools.partial(_global_view, axis_type=AxisType.Auto),
    "global view, Explicit": functools.partial(
        _global_view, axis_type=AxisType.Explicit
    ),
}

CONTEXTS = tuple(_CONTEXTS)
"""The names of the contexts in which `assert_device_invariant` calls a loss."""

# They run the shards, or the whole batch, on one device.
_ONE_DEVICE = {"bare", "jit", "vmap"}


def assert_device_invariant(
    loss: Callable[..., jax.Array],
    *arrays: Any,
    devices: int | Sequence[int] | None = None,
    contexts: str | Sequence[str] | None = None,
    batch_axes: int | None | Sequence[int | None] = 0,
    rtol: float = 1e-5,
) -> None:
    """Asserts that a loss is the same on any number of devices, in every context.

    The value, the gradient with respect to each array, and that with respect to a
    parameter of a function before the loss are compared with those of the whole batch
    on one device. Where JAX leaves a gradient taken on a shard for the caller to
    reduce, as `jemjax.losses` says, that is done: the parameters' mean is taken, and
    the gradient of a shard's own rows divided by the number of shards.

    Args:
        loss: called as `loss(*arrays)` with the whole batch and as
            `loss(*arrays, axis_name=...)`, a name or a tuple of names, with a shard of
            it. It returns a scalar.
        *arrays: those of one global batch. Arrays of integers or booleans get no
            gradient.
        devices: the numbers of devices (even). None: all of 2, 4 and 8 that divide the
            batch and exist.
        contexts: some of `CONTEXTS`. None: all. "bare", "jit" and "vmap" need one
            device only, whatever `devices` says.
        batch_axes: the axis of the batch, >= 0, of all arrays or of each. None for an
            array that every shard has whole, such as a queue or a center.
        rtol: the largest difference, relative to the largest number of a result.

    Raises:
        AssertionError: where the loss differs or fails in a context: which one, on how
            many devices, what differs, got, expected, and the likely cause.
        ValueError: for a number of devices that does not divide the batch, or a
            context that does not exist.
        RuntimeError: for more devices than JAX has.
    """
    contexts = CONTEXTS if contexts is None else contexts
    contexts = (contexts,) if isinstance(contexts, str) else tuple(contexts)
    for context in contexts:
        if context not in _CONTEXTS:
            raise ValueError(f"contexts: got {context!r}, expected some of {CONTEXTS}")
    given = [jnp.asarray(array) for array in arrays]
    axes = _each(batch_axes, len(given))
    features = [
        array.shape[-1]
        for array, axis in zip(given, axes, strict=True)
        if axis is not None and axis < array.ndim - 1
    ]
    parameter = np.linspace(0.5, 1.5, max(features, default=1), dtype=np.float32)
    problem = _Problem(loss, parameter, given, axes)
    counts = _device_counts(devices, problem, contexts)
    expected = jax.device_get(_reference(problem))
    for name, result in expected.items():
        if not np.isfinite(result).all():
            raise AssertionError(f"one device: {name}: got {result}, expected finite")
    for context in contexts:
        for count in counts if context not in ("bare", "jit") else [1]:
            where = f"{context} on {count} {'device' if count == 1 else 'devices'}"
            try:
                got = jax.device_get(_CONTEXTS[context](problem, count))
            except Exception as error:
                raise AssertionError(
                    f"{where}: the loss cannot be run: {_refusal(error)}"
                ) from error
            for name in sorted(expected, key=("value", PARAMETER, *expected).index):
                difference = _difference(got[name], expected[name], rtol)
                if difference:
                    cause = _cause(name, got[name], expected[name], count, rtol)
                    raise AssertionError(f"{where}: {name}: {difference}{cause}")


def _each(batch_axes: Any, count: int) -> tuple[int | None, ...]:
    """One batch axis an array."""
    if batch_axes is None or isinstance(batch_axes, int):
        return (batch_axes,) * count
    if len(batch_axes) != count:
        raise ValueError(
            f"batch_axes: got {tuple(batch_axes)}, expected one for each of the {count}"
            " arrays"
        )
    return tuple(batch_axes)


def _device_counts(
    devices: int | Sequence[int] | None, problem: _Problem, contexts: tuple[str, ...]
) -> list[int]:
    batches = {
        array.shape[axis]
        for array, axis in zip(problem.arrays, problem.batch_axes, strict=True)
        if axis is not None
    }
    if len(batches) != 1:
        raise ValueError(f"arrays: got batches of {sorted(batches)}, expected one size")
    (batch,) = batches
    existing = jax.device_count()
    needed = set(contexts) - _ONE_DEVICE
    if devices is None:
        counts = [count for count in (2, 4, 8) if batch % count == 0]
        if not counts:
            raise ValueError(f"arrays: got a batch of {batch}, expected an even number")
        if needed and existing >= 2:
            counts = [count for count in counts if count <= existing]
    else:
        counts = [devices] if isinstance(devices, int) else list(devices)
    for count in counts:
        if count < 2 or count % 2 or batch % count:
            raise ValueError(
                f"devices: got {count}, expected an even number that divides the batch"
                f" of {batch}"
            )
        if needed and count > existing:
            raise RuntimeError(
                f"{count} devices are needed, and JAX has {existing}. Before its first"
                ' use, jax.config.update("jax_num_cpu_devices", 8) makes virtual ones'
                ' of a CPU; contexts=("jit", "vmap") need one.'
            )
    return counts


def _difference(got: Any, expected: Any, rtol: float, atol: float = 0.0) -> str:
    """What differs most, or nothing. One expected number may stand for many."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    expected = np.broadcast_to(expected, got.shape)
    scale = np.abs(expected).max(initial=0.0)
    distance = np.abs(got - expected)
    # Not `>`, with which what is not a number would be no difference.
    if (distance <= atol + rtol * scale).all():
        return ""
    worst = np.unravel_index(np.argmax(distance), distance.shape)
    position = f" at {tuple(map(int, worst))}" if worst else ""
    relative = distance[worst] / scale if scale else np.inf
    return (
        f"got {got[worst]:.7g}, expected {expected[worst]:.7g}{position}"
        f" (relative error {relative:.2g})"
    )


def _refusal(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0].rstrip(':.')}"
    if "out_specs" in str(error) or "replicat" in str(error):
        text += (
            ". The result differs between shards, or JAX cannot know that it does not:"
            " the loss does not end in a reduction (psum, pmean) over axis_name"
        )
    if "ShardingTypeError" in type(error).__name__:
        text += (
            ". On a mesh of Explicit axes an operation has to be told how its result is"
            " sharded (out_sharding=, jax.sharding.reshard); leave these contexts out"
            " if the loss is not used on such a mesh"
        )
    return text


def _cause(name: str, got: Any, expected: Any, devices: int, rtol: float) -> str:
    """A guess at what is wrong, from the form of the difference."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if devices == 1 or not np.isfinite(got).all():
        return ""
    if name == "value":
        if _difference(got, got.flat[0], rtol):
            return (
                ". Each shard has another value: the loss does not end in a reduction"
                " (psum, pmean) over axis_name, or depends on the shard's index"
            )
        return (
            ". A mean, a size, a product or the loss itself is of one shard's rows,"
            " where the global batch's is meant"
        )
    squares = np.sum(expected**2)
    factor = np.sum(got * expected) / squares if squares else 0.0
    if not factor or _difference(got / factor, expected, 10 * rtol):
        return (
            ". Only the gradient differs: something that is sent between the shards is"
            " left out of the differentiation"
        )
    text = f". It is {factor:.4g} times what is expected"
    if np.isclose(factor, devices, rtol=1e-3):
        text += (
            ", the number of devices: the loss does not end in a reduction (psum,"
            " pmean) over axis_name, so that each shard adds the whole gradient"
        )
    if np.isclose(factor, 1 / devices, rtol=1e-3):
        text += (
            ", 1 / devices: a stop_gradient around a reduction, or a custom_vjp that"
            " forgets to psum its cotangent over axis_name"
        )
    return text


def assert_loss_contract(
    loss: Callable[..., jax.Array],
    shapes: Sequence[int] | Sequence[Sequence[int]],
    *,
    constants: Sequence[int] = (),
    collapsed: float | None = None,
    permutation: bool = True,
    numerical_gradients: bool = True,
    largest: float = 1e8,
    batch_axes: int | None | Sequence[int | None] = 0,
) -> None:
    """Asserts what a loss promises on one device.

    * Dtypes: float16, bfloat16 and float32 arrays give a float32 scalar, the same as
      float32 arithmetic on the same numbers; gradients have their array's dtype.
    * Gradients: every array has one, but for `constants`, which have none.
    * Finite: value and gradients are finite for zeros, constants, duplicated and
      one-hot rows, subnormal and large numbers, and whatever hypothesis draws.
    * Not hidden: a NaN or an infinity in an array makes the value not finite.
    * Permutation: the order of the batch changes the value not at all, and the
      gradients' order likewise.
    * Collapse: one same row everywhere costs more than embeddings that agree and are
      spread, or exactly `collapsed`.
    * Numerical gradients: the gradients agree with finite differences in float64 (more
      loosely in float32, for a loss that casts float64 to it).

    All inputs are the same in every run.

    Args:
        loss: called as `loss(*arrays)`, returns a scalar.
        shapes: one shape for each array, or the shape of the only one.
        constants: numbers of the arrays that have no gradient, such as targets.
        collapsed: the value for one same row (c, c, ..., c), c != 0, everywhere. None:
            the loss sees collapse. A loss such as BYOL's, which is lowest there, says
            0.0.
        permutation: whether the order of the batch does not matter.
        numerical_gradients: whether the gradient is that of the value; not so where
            the loss makes constants of parts of an array that also has a gradient, as
            SwAV does.
        largest: the largest magnitude up to which the loss is finite. 1e20 is
            reasonable for losses that normalize.
        batch_axes: the axis of the batch, >= 0, of all arrays or of each. None for an
            array without one, such as a queue or a center.

    Raises:
        AssertionError: which check fails, for which input, got and expected.
        ValueError: for arguments that do not fit each other.
    """
    nested: Any = [shapes] if isinstance(shapes[0], int) else shapes
    each = [tuple(shape) for shape in nested]
    axes = _each(batch_axes, len(each))
    if not set(constants) <= set(range(len(each))):
        raise ValueError(
            f"constants: got {tuple(constants)}, expected numbers of the {len(each)}"
            " arrays, from 0"
        )
    # Compiled once for each dtype.
    run = _jit(jax.value_and_grad(loss, tuple(range(len(each)))))
    random = [_random(shape, number) for number, shape in enumerate(each)]

    _check_dtypes(loss, run, random)
    _check_finite(run, each, axes, largest)
    _check_nothing_is_hidden(run, random)
    _check_which_have_gradients(run, random, constants)
    if permutation:
        _check_permutation(run, random, axes)
    _check_collapse(run, each, axes, collapsed)
    if numerical_gradients:
        _check_numerical_gradients(run, each, constants)


Run = Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]


def _random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _require_finite(run: Run, kind: str, arrays: Sequence[Any], gradients=True) -> None:
    value, of_arrays = run(*arrays)
    if not np.isfinite(value):
        raise AssertionError(f"finite: {kind}: value: got {value}, expected finite")
    for number, gradient in enumerate(of_arrays if gradients else ()):
        wrong = gradient[~jnp.isfinite(gradient)]
        if wrong.size:
            raise AssertionError(
                f"finite: {kind}: {_of_array(number)}: got {wrong[0]} in {wrong.size}"
                f" of {gradient.size} entries, expected finite"
            )


def _check_dtypes(
    loss: Callable[..., jax.Array], run: Run, random: list[np.ndarray]
) -> None:
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        kind = f"dtypes: {jnp.dtype(dtype).name} arrays"
        arrays = [jnp.asarray(array, dtype) for array in random]
        value = jax.eval_shape(loss, *arrays)
        try:
            chex.assert_shape(value, ())
            chex.assert_type(value, jnp.float32)
        except AssertionError:
            raise AssertionError(
                f"{kind}: got {value.dtype} of shape {value.shape}, expected a float32"
                " scalar"
            ) from None
        _require_finite(run, f"{jnp.dtype(dtype).name} random rows", arrays)
        value, gradients = run(*arrays)
        exact, _ = run(*[array.astype(jnp.float32) for array in arrays])
        difference = _difference(value, exact, 1e-6)
        if difference:
            raise AssertionError(
                f"{kind}: value: {difference}, that of float32 arithmetic on the same"
                " numbers: cast arrays to float32 first"
            )
        for number, gradient in enumerate(gradients):
            if gradient.dtype != dtype:
                raise AssertionError(
                    f"{kind}: {_of_array(number)}: got {gradient.dtype}"
                )
        if dtype == jnp.float16:
            signs = [jnp.sign(array) * 65504 for array in arrays]
            # Of which a derivative may be beyond float16 itself.
            _require_finite(run, "float16 arrays of its largest", signs, False)
        zeros = [jnp.zeros_like(array) for array in arrays]
        _require_finite(run, f"{jnp.dtype(dtype).name} zeros", zeros)


def _from_rows(
    rows: Callable[[int, int], np.ndarray], shape: tuple[int, ...], axis: int | None
) -> np.ndarray:
    """An array of rows (N, D) along the batch and the last axis; others repeat them."""
    if axis is None and len(shape) > 1:
        axis = 0
    sizes = [n if i in (axis, len(shape) - 1) else 1 for i, n in enumerate(shape)]
    count = 1 if axis is None else shape[axis]
    matrix = rows(count, math.prod(sizes) // count)
    return np.broadcast_to(matrix.reshape(sizes), shape).astype(np.float32)


# Each from the numbers of rows and columns to an array of that shape.
_HAZARDS: Mapping[str, Callable[[int, int], np.ndarray]] = {
    "zeros": lambda n, d: np.zeros((n, d)),
    "constant": lambda n, d: np.full((n, d), 3.7),
    "duplicated rows": lambda n, d: np.tile(_random((1, d), 3), (n, 1)),
    "half of the rows duplicated": lambda n, d: _random((n, d), 3)[
        np.arange(n) % max(n // 2, 1)
    ],
    "one-hot rows": np.eye,
    "one live column": lambda n, d: _random((n, d), 3) * (np.arange(d) == 0),
    "subnormal": lambda n, d: 1e-41 * _random((n, d), 3),
    "tiny (1e-25)": lambda n, d: 1e-25 * _random((n, d), 3),
    "float16 max": lambda n, d: 65504.0 * np.sign(_random((n, d), 3)),
    "off center": lambda n, d: 300 + 1e-3 * _random((n, d), 3),
    "unequal columns": lambda n, d: _random((n, d), 3) * np.logspace(-6, 6, d),
}
# The same, times the largest magnitude.
_LARGE: Mapping[str, Callable[[int, int], np.ndarray]] = {
    "large constant": lambda n, d: np.ones((n, d)),
    "largest": lambda n, d: np.sign(_random((n, d), 3)),
    "largest, unequal": lambda n, d: np.tanh(_random((n, d), 3)),
}


def _hazards(
    shapes: list[tuple[int, ...]], axes: tuple[int | None, ...], largest: float
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Each hazard by name: the same in all arrays, against others, in each alone."""
    random = [_random(shape, number) for number, shape in enumerate(shapes)]
    for scale, forms in ((1.0, _HAZARDS), (largest, _LARGE)):
        for name, form in forms.items():
            first, *others = [
                np.clip(scale * _from_rows(form, shape, axis), -largest, largest)
                for shape, axis in zip(shapes, axes, strict=True)
            ]
            yield name, [first, *others]
            if others:
                rolled = [
                    np.roll(array, 1, axis or 0)
                    for array, axis in zip(others, axes[1:], strict=True)
                ]
                yield f"{name}, against the next row", [first, *rolled]
                yield f"{name}, against its negative", [first, *[-a for a in others]]
                for number, array in enumerate([first, *others]):
                    alone = [*random[:number], array, *random[number + 1 :]]
                    yield f"{name}, in array {number} alone", alone


def _check_finite(
    run: Run,
    shapes: list[tuple[int, ...]],
    axes: tuple[int | None, ...],
    largest: float,
) -> None:
    for kind, arrays in _hazards(shapes, axes, largest):
        _require_finite(run, kind, arrays)
    bound = float(np.float32(largest))
    elements = st.floats(-bound, bound, width=32)

    @hypothesis.settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[
            hypothesis.HealthCheck.too_slow,
            hypothesis.HealthCheck.data_too_large,
        ],
    )
    @hypothesis.given(
        st.tuples(*[hnp.arrays(np.float32, s, elements=elements) for s in shapes])
    )
    def whatever_is_drawn(arrays):
        _require_finite(run, "drawn by hypothesis", arrays)

    whatever_is_drawn()


def _check_nothing_is_hidden(run: Run, random: list[np.ndarray]) -> None:
    for number, array in enumerate(random):
        inner = tuple(min(1, size - 1) for size in array.shape)
        for bad in (np.nan, np.inf, -np.inf):
            wrong = array.copy()
            wrong[inner] = bad
            value, _ = run(*random[:number], wrong, *random[number + 1 :])
            if np.isfinite(value):
                raise AssertionError(
                    f"not hidden: {bad} in array {number}: value: got {value}, expected"
                    " one that is not finite"
                )


def _check_which_have_gradients(
    run: Run, random: list[np.ndarray], constants: Sequence[int]
) -> None:
    value, gradients = run(*random)
    for number, gradient in enumerate(gradients):
        if number in constants:
            if np.any(gradient):
                raise AssertionError(
                    f"gradients: array {number} gets a gradient of up to"
                    f" {np.abs(gradient).max():.3g}, expected none of one of constants"
                )
        elif not np.any(gradient):
            moved = random[number] + 0.1 * _random(random[number].shape, 11)
            other, _ = run(*random[:number], moved, *random[number + 1 :])
            if other != value:
                raise AssertionError(
                    f"gradients: array {number} gets no gradient, though the value"
                    f" depends on it; if it is a target, say constants=({number},)"
                )


def _check_permutation(
    run: Run, random: list[np.ndarray], axes: tuple[int | None, ...]
) -> None:
    value, gradients = run(*random)
    batch = {
        array.shape[axis]
        for array, axis in zip(random, axes, strict=True)
        if axis is not None
    }
    if len(batch) != 1:
        raise ValueError(f"shapes: got batches of {sorted(batch)}, expected one size")
    (size,) = batch
    orders = {
        "the rows reversed": np.arange(size)[::-1],
        "the rows shifted by one": np.roll(np.arange(size), 1),
        "the rows in random order": np.random.default_rng(0).permutation(size),
    }

    def permuted(array, axis, order):
        return array if axis is None else np.take(array, order, axis)

    for kind, order in orders.items():
        moved = [permuted(a, x, order) for a, x in zip(random, axes, strict=True)]
        got, got_gradients = run(*moved)
        difference = _difference(got, value, 1e-5, 1e-6)
        if difference:
            raise AssertionError(f"permutation: {kind}: value: {difference}")
        for number, gradient in enumerate(gradients):
            expected = permuted(np.asarray(gradient), axes[number], order)
            difference = _difference(got_gradients[number], expected, 1e-5)
            if difference:
                raise AssertionError(
                    f"permutation: {kind}: {_of_array(number)}: {difference}"
                )


def _orthonormal_columns(n: int, d: int) -> np.ndarray:
    """Centered columns of unit variance, as uncorrelated as n rows can be."""
    random = np.random.default_rng(0).standard_normal((n, d))
    left, _, right = np.linalg.svd(random - random.mean(axis=0), full_matrices=False)
    return np.sqrt(n) * left @ right


# Embeddings that a network which has not collapsed could give.
_SPREAD: Mapping[str, Callable[[int, int], np.ndarray]] = {
    "uncorrelated columns": _orthonormal_columns,
    "clusters": lambda n, d: 10.0 * np.eye(d)[np.arange(n) % d],
    "close clusters": lambda n, d: np.eye(d)[np.arange(n) % d],
} | {
    f"random rows times {scale}": lambda n, d, scale=scale: scale * _random((n, d), 0)
    for scale in (0.1, 1.0, 3.0, 10.0)
}


def _check_collapse(
    run: Run,
    shapes: list[tuple[int, ...]],
    axes: tuple[int | None, ...],
    collapsed: float | None,
) -> None:
    def at(constant):
        return float(run(*[np.full(s, constant, np.float32) for s in shapes])[0])

    if collapsed is not None:
        for constant in (0.1, -3.7, 300.0):
            value = at(constant)
            if not abs(value - collapsed) <= 1e-4 * max(1.0, abs(collapsed)):
                raise AssertionError(
                    f"collapse: every entry {constant}: value: got {value:.7g},"
                    f" expected collapsed={collapsed:.7g}"
                )
        return
    spread = {
        kind: float(
            run(*[_from_rows(rows, s, a) for s, a in zip(shapes, axes, strict=True)])[0]
        )
        for kind, rows in _SPREAD.items()
    }
    best = min(spread, key=lambda kind: spread[kind])
    for constant in (0.0, 0.1, -3.7, 300.0):
        value = at(constant)
        margin = 1e-4 * max(abs(value), abs(spread[best]))
        if not value > spread[best] + margin:
            raise AssertionError(
                f"collapse: every entry {constant}: value: got {value:.7g}, expected"
                f" more than the {spread[best]:.7g} of embeddings that agree and are"
                f" spread ({best}). The loss does not see collapse; if it is lowest"
                f" there, as BYOL's is, say collapsed={value:.6g}"
            )


def _check_numerical_gradients(
    run: Run, shapes: list[tuple[int, ...]], constants: Sequence[int]
) -> None:
    with jax.enable_x64(True):
        for number in sorted(set(range(len(shapes))) - set(constants)):
            for seed in (1, 2):
                arrays = [
                    0.6 * _random(shape, seed + 10 * i).astype(np.float64)
                    for i, shape in enumerate(shapes)
                ]

                def of_array(x, arrays=arrays, number=number):
                    return run(*arrays[:number], x, *arrays[number + 1 :])

                def value(x, of_array=of_array):
                    return of_array(x)[0]

                def value_and_pullback(x, of_array=of_array, number=number):
                    value, gradients = of_array(x)
                    return value, lambda cotangent: (cotangent * gradients[number],)

                exact = value(arrays[number]).dtype == np.float64
                tolerance = None if exact else 0.02
                try:
                    # As check_grads, of what is already compiled.
                    check_vjp(
                        value,
                        value_and_pullback,
                        (arrays[number],),
                        atol=tolerance,
                        rtol=tolerance,
                        eps=1e-4 if exact else 1e-2,
                    )
                except AssertionError as error:
                    raise AssertionError(
                        f"numerical gradients: random rows: {_of_array(number)} along a"
                        " random direction (ACTUAL) and by finite differences"
                        f" (DESIRED): {error}"
                    ) from None
