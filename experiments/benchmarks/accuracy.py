"""Relative errors of the covariance losses against float64, beside the plain formula.

python experiments/benchmarks/accuracy.py

Value and gradient in float32, on embeddings of four kinds; the inputs of the reference
are the same float32 numbers. The last column is the largest of our errors as a share of
the plain formula's, or of float32's rounding (1.2e-7) where that is larger; above 3 it
ends with code 1.
"""

import sys

import jax
import loss
import numpy as np
from numpy.linalg import norm

from jemjax import losses

ROUNDING = float(np.finfo(np.float32).eps)
SHAPES = ((256, 2048), (1024, 2048), (2048, 256))


def embeddings(kind, rows, features):
    """Two views of N x D, float32."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, features))
    y = 0.7 * x + 0.7 * generator.standard_normal((rows, features))
    if kind == "correlated":
        mixed = generator.standard_normal((features // 8, features))
        x, y = (view[:, : features // 8] @ mixed / features**0.5 for view in (x, y))
    elif kind == "off-center":
        x, y = x + 10.0, y + 10.0
    elif kind == "nearly collapsed":
        x, y = 3.0 + 1e-3 * x, 3.0 + 1e-3 * y
    return [view.astype(np.float32) for view in (x, y)]


def errors(function, inputs, wanted):
    """Of the value, and of the gradients taken together."""
    value, gradients = jax.jit(jax.value_and_grad(function, (0, 1)))(*inputs)
    found, gradient = np.float64(value), np.stack(gradients).astype(np.float64)
    reference, exact = wanted
    return abs(found - reference) / abs(reference), norm(gradient - exact) / norm(exact)


def main():
    """Prints the table; whether all is precise enough."""
    precise = True
    print(
        "| loss | N x D | embeddings | value | plain | gradient | plain | worst share |"
    )
    print("|---" * 8 + "|")
    for name in ("vicreg", "barlow_twins"):
        ours, plain = getattr(losses, name), loss.formula(name)
        for rows, features in SHAPES:
            for kind in ("well-spread", "correlated", "off-center", "nearly collapsed"):
                inputs = embeddings(kind, rows, features)
                with jax.enable_x64(True):
                    wide = [np.asarray(view, np.float64) for view in inputs]
                    exact = jax.jit(jax.value_and_grad(plain, (0, 1)))(*wide)
                wanted = float(exact[0]), np.stack(exact[1])
                of_ours = errors(ours, inputs, wanted)
                of_plain = errors(plain, inputs, wanted)
                worst = max(
                    error / max(other, ROUNDING)
                    for error, other in zip(of_ours, of_plain, strict=True)
                )
                precise &= worst <= 3
                cells = [of_ours[0], of_plain[0], of_ours[1], of_plain[1]]
                print(
                    f"| {name} | {rows} x {features} | {kind} | "
                    + " | ".join(f"{cell:.1e}" for cell in cells)
                    + f" | {worst:.2g} |",
                    flush=True,
                )
    return precise


if __name__ == "__main__":
    sys.exit(not main())
