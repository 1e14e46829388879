"""Optimizers, by optax, with the published exemption of 1-d parameters.

Biases and the scales and offsets of normalizations are the parameters with fewer than
two dimensions. They are not decayed, and LARS does not adapt their rate.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS = ("lars", "sgd", "adamw")


def _is_weight(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def scale_by_trust_ratio(coefficient: float) -> optax.GradientTransformation:
    """Scales each update u of a parameter p by coefficient * ||p|| / ||u||.

    The factor is 1 where either norm is 0.

    Args:
        coefficient: > 0.

    Returns:
        A stateless transformation.

    References:
        You, Gitman, Ginsburg, 2017 (arXiv:1708.03888).
    """

    def scale(update, param):
        param_norm = jnp.linalg.norm(param)
        update_norm = jnp.linalg.norm(update)
        usable = (param_norm > 0) & (update_norm > 0)
        ratio = coefficient * param_norm / jnp.where(usable, update_norm, 1.0)
        return update * jnp.where(usable, ratio, 1.0)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, params))


def lars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 1e-6,
    momentum: float = 0.9,
    trust_coefficient: float = 1e-3,
) -> optax.GradientTransformation:
    """Layer-wise adaptive rates, with the learning rate outside the momentum.

    g <- g + weight_decay p;  g <- trust_coefficient ||p|| / ||g|| g  (weights only)
    m <- momentum m + g;  p <- p - learning_rate m

    This is the LARS of VICReg, Barlow Twins, BYOL, DINO and MoCo v3. `optax.lars` and
    SimCLR's have the learning rate inside m, which differs when it changes.

    Args:
        learning_rate: a number, or a function of the step.
        weight_decay: of weights, >= 0.
        momentum: in [0, 1).
        trust_coefficient: > 0.

    Returns:
        A gradient transformation.

    References:
        You, Gitman, Ginsburg, 2017 (arXiv:1708.03888).
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=_is_weight),
        optax.masked(scale_by_trust_ratio(trust_coefficient), _is_weight),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float,
    momentum: float = 0.9,
) -> optax.GradientTransformation:
    """An optimizer by its name.

    Args:
        name: lars, sgd or adamw.
        learning_rate: a number, or a function of the step.
        weight_decay: of weights, >= 0; decoupled for adamw, in the gradient otherwise.
        momentum: of lars and sgd, in [0, 1).

    Returns:
        A gradient transformation.

    Raises:
        ValueError: for an unknown name.
    """
    if name == "lars":
        return lars(learning_rate, weight_decay=weight_decay, momentum=momentum)
    if name == "sgd":
        return optax.chain(
            optax.add_decayed_weights(weight_decay, mask=_is_weight),
            optax.sgd(learning_rate, momentum),
        )
    if name == "adamw":
        return optax.adamw(learning_rate, weight_decay=weight_decay, mask=_is_weight)
    raise ValueError(
        f"optimizer: got {name!r}, expected one of {', '.join(OPTIMIZERS)}"
    )
