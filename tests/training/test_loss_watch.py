"""A loss that stays where it is after a collapse is named."""

import pytest

from jemjax.training.reporting.loss_watch import LossWatch


def _fed(losses, collapsed=2.0, total=100, past=()):
    watch = LossWatch(collapsed, total, past)
    told = [watch.logged(5 * (i + 1), loss) for i, loss in enumerate(losses)]
    return watch, told


def test_it_is_named_once_it_has_stayed_for_a_tenth_of_the_run():
    watch, told = _fed([3.0, 2.005, 1.995, 2.0, 2.0, 2.0])
    assert told[:3] == [None] * 3 and told[4:] == [None] * 2
    assert "stayed at 2 since step 10" in told[3]
    assert watch.verdict() == [told[3]]


def test_a_loss_that_passes_by_or_leaves_is_not_named_at_the_end():
    assert _fed([2.0, 2.0, 2.1, 2.0, 2.0, 1.9])[1] == [None] * 6
    watch, told = _fed([2.0, 2.0, 2.0, 2.0, 1.9])
    assert any(told) and watch.verdict() == []


@pytest.mark.parametrize(("collapsed", "near"), [(0.0, 0.004), (-1.0, -0.996)])
def test_values_below_one_are_compared_with_one(collapsed, near):
    assert _fed([near] * 3, collapsed)[0].verdict()
    assert not _fed([collapsed + 0.006] * 3, collapsed)[0].verdict()


def test_a_step_that_is_not_finite_and_a_method_without_a_value():
    assert not _fed([2.0, 2.0, None, 2.0, 2.0])[0].verdict()
    assert not _fed([2.0] * 9, collapsed=None)[0].verdict()


def test_a_resumed_run_knows_what_was_before():
    past = [{"step": 5, "loss": 2.0}, {"step": 10, "loss": 2.0}]
    watch = LossWatch(2.0, 100, past)
    assert "since step 5" in (watch.logged(15, 2.0) or "")
