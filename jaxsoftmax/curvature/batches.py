"""Sums over the examples, a slice of them at a time."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import dtypes


def num_examples(data: Any) -> int:
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"the arrays of x and labels must lead with one batch axis, got lengths {sorted(sizes)}")
    return sizes.pop()[0]


def options_per_example(loss: Callable, logits_shape: tuple[int, ...]) -> dict[str, Any]:
    """What `functools.partial` binds to the loss for each example: arrays with the axes of the logits, or a `where`
    without the last of them, that lead with the batch axis."""

    def is_cut(name: str, value: Any) -> bool:
        shape = getattr(value, "shape", ())
        return shape[:1] == logits_shape[:1] and len(shape) in (
            len(logits_shape),
            len(logits_shape) - (name == "where"),
        )

    bound = loss.keywords if isinstance(loss, functools.partial) else {}
    return {name: value for name, value in bound.items() if is_cut(name, value)}


def sum_over_batches(of_batch: Callable[[Any], Any], data: Any, batch_size: int | None, like: Any) -> Any:
    """`of_batch` of all the data, or its sum over slices of the examples: in at least float32, placed as `like`.

    The examples of a slice stand at equal distances, each device's share apart: so the devices of a mesh have an equal
    part in every slice, and none is moved.
    """
    if batch_size is None or batch_size >= num_examples(data):
        return of_batch(data)
    shards = max(map(_num_shards, jax.tree.leaves(data)))
    each, size = num_examples(data) // shards, max(1, batch_size // shards)
    steps = each // size

    def local(leaf: Array) -> Array:
        leaf = jnp.asarray(leaf)
        return leaf.reshape(shards, each, *leaf.shape[1:])

    def part(leaf: Array, step: Array) -> Array:
        entries, whole = leaf.shape[1:], local(leaf)[:, : steps * size]
        slices = whole.reshape(shards, size, steps, *entries)
        return lax.dynamic_index_in_dim(slices, step, 2, keepdims=False).reshape(shards * size, *entries)

    def add(total: Any, data: Any) -> Any:
        return jax.tree.map(lambda t, s: t + s.astype(t.dtype), total, of_batch(data))

    def add_part(step: Array, total: Any) -> Any:
        return add(total, jax.tree.map(lambda leaf: part(leaf, step), data))

    total = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtypes.compute_dtype(leaf.dtype)), like)
    total = lax.fori_loop(0, steps, add_part, total)
    if each % size:
        rest = lambda leaf: local(leaf)[:, steps * size :].reshape(shards * (each % size), *leaf.shape[1:])
        total = add(total, jax.tree.map(rest, data))
    return jax.tree.map(lambda t, leaf: t.astype(leaf.dtype), total, like)


def _num_shards(leaf: Any) -> int:
    """Over how many devices the batch axis is split, where its type tells: on a mesh of Explicit axes."""
    sharding = jax.typeof(leaf).sharding
    names = sharding.spec[0] if len(sharding.spec) else None
    return math.prod(sharding.mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))
