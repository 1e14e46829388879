"""Heads against the official ones, with their weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from jemjax.models import MLPHead, expander

# golden prefix: our head, the positions of its linear layers and normalizations, and
# which columns of the golden output are its own
HEADS = {
    "vicreg_projector": (expander((12, 12, 6)), "", (0, 3, 6), (1, 4), slice(None)),
    "simsiam_projector_and_predictor": (
        MLPHead((10, 10, 6), hidden_bias=False, output_norm="plain"),
        "enc/fc/",
        (0, 3, 6),
        (1, 4, 7),
        slice(0, 6),
    ),
    "mocov3_vit_projector": (
        MLPHead((12, 12, 6), hidden_bias=False, output_bias=False, output_norm="plain"),
        "",
        (0, 3, 6),
        (1, 4, 7),
        slice(None),
    ),
    "mocov3_predictor_resnet": (
        MLPHead((12, 6), hidden_bias=False, output_bias=False),
        "",
        (0, 3),
        (1,),
        slice(None),
    ),
}


def _variables(z, prefix, inner, linears, norms):
    params, stats = {}, {}
    for index, position in enumerate(linears):
        path = f"{prefix}/param/{inner}{position}"
        params[f"Dense_{index}"] = {"kernel": z[f"{path}/weight"].T}
        if f"{path}/bias" in z:
            params[f"Dense_{index}"]["bias"] = z[f"{path}/bias"]
    for index, position in enumerate(norms):
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


@pytest.mark.parametrize("prefix", HEADS)
def test_equals_the_official_head(golden, prefix):
    z = golden("heads")
    head, inner, linears, norms, columns = HEADS[prefix]
    variables = _variables(z, prefix, inner, linears, norms)
    x = jnp.asarray(z["x"])
    out, updates = head.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(
        out, z[f"{prefix}/out_train"][:, columns], rtol=2e-5, atol=2e-6
    )
    # Flax keeps the biased variance of the batch, torch the unbiased one.
    stats = {}
    for index, position in enumerate(norms):
        before = variables["batch_stats"][f"BatchNorm_{index}"]["var"]
        after = updates["batch_stats"][f"BatchNorm_{index}"]
        unbiased = 0.9 * before + (after["var"] - 0.9 * before) * len(x) / (len(x) - 1)
        path = f"{prefix}/after/{inner}{position}"
        np.testing.assert_allclose(
            after["mean"], z[f"{path}/running_mean"], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(unbiased, z[f"{path}/running_var"], rtol=1e-5)
        stats[f"BatchNorm_{index}"] = {"mean": after["mean"], "var": unbiased}
    out = head.apply({**variables, "batch_stats": stats}, x, train=False)
    np.testing.assert_allclose(
        out, z[f"{prefix}/out_eval_after_one_update"][:, columns], rtol=2e-5, atol=2e-6
    )


@pytest.mark.parametrize("widths", [(), (8, 0)])
def test_an_expander_needs_positive_widths(widths):
    with pytest.raises(ValueError, match="widths: got"):
        expander(widths)
