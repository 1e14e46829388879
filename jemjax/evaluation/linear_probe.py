"""The linear probe: what a linear classifier finds in frozen embeddings."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jemjax.evaluation.inputs import (
    Scalar,
    Whole,
    check_count,
    check_labelled,
    check_number,
    on_host,
    whole,
)
from jemjax.evaluation.knn import accuracy


class LinearProbe(NamedTuple):
    """A trained linear classifier: logits = embeddings @ weights + bias."""

    accuracy: Any  # on the test embeddings, in [0, 1]; inside `jit` a scalar
    weights: jax.Array  # (D, C)
    bias: jax.Array  # (C,)


def linear_probe(
    train_embeddings: ArrayLike,
    train_labels: ArrayLike,
    test_embeddings: ArrayLike,
    test_labels: ArrayLike,
    *,
    num_classes: Whole | None = None,
    l2: Scalar = 1e-3,
    max_iterations: Whole = 500,
) -> LinearProbe:
    """Multinomial logistic regression on standardized embeddings.

    minimize  mean_n cross_entropy(x_n W + b, label_n) + l2 / 2 ||W||^2

    x are the embeddings with zero mean and unit variance over the training examples.
    The problem is convex and solved on all examples at once by L-BFGS, to a largest
    gradient entry of 1e-5, without randomness: there is no schedule to tune, and the
    figure depends on the embeddings only. No augmentation is used, unlike in the
    published linear evaluations.

    With `jax_enable_x64` and strict promotion of dtypes float32 embeddings are refused
    by optax's L-BFGS, which keeps a part of its memory in float64.

    Args:
        train_embeddings: (N, D), N known.
        train_labels: (N,) integers in [0, num_classes).
        test_embeddings: (M, D), M known.
        test_labels: (M,) integers in [0, num_classes).
        num_classes: C; unless given, one more than the largest training label, which
            has to be known: inside `jit` it must be given.
        l2: strength of the penalty on W, >= 0 (in scikit-learn's terms 1 / (C N)). A
            scalar array, traced or not, is not checked.
        max_iterations: of L-BFGS, >= 1, where it has not converged before.

    Returns:
        The accuracy in [0, 1] (NaN if an embedding is not finite), and the classifier
        of embeddings as they were given, not standardized.

    Raises:
        ValueError: for shapes, dtypes, labels or numbers other than these.
    """
    if num_classes is None:
        if isinstance(train_labels, Tracer):
            raise ValueError(
                "num_classes: got None, expected an integer where train_labels are"
                " traced, of which the largest is not known"
            )
        num_classes = int(on_host("train_labels", train_labels).max(initial=0)) + 1
    train, labels = check_labelled("train", train_embeddings, train_labels, num_classes)
    test, truth = check_labelled("test", test_embeddings, test_labels, num_classes)
    if test.shape[1] != train.shape[1]:
        raise ValueError(
            f"test_embeddings: got shape {test.shape}, expected (M, {train.shape[1]})"
            " as train_embeddings"
        )
    weights, bias, logits = _fit(
        train,
        labels,
        test,
        check_number("l2", l2, train.dtype),
        num_classes=check_count("num_classes", num_classes),
        max_iterations=check_count("max_iterations", max_iterations),
    )
    return LinearProbe(accuracy(logits, truth), weights, bias)


@functools.partial(jax.jit, static_argnames=("num_classes", "max_iterations"))
def _fit(train, labels, test, l2, *, num_classes, max_iterations):
    train, labels, test = whole(train), whole(labels), whole(test)
    # Subtracting a row before the mean makes a constant feature exactly zero.
    moved = train - train[:1]
    mean = train[:1] + jnp.mean(moved, axis=0, keepdims=True)  # (1, D)
    std = jnp.std(moved, axis=0, keepdims=True)
    scale = jnp.where(std > 0, std, 1.0)
    x = (train - mean) / scale  # (N, D)

    # (C, D + 1), of which the last column is the bias. In this layout the gradient of
    # the product is several times faster on a CPU than in that of the weights, (D, C).
    def logits(params, rows):
        products = jnp.matmul(rows, params[:, :-1].T, precision=lax.Precision.HIGHEST)
        return products + params[None, :, -1]

    def objective(params):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, x), labels
        )
        return jnp.mean(losses) + 0.5 * l2 * jnp.sum(jnp.square(params[:, :-1]))

    solver = optax.lbfgs()
    value_and_grad: Any = optax.value_and_grad_from_state(objective)

    def unfinished(carry):
        iteration, _, _, largest_gradient = carry
        return (iteration < max_iterations) & (largest_gradient > 1e-5)

    def improve(carry):
        iteration, params, state, _ = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = solver.update(
            gradient, state, params, value=value, grad=gradient, value_fn=objective
        )
        return iteration + 1, params + updates, state, jnp.max(jnp.abs(gradient))

    start = jnp.zeros((num_classes, x.shape[1] + 1), x.dtype)
    infinite = jnp.full((), jnp.inf, x.dtype)
    _, params, _, _ = lax.while_loop(
        unfinished, improve, (0, start, solver.init(start), infinite)
    )
    weights = params[:, :-1].T / scale.T  # (D, C), for embeddings as given
    bias = params[:, -1] - jnp.matmul(mean[0], weights, precision=lax.Precision.HIGHEST)
    return weights, bias, logits(params, (test - mean) / scale)
