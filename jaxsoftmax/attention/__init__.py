"""Attention, a block of queries at a time: value and every derivative without an array of queries times keys."""

from jaxsoftmax.attention.call import dot_product_attention

__all__ = ["dot_product_attention"]
