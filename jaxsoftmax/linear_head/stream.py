"""The linear head, streamed: chunks of tokens, the gradient of the weights in slabs of the vocabulary.

docs/mathematics.md, section 6. The one quantity is F = Σ_i a_i l(z_i), z = xW + b, with a weight a_i per token: its
gradient in a is the vector of losses. `stream` forms rows of grad F, or of (D grad F)[t] along one direction t, in one
pass:

    G = a ∂l/∂z:    dx = G Wᵀ,            dW = xᵀ G,            db = Σ G,    da = l,
    along t:        dx = Ġ Wᵀ + G Ẇᵀ,     dW = xᵀ Ġ + ẋᵀ G,     db = Σ Ġ,    da = l̇,     ż = ẋW + xẆ + ḃ.

No loop here is ever transposed: reverse mode uses the symmetry of the second and higher derivatives of F.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core.plumbing import tied
from jaxsoftmax.linear_head.budget import FULL, first_chunk
from jaxsoftmax.linear_head.slabs import add_products, times
from jaxsoftmax.linear_head.types import Arrays, Block, Cotangents, Head, Tokens, wide_dtype


def stream(
    head: Head, rows: tuple[str, ...], theta: Arrays, direction: Arrays | None, tokens: Tokens, skip: bool
) -> tuple[Array, dict[str, Array], Any]:
    """One pass over the tokens.

    Args:
      head: the static part.
      rows: names of the arguments whose rows of the gradient are wanted.
      theta: the arguments by name: x (N, D), weights, token_weights (N,), and where given bias (V,) and options.
      direction: None for the gradient itself, or the direction of its derivative, by name; a missing name means zero.
      tokens: what is not differentiated.
      skip: whether to leave out tokens of weight 0; only where nothing differentiates the weights.

    Returns:
      The losses (N,), 0 for skipped tokens, or their derivative; the rows by name, in the dtypes of `theta`;
      the statistics, one row per token, or None.
    """
    x, wide = theta["x"], wide_dtype(theta)
    num_tokens = x.shape[0]
    moving = {} if direction is None else dict(direction)
    chunk, first = max(1, min(head.chunk_size if direction is None else head.chunk_along, num_tokens)), 0
    if direction is None and "weights" in rows and _writes_over_logits(head, rows):
        first = first_chunk(chunk, *x.shape)
    order, count = _order(theta["token_weights"], tokens.valid, skip and not head.every, max(chunk, first))
    known = isinstance(count, int)
    out = {name: jnp.zeros(theta[name].shape, wide) for name in rows if name != "token_weights"}
    block = lambda index: _take(theta, moving, tokens, index, wide)
    statistics = _empty_statistics(head, block, chunk, num_tokens, theta, wide)

    def step(carry, size, work):
        done, losses, out, statistics = carry
        index = lax.dynamic_slice_in_dim(order, done, size)
        here, out, facts = work(head, rows, theta, moving, direction is None, block(index), out, index)
        put = lambda whole, part: whole.at[index].set(part, mode="drop")
        return done + size, put(losses, here), out, jax.tree.map(put, statistics, facts)

    carry = tied((jnp.int32(0), jnp.zeros(num_tokens, wide), out, statistics), (theta, moving, tokens))
    if first:
        begin = lambda carry: step(carry, first, functools.partial(_chunk, in_place=True))
        carry = begin(carry) if known else lax.cond(count >= math.ceil(FULL * first), begin, lambda c: c, carry)
    if not known or count > first:
        work = head.by_blocks or _chunk
        carry = lax.while_loop(lambda c: c[0] < count, lambda c: step(c, chunk, work), carry)
    _, losses, out, statistics = carry
    if "token_weights" in rows:
        out["token_weights"] = losses
    return losses, {name: out[name].astype(theta[name].dtype) for name in rows}, statistics


def _writes_over_logits(head: Head, rows: tuple[str, ...]) -> bool:
    """Whether the gradient of a chunk is made of one array, the rule's, that takes the place of the logits."""
    return head.rule is not None and head.statistics is None and head.by_blocks is None and not _options(rows)


def _order(weights: Array, valid: Array | None, skip: bool, chunk: int) -> tuple[Array, Array | int]:
    """Indices of the tokens that count, then N for at least a chunk, and how many count: a number if all of them do."""
    num_tokens = weights.shape[0]
    if skip:
        counts = weights != 0
        valid = counts if valid is None else valid & counts
    if valid is None:
        order = jnp.arange(num_tokens + chunk, dtype=jnp.int32)
        return jnp.minimum(order, num_tokens), num_tokens
    (order,) = jnp.nonzero(valid, size=num_tokens + chunk, fill_value=num_tokens)
    return order.astype(jnp.int32), jnp.sum(valid, dtype=jnp.int32)


