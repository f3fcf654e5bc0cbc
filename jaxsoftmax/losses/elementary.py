"""Scalar functions under the heads, with rules that keep their digits at every order.

    softplus' = σ,    σ'(x) = σ(x) σ(-x),    (log cosh)' = tanh,    tanh'(x) = 4 σ(2x) σ(-2x).

Plain autodiff writes σ' = σ (1 - σ) and tanh' = 1 - tanh², which are 0 where the model is sure.
"""

import jax.numpy as jnp
from jax import Array

from jaxsoftmax import _numerics as num
from jaxsoftmax.autodiff import custom_vjp


@custom_vjp
def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    e = jnp.exp(-jnp.abs(x))
    return jnp.where(x < 0, e, 1) / (1 + e)


sigmoid.defvjp(lambda x: (sigmoid(x), x), lambda x, ct: (ct * sigmoid(x) * sigmoid(-x),))


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
    """log cosh x: log1p(2 sinh²(x/2)) near 0, where |x| - log 2 + … would cancel."""
    size = jnp.abs(x)
    near = jnp.log1p(2 * jnp.sinh(jnp.minimum(size, 3) / 2) ** 2)
    return jnp.where(size < 3, near, size - num.LOG2 + jnp.log1p(jnp.exp(-2 * size)))


log_cosh.defvjp(lambda x: (log_cosh(x), x), lambda x, ct: (ct * tanh(x),))


@custom_vjp
def finite(x: Array) -> Array:
    """x, with large numbers for ±inf, so that products with it that tend to 0 are 0. Its derivative is that of x."""
    return jnp.where(jnp.isinf(x), jnp.sign(x) * 1e9, x)


finite.defvjp(lambda x: (finite(x), None), lambda _, ct: (ct,))


def infinite_at(where: Array, x: Array) -> Array:
    """x + inf at `where`, with the derivative of x."""
    return x + jnp.where(where, jnp.inf, 0.0).astype(x.dtype)


def weigh(weight: Array, x: Array) -> Array:
    """weight · x, and 0 where the weight is 0, x infinite or not."""
    return jnp.where(weight == 0, 0.0, weight * x)


def exp_remainder(x: Array) -> Array:
    """exp(x) - 1 - x, never negative; near 0 by its series x²/2 (1 + x/3 (1 + x/4 (1 + …)))."""
    tail = jnp.ones_like(x)
    near = jnp.clip(x, -1, 1)
    for n in range(19 if x.dtype == jnp.float64 else 11, 2, -1):
        tail = 1 + near / n * tail
    return jnp.where(jnp.abs(x) < 1, near * near / 2 * tail, jnp.exp(x) - 1 - x)


@custom_vjp
def log_double_sigmoid(x: Array) -> Array:
    """log(2 σ(x)) = log(1 + tanh(x/2)), which is 0 at 0."""
    # No log1p of a negative number: in float64 older XLA gets it wrong by 100 eps.
    near = jnp.where(x > 0, jnp.log1p(jnp.tanh(jnp.maximum(x, 0) / 2)), -jnp.log1p(jnp.expm1(jnp.clip(-x, 0, 1)) / 2))
    return jnp.where(x > -1, near, x + num.LOG2 - jnp.log1p(jnp.exp(jnp.minimum(x, 0))))


log_double_sigmoid.defvjp(lambda x: (log_double_sigmoid(x), x), lambda x, ct: (ct * sigmoid(-x),))


def missing_bits(x: Array) -> Array:
    """log 2 less the entropy of the pair σ(x), σ(-x): x/2 tanh(x/2) - log cosh(x/2), which is 0 at 0."""
    size = jnp.abs(x)
    half = jnp.minimum(size, 2) / 2
    near = half * jnp.tanh(half) - log_cosh(half)
    return jnp.where(size < 2, near, num.LOG2 - size * sigmoid(-size) - jnp.log1p(jnp.exp(-size)))
