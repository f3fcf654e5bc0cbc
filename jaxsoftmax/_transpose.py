"""What the forward direction of a rule needs: the transpose of its backward direction, and no tracer left in it."""

import functools
import gc
from collections.abc import Callable, Sequence
from types import CellType, MethodType, ModuleType, NoneType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

__all__ = ["closed", "holds_a_tracer", "transposed"]


def transposed(fun: Callable, residuals: Any, types: Sequence, x: Sequence, name: str) -> Sequence:
    """The transpose of `fun(residuals, ·)`, linear in a list of arrays of these types, at x.

    Raises:
      TypeError: where it has none; `name` is that of the function whose rule this is.
    """
    jaxpr = _jaxpr_of(fun, residuals, types)
    try:
        transpose = jax.linear_transpose(jaxpr_as_fun(jaxpr), *types)(list(x))
        with jax.ensure_compile_time_eval():
            if all(_zero_at_zero(jaxpr.jaxpr, jaxpr.consts, [True] * len(types))):
                return transpose
        raise ValueError("it is not 0 where the cotangent is")
    except Exception as error:
        cause = "it is not linear in the cotangent" if isinstance(error, AssertionError) else str(error).rstrip(".")
        raise TypeError(
            f"{name}: forward mode (jvp, jacfwd, hessian) needs the transpose of bwd, which has none: {cause}. "
            "Make bwd linear in the cotangent, of operations that transpose (a loop of fixed length for "
            "lax.while_loop, .at[].add for .at[].set, no callbacks), or give a rule for forward mode as well: "
            "defvjp(fwd, bwd, jvp=...)."
        ) from error


def closed(fun: Callable, residuals, types: Sequence):
    """`fun` with the arrays that it depends on, traced ones that it closes over too, as the residuals.

    A `linear_map` is lowered when the trace that it was made in is over.
    """
    jaxpr = _jaxpr_of(fun, residuals, types)
    return (lambda arrays, xs: jaxpr_as_fun(ClosedJaxpr(jaxpr.jaxpr, arrays))(*xs)), list(jaxpr.consts)


def _jaxpr_of(fun: Callable, residuals: Any, types: Sequence) -> ClosedJaxpr:
    trace = jax.make_jaxpr(lambda *xs: fun(residuals, xs))
    try:
        return trace(*types)
    except jax.errors.ConcretizationTypeError:  # a Python `if`, perhaps on what concrete residuals give
        with jax.ensure_compile_time_eval():
            return trace(*types)


def holds_a_tracer(item: Any, seen: set[int]) -> bool:
    """Whether there is a traced array in a tree, or in what a function closes over, or an object has."""
    if id(item) in seen or isinstance(item, (NoneType, int, str, type, ModuleType, np.ndarray, jax.Array)):
        return isinstance(item, Tracer)
    seen.add(id(item))
    if isinstance(item, dict):
        held = [*item.values()]
    elif isinstance(item, (tuple, list, set, functools.partial, MethodType, CellType)):
        held = gc.get_referents(item)
    else:
        held = [getattr(item, name, None) for name in ("__closure__", "__defaults__", "__kwdefaults__", "__dict__")]
    return any(holds_a_tracer(each, seen) for each in held)


# What is a sum or a choice of its operands, or put together from them, and what is not 0 at 0. Any other operation that
# can stand here multiplies one of its operands, or moves it.
_SUMS = set("add add_any sub max min select_n concatenate pad dynamic_update_slice scatter scatter-add".split())
_NOT_ZERO = set("acos acosh cos cosh digamma erfc exp exp2 lgamma log logistic pow rsqrt".split())


def _zero_at_zero(jaxpr: Jaxpr, consts: Sequence, zero: Sequence) -> list[bool]:
    """Which outputs are seen to be 0 where the marked inputs are: a linear function is, an affine one is not."""
    known: dict = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *zero]))
    look = lambda v: v.val if isinstance(v, Literal) else known[v]
    for eqn in jaxpr.eqns:
        operands = list(map(look, eqn.invars))
        inexact = [x for x, v in zip(operands, eqn.invars) if _is_inexact(v.aval)] or operands
        if branches := eqn.params.get("branches"):
            found = map(all, zip(*(_zero_at_zero(inner.jaxpr, inner.consts, operands[1:]) for inner in branches)))
        elif inner := eqn.params.get("jaxpr"):
            found = _zero_at_zero(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), operands)
        elif eqn.primitive.name in _SUMS:
            found = [all(map(_is_zero, inexact))]
        else:
            found = [eqn.primitive.name not in _NOT_ZERO and any(map(_is_zero, inexact))] * len(eqn.outvars)
        known |= zip(eqn.outvars, found)
    return [_is_zero(look(v)) for v in jaxpr.outvars]


def _is_zero(x) -> bool:
    return x if isinstance(x, bool) else not isinstance(x, Tracer) and not np.any(x)


def _is_inexact(kind) -> bool:
    return jnp.issubdtype(getattr(kind, "dtype", bool), jnp.inexact)
