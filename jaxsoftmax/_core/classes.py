"""Shifts, masks, and sums over the class axis: what the maps and heads reduce their classes with.

docs/mathematics.md, section 5. With m = max z and e = exp(z - m), the sums leave out one class (the top one, or the
label), so that nothing small is ever added to, or subtracted from, a 1. How a backend wants them written stands in
`forms`.

This is also the one place that knows of classes split over a mesh. Inside `jax.shard_map` a `ClassAxis` with mesh axes
stands for blocks of the classes, one per device: sums and maxima go over all of them, and a class index counts
through them. What crosses the mesh is one number per example and reduction, the same on every device afterwards.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import checks, dtypes, forms
from jaxsoftmax._core.mesh import aligned, sharded_like, split_axes_of, varies_over

below, on_gpu, settled, shift = forms.below, forms.on_gpu, forms.settled, forms.shift


@dataclasses.dataclass(frozen=True)
class ClassAxis:
    """Where the classes are; hashable, so that a rule takes it as a static argument.

    Args:
      positions: the axis of an array, or several that count as one in the given order.
      mesh_axes: the axes of a `jax.shard_map` over which the classes are split in equal consecutive blocks.
      from_top: whether logits are counted from their maximum along it, so that `top` is 0.
      alone: whether the result comes of sums along it alone; a program of more is several kernels on a GPU anyhow.
    """

    positions: tuple[int, ...]
    mesh_axes: tuple[str, ...] = ()
    from_top: bool = False
    alone: bool = True

    def without(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`shape` without the class axis."""
        positions = {i % len(shape) for i in self.positions}
        return tuple(n for i, n in enumerate(shape) if i not in positions)


Axis = ClassAxis | int  # an integer where the classes are one whole axis


def axis_of(axis: Any, x: Array, axis_name: Any, name: str = "logits", *beside: Array) -> ClassAxis:
    """The arguments `axis` and `axis_name` of a public function, checked; x or what is beside it has the classes."""
    return ClassAxis(checks.axes(axis, x.ndim), checks.split_over(axis_name, name, x, *beside))


def positions(axis: Axis) -> tuple[int, ...]:
    """The axis or axes of an array."""
    return axis.positions if isinstance(axis, ClassAxis) else (axis,)


def _mesh_axes(axis: Axis) -> tuple[str, ...]:
    return axis.mesh_axes if isinstance(axis, ClassAxis) else ()


def is_split(axis: Axis) -> bool:
    """Whether the classes are split over mesh axes."""
    return bool(_mesh_axes(axis))


def alone(axis: Axis) -> bool:
    """`ClassAxis.alone`."""
    return isinstance(axis, int) or axis.alone


def beside_others(axis: Axis) -> ClassAxis:
    """The axis, not `alone`."""
    return dataclasses.replace(ClassAxis((axis,)) if isinstance(axis, int) else axis, alone=False)


def sum(x: Array, axis: Axis) -> Array:
    """Σ over the class axis, which stays with length 1."""
    local, names = local_sum(x, axis), _mesh_axes(axis)
    return lax.psum(local, names) if names else local


def local_sum(x: Array, axis: Axis) -> Array:
    """Σ over the classes of this device: of a cotangent that the mesh adds up, for an argument every device shares."""
    return jnp.sum(x, positions(axis), keepdims=True)


def max(z: Array, axis: Axis) -> Array:
    """max over the class axis, which stays with length 1; -inf over no class. Over a mesh not differentiable."""
    local, names = jnp.max(z, positions(axis), keepdims=True, initial=-jnp.inf), _mesh_axes(axis)
    return lax.pmax(local, names) if names else local


def top(z: Array, axis: Axis) -> Array:
    """The maximum in at least float32, of no derivative: taken in z's own dtype, so that no wider z is kept for it."""
    if isinstance(axis, ClassAxis) and axis.from_top:
        return jnp.zeros_like(sum(z, axis))
    local, names = forms.maximum(lax.stop_gradient(z), positions(axis)), _mesh_axes(axis)
    return lax.pmax(local, names) if names else local


def any(mask: Array, axis: Axis) -> Array:
    """Whether the mask holds anywhere along the class axis, which stays with length 1."""
    local, names = jnp.any(mask, positions(axis), keepdims=True), _mesh_axes(axis)
    return lax.pmax(local.astype(jnp.int32), names) > 0 if names else local


def number(like: Array, axis: Axis) -> int:
    """The length of the class axis, blocks of other devices included."""
    return math.prod(like.shape[i] for i in positions(axis)) * lax.psum(1, _mesh_axes(axis))


