"""The length of the natural gradient of cross-entropy, which the loss alone determines."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core import classes, dtypes
from jaxsoftmax.losses.cross_entropy import integer_arguments, integer_loss
from jaxsoftmax.maps.softmax import AxisName


def natural_gradient_norm(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
    axis_name: AxisName = None,
) -> Array:
    """Squared length of the cross-entropy gradient g = p - e_label in the Fisher metric: gᵀ J⁺ g = expm1(L).

    Args:
      logits: floating-point logits; `axis` counts the classes.
      labels: integers, of the shape of `logits` without `axis`.
      axis: class axis, or a tuple of axes flattened into one, in the given order.
      where, ignore_index, axis_name: as in `softmax_cross_entropy_with_integer_labels`.

    Returns:
      One number per example, of the shape of `labels`; float32 for half-precision logits, else the logits' dtype.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> logits, label = jnp.array([2.0, 1.0, 0.5]), jnp.array(1)
      >>> g = jaxsoftmax.softmax(logits) - jax.nn.one_hot(label, 3)
      >>> print(jaxsoftmax.natural_gradient_norm(logits, label).round(3))
      3.325
      >>> print((g @ jnp.linalg.pinv(jaxsoftmax.softmax_jacobian(logits)) @ g).round(3))
      3.325

    Reference: Amari 1998; docs/mathematics.md, section 4.
    """
    *arguments, axes = integer_arguments(logits, labels, axis, where, 0.0, None, ignore_index, 0.0, axis_name)
    loss = integer_loss(*arguments, classes.beside_others(axes))
    # Where expm1 overflows, it goes on as its tangent there, whose finite slope times a p of 0 is 0.
    last = math.log(dtypes.largest(loss.dtype)) * (1 - 4 * float(jnp.finfo(loss.dtype).eps))
    return jnp.where(loss < last, jnp.expm1(jnp.minimum(loss, last)), math.exp(last) * (1 + loss - last))
