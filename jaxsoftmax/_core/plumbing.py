"""What JAX needs beside the mathematics: compiled functions that keep their types, and types inside shard_map."""

from collections.abc import Callable
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

Function = TypeVar("Function", bound=Callable)


def compiled(fun: Function) -> Function:
    """`fun` jitted; inlined in an outer jit."""
    return cast(Function, jax.jit(fun, inline=True))


def typed_like(z: Array, x: Array) -> Array:
    """x. Inside shard_map it varies over the mesh axes that z varies over, as a rule's cotangent for x will."""
    return jnp.where(lax.stop_gradient(z) > 0, x, x)


def tied(arrays, to):
    """`arrays` plus a 0 that is linear in all of `to`: they vary over a mesh, and have tangents, as all of `to` does.

    A loop's carry must not change its type, a gradient inside a loop must not be added up over the mesh there, and
    JAX's linear solve handles no symbolic zero among its leaves.
    """
    zero = sum((jnp.sum(jnp.ravel(x)[:0]).astype(jnp.float32) for x in jax.tree.leaves(to)), jnp.float32(0))
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), arrays)


def mesh_axes(x) -> frozenset[str]:
    """The axes of a `shard_map` that x varies over; none where JAX keeps no account of them in types (before 0.7)."""
    kind = jax.typeof(x)
    kind = getattr(kind, "manual_axis_type", kind)  # where it is kept since JAX 0.10
    return getattr(kind, "varying", getattr(kind, "vma", frozenset()))
