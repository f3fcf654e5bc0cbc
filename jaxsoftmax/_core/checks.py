"""Axes, shapes and dtypes of arguments, and every error message about them.

A check runs on Python values and abstract shapes only, so a wrong call fails before anything is computed or traced.
"""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxsoftmax._core import dtypes
from jaxsoftmax.autodiff import varying_axes


def as_array(name: str, x: Any) -> Array:
    """`x` as a JAX array, or a TypeError that names the argument."""
    if isinstance(x, Array):
        return x
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array or a nested sequence of numbers, got {type(x).__name__}") from error


def as_float(name: str, x: ArrayLike) -> Array:
    """Argument of a map: real; integers and booleans become the float that `jnp.exp` makes of them, as in jax.nn."""
    x = as_array(name, x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be real, got dtype {x.dtype}; take its real part or magnitude first")
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jax.eval_shape(jnp.exp, x).dtype)


def as_inexact(name: str, x: ArrayLike) -> Array:
    """As `as_float`, but complex numbers pass."""
    x = as_array(name, x)
    return x if jnp.issubdtype(x.dtype, jnp.complexfloating) else as_float(name, x)


def as_loss_float(name: str, x: ArrayLike, remedy: str = "convert it with .astype(float)") -> Array:
    """Argument of a loss: floating point, nothing else."""
    x = as_array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating-point dtype, got {x.dtype}; {remedy}")
    return x


def as_labels(name: str, labels: ArrayLike, remedy: str = "") -> Array:
    """Integer class labels."""
    labels = as_array(name, labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype (class indices), got {labels.dtype}{remedy}")
    return labels


def class_indices(labels: ArrayLike, logits: Array, axes: tuple[int, ...], name: str = "labels") -> Array:
    """One integer per example of `logits`, whose classes lie along `axes`."""
    labels, shape = as_array(name, labels), tuple(n for i, n in enumerate(logits.shape) if i not in axes)
    remedy = "a weight per class goes to softmax_cross_entropy, a one-hot label as jnp.argmax(labels, axis)"
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"{name} must have an integer dtype (class indices), got {labels.dtype}{_of(logits, axes)}; {remedy}"
        )
    if not _fits(labels.shape, shape):
        raise ValueError(
            f"{name} has shape {labels.shape}, and class indices need {shape}{_of(logits, axes)}; {remedy}"
        )
    return broadcast(name, labels, shape)


def class_probabilities(labels: ArrayLike, logits: Array, axes: tuple[int, ...], name: str = "labels") -> Array:
    """A real weight per class, of the shape of `logits`, whose classes lie along `axes`; booleans count as 0 and 1."""
    labels = as_array(name, labels)
    remedy = (
        "class indices go to softmax_cross_entropy_with_integer_labels, or here as "
        "jax.nn.one_hot(labels, num_classes); one-hot integers as labels.astype(float)"
    )
    if jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"{name} must have a floating-point dtype (a weight per class), got {labels.dtype} of shape "
            f"{labels.shape}{_of(logits, axes)}; {remedy}"
        )
    if not _fits(labels.shape, logits.shape):
        raise ValueError(
            f"{name} has shape {labels.shape}, and weights per class need one that broadcasts to {logits.shape}"
            f"{_of(logits, axes)}; {remedy}"
        )
    return broadcast(name, as_real(name, labels, dtypes.compute_dtype(logits.dtype)), logits.shape)


def _of(logits: Array, axes: tuple[int, ...]) -> str:
    """For messages about labels: beside which logits they stand."""
    return f" beside logits of shape {logits.shape} with the classes along axis {', '.join(map(str, axes))}"


def class_weights(weights: ArrayLike, num_classes: int) -> Array:
    """One floating-point number per class, none below 0: NaN where that shows only under jit."""
    weights = as_loss_float("class_weights", weights)
    same_shape("class_weights", weights, "the class axis", (num_classes,))
    return within("class_weights", weights, 0.0)


