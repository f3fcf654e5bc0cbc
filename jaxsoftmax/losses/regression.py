"""Regression heads: squared error and its relatives, element by element or summed over the last axis.

    l = (z - y)ᵀ(z - y),    dl = 2 (z - y) : dz,    ∂l/∂z = 2 (z - y)ᵀ,    ∂²l/∂z² = 2 I    (seed text 002).
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax import _checks as checks
from jaxsoftmax import _numerics as num
from jaxsoftmax.autodiff import custom_vjp


def squared_error(predictions: ArrayLike, targets: ArrayLike | None = None) -> Array:
    """Squared error of each element: (predictions - targets)².

    Args:
      predictions: floating-point array of any shape.
      targets: array of the same shape; zeros if it is not given.

    Returns:
      Squared errors, of the shape of `predictions`; float32 for half precision.

    Raises:
      TypeError: if `predictions` is not floating point or `targets` complex.
      ValueError: if the shapes differ.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.squared_error(jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])))
      [1. 4.]

    Reference: `optax.squared_error`; MATHEMATICS.md section 4.
    """
    return _square(_errors(predictions, targets))


def l2_loss(predictions: ArrayLike, targets: ArrayLike | None = None) -> Array:
    """Half the squared error of each element: (predictions - targets)² / 2, with gradient predictions - targets.

    Args:
      predictions: floating-point array of any shape.
      targets: array of the same shape; zeros if it is not given.

    Returns:
      Losses, of the shape of `predictions`; float32 for half precision.

    Raises:
      TypeError: if `predictions` is not floating point or `targets` complex.
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.l2_loss(jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])))
      [0.5 2. ]

    Reference: `optax.l2_loss`.
    """
    return 0.5 * squared_error(predictions, targets)


def sum_squared_error(predictions: ArrayLike, targets: ArrayLike, axis: int | tuple[int, ...] | None = -1) -> Array:
    """Squared distance of each example: (z - ŷ)ᵀ(z - ŷ) = Σ_k (z_k - ŷ_k)², with gradient 2 (z - ŷ).

    Args:
      predictions: floating-point array z.
      targets: array ŷ of the same shape.
      axis: the axis or axes summed over; None for all.

    Returns:
      Losses, of the shape of `predictions` without `axis`; float32 for half precision.

    Raises:
      TypeError: if `predictions` is not floating point or `targets` complex.
      ValueError: if the shapes differ or `axis` is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> print(jax.grad(jaxsoftmax.sum_squared_error)(jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])))
      [ 2. -4.]

    Reference: seed text 002; MATHEMATICS.md section 1.
    """
    errors = _errors(predictions, targets)
    return jnp.sum(_square(errors), checks.axes(axis, errors.ndim))


def _errors(predictions: ArrayLike, targets: ArrayLike | None) -> Array:
    """predictions - targets in the computation dtype."""
    predictions = checks.as_loss_float("predictions", predictions)
    if targets is None:
        return num.widen(predictions)[0]
    targets = checks.as_float("targets", targets)
    checks.same_shape("targets", targets, "predictions", predictions.shape)
    predictions, targets = num.widen(predictions, targets)
    return predictions - targets


@custom_vjp
def _square(errors: Array) -> Array:
    return errors * errors


def _square_fwd(errors):
    return _square(errors), errors


def _square_bwd(errors, ct):
    return (2 * errors * ct,)


_square.defvjp(_square_fwd, _square_bwd)
