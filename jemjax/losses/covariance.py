"""Losses that prevent collapse by statistics of the batch: VICReg and Barlow Twins.

All of them need sums of squares of the entries of a D x D matrix H'H. Where the batch
is well below the embedding (N < D) that matrix is never formed: its sum of squares
is that of the N x N matrix HH', so the cost is that of min(N, D). Over several shards
`cheapest_form` says what they send each other for it.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jemjax.losses import numerics
from jemjax.losses.checks import check_embeddings, check_number
from jemjax.losses.collectives import (
    AxisName,
    as_number,
    axis_size,
    batch_size,
    batch_sum,
    feature_gram,
    features_for_rows,
    gather,
    is_known,
    psum,
    row_gram,
    row_products,
    rows_for_features,
)

Scalar = ArrayLike  # a number, or a traced scalar
Form = Literal["all_to_all", "gather", "sum"]


class VICRegTerms(NamedTuple):
    """The three unweighted terms of VICReg, scalars."""

    invariance: jax.Array
    variance: jax.Array
    covariance: jax.Array


class BarlowTwinsTerms(NamedTuple):
    """The two unweighted terms of Barlow Twins, scalars."""

    on_diagonal: jax.Array
    off_diagonal: jax.Array


def variance_hinge(
    h: ArrayLike,
    *,
    gamma: Scalar = 1.0,
    eps: Scalar = 1e-4,
    on: Literal["std", "variance"] = "std",
    axis_name: AxisName = None,
) -> jax.Array:
    """How far the spread of each dimension over the batch falls short of `gamma`.

    on="std":       1/D sum_i relu(gamma - sqrt(Var_i + eps)),  Var with 1 / (N - 1)
    on="variance":  1/D sum_i relu(gamma - C_ii),  C = H'H / N of the centered H

    The first is VICReg's. The second is the lecture's: its gradient vanishes with the
    spread, while that of the first stays of order one until the spread nears sqrt(eps).

    Args:
        h: (N, D) embeddings, float16, bfloat16, float32 or float64.
        gamma: target of the standard deviation (or variance), >= 0.
        eps: > 0, inside the root; unused by on="variance".
        on: which of the two forms.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        A scalar in [0, gamma], float32 (float64 for float64 input).

    Raises:
        ValueError: for wrong shapes, dtypes or hyper-parameters, and a global batch
            below 2.

    References:
        Bardes, Ponce, LeCun, 2022, VICReg (arXiv:2105.04906), equation 1.
    """
    (h,) = check_embeddings(axis_name, h=h)
    gamma = check_number("gamma", gamma, dtype=h.dtype)
    if on not in ("std", "variance"):
        raise ValueError(f'on: got {on!r}, expected "std" or "variance"')
    if on == "std":
        eps = check_number("eps", eps, exclusive=True, dtype=h.dtype)
    squares = batch_sum(jnp.square(numerics.center(h, axis_name)), axis_name)
    count = as_number(batch_size(h, axis_name), h.dtype)
    if on == "std":
        return _std_hinge(squares, count, gamma, eps)
    return _hinge(squares / count, gamma)


def covariance_penalty(h: ArrayLike, *, axis_name: AxisName = None) -> jax.Array:
    """How much the dimensions vary together: the squared off-diagonal covariances.

    1/D sum_{i != j} C_ij^2,  C = H'H / (N - 1) of the centered H

    For N < 3/4 D it is computed as 1/D (||HH'||^2 - sum_i (H'H)_ii^2) / (N - 1)^2,
    without C (over an axis, for N < D). That difference loses precision where a few
    dimensions are orders of magnitude larger than the rest; where it would because N is
    near D, C is formed instead. C is formed, too, where `jax.export` leaves N open.

    Args:
        h: (N, D) embeddings, float16, bfloat16, float32 or float64.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        A scalar >= 0, float32 (float64 for float64 input); +inf beyond its range.

    Raises:
        ValueError: for wrong shapes or dtypes, and a global batch below 2.

    References:
        Bardes, Ponce, LeCun, 2022, VICReg (arXiv:2105.04906), equations 3 and 4.
    """
    (h,) = check_embeddings(axis_name, h=h)
    _, penalty = _moments(h, 1, True, axis_name)
    return penalty


def vicreg_terms(
    x: ArrayLike,
    y: ArrayLike,
    *,
    gamma: Scalar = 1.0,
    eps: Scalar = 1e-4,
    axis_name: AxisName = None,
) -> VICRegTerms:
    """The three terms of VICReg, each with its official reduction, unweighted.

    invariance = 1/(N D) sum_{n,i} (x_ni - y_ni)^2
    variance   = (variance_hinge(x) + variance_hinge(y)) / 2
    covariance = covariance_penalty(x) + covariance_penalty(y)

    Args:
        x: (N, D) embeddings of the first views.
        y: (N, D) embeddings of the second views of the same images.
        gamma: target of the standard deviation, >= 0.
        eps: > 0, inside the root of the standard deviation.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        `VICRegTerms` of scalars, float32 (float64 for float64 input).

    Raises:
        ValueError: for wrong shapes, dtypes or hyper-parameters, and a global batch
            below 2.

    References:
        Bardes, Ponce, LeCun, 2022, VICReg (arXiv:2105.04906).
    """
    x, y = check_embeddings(axis_name, x=x, y=y)
    gamma = check_number("gamma", gamma, dtype=x.dtype)
    eps = check_number("eps", eps, exclusive=True, dtype=x.dtype)
    count = as_number(batch_size(x, axis_name), x.dtype)
    variance, covariance = [], []
    for h in (x, y):
        squares, penalty = _moments(h, 1, True, axis_name)
        variance.append(_std_hinge(squares, count, gamma, eps))
        covariance.append(penalty)
    return VICRegTerms(
        invariance=_mean_square(x - y, count * x.shape[1], axis_name),
        variance=0.5 * (variance[0] + variance[1]),
        covariance=covariance[0] + covariance[1],
    )


def vicreg(
    x: ArrayLike,
    y: ArrayLike,
    *,
    invariance_weight: Scalar = 25.0,
    variance_weight: Scalar = 25.0,
    covariance_weight: Scalar = 1.0,
    gamma: Scalar = 1.0,
    eps: Scalar = 1e-4,
    axis_name: AxisName = None,
) -> jax.Array:
    """VICReg: views agree, every dimension varies, no two dimensions vary together.

    invariance_weight * invariance + variance_weight * variance
        + covariance_weight * covariance,  the terms as in `vicreg_terms`

    Identical embeddings of all images have the value variance_weight (gamma -
    sqrt(eps)): 24.75 with the defaults. The variance term is averaged and the
    covariance term is summed over the two views, as in the official code; the paper's
    pseudocode sums both.

    As in `covariance_penalty`, the covariance term loses precision for N < 3/4 D (over
    an axis, for N < D) where a few dimensions are orders of magnitude larger than the
    rest: up to 3e-3 of its value where one column has nearly all of the variance.

    Args:
        x: (N, D) embeddings of the first views.
        y: (N, D) embeddings of the second views of the same images.
        invariance_weight: >= 0.
        variance_weight: >= 0.
        covariance_weight: >= 0. A weight of 0 removes its term.
        gamma: target of the standard deviation, >= 0.
        eps: > 0, inside the root of the standard deviation.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        A scalar, float32 (float64 for float64 input); +inf beyond its range.

    Raises:
        ValueError: for wrong shapes, dtypes or hyper-parameters, and a global batch
            below 2.

    References:
        Bardes, Ponce, LeCun, 2022, VICReg (arXiv:2105.04906), equation 6.
    """
    invariance_weight = check_number("invariance_weight", invariance_weight)
    variance_weight = check_number("variance_weight", variance_weight)
    covariance_weight = check_number("covariance_weight", covariance_weight)
    terms = vicreg_terms(x, y, gamma=gamma, eps=eps, axis_name=axis_name)
    return numerics.weighted_sum(
        (invariance_weight, terms.invariance),
        (variance_weight, terms.variance),
        (covariance_weight, terms.covariance),
    )


def lecture_energy(
    x: ArrayLike,
    y: ArrayLike,
    *,
    gamma: Scalar = 1.0,
    center: bool = True,
    axis_name: AxisName = None,
) -> jax.Array:
    """The covariance-regularized energy as the lecture writes it, with C = H'H / N.

    1/N sum_n ||x_n - y_n||^2 + sum over both views of
        1/D sum_i [relu(gamma - C_ii) + sum_{j != i} C_ij^2]

    Against `vicreg`: the hinge is on the variance, not the standard deviation; the
    covariance has 1/N; the invariance sums over D; both views are summed; no weights.

    As in `covariance_penalty`, the sum of C_ij^2 loses precision for N < 3/4 D (over an
    axis, for N < D) where a few dimensions are orders of magnitude larger than the
    rest: up to 3e-3 of its value where one column has nearly all of the variance.

    Args:
        x: (N, D) embeddings of the first views.
        y: (N, D) embeddings of the second views of the same images.
        gamma: target of the variance, >= 0.
        center: whether the batch mean is subtracted before C is formed.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        A scalar, float32 (float64 for float64 input); +inf beyond its range.

    Raises:
        ValueError: for wrong shapes, dtypes or hyper-parameters, and a global batch
            below 2.

    References:
        Bardes, Ponce, LeCun, 2022, VICReg (arXiv:2105.04906), after which it is built.
    """
    x, y = check_embeddings(axis_name, x=x, y=y)
    gamma = check_number("gamma", gamma, dtype=x.dtype)
    if not isinstance(center, bool):
        raise ValueError(f"center: got {center!r}, expected True or False")
    count = as_number(batch_size(x, axis_name), x.dtype)
    energy = _mean_square(x - y, count, axis_name)
    for h in (x, y):
        squares, penalty = _moments(h, 0, center, axis_name)
        energy = energy + _hinge(squares / count, gamma) + penalty
    return energy


def barlow_twins_terms(
    x: ArrayLike, y: ArrayLike, *, eps: Scalar = 1e-5, axis_name: AxisName = None
) -> BarlowTwinsTerms:
    """How far the cross-correlation of the two views is from the identity.

    c = x^' y^ / N,  h^ = (h - mean) / sqrt(Var + eps) with the biased variance
    on_diagonal = sum_i (c_ii - 1)^2,  off_diagonal = sum_{i != j} c_ij^2

    For N < 3/4 D (over an axis, N < D) the off-diagonal sum is
    <x^ x^', y^ y^'> / N^2 - sum_i c_ii^2, without c. Where `jax.export` leaves N open,
    c is formed.

    Args:
        x: (N, D) embeddings of the first views.
        y: (N, D) embeddings of the second views of the same images.
        eps: > 0, added to the variance.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        `BarlowTwinsTerms` of scalars, float32 (float64 for float64 input).

    Raises:
        ValueError: for wrong shapes, dtypes or hyper-parameters, and a global batch
            below 2.

    References:
        Zbontar, Jing, Misra, LeCun, Deny, 2021, Barlow Twins (arXiv:2103.03230).
    """
    x, y = check_embeddings(axis_name, x=x, y=y)
    eps = check_number("eps", eps, exclusive=True, dtype=x.dtype)
    count = as_number(batch_size(x, axis_name), x.dtype)
    x = numerics.standardize(x, eps, axis_name)
    y = numerics.standardize(y, eps, axis_name)
    # Divided last: a factor on x and y would shift all of c, where c_ii - 1 shows it.
    diagonal = batch_sum(x * y, axis_name) / count  # (D,)
    form = _form(x, axis_name)
    off_diagonal = _sum_of_squares((x, y), form, axis_name) / count**2
    if form != "sum":
        off_diagonal = off_diagonal - jnp.sum(jnp.square(diagonal))
        off_diagonal = numerics.nonnegative(off_diagonal)
    return BarlowTwinsTerms(jnp.sum(jnp.square(diagonal - 1.0)), off_diagonal)


def barlow_twins(
    x: ArrayLike,
    y: ArrayLike,
    *,
    off_diagonal_weight: Scalar = 0.0051,
    eps: Scalar = 1e-5,
    axis_name: AxisName = None,
) -> jax.Array:
    """Barlow Twins: the views' cross-correlation matrix is driven to the identity.

    sum_i (c_ii - 1)^2 + off_diagonal_weight * sum_{i != j} c_ij^2

    A plain sum as in the official code: no division by D. Identical embeddings of all
    images have the value D.

    Args:
        x: (N, D) embeddings of the first views.
        y: (N, D) embeddings of the second views of the same images.
        off_diagonal_weight: >= 0.
        eps: > 0, added to the variance.
        axis_name: the mapped axis (or axes) over which the batch is sharded.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: for wrong shapes, dtypes or hyper-parameters, and a global batch
            below 2.

    References:
        Zbontar, Jing, Misra, LeCun, Deny, 2021, Barlow Twins (arXiv:2103.03230).
    """
    off_diagonal_weight = check_number("off_diagonal_weight", off_diagonal_weight)
    terms = barlow_twins_terms(x, y, eps=eps, axis_name=axis_name)
    return numerics.weighted_sum(
        (1.0, terms.on_diagonal), (off_diagonal_weight, terms.off_diagonal)
    )


def numbers_sent(count: int, features: int, shards: int) -> dict[Form, float]:
    """What one device sends for the value and the gradient of one H'H, in numbers.

    With f = (shards - 1) / shards, the part of anything that others have,

    all_to_all: 2 f N (D / shards + N)   a part of the features of all rows, there and
                                         back, and the sum of the N x N products
    gather:     f N D                    all the rows, from which each shard computes
                                         its own rows of HH', and of the gradient
    sum:        2 f D^2                  the sum of the D x D products

    where D / shards is rounded up. For the x'y of two views (Barlow Twins) the first
    two are twice that, once for either view, and the sum is the same.

    Args:
        count: N, the number of rows of the global batch.
        features: D, the number of columns.
        shards: over how many devices the rows are sharded.

    Returns:
        Numbers, by form; VICReg sends twice as many, for its two views.
    """
    columns = -(-features // shards)
    numbers: dict[Form, int] = {
        "all_to_all": 2 * count * (columns + count),
        "gather": count * features,
        "sum": 2 * features**2,
    }
    return {form: (shards - 1) * n / shards for form, n in numbers.items()}


def cheapest_form(count: int, features: int, shards: int) -> Form:
    """How shards compute the sum of squares of H'H together.

    all_to_all where N < D / 2 - ceil(D / shards),
    gather     from there while N < D,
    sum        where N >= D, and on one device from N = 3/4 D on.

    All three divide the products among the shards, and of those that take the fewest,
    N D min(N, D), it is the one that sends least. Between N = D and 2 D a gather would
    send less than the sum of one H'H, at most half. It is not chosen there because it
    takes N / D times the products, and because the diagonal of H'H, which for N >= D
    can be nearly all of HH', would have to be subtracted from it. On one device, where
    nothing is sent, that is avoided from 3/4 D on, where it costs up to 4 times the
    precision, at no more than 4/3 of the products (for Barlow Twins, at no more).

    Args:
        count: N, the number of rows of the global batch.
        features: D, the number of columns.
        shards: over how many devices the rows are sharded; 1 sends nothing.

    Returns:
        The form, as in `numbers_sent`.
    """
    if count >= features or (shards == 1 and 4 * count >= 3 * features):
        return "sum"
    sent = numbers_sent(count, features, shards)
    return "all_to_all" if sent["all_to_all"] < sent["gather"] else "gather"


def _mean_square(x, count, axis_name):
    # Divided before the square: it overflows only where the mean does.
    squares = jnp.square(x * (1.0 / count) ** 0.5)
    return psum(jnp.sum(squares), axis_name)


def _hinge(spread, gamma):
    return jnp.mean(jax.nn.relu(gamma - spread))


def _std_hinge(squares, count, gamma, eps):
    return _hinge(numerics.std(squares / (count - 1), eps), gamma)


# The rules of derivatives are what lets a gradient be computed from what was sent for
# the value: the products are symmetric in the rows of the batch, so a shard's part of
# the gradient is that of its own rows. A transposed collective would send as much
# again. Since a rule is itself made of products, not constants, it holds to any order.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _moments(h, fewer, centered, axis_name):
    """What the losses need of C = h'h / (N - fewer): its diagonal and the rest.

    The squares of the columns, (D,), and 1/D sum_{i != j} C_ij^2. With `centered`, the
    mean over the batch is subtracted from `h` first.
    """
    squares, penalty, _, _ = _moments_and_gradient(h, fewer, centered, axis_name)
    return squares, penalty


@_moments.defjvp
def _moments_jvp(fewer, centered, axis_name, primals, tangents):
    (h,), (change,) = primals, tangents
    squares, penalty, rows, gradient = _moments_and_gradient(
        h, fewer, centered, axis_name
    )
    # Centered rows, and so this gradient, sum to zero over the batch: they are the
    # derivatives for what was centered and for what was not.
    of_squares = batch_sum(2.0 * rows * change, axis_name)
    of_penalty = psum(jnp.sum(gradient() * change), axis_name)
    return (squares, penalty), (of_squares, of_penalty)


def _moments_and_gradient(h, fewer, centered, axis_name):
    """The value of `_moments`, the rows it is of, and a function for its gradient."""
    features = h.shape[1]
    normalizer = as_number(batch_size(h, axis_name) - fewer, h.dtype)
    rows = numerics.center(h, axis_name) if centered else h
    # Made once: XLA would make parts of it again for each use, and keep them all.
    rows = lax.optimization_barrier(rows)
    squares = batch_sum(jnp.square(rows), axis_name)  # (D,)
    # In units of the columns' mean length no product is above D, and their squares can
    # neither overflow nor all underflow. The result does not depend on the unit.
    unit = jnp.sqrt(lax.stop_gradient(jnp.sum(squares * (1.0 / features))))
    unit = jnp.where(unit == 0, jnp.ones_like(unit), unit)
    form = _form(h, axis_name)
    total, gradients = _products((rows,), unit, form, axis_name)
    diagonal = squares / unit / unit
    if form != "sum":
        total = numerics.nonnegative(total - jnp.sum(jnp.square(diagonal)))
    # Multiplied in steps: the product is infinite only where the value is. 0 * inf
    # cannot arise, since `unit` is finite but where the squares overflowed.
    scale = unit * (1.0 / (normalizer * features**0.5))
    penalty = total * (scale * unit) * (scale * unit)
    penalty = jnp.where(unit > float(jnp.finfo(h.dtype).max), unit, penalty)

    def gradient():
        (of_products,) = gradients()
        if form != "sum":
            of_products = of_products - rows * (4.0 * diagonal[None])
        return scale * scale * of_products

    return squares, penalty, rows, gradient


def _form(x, axis_name):
    count = batch_size(x, axis_name)
    # Where N is left open by `jax.export`, D x D: its memory does not depend on N.
    if not is_known(count):
        return "sum"
    return cheapest_form(count, x.shape[1], axis_size(axis_name))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _sum_of_squares(views, form, axis_name):
    """sum_ij C_ij^2 of C = x'y over the global batch; by "sum" without i = j."""
    value, _ = _products(views, 1.0, form, axis_name)
    return value


