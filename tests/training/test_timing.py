"""Where a run's time goes."""

import time

import jax.numpy as jnp
import pytest

from jemjax.training.reporting.timing import StepClock, describe


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
