"""One rule, both autodiff modes, every order.

`jax.custom_vjp` is the natural place for a closed-form derivative, but a function that carries one refuses forward
mode: `jax.jvp`, `jax.jacfwd` and `jax.hessian` raise TypeError. The decorator here has the same interface and keeps
both modes, because a pullback already holds the whole derivative: it is linear, and its transpose is the pushforward,

    <ct, J t> = <Jᵀ ct, t>   for all ct   =>   J = (ct ↦ Jᵀ ct)ᵀ.

So the tangent is a `linear_map`: its transpose is the pullback of `jax.custom_vjp` as it stands, and the map itself the
transpose of that, which JAX derives only where a tangent is really evaluated. Reverse mode never meets it.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jax.experimental import io_callback
from jax.extend.core import jaxpr_as_fun

from jaxsoftmax._linear_map import linear_map

__all__ = ["custom_vjp"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")


class custom_vjp(Generic[P, R]):
    """`jax.custom_vjp` whose functions can also be differentiated in forward mode, and to any order.

    Reverse mode is that of `jax.custom_vjp`: it runs `bwd`, whatever `bwd` is made of. Forward mode applies the
    transpose of `bwd` to the tangents, found by `jax.linear_transpose` when, and only when, it is asked for; so it
    needs a `bwd` that is linear in the cotangent and transposes (no `while_loop`, no callback), or a rule of its own.
    Two conventions make the rule hold at every order: `fwd` calls the *decorated* function for its primal output, and
    `bwd` is made of differentiable (or again decorated) functions of the residuals. Only perturbed arguments are
    differentiated: integer arrays and arguments held constant are never touched. What stays in memory between the two
    passes is what `fwd` returns as residuals; everything `bwd` derives from them is computed again.
    (`jax.experimental.jet` carries no rule and fails at any function with one, `jax.nn.relu` too: nest `jax.jvp`.)

    Args:
      fun: function of positional arguments (keyword arguments are resolved through its signature), each a pytree of
        arrays, except at `nondiff_argnums`; returns a pytree of arrays.
      nondiff_argnums: positions of Python values, not arrays, handed to `fun` as they are.
      nondiff_argnames: names of further such arguments.

    Returns:
      The decorated function, with the signature of `fun`. Without `fun`, the decorator with these options:
      `@custom_vjp(nondiff_argnums=(1,))`.

    Raises:
      TypeError: if the function is called before `defvjp`, if `defvjp` gets something that is not callable, if `fwd`
        does not return a pair, if `bwd` returns something other than one cotangent per differentiable argument, each
        of that argument's structure and shape (or None for zero), or if forward mode meets a `bwd` that cannot be
        transposed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax.autodiff import custom_vjp
      >>> @custom_vjp
      ... def log1pexp(x):
      ...     return jnp.logaddexp(x, 0.0)
      >>> def fwd(x):
      ...     return log1pexp(x), x
      >>> def bwd(x, ct):
      ...     return (ct * jax.nn.sigmoid(x),)
      >>> log1pexp.defvjp(fwd, bwd)
      >>> print(jax.grad(log1pexp)(0.0), jax.jacfwd(log1pexp)(0.0), jax.hessian(log1pexp)(0.0))
      0.5 0.5 0.25

    Reference: https://github.com/jax-ml/jax/issues/3996 (jax.custom_vjp and forward mode).
    """

    @overload
    def __new__(
        cls, fun: Callable[P, R], nondiff_argnums: Sequence[int] = (), nondiff_argnames: Sequence[str] = ()
    ) -> "custom_vjp[P, R]": ...
    @overload
    def __new__(
        cls, *, nondiff_argnums: Sequence[int] = (), nondiff_argnames: Sequence[str] = ()
    ) -> "Callable[[Callable[Q, S]], custom_vjp[Q, S]]": ...
    def __new__(cls, fun: Any = None, nondiff_argnums=(), nondiff_argnames=()) -> Any:
        if fun is None:
            return functools.partial(cls, nondiff_argnums=nondiff_argnums, nondiff_argnames=nondiff_argnames)
        return super().__new__(cls)

    def __init__(
        self, fun: Callable[P, R], nondiff_argnums: Sequence[int] = (), nondiff_argnames: Sequence[str] = ()
    ) -> None:
        functools.update_wrapper(self, fun)
        self._nondiff = tuple(sorted({*nondiff_argnums, *_positions(fun, nondiff_argnames)}))
        self._has_rule = False
        self._jvp: Callable | None = None
        self._reverse = jax.custom_vjp(fun, nondiff_argnums=self._nondiff)
        self._both = jax.custom_jvp(fun, nondiff_argnums=self._nondiff)
        self._both.defjvp(self._rule, symbolic_zeros=True)

    def defvjp(
        self,
        fwd: Callable,
        bwd: Callable,
        symbolic_zeros: bool = False,
        optimize_remat: bool = False,
        jvp: Callable | None = None,
    ) -> None:
        """Attach the rule.

        Args:
          fwd: takes the arguments of the function, returns `(output, residuals)`.
          bwd: takes the `nondiff_argnums` values, the residuals and the output's cotangent; returns a tuple with one
            cotangent (or None) per differentiable argument, which is rounded where its argument is of a narrower
            dtype. Must be linear in the cotangent.
          symbolic_zeros: as in `jax.custom_vjp.defvjp`: each array that reaches `fwd` is an object with the
            attributes `value` and `perturbed`, so that a rule can leave out what nobody asks for; a cotangent that
            reaches `bwd` may be a `jax.custom_derivatives.SymbolicZero`.
          optimize_remat: as in `jax.custom_vjp.defvjp`.
          jvp: forward mode for a `bwd` that has no transpose, as `jax.custom_jvp.defjvp` takes it: gets the
            `nondiff_argnums` values, the primals and the tangents, returns the output and its tangent. It needs the
            primals, which are then kept between the passes of reverse mode too.
        """
        for name, rule in (("fwd", fwd), ("bwd", bwd), ("jvp", jvp)):
            if not (callable(rule) or rule is jvp is None):
                raise TypeError(f"defvjp: {name} must be a function, got {type(rule).__name__}")
        self._reverse.defvjp(
            self._checked_fwd(fwd), _as_the_arguments(bwd), symbolic_zeros, optimize_remat=optimize_remat
        )
        self._jvp = jvp
        self._has_rule = True

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self._has_rule:
            raise TypeError(f"{self._name} has no derivative rule: call {self._name}.defvjp(fwd, bwd) first")
        return self._both(*args, **kwargs)

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self: "custom_vjp[Concatenate[S, Q], R]", instance: S, owner: type | None = None) -> Callable[Q, R]: ...
    def __get__(self: Any, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    @property
    def _name(self) -> str:
        return getattr(self, "__name__", "this custom_vjp function")

    def _checked_fwd(self, fwd: Callable) -> Callable:
        @functools.wraps(fwd)
        def checked(*args) -> tuple:
            result = fwd(*args)
            if not (isinstance(result, tuple) and len(result) == 2):
                got = type(result).__name__
                raise TypeError(f"{self._name}: fwd must return the pair (output, residuals), got {got}")
            output, residuals = result
            arguments = [x for i, x in enumerate(args) if i not in self._nondiff]
            return output, (residuals, _Types(jax.tree.map(_type, arguments)))

        return checked

    def _rule(self, *args):
        """The tangent is a linear map, whose transpose is the pullback of `jax.custom_vjp` and runs `bwd`."""
        *static, primals, tangents = args
        primal_leaves, tree = jax.tree.flatten(tuple(primals))
        tangent_leaves = jax.tree.leaves(tuple(tangents), is_leaf=_is_symbolic_zero)
        perturbed = [i for i, t in enumerate(tangent_leaves) if _is_perturbed(t)]
        moving = [tangent_leaves[i] for i in perturbed]

        def of_perturbed(*leaves):
            merged = tree.unflatten(_replaced(primal_leaves, perturbed, leaves))
            return self._reverse(*_insert(self._nondiff, static, merged))

        out, linear = jax.linearize(of_perturbed, *(primal_leaves[i] for i in perturbed))
        out_leaves, out_tree = jax.tree.flatten(out)
        inexact = [i for i, x in enumerate(out_leaves) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
        in_types, out_types = list(map(jax.typeof, moving)), [jax.typeof(out_leaves[i]) for i in inexact]

        def back(residuals, cotangents):
            asked = [i for i, c in zip(inexact, cotangents) if c is not None]

            def push(*tangents):
                pushed = jax.tree.leaves(residuals[0](*tangents))
                return [pushed[i] for i in asked]

            return jax.linear_transpose(push, *in_types)([c for c in cotangents if c is not None])

        def forth(residuals, tangents):
            if self._jvp is None:
                return self._transposed(lambda *cotangents: back(residuals, cotangents), out_types, tangents)
            zeros = map(zero_from_primal, residuals[1])
            directions = tree.unflatten(_replaced(zeros, perturbed, tangents))
            _, pushed = self._jvp(*static, tree.unflatten(residuals[1]), directions)
            return [jax.tree.leaves(pushed)[i] for i in inexact]

        residuals = (linear,) if self._jvp is None else (linear, primal_leaves)
        pushed = linear_map(forth, back, residuals, moving, out_types)
        return out, out_tree.unflatten(_replaced(map(zero_from_primal, out_leaves), inexact, pushed))

    def _transposed(self, pullback: Callable, cotangent_types: list, tangents: Sequence) -> tuple:
        """The transpose of the pullback, at the tangents."""
        jaxpr = jax.make_jaxpr(pullback)(*cotangent_types)
        try:
            if any(isinstance(effect, _callback_effects()) for effect in jaxpr.effects):
                raise NotImplementedError("it calls back to Python")
            return jax.linear_transpose(jaxpr_as_fun(jaxpr), *cotangent_types)(list(tangents))
        except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
            reason = str(error) or "it is not linear in the cotangent"
            raise TypeError(
                f"{self._name}: forward mode (jvp, jacfwd, hessian) needs the transpose of bwd, which has none: "
                f"{reason}. Make bwd linear in the cotangent, of operations that transpose (a loop of fixed length for "
                "lax.while_loop, .at[].add for .at[].set, no callbacks), or give a rule for forward mode as well: "
                "defvjp(fwd, bwd, jvp=...)."
            ) from error


@functools.cache
def _callback_effects() -> tuple[type, ...]:
    """The types of the effects by which a jaxpr says that it calls back to Python."""

    def calls():
        for ordered in (False, True):
            jax.debug.callback(lambda: None, ordered=ordered)
            io_callback(lambda: None, None, ordered=ordered)

    return tuple({type(effect) for effect in jax.make_jaxpr(calls)().effects})


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Types:
    """The type of each array among the arguments."""

    of_arguments: list

    def __hash__(self):
        return hash(tuple(jax.tree.leaves(self.of_arguments)))


def _type(x):
    x = getattr(x, "value", x)  # of fwd's arguments under symbolic_zeros
    return x.aval if _is_symbolic_zero(x) else jax.typeof(x)


def varying_axes(kind) -> frozenset[str]:
    """The axes of a `shard_map` that arrays of this type vary over."""
    kind = getattr(kind, "manual_axis_type", kind)  # where it is kept since JAX 0.10
    return getattr(kind, "varying", getattr(kind, "vma", frozenset()))


def _spec(kind) -> tuple:
    """The axes of type Explicit that split arrays of this type."""
    return tuple(getattr(getattr(kind, "sharding", None), "spec", ()))


def _as_the_arguments(bwd: Callable) -> Callable:
    """`bwd` with cotangents of the arguments' own dtypes, that lie on a mesh as the arguments do.

    Under `shard_map`, an argument that is the same on every device gets the sum of their cotangents.
    """

    def total(kind, cotangent):
        if _is_symbolic_zero(cotangent):
            return cotangent
        own = _type(cotangent)
        if extra := tuple(varying_axes(own) - varying_axes(kind)):
            cotangent = jax.lax.psum(cotangent, extra)
        if own.shape == kind.shape and _spec(own) != _spec(kind):
            cotangent = jax.sharding.reshard(cotangent, kind.sharding)
        narrower = own.dtype != kind.dtype and jnp.issubdtype(kind.dtype, jnp.floating)
        return cotangent.astype(kind.dtype) if narrower else cotangent

    @functools.wraps(bwd)
    def rounded(*args):
        *static, (residuals, types), ct = args
        cotangents = bwd(*static, residuals, ct)
        if not (isinstance(cotangents, tuple) and len(cotangents) == len(types.of_arguments)):
            return cotangents  # JAX says so
        fits = [jax.tree.structure(a) == jax.tree.structure(c) for a, c in zip(types.of_arguments, cotangents)]
        pairs = zip(fits, types.of_arguments, cotangents)
        return tuple(jax.tree.map(total, a, c) if fit else c for fit, a, c in pairs)

    return rounded


def _positions(fun: Callable, names: Sequence[str]) -> list[int]:
    known = list(inspect.signature(fun).parameters) if names else []
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"nondiff_argnames has {unknown}, but the arguments are {known}")
    return [known.index(name) for name in names]


def _is_symbolic_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _is_perturbed(tangent: Any) -> bool:
    return not _is_symbolic_zero(tangent) and getattr(tangent, "dtype", None) != jax.dtypes.float0


def _replaced(items: Iterable, positions: Sequence[int], values: Sequence) -> list:
    """`items` with `values` at `positions`."""
    values_at = dict(zip(positions, values))
    return [values_at.get(i, item) for i, item in enumerate(items)]


def _insert(positions, values, args) -> list:
    """The full argument list: `values` at `positions`, `args` in the places between."""
    merged = list(args)
    for i, value in sorted(zip(positions, values), key=lambda pair: pair[0]):
        merged.insert(i, value)
    return merged
