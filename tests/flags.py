"""JAX's settings that other people's projects make: under each, all has to hold."""

import contextlib

import jax

# What is decided where a function is traced, and changes no value.
TRACED = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "tracer leaks": jax.checking_leaks,
    "checks": lambda: jax.enable_checks(True),
}
# What is seen outside of `jit` only, where each operation is run by itself.
BARE = {
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "disable_jit": jax.disable_jit,
}
PRECISIONS = (
    *("default", "high", "highest", "bfloat16", "tensorfloat32"),
    *("float32", "BF16_BF16_F32", "BF16_BF16_F32_X3", "TF32_TF32_F32", "F32_F32_F32"),
)
# What changes the compiled program.
COMPILED = {
    "x64": lambda: jax.enable_x64(True),
    "transfer guard": lambda: jax.transfer_guard("disallow"),
    **{name: lambda p=name: jax.default_matmul_precision(p) for name in PRECISIONS},
}


@contextlib.contextmanager
def all_of(settings):
    """Several settings at once."""
    with contextlib.ExitStack() as stack:
        for setting in settings.values():
            stack.enter_context(setting())
        yield
