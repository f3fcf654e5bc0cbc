"""One rule, both autodiff modes, every order.

`jax.custom_vjp` refuses forward mode, though a pullback holds the whole derivative: it is linear, and its transpose is
the pushforward,

    <ct, J t> = <Jᵀ ct, t>   for all ct   =>   J = (ct ↦ Jᵀ ct)ᵀ.

So a call here is a `jax.custom_jvp`, whose rule runs `fwd` and says that the tangent is a `linear_map` of the
arguments' tangents. Back, that map is `bwd` as it stands, which is all that reverse mode runs. Forth, it is the
transpose of `bwd`, which JAX derives where a tangent is really evaluated, and nowhere else.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero, custom_vjp_primal_tree_values, zero_from_primal
from jax.interpreters import ad

from jaxsoftmax._linear_map import linear_map
from jaxsoftmax._transpose import closed, holds_a_tracer, transposed

__all__ = ["custom_vjp"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")
_ANY_ARGUMENTS = inspect.signature(lambda *args: args)
_INTO_THE_JAXPR: Any = getattr(getattr(jax, "Inline", None), "JAX_EARLY", True)  # True before JAX 0.12


class custom_vjp(jax.custom_vjp, Generic[P, R]):
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
      >>> log1pexp.defvjp(None, lambda residuals, ct: (ct * jax.nn.sigmoid(*residuals),))
      >>> print(jax.grad(log1pexp)(0.0), jax.jacfwd(log1pexp)(0.0), jax.hessian(log1pexp)(0.0))
      0.5 0.5 0.25

    Reference: https://github.com/jax-ml/jax/issues/3996 (jax.custom_vjp and forward mode).
    """

    fwd: Any
    bwd: Any
    jvp: Any
    with_logs = with_accums = False  # whether bwd does more than return cotangents: set by JAX, where it has that

    @overload
    def __new__(
        cls, fun: Callable[P, R], nondiff_argnums: Sequence[int] = (), nondiff_argnames: Sequence[str] = ()
    ) -> "custom_vjp[P, R]": ...
    @overload
    def __new__(
        cls, *, nondiff_argnums: Sequence[int] = (), nondiff_argnames: Sequence[str] = ()
    ) -> "Callable[[Callable[Q, S]], custom_vjp[Q, S]]": ...
    def __new__(cls, fun: Any = None, nondiff_argnums=(), nondiff_argnames=()) -> Any:
        if fun is None and (nondiff_argnums or nondiff_argnames):
            return functools.partial(cls, nondiff_argnums=nondiff_argnums, nondiff_argnames=nondiff_argnames)
        return object.__new__(cls)

    def __init__(
        self, fun: Callable[P, R], nondiff_argnums: Sequence[int] = (), nondiff_argnames: Sequence[str] = ()
    ) -> None:
        self._signature = inspect.signature(fun)
        known = list(self._signature.parameters)
        if unknown := [name for name in nondiff_argnames if name not in known]:
            raise ValueError(f"nondiff_argnames has {unknown}, but the arguments are {known}")
        super().__init__(fun, tuple(sorted({*nondiff_argnums, *map(known.index, nondiff_argnames)})))
        self._static_names = [name for i, name in enumerate(known) if i in self.nondiff_argnums]
        self._without_refs: set[tuple] = set()  # for which types, and values of nondiff_argnums, that is known

    def defvjp(
        self, fwd: Callable | None, bwd: Callable, *options, jvp: Callable | None = None, **more_options
    ) -> None:
        """Attach the rule.

        Args:
          fwd: takes the arguments of the function, returns `(output, residuals)`. None if the residuals are the
            arguments, a tuple without the `nondiff_argnums` values.
          bwd: takes the `nondiff_argnums` values, the residuals and the output's cotangent; returns a tuple with one
            cotangent (or None) per differentiable argument, which is rounded where its argument is of a narrower
            dtype. Must be linear in the cotangent.
          options: `symbolic_zeros` and `optimize_remat`, as in `jax.custom_vjp.defvjp`.
          jvp: forward mode for a `bwd` that has no transpose, as `jax.custom_jvp.defjvp` takes it: gets the
            `nondiff_argnums` values, the primals and the tangents, returns the output and its tangent. It needs the
            primals, which are then kept between the passes of reverse mode too.
        """
        for name, rule in (("fwd", fwd), ("bwd", bwd), ("jvp", jvp)):
            if not (callable(rule) or rule is None and name != "bwd"):
                raise TypeError(f"defvjp: {name} must be a function, got {type(rule).__name__}")
        super().defvjp(fwd or self._keep_arguments, bwd, *options, **more_options)
        primal: Any = functools.wraps(self.fun)(lambda *args: self._primal(args))
        rule: Any = lambda *args: self._rule(*args)
        primal.__signature__, rule.__signature__ = self._signature, _ANY_ARGUMENTS  # which JAX asks for at every call
        rule.__name__ = _name(self.fwd)  # in JAX's messages
        self.jvp, self._call = jvp, jax.custom_jvp(primal, nondiff_argnums=self.nondiff_argnums)
        self._call.defjvp(rule, symbolic_zeros=True)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        static = [x for i, x in enumerate(args) if i in self.nondiff_argnums]
        static += [kwargs[name] for name in self._static_names if name in kwargs]
        traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(static))
        refs = any(isinstance(x, getattr(jax, "Ref", ())) for x in jax.tree.leaves((args, kwargs)))
        if not self.fwd or traced or refs or self.with_logs or self.with_accums:
            return super().__call__(*args, **kwargs)  # JAX says what is wrong, or has reverse mode alone
        return self._call(*args, **kwargs)

    def _primal(self, args):
        static = {i: args[i] for i in self.nondiff_argnums}
        leaves, tree = jax.tree.flatten(tuple(x for i, x in enumerate(args) if i not in static))
        if not all(isinstance(x, Tracer) for x in leaves):
            return self.fun(*args)
        key = _hashable(tree), *map(jax.typeof, leaves), *map(_hashable, static.values())
        if key in self._without_refs:
            return self.fun(*args)
        run = jax.jit(lambda *leaves: self.fun(*_merged(static, tree.unflatten(leaves))), inline=_INTO_THE_JAXPR)
        traced = run.trace(*leaves)
        if traced.jaxpr.effects.isdisjoint(_effects_of_refs()):
            self._without_refs.add(key)
            return run(*leaves)
        # A custom_jvp whose jaxpr has refs inside cannot be compiled; a primitive that hides them can.
        types = jax.tree.structure(traced.out_info).unflatten(traced.jaxpr.out_avals)
        return linear_map(lambda given, _: run(*given), lambda *_: (), leaves, (), types)

    def _rule(self, *args):
        *values, primals, tangents = args
        static, tangents = dict(zip(self.nondiff_argnums, values)), jax.tree.leaves(tangents)
        leaves, tree = jax.tree.flatten(primals)
        zero_tangents = [t if isinstance(t, SymbolicZero) else None for t in tangents]
        moving = [i for i, zero in enumerate(zero_tangents) if zero is None]
        out, residuals, bwd = self._run_fwd(static, tree, leaves, moving)
        out_leaves, out_tree = jax.tree.flatten(out)
        zeros = zero_from_primal(out_leaves, symbolic_zeros=True)
        differentiable = [i for i, zero in enumerate(zeros) if zero.aval.dtype != jax.dtypes.float0]
        in_types, out_types = [jax.typeof(tangents[i]) for i in moving], [zeros[i].aval for i in differentiable]

        def pull(residuals, cotangents):
            cotangents = _replaced(zeros, differentiable, cotangents)
            if not self.symbolic_zeros:
                cotangents = map(_instantiated, cotangents)
            found = self._spread(bwd(residuals, out_tree.unflatten(cotangents)), tree)
            return [self._typed(kind, found[i], tree, i) for kind, i in zip(in_types, moving)]

        def push(leaves, moved):
            along = tree.unflatten(map(_instantiated, _replaced(zero_tangents, moving, moved)))
            pushed = self.jvp(*values, tree.unflatten(leaves), along)[1]
            return [jax.tree.leaves(pushed)[i] for i in differentiable]

        one_way, given, types = (push, leaves, in_types) if self.jvp else (pull, residuals, out_types)
        if holds_a_tracer([self.bwd, self.jvp, static], set()):
            one_way, given = closed(one_way, given, types)
        kept = [residuals] if given is residuals else [residuals, given]

        def forth(kept, moved):
            if self.jvp:
                return one_way(kept[-1], moved)
            return transposed(one_way, kept[-1], out_types, moved, _name(self.fun))

        back = lambda kept, cotangents: pull(kept[0], cotangents)
        mapped = linear_map(forth, back, kept, [tangents[i] for i in moving], out_types) if moving else []
        return out, out_tree.unflatten(_replaced(zeros, differentiable, mapped))

    def _run_fwd(self, static, tree, leaves, moving):
        """The output, the residuals, and `bwd` as a function of them and the cotangents."""
        if self.optimize_remat:
            function = lambda *arguments: super(custom_vjp, self).__call__(*_merged(static, arguments))
            return *jax.vjp(function, *tree.unflatten(leaves)), lambda pullback, cotangents: pullback(cotangents)
        if self.symbolic_zeros:
            leaves = [CustomVJPPrimal(x, i in moving) for i, x in enumerate(leaves)]
        pair = self.fwd(*_merged(static, tree.unflatten(leaves)))
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise TypeError(
                f"Custom VJP fwd rule {_name(self.fwd)} for function {_name(self.fun)} must produce a pair "
                f"(output, residuals), got {type(pair).__name__}"
            )
        return *pair, functools.partial(self.bwd, *static.values())

    def _spread(self, found, tree) -> list:
        """What `bwd` returned, for each array among the arguments: a cotangent or None."""
        flat, none = [], lambda x: x is None
        try:
            if not isinstance(found, (tuple, list)):
                raise ValueError
            each = lambda cotangent, argument: flat.extend([cotangent] * len(jax.tree.leaves(argument))) or 0
            jax.tree.map(each, tuple(found), tree.unflatten(range(tree.num_leaves)), is_leaf=none)
        except ValueError:
            raise TypeError(
                f"Custom VJP bwd rule {_name(self.bwd)} for function {_name(self.fun)} must produce a tuple with the "
                f"cotangent of each argument, None or of its structure, got {jax.tree.structure(found)} for {tree}"
            ) from None
        return flat

    def _typed(self, kind, cotangent, tree, i: int):
        """The cotangent in the type of its argument: its dtype, its axes on a mesh (a sum, if all devices share it)."""
        zero = type(cotangent) in (SymbolicZero, type(None))
        own: Any = getattr(cotangent, "aval", kind) if zero else jax.typeof(cotangent)
        if own.shape != kind.shape:
            path = jax.tree_util.tree_leaves_with_path(tree.unflatten(range(tree.num_leaves)))[i][0]
            raise ValueError(
                f"Custom VJP bwd rule {_name(self.bwd)} for function {_name(self.fun)} must produce cotangents of the "
                f"arguments' shapes, but at output{jax.tree_util.keystr(path)} the bwd rule produced an output of type "
                f"{own.str_short()} for an argument of type {kind.str_short()}. Consider just returning a None here if "
                "it is zero."
            )
        if zero or own.dtype == jax.dtypes.float0:
            return ad.instantiate_zeros(ad.Zero(kind))
        if extra := tuple(varying_axes(own) - varying_axes(kind)):
            cotangent = jax.lax.psum(cotangent, extra)
        if own.sharding.spec != kind.sharding.spec:
            cotangent = jax.sharding.reshard(cotangent, kind.sharding)
        rounds = own.dtype != kind.dtype and jnp.issubdtype(kind.dtype, jnp.floating)
        return jax.lax.convert_element_type(cotangent, kind.dtype) if rounds else cotangent

    def _keep_arguments(self, *args):
        """`fwd` of a rule whose residuals are the arguments."""
        values = custom_vjp_primal_tree_values if self.symbolic_zeros else lambda x: x
        args = [x if i in self.nondiff_argnums else values(x) for i, x in enumerate(args)]
        return self(*args), tuple(x for i, x in enumerate(args) if i not in self.nondiff_argnums)

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self: "custom_vjp[Concatenate[S, Q], R]", instance: S, owner: type | None = None) -> Callable[Q, R]: ...
    def __get__(self: Any, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)


@functools.cache
def _effects_of_refs():
    return jax.make_jaxpr(lambda: jax.new_ref(0.0)[...])().effects if hasattr(jax, "new_ref") else frozenset()


def _hashable(value):
    """The value, or its text where it has no hash."""
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def _name(function) -> str:
    return getattr(function, "__name__", str(function))


def _instantiated(x):
    return ad.instantiate_zeros(ad.Zero(x.aval)) if isinstance(x, SymbolicZero) else x


def varying_axes(kind) -> frozenset[str]:
    """The axes of a `shard_map` that arrays of this type vary over."""
    kind = getattr(kind, "manual_axis_type", kind)  # where it is kept since JAX 0.10
    return getattr(kind, "varying", getattr(kind, "vma", frozenset()))


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
