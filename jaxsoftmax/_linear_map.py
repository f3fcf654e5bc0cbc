"""A linear map that brings its own transpose, as one JAX primitive.

JAX transposes a linear computation operation by operation; a map that is known in both directions need not be taken
apart. `jax.custom_derivatives.linear_call` says that too, but has no rule for `vmap` and none for derivatives in what
the map depends on.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.roofline import register_roofline, roofline
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

try:
    from jax.extend.core import unmapped_aval
except ImportError:  # JAX 0.6.0
    from jax.core import unmapped_aval  # pyright: ignore[reportAttributeAccessIssue]  (newer JAX has no such name)

__all__ = ["linear_map"]


def linear_map(forth: Callable, back: Callable, residuals: Any, x: Any, out_types: Any) -> Any:
    """M x for a linear map M with a transpose of its own, a pytree like `out_types` (`jax.typeof` of its arrays).

    forth: (residuals, x) ↦ M x,    back: (residuals, c) ↦ Mᵀc,    where M depends on the residuals alone.

    x is a pytree of inexact arrays, and so is c, with None for an array of zeros. Neither direction is traced before it
    is needed: `forth` when M x is evaluated, compiled, or differentiated in the residuals, `back` when reverse mode
    arrives. What reverse mode finds then is the operations of `back` themselves, so that they need no transpose for a
    first derivative, and differentiate as they stand for the next.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax._linear_map import linear_map
      >>> a, times = jnp.array([2.0, 3.0]), lambda a, x: a * x
      >>> scaled = lambda x: linear_map(times, times, a, x, jax.typeof(x))
      >>> print(scaled(jnp.ones(2)), jax.grad(lambda x: scaled(x).sum())(jnp.ones(2)))
      [2. 3.] [2. 3.]
    """
    (residuals, residual_tree), (x, x_tree), (types, out_tree) = map(jax.tree.flatten, (residuals, x, out_types))
    params = {
        "forth": lambda r, x: jax.tree.leaves(forth(residual_tree.unflatten(r), x_tree.unflatten(x))),
        "back": lambda r, c: jax.tree.leaves(back(residual_tree.unflatten(r), out_tree.unflatten(c))),
        "types": tuple(types),
    }
    try:
        out = _bind(residuals, x, **params)
    except NotImplementedError:
        if hasattr(jax, "shard_map"):
            raise
        # JAX 0.6.0: shard_map follows only JAX's own operations. Reverse mode transposes those of `forth` there.
        out = jax.checkpoint(params["forth"], prevent_cse=False)(residuals, x)
    return out_tree.unflatten(out)


_linear_map_p = Primitive("linear_map")
_linear_map_p.multiple_results = True


def _bind(residuals, x, **params) -> list:
    return _linear_map_p.bind(*residuals, *x, count=len(residuals), **params)


def _evaluate(*args, forth, count, **_):
    return forth(args[:count], args[count:])


def _transpose(cotangents, *args, back, count, **_):
    if all(map(_is_zero, cotangents)):  # JAX 0.6.0 asks for that, too
        return [None] * len(args)
    return [None] * count + back(args[:count], [None if _is_zero(c) else c for c in cotangents])


def _jvp(primals, tangents, *, count, **params):
    """M x along (dM, dx): M dx, a linear map again, plus dM x, for which `forth` is differentiated."""
    residuals, x = primals[:count], primals[count:]
    terms = []
    if not all(map(_is_zero, tangents[count:])):
        terms.append(_bind(residuals, map(ad.instantiate_zeros, tangents[count:]), **params))
    moving = {i: t for i, t in enumerate(tangents[:count]) if not _is_zero(t)}
    if moving:
        of_moving = lambda moved: params["forth"]([moved.get(i, r) for i, r in enumerate(residuals)], x)
        terms.append(jax.jvp(of_moving, ({i: residuals[i] for i in moving},), (moving,))[1])
    return _bind(residuals, x, **params), [functools.reduce(operator.add, term) for term in zip(*terms)]


def _batch(axis, args, dims, *, forth, back, count, types):
    if all(dim is None for dim in dims):
        outs = _bind(args[:count], args[count:], forth=forth, back=back, types=types)
        return outs, [None] * len(outs)

    def mapped(f, in_axes):
        over = jax.vmap(f, in_axes, axis_name=axis.name, axis_size=axis.size, spmd_axis_name=axis.spmd_name)
        return lambda *args: over(*map(list, args))

    batched = lambda v: batching.broadcast(v, axis.size, 0, axis.explicit_mesh_axis)
    x = [batched(v) if d is None else jnp.moveaxis(v, d, 0) for v, d in zip(args[count:], dims[count:])]
    over_residuals = (list(dims[:count]), 0)
    outs = _bind(
        args[:count],
        x,
        forth=mapped(forth, over_residuals),
        back=mapped(back, over_residuals),
        types=tuple(unmapped_aval(axis.size, 0, kind, axis.explicit_mesh_axis) for kind in types),
    )
    return outs, [0] * len(outs)


def _roofline(ctx, *args, **params):
    return roofline(functools.partial(_evaluate, **params))(*ctx.avals_in)[1]


def _is_zero(tangent) -> bool:
    return type(tangent) is ad.Zero


_linear_map_p.def_impl(_evaluate)
_linear_map_p.def_abstract_eval(lambda *_, types, **__: list(types))
ad.primitive_transposes[_linear_map_p] = _transpose
ad.primitive_jvps[_linear_map_p] = _jvp
batching.fancy_primitive_batchers[_linear_map_p] = _batch
mlir.register_lowering(_linear_map_p, mlir.lower_fun(_evaluate, multiple_results=True))
register_roofline(_linear_map_p)(_roofline)
