"""Joint-embedding self-supervised learning in JAX.

Import the part you need: ``from jemjax import losses`` brings pure functions of arrays
and imports nothing but jax. This module itself imports nothing, so that the command
line and every data loader worker start at once.
"""

__version__ = "0.1.0"
