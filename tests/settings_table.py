"""Every public function under every setting and transformation, as a table.

python tests/settings_table.py > table.md
python tests/settings_table.py --only vicreg dino

A cell is "yes" where the function gives the same value and gradient as it does alone
under each setting of the column, and the number of a reason where it cannot. Otherwise
the error is printed, and the script fails. The tests run a fixed part of it.
"""

import argparse
import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import flags
import jax
import jax.numpy as jnp
import numpy as np
from augment.table import COUNT, HEIGHT, OPERATIONS, WIDTH
from evaluation.table import FIGURES, neighbors, probe, votes
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from losses.table import NATURAL, TABLE

from jemjax import evaluation, losses, targets


@dataclasses.dataclass(frozen=True, eq=False)  # the key of what is kept of it
class Case:
    """A function of arrays whose first axis, or another, is the batch.

    Attributes:
        call: of the arrays; with `axis_name`, if `shards`, of a shard of each.
        arrays: the arguments.
        varied: how many of the first arrays have a gradient.
        batch_axes: of the arrays; None for one that every shard has whole.
        shards: whether it takes `axis_name`, and gives the same on each shard.
        differences: the share of a second derivative's entries that finite differences
            confirm: not all where values are clipped, none where they are rounded and
            where the loss makes constants of parts of what has a gradient.
        rounded: whether values and derivatives are rounded to bfloat16.
        host: whether it computes with NumPy, and so is not traced.
    """

    call: Callable[..., Any]
    arrays: tuple[Any, ...]
    varied: int
    batch_axes: tuple[int | None, ...]
    shards: bool = False
    differences: float = 1.0
    rounded: bool = False
    host: bool = False


def _random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _same_everywhere(function):
    """A function of rows, summed over the batch so that each shard has the result."""

    def call(*arrays, axis_name=None):
        total = jnp.sum(jnp.sin(function(*arrays, axis_name=axis_name)))
        return total if axis_name is None else jax.lax.psum(total, axis_name)

    return call


def _schedules(steps):
    rates = (
        targets.linear(0.0, 1.0, 100),
        targets.cosine(1.0, 0.1, 100),
        targets.warmup_cosine(peak=1.0, warmup_steps=10, total_steps=100, final=0.1),
        targets.per_epoch(targets.cosine(1.0, 0.0, 10), 10),
    )
    return [jax.vmap(rate)(steps) for rate in rates]


