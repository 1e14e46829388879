"""What this machine can do, measured in the same rounds as the contenders."""

SIDE = 2048
MATMUL_GFLOP = 2 * SIDE**3 / 1e9
COPY_GB = 2 * 4 * 2**26 / 1e9  # read and written


def matmul():
    """A float32 product of two square matrices."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    return lambda: product(x)


def copy():
    """256 MiB read, and as much written."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(2**26, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return lambda: add(x)
