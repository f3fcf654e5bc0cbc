"""What stands before a head and after it: transforms of the logits, and the weighted mean of the losses.

softcap: x = c tanh(z/c), ∂x/∂z = sech²(z/c), so that |x| < c;    temperature: x = z/T.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax import _checks as checks
from jaxsoftmax import _numerics as num
from jaxsoftmax.losses.elementary import tanh


def softcap_logits(logits: ArrayLike, cap: ArrayLike) -> Array:
    """Logits kept within (-cap, cap): cap · tanh(logits / cap).

    Args:
      logits: floating-point logits of any shape. An excluded class (-inf) stays excluded.
      cap: c > 0.

    Returns:
      Capped logits, of the shape and dtype of `logits`.

    Raises:
      TypeError: if `logits` is not floating point or `cap` is no real number.
      ValueError: if `cap` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.softcap_logits(jnp.array([1.0, 100.0, -jnp.inf]), 30.0).round(4))
      [ 0.9996 29.9237    -inf]

    Reference: Bello et al. 2017, https://arxiv.org/abs/1611.09940; MATHEMATICS.md section 4.
    """
    logits = checks.as_loss_float("logits", logits)
    return _softcap(logits, checks.positive("cap", cap))


def temper_logits(logits: ArrayLike, temperature: ArrayLike) -> Array:
    """Logits at a temperature: logits / T. The cross-entropy of them has gradient (p_T - y)/T and Hessian J(p_T)/T².

    Args:
      logits: floating-point logits of any shape.
      temperature: T > 0; above 1 it flattens the distribution, below 1 it sharpens it.

    Returns:
      Logits, of the shape and dtype of `logits`.

    Raises:
      TypeError: if `logits` is not floating point or `temperature` is no real number.
      ValueError: if `temperature` is not positive.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.temper_logits(jnp.array([1.0, 2.0]), 2.0))
      [0.5 1. ]

    Reference: Hinton et al. 2015, https://arxiv.org/abs/1503.02531; MATHEMATICS.md section 4.
    """
    logits = checks.as_loss_float("logits", logits)
    return _temper(logits, checks.positive("temperature", temperature))


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

    Raises:
      TypeError: if `losses` is not floating point, `weights` or `normalizer` complex.
      ValueError: if a shape does not broadcast to that of `losses`.

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
    dtype = num.compute_dtype(losses.dtype)
    weights = checks.broadcast("weights", checks.as_real("weights", weights, dtype), losses.shape)
    if normalizer is None:
        normalizer = weights
    normalizer = checks.broadcast("normalizer", checks.as_real("normalizer", normalizer, dtype), losses.shape)
    return _weighted_mean(losses.astype(dtype), weights.astype(dtype), normalizer.astype(dtype))


@functools.partial(jax.jit, inline=True)
def _softcap(logits, cap) -> Array:
    (z,) = num.widen(logits)
    cap = jnp.asarray(cap, z.dtype)
    excluded = z == -jnp.inf
    return jnp.where(excluded, -jnp.inf, cap * tanh(jnp.where(excluded, 0.0, z) / cap)).astype(logits.dtype)


@functools.partial(jax.jit, inline=True)
def _temper(logits, temperature) -> Array:
    (z,) = num.widen(logits)
    return (z / jnp.asarray(temperature, z.dtype)).astype(logits.dtype)


@functools.partial(jax.jit, inline=True)
def _weighted_mean(losses, weights, normalizer) -> Array:
    total = jnp.sum(normalizer)
    counted = jnp.where((weights == 0) & ~jnp.isfinite(losses), 0.0, losses)
    return jnp.where(total == 0, 0.0, jnp.sum(weights * counted) / jnp.where(total == 0, 1.0, total))