def cases() -> dict[str, Case]:
    """Every function, by the name of its room and its own."""
    made = {}
    for name, loss in TABLE.items():
        arrays = tuple(_random((8, 6), seed) for seed in range(loss.count))
        axes = (0,) * loss.count
        made[f"losses.{name}"] = Case(
            loss.function,
            arrays,
            loss.varied,
            axes,
            shards=True,
            differences=0.0 if loss.own_constants else 1.0,
        )
    for name, (loss, shapes, promises) in NATURAL.items():
        arrays = tuple(_random(shape, seed) for seed, shape in enumerate(shapes))
        axes = promises["batch_axes"]
        axes = axes if isinstance(axes, tuple) else (axes,) * len(shapes)
        made[f"losses.{name}, its own axes"] = Case(
            loss, arrays, 1, axes, True, 0.0 if name == "swav" else 1.0
        )
    scores, layers = _random((8, 6), 0), _random((8, 2, 3, 4), 1)
    center, logits = _random((6,), 2), _random((2, 8, 6), 3)
    pair = (_random((8, 6), 4), _random((8, 6), 5))
    made |= {
        "losses.sinkhorn": Case(
            _same_everywhere(losses.sinkhorn), (0.1 * scores,), 1, (0,), True
        ),
        "losses.sinkhorn, by logarithms": Case(
            _same_everywhere(losses.sinkhorn), (scores,), 1, (0,), True
        ),
        "losses.data2vec_target": Case(
            functools.partial(losses.data2vec_target, stop_gradient=False),
            (layers,),
            1,
            (0,),
        ),
        "losses.update_center": Case(
            losses.update_center, (center, logits), 0, (None, 1), True
        ),
        "losses.vicreg_terms": Case(losses.vicreg_terms, pair, 2, (0, 0), True),
        "losses.barlow_twins_terms": Case(
            losses.barlow_twins_terms, pair, 2, (0, 0), True
        ),
    }
    for name, figure in FIGURES.items():
        made[f"evaluation.{name}"] = Case(figure, (scores,), 1, (0,))
    labels, assigned = np.arange(8) % 3, (np.arange(8) % 2).astype(np.int32)
    of_host = {
        "cluster_accuracy": lambda s, a: evaluation.cluster_accuracy(a, labels),
        "normalized_mutual_information": (
            lambda s, a: evaluation.normalized_mutual_information(a, labels)
        ),
        "prototype_usage": lambda s, a: evaluation.prototype_usage(a, 2),
        "few_labels": lambda s, a: evaluation.few_labels(a, 2, 0),
        "label_clusters": lambda s, a: evaluation.label_clusters(s, a),
        "few_label_cluster_accuracy": (
            lambda s, a: evaluation.few_label_cluster_accuracy(s, a, a, labels)
        ),
        "name_collapse": lambda s, a: len(
            evaluation.name_collapse(
                normalized_std=s[0, 0] ** 2, effective_rank=1.0, dimension=6
            )
        ),
    }
    for name, call in of_host.items():
        arrays = (scores, assigned)
        made[f"evaluation.{name}"] = Case(call, arrays, 0, (0, 0), host=True)
    made |= {
        "evaluation.knn_predict": Case(votes, (scores,), 1, (0,)),
        "evaluation.knn_accuracy": Case(neighbors, (scores,), 0, (0,)),
        "evaluation.linear_probe": Case(probe, (scores,), 0, (0,)),
    }
    made |= {
        "targets.moving_average": Case(
            lambda target, online: targets.moving_average(
                {"w": target}, {"w": online}, 0.9
            ),
            pair,
            2,
            (0, 0),
        ),
        "targets' schedules": Case(
            _schedules, (np.arange(0, 80, 10, dtype=np.int32),), 0, (0,)
        ),
    }
    images = np.random.default_rng(6).random((COUNT, HEIGHT, WIDTH, 3), np.float32)
    for name, operation in OPERATIONS.items():
        call = functools.partial(operation, jax.random.key(0))
        # A clipped pixel of a crop is a mixture of many.
        share = 0.8 if "views" in name else 0.97
        rounded = "bfloat16" in name
        made[f"augment.{name}"] = Case(
            call, (images,), 1, (0,), differences=share * (not rounded), rounded=rounded
        )
    return made


# What a function alone gives, and what a setting makes of it: a tree of arrays each.


def scalar(case: Case, **keywords: Any) -> Callable[..., jax.Array]:
    """One number that depends on all that a function returns."""

    def call(*arrays):
        made = jax.tree.leaves(case.call(*arrays, **keywords))
        dtype = jnp.result_type(float)  # float64 with x64
        return sum(jnp.sum(jnp.sin(jnp.asarray(leaf).astype(dtype))) for leaf in made)

    return call


def gradient(case: Case, **keywords: Any) -> Callable[..., Any]:
    """The value and the gradients of all that have one."""
    function = scalar(case, **keywords)
    if not case.varied:
        return lambda *arrays: (function(*arrays), ())
    return jax.value_and_grad(function, tuple(range(case.varied)))


def along(case: Case) -> Any:
    """A direction in which the arrays that have a gradient move."""
    return tuple(_random(a.shape, 20 + i) for i, a in enumerate(case.arrays))[
        : case.varied
    ]


def _of_varied(case: Case) -> Callable[..., jax.Array]:
    rest = case.arrays[case.varied :]
    return lambda *varied: scalar(case)(*varied, *rest)


@functools.cache
def _slope(case: Case) -> jax.Array:
    """The derivative along the direction, by the gradient."""
    _, of_arrays = _alone(case)
    pairs = zip(of_arrays, along(case), strict=True)
    return sum((jnp.sum(g * d) for g, d in pairs), jnp.zeros(()))


@functools.cache
def _alone(case: Case) -> Any:
    return jax.jit(gradient(case))(*case.arrays)


def _batch_of_problems(case: Case) -> Any:
    stacked = [jnp.stack([array, array[::-1]]) for array in case.arrays]
    made = jax.jit(jax.vmap(gradient(case)))(*stacked)
    return jax.tree.map(lambda leaf: leaf[0], made)


