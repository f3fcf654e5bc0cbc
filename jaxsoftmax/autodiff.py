"""One rule, both autodiff modes, every order.

`jax.custom_vjp` is the natural place for a closed-form derivative, but a function that carries one refuses forward
mode: `jax.jvp`, `jax.jacfwd` and `jax.hessian` raise TypeError. The decorator here has the same interface and keeps
both modes, because a pullback already holds the whole derivative: it is linear, and its transpose is the pushforward,

    <ct, J t> = <Jᵀ ct, t>   for all ct   =>   J = (ct ↦ Jᵀ ct)ᵀ.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

__all__ = ["custom_vjp"]


class custom_vjp:
    """`jax.custom_vjp` whose functions can also be differentiated in forward mode, and to any order.

    Reverse mode runs `bwd`. Forward mode applies the transpose of `bwd` to the tangents, found by
    `jax.linear_transpose`; differentiating that once more in reverse mode leads back to `bwd`. Two conventions make
    the rule hold at every order: `fwd` calls the *decorated* function for its primal output, and `bwd` is made of
    differentiable (or again decorated) functions of the residuals. Only perturbed arguments are differentiated:
    integer arrays and arguments held constant are never touched. What stays in memory between the two passes is
    what `fwd` returns as residuals; everything `bwd` derives from them is computed again.

    Args:
      fun: function of positional arguments (keyword arguments are resolved through its signature), each a pytree of
        arrays, except at `nondiff_argnums`; returns a pytree of arrays.
      nondiff_argnums: positions of Python values, not arrays, handed to `fun` as they are.

    Raises:
      TypeError: if the function is called before `defvjp`, if `defvjp` gets something that is not callable, if `fwd`
        does not return a pair, or if `bwd` returns something other than one cotangent per differentiable argument,
        each of that argument's structure and shape (or None for zero).

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

    def __init__(self, fun: Callable, nondiff_argnums: Sequence[int] = ()):
        functools.update_wrapper(self, fun)
        self._nondiff = tuple(nondiff_argnums)
        self._has_rule = False
        self._reverse = jax.custom_vjp(fun, nondiff_argnums=self._nondiff)

        @functools.wraps(fun)
        def primal(*args):
            return self._reverse(*args)

        self._both = jax.custom_jvp(primal, nondiff_argnums=self._nondiff)
        self._both.defjvp(self._pushforward, symbolic_zeros=True)

    def defvjp(self, fwd: Callable, bwd: Callable, symbolic_zeros: bool = False) -> None:
        """Attach the rule.

        Args:
          fwd: takes the arguments of the function, returns `(output, residuals)`.
          bwd: takes the `nondiff_argnums` values, the residuals and the output's cotangent; returns a tuple with one
            cotangent (or None) per differentiable argument. Must be linear in the cotangent.
          symbolic_zeros: as in `jax.custom_vjp.defvjp`: each array that reaches `fwd` is an object with the
            attributes `value` and `perturbed`, so that a rule can leave out what nobody asks for.
        """
        for name, rule in (("fwd", fwd), ("bwd", bwd)):
            if not callable(rule):
                raise TypeError(f"defvjp: {name} must be a function, got {type(rule).__name__}")
        self._reverse.defvjp(self._checked_fwd(fwd), _summed_over_the_mesh(bwd), symbolic_zeros=symbolic_zeros)
        self._has_rule = True

    def __call__(self, *args, **kwargs):
        if not self._has_rule:
            raise TypeError(f"{self._name} has no derivative rule: call {self._name}.defvjp(fwd, bwd) first")
        return self._both(*args, **kwargs)

    def __get__(self, instance, owner=None):
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
            return output, (residuals, _MeshAxes(jax.tree.map(_mesh_axes, arguments)))

        return checked

    def _pushforward(self, *args):
        *static, primals, tangents = args
        primal_leaves, tree = jax.tree.flatten(tuple(primals))
        tangent_leaves = jax.tree.leaves(tuple(tangents), is_leaf=_is_symbolic_zero)
        perturbed = [i for i, t in enumerate(tangent_leaves) if _is_perturbed(t)]

        def of_perturbed(*leaves):
            merged = list(primal_leaves)
            for i, leaf in zip(perturbed, leaves):
                merged[i] = leaf
            return self._reverse(*_insert(self._nondiff, static, jax.tree.unflatten(tree, merged)))

        out, pullback = jax.vjp(of_perturbed, *(primal_leaves[i] for i in perturbed))
        out_leaves, out_tree = jax.tree.flatten(out)
        inexact = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in out_leaves]

        examples = [x for x, f in zip(out_leaves, inexact) if f]  # their types, the mesh axes they vary over included

        # jax.checkpoint: whatever bwd computes from the residuals is recomputed, not saved beside them.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def push(pullback, tangents):
            def pull(cotangents):
                cotangents = iter(cotangents)
                leaves = [next(cotangents) if f else _float0_zeros(x) for x, f in zip(out_leaves, inexact)]
                return pullback(jax.tree.unflatten(out_tree, leaves))

            return jax.linear_transpose(pull, examples)(tangents)[0]

        pushed = iter(push(pullback, tuple(tangent_leaves[i] for i in perturbed)))
        tangent_out = [next(pushed) if f else _float0_zeros(x) for x, f in zip(out_leaves, inexact)]
        return out, jax.tree.unflatten(out_tree, tangent_out)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _MeshAxes:
    """For each array among the arguments, the axes of a `shard_map` that it varies over."""

    of_arguments: list

    def __hash__(self):
        return hash(tuple(jax.tree.leaves(self.of_arguments)))


def _mesh_axes(x) -> frozenset[str]:
    kind = jax.typeof(getattr(x, "value", x))
    kind = getattr(kind, "manual_axis_type", kind)  # where it is kept since JAX 0.10
    return getattr(kind, "varying", getattr(kind, "vma", frozenset()))


def _summed_over_the_mesh(bwd: Callable) -> Callable:
    """`bwd` under `shard_map`: an argument that is the same on every device gets the sum of their cotangents."""

    def total(axes, cotangent):
        extra = () if cotangent is None else tuple(_mesh_axes(cotangent) - axes)
        return jax.lax.psum(cotangent, extra) if extra else cotangent

    @functools.wraps(bwd)
    def summed(*args):
        *static, (residuals, axes), ct = args
        cotangents = bwd(*static, residuals, ct)
        fits = isinstance(cotangents, tuple) and len(cotangents) == len(axes.of_arguments)  # else JAX says so
        if not fits or not any(map(_mesh_axes, jax.tree.leaves(ct))):
            return cotangents
        return tuple(c if c is None else jax.tree.map(total, a, c) for a, c in zip(axes.of_arguments, cotangents))

    return summed


def _is_symbolic_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _is_perturbed(tangent: Any) -> bool:
    return not _is_symbolic_zero(tangent) and getattr(tangent, "dtype", None) != jax.dtypes.float0


def _float0_zeros(x) -> np.ndarray:
    return np.zeros(jnp.shape(x), jax.dtypes.float0)


def _insert(positions, values, args) -> list:
    """The full argument list: `values` at `positions`, `args` in the places between."""
    merged = list(args)
    for i, value in sorted(zip(positions, values), key=lambda pair: pair[0]):
        merged.insert(i, value)
    return merged
