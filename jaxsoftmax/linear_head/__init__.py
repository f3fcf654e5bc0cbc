"""A linear layer and its loss in one function: the logits never exist as a whole."""

from jaxsoftmax.linear_head.cross_entropy import (
    TokenStatistics,
    linear_softmax_cross_entropy_loss,
    linear_softmax_cross_entropy_with_statistics,
    linear_softmax_log_probs,
)
from jaxsoftmax.linear_head.distillation import linear_softmax_kl_divergence, linear_softmax_top_k_kl_divergence
from jaxsoftmax.linear_head.plan import default_chunk_size, predict_temp_bytes

__all__ = [
    "TokenStatistics",
    "default_chunk_size",
    "linear_softmax_cross_entropy_loss",
    "linear_softmax_cross_entropy_with_statistics",
    "linear_softmax_kl_divergence",
    "linear_softmax_log_probs",
    "linear_softmax_top_k_kl_divergence",
    "predict_temp_bytes",
]
