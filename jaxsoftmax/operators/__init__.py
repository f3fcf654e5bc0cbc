"""Symmetric operators with O(K) products: the softmax Jacobian, and a diagonal plus a low rank."""

from jaxsoftmax.operators.diagonal_low_rank import DiagonalPlusLowRank
from jaxsoftmax.operators.softmax_jacobian import SoftmaxJacobian

__all__ = ["DiagonalPlusLowRank", "SoftmaxJacobian"]
