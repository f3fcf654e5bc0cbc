"""One pass over the tokens, chunk by chunk; of each chunk, the gradient of the weights slab by slab.

The one quantity is F = Σ_i a_i l(z_i), z = xW + b, with a weight a_i per token: its gradient in a is the vector of
losses (docs/mathematics.md, section 6). `stream` forms rows of grad F, or of (D grad F)[t] along one direction t:

    G = a ∂l/∂z:    dx = G Wᵀ,            dW = xᵀ G,            db = Σ G,    da = l,
    along t:        dx = Ġ Wᵀ + G Ẇᵀ,     dW = xᵀ Ġ + ẋᵀ G,     db = Σ Ġ,    da = l̇,     ż = ẋW + xẆ + ḃ.

No loop here is ever transposed: reverse mode uses the symmetry of the second and higher derivatives of F. On a mesh,
weights are gathered before the loop and gradients added up after it, before they are rounded; within the loop devices
exchange what their blocks of the classes tell of a token, a few numbers.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core.plumbing import tied, varying, zero_of
from jaxsoftmax.linear_head import budget
from jaxsoftmax.linear_head.chunks import Chunks, every_nth, in_a_row
from jaxsoftmax.linear_head.slabs import add_products, times
from jaxsoftmax.linear_head.statistics import TokenStatistics
from jaxsoftmax.linear_head.types import Arrays, Cotangents, Head, Tokens, total, wide_dtype

LOCAL = ("x", "token_weights")  # one row per token
LINEAR = ("x", "weights", "token_weights", "bias")  # what is no option
SPLIT = ("x", "weights", "bias", "class_weights")  # of whose gradient each device of the classes finds another part


def stream(
    head: Head, rows: tuple[str, ...], theta: Arrays, direction: Arrays | None, tokens: Tokens, skip: bool
) -> tuple[Array, dict[str, Array], Any]:
    """One pass over the tokens.

    Args:
      head: the static part.
      rows: names of the arguments whose rows of the gradient are wanted.
      theta: the arguments by name: x (..., D), weights, token_weights (...), and where given bias (V,) and options.
      direction: None for the gradient itself, or the direction of its derivative, by name; a missing name means zero.
      tokens: what is not differentiated.
      skip: whether to leave out tokens of weight 0; only where nothing differentiates the weights.

    Returns:
      The losses (...), 0 for skipped tokens, or their derivative; the rows by name, of the shapes and dtypes of
      `theta`; the statistics, one row per token, or None.
    """
    wide, given, is_gradient = wide_dtype(theta), theta, direction is None
    theta, moving = (_of_all(head, arrays) for arrays in (theta, direction or {}))
    shape = given["token_weights"].shape
    tokens = Tokens(*jax.tree.map(lambda row: _flat(row, len(shape)), tokens[:2]), tokens.shared)
    num_tokens = math.prod(shape)
    counts = tokens.valid
    if skip and not head.every:
        nonzero = theta["token_weights"] != 0
        counts = nonzero if counts is None else counts & nonzero
    size = _chunk_size(head, theta, is_gradient)
    if num_tokens == 0 or theta["weights"].shape[head.vocab_axis] == 0:
        return _of_nothing(head, rows, given, direction, tokens)
    if head.spread and isinstance(num_tokens, int):
        chunks = every_nth(size, num_tokens)
        theta, moving = ({n: _only(counts, v) if n in LOCAL else v for n, v in a.items()} for a in (theta, moving))
    else:
        chunks = in_a_row(size, num_tokens, counts)
    # What the loop carries varies over the mesh from the start. Losses are the same on all devices of the classes.
    zero, shared = zero_of((theta, moving, tokens)), zero_of(theta["token_weights"])
    like = lambda name, x: x + (zero if name in SPLIT else shared).astype(x.dtype)
    out = {name: like(name, jnp.zeros(theta[name].shape, wide)) for name in rows if name != "token_weights"}
    losses = like("", jnp.zeros(num_tokens, wide))
    statistics = jax.tree.map(lambda s: like("", s), _no_statistics(head, theta, tokens, wide))
    theta, moving = ({n: v if n in LINEAR else like(n, v) for n, v in a.items()} for a in (theta, moving))

    def step(carry):
        j, losses, out, statistics = carry
        block = _take(chunks, j, theta, moving, tokens)
        here, sums, of_x, facts = _chunk(head, rows, theta, moving, is_gradient, block, out)
        put = lambda whole, part: chunks.put(whole, j, part)
        out = {name: put(out[name], of_x) if name == "x" else sums[name] for name in out}
        return j + 1, put(losses, here), out, jax.tree.map(put, statistics, facts)

    carry = jnp.int32(0), losses, out, statistics
    _, losses, out, statistics = lax.while_loop(lambda carry: carry[0] < jnp.asarray(chunks.steps), step, carry)
    if chunks.order is None:
        losses, statistics = jax.tree.map(lambda row: _only(counts, row), (losses, statistics))
    if "token_weights" in rows:
        out["token_weights"] = losses
    out = {name: _added_up(head, name, out[name]).astype(given[name].dtype).reshape(given[name].shape) for name in rows}
    return losses.reshape(shape), out, jax.tree.map(lambda row: row.reshape(shape), statistics)


def _of_all(head: Head, arrays: Arrays) -> dict[str, Array]:
    """The arrays by name, tokens in one axis, the weights with all their features, copies as one."""
    axes, out = head.axes, dict(arrays)
    for name, x in arrays.items():
        if name in LOCAL:
            out[name] = _flat(x, x.ndim - 1 if name == "x" else x.ndim)
        if name == "weights" and axes.gathered:
            out[name] = lax.all_gather(x, axes.gathered, axis=1 - head.vocab_axis, tiled=True)
        if axes.copies and name not in SPLIT:
            out[name] = lax.pmean(x, axes.classes)
    return out


def _added_up(head: Head, name: str, row: Array) -> Array:
    """The gradient in the argument `name`, of which each device has found a part, split as the argument is."""
    axes = head.axes
    if axes.copies and name not in SPLIT:
        return varying(row / lax.psum(1, axes.classes), frozenset(axes.classes))
    if name != "weights" or not axes.gathered:
        return total(row, axes.summed(name))
    row = total(row, tuple(axis for axis in axes.tokens if axis not in axes.gathered))
    return lax.psum_scatter(row, axes.gathered, scatter_dimension=1 - head.vocab_axis, tiled=True)


def _of_nothing(head: Head, rows, theta, direction, tokens: Tokens):
    """The result where there is no token or no class: no gradient, and the loss of logits of no class."""
    shape, wide = theta["token_weights"].shape, wide_dtype(theta)
    out = {name: jnp.zeros_like(theta[name]) for name in rows}
    z = jnp.zeros((math.prod(shape), theta["weights"].shape[head.vocab_axis]), wide)
    losses = jnp.zeros(shape, wide)
    if direction is None and z.shape[0]:
        losses = head.losses(head, z, (tokens.rows, tokens.shared), _options(theta)).reshape(shape)
    if "token_weights" in rows:
        out["token_weights"] = losses.astype(theta["token_weights"].dtype)
    statistics = None
    if head.statistics is not None:
        zero, index = jnp.zeros(shape, wide), jnp.zeros(shape, jnp.int32)
        statistics = TokenStatistics(zero - jnp.inf, index, zero, index > 0, zero)
    return losses, out, statistics


def _chunk_size(head: Head, theta: Arrays, is_gradient: bool) -> int:
    """Tokens whose logits exist at once; derivatives of the gradient take three times as many arrays of them."""
    arrays = head.arrays if is_gradient else 3 * head.arrays
    if head.chunk_size is not None:
        return max(1, head.chunk_size // arrays)
    num_tokens, features = theta["x"].shape
    vocab = theta["weights"].shape[head.vocab_axis]
    size = num_tokens, features, vocab, wide_dtype(theta).itemsize
    return max(1, budget.default_chunk(*size, arrays, _devices(head)))


def _devices(head: Head) -> int:
    """How many devices work on one sum."""
    return lax.psum(1, head.axes.tokens + head.axes.classes)


def _flat(rows: Array, axes: int) -> Array:
    """The first axes as one."""
    return rows.reshape(math.prod(rows.shape[:axes]), *rows.shape[axes:])


def _only(counts: Array | None, rows: Array) -> Array:
    """The rows of tokens that count, 0 for the others."""
    if counts is None:
        return rows
    return jnp.where(counts.reshape(-1, *[1] * (rows.ndim - 1)), rows, jnp.zeros((), rows.dtype))


def _no_statistics(head: Head, theta, tokens: Tokens, wide) -> Any:
    """Zeros, one row per token."""
    of = head.statistics
    if of is None:
        return None

    def of_all():
        z = jnp.zeros((theta["x"].shape[0], theta["weights"].shape[head.vocab_axis]), wide)
        return of(head, z, (tokens.rows, tokens.shared), _options(theta))

    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(of_all))


# One chunk. Below, constants are the rows of the labels or of a teacher, and what the tokens share.


class Block(NamedTuple):
    """One chunk's rows: the values and the direction of x and token_weights, and the constants."""

    values: dict[str, Array]
    moving: dict[str, Array]
    constants: Any


