"""Shifts, masks and sums over the class axis: every reduction of the library's heads lives here.

docs/mathematics.md, section 5. With m = max z and e = exp(z - m), the sums leave out one class (the top one, or the
label), so that nothing small is ever added to, or subtracted from, a 1. Indicators are written as arithmetic, not as
comparisons: XLA's CPU backend fuses arithmetic into a reduction and materialises a comparison.
"""

import math

import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import dtypes


def class_sum(x: Array, axis: int) -> Array:
    """Σ over the class axis, which stays with length 1."""
    return jnp.sum(x, axis, keepdims=True)


def class_max(z: Array, axis: int) -> Array:
    """max over the class axis, which stays with length 1; -inf over no class."""
    return jnp.max(z, axis, keepdims=True, initial=-jnp.inf)


def shift(z: Array, m: Array) -> Array:
    """z - m, with infinite logits in their limits: 0 where z = m = inf, -inf where z = m = -inf."""
    limit = dtypes.largest(z.dtype)
    return jnp.minimum(z, limit) + (-jnp.clip(m, -limit, limit))


def leave_top_out(z: Array, m: Array, axis: int) -> Array:
    """Σ exp(z - m) - 1 without cancellation: the sum over every class but one that attains the maximum m.

    While the whole sum is below 2, only the top class can have e = 1, and e - floor(e) leaves out just that one.
    """
    total = class_sum(jnp.exp(shift(z, m)), axis)
    e = jnp.exp(_shift_negated(z, m))
    return jnp.where(total < 2, class_sum(e - jnp.floor(e), axis), total - 1)


def _shift_negated(z: Array, m: Array) -> Array:
    """`shift` in other words, so that XLA does not keep one array of exponentials for two sums."""
    limit = dtypes.largest(z.dtype)
    return -(jnp.maximum(-z, -limit) + jnp.clip(m, -limit, limit))


def class_index(like: Array, axis: int, dtype=jnp.int32) -> Array:
    """0, 1, … along the class axis, of the shape of `like`."""
    return lax.broadcasted_iota(dtype, like.shape, axis)


def other_classes(like: Array, index: Array, axis: int) -> Array:
    """1 at every class but `index`, 0 there."""
    dtype = like.dtype if like.shape[axis] < 2**24 else jnp.int32  # float32 holds no larger index exactly
    distance = jnp.abs(class_index(like, axis, dtype) - index.astype(dtype))
    return jnp.minimum(distance, 1).astype(like.dtype)


def take_class(x: Array, index: Array, axis: int) -> Array:
    """x at class `index` (class axis of length 1); NaN where there is no such class."""
    num_classes = x.shape[axis]
    if num_classes == 0:
        return jnp.full(index.shape, jnp.nan, x.dtype)
    found = jnp.take_along_axis(x, jnp.clip(index, 0, num_classes - 1), axis)
    return jnp.where((index >= 0) & (index < num_classes), found, jnp.nan)


def class_labels(labels: Array, num_classes: int) -> Array:
    """Labels as int32; -1 for every label outside [0, num_classes), whatever its dtype."""
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)
    valid = (labels >= 0) & (labels < num_classes)
    return jnp.where(valid, labels, 0).astype(jnp.int32) - jnp.where(valid, 0, 1).astype(jnp.int32)


def one_infinity(total: Array, m: Array, single: int) -> Array:
    """`total`, or NaN where softmax has no limit: every logit is -inf, or `total` tells of more than one +inf."""
    return jnp.where((m == -jnp.inf) | (m == jnp.inf) & (total > single), jnp.nan, total)


def present(z: Array, mask: Array | None, axes: tuple[int, ...]) -> Array:
    """z with -inf at the masked classes, and 0 throughout a slice that has no other: no NaN arises there."""
    if mask is None:
        return z
    return jnp.where(mask, z, jnp.where(jnp.any(mask, axes, keepdims=True), -jnp.inf, 0.0).astype(z.dtype))


def absent_examples(loss: Array, mask: Array | None, axis: int) -> Array:
    """`loss`, whose class axis is gone; 0 where the mask leaves no class."""
    return loss if mask is None else jnp.where(jnp.any(mask, axis), loss, 0.0)


def one_axis(axes: tuple[int, ...], *arrays: Array | None) -> tuple[list, int]:
    """The arrays with the given axes merged into one, and that axis; a single axis stays where it is."""
    if len(axes) == 1:
        return list(arrays), axes[0]
    merged = [None if x is None else merge_axes(x, axes) for x in arrays]
    return merged, next(x.ndim for x in merged if x is not None) - 1


def merge_axes(x: Array, axes: tuple[int, ...]) -> Array:
    """The given axes moved to the end and merged into one."""
    kept = [i for i in range(x.ndim) if i not in axes]
    shape = [x.shape[i] for i in kept] + [math.prod(x.shape[i] for i in axes)]
    return jnp.transpose(x, (*kept, *axes)).reshape(shape)


def split_axes(merged: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """Inverse of `merge_axes` for an array that had the given shape."""
    order = [i for i in range(len(shape)) if i not in axes] + list(axes)
    return jnp.transpose(merged.reshape([shape[i] for i in order]), [order.index(i) for i in range(len(shape))])


def zero_absent(x: Array, mask: Array | None) -> Array:
    """x with 0 where the mask is False, whatever stands there."""
    return x if mask is None else jnp.where(mask, x, 0.0)
