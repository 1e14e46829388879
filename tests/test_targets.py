import jax
import numpy as np
import pytest

from jemjax.targets import warmup_cosine


@pytest.mark.parametrize(("x64", "tolerance"), [(False, 1e-6), (True, 1e-9)])
def test_learning_rate_of_the_official_code(golden, x64, tolerance):
    z = golden("schedules")
    steps_per_epoch, epochs = int(z["L"]), int(z["E_vicreg_barlow"])
    peak = 0.2 * int(z["bs"]) / 256
    with jax.enable_x64(x64):
        schedule = warmup_cosine(
            peak=peak,
            warmup_steps=10 * steps_per_epoch,
            total_steps=epochs * steps_per_epoch,
            final=0.001 * peak,
        )
        got = jax.jit(jax.vmap(schedule))(np.arange(len(z["vicreg_lr"])))
        np.testing.assert_allclose(got, z["vicreg_lr"], rtol=tolerance)


def test_it_stays_at_the_final_value():
    schedule = warmup_cosine(peak=1.0, warmup_steps=2, total_steps=10, final=0.25)
    np.testing.assert_allclose(schedule(10), 0.25)
    np.testing.assert_allclose(schedule(1000), 0.25)


@pytest.mark.parametrize(
    "change", [{"warmup_steps": 10}, {"warmup_steps": -1}, {"peak": -1.0}]
)
def test_refusals(change):
    good = {"peak": 1.0, "warmup_steps": 2, "total_steps": 10, "final": 0.0}
    with pytest.raises(ValueError, match="got"):
        warmup_cosine(**{**good, **change})