def as_mask(name: str, where: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    """A boolean mask, broadcast to `shape`; None stays None."""
    if where is None:
        return None
    where = as_array(name, where)
    if where.dtype != jnp.bool_:
        raise TypeError(f"{name} must be boolean, got dtype {where.dtype}; compare it with 0 first")
    return broadcast(name, where, shape)


def as_loss_mask(
    name: str, where: ArrayLike | None, shape: tuple[int, ...], axes: tuple[int, ...], of_classes: bool = False
) -> Array | None:
    """The mask of a loss: of classes, broadcast to `shape`, or of examples, with `axes` of length 1.

    A mask that could be either is of examples, as optax takes it in the cross-entropies; with `of_classes` of classes,
    as it takes it in the divergences of probabilities.
    """
    if where is None:
        return None
    where, examples = as_array(name, where), tuple(n for i, n in enumerate(shape) if i not in axes)
    if not _fits(where.shape, shape) or where.shape == examples and not of_classes:
        if not _fits(where.shape, examples):
            raise ValueError(f"{name} has shape {where.shape}, which broadcasts neither to {shape} nor to {examples}")
        where = jnp.expand_dims(jnp.broadcast_to(where, examples), axes)
        shape = where.shape
    return as_mask(name, where, shape)


def _fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of `shape` broadcasts to `target`."""
    return len(shape) <= len(target) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(target)))


def broadcast(name: str, x: Array, shape: tuple[int, ...]) -> Array:
    """`x` broadcast to `shape`, or a ValueError that names it."""
    if not _fits(x.shape, shape):
        raise ValueError(f"{name} has shape {x.shape}, which does not broadcast to {tuple(shape)}")
    return x if x.shape == tuple(shape) else jnp.broadcast_to(x, shape)


def to_examples(name: str, x: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """`x` broadcast to `shape` without `axes`; a ValueError where NumPy would read it along other axes of `shape`."""
    axes = tuple(i % len(shape) for i in axes)
    examples = tuple(n for i, n in enumerate(shape) if i not in axes)
    in_place = _fits(x.shape, tuple(1 if i in axes else n for i, n in enumerate(shape)))
    moved = any(i >= len(shape) - x.ndim for i in axes)
    if x.shape != examples and x.size > 1 and in_place and moved:
        raise ValueError(
            f"{name} has shape {x.shape}, which fits the examples {examples} and, beside the classes, {shape}: "
            f"broadcast it to {examples} first"
        )
    return broadcast(name, x, examples)


def common_shape(name: str, x: Array, other: str, y: Array) -> tuple[int, ...]:
    """The shape that both broadcast to."""
    try:
        return jnp.broadcast_shapes(x.shape, y.shape)
    except ValueError:
        raise ValueError(f"{name} has shape {x.shape} and {other} has shape {y.shape}: they do not broadcast") from None


def same_shape(name: str, x: Array, other: str, shape: tuple[int, ...]) -> None:
    """Raise unless `x` has exactly `shape`, that of the argument `other`."""
    if x.shape != tuple(shape):
        raise ValueError(f"{name} must have the shape of {other}, {tuple(shape)}, got {x.shape}")


def axis_index(axis: Any, ndim: int, name: str = "axis") -> int:
    """`axis` counted from the front."""
    try:
        index = operator.index(axis)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {_shown(name, axis)}") from None
    if ndim == 0:
        raise ValueError(f"{name}={index} needs an array with at least one axis, got a scalar")
    if not -ndim <= index < ndim:
        raise ValueError(f"{name}={index} is out of range for {ndim} axes: need {-ndim} <= {name} < {ndim}")
    return index % ndim


def axes(axis: Any, ndim: int, name: str = "axis") -> tuple[int, ...]:
    """`axis` (an integer, a tuple of integers, or None for all) as a tuple counted from the front."""
    if axis is None:
        return tuple(range(ndim))
    if not isinstance(axis, (tuple, list)):
        return (axis_index(axis, ndim, name),)
    found = tuple(axis_index(a, ndim, name) for a in axis)
    if len(set(found)) != len(found):
        raise ValueError(f"{name}={tuple(axis)} names an axis twice")
    return found


def axis_names(argument: str, value: Any) -> tuple[str, ...]:
    """The mesh axes that the value of an argument (a name, a tuple of names, or None for none) stands for."""
    names = () if value is None else tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument} must be the name of a mesh axis or a tuple of names, got {value!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"{argument}={value!r} names a mesh axis twice")
    return names


def split_over(axis_name: Any, argument: str = "", *arrays: Array) -> tuple[str, ...]:
    """The axes of a `jax.shard_map` that `axis_name` stands for, over which the argument, or all arrays, are split."""
    names = axis_names("axis_name", axis_name)
    try:
        lax.psum(1, names)
    except NameError:
        raise ValueError(
            f"axis_name={axis_name!r} needs a jax.shard_map over a mesh with that axis around it"
        ) from None
    if arrays:
        _assert_split(names, argument, *arrays)
    return names


def _assert_split(names: tuple[str, ...], argument: str, *arrays: Array) -> None:
    """Raise where types say that along a name every device has the same of all the arrays."""
    tracked = frozenset().union(*(varying_axes(jax.typeof(lax.axis_index(name))) for name in names))
    shared = [n for n in names if n in tracked and not any(n in varying_axes(jax.typeof(x)) for x in arrays)]
    if shared:
        raise ValueError(
            f"axis_name={names} says that the classes are split over it, and {argument} of shape {arrays[0].shape} is "
            f"the same on every device along {shared}: its classes would count once per device. Split it in in_specs, "
            f"or leave axis_name out; if equal blocks are meant, jax.lax.pcast({argument}, {tuple(shared)}, "
            "to='varying')"
        )


def all_classes(what: str, names: tuple[str, ...]) -> None:
    """Raise where the classes are split over mesh axes, for what cannot be had of blocks of them."""
    if names:
        raise TypeError(
            f"{what} needs all classes, and they are split over {names}: take the whole logits, "
            f"jax.lax.all_gather(x, {names}, axis=-1, tiled=True), or work on global arrays outside jax.shard_map; "
            "products with an operator at split logits need no gathering"
        )


def integer(name: str, value: Any) -> int:
    """A Python integer."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {_shown(name, value)}") from None