def _take(theta, moving, tokens: Tokens, index: Array, wide) -> Block:
    take = lambda x: x.at[index].get(mode="fill", fill_value=0)
    local = ("x", "token_weights")
    values = {n: take(theta[n]).astype(wide) for n in local}
    return Block(
        values,
        {n: take(moving[n]).astype(wide) for n in local if n in moving},
        (jax.tree.map(take, tokens.rows), tokens.shared),
    )


def _empty_statistics(head, block, chunk, num_tokens, theta, wide):
    if head.statistics is None:
        return None
    vocab = theta["weights"].shape[head.vocab_axis]

    def of_chunk():
        here = block(jnp.zeros(chunk, jnp.int32))
        return head.statistics(jnp.zeros((chunk, vocab), wide), here.constants, theta)

    return jax.tree.map(lambda s: jnp.zeros((num_tokens, *s.shape[1:]), s.dtype), jax.eval_shape(of_chunk))


def _options(names) -> tuple[str, ...]:
    return tuple(name for name in names if name not in ("x", "weights", "token_weights", "bias"))


def _chunk(head: Head, rows, theta, moving, is_gradient: bool, block: Block, out, index, in_place: bool = False):
    """Losses of one chunk, `out` with its contribution added, and its statistics.

    With `in_place`, as many tokens as features, and `out` empty: the logits lie where the gradient of the weights will.
    """
    work = functools.partial(_gradient, in_place=in_place) if is_gradient else _gradient_along
    losses, cotangents, by_option, statistics = work(head, rows, theta, moving, block)
    out = {**out, **{name: out[name] + value.astype(out[name].dtype) for name, value in by_option.items()}}
    if cotangents is not None:
        weights, xs = [theta["weights"]], [block.values["x"]]
        if not is_gradient:
            weights, xs = [*weights, moving.get("weights")], [*xs, block.moving.get("x")]
        total = {name: out[name] for name in rows if name in ("weights", "bias")}
        if "x" in rows:
            total["x"] = tied(jnp.zeros_like(xs[0]), (cotangents.arrays, weights))
        total = add_products(total, cotangents, weights, xs, head.vocab_axis, in_place)
        if "x" in rows:
            total["x"] = out["x"].at[index].set(total["x"], mode="drop")
        out |= total
    return losses, out, statistics


def _logits(head: Head, x: Array, weights: Array, bias: Array | None, axis: int = 1) -> Array:
    z = times(x, weights, head.vocab_axis, axis)
    return z if bias is None else z + jnp.expand_dims(bias.astype(z.dtype), 1 - axis)


def _by_plain_rules(head: Head, constants, z, token_weights, options, sought):
    """Losses, G, and the gradient in the options that are sought."""
    of = lambda z, sought: head.losses(head, z, constants, {**options, **sought})
    losses, pull = jax.vjp(of, z, tied({n: options[n] for n in sought}, (z, token_weights, constants)))
    return losses, *pull(token_weights)


def _gradient(head: Head, rows, theta, moving, block: Block, in_place: bool):
    """Losses, ∂F/∂z where it is wanted, the gradient in the options, statistics."""
    options = {name: theta[name] for name in _options(theta)}
    sought, token_weights = _options(rows), block.values["token_weights"]
    axis = head.vocab_axis if in_place else 1
    z, statistics = _logits(head, block.values["x"], theta["weights"], theta.get("bias"), axis), None
    if head.statistics is not None:
        statistics = head.statistics(z, block.constants, options)
    if set(rows) <= {"token_weights"}:
        return head.losses(head, z, block.constants, options), None, {}, statistics
    if head.rule is not None and not sought:
        return *head.rule(z, block.constants, options, token_weights, axis), {}, statistics
    losses, g, by_option = _by_plain_rules(head, block.constants, z, token_weights, options, sought)
    return losses, Cotangents((g,)), by_option, statistics


def _gradient_along(head: Head, rows, theta, moving, block: Block):
    """The derivatives of what `_gradient` returns along `moving`; no statistics."""
    options = {name: theta[name] for name in _options(theta)}
    sought, names = _options(rows), _options(moving)
    a, da = block.values["token_weights"], block.moving.get("token_weights")
    z, dz = _logits_along(head, block, theta, moving)
    if head.rule_along is not None and not sought and not names:
        return *head.rule_along(z, dz, block.constants, options, a, da), {}, None
    args = {"z": z, "token_weights": a, **options}
    along = {"z": dz, "token_weights": da, **{name: moving[name] for name in names}}
    along = {name: t.astype(args[name].dtype) for name, t in along.items() if t is not None}

    def of(along_args):
        full = {**args, **along_args}
        z, token_weights, rest = full["z"], full["token_weights"], {n: full[n] for n in options}
        if set(rows) <= {"token_weights"}:
            return head.losses(head, z, block.constants, rest), None, {}
        return _by_plain_rules(head, block.constants, z, token_weights, rest, sought)

    (_, g, _), (losses, dg, by_option) = jax.jvp(of, ({name: args[name] for name in along},), (along,))
    return losses, None if g is None else Cotangents((dg, g)), by_option, None


def _logits_along(head: Head, block: Block, theta, moving):
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