def _take(chunks: Chunks, j: Array, theta, moving, tokens: Tokens) -> Block:
    wide = wide_dtype(theta)
    local = lambda arrays: {n: chunks.take(arrays[n], j).astype(wide) for n in LOCAL if n in arrays}
    rows = jax.tree.map(lambda row: chunks.take(row, j), tokens.rows)
    return Block(local(theta), local(moving), (rows, tokens.shared))


def _options(arrays: Arrays) -> dict[str, Array]:
    return {name: value for name, value in arrays.items() if name not in LINEAR}


def _chunk(head: Head, rows, theta, moving, is_gradient: bool, block: Block, out):
    """Losses of one chunk, `out` with its contribution added, the rows of the gradient in x, and the statistics."""
    work = _gradient if is_gradient else _gradient_along
    losses, cotangents, by_option, statistics = work(head, rows, theta, moving, block)
    out = {**out, **{name: out[name] + value.astype(out[name].dtype) for name, value in by_option.items()}}
    if cotangents is not None:
        weights, xs = [theta["weights"]], [block.values["x"]]
        if not is_gradient:
            weights, xs = [*weights, moving.get("weights")], [*xs, block.moving.get("x")]
        if "x" in rows:
            out["x"] = tied(jnp.zeros_like(xs[0]), (cotangents.arrays, weights))
        out = add_products(head, out, cotangents, weights, xs, _devices(head))
    return losses, out, out.get("x"), statistics


