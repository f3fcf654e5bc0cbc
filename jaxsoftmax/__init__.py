"""Softmax, its Jacobian and the losses built on it, with every derivative in closed form."""

from jaxsoftmax.losses import (
    l2_loss,
    safe_softmax_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    squared_error,
    sum_squared_error,
)
from jaxsoftmax.softmax import log_softmax, logsumexp, softmax

__version__ = "0.1.0"

__all__ = [
    "l2_loss",
    "log_softmax",
    "logsumexp",
    "safe_softmax_cross_entropy",
    "softmax",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "squared_error",
    "sum_squared_error",
]
