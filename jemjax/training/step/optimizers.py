"""Optimizers, by optax, with the published exemption of 1-d parameters.

Biases and the scales and offsets of normalizations are the parameters with fewer than
two dimensions. Unless a method says otherwise they are not decayed, and LARS does not
adapt their rate. LARC has no such exemption.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jemjax.losses.checks import check_number
from jemjax.methods.base import Optimization
from jemjax.targets import Schedule, cosine, per_epoch, warmup_cosine

OPTIMIZERS = ("lars", "lars-simclr", "larc", "sgd", "adamw")
SCHEDULES = ("cosine", "linspace", "epochs")
_FROZEN = "frozen"


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


def scale_by_larc(
    coefficient: float, weight_decay: optax.ScalarOrSchedule, *, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Decays, and scales by the ratio of the norms before the decay.

    u <- (u + weight_decay p) coefficient ||p|| / (||u|| + weight_decay ||p|| + eps)

    Where either norm is 0, u stays as it is and is not decayed.

    Args:
        coefficient: > 0.
        weight_decay: >= 0, a number or a function of the step.
        eps: > 0.

    Returns:
        A transformation of which the state is the number of steps.

    References:
        You, Gitman, Ginsburg, 2017 (arXiv:1708.03888), as in NVIDIA's apex.
    """

    def init(params):
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        decay = weight_decay(state.count) if callable(weight_decay) else weight_decay

        def scale(update, param):
            param_norm = jnp.linalg.norm(param)
            update_norm = jnp.linalg.norm(update)
            ratio = coefficient * param_norm / (update_norm + decay * param_norm + eps)
            usable = (param_norm > 0) & (update_norm > 0)
            return jnp.where(usable, (update + decay * param) * ratio, update)

        count = optax.safe_increment(state.count)
        return jax.tree.map(scale, updates, params), state._replace(count=count)

    return optax.GradientTransformation(init, update)


def clip_by_norm(
    max_norm: float, *, each: bool = True, eps: float = 1e-6
) -> optax.GradientTransformation:
    """Shortens gradients that are longer than `max_norm`.

    g <- g min(1, max_norm / (||g|| + eps))

    Args:
        max_norm: > 0.
        each: whether ||g|| is the norm of each parameter's gradient, as in DINO, or of
            all of them together.
        eps: > 0.

    Returns:
        A stateless transformation.
    """

    def clip(gradients, params):
        del params
        norms = jax.tree.map(jnp.linalg.norm, gradients)
        if not each:
            norm = optax.tree.norm(norms)
            norms = jax.tree.map(lambda _: norm, norms)
        return jax.tree.map(
            lambda g, norm: g * jnp.minimum(1.0, max_norm / (norm + eps)),
            gradients,
            norms,
        )

    return optax.stateless(clip)


def scale_biases(rate: float) -> optax.GradientTransformation:
    """Scales the updates of biases and normalization parameters.

    Args:
        rate: >= 0, of the learning rate of weights.

    Returns:
        A stateless transformation, to stand behind an optimizer.
    """
    return optax.masked(
        optax.scale(rate),
        lambda params: jax.tree.map(lambda x: x.ndim < 2, params),
    )


def lars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule = 1e-6,
    momentum: float = 0.9,
    trust_coefficient: float = 1e-3,
    decay_all: bool = False,
    rate_in_momentum: bool = False,
) -> optax.GradientTransformation:
    """Layer-wise adaptive rates.

    g <- g + weight_decay p;  g <- trust_coefficient ||p|| / ||g|| g  (weights only)
    m <- momentum m + g;  p <- p - learning_rate m
    rate_in_momentum:  m <- momentum m + learning_rate g;  p <- p - m

    The first is the LARS of VICReg, Barlow Twins, BYOL, DINO and MoCo v3, the second
    that of SimCLR and of `optax.lars`. They differ when the learning rate changes.

    Args:
        learning_rate: a number, or a function of the step.
        weight_decay: >= 0, a number or a function of the step.
        momentum: in [0, 1).
        trust_coefficient: > 0.
        decay_all: whether biases and normalization parameters are decayed, and
            adapted, too.
        rate_in_momentum: whether the learning rate is inside m.

    Returns:
        A gradient transformation.

    References:
        You, Gitman, Ginsburg, 2017 (arXiv:1708.03888).
    """
    mask = _weights(decay_all)
    last = [optax.trace(momentum), optax.scale_by_learning_rate(learning_rate)]
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=mask),
        optax.masked(scale_by_trust_ratio(trust_coefficient), mask),
        *(reversed(last) if rate_in_momentum else last),
    )