def _gradient(head: Head, rows, theta, moving, block: Block):
    """Losses, ∂F/∂z where it is wanted, the gradient in the options, statistics."""
    options, sought, token_weights = _options(theta), _sought(rows), block.values["token_weights"]
    z = _logits(head, block.values["x"], theta["weights"], theta.get("bias"))
    statistics = None if head.statistics is None else head.statistics(head, z, block.constants, options)
    if set(rows) <= {"token_weights"}:
        return head.losses(head, z, block.constants, options), None, {}, statistics
    if head.rule is not None and not sought:
        return *head.rule(head, z, block.constants, options, token_weights), {}, statistics
    losses, g, by_option = _by_plain_rules(head, block.constants, z, token_weights, options, sought)
    return losses, Cotangents((g,)), by_option, statistics


def _sought(rows: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in rows if name not in LINEAR)


def _by_plain_rules(head: Head, constants, z, token_weights, options, sought):
    """Losses, G, and the gradient in the options that are sought."""
    losses, pull = jax.vjp(
        lambda z, sought: head.losses(head, z, constants, {**options, **sought}), z, {n: options[n] for n in sought}
    )
    return losses, *pull(token_weights)


def _gradient_along(head: Head, rows, theta, moving, block: Block):
    """The derivatives of what `_gradient` returns along `moving`; no statistics."""
    options, sought = _options(theta), _sought(rows)
    a, da = block.values["token_weights"], block.moving.get("token_weights")
    z, dz = _logits_along(head, block, theta, moving)
    if head.rule_along is not None and not sought and not _options(moving):
        return *head.rule_along(head, z, dz, block.constants, options, a, da), {}, None
    args = {"z": z, "token_weights": a, **options}
    along = {"z": dz, "token_weights": da, **_options(moving)}
    along = {name: t.astype(args[name].dtype) for name, t in along.items() if t is not None}

    def of(moved):
        full = {**args, **moved}
        z, token_weights, rest = full["z"], full["token_weights"], {n: full[n] for n in options}
        if set(rows) <= {"token_weights"}:
            return head.losses(head, z, block.constants, rest), None, {}
        return _by_plain_rules(head, block.constants, z, token_weights, rest, sought)

    (_, g, _), (losses, dg, by_option) = jax.jvp(of, ({name: args[name] for name in along},), (along,))
    return losses, None if g is None else Cotangents((dg, g)), by_option, None


def _logits(head: Head, x: Array, weights: Array, bias: Array | None) -> Array:
    z = times(head, x, weights)
    return z if bias is None else z + bias.astype(z.dtype)[None, :]


def _logits_along(head: Head, block: Block, theta, moving) -> tuple[Array, Array | None]:
    """z and ż = ẋW + xẆ + ḃ; ż is None where nothing that moves reaches the logits."""
    x, weights, terms = block.values["x"], theta["weights"], []
    z = _logits(head, x, weights, theta.get("bias"))
    if "x" in moving:
        terms.append(_logits(head, block.moving["x"], weights, None))
    if "weights" in moving:
        terms.append(_logits(head, x, moving["weights"], None))
    if "bias" in moving:
        terms.append(jnp.broadcast_to(moving["bias"].astype(z.dtype)[None, :], z.shape))
    return z, (sum(terms[1:], terms[0]) if terms else None)
