"""The linear head, streamed: chunks of tokens, the gradient of the weights in slabs of the vocabulary.

MATHEMATICS.md section 6. The one quantity is F = Σ_i a_i l(z_i), z = xW + b, with a weight a_i per token: its gradient
in a is the vector of losses. `stream` forms rows of grad F, or of (D grad F)[t] along one direction t, with one pass:

    G = a ∂l/∂z:    dx = G Wᵀ,            dW = xᵀ G,            db = Σ G,    da = l,
    along t:        dx = Ġ Wᵀ + G Ẇᵀ,     dW = xᵀ Ġ + ẋᵀ G,     db = Σ Ġ,    da = l̇,     ż = ẋW + xẆ + ḃ.

No loop here is ever transposed: reverse mode uses the symmetry of the second and higher derivatives of F.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import dtypes

Arrays = Mapping[str, Array]

# Per backend: bytes of temporary memory to aim at, and the tokens beyond which a larger chunk gains nothing: the
# traffic of the accumulator, κ D V bytes per chunk, is then 5 % of the time of its 6 C D V operations.
BUDGET = {"cpu": 64 << 20}
BUDGET_OTHER = 2 << 30
SATURATION = {"cpu": 512}
SATURATION_OTHER = 8192
SLAB_BYTES = 4 << 20
ALIGNMENT = 8
# So few tokens per chunk, as a part of the saturation, that four matrix products over blocks of the vocabulary take
# less time than three over all of it.
FEW = 0.1
MIN_BLOCK = 128
# The first chunk has as many tokens as there are features, and is taken where this part of it counts.
FULL = 0.75


class Cotangents(NamedTuple):
    """∂F/∂z of a chunk, made a slab of the vocabulary at a time.

    Attributes:
      arrays: what it is made of, (C, V) each, or (V, C) where a rule was asked for that.
      make: make(parts, start), given a slab (C, B) of each array that begins at the class `start`, returns G for it,
        or along a direction Ġ and G.
      scale: (C,), factors of all that `make` returns, left to the rows of x: arrays of logits have more of them.
    """

    arrays: tuple[Array, ...]
    make: Callable[[tuple[Array, ...], Any], tuple[Array, ...]] = lambda parts, _: parts
    scale: Array | None = None


class Head(NamedTuple):
    """What is static in a linear head: how logits become losses, where the vocabulary lies, how much exists at once.

    A chunk has `chunk_size` tokens, or `chunk_along` where the gradient is differentiated. `every` says that the token
    weights are 1: how many tokens count is then known beforehand. With `by_blocks`, which then does the work of a
    chunk, no more than `block` classes have logits at once.
    """

    losses: Callable[[Any, Array, Any, Arrays], Array]
    rule: Callable[[Array, Any, Arrays, Array, int], tuple[Array, Cotangents]] | None
    rule_along: Callable[..., tuple[Array, Cotangents]] | None
    vocab_axis: int
    chunk_size: int
    chunk_along: int
    statistics: Callable[[Array, Any, Arrays], Any] | None = None
    every: bool = False
    block: int = 0
    by_blocks: Callable[..., tuple[Array, dict[str, Array], Any]] | None = None


class Tokens(NamedTuple):
    """The tokens' constants: arrays with one row per token, which of the tokens count, and what they share."""

    rows: Any
    valid: Array | None
    shared: Any = None


