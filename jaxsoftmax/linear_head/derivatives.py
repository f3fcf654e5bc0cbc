"""F = Σ_iq a_iq l_q(x_i W + b) and its derivatives of every order, from passes that are only ever evaluated.

    tangent of F: <grad F, t>,    tangent of grad F: (D grad F)[t],    its transpose: the same symmetric form.

So a sum's gradient is formed with its value and only scaled by the cotangent; losses per token are the row ∂F/∂a,
and what reverse mode asks of them is a column of the Hessian, grad F with the cotangents for token weights.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxsoftmax._core.plumbing import zeros_like
from jaxsoftmax._linear_map import linear_map
from jaxsoftmax.linear_head.mesh import one_pass
from jaxsoftmax.linear_head.plan import Head, Tokens
from jaxsoftmax.linear_head.stream import total


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def weighted_sum(head: Head, theta, tokens: Tokens):
    """F, and where a head has several, all numbers per token with their indices.

    The tangent of F is <grad F, t>, so that reverse mode only scales grad F.
    """
    value, _, facts = _pass(head, (), theta, tokens)
    return value, facts


@functools.partial(weighted_sum.defjvp, symbolic_zeros=True)
def _weighted_sum_jvp(head, primals, tangents):
    theta, tokens = primals
    direction = _moving(tangents[0])
    value, rows, facts = value_and_gradient(head, tuple(direction), theta, tokens)
    return (value, facts), (_inner(head, rows, direction, value), _facts_along(head, theta, direction, tokens, facts))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def value_and_gradient(head: Head, rows: tuple[str, ...], theta, tokens: Tokens):
    """F, the rows of its gradient by name, and the numbers per token and their indices, as in `weighted_sum`."""
    return _pass(head, rows, theta, tokens)


def _pass(head: Head, rows, theta, tokens: Tokens):
    skip = "token_weights" not in rows and head.columns == 1
    numbers, gradient, index = one_pass(head, rows, theta, (), tokens, skip)
    a = theta["token_weights"]
    if head.axes.copies:
        a = lax.pmean(a, head.axes.classes)
    return jnp.sum(a * numbers[..., : a.shape[-1]]), gradient, None if head.columns == 1 else (numbers, index)


@functools.partial(value_and_gradient.defjvp, symbolic_zeros=True)
def _value_and_gradient_jvp(head, rows, primals, tangents):
    theta, tokens = primals
    direction = _moving(tangents[0])
    everything = tuple(dict.fromkeys((*rows, *direction)))
    value, gradient, facts = value_and_gradient(head, everything, theta, tokens)
    moved = gradient_along(head, rows, theta, (direction,), tokens) if direction else _zeros(theta, rows)
    out = value, {name: gradient[name] for name in rows}, facts
    return out, (_inner(head, gradient, direction, value), moved, _facts_along(head, theta, direction, tokens, facts))


def _facts_along(head: Head, theta, direction, tokens: Tokens, facts):
    """The tangents of the numbers per token: rows and columns of F's Hessian, with a weight for each number."""
    if facts is None:
        return None
    numbers, index = facts
    one_each = lambda arrays: {
        n: jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, head.columns - v.shape[-1])]) if n == "token_weights" else v
        for n, v in arrays.items()
    }
    moved = zeros_like(numbers)
    if direction:
        found = gradient_along(head, ("token_weights",), one_each(theta), (one_each(direction),), tokens)
        moved = total(found["token_weights"], head.axes.classes if head.axes.copies else ())
    return moved, np.zeros(index.shape, jax.dtypes.float0)


def gradient_along(head: Head, rows: tuple[str, ...], theta, directions, tokens: Tokens) -> dict[str, Array]:
    """Rows of (D^k grad F)[t_1, …, t_k], k ≥ 1: linear in the last direction, and transposable there.

    With M that linear map, <c, M t> = <t, Mᵀ c> is the same form with other rows, since F's derivatives are symmetric.
    """
    *fixed, last = directions
    last = {n: t.astype(theta[n].dtype) for n, t in last.items()}

    def forth(given, t):
        theta, fixed, tokens = given
        return _along(head, rows, theta, (*fixed, t), tokens)

    def back(given, c):
        theta, fixed, tokens = given
        return _along(head, tuple(last), theta, (*fixed, {n: v for n, v in c.items() if v is not None}), tokens)

    return linear_map(forth, back, (theta, tuple(fixed), tokens), last, {n: jax.typeof(theta[n]) for n in rows})


_plus = functools.partial(jax.tree.map, jnp.add)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _along(head: Head, rows: tuple[str, ...], theta, directions, tokens: Tokens) -> dict[str, Array]:
    """What `gradient_along` computes; its derivatives are made of `gradient_along`, so that they transpose."""
    return _evaluate(head, rows, theta, directions, tokens)


@functools.partial(_along.defjvp, symbolic_zeros=True)
def _along_jvp(head, rows, primals, tangents):
    theta, directions, tokens = primals
    terms = []
    moved = _moving(tangents[0])
    if moved:
        terms.append(gradient_along(head, rows, theta, (*directions, moved), tokens))
    for i, tangent in enumerate(tangents[1]):
        moved = _moving(tangent)
        if moved:
            rest = (*directions[:i], *directions[i + 1 :])
            terms.append(gradient_along(head, rows, theta, (*rest, moved), tokens))
    moved = functools.reduce(_plus, terms) if terms else _zeros(theta, rows)
    return _along(head, rows, theta, directions, tokens), moved


@functools.partial(jax.jit, static_argnames=("head", "rows"))
def _evaluate(head, rows, theta, directions, tokens) -> dict[str, Array]:
    """Rows of (D^k grad F)[t_1, …, t_k]. F is linear in the token weights: a direction in them alone replaces them."""
    weightings = [t for t in directions if tuple(t) == ("token_weights",)]
    if len(weightings) > 1:
        return _zeros(theta, rows)
    if weightings:
        directions = tuple(t for t in directions if tuple(t) != ("token_weights",))
        theta, head = {**theta, **weightings[0]}, head._replace(every=False)
        found = tuple(name for name in rows if name != "token_weights")
        return {**_zeros(theta, rows), **(_evaluate(head, found, theta, directions, tokens) if found else {})}
    skip = not any("token_weights" in names for names in (rows, *directions))
    return one_pass(head, rows, theta, directions, tokens, skip)[1]


def _moving(tangents) -> dict[str, Array]:
    return {name: t for name, t in tangents.items() if not isinstance(t, SymbolicZero)}


def _zeros(theta, rows) -> dict[str, Array]:
    return {name: zeros_like(theta[name]) for name in rows}


def _inner(head: Head, rows, direction, value: Array) -> Array:
    """Σ <row, direction>, in the dtype of the value."""
    wide = [jnp.sum(rows[n].astype(value.dtype) * t.astype(value.dtype)) for n, t in direction.items()]
    return total(sum(wide, jnp.zeros_like(value)), head.axes.classes)
