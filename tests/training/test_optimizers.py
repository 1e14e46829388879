import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jemjax.training.optimizers import lars, make_optimizer

NAMES = ("w", "conv", "b", "bn", "w0", "wg0")


def _run(optimizer, params, gradients):
    state, history = optimizer.init(params), []
    for step in range(len(gradients["w"])):
        gradient = {name: gradients[name][step] for name in params}
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("variant", ["vicreg", "dino", "mocov3"])
def test_lars_equals_the_official_code(golden, variant, x64):
    z = golden("lars")
    with jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        rates = jnp.asarray(z["lr"], dtype)
        optimizer = lars(
            lambda step: rates[step],
            weight_decay=float(z["weight_decay"]),
            momentum=float(z["momentum"]),
            trust_coefficient=float(z["eta"]),
        )
        params = {name: jnp.asarray(z[f"p0/{name}"], dtype) for name in NAMES}
        gradients = {name: jnp.asarray(z[f"g/{name}"], dtype) for name in NAMES}
        history = _run(optimizer, params, gradients)
        for step, params in enumerate(history):
            for name in NAMES:
                np.testing.assert_allclose(
                    params[name],
                    z[f"{variant}/{name}"][step],
                    rtol=1e-6,
                    atol=0 if x64 else 1e-6,
                )


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_biases_and_norms_are_not_decayed(name):
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    optimizer = make_optimizer(name, 0.1, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert (np.asarray(updates["kernel"]) < 0).all()
    np.testing.assert_array_equal(updates["bias"], 0)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="expected one of lars, sgd, adamw"):
        make_optimizer("adam", 0.1, weight_decay=0.0)
