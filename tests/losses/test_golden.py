"""Values and every gradient of the official code, at the published tolerances."""

import jax
import numpy as np
import pytest

from jemjax import losses


def vicreg(z, x, y):
    return losses.vicreg(
        x,
        y,
        invariance_weight=float(z["sim_coeff"]),
        variance_weight=float(z["std_coeff"]),
        covariance_weight=float(z["cov_coeff"]),
        gamma=float(z.get("gamma", 1.0)),
        eps=float(z.get("eps", 1e-4)),
    )


def vicreg_term(name):
    return lambda z, x, y: getattr(
        losses.vicreg_terms(x, y, gamma=float(z["gamma"]), eps=float(z["eps"])), name
    )


def lecture(center):
    return lambda z, x, y: losses.lecture_energy(
        x, y, gamma=float(z["gamma"]), center=center
    )


def barlow(z, x, y):
    return losses.barlow_twins(
        x, y, off_diagonal_weight=float(z["lambd"]), eps=float(z["bn_eps"])
    )


def barlow_term(name):
    return lambda z, x, y: getattr(
        losses.barlow_twins_terms(x, y, eps=float(z["bn_eps"])), name
    )


# file, loss, arrays, value, gradients (None where the file has none)
XY, ZZ = ("x", "y"), ("z1", "z2")
TABLE = [
    *[
        (file, *row)
        for file in (
            "vicreg_Nltd",
            "vicreg_Ngtd",
            "vicreg_collapsed",
            "vicreg_allactive_off",
        )
        for row in (
            (vicreg, XY, "loss", ("grad_x", "grad_y")),
            (
                vicreg_term("invariance"),
                XY,
                "repr_loss",
                ("grad_x_repr", "grad_y_repr"),
            ),
            (vicreg_term("variance"), XY, "std_loss", ("grad_x_std", "grad_y_std")),
            (vicreg_term("covariance"), XY, "cov_loss", ("grad_x_cov", "grad_y_cov")),
        )
    ],
    ("vicreg_2rank", vicreg, XY, "loss", ("grad_x", "grad_y")),
    *[
        (
            "lecture_vicreg_own",
            lecture(name == "centered"),
            XY,
            f"loss_{name}",
            (f"grad_x_{name}", f"grad_y_{name}"),
        )
        for name in ("centered", "uncentered")
    ],
    *[
        (file, *row)
        for file in ("barlow_Nltd", "barlow_Ngtd")
        for row in (
            (barlow, ZZ, "loss", ("grad_z1", "grad_z2")),
            (barlow_term("on_diagonal"), ZZ, "on_diag", ("grad_z1_on", "grad_z2_on")),
            (barlow_term("off_diagonal"), ZZ, "off_diag", None),
        )
    ],
]
# dtype: relative tolerance of the value, and relative and absolute of the gradients,
# the absolute one in units of the largest entry
TOLERANCES = {np.float32: (2e-5, 2e-4, 1e-6), np.float64: (1e-9, 1e-7, 1e-12)}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    ("file", "loss", "arrays", "value", "gradients"),
    TABLE,
    ids=[f"{row[0]}-{row[3]}" for row in TABLE],
)
def test_equals_the_official_code(golden, dtype, file, loss, arrays, value, gradients):
    z = golden(file)
    value_tolerance, relative, absolute = TOLERANCES[dtype]
    with jax.enable_x64(dtype is np.float64):
        inputs = [z[name].astype(dtype) for name in arrays]
        got, got_gradients = jax.value_and_grad(
            lambda *inputs: loss(z, *inputs), argnums=(0, 1)
        )(*inputs)
        assert got.dtype == dtype
        np.testing.assert_allclose(got, z[value], rtol=value_tolerance)
        for name, gradient in zip(gradients or (), got_gradients, strict=False):
            np.testing.assert_allclose(
                gradient,
                z[name],
                rtol=relative,
                atol=absolute * np.abs(z[name]).max(),
            )


def test_every_gradient_of_the_files_is_compared(golden):
    for file in {row[0] for row in TABLE}:
        compared = {name for row in TABLE if row[0] == file for name in row[4] or ()}
        present = {k for k in golden(file) if k.startswith("grad_")}
        assert {k for k in present if not k.endswith("_ranks")} == compared


def test_two_ranks_of_the_official_code(golden):
    """Each rank has half of the rows; the ranks' mean is the global batch's loss."""
    z = golden("vicreg_2rank")
    shards = [z[name].reshape(2, 12, 10) for name in ("x", "y")]

    def step(x, y):
        return jax.value_and_grad(
            lambda x, y: losses.vicreg(x, y, axis_name="data"), argnums=(0, 1)
        )(x, y)

    values, gradients = jax.vmap(step, axis_name="data")(*shards)
    np.testing.assert_allclose(values, np.mean(z["loss_ranks"]), rtol=2e-5)
    for name, gradient in zip(("grad_x_ranks", "grad_y_ranks"), gradients, strict=True):
        np.testing.assert_allclose(
            gradient.reshape(24, 10),
            z[name],
            rtol=2e-4,
            atol=1e-6 * np.abs(z[name]).max(),
        )
