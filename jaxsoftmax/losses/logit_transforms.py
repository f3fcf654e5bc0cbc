"""What stands before a head: transforms of the logits.

softcap: x = c tanh(z/c), ∂x/∂z = sech²(z/c), so that |x| < c;    temperature: x = z/T.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, dtypes
from jaxsoftmax._core.scalar_functions import tanh


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


@functools.partial(jax.jit, inline=True)
def _softcap(logits, cap) -> Array:
    (z,) = dtypes.widen(logits)
    cap = jnp.asarray(cap, z.dtype)
    excluded = z == -jnp.inf
    return jnp.where(excluded, -jnp.inf, cap * tanh(jnp.where(excluded, 0.0, z) / cap)).astype(logits.dtype)


@functools.partial(jax.jit, inline=True)
def _temper(logits, temperature) -> Array:
    (z,) = dtypes.widen(logits)
    return (z / jnp.asarray(temperature, z.dtype)).astype(logits.dtype)
