"""What stands after a head: the weighted mean of the losses, in which 0/0 is 0."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, dtypes


def weighted_mean(losses: ArrayLike, weights: ArrayLike, normalizer: ArrayLike | None = None) -> Array:
    """Mean of what is counted: Σ w l / Σ w, and 0 with gradient 0 where the weights sum to 0.

    A loss of weight 0 does not count, whatever its value, inf and NaN included. The reductions of
    `torch.nn.functional.cross_entropy`, with l = softmax_cross_entropy_with_integer_labels(…):

    - "none": l;    "sum": jnp.sum(l)
    - "mean": weighted_mean(l, labels != ignore_index)
    - "mean" with class weights w, which l contains: weighted_mean(l, kept, normalizer=jnp.where(kept, w[labels], 0)),
      where kept = labels != ignore_index.

    Args:
      losses: floating-point losses of any shape.
      weights: real or boolean weights of a shape that broadcasts to that of `losses`, for example of tokens.
      normalizer: what is summed for the denominator in the place of `weights`, of such a shape too.

    Returns:
      A scalar, of the dtype of `losses`, float32 for half precision.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> losses = jnp.array([1.0, 2.0, jnp.nan])
      >>> print(jaxsoftmax.weighted_mean(losses, jnp.array([1.0, 3.0, 0.0])))
      1.75
      >>> print(jaxsoftmax.weighted_mean(losses, jnp.zeros(3)))
      0.0

    Reference: `torch.nn.functional.cross_entropy`, whose mean of nothing is NaN.
    """
    losses = checks.as_loss_float("losses", losses)
    dtype = dtypes.compute_dtype(losses.dtype)
    weights = checks.broadcast("weights", checks.as_real("weights", weights, dtype), losses.shape)
    if normalizer is None:
        normalizer = weights
    normalizer = checks.broadcast("normalizer", checks.as_real("normalizer", normalizer, dtype), losses.shape)
    return _weighted_mean(losses.astype(dtype), weights.astype(dtype), normalizer.astype(dtype))


@functools.partial(jax.jit, inline=True)
def _weighted_mean(losses, weights, normalizer) -> Array:
    total = jnp.sum(normalizer)
    counted = jnp.where((weights == 0) & ~jnp.isfinite(losses), 0.0, losses)
    return jnp.where(total == 0, 0.0, jnp.sum(weights * counted) / jnp.where(total == 0, 1.0, total))
