"""A temperature that divides the logits: one number, or one per example. Where it is off, it is None."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes
from jaxsoftmax.losses.head import option_of_examples
from jaxsoftmax.losses.hessian import Curvature


def as_temperature(temperature: ArrayLike, logits: Array, axes: classes.ClassAxis) -> ArrayLike | None:
    """The argument, checked; None for 1."""
    if np.ndim(temperature):
        return option_of_examples("temperature", temperature, logits, axes, 0.0, above_low=True)
    return None if checks.is_known_as(1, temperature) else checks.positive("temperature", temperature)


def tempered(z: Array, temperature: ArrayLike | None, axis: classes.Axis) -> Array:
    """z / T, counted from the maximum of z before that is rounded."""
    if temperature is None:
        return z
    divisor, top = jnp.asarray(temperature, z.dtype), classes.top(z, axis)
    divisor = jnp.expand_dims(divisor, classes.positions(axis)) if divisor.ndim else divisor
    return (z - jnp.where(jnp.isfinite(top), top, 0.0)) / divisor


def in_logits(found: Curvature, temperature: ArrayLike | None) -> Curvature:
    """The operators in z, from those in z / T."""
    if temperature is None:
        return found
    scale = 1 / jnp.asarray(temperature, found.hessian.dtype)
    return found.scaled(scale * scale)
