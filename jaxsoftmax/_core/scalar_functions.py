"""Scalar functions under the heads, with rules that keep their digits at every order.

    softplus' = σ,    σ'(x) = sech²(x/2) / 4,    (log cosh)' = tanh,    tanh' = sech²,    sech²(x) = 4 σ(2x) σ(-2x).

Plain autodiff writes σ' = σ (1 - σ) and tanh' = 1 - tanh², which are 0 where the model is sure; the slope of
σ(x) σ(-x) cancels at 0, that of sech², -2 tanh sech², does not.
"""

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from jaxsoftmax.autodiff import custom_vjp

LOG2 = math.log(2.0)


def horner(coefficients: Sequence[float], x: Array) -> Array:
    """Σ_k coefficients[k] x^k."""
    return functools.reduce(lambda tail, c: c + x * tail, reversed(coefficients), jnp.zeros_like(x))


# Coefficients of tanh x = Σ t_k x^(2k+1), from tanh' = 1 - tanh².
_TANH = [1.0]
for _k in range(1, 20):
    _TANH.append(-sum(_TANH[i] * _TANH[_k - 1 - i] for i in range(_k)) / (2 * _k + 1))


@custom_vjp
def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    e = jnp.exp(-jnp.abs(x))
    return jnp.where(x < 0, e, 1) / (1 + e)


sigmoid.defvjp(lambda x: (sigmoid(x), x), lambda x, ct: (ct * (sech_squared(x / 2) / 4),))


@custom_vjp
def softplus(x: Array) -> Array:
    """log(1 + exp(x)) = -log σ(-x)."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


softplus.defvjp(lambda x: (softplus(x), x), lambda x, ct: (ct * sigmoid(x),))


@custom_vjp
def tanh(x: Array) -> Array:
    return jnp.tanh(x)


tanh.defvjp(lambda x: (tanh(x), x), lambda x, ct: (ct * sech_squared(x),))


@custom_vjp
def sech_squared(x: Array) -> Array:
    """1 - tanh²."""
    return 4 * sigmoid(2 * x) * sigmoid(-2 * x)


sech_squared.defvjp(lambda x: (sech_squared(x), x), lambda x, ct: (-2 * ct * tanh(x) * sech_squared(x),))


@custom_vjp
def log_cosh(x: Array) -> Array:
    """log cosh x: its series x²/2 - x⁴/12 + … near 0, where |x| - log 2 + … would cancel."""
    size, near = jnp.abs(x), jnp.minimum(jnp.abs(x), 0.6)
    series = horner([t / (2 * k + 2) for k, t in enumerate(_TANH[: 20 if x.dtype == jnp.float64 else 7])], near * near)
    far = size - LOG2 + jnp.log1p(jnp.exp(-2 * size))
    return jnp.where(size < 0.6, near * near * series, far)


log_cosh.defvjp(lambda x: (log_cosh(x), x), lambda x, ct: (ct * tanh(x),))


@custom_vjp
def finite(x: Array) -> Array:
    """x, with large numbers for ±inf, so that products with it that tend to 0 are 0. Its derivative is that of x."""
    # 1e9: exp of it is inf and of its negative 0 in every dtype, while its square is still finite in float32.
    return jnp.where(jnp.isinf(x), jnp.sign(x) * 1e9, x)


finite.defvjp(lambda x: (finite(x), None), lambda _, ct: (ct,))


def infinite_at(where: Array, x: Array) -> Array:
    """x + inf at `where`, with the derivative of x."""
    return x + jnp.where(where, jnp.inf, 0.0).astype(x.dtype)


def weigh(weight: Array, x: Array) -> Array:
    """weight · x, and 0 where the weight is 0, x infinite or not."""
    return jnp.where(weight == 0, 0.0, weight * x)


def exp_remainder(x: Array) -> Array:
    """exp(x) - 1 - x, never negative; near 0 by its series x² (1/2! + x/3! + x²/4! + …)."""
    near = jnp.clip(x, -1, 1)
    series = horner([1 / math.factorial(n) for n in range(2, 20 if x.dtype == jnp.float64 else 12)], near)
    return jnp.where(jnp.abs(x) < 1, near * near * series, jnp.exp(x) - 1 - x)


@custom_vjp
def log_double_sigmoid(x: Array) -> Array:
    """log(2 σ(x)) = log(1 + tanh(x/2)), which is 0 at 0."""
    # No log1p of a negative number: in float64 older XLA gets it wrong by 100 eps.
    near = jnp.where(x > 0, jnp.log1p(jnp.tanh(jnp.maximum(x, 0) / 2)), -jnp.log1p(jnp.expm1(jnp.clip(-x, 0, 1)) / 2))
    return jnp.where(x > -1, near, x + LOG2 - jnp.log1p(jnp.exp(jnp.minimum(x, 0))))


log_double_sigmoid.defvjp(lambda x: (log_double_sigmoid(x), x), lambda x, ct: (ct * sigmoid(-x),))


def missing_bits(x: Array) -> Array:
    """log 2 less the entropy of the pair σ(x), σ(-x): x/2 tanh(x/2) - log cosh(x/2), which is 0 at 0."""
    size = jnp.abs(x)
    half = jnp.minimum(size, 2) / 2
    near = half * jnp.tanh(half) - log_cosh(half)
    return jnp.where(size < 2, near, LOG2 - size * sigmoid(-size) - jnp.log1p(jnp.exp(-size)))
