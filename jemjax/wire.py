"""What a program sends between devices, read from the program that XLA compiled.

`collectives` reads any compiled program, a training step as well as a loss;
`loss_traffic` compiles a loss, sharded over the batch, to be read so. Nothing is run.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jemjax.runtime import quick_compilation


class Collective(NamedTuple):
    """One collective of a program.

    Of arrays of S bytes, a device of a group of n sends to the others, in the form that
    sends least, with f = (n - 1) / n,

    all-reduce          2 f S
    all-gather            f S   S of the result
    reduce-scatter        f S   S of the operand
    all-to-all            f S
    collective-permute      S

    Attributes:
        operation: its name, as above.
        arrays: its results, written as "f32[256,512]"; several where XLA merged some.
        group_size: n, how many devices take part together.
        times: how often the program runs it, or None in a loop of unknown length.
        branches: the conditionals that it is in, each as (name, branch); of every
            conditional one branch is run.
        bytes: what one device sends each time.
    """

    operation: str
    arrays: tuple[str, ...]
    group_size: int
    times: int | None
    branches: tuple[tuple[str, int], ...]
    bytes: float


def collectives(program: jax.stages.Compiled | str) -> list[Collective]:
    """The collectives of a compiled program, those in loops counted.

    They are what the backend at hand compiled: XLA merges small ones where it can, and
    more of them on GPUs and TPUs than on CPUs. Those of which a group is one device are
    listed, with 0 bytes.

    Args:
        program: as of `jax.jit(f).lower(...).compile()`, or its HLO text.

    Returns:
        The collectives, in the order of the program.

    Raises:
        ValueError: for a collective of another kind, groups written another way, or
            what is not HLO text.
    """
    text = program if isinstance(program, str) else program.as_text() or ""
    computations, entry = _computations(text)
    if entry not in computations:
        raise ValueError(f"program: got {text[:60]!r}, expected HLO text with an ENTRY")
    devices = 1
    for count in re.findall(
        r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0]
    ):
        devices *= int(count)
    found: list[Collective] = []

    def visit(computation, times, branches):
        for name, result, opcode, attributes in computations.get(computation, ()):
            if opcode.removesuffix("-start") in _KINDS:
                found.append(
                    _collective(result, opcode, attributes, devices, times, branches)
                )
            elif opcode in _OTHER_KINDS:
                _refuse(f"a {opcode}")
            elif opcode == "conditional":
                for index, branch in enumerate(_branches(attributes)):
                    visit(branch, times, (*branches, (name, index)))
            else:
                trips = 1 if opcode != "while" else _trips(attributes)
                for role, called in _called(attributes):
                    known = times is not None and trips is not None
                    # A loop's condition is computed once more than its body.
                    runs = times * (trips + (role == "condition")) if known else None
                    visit(called, runs, branches)

    visit(entry, 1, ())
    return found


def bytes_sent(found: Sequence[Collective]) -> float:
    """What one device sends in a run of a program, in bytes.

    Of a conditional it is the branch that sends most.

    Args:
        found: the program's `collectives`, or some of them.

    Returns:
        The sum of times * bytes.

    Raises:
        ValueError: if it is not known how often one of them is run.
    """
    total, conditionals = 0.0, {}
    for collective in found:
        if collective.times is None:
            raise ValueError(
                f"found: got a {collective.operation} of {collective.arrays} in a loop"
                " of unknown length, expected loops of which the length is static"
            )
        if collective.branches:
            (name, index), *inner = collective.branches
            branches = conditionals.setdefault(name, {})
            branches.setdefault(index, []).append(
                collective._replace(branches=tuple(inner))
            )
        else:
            total += collective.times * collective.bytes
    for branches in conditionals.values():
        total += max(bytes_sent(branch) for branch in branches.values())
    return total


def loss_traffic(
    loss: Callable[..., jax.Array],
    *arrays: Any,
    devices: int,
    batch_axes: int | None | Sequence[int | None] = 0,
    gradients: bool = True,
) -> list[Collective]:
    """The collectives of a loss, of which the batch is sharded over devices.

    It is compiled as in a training step: the loss in a `jax.shard_map`, and its
    gradient with respect to all arrays that have a batch.

    Args:
        loss: of arrays and `axis_name`; `functools.partial` gives it other arguments.
        *arrays: of the global batch, or `jax.ShapeDtypeStruct`s of their shapes.
        devices: over how many of this process's devices, the first ones.
        batch_axes: which axis is the batch, of all arrays or of each; an array that
            has none (None) is whole on every device.
        gradients: whether the gradient is computed too.

    Returns:
        The `collectives` of value and gradient.

    Raises:
        ValueError: if there are fewer devices, or they do not divide the batch.
    """
    if not 1 <= devices <= jax.device_count():
        raise ValueError(
            f"devices: got {devices}, expected 1 to {jax.device_count()}, those of this"
            " process; more, virtual ones on a CPU, are made by"
            f' jax.config.update("jax_num_cpu_devices", {devices}) before JAX starts'
        )
    if batch_axes is None or isinstance(batch_axes, int):
        batch_axes = [batch_axes] * len(arrays)
    specs = []
    for number, (array, axis) in enumerate(zip(arrays, batch_axes, strict=True)):
        if axis is not None and array.shape[axis] % devices:
            raise ValueError(
                f"arrays[{number}]: got a batch of {array.shape[axis]}, expected a"
                f" multiple of the {devices} devices"
            )
        names = () if axis is None else (*[None] * axis, "data")
        specs.append(PartitionSpec(*names))
    mesh = jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    function = jax.shard_map(
        lambda *arrays: loss(*arrays, axis_name="data"),
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=PartitionSpec(),
    )
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    results: Any = NamedSharding(mesh, PartitionSpec())
    if gradients:
        varied = [n for n, axis in enumerate(batch_axes) if axis is not None]
        function = jax.value_and_grad(function, tuple(varied))
        results = (results, tuple(shardings[n] for n in varied))
    compiled = jax.jit(
        function,
        in_shardings=tuple(shardings),
        out_shardings=results,
        compiler_options=quick_compilation(),
    ).lower(*[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays])
    return collectives(compiled.compile())


# Sent per byte of the results, by the size of the group.
_KINDS: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,  # a result is a part of the operand
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_OTHER_KINDS = (
    "collective-broadcast",
    "collective-broadcast-start",
    "ragged-all-to-all",
    "ragged-all-to-all-start",
)


def _refuse(what):
    raise ValueError(f"program: got {what}, expected one of {', '.join(_KINDS)}")


def _computations(text):
    """{computation: [(name, result, opcode, attributes)]}, and the entry's name."""
    computations, entry, lines = {}, "", []
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([^\s(]+) .*\{$", line)
        if header and not line.startswith("HloModule"):
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif instruction := re.match(r"\s+(?:ROOT )?%?(\S+) = (.*)", line):
            name, rest = instruction.groups()
            end = _end_of_type(rest)
            opcode, _, attributes = rest[end:].strip().partition("(")
            lines.append((name, rest[:end], opcode, attributes))
    return computations, entry


def _end_of_type(text):
    # A tuple's is in parentheses, of which the layouts of a TPU have some more.
    depth = 0
    for position, character in enumerate(text):
        if character == " " and depth == 0:
            return position
        depth += (character == "(") - (character == ")")
    return len(text)


def _trips(attributes):
    count = re.search(r"known_trip_count\W+n\W+(\d+)", attributes)
    return int(count[1]) if count else None


def _called(attributes):
    """Pairs of a role and a computation's name."""
    roles = "body|condition|calls|to_apply|called_computations"
    for role, names in re.findall(rf"\b({roles})=(\{{[^}}]*\}}|[^\s,]+)", attributes):
        for name in re.findall(r"[\w.-]+", names):
            yield role, name


def _branches(attributes):
    several = re.search(r"branch_computations=\{([^}]*)\}", attributes)
    if several:
        return re.findall(r"[\w.-]+", several[1])
    return [
        name
        for value in ("false", "true")
        for name in re.findall(rf"\b{value}_computation=%?([\w.-]+)", attributes)
    ]


def _collective(result, opcode, attributes, devices, times, branches):
    operation = opcode.removesuffix("-start")
    if opcode.endswith("-start") and operation != "all-reduce":
        # The operands, then the results, then what a backend keeps for itself.
        inside = result[1:-1]
        inside = inside[_end_of_type(inside) :].strip()
        result = inside[: _end_of_type(inside)]
    arrays = tuple(re.findall(r"\b[a-z]\w*\[[\d,<=]*\]", result))
    size = sum(_bytes(array) for array in arrays)
    if operation == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", attributes)
        group_size = len(pairs)
        size = size if any(source != target for source, target in pairs) else 0
    else:
        group_size = _group_size(attributes, devices)
    sent = _KINDS[operation](group_size) * size
    return Collective(operation, arrays, group_size, times, branches, sent)


def _bytes(array):
    dtype, _, sizes = array.rstrip("]").partition("[")
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return bits * math.prod(int(size) for size in re.findall(r"\d+", sizes)) / 8


def _group_size(attributes, devices):
    if "replica_groups=" not in attributes or "replica_groups={}" in attributes:
        return devices
    written = attributes.partition("replica_groups=")[2]
    if groups := re.match(r"\{(\{[\d,]*\},?)+\}", written):
        return max(len(g.split(",")) for g in re.findall(r"\{([\d,]+)\}", groups[0]))
    if groups := re.match(r"\[\d+,(\d+)\]<=", written):
        return int(groups[1])
    if groups := re.match(r"mesh\[(.*?)\]\s*\{(.*?)\}", written):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", groups[1]))
        # A part of an axis is written with the size of what comes before it, and its.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", groups[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    raise ValueError(
        f"program: got the groups {written[:60]}, expected lists of devices"
    )
