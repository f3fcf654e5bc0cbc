"""What label smoothing and class weights make of the labels y of an example: w ((1 - ε) y + ε / K)."""

import math

import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import checks, classes, dtypes
from jaxsoftmax._core.mesh import sharded_like
from jaxsoftmax.losses.head import option_of_examples


def checked_options(label_smoothing, class_weights, logits, axes) -> tuple:
    """Class weights and smoothing, None where they are off."""
    if class_weights is not None:
        class_weights = checks.class_weights(class_weights, math.prod(logits.shape[i] for i in axes.positions))
    if checks.is_known_as(0, label_smoothing):
        return class_weights, None
    return class_weights, option_of_examples("label_smoothing", label_smoothing, logits, axes, 0.0, 1.0)


def weighed(z: Array, y: Array, class_weights: Array | None, smooth: Array | None, axis: classes.ClassAxis) -> Array:
    """The labels that smoothing and class weights make of y."""
    y, weights = y if smooth is None else _smoothed(z, y, smooth, axis), weights_beside(z, class_weights, axis)
    return y if weights is None else weights * y


def weights_beside(z: Array, class_weights: Array | None, axis: classes.ClassAxis) -> Array | None:
    """The class weights beside z."""
    if class_weights is None:
        return None
    (position,), weights = axis.positions, class_weights.astype(dtypes.compute_dtype(z.dtype))
    weights = jnp.expand_dims(weights, [i for i in range(z.ndim) if i != position % z.ndim])
    return sharded_like(z, jnp.broadcast_to(weights, z.shape))


def _smoothed(z: Array, y: Array, smooth: Array, axis: classes.ClassAxis) -> Array:
    """(1 - smooth) y + smooth / (number of classes there are)."""
    exists = lax.stop_gradient(z) > -jnp.inf
    count = jnp.maximum(classes.sum(exists.astype(y.dtype), axis), 1)
    smooth = sharded_like(count, jnp.expand_dims(smooth.astype(y.dtype), axis.positions))
    return (1 - smooth) * y + jnp.where(exists, smooth / count, 0.0)