def slab_size(features: int, vocab: int) -> int:
    """Columns of the weights that are used and updated at once: about 4 MiB of them in float32."""
    return max(1, min(vocab, max(256, SLAB_BYTES // (4 * max(features, 1)))))


def default_chunk(
    num_tokens: int, features: int, vocab: int, itemsize: int = 4, arrays: int = 1, whole: bool = False
) -> tuple[int, int | None]:
    """How many tokens and classes have logits at once, by budget and saturation; None stands for all classes.

    Part of the classes only where the budget has no room for all those of a few tokens, and `whole` does not forbid it.
    `arrays` of a chunk's logits exist; three and more are those of a derivative of the gradient, whose direction and
    result have the size of the weights each: the budget grows to the two of them, up to a quarter of all logits.
    """
    backend = jax.default_backend()
    budget, saturation = BUDGET.get(backend, BUDGET_OTHER), SATURATION.get(backend, SATURATION_OTHER)
    if arrays > 2:
        budget = max(budget, itemsize * vocab * min(2 * features, num_tokens // 4))
    most, slab = max(1, min(saturation, num_tokens)), slab_size(features, vocab)
    fixed, per_token = temp_of_chunk(features, vocab, slab, arrays)
    fits = max(0, budget // itemsize - fixed) // per_token
    if whole or fits >= min(FEW * saturation, most):
        most = min(most, max(1, fits))
        return _equal_chunk(num_tokens - (first_chunk(most, num_tokens, features) if arrays == 1 else 0), most), None
    columns = (budget // itemsize - 3 * most * features) // (3 * (most + features))
    return most, equal_blocks(vocab, max(MIN_BLOCK, columns))


def temp_of_chunk(features: int, vocab: int, slab: int, arrays: int = 1) -> tuple[int, int]:
    """Numbers that exist beside the gradients: so many, and so many per token of a chunk.

    One array of logits, a slab of G, of the weights and of xᵀG, each with what is left over V mod S, and three rows of
    x; where there are more arrays of logits, they are gone but for one or two by the time of the slabs.
    """
    if arrays > 1:
        return 0, arrays * vocab + 5 * features + 16
    part = slab + vocab % slab if slab < vocab else 0
    return (part + min(slab, vocab)) * features, vocab + part + 3 * features + 16


def _equal_chunk(num_tokens: int, most: int) -> int:
    """Tokens per chunk, at most `most`, so that the last chunk is nearly full."""
    if most < ALIGNMENT or num_tokens < 1:
        return most
    most = most // ALIGNMENT * ALIGNMENT
    each = -(-num_tokens // max(1, -(-num_tokens // most)))
    return min(most, -(-each // ALIGNMENT) * ALIGNMENT, max(1, num_tokens))


def equal_blocks(vocab: int, most: int) -> int:
    """Classes per block, at most `most`, so that few are left over: what is left has buffers of its own."""
    return vocab // -(-vocab // max(1, most))


def wide_dtype(theta: Arrays) -> jnp.dtype:
    return dtypes.compute_dtype(dtypes.common_dtype(*(theta[n] for n in ("x", "weights", "bias") if n in theta)))


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


def first_chunk(chunk: int, num_tokens: int, features: int) -> int:
    """Tokens of the first chunk, D, whose logits lie where the gradient of the weights comes to lie; 0 for no such."""
    return features if 2 * features >= chunk and num_tokens >= FULL * features else 0


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


class Block(NamedTuple):
    """One chunk's rows: the values and the direction of x and token_weights, and the constants."""

    values: dict[str, Array]
    moving: dict[str, Array]
    constants: Any


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
        total = _add_products(total, cotangents, weights, xs, head.vocab_axis, in_place)
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


def times(x: Array, weights: Array, vocab_axis: int, axis: int = 1) -> Array:
    """xW in x's dtype, the classes along `axis`: (C, V) or (V, C); half-precision weights widen by slabs."""

    def product(w):
        a, b, i, j = (x, w, 1, 1 - vocab_axis) if axis == 1 else (w, x, 1 - vocab_axis, 1)
        return lax.dot_general(a, b, (((i,), (j,)), ((), ())))

    if weights.dtype == x.dtype:
        return product(weights)
    vocab, features = weights.shape[vocab_axis], weights.shape[1 - vocab_axis]

    def step(start, size, z):
        part = product(_slab(weights, start, size, vocab_axis, x.dtype))
        return lax.dynamic_update_slice_in_dim(z, part, start, axis)

    z = jnp.zeros((x.shape[0], vocab) if axis == 1 else (vocab, x.shape[0]), x.dtype)
    return over_slabs(vocab, slab_size(features, vocab), step, tied(z, (x, weights)))


def _slab(weights: Array, start, size: int, axis: int, dtype) -> Array:
    """A slice of the weights, in `dtype`; taken as integers if narrow: all floats are widened first by XLA on CPU."""
    if weights.dtype == dtype:
        return lax.dynamic_slice_in_dim(weights, start, size, axis)
    bits = lax.dynamic_slice_in_dim(lax.bitcast_convert_type(weights, jnp.uint16), start, size, axis)
    return lax.bitcast_convert_type(bits, weights.dtype).astype(dtype)


def _add_products(total, cotangents: Cotangents, weights, xs, axis: int, in_place: bool) -> dict[str, Array]:
    """`total` plus Σ g wᵀ for x, Σ xᵀg for the weights and the first Σ g for the bias, slab by slab.

    So nothing else has the size of the weights, and each slab of g and w is read from near. With `in_place` the
    products for the weights take the place of what they are made of.
    """
    contract = lambda a, b, i, j: lax.dot_general(a, b, (((i,), (j,)), ((), ())))
    arrays, make, scale = cotangents
    to_x, over = "x" in total, axis if in_place else 1
    scaled = lambda x: x if scale is None or x is None else scale[:, None] * x
    xs = [scaled(x) for x in xs]
    if in_place:
        total, arrays = {**total, "weights": arrays[0]}, ()

    def step(start, size, total):
        take = lambda a, axis: lax.dynamic_slice_in_dim(a, start, size, axis)
        put = lambda a, part, axis: lax.dynamic_update_slice_in_dim(a, part, start, axis)
        total = dict(total)
        parts = (take(total["weights"], axis),) if in_place else tuple(take(a, 1) for a in arrays)
        made = make(parts, start)
        if to_x:
            for g, w in zip(made, weights):
                if w is not None:
                    total["x"] = total["x"] + contract(g, _slab(w, start, size, axis, g.dtype), over, axis)
        if "weights" in total:
            pairs = [
                (x, g, 0, 1 - over) if axis == 1 else (g, x, 1 - over, 0) for g, x in zip(made, xs) if x is not None
            ]
            products = [contract(*pair) for pair in pairs]
            slab = products if in_place else [take(total["weights"], axis), *products]
            total["weights"] = put(total["weights"], sum(slab[1:], slab[0]), axis)
        if "bias" in total:
            part = jnp.sum(made[0], 1 - over) if scale is None else contract(scale, made[0], 0, 1 - over)
            total["bias"] = put(total["bias"], take(total["bias"], 0) + part, 0)
        return total

    vocab, features = weights[0].shape[axis], weights[0].shape[1 - axis]
    total = dict(over_slabs(vocab, slab_size(features, vocab), step, total))
    if to_x:
        total["x"] = scaled(total["x"])
    return total


def tied(arrays, to):
    """`arrays` plus a 0 that is linear in all of `to`: they vary over a mesh, and have tangents, as all of `to` does.

    A loop's carry must not change its type, a gradient inside a loop must not be added up over the mesh there, and
    JAX's linear solve handles no symbolic zero among its leaves.
    """
    zero = sum((jnp.sum(jnp.ravel(x)[:0]).astype(jnp.float32) for x in jax.tree.leaves(to)), jnp.float32(0))
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), arrays)


def over_slabs(vocab: int, size: int, step: Callable, carry):
    """step(start, size, carry) over whole slabs, then over what is left."""
    whole = vocab // size
    if whole == 1 and vocab == size:
        return step(0, size, carry)
    carry = lax.fori_loop(0, whole, lambda j, carry: step(j * size, size, carry), carry)
    return step(whole * size, vocab - whole * size, carry) if vocab % size else carry