def shared_cotangent(ct: Array, axis: Axis) -> Array:
    """The cotangent of a result that every device shares.

    With `check_vma=False` nobody keeps track of what they share, and each device gets a part of it.
    """
    return lax.psum(ct, _mesh_axes(axis)) if _in_parts(axis) else ct


def part_of_one(axis: Axis) -> float:
    """The device's part of the cotangent 1 of a result that every device shares."""
    return 1 / lax.psum(1, _mesh_axes(axis)) if _in_parts(axis) else 1.0


def _in_parts(axis: Axis) -> bool:
    names = _mesh_axes(axis)
    return bool(names) and not varies_over(lax.axis_index(names))


def leave_top_out(z: Array, m: Array, axis: Axis) -> Array:
    """Σ exp(z - m) - 1 without cancellation: the sum over every class but one that attains the maximum m."""
    if not is_split(axis):
        return forms.leave_top_out(z, m, positions(axis)[0] % z.ndim)
    e = jnp.exp(shift(z, m))
    tops = jnp.floor(e)
    return sum(e - tops, axis) + (sum(tops, axis) - 1)


def total(e: Array, known: Array, axis: Axis) -> Array:
    """Σe; over a mesh what is `known` of it, since a sum crosses."""
    return known if is_split(axis) else forms.total(e, known, positions(axis))


def in_one_kernel(x: Array, axis: Axis) -> bool:
    """Whether a row of x is short enough for XLA's GPU compiler to make one kernel of what is done with it."""
    size = math.prod(x.shape[i] for i in positions(axis))
    return alone(axis) and not is_split(axis) and isinstance(size, int) and size <= forms.ROWS


def is_long(x: Array, axis: Axis) -> bool:
    """Whether a row of x is too long for one kernel of XLA's GPU compiler, and whole."""
    size = math.prod(x.shape[i] for i in positions(axis))
    return not is_split(axis) and isinstance(size, int) and size > forms.ROWS


def afresh(find: Callable, known: Any, axis: Axis, *arrays: Array, second: bool = False) -> tuple:
    """`known` = find(*arrays, axis) and the arrays, for a derivative beside the value.

    `second` of two terms that do so: else their derivatives share what is found.
    """
    if not in_one_kernel(arrays[0], axis):
        return known, *arrays
    return forms.afresh(functools.partial(find, axis=axis), second, known, *arrays)


def reread(axis: Axis, *arrays: Array, second: bool = False) -> list[Array]:
    """The arrays, for a pass over rows too long for one kernel of a GPU; `second` for a second one.

    Between passes XLA keeps exponentials of half-precision rows in float32: KL's gradient took 21 passes for 9.
    """
    return forms.reread(second, *arrays) if is_long(arrays[0], axis) else list(arrays)


def over_total(e: Array, total: Array, axis: Axis) -> Array:
    """e / total, one per slice; in the form of `forms.over_total` where a row is long."""
    return forms.over_total(e, total) if is_long(e, axis) else e / total


def index(like: Array, axis: Axis, dtype=jnp.int32) -> Array:
    """0, 1, … along the class axis, of the shape of `like`."""
    (position,), start = positions(axis), first(like, axis)
    here = sharded_like(like, lax.broadcasted_iota(dtype, like.shape, position % like.ndim))
    return here if isinstance(start, int) else here + start.astype(dtype)


def first(like: Array, axis: Axis) -> Array | int:
    """Index of the first class that is here among all classes."""
    (position,), names = positions(axis), _mesh_axes(axis)
    return lax.axis_index(names) * like.shape[position] if names else 0


def argmax(z: Array, m: Array, axis: Axis) -> Array:
    """Index of the first class at which z has its maximum m; the class axis has length 1."""
    (position,), names, size = positions(axis), _mesh_axes(axis), number(z, axis)
    least = lambda z, m: jnp.min(jnp.where(z == m, index(z, axis), size), position, keepdims=True)
    if names:
        return lax.pmin(least(z, m), names)
    plain = lambda z, m: jnp.argmax(z, position, keepdims=True).astype(jnp.int32)
    return forms.on_gpu(least, plain, z, m)  # an argmax ends a GPU's kernel: Brier's solve 14.8 passes for 4.0


def others(like: Array, label: Array, axis: Axis) -> Array:
    """1 at every class but `label`, 0 there."""
    size = number(like, axis)  # symbolic under jax.export, or larger than float32 holds an index exactly:
    wide = dtypes.compute_dtype(like.dtype)
    dtype = wide if isinstance(size, int) and size < 2**24 else jnp.int32
    distance = jnp.abs(index(like, axis, dtype) - label.astype(dtype))
    return jnp.minimum(distance, 1).astype(wide)