def known_positive(name: str, value: Any) -> float:
    """A positive number that is known when a function is traced."""
    if isinstance(value, Tracer):
        raise TypeError(f"{name} must be a number, got {_shown(name, value)}")
    return float(positive(name, value))


def _shown(name: str, value: Any) -> str:
    """What a message calls the value of an argument that must be known when a function is traced."""
    if isinstance(value, Tracer):
        return f"a traced array: under jit it must be static, jax.jit(f, static_argnames={name!r})"
    return repr(value)


def number(name: str, value: Any, low: float = -np.inf, high: float = np.inf) -> Any:
    """A real scalar in [low, high]: NaN where a traced one is not."""
    if np.ndim(value) != 0 or not _is_real(value):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    return within(name, value, low, high)


def _is_real(value: Any) -> bool:
    dtype = value.dtype if isinstance(value, Tracer) else np.asarray(value).dtype
    return jnp.issubdtype(dtype, jnp.number) and not jnp.issubdtype(dtype, jnp.complexfloating)


def within(name: str, value: Any, low: float = -np.inf, high: float = np.inf, above_low: bool = False) -> Any:
    """`value`, every entry in [low, high], or with `above_low` in (low, high]: NaN where that is not so under jit."""
    inside = lambda x: (x > low if above_low else x >= low) & (x <= high)
    if not isinstance(value, Array) or not isinstance(value, Tracer) and value.is_fully_addressable:
        if not np.all(inside(np.asarray(value))):
            needed = f"be larger than {low}" if above_low else f"lie in [{low}, {high}]"
            raise ValueError(f"{name} must {needed}, got {value}")
        return value
    if (low, high) == (-np.inf, np.inf):
        return value
    value = value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(float)
    # Computed there alone: a NaN that is only a constant stops jax.debug_nans as well.
    outside = jnp.where(inside(value), 0.0, jnp.inf).astype(value.dtype)
    return value + (outside - outside)


