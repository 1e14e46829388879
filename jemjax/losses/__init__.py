"""Losses: pure functions from arrays to a scalar, right on any number of devices.

They import jax only, work bare and under `jit`, `grad`, `vmap`, `shard_map` and `pmap`,
are computed in float32 whatever the embeddings' dtype (float64 for float64), and are
finite with finite gradients wherever the exact value fits.

With ``axis_name`` the arrays are one shard of the global batch, and the result is the
loss of the whole batch, the same scalar on every shard. A gradient taken inside
`pmap`, `vmap(axis_name=...)` or `shard_map(check_vma=False)` is one shard's part, of
which the loss's gradient is the mean: apply `jax.lax.pmean` to the gradients of
parameters there, as data-parallel steps do, and divide those of a shard's own rows by
the number of shards; everywhere else gradients are already the loss's, and the mean
changes nothing.
"""

from jemjax.losses.clustering import sinkhorn, swav
from jemjax.losses.contrastive import info_nce, nt_xent
from jemjax.losses.covariance import (
    BarlowTwinsTerms,
    VICRegTerms,
    barlow_twins,
    barlow_twins_terms,
    covariance_penalty,
    lecture_energy,
    variance_hinge,
    vicreg,
    vicreg_terms,
)
from jemjax.losses.distillation import cross_entropy, dino, update_center
from jemjax.losses.regression import (
    byol,
    data2vec_target,
    negative_cosine,
    smooth_l1,
)

__all__ = [
    "BarlowTwinsTerms",
    "VICRegTerms",
    "barlow_twins",
    "barlow_twins_terms",
    "byol",
    "covariance_penalty",
    "cross_entropy",
    "data2vec_target",
    "dino",
    "info_nce",
    "lecture_energy",
    "negative_cosine",
    "nt_xent",
    "sinkhorn",
    "smooth_l1",
    "swav",
    "update_center",
    "variance_hinge",
    "vicreg",
    "vicreg_terms",
]
