"""The figures of embeddings, as the settings see them."""

import jax
import jax.numpy as jnp

from jemjax import evaluation
from jemjax.evaluation import knn_accuracy, linear_probe

FIGURES = {
    "normalized_std": evaluation.normalized_std,
    "effective_rank": evaluation.effective_rank,
    "rankme": evaluation.rankme,
    "alpha_req": evaluation.alpha_req,
}


def labels_of(h):
    return jnp.arange(len(h), dtype=jnp.int32) % 3


def votes(h):
    return evaluation.knn_predict(
        h, labels_of(h), h, k=2, temperature=1.0, num_classes=3
    )


def probe(h):
    options = {"num_classes": 3, "max_iterations": 3}
    return linear_probe(h, labels_of(h), h, labels_of(h), **options)


def neighbors(h):
    return knn_accuracy(h, labels_of(h), h, labels_of(h), k=2, num_classes=3)


def with_gradient(figure):
    return lambda h: jax.value_and_grad(lambda h: jnp.sum(jnp.sin(figure(h))))(h)


CALLS = {
    **{name: with_gradient(figure) for name, figure in FIGURES.items()},
    "knn_predict": with_gradient(votes),
    "knn_accuracy": neighbors,
    "linear_probe": probe,
}
