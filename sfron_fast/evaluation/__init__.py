"""How well a model has forgotten: accuracies, membership, divergence, reports and figures.

``figures`` and ``report`` are imported on their own: matplotlib is an extra.
"""

from .membership import entropy, mia_entropy, mia_modified_entropy, modified_entropy
from .metrics import COMPARED, METRICS, evaluate, kl_divergence, per_sample_loss, score
from .nearest_class import NearestClassAttack
from .predictions import (
    Evaluated,
    Predictions,
    accuracy,
    collect,
    predict,
    predict_named,
    task_accuracy,
)

__all__ = [
    "COMPARED",
    "METRICS",
    "Evaluated",
    "NearestClassAttack",
    "Predictions",
    "accuracy",
    "collect",
    "entropy",
    "evaluate",
    "kl_divergence",
    "mia_entropy",
    "mia_modified_entropy",
    "modified_entropy",
    "per_sample_loss",
    "predict",
    "predict_named",
    "score",
    "task_accuracy",
]
