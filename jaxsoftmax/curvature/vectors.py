"""Vectors that are pytrees, and matrices brought to the scale of 1: neither squares nor quotients leave the range.

Every scaling is by a power of two, which rounds nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import checks, dtypes
from jaxsoftmax._core.mesh import varies_over, varying

Product = Callable[[Any], Any]


def conformed(tree: Any, v: Any, name: str = "v", other: str = "params") -> Any:
    """v in the dtypes of `tree`, whose structure and shapes it must have."""
    checks.same_tree(name, v, other, tree)
    return jax.tree.map(lambda leaf, target: checks.as_float(name, leaf).astype(target.dtype), v, tree)


def dot(u: Any, v: Any) -> Array:
    """<u, v>, in at least float32. Not by `vdot`: that reshapes, which arrays on a mesh may not allow."""
    terms = jax.tree.map(lambda a, b: jnp.sum(jnp.multiply(*dtypes.widen(a, b))), u, v)
    return functools.reduce(lambda a, b: jnp.add(*dtypes.widen(a, b)), jax.tree.leaves(terms))


def norm(v: Any) -> Array:
    return jnp.sqrt(dot(v, v))


def axpy(a: Any, x: Any, y: Any) -> Any:
    """a x + y."""
    return jax.tree.map(lambda x, y: jnp.asarray(a).astype(x.dtype) * x + y, x, y)


def scale(a: Any, x: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(a).astype(leaf.dtype) * leaf, x)


def ldexp(v: Any, e: Any) -> Any:
    """2^e v."""
    return powers_of_two(e, v)(v)


def powers_of_two(e: Any, like: Any) -> Callable[[Any], Any]:
    """v -> 2^e v for trees as `like`, in two steps: the power itself may leave the range where the result does not."""
    steps, leaves = (e >> 1, e - (e >> 1)), jax.tree.leaves(like)
    wide = {leaf.dtype: dtypes.compute_dtype(leaf.dtype) for leaf in leaves}
    powers = {of: [jnp.ldexp(jnp.ones((), dtype), n).astype(of) for n in steps] for of, dtype in wide.items()}
    return lambda v: jax.tree.map(lambda leaf: leaf * powers[leaf.dtype][0] * powers[leaf.dtype][1], v)


def exponent(v: Any) -> Array:
    """The e with largest entry in [2^(e-1), 2^e); 0 for a vector of zeros, infinities or NaN."""
    return jnp.frexp(_largest(v))[1]


def scale_of(product: Product, probe: Any) -> Array:
    """The e with 2^-e A `probe` of entries about 1, for a `probe` of entries about 1.

    Where A `probe` under- or overflows, a second product is taken, of a `probe` half of the range away.
    """
    first = jnp.zeros_like(_largest(probe))
    info = jnp.finfo(first.dtype)
    far = jnp.int32(info.maxexp // 2)

    def unknown(state):
        _, size, tries = state
        return (tries < 2) & ~((size > info.tiny / info.eps) & (size < jnp.inf))

    def attempt(state):
        _, size, tries = state
        shift = jnp.where(tries == 0, 0, jnp.where(size < 1, far, -far))
        return shift, _largest(product(ldexp(probe, shift))).astype(first.dtype), tries + 1

    start = jnp.int32(0), first, jnp.int32(0)  # inside shard_map as different on each device as the probe
    shift, size, _ = lax.while_loop(unknown, attempt, varying(start, varies_over(_largest(probe))))
    return jnp.frexp(size)[1] - shift


def scaled(product: Product, e: Any, like: Any) -> Product:
    """2^-e A: half of the power before A, half after it, so that what A computes inside keeps to the range as well."""
    half = -(e >> 1)
    before, after = powers_of_two(half, like), powers_of_two(-e - half, like)
    return lambda v: after(product(before(v)))


def _largest(v: Any) -> Array:
    sizes = [
        jnp.max(jnp.abs(leaf), initial=0.0).astype(dtypes.compute_dtype(leaf.dtype)) for leaf in jax.tree.leaves(v)
    ]
    return lax.stop_gradient(functools.reduce(lambda a, b: jnp.maximum(*dtypes.widen(a, b)), sizes))
