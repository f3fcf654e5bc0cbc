"""Regression heads: squared error and its relatives, element by element or summed over the last axis.

l = (z - y)ᵀ(z - y),    dl = 2 (z - y) : dz,    ∂l/∂z = 2 (z - y)ᵀ,    ∂²l/∂z² = 2 I.

Reference: docs/mathematics.md, section 7.4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes, dtypes
from jaxsoftmax._core import scalar_functions as elementary
from jaxsoftmax.autodiff import custom_vjp
from jaxsoftmax.losses.hessian import Curvature, operators_of
from jaxsoftmax.losses.likelihood import Likelihood
from jaxsoftmax.maps.softmax import AxisLike, AxisName
from jaxsoftmax.operators.diagonal_low_rank import DiagonalPlusLowRank


def squared_error(predictions: ArrayLike, targets: ArrayLike | None = None) -> Array:
    """Squared error of each element: (predictions - targets)².

    Args:
      predictions: floating-point array of any shape.
      targets: array of the same shape; zeros if it is not given.

    Returns:
      Squared errors, of the shape of `predictions`; float32 for half precision.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.squared_error(jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])))
      [1. 4.]

    Reference: `optax.squared_error`; docs/mathematics.md, section 4.
    """
    return _square(_errors(predictions, targets))


def l2_loss(predictions: ArrayLike, targets: ArrayLike | None = None) -> Array:
    """Half the squared error of each element: (predictions - targets)² / 2, with gradient predictions - targets.

    Args:
      predictions: floating-point array of any shape.
      targets: array of the same shape; zeros if it is not given.

    Returns:
      Losses, of the shape of `predictions`; float32 for half precision.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.l2_loss(jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])))
      [0.5 2. ]

    Reference: `optax.l2_loss`.
    """
    return 0.5 * squared_error(predictions, targets)


def sum_squared_error(
    predictions: ArrayLike, targets: ArrayLike, axis: AxisLike = -1, *, axis_name: AxisName = None
) -> Array:
    """Squared distance of each example: (z - ŷ)ᵀ(z - ŷ) = Σ_k (z_k - ŷ_k)², with gradient 2 (z - ŷ).

    Args:
      predictions: floating-point array z.
      targets: array ŷ of the same shape.
      axis: the axis or axes summed over; None for all.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Losses, of the shape of `predictions` without `axis`; float32 for half precision.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> print(jax.grad(jaxsoftmax.sum_squared_error)(jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])))
      [ 2. -4.]

    Reference: docs/mathematics.md, section 7.
    """
    errors = _errors(predictions, targets)
    axes = classes.axis_of(axis, errors, axis_name, "predictions")
    return jnp.squeeze(classes.sum(_square(errors), axes), axes.positions)


def huber_loss(predictions: ArrayLike, targets: ArrayLike | None = None, *, delta: ArrayLike = 1.0) -> Array:
    """Huber loss of each element, with e = predictions - targets: e²/2 where |e| ≤ δ, else δ (|e| - δ/2).

    Its gradient is that of `l2_loss` clipped to [-δ, δ].

    Args:
      predictions: floating-point array of any shape.
      targets: array of a shape that broadcasts to that of `predictions`; zeros if it is not given.
      delta: where the parabola ends, δ ≥ 0; a shape that broadcasts to that of `predictions`.

    Returns:
      Losses, of the shape of `predictions`; float32 for half precision.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.huber_loss(jnp.array([0.5, 3.0]), jnp.array([0.0, 0.0])))
      [0.125 2.5  ]

    Reference: Huber 1964; `optax.huber_loss`.
    """
    return _huber(*_huber_arguments(predictions, targets, delta))


def log_cosh(predictions: ArrayLike, targets: ArrayLike | None = None) -> Array:
    """log cosh(predictions - targets) of each element: near e²/2 for small errors, |e| - log 2 for large ones.

    Args:
      predictions: floating-point array of any shape.
      targets: array of a shape that broadcasts to that of `predictions`; zeros if it is not given.

    Returns:
      Losses, of the shape of `predictions`; float32 for half precision. Small errors keep their digits.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.log_cosh(jnp.array([1e-5, 2.0, 500.0])))
      [5.00000e-11 1.32500e+00 4.993068e+02]

    Reference: `optax.log_cosh`, which gives 0 for the first of these.
    """
    return elementary.log_cosh(_errors(predictions, targets, broadcast=True))


def _huber_arguments(predictions, targets, delta) -> tuple[Array, Array]:
    errors = _errors(predictions, targets, broadcast=True)
    return errors, checks.option("delta", delta, errors.shape, errors.dtype, low=0.0).astype(errors.dtype)


def _errors(predictions: ArrayLike, targets: ArrayLike | None, broadcast: bool = False) -> Array:
    """predictions - targets in the computation dtype."""
    predictions = checks.as_loss_float("predictions", predictions)
    if targets is None:
        return dtypes.widen(predictions)[0]
    targets = checks.as_real("targets", targets, dtypes.compute_dtype(predictions.dtype))
    if broadcast:
        targets = checks.broadcast("targets", targets, predictions.shape)
    checks.same_shape("targets", targets, "predictions", predictions.shape)
    predictions, targets = dtypes.widen(predictions, targets)
    return predictions - targets


@custom_vjp
def _square(errors: Array) -> Array:
    return errors * errors


def _square_bwd(residuals, ct):
    (errors,) = residuals
    return (2 * errors * ct,)


_square.defvjp(None, _square_bwd)


@custom_vjp
def _huber(errors: Array, delta: Array) -> Array:
    within = jnp.minimum(jnp.abs(errors), delta)
    return within * within / 2 + delta * (jnp.abs(errors) - within)


def _huber_bwd(residuals, ct):
    errors, delta = residuals
    inside = jnp.abs(errors) <= delta
    slope = jnp.where(inside, errors, jnp.sign(errors) * delta)
    return ct * slope, ct * jnp.where(inside, 0.0, jnp.abs(errors) - delta)


_huber.defvjp(None, _huber_bwd)


# Hessians, diagonal along the last axis. A squared error is the likelihood of a normal distribution of this variance.
VARIANCE: dict[Callable, float] = {squared_error: 0.5, l2_loss: 1.0, sum_squared_error: 0.5}


def _squared_arguments(predictions, targets, axis=-1, axis_name=None) -> tuple:
    errors = _errors(predictions, targets)
    mean = checks.as_loss_float("predictions", predictions).astype(errors.dtype)
    return errors, mean, classes.axis_of(axis, errors, axis_name, "predictions")


def _enter_normal(loss: Callable, variance: float) -> None:
    def draw(key: Array, mean: Array, shape: tuple[int, ...]) -> Array:
        mean = jnp.broadcast_to(mean, shape + mean.shape)
        return mean + math.sqrt(variance) * jax.random.normal(key, mean.shape, mean.dtype)

    def score(mean: Array, targets: Array) -> Array:
        return (mean - targets) / variance

    @operators_of(loss, _squared_arguments, "axis")
    def operators(errors, mean, axis) -> Curvature:
        hessian = DiagonalPlusLowRank(jnp.full_like(errors, 1 / variance), axis=axis)
        model = Likelihood(mean, jnp.ones_like(mean), draw, score)
        return Curvature(hessian, hessian, dataclasses.replace(hessian, likelihood=model))


for _loss, _variance in VARIANCE.items():
    _enter_normal(_loss, _variance)


@operators_of(huber_loss, _huber_arguments)
def _huber_operators(errors, delta) -> Curvature:
    return _convex(jnp.where(jnp.abs(errors) <= delta, 1.0, 0.0 * delta))


@operators_of(log_cosh, lambda predictions, targets: (_errors(predictions, targets, broadcast=True),))
def _log_cosh_operators(errors) -> Curvature:
    return _convex(4 * elementary.sigmoid(2 * errors) * elementary.sigmoid(-2 * errors))


def _convex(diagonal: Array) -> Curvature:
    hessian = DiagonalPlusLowRank(diagonal)
    return Curvature(hessian, hessian)
