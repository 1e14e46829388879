"""How fast a run is, and where its time goes."""

import time

import jax.numpy as jnp
import pytest

from jemjax.training.reporting import timing
from jemjax.training.reporting.timing import StepClock, Throughput, describe


def test_what_is_not_a_step_is_named_and_no_part_of_one():
    clock = StepClock()
    clock.started(jnp.zeros(()))
    while clock._begun is None:  # until the watching thread sees the first step's end
        time.sleep(0.001)
    with clock.spent("measuring"):
        time.sleep(0.2)
    clock.started(jnp.zeros(()))
    seconds = clock.stop()
    assert seconds["measuring"] >= 0.2
    assert seconds["total"] >= seconds["measuring"] + seconds["steps"]
    words = describe(seconds)
    assert "in steps" in words and "measuring" in words and "else" in words


@pytest.mark.parametrize("steps", [0, 1])
def test_of_one_step_which_compiles_nothing_is_said(steps):
    clock = StepClock()
    for _ in range(steps):
        clock.started(jnp.zeros(()))
    assert clock.stop() == {}


def test_throughput_is_without_compilation_and_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    throughput = Throughput(batch_size=8, first=20)
    assert throughput.mean == 0
    now[0] += 60  # of which nearly all is compilation
    assert throughput.after(21) == pytest.approx(8 / 60)
    assert throughput.seconds == 0
    now[0] += 2
    assert throughput.after(25) == pytest.approx(16)
    now[0] += 30  # a measurement
    throughput.pause(25)
    now[0] += 1
    assert throughput.after(26) == pytest.approx(8)
    assert (throughput.seconds, throughput.mean) == (3, pytest.approx(40 / 3))
