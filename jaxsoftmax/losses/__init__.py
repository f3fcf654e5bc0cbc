"""Loss heads, one file per kind; every head is a pure per-example function with its rule beneath it."""

from jaxsoftmax.losses.cross_entropy import (
    safe_softmax_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)
from jaxsoftmax.losses.regression import l2_loss, squared_error, sum_squared_error

__all__ = [
    "l2_loss",
    "safe_softmax_cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "squared_error",
    "sum_squared_error",
]
