"""What the heads over classes share before their formulas: arguments that every one of them takes, checked."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes, dtypes
from jaxsoftmax.maps.softmax import AxisLike, AxisName


def checked_logits(
    logits: ArrayLike, axis: AxisLike, axis_name: AxisName, where: ArrayLike | None
) -> tuple[Array, Array | None, classes.ClassAxis]:
    """Logits, the mask of classes that stands for `where`, and the class axis."""
    logits = checks.as_loss_float("logits", logits)
    axes = classes.axis_of(axis, logits, axis_name)
    return logits, checks.as_loss_mask("where", where, logits.shape, axes.positions), axes


def checked_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: AxisLike,
    where: ArrayLike | None,
    ignore_index: int | None,
    axis_name: AxisName,
) -> tuple[Array, Array, Array | None, classes.ClassAxis]:
    """Logits, class indices, the mask, with the examples to ignore, and the class axis."""
    logits, mask, axes = checked_logits(logits, axis, axis_name, where)
    labels = checks.class_indices(labels, logits, axes.positions)
    labels, mask = without_ignored(labels, mask, ignore_index, logits, axes)
    return logits, labels, mask, axes


def without_ignored(
    labels: Array, mask: Array | None, ignore_index: int | None, logits: Array, axes: classes.ClassAxis
) -> tuple[Array, Array | None]:
    """Class indices and mask, the examples whose label is `ignore_index` masked, with a label that is a class."""
    if ignore_index is None:
        return labels, mask
    ignored = classes.labels_equal(labels, checks.integer("ignore_index", ignore_index))
    kept = jnp.expand_dims(~ignored, axes.positions)
    return jnp.where(ignored, 0, labels), kept if mask is None else mask & kept


def option_of_examples(
    name: str,
    value: ArrayLike,
    logits: Array,
    axes: classes.ClassAxis,
    low: float = -jnp.inf,
    high: float = jnp.inf,
    **bounds: bool,
) -> Array:
    """Real numbers in their range as in `checks.within`, one or one per example, broadcast to the examples."""
    found = checks.option(name, value, None, dtypes.compute_dtype(logits.dtype), low, high, **bounds)
    return checks.to_examples(name, found, logits.shape, axes.positions)
