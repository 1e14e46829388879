"""How good an embedding is: functions of embeddings, and labels where there are any."""

from jemjax.evaluation.collapse import effective_rank, normalized_std, rankme
from jemjax.evaluation.knn import few_labels, knn_accuracy, knn_predict
from jemjax.evaluation.linear_probe import LinearProbe, linear_probe

__all__ = [
    "LinearProbe",
    "effective_rank",
    "few_labels",
    "knn_accuracy",
    "knn_predict",
    "linear_probe",
    "normalized_std",
    "rankme",
]
