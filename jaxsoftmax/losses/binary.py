"""Logistic heads: two classes, or several that do not exclude each other, one logit each.

    L(x, y) = ω y softplus(-x) + (1 - y) softplus(x),
    ∂L/∂x = (1 - y) σ(x) - ω y σ(-x),    ∂²L/∂x² = (ω y + 1 - y) σ(x) σ(-x).

Written with σ(-x), never with 1 - σ(x), so that a model that is right and sure of it keeps its digits.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, dtypes
from jaxsoftmax._core.mesh import aligned
from jaxsoftmax._core.scalar_functions import finite, infinite_at, sigmoid, softplus, weigh
from jaxsoftmax.autodiff import custom_vjp
from jaxsoftmax.losses.hessian import Curvature, operators_of
from jaxsoftmax.losses.likelihood import Likelihood
from jaxsoftmax.operators.diagonal_low_rank import DiagonalPlusLowRank


def sigmoid_binary_cross_entropy(logits: ArrayLike, labels: ArrayLike, *, pos_weight: ArrayLike | None = None) -> Array:
    """Logistic loss of each element: -ω y log σ(x) - (1 - y) log σ(-x).

    Args:
      logits: floating-point logits x of any shape.
      labels: 0 or 1, or the probability y of the positive class; a shape that broadcasts to that of `logits`.
      pos_weight: weight ω ≥ 0 of the positive class, as in torch; a shape that broadcasts to that of `logits`.

    Returns:
      Losses, of the shape of `logits`; float32 for half-precision logits, else of the common dtype of logits and
      labels. An infinite logit on the label's side has loss 0.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> logits, labels = jnp.array([20.0, 0.0, jnp.inf]), jnp.array([1, 0, 1])
      >>> print(jaxsoftmax.sigmoid_binary_cross_entropy(logits, labels))
      [2.0611537e-09 6.9314718e-01 0.0000000e+00]

    Reference: docs/mathematics.md, section 4; `optax.sigmoid_binary_cross_entropy`, `torch.nn.BCEWithLogitsLoss`.
    """
    return _logistic_loss(*_logistic_arguments(logits, labels, pos_weight))


def sigmoid_focal_loss(
    logits: ArrayLike, labels: ArrayLike, alpha: ArrayLike | None = None, gamma: ArrayLike = 2.0
) -> Array:
    """Focal loss of each element: α_t u^γ L, with u = 1 - p_t = (1 - y) σ(x) + y σ(-x) and L the logistic loss.

    Args:
      logits: floating-point logits x of any shape.
      labels: 0 or 1, or the probability y of the positive class; a shape that broadcasts to that of `logits`.
      alpha: weight of the positive class, α_t = α y + (1 - α)(1 - y); no weights if it is not given.
      gamma: exponent γ ≥ 0; 0 gives the logistic loss.

    Returns:
      Losses, of the shape of `logits`; float32 for half-precision logits, else of the common dtype of logits and
      labels.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.sigmoid_focal_loss(jnp.array([2.0, -2.0]), jnp.array([1, 1])).round(4))
      [0.0018 1.6501]

    Reference: Lin et al. 2017, https://arxiv.org/abs/1708.02002; `optax.sigmoid_focal_loss`.
    """
    return _focal_loss(*_focal_arguments(logits, labels, alpha, gamma))


def _logits_and_labels(logits: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    logits = checks.as_loss_float("logits", logits)
    labels = checks.as_real("labels", labels, dtypes.compute_dtype(logits.dtype))
    return logits, checks.broadcast("labels", labels, logits.shape)


def _logistic_arguments(logits, labels, pos_weight) -> tuple:
    logits, labels = _logits_and_labels(logits, labels)
    weight = 1.0 if pos_weight is None else pos_weight
    weight = checks.option("pos_weight", weight, logits.shape, dtypes.compute_dtype(logits.dtype), low=0.0)
    return aligned(logits, labels, weight)


def _focal_arguments(logits, labels, alpha, gamma) -> tuple:
    logits, labels = _logits_and_labels(logits, labels)
    shape, dtype = logits.shape, dtypes.compute_dtype(logits.dtype)
    gamma = checks.option("gamma", gamma, shape, dtype, low=0.0)
    alpha = None if alpha is None else checks.option("alpha", alpha, shape, dtype, 0.0, 1.0)
    return aligned(logits, labels, alpha, gamma)


@functools.partial(jax.jit, inline=True)
def _logistic_loss(logits, labels, weight) -> Array:
    x, y = dtypes.widen(logits, labels)
    return logistic(x, y, weight.astype(x.dtype))


@functools.partial(jax.jit, inline=True)
def _focal_loss(logits, labels, alpha, gamma) -> Array:
    x, y = dtypes.widen(logits, labels)
    whole, gamma = finite(x), gamma.astype(x.dtype)
    near = jnp.clip(whole, -1e4, 1e4)  # beyond, the loss is linear, and a product of the power's slope, 0, overflows
    weight = focal_weight(near, y, gamma)
    linear = lax.stop_gradient(weight) * (jnp.maximum(whole, 0.0) - y * whole)  # the weight's slope is 0 there
    loss = jnp.where(jnp.abs(whole) >= 1e4, linear, weight * logistic(near, y, jnp.ones_like(x)))
    loss = infinite_at((x == jnp.inf) & (y < 1) | (x == -jnp.inf) & (y > 0), loss)
    return loss if alpha is None else weigh(_balance(alpha.astype(x.dtype), y), loss)


def _balance(alpha: Array, y: Array) -> Array:
    """α_t = α y + (1 - α)(1 - y)."""
    return alpha * y + (1 - alpha) * (1 - y)


# Rules. 1 - p_t is a sum of two parts, u = (1 - y) σ(x) + y σ(-x), with the shares s = (1 - y) σ(x)/u and r = y σ(-x)/u
# = 1 - s. With σ′(x) = σ(x) σ(-x),
#
#     ∂u/∂x = (1 - 2y) σ(x) σ(-x),    ∂ log u/∂x = s σ(-x) - r σ(x),    ∂s/∂x = s r,
#     ∂u/∂y = σ(-x) - σ(x),           ∂s/∂y = -σ(x) σ(-x)/u²,
#
# and the same of r with the other sign: products, in which nothing of size 1 is subtracted.


@custom_vjp
def logistic(x: Array, y: Array, weight: Array) -> Array:
    """ω y softplus(-x) + (1 - y) softplus(x), the two logarithms written as one that both share."""
    positive, negative = weight * y, 1 - y
    shared = (positive + negative) * jnp.log1p(jnp.exp(-jnp.abs(x)))
    return shared + weigh(positive, jnp.maximum(-x, 0)) + weigh(negative, jnp.maximum(x, 0))


def _logistic_bwd(residuals, ct):
    x, y, weight = residuals
    dx = (1 - y) * sigmoid(x) - weight * y * sigmoid(-x)
    dy = (weight - 1) * softplus(-x) - x  # ω softplus(-x) - softplus(x)
    return ct * dx, ct * dy, ct * weigh(y, softplus(-x))


logistic.defvjp(None, _logistic_bwd)


@custom_vjp
def focal_weight(x: Array, y: Array, gamma: Array) -> Array:
    """(1 - p_t)^γ. Not exp(γ log(1 - p_t)): its exponent is as large as its relative error."""
    return _miss(x, y) ** gamma


def _focal_weight_bwd(residuals, ct):
    x, y, gamma = residuals
    weight = ct * focal_weight(x, y, gamma)
    log, pull = jax.vjp(log_miss, x, y)
    return *pull(weight * gamma), weight * log


focal_weight.defvjp(None, _focal_weight_bwd)


@custom_vjp
def log_miss(x: Array, y: Array) -> Array:
    """log u, u = 1 - p_t = (1 - y) σ(x) + y σ(-x)."""
    return jnp.log(_miss(x, y))


def _log_miss_bwd(residuals, ct):
    x, y = residuals
    dx = _share(x, y) * sigmoid(-x) - _rest(x, y) * sigmoid(x)
    return ct * dx, ct * (sigmoid(-x) - sigmoid(x)) / _miss(x, y)


log_miss.defvjp(None, _log_miss_bwd)


@custom_vjp
def _share(x: Array, y: Array) -> Array:
    """(1 - y) σ(x) / u."""
    return (1 - y) * sigmoid(x) / _miss(x, y)


@custom_vjp
def _rest(x: Array, y: Array) -> Array:
    """y σ(-x) / u = 1 - share."""
    return y * sigmoid(-x) / _miss(x, y)


def _share_bwd(residuals, ct):
    x, y = residuals
    return ct * _share(x, y) * _rest(x, y), -ct * sigmoid(x) * sigmoid(-x) / _miss(x, y) ** 2


_share.defvjp(None, _share_bwd)

_rest.defvjp(None, lambda residuals, ct: _share_bwd(residuals, -ct))


@custom_vjp
def _miss(x: Array, y: Array) -> Array:
    """(1 - y) σ(x) + y σ(-x) with one division; no smaller than the smallest number: its logarithm is finite."""
    e = jnp.exp(-jnp.abs(x))
    near, far = jnp.where(x < 0, y, 1 - y), jnp.where(x < 0, 1 - y, y)
    return jnp.maximum((near + far * e) / (1 + e), jnp.finfo(x.dtype).tiny)


def _miss_bwd(residuals, ct):
    x, y = residuals
    return ct * (1 - 2 * y) * sigmoid(x) * sigmoid(-x), ct * (sigmoid(-x) - sigmoid(x))


_miss.defvjp(None, _miss_bwd)


# Hessians, diagonal along the last axis.


@operators_of(sigmoid_binary_cross_entropy, _logistic_arguments)
def _logistic_operators(logits, labels, weight) -> Curvature:
    x, y = dtypes.widen(logits, labels)
    weight = weight.astype(x.dtype) * y + 1 - y
    hessian = DiagonalPlusLowRank(weight * sigmoid(x) * sigmoid(-x))
    model = Likelihood(x, weight, _draw_binary, _binary_score)
    return Curvature(hessian, hessian, dataclasses.replace(hessian, likelihood=model))


def _draw_binary(key: Array, x: Array, shape: tuple[int, ...]) -> Array:
    p = jnp.broadcast_to(sigmoid(x), shape + x.shape)
    return jax.random.bernoulli(key, p).astype(x.dtype)


def _binary_score(x: Array, y: Array) -> Array:
    return (1 - y) * sigmoid(x) - y * sigmoid(-x)


@operators_of(sigmoid_focal_loss, _focal_arguments)
def _focal_operators(logits, labels, alpha, gamma) -> Curvature:
    # F = α_t W L with W = exp(γℓ), ℓ = log u, ℓ′ = s σ(-x) - r σ(x) = s - σ(x), ℓ″ = s r - σ(x) σ(-x).
    x, y = dtypes.widen(logits, labels)
    x, gamma = finite(x), gamma.astype(x.dtype)
    miss, loss, slope = log_miss(x, y), logistic(x, y, jnp.ones_like(x)), _binary_score(x, y)
    share, rest, spread = _share(x, y), _rest(x, y), sigmoid(x) * sigmoid(-x)
    dmiss = share * sigmoid(-x) - rest * sigmoid(x)
    weight = jnp.exp(gamma * miss) * (1 if alpha is None else _balance(alpha.astype(x.dtype), y))
    second = (gamma * dmiss) ** 2 + gamma * (share * rest - spread)
    hessian = weight * (second * loss + 2 * gamma * dmiss * slope + spread)
    # The Gauss-Newton part is f′(L) σ(x) σ(-x), f′ = W (1 + γ p_t L / u).
    outer = weight * (1 + gamma * -jnp.expm1(miss) * (loss * jnp.exp(-miss)))
    return Curvature(DiagonalPlusLowRank(hessian), DiagonalPlusLowRank(outer * spread))
