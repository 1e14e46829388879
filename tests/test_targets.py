import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jemjax.targets import cosine, linear, moving_average, per_epoch, warmup_cosine


def _vicreg(z):
    steps = int(z["E_vicreg_barlow"]) * int(z["L"])
    peak = 0.2 * int(z["bs"]) / 256
    return warmup_cosine(
        peak=peak,
        warmup_steps=10 * int(z["L"]),
        total_steps=steps,
        final=0.001 * peak,
    )


def _barlow(z):
    weights = _vicreg(z)
    return lambda step: weights(step) * jnp.array([1.0, 0.0048 / 0.2])


def _linspace(z, start, peak, final):
    return warmup_cosine(
        peak=peak,
        warmup_steps=int(z["W"] * z["L"]),
        total_steps=int(z["E"] * z["L"]),
        final=final,
        start=start,
        inclusive=True,
    )


def _run_cosine(start, end):
    return lambda z: cosine(start, end, int(z["E"] * z["L"]))


def _simsiam(z):
    encoder = cosine(0.05 * int(z["bs"]) / 256, 0.0, int(z["E"]))
    return lambda epoch: jnp.stack([encoder(epoch), encoder(0)])


def _mocov3(z):
    return warmup_cosine(
        peak=0.6 * int(z["bs"]) / 256,
        warmup_steps=int(z["W"] * z["L"]),
        total_steps=int(z["E"] * z["L"]),
        final=0.0,
    )


OFFICIAL = {
    "vicreg_lr": _vicreg,
    "barlow_lr_weights_biases": _barlow,
    "swav_lr": lambda z: _linspace(z, 0.3, 4.8, 0.0048),
    "dino_lr": lambda z: _linspace(z, 0.0, 0.0005 * int(z["bs"]) / 256, 1e-6),
    "dino_wd": _run_cosine(0.04, 0.4),
    "dino_momentum": _run_cosine(0.996, 1.0),
    "simsiam_lr_encoder_predictor_per_epoch": _simsiam,
    "mocov2_cos_lr_per_epoch": lambda z: cosine(0.03, 0.0, int(z["E"])),
    "mocov3_lr": _mocov3,
    "mocov3_momentum": _run_cosine(0.99, 1.0),
    "data2vec_fairseq_ema_decay": lambda z: linear(0.999, 0.9998, int(z["E"] * z["L"])),
}


def _values(schedule, count):
    return jax.jit(jax.vmap(schedule))(np.arange(count))


@pytest.mark.parametrize(("x64", "tolerance"), [(False, 1e-6), (True, 1e-9)])
@pytest.mark.parametrize("name", OFFICIAL)
def test_schedules_of_the_official_code(golden, name, x64, tolerance):
    z = golden("schedules")
    with jax.enable_x64(x64):
        got = _values(OFFICIAL[name](z), len(z[name]))
        assert got.dtype == (jnp.float64 if x64 else jnp.float32)
        # A schedule is a few sums of numbers as large as its largest, each of which
        # rounds by half an eps of that.
        rounding = 4 * jnp.finfo(got.dtype).eps * np.abs(z[name]).max()
        np.testing.assert_allclose(got, z[name], rtol=tolerance, atol=rounding)


