"""Loss heads: pure functions per example, each with its derivatives of every order in closed form beneath it.

A head is its value, the rule beneath it, and its curvature beneath that, entered by `operators_of`. The table of
all heads, their special values, and where they differ from optax: docs/exact_losses.md.
"""

from jaxsoftmax.losses.binary import sigmoid_binary_cross_entropy, sigmoid_focal_loss
from jaxsoftmax.losses.cross_entropy import (
    safe_softmax_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)
from jaxsoftmax.losses.divergences_of_logits import jensen_shannon_divergence, softmax_kl_divergence
from jaxsoftmax.losses.divergences_of_probabilities import (
    convex_kl_divergence,
    generalized_kl_divergence,
    kl_divergence,
    kl_divergence_with_log_targets,
)
from jaxsoftmax.losses.entmax_losses import entmax_loss, multiclass_sparsemax_loss, sparsemax_loss
from jaxsoftmax.losses.entropy_brier import brier_loss, softmax_entropy
from jaxsoftmax.losses.focal import focal_loss_with_integer_labels, poly_loss_cross_entropy
from jaxsoftmax.losses.hessian import Curvature, curvature_of, logits_fisher, logits_ggn, logits_hessian
from jaxsoftmax.losses.natural_gradient import natural_gradient_norm
from jaxsoftmax.losses.reduction import weighted_mean
from jaxsoftmax.losses.regression import huber_loss, l2_loss, log_cosh, squared_error, sum_squared_error
from jaxsoftmax.losses.softcap import softcap_logits

__all__ = [
    "Curvature",
    "brier_loss",
    "convex_kl_divergence",
    "curvature_of",
    "entmax_loss",
    "focal_loss_with_integer_labels",
    "generalized_kl_divergence",
    "huber_loss",
    "jensen_shannon_divergence",
    "kl_divergence",
    "kl_divergence_with_log_targets",
    "l2_loss",
    "log_cosh",
    "logits_fisher",
    "logits_ggn",
    "logits_hessian",
    "multiclass_sparsemax_loss",
    "natural_gradient_norm",
    "poly_loss_cross_entropy",
    "safe_softmax_cross_entropy",
    "sigmoid_binary_cross_entropy",
    "sigmoid_focal_loss",
    "softcap_logits",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "softmax_entropy",
    "softmax_kl_divergence",
    "sparsemax_loss",
    "squared_error",
    "sum_squared_error",
    "weighted_mean",
]
