"""A linear layer and its loss in one function: the logits never exist as a whole."""

from jaxsoftmax.linear_head.budget import default_chunk_size, predict_temp_bytes
from jaxsoftmax.linear_head.cross_entropy import (
    linear_softmax_cross_entropy_loss,
    linear_softmax_cross_entropy_with_statistics,
)
from jaxsoftmax.linear_head.distillation import linear_softmax_kl_divergence
from jaxsoftmax.linear_head.statistics import TokenStatistics

__all__ = [
    "TokenStatistics",
    "default_chunk_size",
    "linear_softmax_cross_entropy_loss",
    "linear_softmax_cross_entropy_with_statistics",
    "linear_softmax_kl_divergence",
    "predict_temp_bytes",
]