def test_schedules_of_byol(golden):
    z = golden("byol_schedules")
    total, count = int(z["total_steps"]), len(z["tau"])
    assert count > total + 1  # what follows the run is constant
    with jax.enable_x64(True):
        tau = _values(cosine(float(z["base_ema"]), 1.0, total), count)
        np.testing.assert_allclose(tau, z["tau"], rtol=1e-9)
        rate = warmup_cosine(
            peak=float(z["base_lr"]) * int(z["batch_size"]) / 256,
            warmup_steps=int(z["warmup_steps"]),
            total_steps=total,
            final=0.0,
        )
        # The official code computes the warm-up in float32.
        np.testing.assert_allclose(_values(rate, count), z["lr"], rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("scaling", ["linear", "sqrt"])
def test_learning_rate_of_simclr(golden, scaling):
    z = golden("simclr_schedule")
    batch, examples = int(z["batch_size"]), int(z["num_examples"])
    schedule = warmup_cosine(
        peak=0.3 * batch / 256 if scaling == "linear" else 0.075 * batch**0.5,
        warmup_steps=round(int(z["warmup_epochs"]) * examples // batch),
        total_steps=examples * int(z["epochs"]) // batch + 1,
        final=0.0,
    )
    expected = z[f"lr_{scaling}"]
    got = _values(schedule, len(expected))
    # Near the end the official float32 cosine has lost its digits.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7 * expected.max())


@pytest.mark.parametrize(("x64", "tolerance"), [(False, 1e-6), (True, 1e-9)])
def test_teacher_temperature_of_dino_changes_once_an_epoch(golden, x64, tolerance):
    z = golden("dino_2g4l")
    with jax.enable_x64(x64):
        by_epoch = linear(
            float(z["warmup_teacher_temp"]),
            float(z["teacher_temp"]),
            int(z["warmup_teacher_temp_epochs"]) - 1,
        )
        expected = z["teacher_temp_schedule"]
        np.testing.assert_allclose(
            _values(per_epoch(by_epoch, 7), 7 * len(expected)),
            np.repeat(expected, 7),
            rtol=tolerance,
        )


@given(
    steps_per_epoch=st.integers(1, 100_000), epoch=st.integers(0, 1000), data=st.data()
)
def test_the_epoch_is_that_of_whole_numbers(steps_per_epoch, epoch, data):
    step = epoch * steps_per_epoch + data.draw(st.integers(0, steps_per_epoch - 1))
    assert int(per_epoch(lambda epoch: epoch, steps_per_epoch)(step)) == epoch


@given(
    warmup=st.integers(2, 30),
    rest=st.integers(1, 30),
    numbers=st.tuples(*[st.floats(1e-3, 10.0)] * 3),
)
def test_the_inclusive_warm_up_is_numpys_linspace(warmup, rest, numbers):
    start, peak, final = numbers
    schedule = warmup_cosine(
        peak=peak,
        warmup_steps=warmup,
        total_steps=warmup + rest,
        final=final,
        start=start,
        inclusive=True,
    )
    got = schedule(np.arange(31))  # of one shape, compiled once
    expected = [*np.linspace(start, peak, warmup), peak]
    np.testing.assert_allclose(got[: warmup + 1], expected, rtol=1e-5)


SCHEDULES = {
    "warmup_cosine": warmup_cosine(
        peak=2.0, warmup_steps=3, total_steps=10, final=0.25, start=1.0
    ),
    "cosine": cosine(2.0, 0.25, 10),
    "linear": linear(2.0, 0.25, 10),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_stays_at_the_final_value(name):
    schedule = SCHEDULES[name]
    assert float(schedule(9)) > 0.25
    np.testing.assert_allclose(schedule(np.array([10, 11, 1000])), 0.25)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_may_be_an_integer_an_array_or_traced(name):
    schedule = SCHEDULES[name]
    for step in (0, 2, 3, 7):
        expected = schedule(step)
        assert expected.dtype == jnp.float32 and expected.shape == ()
        for got in (
            schedule(jnp.int32(step)),
            schedule(np.int64(step)),
            jax.jit(schedule)(step),
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_without_steps_a_line_is_its_end():
    np.testing.assert_array_equal(linear(1.0, 0.5, 0)(np.arange(3)), 0.5)


def test_without_warm_up_the_run_starts_at_the_peak():
    for inclusive in (False, True):
        schedule = warmup_cosine(
            peak=2.0, warmup_steps=0, total_steps=5, final=0.0, inclusive=inclusive
        )
        np.testing.assert_allclose(schedule(0), 2.0)


@pytest.mark.parametrize(
    "change",
    [
        {"warmup_steps": 10},
        {"warmup_steps": -1},
        {"peak": -1.0},
        {"start": -1.0},
        {"final": float("nan")},
    ],
    ids=str,
)
def test_refused_warm_ups(change):
    good = {"peak": 1.0, "warmup_steps": 2, "total_steps": 10, "final": 0.0}
    with pytest.raises(ValueError, match="got"):
        warmup_cosine(**{**good, **change})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cosine(1.0, 0.0, 0), "total_steps: got 0"),
        (lambda: cosine(-1.0, 0.0, 5), "start: got -1"),
        (lambda: linear(1.0, float("inf"), 5), "end: got inf"),
        (lambda: linear(1.0, 0.0, -1), "total_steps: got -1"),
        (lambda: per_epoch(abs, 0), "steps_per_epoch: got 0"),
        (lambda: per_epoch(abs, 2.5), "steps_per_epoch: got 2.5"),
    ],
)
def test_refused_schedules(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("x64", [False, True])
def test_moving_average_of_moco(golden, x64):
    z = golden("ema_moco")
    with jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        target = {"w": jnp.asarray(z["target0"], dtype)}
        for online, expected in zip(z["online"], z["target_after"], strict=True):
            online = {"w": jnp.asarray(online, dtype)}
            target = moving_average(target, online, float(z["m"]))
            assert target["w"].dtype == dtype
            np.testing.assert_allclose(
                target["w"], expected, rtol=1e-6, atol=0 if x64 else 1e-7
            )


def test_moving_average_of_byol_with_the_momentum_of_the_step(golden):
    z = golden("byol_schedules")
    momentum = cosine(float(z["base_ema"]), 1.0, int(z["total_steps"]))

    @jax.jit
    def follow(target, online):
        def body(target, pair):
            step, online = pair
            target = moving_average(target, online, momentum(step))
            return target, target

        return jax.lax.scan(body, target, (jnp.arange(len(online)), online))[1]

    target = jnp.asarray(z["target0"], jnp.float32)
    got = follow(target, jnp.asarray(z["online"]))
    np.testing.assert_allclose(got, z["target_after"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_it_is_kept_in_float32(dtype):
    online = {"w": jnp.full((3,), 1.5, dtype)}
    target = moving_average(jax.tree.map(jnp.zeros_like, online), online, 0.999)
    for _ in range(9):
        target = moving_average(target, online, 0.999)
    assert target["w"].dtype == jnp.float32
    # In bfloat16 it would stand still: 1/1000 of the distance is below its digits.
    np.testing.assert_allclose(target["w"], 1.5 * (1 - 0.999**10), rtol=1e-4)


def test_a_float32_target_of_float64_parameters_keeps_its_type():
    with jax.enable_x64(True):
        target, online = jnp.zeros(2, jnp.float32), jnp.ones(2, jnp.float64)
        momentum = jnp.float64(0.5)
        got = moving_average(target, online, momentum)
        assert got.dtype == jnp.float32
        assert moving_average(online, target, momentum).dtype == jnp.float64


def test_momentum_0_is_a_copy_and_1_stands_still(key):
    target, online = ({"w": x} for x in jax.random.normal(key, (2, 5)))
    copy = moving_average(target, online, 0)
    np.testing.assert_array_equal(copy["w"], online["w"])
    still = moving_average(target, online, 1)
    np.testing.assert_array_equal(still["w"], target["w"])


@given(momentum=st.floats(0, 1), old=st.floats(-9, 9), new=st.floats(-9, 9))
def test_it_lies_between_target_and_online(momentum, old, new):
    got = float(moving_average(jnp.float32(old), jnp.float32(new), momentum))
    assert min(old, new) - 1e-5 <= got <= max(old, new) + 1e-5


def test_it_keeps_what_is_not_finite_visible():
    online = jnp.array([jnp.nan, jnp.inf, 1.0])
    got = moving_average(jnp.zeros(3), online, 0.9)
    np.testing.assert_array_equal(np.isfinite(got), [False, False, True])


@pytest.mark.parametrize(
    ("online", "message"),
    [
        ({"a": {"w": jnp.ones(4)}}, r"online, a/w: got shape \(4,\), expected \(3,\)"),
        ({"a": {"v": jnp.ones(3)}}, "online: got a tree that differs at a/v"),
        ({"a": {}}, "online: got a tree that differs at a/w"),
        ({"a": {"w": jnp.ones(3, int)}}, "online, a/w: got int32"),
        ({"a": {"w": jax.random.key(0)}}, "online, a/w: got key"),
        ({"a": [jnp.ones(3)]}, "online: got a tree that differs at a/0"),
    ],
)
def test_trees_that_do_not_fit_are_refused(online, message):
    with pytest.raises(ValueError, match=message):
        moving_average({"a": {"w": jnp.ones(3)}}, online, 0.5)


def test_containers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="online: got PyTreeDef"):
        moving_average([jnp.ones(3)], (jnp.ones(3),), 0.5)


def test_counters_are_refused():
    with pytest.raises(ValueError, match="target, the only leaf: got int32"):
        moving_average(jnp.int32(1), jnp.float32(1), 0.5)


def test_a_momentum_that_rounds_to_1_is_refused():
    momentum = 1 - 1e-9
    with pytest.raises(ValueError, match="momentum: got 0.999999999, expected 1 or"):
        moving_average(jnp.ones(2), jnp.ones(2), momentum)
    with jax.enable_x64(True):
        target = jnp.zeros(2, jnp.float64)
        moved = moving_average(target, jnp.ones(2, jnp.float64), momentum)
        assert np.all(moved > 0)


def test_a_bfloat16_target_moves_at_a_momentum_that_bfloat16_rounds_to_1():
    target, online = jnp.ones(2, jnp.bfloat16), jnp.full(2, 2, jnp.bfloat16)
    assert jnp.bfloat16(0.999) == 1
    for _ in range(1000):
        target = moving_average(target, online, 0.999)
    np.testing.assert_allclose(target, 2 - 0.999**1000, rtol=1e-4)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan"), jnp.ones(2), "half"])
def test_refused_momenta(momentum):
    with pytest.raises(ValueError, match="momentum: got"):
        moving_average(jnp.ones(2), jnp.ones(2), momentum)