def larc(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule = 1e-6,
    momentum: float = 0.9,
    trust_coefficient: float = 1e-3,
) -> optax.GradientTransformation:
    """Layer-wise adaptive rates as SwAV has them: of biases and normalizations too.

    g <- as in `scale_by_larc`;  m <- momentum m + g;  p <- p - learning_rate m

    Args:
        learning_rate: a number, or a function of the step.
        weight_decay: of all parameters, >= 0, a number or a function of the step.
        momentum: in [0, 1).
        trust_coefficient: > 0.

    Returns:
        A gradient transformation.

    References:
        You, Gitman, Ginsburg, 2017 (arXiv:1708.03888), as in NVIDIA's apex.
    """
    return optax.chain(
        scale_by_larc(trust_coefficient, weight_decay),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def make_optimizer(
    optimization: Optimization,
    *,
    batch_size: int,
    total_steps: int,
    steps_per_epoch: float,
    constant_rate: Sequence[str] = (),
    frozen: Sequence[str] = (),
    frozen_for: Mapping[str, int] | None = None,
) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimizer of a method, and its learning rate by the step.

    The learning rate is learning_rate batch_size / 256 at its peak. Parameters are
    named by their path, or its beginning: `predictor`, `backbone/patch_embedding`. What
    a network does not have may be named; it has no effect.

    Args:
        optimization: what the method publishes.
        batch_size: of the global batch, >= 1.
        total_steps: of the run, >= 1; the schedules end there.
        steps_per_epoch: > 0. The warm-up is rounded to steps and takes at most half of
            the run; schedule="epochs" rounds an epoch to steps.
        constant_rate: parameters with the peak as their learning rate at every step.
        frozen: parameters that are never updated.
        frozen_for: parameters that are not updated in the first steps, with how many.
            Until then their momentum and Adam's statistics stay as they began, and
            Adam's bias correction counts from there.

    Returns:
        The transformation, and the learning rate as a function of the step.

    Raises:
        ValueError: for unknown names and numbers out of range.
    """
    _check(optimization, batch_size, total_steps, steps_per_epoch)
    starts = dict(frozen_for or {})
    for name, steps in starts.items():
        if not (isinstance(steps, int) and steps >= 0):
            raise ValueError(
                f"frozen_for: got {steps!r} steps of {name}, expected an integer >= 0"
            )
    peak = optimization.learning_rate * batch_size / 256
    schedule = _learning_rate(optimization, peak, total_steps, steps_per_epoch)
    decay = optimization.weight_decay
    if optimization.final_weight_decay is not None:
        decay = cosine(decay, optimization.final_weight_decay, total_steps)

    # Groups are named by what they hold, not by numbers of steps: the structure of the
    # state is then the same whatever the length of the data.
    def group(constant, waiting):
        start = starts.get(waiting, 0)
        # Behind `conditionally_mask` the count of steps begins at `start`.
        optimizer = _optimizer(
            optimization,
            peak if constant else _delayed(schedule, start),
            _delayed(decay, start),
        )
        if waiting is None:
            return optimizer
        return optax.conditionally_mask(
            optimizer, lambda step, **_: jnp.asarray(step) >= start
        )

    def label(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if any(_within(name, prefix) for prefix in frozen):
            return _FROZEN
        constant = any(_within(name, prefix) for prefix in constant_rate)
        waiting = [prefix for prefix in starts if _within(name, prefix)]
        return _label(constant, max(waiting, key=starts.__getitem__, default=None))

    def labels(params):
        return jax.tree_util.tree_map_with_path(label, params)

    groups = {
        _label(constant, waiting): group(constant, waiting)
        for constant in ((False, True) if constant_rate else (False,))
        for waiting in (None, *starts)
    }
    optimizer = optax.partition({**groups, _FROZEN: optax.set_to_zero()}, labels)
    if optimization.clip_norm is not None:
        clip = clip_by_norm(optimization.clip_norm, each=optimization.clip_each)
        # What is never updated has no part in the common norm.
        still = optax.masked(
            optax.set_to_zero(),
            lambda params: jax.tree.map(lambda x: x == _FROZEN, labels(params)),
        )
        optimizer = optax.chain(still, clip, optimizer)
    return optimizer, schedule


def _weights(decay_all: bool) -> Callable[[Any], Any]:
    return lambda params: jax.tree.map(lambda x: decay_all or x.ndim > 1, params)


def _within(name, prefix):
    return f"{name}/".startswith(f"{prefix}/")


def _label(constant, waiting):
    label = "constant" if constant else "scheduled"
    return label if waiting is None else f"{label}-{waiting}"


def _delayed(value, start):
    if callable(value):
        return lambda count: value(count + start)
    return value


def _learning_rate(optimization, peak, total_steps, steps_per_epoch):
    final = peak * optimization.final_fraction
    if optimization.schedule == "epochs":
        steps = max(1, round(steps_per_epoch))
        return per_epoch(cosine(peak, final, total_steps / steps), steps)
    warmup_steps = round(optimization.warmup_epochs * steps_per_epoch)
    return warmup_cosine(
        peak=peak,
        warmup_steps=min(warmup_steps, total_steps // 2),
        total_steps=total_steps,
        final=final,
        start=peak * optimization.warmup_start,
        inclusive=optimization.schedule == "linspace",
    )


def _optimizer(optimization, learning_rate, weight_decay):
    name, decay_all = optimization.name, optimization.decay_all
    if name in ("lars", "lars-simclr"):
        optimizer = lars(
            learning_rate,
            weight_decay=weight_decay,
            momentum=optimization.momentum,
            decay_all=decay_all,
            rate_in_momentum=name == "lars-simclr",
        )
    elif name == "larc":
        optimizer = larc(
            learning_rate,
            weight_decay=weight_decay,
            momentum=optimization.momentum,
        )
    elif name == "sgd":
        optimizer = optax.chain(
            optax.add_decayed_weights(weight_decay, mask=_weights(decay_all)),
            optax.sgd(learning_rate, optimization.momentum),
        )
    else:
        optimizer = optax.adamw(
            learning_rate,
            b2=optimization.b2,
            weight_decay=weight_decay,
            mask=_weights(decay_all),
        )
    return optax.chain(optimizer, scale_biases(optimization.bias_rate))


def _check(optimization, batch_size, total_steps, steps_per_epoch):
    options = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}
    given = {"optimizer": optimization.name, "schedule": optimization.schedule}
    for name, expected in options.items():
        if given[name] not in expected:
            raise ValueError(
                f"{name}: got {given[name]!r}, expected one of {', '.join(expected)}"
            )
    if optimization.schedule == "epochs" and optimization.warmup_epochs:
        raise ValueError(
            f"warmup_epochs: got {optimization.warmup_epochs}, expected 0 with the"
            " schedule epochs"
        )
    check_number("batch_size", batch_size, minimum=1)
    check_number("total_steps", total_steps, minimum=1)
    check_number("steps_per_epoch", steps_per_epoch, exclusive=True)
    for name in (
        "learning_rate",
        "weight_decay",
        "warmup_epochs",
        "warmup_start",
        "final_fraction",
        "bias_rate",
    ):
        check_number(name, getattr(optimization, name))
    for name in ("momentum", "b2"):
        value = getattr(optimization, name)
        if not 0 <= value < 1:
            raise ValueError(f"{name}: got {value}, expected a number in [0, 1)")
    if optimization.clip_norm is not None:
        check_number("clip_norm", optimization.clip_norm, exclusive=True)
