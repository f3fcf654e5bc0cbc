"""A temperature that divides the logits: one number, or one per example. Where it is off, it is None."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes
from jaxsoftmax.losses.head import option_of_examples
from jaxsoftmax.losses.hessian import Curvature


def as_temperature(temperature: ArrayLike, logits: Array, axes: classes.ClassAxis) -> ArrayLike | None:
    """The argument, checked; None for 1."""
    if np.ndim(temperature):
        return option_of_examples("temperature", temperature, logits, axes, 0.0, above_low=True)
    return None if checks.is_known_as(1, temperature) else checks.positive("temperature", temperature)


def tempered(
    temperature: ArrayLike | None, axis: classes.ClassAxis, *logits: Array
) -> tuple[list[Array], classes.ClassAxis]:
    """The logits over T, and the axis along which they are counted from their maximum, before that is rounded."""
    if temperature is None:
        return list(logits), axis
    divisor = jnp.asarray(temperature, logits[0].dtype)
    divisor = jnp.expand_dims(divisor, axis.positions) if divisor.ndim else divisor
    divided = [_divided(z, divisor, axis) for z in logits]
    return divided, dataclasses.replace(axis, from_top=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _divided(z: Array, divisor: Array, axis: classes.ClassAxis) -> Array:
    """(z - max z) / T, whose derivative in T is 0 where a class is excluded."""
    return classes.below(z, classes.top(z, axis)) / divisor


@functools.partial(_divided.defjvp, symbolic_zeros=True)
def _divided_jvp(axis, primals, tangents):
    (z, divisor), (dz, dt) = primals, tangents
    out = _divided(z, divisor, axis)
    tangent = jnp.zeros_like(z) if isinstance(dz, SymbolicZero) else dz / divisor
    if not isinstance(dt, SymbolicZero):
        tangent = tangent - jnp.where(out == -jnp.inf, 0.0, out) * (dt / divisor)
    return out, tangent


def in_logits(found: Curvature, temperature: ArrayLike | None) -> Curvature:
    """The operators in z, from those in z / T."""
    if temperature is None:
        return found
    scale = 1 / jnp.asarray(temperature, found.hessian.dtype)
    return found.scaled(scale * scale)
