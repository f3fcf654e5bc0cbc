"""One rule, both autodiff modes, every order.

A function with a `jax.custom_vjp` refuses forward mode. The decorator here has the same interface and keeps both modes,
because a pullback already holds the whole derivative: it is linear, and its transpose is the pushforward,

    <ct, J t> = <Jᵀ ct, t>   for all ct   =>   J = (ct ↦ Jᵀ ct)ᵀ.

So a call is a `jax.custom_jvp`, whose rule runs `fwd` and makes the tangent a `linear_map`: back it is `bwd` as it
stands, and forth the transpose of `bwd`, which JAX derives only where a tangent is really evaluated. Reverse mode never
meets it.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero, custom_vjp_primal_tree_values, zero_from_primal
from jax.extend.core import jaxpr_as_fun
from jax.interpreters import ad

from jaxsoftmax._linear_map import linear_map
from jaxsoftmax._transpose import closed, holds_a_tracer, transposed

__all__ = ["custom_vjp"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")


class custom_vjp(Generic[P, R]):
    """`jax.custom_vjp` whose functions can also be differentiated in forward mode, and to any order.

    Reverse mode runs `bwd`, whatever `bwd` is made of. Forward mode applies its transpose to the tangents, and needs a
    `bwd` that is linear in the cotangent and made of what transposes (no `while_loop`, no callback), or a rule of its
    own. The rule holds at every order if `fwd` calls the *decorated* function for its output and `bwd` is made of
    differentiable (or again decorated) functions of the residuals, which are all that is kept between the two passes.
    Functions of a `jax.Ref` have reverse mode alone. (`jax.experimental.jet` fails at every rule: nest `jax.jvp`.)

    Args:
      fun: function of positional arguments (keyword arguments are resolved through its signature), each a pytree of
        arrays, except at `nondiff_argnums`; returns a pytree of arrays.
      nondiff_argnums: positions of Python values, not arrays, handed to `fun` as they are.
      nondiff_argnames: names of further such arguments.

    Returns:
      The decorated function. Without `fun`, the decorator with these options: `@custom_vjp(nondiff_argnums=(1,))`.

    Raises:
      AttributeError: if the function is called before `defvjp`.
      TypeError, ValueError: if a rule does not return what `defvjp` says, and where forward mode meets a `bwd` without
        a transpose.

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

    def __getnewargs__(self):  # of copies and pickles
        return (self.fun,)

    def __init__(
        self, fun: Callable[P, R], nondiff_argnums: Sequence[int] = (), nondiff_argnames: Sequence[str] = ()
    ) -> None:
        functools.update_wrapper(self, fun)
        known = list(inspect.signature(fun).parameters) if nondiff_argnames else []
        if unknown := [name for name in nondiff_argnames if name not in known]:
            raise ValueError(f"nondiff_argnames has {unknown}, but the arguments are {known}")
        self.fun = fun
        self.fwd: Any = None
        self.bwd: Any = None
        self.jvp: Any = None
        self.nondiff_argnums = tuple(sorted({*nondiff_argnums, *map(known.index, nondiff_argnames)}))
        self.symbolic_zeros = self.optimize_remat = self.with_logs = False
        self._without_refs: set[str] = set()  # for which values of nondiff_argnums that is known

    def defvjp(
        self,
        fwd: Callable | None,
        bwd: Callable,
        symbolic_zeros: bool = False,
        optimize_remat: bool = False,
        jvp: Callable | None = None,
    ) -> None:
        """Attach the rule.

        Args:
          fwd: takes the arguments of the function, returns `(output, residuals)`. None if the residuals are the
            arguments, a tuple without the `nondiff_argnums` values.
          bwd: takes the `nondiff_argnums` values, the residuals and the output's cotangent; returns a tuple with one
            cotangent (or None) per differentiable argument, which is rounded where its argument is of a narrower
            dtype. Must be linear in the cotangent.
          symbolic_zeros, optimize_remat: as in `jax.custom_vjp.defvjp`.
          jvp: forward mode for a `bwd` that has no transpose, as `jax.custom_jvp.defjvp` takes it: gets the
            `nondiff_argnums` values, the primals and the tangents, returns the output and its tangent. It needs the
            primals, which are then kept between the passes of reverse mode too.
        """
        for name, rule in (("fwd", fwd), ("bwd", bwd), ("jvp", jvp)):
            if not (callable(rule) or rule is None and name != "bwd"):
                raise TypeError(f"defvjp: {name} must be a function, got {type(rule).__name__}")
        self.fwd, self.bwd, self.jvp = fwd or self._keep_arguments, bwd, jvp
        self.symbolic_zeros, self.optimize_remat, self.with_logs = symbolic_zeros, optimize_remat, False

    def defvjp_with_logs(self, fwd: Callable, bwd: Callable, **options) -> None:
        """`jax.custom_vjp.defvjp_with_logs`, where JAX has it: reverse mode alone."""
        self.defvjp(fwd, bwd, **options)
        self.with_logs = True

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.fwd is None:
            raise AttributeError(f"No VJP defined for custom_vjp function {_name(self.fun)} using defvjp.")
        every = self._positional(args, kwargs)
        static = {i: every[i] for i in self.nondiff_argnums}
        leaves, tree = jax.tree.flatten(tuple(x for i, x in enumerate(every) if i not in static))
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(static)):
            raise jax.errors.UnexpectedTracerError(
                f"custom_vjp function {_name(self.fun)}: there is a traced array among its nondiff_argnums "
                f"{self.nondiff_argnums}, which are for functions and other Python values. Make it an argument of its "
                "own, for which bwd may return None."
            )
        if self.with_logs or any(isinstance(x, getattr(jax, "Ref", ())) for x in leaves):
            return self._of_jax()(*every)

        def run(*leaves):
            return self.fun(*_merged(static, tree.unflatten(leaves)))

        def primal(*leaves):
            if str(static) in self._without_refs or not all(isinstance(x, Tracer) for x in leaves):
                return run(*leaves)
            jaxpr, out = jax.make_jaxpr(run, return_shape=True)(*leaves)
            flat, tree = jaxpr_as_fun(jaxpr), jax.tree.structure(out)
            if jaxpr.effects.isdisjoint(_effects_of_refs()):
                self._without_refs.add(str(static))
                return tree.unflatten(flat(*leaves))
            # A custom_jvp whose jaxpr has refs inside cannot be compiled; a primitive that hides them can.
            hidden = linear_map(lambda leaves, _: flat(*leaves), lambda *_: (), leaves, (), jaxpr.out_avals)
            return tree.unflatten(hidden)

        def rule(primals, tangents):
            return self._rule(static, tree, primals, tangents)

        primal.__name__, rule.__name__ = _name(self.fun), _name(self.fwd)  # what JAX's messages say
        call = jax.custom_jvp(primal)
        call.defjvp(rule, symbolic_zeros=True)
        return call(*leaves)

    def _rule(self, static: dict[int, Any], tree, primals, tangents):
        moving = [i for i, t in enumerate(tangents) if not (isinstance(t, SymbolicZero) or _is_float0(t))]
        out, residuals = self._run_fwd(static, tree, primals, moving)
        out_leaves, out_tree = jax.tree.flatten(out)
        no_tangents = zero_from_primal(out_leaves, symbolic_zeros=True)
        inexact = [i for i, zero in enumerate(no_tangents) if not _is_float0(zero)]
        in_types = [jax.typeof(tangents[i]) for i in moving]
        out_types = [no_tangents[i].aval for i in inexact]

        def pull(residuals, cotangents):
            cotangents = _replaced(no_tangents, inexact, cotangents)
            if not self.symbolic_zeros:
                cotangents = map(_instantiated, cotangents)
            found = self._run_bwd(static, tree, residuals, out_tree.unflatten(cotangents))
            return [_typed(kind, *found[i]) for kind, i in zip(in_types, moving)]

        def push(primals, tangents):
            along = map(_instantiated, _replaced(zero_from_primal(primals, symbolic_zeros=True), moving, tangents))
            pushed = self.jvp(*static.values(), tree.unflatten(primals), tree.unflatten(along))[1]
            return [jax.tree.leaves(pushed)[i] for i in inexact]

        one_way, given, types = (push, list(primals), in_types) if self.jvp else (pull, residuals, out_types)
        if holds_a_tracer([self.bwd, self.jvp, static], set()):
            one_way, given = closed(one_way, given, types)
        kept = [residuals] if given is residuals else [residuals, given]

        def forth(kept, tangents):
            if self.jvp:
                return one_way(kept[-1], tangents)
            return transposed(one_way, kept[-1], out_types, tangents, _name(self.fun))

        def back(kept, cotangents):
            return pull(kept[0], cotangents)

        mapped = linear_map(forth, back, kept, [tangents[i] for i in moving], out_types) if moving else []
        return out, out_tree.unflatten(_replaced(no_tangents, inexact, mapped))

    def _run_fwd(self, static, tree, primals, moving):
        given = [CustomVJPPrimal(x, i in moving) for i, x in enumerate(primals)]
        arguments = tree.unflatten(given if self.symbolic_zeros else primals)
        if self.optimize_remat:
            return jax.vjp(lambda *arguments: self._of_jax()(*_merged(static, arguments)), *arguments)
        pair = self.fwd(*_merged(static, arguments))
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise TypeError(
                f"Custom VJP fwd rule {_name(self.fwd)} for function {_name(self.fun)} must produce a pair "
                f"(output, residuals), got {type(pair).__name__}"
            )
        return pair

    def _run_bwd(self, static, tree, residuals, cotangents) -> list[tuple]:
        """For each array among the arguments a cotangent, or None, and where it stands in what `bwd` returns."""
        pullback = residuals if self.optimize_remat else functools.partial(self.bwd, *static.values(), residuals)
        found = pullback(cotangents)
        flat, arguments = [], tree.unflatten(range(tree.num_leaves))

        def spread(cotangent, argument):
            flat.extend([cotangent] * len(jax.tree.leaves(argument)))
            return cotangent

        try:
            if not isinstance(found, (tuple, list)):
                raise ValueError
            jax.tree.map(spread, tuple(found), arguments, is_leaf=lambda x: x is None)
        except ValueError:
            raise TypeError(
                f"Custom VJP bwd rule {_name(self.bwd)} for function {_name(self.fun)} must produce a tuple with the "
                f"cotangent of each argument, None or of its structure, got {jax.tree.structure(found)} for {tree}"
            ) from None
        paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(arguments))
        return list(zip(flat, map(jax.tree_util.keystr, paths)))

    def _of_jax(self) -> Callable:
        """The same rule for reverse mode alone."""
        function: Any = jax.custom_vjp(self.fun, nondiff_argnums=self.nondiff_argnums)
        define = function.defvjp_with_logs if self.with_logs else function.defvjp
        define(self.fwd, self.bwd, symbolic_zeros=self.symbolic_zeros, optimize_remat=self.optimize_remat)
        return function

    def _keep_arguments(self, *args):
        """`fwd` of a rule whose residuals are the arguments."""
        values = custom_vjp_primal_tree_values if self.symbolic_zeros else lambda x: x
        args = [x if i in self.nondiff_argnums else values(x) for i, x in enumerate(args)]
        return self(*args), tuple(x for i, x in enumerate(args) if i not in self.nondiff_argnums)

    def _positional(self, args, kwargs) -> tuple:
        try:
            bound = inspect.signature(self.fun).bind(*args, **kwargs)
            bound.apply_defaults()
            if bound.kwargs:
                names = ", ".join(bound.kwargs)
                raise TypeError(f"The following keyword arguments could not be resolved to positions: {names}")
        except TypeError as error:
            raise TypeError(f"custom_vjp function {_name(self.fun)}: {error}") from error
        return bound.args

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self: "custom_vjp[Concatenate[S, Q], R]", instance: S, owner: type | None = None) -> Callable[Q, R]: ...
    def __get__(self: Any, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)


