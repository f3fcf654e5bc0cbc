"""What JAX needs beside the mathematics: compiled functions that keep their types, and types inside shard_map."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax.autodiff import varying_axes

Function = TypeVar("Function", bound=Callable)


def compiled(fun: Function) -> Function:
    """`fun` jitted; inlined in an outer jit."""
    return cast(Function, jax.jit(fun, inline=True))


def typed_like(z: Array, x: Array) -> Array:
    """x, of the shape of z, on a mesh typed as z is, as a rule's cotangent for x will be."""
    x = sharded_like(z, x)
    return jnp.where(lax.stop_gradient(z) > 0, x, x)


def sharded_like(z: Array, x: Array) -> Array:
    """x, of the shape of z, split as z is by mesh axes of type Explicit."""
    wanted = getattr(jax.typeof(z), "sharding", None)
    if wanted is None or wanted.spec == jax.typeof(x).sharding.spec:
        return x
    return jax.sharding.reshard(x, wanted)


def split_axes_of(x: Array) -> tuple:
    """For each axis of x, the mesh axes of type Explicit that split it, None for none."""
    return tuple(getattr(getattr(jax.typeof(x), "sharding", None), "spec", ()))


def in_auto_mode(fun: Callable, x: Array, *specs: tuple) -> Any:
    """fun(x), where XLA and not the types divide the work if mesh axes of type Explicit split x.

    Args:
      fun: function of x.
      x: an array.
      specs: for each result and each of its axes the mesh axes that split it, None for none.
    """
    if not any(split_axes_of(x)):
        return fun(x)
    out = tuple(jax.sharding.PartitionSpec(*spec) for spec in specs)
    return jax.sharding.auto_axes(fun, out_sharding=out if len(specs) > 1 else out[0])(x)


def tied(arrays, to):
    """`arrays` plus a 0 that is linear in all of `to`: they vary over a mesh, and have tangents, as that does."""
    zero = zero_of(to)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), arrays)


def zeros_like(x: Array) -> Array:
    """Zeros that lie on a mesh as x does: `jnp.zeros_like` forgets how since JAX 0.12."""
    zeros, wanted = jnp.zeros_like(x), getattr(jax.typeof(x), "sharding", None)
    if getattr(jax.typeof(zeros), "sharding", None) == wanted or not hasattr(jax.sharding, "reshard"):
        return zeros
    return jax.sharding.reshard(zeros, wanted)


def zero_of(arrays) -> Array:
    """A 0 that is linear in all of the arrays, whatever stands there; XLA finds it without looking at them."""

    def zero(x):
        x = x.astype(jnp.float32)
        return jnp.sum(lax.select_n(False, zeros_like(x), x))

    return sum(map(zero, jax.tree.leaves(arrays)), jnp.float32(0))


def mesh_axes(x) -> frozenset[str]:
    """The axes of a `shard_map` that x varies over; none where JAX keeps no account of them in types (before 0.7)."""
    return varying_axes(jax.typeof(x))


def varying(x: Array, axes: frozenset[str]) -> Array:
    """x as an array that varies over the mesh axes: each device has a copy of its own to differentiate in."""
    missing = tuple(axes - mesh_axes(x))
    if not missing:
        return x
    if hasattr(lax, "pcast"):
        return lax.pcast(x, missing, to="varying")
    return lax.pvary(x, missing)  # pyright: ignore[reportAttributeAccessIssue]  (JAX before 0.10)
