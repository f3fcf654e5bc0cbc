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
from jax.experimental.roofline import register_roofline, roofline
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

try:
    from jax.extend.core import unmapped_aval
except ImportError:  # JAX 0.6.0
    from jax.core import unmapped_aval  # pyright: ignore[reportAttributeAccessIssue]  (newer JAX has no such name)

__all__ = ["linear_map", "symmetric_map"]


def linear_map(forth: Callable, back: Callable, residuals: Any, x: Any, out_types: Any) -> Any:
    """M x for a linear map M with a transpose of its own.

    forth: x ↦ M x,    back: c ↦ Mᵀc,    where M depends on the residuals.

    Neither is traced before it is needed: `forth` when M x is evaluated, compiled, or differentiated in the residuals,
    `back` when reverse mode arrives. What reverse mode finds then is the operations of `back` themselves, so that they
    need no transpose for a first derivative, and differentiate as they stand for the next.

    Args:
      forth: `forth(residuals, x)` -> pytree of arrays; linear in x.
      back: `back(residuals, c)` -> pytree of arrays like x; linear in c. None stands for an array of zeros in c.
      residuals: pytree of arrays, all that is kept between the passes of reverse mode.
      x: pytree of inexact arrays.
      out_types: pytree like the output, of `jax.typeof` of its arrays.

    Returns:
      M x, a pytree like `out_types`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax._linear_map import linear_map
      >>> a, times = jnp.array([2.0, 3.0]), lambda a, x: a * x
      >>> scaled = lambda x: linear_map(times, times, a, x, jax.typeof(x))
      >>> print(scaled(jnp.ones(2)), jax.grad(lambda x: scaled(x).sum())(jnp.ones(2)))
      [2. 3.] [2. 3.]
    """
    residual_leaves, residual_tree = jax.tree.flatten(residuals)
    x_leaves, x_tree = jax.tree.flatten(x)
    types, out_tree = jax.tree.flatten(out_types)

    def flat_forth(residuals, x):
        return jax.tree.leaves(forth(residual_tree.unflatten(residuals), x_tree.unflatten(x)))

    def flat_back(residuals, c):
        return jax.tree.leaves(back(residual_tree.unflatten(residuals), out_tree.unflatten(c)))

    try:
        out = _bind(residual_leaves, x_leaves, forth=flat_forth, back=flat_back, types=tuple(types))
    except NotImplementedError:
        if hasattr(jax, "shard_map"):
            raise
        # JAX 0.6.0: shard_map follows only JAX's own operations. Reverse mode transposes those of `forth` there.
        out = jax.checkpoint(flat_forth, prevent_cse=False)(residual_leaves, x_leaves)
    return out_tree.unflatten(out)


def symmetric_map(product: Callable, residuals: Any, x: Any) -> Any:
    """M x for a linear map M that is its own transpose: `product(residuals, x)` is both directions."""
    return linear_map(product, product, residuals, x, jax.tree.map(jax.typeof, x))


_linear_map_p = Primitive("linear_map")
_linear_map_p.multiple_results = True


def _bind(residuals, x, **params) -> list:
    return _linear_map_p.bind(*residuals, *x, count=len(residuals), **params)


def _evaluate(*args, forth, count, **_):
    return forth(args[:count], args[count:])


def _transpose(cotangents, *args, back, count, **_):
    return [None] * count + back(args[:count], [None if _is_zero(c) else c for c in cotangents])


def _jvp(primals, tangents, *, count, **params):
    """M x along (dM, dx): M dx, a linear map again, plus dM x, for which `forth` is differentiated."""
    residuals, x = primals[:count], primals[count:]
    terms = []
    if not all(map(_is_zero, tangents[count:])):
        terms.append(_bind(residuals, map(ad.instantiate_zeros, tangents[count:]), **params))
    moving = {i: t for i, t in enumerate(tangents[:count]) if not _is_zero(t)}
    if moving:

        def of_moving(moved):
            return params["forth"]([moved.get(i, residual) for i, residual in enumerate(residuals)], x)

        terms.append(jax.jvp(of_moving, ({i: residuals[i] for i in moving},), (moving,))[1])
    return _bind(residuals, x, **params), [functools.reduce(operator.add, term) for term in zip(*terms)]


def _batch(axis, args, dims, *, forth, back, count, types):
    if all(dim is None for dim in dims):
        outs = _bind(args[:count], args[count:], forth=forth, back=back, types=types)
        return outs, [None] * len(outs)

    def mapped(f, in_axes):
        return jax.vmap(f, in_axes, axis_name=axis.name, axis_size=axis.size, spmd_axis_name=axis.spmd_name)

    x = mapped(lambda *x: x, tuple(dims[count:]))(*args[count:])  # a broadcast, where x has no batch axis
    over_residuals = (list(dims[:count]), 0)
    batched = {
        "forth": lambda residuals, x: mapped(forth, over_residuals)(list(residuals), list(x)),
        "back": lambda residuals, c: mapped(back, over_residuals)(list(residuals), list(c)),
        "types": tuple(unmapped_aval(axis.size, 0, kind, axis.explicit_mesh_axis) for kind in types),
    }
    outs = _bind(args[:count], x, **batched)
    return outs, [0] * len(outs)


def _roofline(ctx, *args, **params):
    run = lambda *args: _evaluate(*args, **params)
    return roofline(run)(*ctx.avals_in)[1]


def _is_zero(tangent) -> bool:
    return type(tangent) is ad.Zero


_linear_map_p.def_impl(_evaluate)
_linear_map_p.def_abstract_eval(lambda *_, types, **__: list(types))
ad.primitive_transposes[_linear_map_p] = _transpose
ad.primitive_jvps[_linear_map_p] = _jvp
batching.fancy_primitive_batchers[_linear_map_p] = _batch
mlir.register_lowering(_linear_map_p, mlir.lower_fun(_evaluate, multiple_results=True))
register_roofline(_linear_map_p)(_roofline)