def _typed(kind, cotangent, name: str):
    """A cotangent of the type of its argument: its dtype, its axes on a mesh (a sum, where it is the same on all)."""
    zero = ad.Zero(kind)
    if cotangent is None:
        return ad.instantiate_zeros(zero)
    own: Any = cotangent.aval if isinstance(cotangent, SymbolicZero) else jax.typeof(cotangent)
    if own.shape != kind.shape:
        raise ValueError(
            f"Custom VJP bwd rule must produce cotangents of the arguments' shapes, but at output{name} the bwd rule "
            f"produced an output of type {own.str_short()} for an argument of type {kind.str_short()}. Consider just "
            "returning a None here if it is zero."
        )
    if isinstance(cotangent, SymbolicZero) or _is_float0(cotangent):
        return ad.instantiate_zeros(zero)
    if extra := tuple(varying_axes(own) - varying_axes(kind)):
        cotangent = jax.lax.psum(cotangent, extra)
    if _spec(own) != _spec(kind):
        cotangent = jax.sharding.reshard(cotangent, kind.sharding)
    rounds = own.dtype != kind.dtype and jnp.issubdtype(kind.dtype, jnp.floating)
    return jax.lax.convert_element_type(cotangent, kind.dtype) if rounds else cotangent


@functools.cache
def _effects_of_refs():
    return jax.make_jaxpr(lambda: jax.new_ref(0.0)[...])().effects if hasattr(jax, "new_ref") else frozenset()