def _jvp(case: Case) -> Any:
    return jax.jvp(jax.jit(_of_varied(case)), case.arrays[: case.varied], along(case))[
        1
    ]


def _linearize(case: Case) -> Any:
    return jax.linearize(jax.jit(_of_varied(case)), *case.arrays[: case.varied])[1](
        *along(case)
    )


def _jacfwd(case: Case) -> Any:
    jacobian = jax.jacfwd(_of_varied(case), tuple(range(case.varied)))
    of_arrays = jax.jit(jacobian)(*case.arrays[: case.varied])
    pairs = zip(of_arrays, along(case), strict=True)
    return sum(jnp.sum(g * d) for g, d in pairs)


@functools.cache
def _hessian_vector(case: Case, kind: str) -> Any:
    """A product of the Hessian and the direction, in one of three orders."""
    varied = case.arrays[: case.varied]
    run = jax.grad(_of_varied(case), tuple(range(case.varied)))

    def slope(*arrays):
        pairs = zip(run(*arrays), along(case), strict=True)
        return sum(jnp.sum(g * d) for g, d in pairs)

    def moved(*arrays):
        return jax.jvp(_of_varied(case), arrays, along(case))[1]

    ways = {
        "forward over reverse": lambda *a: jax.jvp(run, a, along(case))[1],
        "reverse over reverse": jax.grad(slope, tuple(range(case.varied))),
        "reverse over forward": jax.grad(moved, tuple(range(case.varied))),
    }
    return jax.jit(ways[kind])(*varied)


def _second_difference(case: Case) -> Any:
    """How the gradient changes along the direction, by finite differences."""
    step = 1e-3
    with jax.enable_x64(True):
        rest = [jnp.asarray(a) for a in case.arrays[case.varied :]]
        run = jax.jit(
            jax.grad(
                lambda *varied: scalar(case)(*varied, *rest), tuple(range(case.varied))
            )
        )
        sides = [
            run(
                *[
                    np.asarray(array, np.float64) + sign * step * direction
                    for array, direction in zip(
                        case.arrays[: case.varied], along(case), strict=True
                    )
                ]
            )
            for sign in (1, -1)
        ]
        return jax.tree.map(lambda a, b: np.asarray((a - b) / (2 * step)), *sides)


def _scanned(case: Case) -> Any:
    """The gradient of a loop of two steps, the second of which counts nothing."""
    function = scalar(case)

    def run(*arrays):
        def step(total, share):
            return total + share * function(*arrays), None

        return jax.lax.scan(step, jnp.zeros(()), jnp.array([1.0, 0.0]))[0]

    if not case.varied:
        return jax.jit(run)(*case.arrays), ()
    return jax.jit(jax.value_and_grad(run, tuple(range(case.varied))))(*case.arrays)


def _in_while_loop(case: Case) -> Any:
    function = scalar(case)

    def run(*arrays):
        return jax.lax.while_loop(
            lambda carry: carry[0] < 1,
            lambda carry: (carry[0] + 1, function(*arrays)),
            (0, jnp.zeros(())),
        )[1]

    return jax.jit(run)(*case.arrays)


def _checkpoint(case: Case) -> Any:
    saved = jax.checkpoint(scalar(case))
    if not case.varied:
        return jax.jit(saved)(*case.arrays), ()
    run = jax.value_and_grad(saved, tuple(range(case.varied)))
    return jax.jit(jax.checkpoint(run))(*case.arrays)


def _donated(case: Case) -> Any:
    arrays = [jnp.array(array) for array in case.arrays]
    numbers = tuple(range(len(arrays)))
    with warnings.catch_warnings():
        # Not every array can be used for a result.
        warnings.filterwarnings("ignore", message="Some donated buffers")
        return jax.jit(gradient(case), donate_argnums=numbers)(*arrays)


def _ahead_of_time(case: Case) -> Any:
    return jax.jit(gradient(case)).lower(*case.arrays).compile()(*case.arrays)