def is_known_as(constant: float, value: Any) -> bool:
    """Whether an option is this number; of a traced one that is not known."""
    return not isinstance(value, Tracer) and np.ndim(value) == 0 and bool(np.asarray(value) == constant)


def as_real(name: str, x: ArrayLike, dtype: Any) -> Array:
    """Real argument beside floating ones of `dtype`, which it takes unless it has a floating dtype of its own."""
    own, x = hasattr(x, "dtype"), as_array(name, x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be real, got dtype {x.dtype}")
    return x if own and jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)


def positive(name: str, value: Any) -> Any:
    """A real scalar larger than 0: NaN where a traced one is not."""
    return within(name, number(name, value), 0.0, above_low=True)


def inverse(name: str, value: ArrayLike, x: Array) -> tuple[Array, Array]:
    """1 / value of a positive option, a number or one per slice (...) of x (..., K): as it is, and to multiply x."""
    found = 1 / option(name, value, None, x.dtype, 0.0, above_low=True).astype(x.dtype)
    if found.ndim == 0:
        return found, found
    found = broadcast(name, found, x.shape[:-1])
    return found, found[..., None]


def option(
    name: str,
    value: ArrayLike,
    shape: tuple[int, ...] | None,
    dtype: Any,
    low: float = -np.inf,
    high: float = np.inf,
    above_low: bool = False,
) -> Array:
    """Real numbers as in `within`, one or an array of them, broadcast to any `shape`; of `dtype` if they have none."""
    if np.ndim(value) == 0:
        number(name, value)
    as_real(name, value, dtype)  # what it is, before how large it is
    value = as_real(name, within(name, value, low, high, above_low), dtype)
    return value if shape is None else broadcast(name, value, shape)


def at_least(name: str, value: Any, low: int) -> int:
    """An integer no smaller than `low`."""
    value = integer(name, value)
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value


def sizes(name: str, value: Any, low: int = 0) -> tuple[int, ...]:
    """A sequence of integers no smaller than `low`, such as a shape."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name} must be a sequence of integers, got {value!r}")
    return tuple(at_least(f"each of {name}", size, low) for size in value)


def function(name: str, value: Any) -> Any:
    """Anything that can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {type(value).__name__}")
    return value


def key(name: str, value: Any) -> Array:
    """One PRNG key, typed or raw."""
    dtype, ndim = getattr(value, "dtype", None), getattr(value, "ndim", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and ndim == 0 or dtype == jnp.uint32 and ndim == 1):
        raise TypeError(f"{name} must be one PRNG key, as from jax.random.key, got {value!r}")
    return value


def float_dtype(name: str, dtype: Any) -> None:
    """Raise unless `dtype` is floating-point."""
    try:
        found = jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        found = False
    if not found:
        raise TypeError(f"{name} must be a floating-point dtype, got {dtype!r}")


def same_tree(name: str, tree: Any, other: str, like: Any) -> None:
    """Raise unless `tree` has the structure and shapes of `like`, the argument `other`."""
    wanted, got = jax.tree.structure(like), jax.tree.structure(tree)
    if got != wanted:
        raise TypeError(f"{name} must have the structure of {other}, {wanted}, got {got}")
    for leaf, target in zip(jax.tree.leaves(tree), jax.tree.leaves(like)):
        same_shape(f"each array of {name}", as_array(name, leaf), other, jnp.shape(target))


def float_tree(name: str, tree: Any) -> None:
    """Raise unless `tree` has leaves, all of them floating-point arrays."""
    leaves = jax.tree.leaves(tree)
    found = [getattr(leaf, "dtype", type(leaf).__name__) for leaf in leaves]
    if not leaves or not all(isinstance(d, np.dtype) and jnp.issubdtype(d, jnp.floating) for d in found):
        raise TypeError(f"{name} must be a pytree of floating-point arrays, got leaves of {found}")
