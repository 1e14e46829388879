"""What crosses the wire: counted in compiled programs, and no more than is written."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jemjax import losses, wire
from jemjax.losses import covariance
from jemjax.runtime import quick_compilation

AUTO = jax.sharding.AxisType.Auto


def _array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _mesh(*sizes, names=("data",)):
    return jax.make_mesh(sizes, names, axis_types=(AUTO,) * len(names))


def _compile(function, *arrays):
    jitted = jax.jit(function, compiler_options=quick_compilation())
    return jitted.lower(*arrays).compile()


HEADER = "HloModule step, is_scheduled=true, num_partitions=8\n\n"
ENTRY = "ENTRY %main (x: f32[4,6]) -> f32[4,6] {\n  %x = f32[4,6] parameter(0)\n"


@pytest.mark.parametrize(
    ("instruction", "operation", "arrays", "group_size", "sent"),
    [
        (
            "f32[4,6]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}},"
            " to_apply=%sum",
            "all-reduce",
            ("f32[4,6]",),
            4,
            2 * 3 / 4 * 96,
        ),
        (
            "(f32[4,6]{1,0:T(8,128)}, bf16[3]{0}) all-reduce(f32[4,6] %x, bf16[3] %y),"
            " replica_groups={}, to_apply=%sum",
            "all-reduce",
            ("f32[4,6]", "bf16[3]"),
            8,
            2 * 7 / 8 * (96 + 6),
        ),
        (
            "f32[32,6]{1,0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}",
            "all-gather",
            ("f32[32,6]",),
            8,
            7 / 8 * 768,
        ),
        (
            "f32[2,6] reduce-scatter(%x), replica_groups=[4,2]<=[2,4]T(1,0),"
            " to_apply=%sum",
            "reduce-scatter",
            ("f32[2,6]",),
            2,
            1 / 2 * 96,
        ),
        (
            "(pred[1,6], /*index=1*/pred[1,6]) all-to-all(%x, %y),"
            " replica_groups=mesh['replica'=2,'data'=4] {'replica'}",
            "all-to-all",
            ("pred[1,6]", "pred[1,6]"),
            2,
            1 / 2 * 12,
        ),
        (
            "s4[4,6] all-reduce(%x), to_apply=%sum,"
            " replica_groups=mesh['a'=2,'b'=4, device_ids=([2,4]<=[4,2]T(1,0))]"
            " {'a','b':(1)2}",
            "all-reduce",
            ("s4[4,6]",),
            4,
            2 * 3 / 4 * 12,
        ),
        (
            "f32[4,6] collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            ("f32[4,6]",),
            2,
            96,
        ),
        (
            "f32[4,6] all-reduce(%x), replica_groups={{0},{1}}, to_apply=%sum",
            "all-reduce",
            ("f32[4,6]",),
            1,
            0,
        ),
        (
            "f32[4,6] all-reduce-start(%x), replica_groups={{0,1}}, to_apply=%sum",
            "all-reduce",
            ("f32[4,6]",),
            2,
            96,
        ),
        (
            "(f32[4,6]{1,0:T(8,128)}, f32[8,6]{1,0}) all-gather-start(%x),"
            " replica_groups={{0,1}}",
            "all-gather",
            ("f32[8,6]",),
            2,
            96,
        ),
        (
            "((f32[4,6], f32[2]), (f32[8,6], f32[4])) all-gather-start(%x, %y),"
            " replica_groups={{0,1}}",
            "all-gather",
            ("f32[8,6]", "f32[4]"),
            2,
            (192 + 16) / 2,
        ),
        (
            "(f32[4,6], f32[4,6], u32[], u32[]) collective-permute-start(%x),"
            " source_target_pairs={{0,1},{1,2},{2,0}}",
            "collective-permute",
            ("f32[4,6]",),
            3,
            96,
        ),
        (
            "((f32[4,6]), f32[4,6]) all-to-all-start(%x), replica_groups={{0,1}}",
            "all-to-all",
            ("f32[4,6]",),
            2,
            48,
        ),
    ],
)
def test_collectives_as_they_are_written(
    instruction, operation, arrays, group_size, sent
):
    text = f"{HEADER}{ENTRY}  ROOT %c.1 = {instruction}, channel_id=1\n}}\n"
    if "-start" in instruction:
        text += f"  %done = f32[4,6] {operation}-done(%c.1)\n"
    expected = wire.Collective(operation, arrays, group_size, 1, (), sent)
    assert wire.collectives(text) == [expected]
    assert wire.bytes_sent([expected]) == sent


def test_one_that_a_computation_of_its_own_makes_asynchronous():
    text = (
        HEADER + "%wrapped (p: f32[4,6]) -> f32[1,6] {\n  %p = f32[4,6] parameter(0)\n"
        "  ROOT %r = f32[1,6] reduce-scatter(%p), replica_groups=[2,4]<=[8]\n}\n\n"
        + ENTRY
        + "  %s = ((f32[4,6]), f32[1,6], u32[]) async-start(%x), calls=%wrapped\n"
        "  ROOT %d = f32[1,6] async-done(%s)\n}\n"
    )
    (found,) = wire.collectives(text)
    assert (found.operation, found.times, found.bytes) == ("reduce-scatter", 1, 72)


LOOP = (
    HEADER
    + """%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = f32[4]{0} all-reduce(%g), replica_groups={{0,1}}, to_apply=%sum
}