def _exported(case: Case) -> Any:
    (size,) = jax.export.symbolic_shape("b")
    given = [
        jax.ShapeDtypeStruct(
            tuple(size if axis == i else n for i, n in enumerate(array.shape)),
            array.dtype,
        )
        for array, axis in zip(case.arrays, case.batch_axes, strict=True)
    ]
    export = jax.export.export(
        jax.jit(gradient(case)), platforms=("cpu", "cuda", "tpu")
    )
    return export(*given).call(*case.arrays)


def _mesh(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2, 2), ("a", "b", "model"), axis_types=(axis_type,) * 3)


def _specs(case: Case) -> list[P]:
    return [
        P() if axis is None else P(*[None] * axis, ("a", "b"))
        for axis in case.batch_axes
    ]


def _global_view(case: Case, axis_type: AxisType) -> Any:
    mesh = _mesh(axis_type)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(array, NamedSharding(mesh, spec))
            for array, spec in zip(case.arrays, _specs(case), strict=True)
        ]
        return jax.device_get(jax.jit(gradient(case))(*placed))


def _in_shard_map(case: Case, inner=None, outer=None, **keywords: Any) -> Any:
    """The gradient of `shard_map` over two axes; a third is left to the compiler."""
    mesh = _mesh(AxisType.Auto)
    function = scalar(case, axis_name=("a", "b"))
    sharded = jax.shard_map(
        inner(function) if inner else function,
        mesh=mesh,
        in_specs=tuple(_specs(case)),
        out_specs=P(),
        **keywords,
    )
    sharded = outer(sharded) if outer else sharded
    if not case.varied:
        return jax.jit(sharded)(*case.arrays), ()
    run = jax.value_and_grad(sharded, tuple(range(case.varied)))
    return jax.device_get(jax.jit(run)(*case.arrays))


def _mapped_inside(function):
    """Of one problem, as `vmap` has it."""

    def run(*arrays):
        stacked = [array[None] for array in arrays]
        return jax.vmap(function)(*stacked)[0]

    return run


def _loop_around(function):
    def run(*arrays):
        return jax.lax.scan(lambda *_: (None, function(*arrays)), None, None, 1)[1][0]

    return run


SECOND = ("forward over reverse", "reverse over reverse", "reverse over forward")
SLOPES = {"jvp": _jvp, "linearize": _linearize, "jacfwd": _jacfwd}
IN_SHARDS: dict[str, Callable[[Case], Any]] = {
    "partial shard_map": functools.partial(_in_shard_map, axis_names={"a", "b"}),
    "shard_map, unchecked": functools.partial(_in_shard_map, check_vma=False),
    "shard_map of vmap": functools.partial(_in_shard_map, inner=_mapped_inside),
    "shard_map in scan": functools.partial(_in_shard_map, outer=_loop_around),
}
ALIKE: dict[str, Callable[[Case], Any]] = {
    "vmap": _batch_of_problems,
    "scan": _scanned,
    "checkpoint": _checkpoint,
    "donated": _donated,
    "ahead of time": _ahead_of_time,
    "export": _exported,
    "Auto mesh": functools.partial(_global_view, axis_type=AxisType.Auto),
    "Explicit mesh": functools.partial(_global_view, axis_type=AxisType.Explicit),
}
FLAGS = {**flags.TRACED, **flags.BARE, **flags.COMPILED}
SETTINGS = (*FLAGS, *ALIKE, *SLOPES, *SECOND, "while_loop", *IN_SHARDS)
COLUMNS = {
    "JAX's flags": [name for name in FLAGS if name not in flags.PRECISIONS],
    "precisions": flags.PRECISIONS,
    "vmap": ("vmap",),
    "loops": ("scan", "while_loop"),
    "checkpoint": ("checkpoint",),
    "compiled ahead, donated": ("ahead of time", "donated"),
    "export, any batch": ("export",),
    "forward mode": tuple(SLOPES),
    "second derivatives": SECOND,
    "Auto, Explicit meshes": ("Auto mesh", "Explicit mesh"),
    "in shard_map": tuple(IN_SHARDS),
}

HOST = "It counts on the host, with NumPy, and refuses traced arrays in a sentence."
NO_GRADIENT = "It has no gradient: a count, a fit or a constant."
NO_AXIS = "It takes no axis name: each row by itself, or the whole batch."
KNOWN = "All rows are decomposed or compared together, so their number has to be known."
OF_KNOWN = ("rankme", "alpha_req", "knn_predict", "knn_accuracy", "linear_probe")


