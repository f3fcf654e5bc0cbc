"""The soft cap that may stand before a head: x = c tanh(z/c), ∂x/∂z = sech²(z/c), so that |x| < c."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, dtypes
from jaxsoftmax._core.scalar_functions import sech_squared, tanh


def softcap_logits(logits: ArrayLike, cap: ArrayLike) -> Array:
    """Logits kept within (-cap, cap): cap · tanh(logits / cap).

    Args:
      logits: floating-point logits of any shape. An excluded class (-inf) stays excluded.
      cap: c > 0.

    Returns:
      Capped logits, of the shape and dtype of `logits`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.softcap_logits(jnp.array([1.0, 100.0, -jnp.inf]), 30.0).round(4))
      [ 0.9996 29.9237    -inf]

    Reference: Bello et al. 2017, https://arxiv.org/abs/1611.09940; docs/mathematics.md, section 4.
    """
    logits = checks.as_loss_float("logits", logits)
    return _softcap(logits, checks.positive("cap", cap))


@functools.partial(jax.jit, inline=True)
def _softcap(logits: Array, cap: Array) -> Array:
    return capped(*dtypes.widen(logits), cap).astype(logits.dtype)


def capped(z: Array, cap: ArrayLike) -> Array:
    """c tanh(z/c) for z of at least float32; an excluded class (-inf) stays excluded, or a cap would let it back in."""
    cap, excluded = jnp.asarray(cap, z.dtype), z == -jnp.inf
    return jnp.where(excluded, -jnp.inf, cap * tanh(jnp.where(excluded, 0.0, z) / cap))


def cap_derivatives(z: Array, cap: ArrayLike) -> tuple[Array, Array]:
    """∂x/∂z and ∂²x/∂z² of x = `capped`; 0 at an excluded class."""
    cap, excluded = jnp.asarray(cap, z.dtype), z == -jnp.inf
    y = jnp.where(excluded, 0.0, z) / cap
    slope = jnp.where(excluded, 0.0, sech_squared(y))
    return slope, -2 * tanh(y) * slope / cap