def _is_float0(x) -> bool:
    return getattr(x, "dtype", None) == jax.dtypes.float0


def _name(function) -> str:
    return getattr(function, "__name__", str(function))


def _instantiated(x):
    return ad.instantiate_zeros(ad.Zero(x.aval)) if isinstance(x, SymbolicZero) else x


def varying_axes(kind) -> frozenset[str]:
    """The axes of a `shard_map` that arrays of this type vary over."""
    kind = getattr(kind, "manual_axis_type", kind)  # where it is kept since JAX 0.10
    return getattr(kind, "varying", getattr(kind, "vma", frozenset()))


def _spec(kind) -> tuple:
    """The axes of type Explicit that split arrays of this type."""
    return tuple(getattr(getattr(kind, "sharding", None), "spec", ()))


def _replaced(items: Iterable, places: Iterable[int], values: Iterable) -> list:
    """`items` with the values at these places, None for none."""
    new = {i: value for i, value in zip(places, values) if value is not None}
    return [new.get(i, item) for i, item in enumerate(items)]


def _merged(static: dict[int, Any], arguments: Iterable) -> list:
    """All arguments, those of `nondiff_argnums` at their positions."""
    merged = list(arguments)
    for i in sorted(static):
        merged.insert(i, static[i])
    return merged