def reason(name: str, case: Case, setting: str) -> str | None:
    """Why a function is not for a setting, if so."""
    if case.host and setting not in FLAGS:
        return HOST
    if not case.varied and setting in (*SLOPES, *SECOND):
        return NO_GRADIENT
    if not case.shards and setting in IN_SHARDS:
        return NO_AXIS
    if setting == "export" and name.removeprefix("evaluation.") in OF_KNOWN:
        return KNOWN
    return None


def _under_a_flag(case: Case, setting: str) -> Any:
    run = case.call if case.host else gradient(case)
    if setting in flags.BARE:
        with FLAGS[setting]():
            return run(*map(jnp.asarray, case.arrays))
    arrays = case.arrays if case.host else jax.device_put(case.arrays)
    with FLAGS[setting]():
        return (run if case.host else jax.jit(run))(*arrays)


def check(case: Case, setting: str) -> None:
    """Runs a function under a setting.

    Raises:
        AssertionError: if it gives something else than it does alone.
        Exception: what it raises.
    """
    if setting == SECOND[0] and case.differences:
        _confirm(_hessian_vector(case, setting), _second_difference(case), case)
    tolerance = 2e-4 if setting in (*SECOND, *SLOPES) else 3e-5
    tolerance = 1e-2 if case.rounded else tolerance
    if setting in FLAGS:
        expected = case.call(*case.arrays) if case.host else _alone(case)
        got = _under_a_flag(case, setting)
    elif setting in SLOPES:
        expected, got = _slope(case), SLOPES[setting](case)
    elif setting in SECOND:
        expected = _hessian_vector(case, SECOND[0])
        got = _hessian_vector(case, setting)
    elif setting == "while_loop":
        expected, got = _alone(case)[0], _in_while_loop(case)
    else:
        run = (ALIKE | IN_SHARDS)[setting]
        expected, got = _alone(case), run(case)
    _compare(got, expected, tolerance)


def _confirm(derivatives: Any, differences: Any, case: Case) -> None:
    for got, expected in zip(derivatives, differences, strict=True):
        agree = np.abs(got - expected) <= 1e-2 * max(1.0, np.abs(got).max())
        assert agree.mean() >= case.differences, f"{agree.mean():.1%} of {got} agree"


def _compare(got: Any, expected: Any, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = max(1.0, np.abs(b).max(initial=0.0))
        assert np.isfinite(a).all(), f"got {a}"
        assert np.abs(a - b).max(initial=0.0) <= tolerance * scale, f"{a} is not {b}"


def row_of(name: str, case: Case) -> tuple[dict[str, str], list[str]]:
    """What each setting comes to, "yes", a reason or "no", and what was raised."""
    made, failed = {}, []
    for setting in SETTINGS:
        made[setting] = reason(name, case, setting) or "yes"
        if made[setting] != "yes":
            continue
        try:
            check(case, setting)
        except Exception as error:
            made[setting] = "**no**"
            text = f"{type(error).__name__}: {str(error).strip()[:300]}"
            failed.append(f"{name}, {setting}: {text}")
    return made, failed


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    numbers, failed = {}, []
    for column, settings in COLUMNS.items():
        print(f"- {column}: {', '.join(settings)}")
    print(f"\n| | {' | '.join(COLUMNS)} |")
    print("|" + "---|" * (1 + len(COLUMNS)))
    for name, case in cases().items():
        if not any(part in name for part in options.only):
            continue
        made, errors = row_of(name, case)
        for error in errors:
            print(error, file=sys.stderr, flush=True)
        failed += errors
        cells = []
        for settings in COLUMNS.values():
            results = dict.fromkeys(made[setting] for setting in settings)
            cells.append(
                ", ".join(
                    f"({numbers.setdefault(each, len(numbers) + 1)})"
                    if each.endswith(".")
                    else each
                    for each in results
                )
            )
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)
    print()
    for why, number in numbers.items():
        print(f"({number}) {why}")
    if failed:
        sys.exit(f"{len(failed)} cells failed")


if __name__ == "__main__":
    main()
