"""How good an embedding is: functions of embeddings, and labels where there are any.

On a mesh of Explicit axes, which is set by `jax.set_mesh`, every device gets all rows
and computes the same, but for `normalized_std`, of which each computes a part.
"""

from jemjax.evaluation.clusters import (
    PrototypeUsage,
    cluster_accuracy,
    few_label_cluster_accuracy,
    label_clusters,
    normalized_mutual_information,
    prototype_usage,
)
from jemjax.evaluation.collapse import (
    alpha_req,
    effective_rank,
    name_collapse,
    normalized_std,
    rankme,
)
from jemjax.evaluation.knn import few_labels, knn_accuracy, knn_predict
from jemjax.evaluation.linear_probe import LinearProbe, linear_probe

__all__ = [
    "LinearProbe",
    "PrototypeUsage",
    "alpha_req",
    "cluster_accuracy",
    "effective_rank",
    "few_label_cluster_accuracy",
    "few_labels",
    "knn_accuracy",
    "knn_predict",
    "label_clusters",
    "linear_probe",
    "name_collapse",
    "normalized_mutual_information",
    "normalized_std",
    "prototype_usage",
    "rankme",
]
