"""Functions that are compiled or traced once, however often they are called."""

import contextlib
import functools
from collections.abc import Callable
from typing import TypeVar, cast

import jax

Function = TypeVar("Function", bound=Callable)
_use_mesh = getattr(jax.sharding, "use_abstract_mesh", contextlib.nullcontext)  # JAX 0.6.0 has none


def compiled(fun: Function) -> Function:
    """`fun` jitted; inlined in an outer jit."""
    return cast(Function, jax.jit(fun, inline=True))


def traced_once(fun: Function) -> Function:
    """`fun(*arrays, axis)`, inlined where it is called, and traced once however many rules call it."""
    jitted = jax.jit(fun, static_argnames=("axis",), inline=True)

    @functools.wraps(fun)
    def called(*args, **kwargs):
        # No mesh, and the empty one that JAX traces rules in, would be two contexts to its cache.
        with _use_mesh(jax.sharding.get_abstract_mesh()):
            return jitted(*args, **kwargs)

    return cast(Function, called)
