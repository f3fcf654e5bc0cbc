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

from jaxsoftmax._core.mesh import varies_over, varying, zeros_like
from jaxsoftmax._linear_map import linear_map
from jaxsoftmax.linear_head import mesh
from jaxsoftmax.linear_head.mesh import total
from jaxsoftmax.linear_head.plan import Head, Tokens
from jaxsoftmax.linear_head.rows import class_weight
from jaxsoftmax.linear_head.stream import stream


def evaluate(head: Head, reduction: str, theta, tokens: Tokens, token_axes, class_axes):
    """The reduced loss, and the numbers per token with their indices, on whatever mesh the arrays lie."""
    x, weights = theta["x"], theta["weights"]
    if head.axes.classes:
        if token_axes is not None or class_axes is not None:
            raise ValueError("axis_name is for use inside shard_map, token_axes and class_axes outside of it: give one")
    else:
        layout = mesh.layout_of(x, weights, head.vocab_axis, token_axes, class_axes)
        head = head._replace(layout=layout, spread=1 if layout else mesh.divided_by_xla(x, weights))
    return _evaluate(head, reduction, theta, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _evaluate(head: Head, reduction: str, theta, tokens: Tokens):
    if head.layout is not None:
        theta, tokens = mesh.placed(head, theta, tokens)
    a, valid = theta["token_weights"], tokens.valid
    theta = _of_device(head, {**theta, "token_weights": a[..., None]}, tokens)
    if reduction == "none":
        ones = {**theta, "token_weights": jnp.ones_like(theta["token_weights"])}
        _, rows, facts = value_and_gradient(head, ("token_weights",), ones, tokens)
        losses = total(rows["token_weights"], head.axes.classes)[..., 0] * a
        return losses if valid is None else jnp.where(valid, losses, 0.0), facts
    out, _, facts = value_and_gradient(head, (), theta, tokens)
    if reduction == "sum":
        return out, facts
    if "class_weights" in theta:
        a = a * label_weights(head, theta["class_weights"], tokens.rows)
    counted = jnp.sum(a if valid is None else jnp.where(valid, a, 0.0))
    return jnp.where(counted == 0, 0.0, out / jnp.where(counted == 0, 1.0, counted)), facts


def _of_device(head: Head, theta: dict[str, Array], tokens: Tokens) -> dict[str, Array]:
    """Inside a shard_map, all arguments as the device's own, to differentiate in.

    The devices of the classes compute one sum together. Over other axes the caller has split the tokens, say: then each
    device computes a sum of its own. Parts of a gradient are rounded, then added up.
    """
    around = frozenset().union(head.axes.classes, *map(varies_over, jax.tree.leaves((theta, tokens))))
    return {name: varying(v, around) for name, v in theta.items()}


def label_weights(head: Head, class_weights: Array, labels: Array) -> Array:
    """The class weight of each label; NaN for one that is no class."""

    def work(head, class_weights, labels):
        return class_weight(head, class_weights, labels.reshape(-1)).reshape(labels.shape)

    if head.layout is None:
        return work(head, class_weights, labels)
    row = mesh.spec_of(*head.layout.tokens)
    return mesh.divided(work, head, (class_weights, labels), (mesh.spec_of(head.layout.classes), row), row)


def one_pass(head: Head, rows: tuple[str, ...], theta, directions, tokens: Tokens, skip: bool):
    """`stream`, on every device of the layout."""
    work = lambda head, theta, directions, tokens: stream(head, rows, theta, directions, tokens, skip)
    if head.layout is None:
        return work(head, theta, directions, tokens)
    row, of_theta = mesh.spec_of(*head.layout.tokens), mesh.specs(head, theta)
    of_directions = tuple({name: of_theta[name] for name in direction} for direction in directions)
    out_specs = row, {name: of_theta[name] for name in rows}, None if head.columns == 1 or directions else row
    in_specs = of_theta, of_directions, mesh.token_specs(head, tokens)
    return mesh.divided(work, head, (theta, directions, tokens), in_specs, out_specs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def value_and_gradient(head: Head, rows: tuple[str, ...], theta, tokens: Tokens):
    """F, the rows of its gradient by name, and where a head has several, all numbers per token with their indices.

    The tangent of F is <grad F, t>, so that reverse mode only scales grad F.
    """
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
    wide = lambda x: x.astype(value.dtype)
    inner = sum((jnp.sum(wide(gradient[n]) * wide(t)) for n, t in direction.items()), jnp.zeros_like(value))
    moved = gradient_along(head, rows, theta, (direction,), tokens) if rows and direction else _zeros(theta, rows)
    along = total(inner, head.axes.classes), moved, _facts_along(head, theta, direction, tokens, facts)
    return (value, {name: gradient[name] for name in rows}, facts), along


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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _along(head: Head, rows: tuple[str, ...], theta, directions, tokens: Tokens) -> dict[str, Array]:
    """What `gradient_along` computes; its derivatives are made of `gradient_along`, so that they transpose."""
    return _rows_along(head, rows, theta, directions, tokens)


@functools.partial(_along.defjvp, symbolic_zeros=True)
def _along_jvp(head, rows, primals, tangents):
    theta, directions, tokens = primals
    terms = [(_moving(tangents[0]), directions)]
    terms += [(_moving(t), (*directions[:i], *directions[i + 1 :])) for i, t in enumerate(tangents[1])]
    found = [gradient_along(head, rows, theta, (*rest, t), tokens) for t, rest in terms if t]
    moved = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *found) if found else _zeros(theta, rows)
    return _along(head, rows, theta, directions, tokens), moved


@functools.partial(jax.jit, static_argnames=("head", "rows"))
def _rows_along(head, rows, theta, directions, tokens) -> dict[str, Array]:
    """Rows of (D^k grad F)[t_1, …, t_k]. F is linear in the token weights: a direction in them alone replaces them."""
    weightings = [t for t in directions if tuple(t) == ("token_weights",)]
    if len(weightings) > 1:
        return _zeros(theta, rows)
    if weightings:
        directions = tuple(t for t in directions if tuple(t) != ("token_weights",))
        theta, head = {**theta, **weightings[0]}, head._replace(every=False)
        found = tuple(name for name in rows if name != "token_weights")
        return {**_zeros(theta, rows), **(_rows_along(head, found, theta, directions, tokens) if found else {})}
    skip = not any("token_weights" in names for names in (rows, *directions))
    return one_pass(head, rows, theta, directions, tokens, skip)[1]


def _moving(tangents) -> dict[str, Array]:
    return {name: t for name, t in tangents.items() if not isinstance(t, SymbolicZero)}


def _zeros(theta, rows) -> dict[str, Array]:
    return {name: zeros_like(theta[name]) for name in rows}
