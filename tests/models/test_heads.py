"""Heads against the official ones, with their weights."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jemjax.models import MLPHead, expander


class Case(NamedTuple):
    """One of our heads, and where the golden file holds the same one."""

    prefix: str
    head: MLPHead
    inner: str  # path of its layers in the file
    linears: tuple[int, ...]  # positions of its linear layers
    norms: tuple[int, ...]  # and of its normalizations
    columns: slice = slice(None)  # of the golden output that are its own
    inputs: slice | None = None  # of the golden output that it is applied to
    normalized: bool = False  # whether the golden output has rows of unit length


CASES = [
    Case("vicreg_projector", expander((12, 12, 6)), "", (0, 3, 6), (1, 4)),
    Case(
        "simsiam_projector_and_predictor",
        MLPHead((10, 10, 6), hidden_bias=False, output_norm="plain"),
        "enc/fc/",
        (0, 3, 6),
        (1, 4, 7),
        columns=slice(0, 6),
    ),
    Case(
        "simsiam_projector_and_predictor",
        MLPHead((5, 6), hidden_bias=False),
        "pred/",
        (0, 3),
        (1,),
        columns=slice(6, 12),
        inputs=slice(0, 6),
    ),
    Case(
        "mocov3_vit_projector",
        MLPHead((12, 12, 6), hidden_bias=False, output_bias=False, output_norm="plain"),
        "",
        (0, 3, 6),
        (1, 4, 7),
    ),
    Case(
        "mocov3_predictor_resnet",
        MLPHead((12, 6), hidden_bias=False, output_bias=False),
        "",
        (0, 3),
        (1,),
    ),
    Case(
        "swav_head_and_prototypes",
        MLPHead((12, 6)),
        "projection_head/",
        (0, 3),
        (1,),
        columns=slice(0, 6),
        normalized=True,
    ),
]


def _variables(z, case):
    prefix, inner = case.prefix, case.inner
    params, stats = {}, {}
    for index, position in enumerate(case.linears):
        path = f"{prefix}/param/{inner}{position}"
        params[f"Dense_{index}"] = {"kernel": z[f"{path}/weight"].T}
        if f"{path}/bias" in z:
            params[f"Dense_{index}"]["bias"] = z[f"{path}/bias"]
    for index, position in enumerate(case.norms):
        path = f"{prefix}/param/{inner}{position}"
        if f"{path}/weight" in z:
            params[f"BatchNorm_{index}"] = {
                "scale": z[f"{path}/weight"],
                "bias": z[f"{path}/bias"],
            }
        stats[f"BatchNorm_{index}"] = {
            "mean": z[f"{path}/running_mean"],
            "var": z[f"{path}/running_var"],
        }
    return {"params": params, "batch_stats": stats}


def _close(out, case, golden_out):
    if case.normalized:
        out = out / jnp.linalg.norm(out, axis=1, keepdims=True)
    np.testing.assert_allclose(out, golden_out[:, case.columns], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.prefix + case.inner)
def test_equals_the_official_head(golden, case):
    z = golden("heads")
    variables = _variables(z, case)
    golden_train = z[f"{case.prefix}/out_train"]
    golden_eval = z[f"{case.prefix}/out_eval_after_one_update"]

    def inputs(golden_out):
        x = z["x"] if case.inputs is None else golden_out[:, case.inputs]
        return jnp.asarray(x, jnp.float32)

    x = inputs(golden_train)
    out, updates = case.head.apply(variables, x, train=True, mutable=["batch_stats"])
    _close(out, case, golden_train)
    # Flax keeps the biased variance of the batch, torch the unbiased one.
    stats = {}
    for index, position in enumerate(case.norms):
        before = variables["batch_stats"][f"BatchNorm_{index}"]["var"]
        after = updates["batch_stats"][f"BatchNorm_{index}"]
        unbiased = 0.9 * before + (after["var"] - 0.9 * before) * len(x) / (len(x) - 1)
        path = f"{case.prefix}/after/{case.inner}{position}"
        np.testing.assert_allclose(
            after["mean"], z[f"{path}/running_mean"], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(unbiased, z[f"{path}/running_var"], rtol=1e-5)
        stats[f"BatchNorm_{index}"] = {"mean": after["mean"], "var": unbiased}
    variables = {**variables, "batch_stats": stats}
    _close(
        case.head.apply(variables, inputs(golden_eval), train=False), case, golden_eval
    )


@pytest.mark.parametrize("widths", [(), (8, 0)])
def test_an_expander_needs_positive_widths(widths):
    with pytest.raises(ValueError, match="widths: got"):
        expander(widths)