@_sum_of_squares.defjvp
def _sum_of_squares_jvp(form, axis_name, primals, tangents):
    (views,), (changes,) = primals, tangents
    value, gradients = _products(views, 1.0, form, axis_name)
    change = jnp.zeros_like(value)
    for gradient, of_view in zip(gradients(), changes, strict=True):
        change = change + jnp.sum(gradient * of_view)
    return value, psum(change, axis_name)


def _products(views, unit, form, axis_name):
    """sum_ij C_ij^2 of C = x'y / unit^2, and a function for its gradients.

    `views` are x and y, or x alone for C = x'x. The gradients, (N, D) each, are those
    times unit^2. By "sum" they and the value are without i = j.
    """
    x, y = views[0], views[-1]
    factor = 4.0 / len(views)
    if form == "sum":
        products = feature_gram(x, y, axis_name)  # (D, D)
        products = _without_diagonal(products / unit / unit)

        def of_features():
            both = (row_products(y, products), row_products(x, products.T))
            return [factor * gradient for gradient in both[: len(views)]]

        return jnp.sum(jnp.square(products)), of_features

    # <xx', yy'>, of this shard's rows or, where features were exchanged, of all.
    if form == "gather":
        whole = [gather(view, axis_name) for view in views]  # (N_global, D)
        products = [
            row_gram(rows) if axis_name is None else row_products(view, rows)
            for view, rows in zip(views, whole, strict=True)
        ]  # (N, N_global)
    else:
        whole = [rows_for_features(view, axis_name) for view in views]
        products = [psum(row_gram(part), axis_name) for part in whole]
    products = [product / unit / unit for product in products]
    value = jnp.sum(products[0] * products[-1])
    if form == "gather":
        value = psum(value, axis_name)

    def of_examples():
        gradients = [
            row_products(factor * other, rows.T)
            for other, rows in zip(products[::-1], whole, strict=True)
        ]
        if form == "gather":
            return gradients
        return [features_for_rows(g, x.shape[1], axis_name) for g in gradients]

    return value, of_examples


def _without_diagonal(matrix):
    return jnp.where(jnp.eye(matrix.shape[0], dtype=bool), 0.0, matrix)