%condition (p: (s32[], f32[4])) -> pred[] {
  %m = f32[] all-reduce(%h), replica_groups={{0,1}}, to_apply=%sum
}

"""
    + ENTRY
    + """  %w = (s32[], f32[4]) while(%t), condition=%condition, body=%body
}
"""
)


def test_a_loop_counts_as_often_as_it_runs():
    known = 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    found = wire.collectives(LOOP.replace("body=%body", known))
    assert [c.times for c in found] == [6, 5]  # the condition, then the body
    assert wire.bytes_sent(found) == 6 * 4 + 5 * 16


def test_a_loop_of_unknown_length_is_said_to_be_one():
    found = wire.collectives(LOOP)
    assert [c.times for c in found] == [None, None]
    with pytest.raises(ValueError, match="found: got a all-reduce of .* unknown"):
        wire.bytes_sent(found)


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%small, %large}",
        "true_computation=%large, false_computation=%small",
    ],
)
def test_of_a_conditional_the_branch_that_sends_most(branches):
    def computation(name, size):
        return (
            f"%{name} (p: f32[4]) -> f32[4] {{\n"
            f"  %r = f32[{size}] all-reduce(%g), replica_groups={{{{0,1}}}}\n}}\n\n"
        )

    text = HEADER + computation("small", 1) + computation("large", 7) + ENTRY
    text += f"  %c = f32[4] conditional(%i, %x, %x), {branches}\n"
    text += "  %r = f32[2] all-reduce(%x), replica_groups={{0,1}}\n}\n"
    found = wire.collectives(text)
    assert [c.branches for c in found] == [(("c", 0),), (("c", 1),), ()]
    assert wire.bytes_sent(found) == 28 + 8


@pytest.mark.parametrize(
    "instruction",
    [
        "f32[4] ragged-all-to-all(%x), replica_groups={{0,1}}",
        "f32[4] all-reduce(%x), replica_groups=some(8)",
    ],
)
def test_what_cannot_be_counted_is_refused(instruction):
    with pytest.raises(ValueError, match="program: got .* expected"):
        wire.collectives(f"{HEADER}{ENTRY}  %c = {instruction}\n}}\n")


def test_what_is_not_compiled_is_refused():
    text = jax.jit(jnp.sin).lower(1.0).as_text()
    with pytest.raises(ValueError, match="program: got .*, expected HLO text"):
        wire.collectives(text)


def test_what_xla_compiles_is_read():
    def function(x):
        total = lax.scan(lambda c, _: (lax.psum(c, "data"), None), x, length=5)[0]
        gathered = lax.all_gather(x, ("replica", "data"), tiled=True)
        part = lax.psum_scatter(x, "replica", tiled=True)
        moved = lax.ppermute(x, "data", [(0, 1), (1, 0)])
        exchanged = lax.all_to_all(x, "data", 0, 1, tiled=True)
        return total, gathered, part, moved, exchanged

    sharded = jax.shard_map(
        function,
        mesh=_mesh(2, 4, names=("replica", "data")),
        in_specs=jax.P(("replica", "data")),
        out_specs=jax.P(),
        check_vma=False,
    )
    found = wire.collectives(_compile(sharded, _array(32, 6)))  # 96 bytes a device
    assert sorted((c.operation, c.group_size, c.times, c.bytes) for c in found) == [
        ("all-gather", 8, 1, 7 / 8 * 768),
        ("all-reduce", 4, 5, 2 * 3 / 4 * 96),
        ("all-to-all", 4, 1, 3 / 4 * 96),
        ("collective-permute", 4, 1, 96),  # two pairs in either group
        ("reduce-scatter", 2, 1, 1 / 2 * 96),
    ]


def _matrices(found):
    """The bytes of what has two axes: the rest are statistics, of a number a column."""
    total = 0.0
    for collective in found:
        sizes = [
            [int(size) for size in re.findall(r"\d+", array.partition("[")[2])]
            for array in collective.arrays
        ]
        # Some versions send (1, D) for (D,).
        matrices = sum(
            math.prod(size) for size in sizes if len(size) == 2 and 1 not in size
        )
        part = matrices / sum(math.prod(size) for size in sizes)
        total += collective.times * collective.bytes * part
    return total


FORMS = ("all_to_all", "gather", "sum")
# (loss, its arrays, what it computes of each form)
COVARIANCE = {
    "vicreg": (losses.vicreg, 2, {"all_to_all": 2, "gather": 2, "sum": 2}),
    "lecture_energy": (losses.lecture_energy, 2, {form: 2 for form in FORMS}),
    "covariance_penalty": (losses.covariance_penalty, 1, {form: 1 for form in FORMS}),
    "barlow_twins": (
        losses.barlow_twins,
        2,
        {"all_to_all": 2, "gather": 2, "sum": 1},
    ),
}


@pytest.mark.parametrize(
    ("name", "form", "shape"),
    [
        *[("vicreg", form, shape) for form in FORMS for shape in [(16, 32), (32, 16)]],
        *[("barlow_twins", form, (16, 42)) for form in FORMS],
        ("lecture_energy", "gather", (24, 30)),
        ("covariance_penalty", "all_to_all", (24, 42)),
    ],
)
def test_each_form_sends_what_its_formula_says(monkeypatch, name, form, shape):
    monkeypatch.setattr(covariance, "cheapest_form", lambda *_: form)
    loss, count, computed = COVARIANCE[name]
    found = wire.loss_traffic(loss, *[_array(*shape)] * count, devices=8)
    sent = 4 * computed[form] * covariance.numbers_sent(*shape, 8)[form]
    assert _matrices(found) == pytest.approx(sent)
    # Of statistics, up to 14 sums of a number a column, and a few numbers.
    assert wire.bytes_sent(found) - sent < 2 * 4 * (14 * shape[1] + 4)


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_taken_inside_sends_no_more(monkeypatch, form):
    monkeypatch.setattr(covariance, "cheapest_form", lambda *_: form)
    step = jax.shard_map(
        jax.value_and_grad(functools.partial(losses.vicreg, axis_name="data"), (0, 1)),
        mesh=_mesh(8),
        in_specs=jax.P("data"),
        out_specs=(jax.P(), jax.P("data")),
        check_vma=False,
    )
    found = wire.collectives(_compile(step, _array(16, 32), _array(16, 32)))
    sent = 2 * 4 * covariance.numbers_sent(16, 32, 8)[form]
    assert _matrices(found) == pytest.approx(sent)


@pytest.mark.parametrize("shards", [1, 2, 3, 8, 256])
@pytest.mark.parametrize("features", [1, 30, 64, 2048])
def test_the_cheapest_form_is_chosen(features, shards):
    for count in range(1, 3 * features):
        sent = covariance.numbers_sent(count, features, shards)
        form = covariance.cheapest_form(count, features, shards)
        if count < features or count >= 2 * features:
            assert sent[form] == min(sent.values())
        else:  # which costs as few operations, and at most twice what a gather sends
            assert form == "sum" and sent[form] <= 2 * min(sent.values())


# 8 devices, 64 features: 64 / 2 - 64 / 8 = 24.
@pytest.mark.parametrize(
    ("count", "form"),
    [
        (16, "all_to_all"),
        (23, "all_to_all"),
        (24, "gather"),
        (63, "gather"),
        (64, "sum"),
        (127, "sum"),
        (128, "sum"),
    ],
)
def test_the_choice_on_both_sides_of_each_crossover(count, form):
    assert covariance.cheapest_form(count, 64, 8) == form
    if count % 8 == 0:
        found = wire.loss_traffic(losses.vicreg, *[_array(count, 64)] * 2, devices=8)
        kinds = {c.operation for c in found} - {"all-reduce"}
        expected = {"all_to_all": {"all-to-all"}, "gather": {"all-gather"}, "sum": ()}
        assert kinds == set(expected[form])
        others = covariance.numbers_sent(count, 64, 8).values()
        if count != 64:
            assert _matrices(found) == pytest.approx(2 * 4 * min(others))


@pytest.mark.parametrize(
    ("count", "formed", "never"),
    [
        (16, "16,16", ["64,64", "16,64"]),  # all-to-all: neither covariance nor rows
        (40, "5,40", ["64,64", "40,40"]),  # gather: its own rows of the products
        (72, "64,64", ["72,64", "72,72"]),  # sum
    ],
)
def test_what_a_form_does_not_need_is_never_formed(count, formed, never):
    mesh = _mesh(8)
    rows = jax.NamedSharding(mesh, jax.P("data"))
    sharded = jax.shard_map(
        functools.partial(losses.covariance_penalty, axis_name="data"),
        mesh=mesh,
        in_specs=jax.P("data"),
        out_specs=jax.P(),
    )
    step = jax.jit(jax.grad(sharded), out_shardings=rows)
    array = jax.ShapeDtypeStruct((count, 64), jnp.float32, sharding=rows)
    text = step.lower(array).compile(quick_compilation()).as_text()
    assert f"f32[{formed}]" in text
    for shape in never:
        assert f"f32[{shape}]" not in text


def test_sinkhorn_sends_one_number_a_prototype_and_iteration():
    sharded = jax.shard_map(
        functools.partial(losses.sinkhorn, num_iterations=5, axis_name="data"),
        mesh=_mesh(8),
        in_specs=jax.P("data"),
        out_specs=jax.P("data"),
    )
    found = wire.collectives(_compile(sharded, _array(16, 30)))
    assert {c.operation for c in found} == {"all-reduce"}
    range_of_scores, *others = sorted(found, key=lambda c: len(c.branches))
    assert range_of_scores.arrays == ("f32[2]",)
    iterations = {0: 0, 1: 0}  # from logarithms, and as products
    for collective in others:
        ((_, branch),) = collective.branches
        assert collective.bytes == 2 * 7 / 8 * 4 * 30
        iterations[branch] += collective.times
    assert iterations == {0: 2 * 5, 1: 5}


def test_the_losses_of_clusters_send_no_scores():
    scores = _array(2, 16, 30)
    found = wire.loss_traffic(losses.swav, scores, devices=8, batch_axes=1)
    # Two views' sinkhorn from logarithms: 3 iterations of twice K numbers, two of the
    # range; and the loss.
    most = 2 * 7 / 8 * 4 * (2 * (3 * 2 * 30 + 2) + 1)
    assert {c.operation for c in found} == {"all-reduce"}
    assert wire.bytes_sent(found) == most
    found = wire.loss_traffic(
        losses.dino, scores, scores, _array(30), devices=8, batch_axes=(1, 1, None)
    )
    assert wire.bytes_sent(found) == 2 * 7 / 8 * 4  # the loss


def test_the_center_sends_one_number_an_output():
    (found,) = wire.loss_traffic(
        losses.update_center,
        _array(30),
        _array(2, 16, 30),
        devices=8,
        batch_axes=(None, 1),
        gradients=False,
    )
    assert (found.operation, found.bytes) == ("all-reduce", 2 * 7 / 8 * 4 * 30)


def test_losses_that_cannot_be_compiled_so_are_refused():
    with pytest.raises(ValueError, match="devices: got 9, expected 1 to 8.*num_cpu"):
        wire.loss_traffic(losses.vicreg, *[_array(18, 4)] * 2, devices=9)
    with pytest.raises(
        ValueError, match=r"arrays\[1\]: got a batch of 12, .* of the 8"
    ):
        wire.loss_traffic(losses.vicreg, _array(16, 4), _array(12, 4), devices=8)