def one_hot(like: Array, label: Array, axis: Axis) -> Array:
    """e_label (class axis of length 1); NaN throughout for a label below 0."""
    return undefined(label < 0, jnp.where(index(like, axis) == label, 1.0, 0.0).astype(like.dtype))


def undefined(at: Array, x: Array) -> Array:
    """x, with NaN at `at`: computed there alone, since a NaN that is only a constant stops jax.debug_nans as well."""
    at = sharded_like(x, at) if at.shape == x.shape else at
    infinite = jnp.where(at, jnp.inf, 0.0).astype(x.dtype)
    return x + (infinite - infinite)


def take(x: Array, label: Array, axis: Axis) -> Array:
    """x at class `label`, of each label where the class axis has several; NaN where there is no such class."""
    total = number(x, axis)
    if total == 0:
        return undefined(jnp.ones(label.shape, bool), jnp.zeros(label.shape, x.dtype))
    (position,), local = positions(axis), label - first(x, axis)
    size, whole = x.shape[position], not (split_axes_of(x) and split_axes_of(x)[position])
    taken = lambda x, local: jnp.take_along_axis(x, jnp.clip(local, 0, size - 1), position)
    summed = lambda x, local: local_sum(jnp.where(index(x, position) == local, x, 0.0), position)
    if not whole:  # by axes of type Explicit, along which there is no gather
        found = summed(x, local)
    elif local.shape[position] > 1:
        found = taken(x, local)
    else:  # what a TPU takes an entry from is written out first: z-loss in half precision 4 passes for 2
        found = forms.on_tpu(summed, taken, x, local)
    if names := _mesh_axes(axis):  # the one device that has the class adds it to the others' 0
        found = lax.psum(jnp.where((local >= 0) & (local < size), found, 0.0), names)
    return undefined((label < 0) | (label >= total), found)


def labels(given: Array, num_classes: int) -> Array:
    """Labels as int32; -1 for every label outside [0, num_classes), whatever its dtype."""
    if given.dtype.itemsize < 4:
        given = given.astype(jnp.int32)
    valid = (given >= 0) & (given < num_classes)
    return jnp.where(valid, given.astype(jnp.int32), -1)


def labels_equal(labels: Array, index: int) -> Array:
    """labels == index as integers, also where the labels' dtype holds no such number."""
    limits = jnp.iinfo(labels.dtype)
    if not int(limits.min) <= index <= int(limits.max):
        return jnp.zeros(labels.shape, bool)
    return labels == jnp.asarray(index, labels.dtype)


def present(z: Array, mask: Array | None, axis: Axis) -> Array:
    """z with -inf at the masked classes, and 0 throughout a slice that has no other: no NaN arises there."""
    if mask is None:
        return z
    return jnp.where(mask, z, jnp.where(any(mask, axis), -jnp.inf, 0.0).astype(z.dtype))


def absent_examples(loss: Array, mask: Array | None, axis: Axis) -> Array:
    """`loss` without its class axis, of length 1; 0 where the mask leaves no class."""
    loss = loss if mask is None else jnp.where(any(mask, axis), loss, 0.0)
    return jnp.squeeze(loss, positions(axis))


def one_axis(axes: ClassAxis, *arrays: Array | None) -> tuple[list, ClassAxis]:
    """The arrays with the class axes merged into one, and that axis; a single axis stays where it is."""
    arrays = aligned(*arrays)
    if len(axes.positions) == 1:
        return list(arrays), axes
    merged = [None if x is None else merge_axes(x, axes.positions) for x in arrays]
    last = next(x.ndim for x in merged if x is not None) - 1
    return merged, dataclasses.replace(axes, positions=(last,))


def merge_axes(x: Array, axes: tuple[int, ...]) -> Array:
    """The given axes moved to the end and merged into one."""
    kept = [i for i in range(x.ndim) if i not in axes]
    shape = [x.shape[i] for i in kept] + [math.prod(x.shape[i] for i in axes)]
    return jnp.transpose(x, (*kept, *axes)).reshape(shape)


def unmerge_axes(merged: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """Inverse of `merge_axes` for an array that had the given shape."""
    order = [i for i in range(len(shape)) if i not in axes] + list(axes)
    return jnp.transpose(merged.reshape([shape[i] for i in order]), [order.index(i) for i in range(len(shape))])


def zero_absent(x: Array, mask: Array | None) -> Array:
    """x with 0 where the mask is False, whatever stands there."""
    return x if mask is None else jnp.where(mask, x, 0.0)
