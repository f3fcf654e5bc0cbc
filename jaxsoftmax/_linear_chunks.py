"""The linear head, streamed: chunks of tokens, the gradient of the weights in slabs of the vocabulary.

MATHEMATICS.md section 6. The one quantity is F = Σ_i a_i l(z_i), z = xW + b, with a weight a_i per token: its gradient
in a is the vector of losses. `stream` forms rows of grad F, or of (D grad F)[t] along one direction t, with one pass:

    G = a ∂l/∂z:    dx = G Wᵀ,            dW = xᵀ G,            db = Σ G,    da = l,
    along t:        dx = Ġ Wᵀ + G Ẇᵀ,     dW = xᵀ Ġ + ẋᵀ G,     db = Σ Ġ,    da = l̇,     ż = ẋW + xẆ + ḃ.

No loop here is ever transposed: reverse mode uses the symmetry of the second and higher derivatives of F.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax import _numerics as num

Arrays = Mapping[str, Array]

# Per backend: bytes of temporary memory to aim at, and the tokens beyond which a larger chunk gains nothing: the
# traffic of the accumulator, κ D V bytes per chunk, is then 5 % of the time of its 6 C D V operations.
BUDGET = {"cpu": 64 << 20}
BUDGET_OTHER = 2 << 30
SATURATION = {"cpu": 512}
SATURATION_OTHER = 8192
SLAB_BYTES = 8 << 20
ALIGNMENT = 8
# So few tokens per chunk, as a part of the saturation, that four matrix products over blocks of the vocabulary take
# less time than three over all of it.
FEW = 0.1
MIN_BLOCK = 128


class Head(NamedTuple):
    """What is static in a linear head: how logits become losses, where the vocabulary lies, how much exists at once.

    With `by_blocks`, which then does the work of a chunk, no more than `block` classes have logits at once.
    """

    losses: Callable[[Any, Array, Any, Arrays], Array]
    rule: Callable[[Array, Any, Arrays], tuple[Array, Array, Array]] | None
    rule_along: Callable[..., tuple[Array, Array, Array, Array]] | None
    vocab_axis: int
    chunk_size: int
    statistics: Callable[[Array, Any, Arrays], Any] | None = None
    block: int = 0
    by_blocks: Callable[..., tuple[Array, dict[str, Array], Any]] | None = None


class Tokens(NamedTuple):
    """The tokens' constants: arrays with one row per token, which of the tokens count, and what they share."""

    rows: Any
    valid: Array | None
    shared: Any = None


def slab_size(features: int, vocab: int) -> int:
    """Columns of the weights that are updated at once: about 8 MiB of them in float32."""
    return max(1, min(vocab, max(256, SLAB_BYTES // (4 * max(features, 1)))))


def default_chunk(
    num_tokens: int, features: int, vocab: int, itemsize: int = 4, whole: bool = False
) -> tuple[int, int | None]:
    """How many tokens and classes have logits at once, by budget and saturation; None stands for all classes.

    Part of the classes only where the budget has no room for all those of a few tokens, and `whole` does not forbid it.
    """
    backend = jax.default_backend()
    budget, saturation = BUDGET.get(backend, BUDGET_OTHER), SATURATION.get(backend, SATURATION_OTHER)
    most, slab = max(1, min(saturation, num_tokens)), slab_size(features, vocab)
    fixed, per_token = (slab + vocab % slab) * features, vocab + (slab if slab < vocab else 0) + 4 * features + 16
    fits = max(0, budget // itemsize - fixed) // per_token
    if whole or fits >= min(FEW * saturation, most):
        return _equal_chunk(num_tokens, min(most, max(1, fits))), None
    columns = (budget // itemsize - 3 * most * features) // (3 * (most + features))
    return most, equal_blocks(vocab, max(MIN_BLOCK, columns))


def _equal_chunk(num_tokens: int, most: int) -> int:
    """Tokens per chunk, at most `most`, so that the last chunk is nearly full."""
    if most < ALIGNMENT:
        return most
    most = most // ALIGNMENT * ALIGNMENT
    each = -(-num_tokens // max(1, -(-num_tokens // most)))
    return min(most, -(-each // ALIGNMENT) * ALIGNMENT, max(1, num_tokens))


def equal_blocks(vocab: int, most: int) -> int:
    """Classes per block, at most `most`, so that few are left over: what is left has buffers of its own."""
    return vocab // -(-vocab // max(1, most))


def wide_dtype(theta: Arrays) -> jnp.dtype:
    return num.compute_dtype(num.common_dtype(*(theta[n] for n in ("x", "weights", "bias") if n in theta)))


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
    chunk = chunk_of(head, direction is not None, num_tokens)
    moving = {} if direction is None else dict(direction)
    order, count = _order(theta["token_weights"], tokens.valid, skip, chunk)
    out = {name: jnp.zeros(theta[name].shape, wide) for name in rows if name != "token_weights"}
    block = lambda index: _take(theta, moving, tokens, index, wide)
    statistics = _empty_statistics(head, block, chunk, num_tokens, theta, wide)

    work = _chunk if head.by_blocks is None else head.by_blocks

    def step(carry):
        i, losses, out, statistics = carry
        index = lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        here, out, facts = work(head, rows, theta, moving, direction is None, block(index), out, index)
        put = lambda whole, part: whole.at[index].set(part, mode="drop")
        return i + 1, put(losses, here), out, jax.tree.map(put, statistics, facts)

    start = (jnp.int32(0), jnp.zeros(num_tokens, wide), out, statistics)
    _, losses, out, statistics = lax.while_loop(lambda carry: carry[0] < count, step, start)
    if "token_weights" in rows:
        out["token_weights"] = losses
    return losses, {name: out[name].astype(theta[name].dtype) for name in rows}, statistics


def chunk_of(head: Head, differentiated: bool, num_tokens: int) -> int:
    """Tokens per chunk; fewer where more than one array of a chunk's logits exists."""
    plain = head.rule is not None and head.statistics is None
    arrays = (1 if plain else 2) * (3 if differentiated else 1) if head.by_blocks is None else 1
    return max(1, min(head.chunk_size // arrays, num_tokens))


def _order(weights: Array, valid: Array | None, skip: bool, chunk: int) -> tuple[Array, Array]:
    """Indices of the tokens that count, padded with N to whole chunks, and the number of chunks that hold any."""
    num_tokens = weights.shape[0]
    chunks = -(-num_tokens // chunk)
    if skip:
        counts = weights != 0
        valid = counts if valid is None else valid & counts
    if valid is None:
        order = jnp.arange(chunks * chunk, dtype=jnp.int32)
        return jnp.minimum(order, num_tokens), jnp.int32(chunks)
    (order,) = jnp.nonzero(valid, size=chunks * chunk, fill_value=num_tokens)
    return order.astype(jnp.int32), (jnp.sum(valid, dtype=jnp.int32) + (chunk - 1)) // chunk


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


def _chunk(head: Head, rows, theta, moving, is_gradient: bool, block: Block, out, index):
    """Losses of one chunk, `out` with its contribution added, and its statistics."""
    g: Any = None
    weights, axis = theta["weights"], head.vocab_axis
    shared = {n: v for n, v in theta.items() if n not in ("x", "weights", "token_weights")}
    sought = tuple(n for n in rows if n not in ("x", "weights", "token_weights", "bias"))
    needs_gradient = bool(set(rows) - {"token_weights"})
    x, statistics, scale = block.values["x"], None, None

    def logits(x, weights, bias):
        z = times(x, weights, 1 - axis, axis)
        return z if bias is None else z + bias.astype(z.dtype)[None, :]

    def gradient(z, token_weights, options):
        """(l, G, gradient in the options that are sought), by the plain rules."""
        of = lambda z, sought: head.losses(head, z, block.constants, {**options, **sought})
        losses, pull = jax.vjp(of, z, {n: options[n] for n in sought})
        return losses, *pull(token_weights)

    if is_gradient:
        z = logits(x, weights, theta.get("bias"))
        options = {n: v for n, v in shared.items() if n != "bias"}
        if head.statistics is not None:
            statistics = head.statistics(z, block.constants, options)
        if head.rule is not None and not sought:
            losses, g, scale = head.rule(z, block.constants, options)
            scale = scale * block.values["token_weights"][:, None]
            by_option = {}
        elif needs_gradient:
            losses, g, by_option = gradient(z, block.values["token_weights"], options)
        else:
            losses, g, by_option = head.losses(head, z, block.constants, options), None, {}
        pairs_x, pairs_w, last = [(g, scale, weights)], [(x, scale, g)], (g, scale)
    else:
        tangents = {n: moving[n] for n in moving if n not in ("x", "weights", "token_weights")}
        z, dz = _logits_along(logits, x, block.moving.get("x"), weights, moving.get("weights"), theta, moving)
        options = {n: v for n, v in shared.items() if n != "bias"}
        da = block.moving.get("token_weights")
        if head.rule_along is not None and not sought and not set(tangents) - {"bias"}:
            losses, g, scale, dg = head.rule_along(z, dz, block.constants, options, block.values["token_weights"], da)
            by_option = {}
        else:
            names = tuple(n for n in tangents if n != "bias")
            args = {"z": z, "token_weights": block.values["token_weights"], **options}
            along = {"z": dz, "token_weights": da, **{n: tangents[n] for n in names}}
            along = {n: t.astype(args[n].dtype) for n, t in along.items() if t is not None}

            def of(along_args):
                full = {**args, **along_args}
                rest = {n: v for n, v in full.items() if n not in ("z", "token_weights")}
                if needs_gradient:
                    return gradient(full["z"], full["token_weights"], rest)
                return head.losses(head, full["z"], block.constants, rest), None, {}

            (_, g, _), (losses, dg, by_option) = jax.jvp(of, ({n: args[n] for n in along},), (along,))
        more_x = [(g, scale, moving["weights"])] if "weights" in moving else []
        more_w = [(block.moving["x"], scale, g)] if "x" in moving else []
        pairs_x, pairs_w, last = [(dg, None, weights), *more_x], [(x, None, dg), *more_w], (dg, None)

    out = dict(out)
    if "x" in rows:
        dx = sum(_scaled(times(g_i, w_i, axis, axis), scale_i) for g_i, scale_i, w_i in pairs_x)
        out["x"] = out["x"].at[index].set(dx, mode="drop")
    if "weights" in rows:
        pairs = [(_scaled(x_i, scale_i), g_i) for x_i, scale_i, g_i in pairs_w]
        out["weights"] = _add_products(out["weights"], pairs, axis)
    if "bias" in rows:
        out["bias"] = out["bias"] + jnp.sum(_scaled(*last), 0)
    for name in sought:
        out[name] = out[name] + by_option[name].astype(out[name].dtype)
    return losses, out, statistics


def _scaled(x: Array, scale: Array | None) -> Array:
    return x if scale is None else x * scale


def _logits_along(logits, x, dx, weights, dw, theta, moving):
    """z and ż = ẋW + xẆ + ḃ; ż is None where nothing that moves reaches the logits."""
    z = logits(x, weights, theta.get("bias"))
    terms = []
    if dx is not None:
        terms.append(logits(dx, weights, None))
    if dw is not None:
        terms.append(logits(x, dw, None))
    if "bias" in moving:
        terms.append(jnp.broadcast_to(moving["bias"].astype(z.dtype)[None, :], z.shape))
    return z, (sum(terms[1:], terms[0]) if terms else None)


def times(a: Array, weights: Array, contract: int, vocab_axis: int) -> Array:
    """a times the weights, contracted over one of their axes, in a's dtype; half-precision weights widen by slabs."""
    if weights.dtype == a.dtype:
        return lax.dot_general(a, weights, (((1,), (contract,)), ((), ())))
    over_vocab = contract == vocab_axis
    vocab, features = weights.shape[vocab_axis], weights.shape[1 - vocab_axis]

    def step(start, size, out):
        w = _slab(weights, start, size, vocab_axis).astype(a.dtype)
        part = lax.dynamic_slice_in_dim(a, start, size, 1) if over_vocab else a
        product = lax.dot_general(part, w, (((1,), (contract,)), ((), ())))
        return out + product if over_vocab else lax.dynamic_update_slice_in_dim(out, product, start, 1)

    start = jnp.zeros((a.shape[0], features if over_vocab else vocab), a.dtype)
    return over_slabs(vocab, slab_size(features, vocab), step, start)


def _slab(weights: Array, start, size: int, axis: int) -> Array:
    """A slice of half-precision weights, taken as integers: of floats, XLA's CPU backend would widen them all first."""
    bits = lax.dynamic_slice_in_dim(lax.bitcast_convert_type(weights, jnp.uint16), start, size, axis)
    return lax.bitcast_convert_type(bits, weights.dtype)


def _add_products(total: Array, pairs: list[tuple[Array, Array]], axis: int) -> Array:
    """total + Σ xᵀg (its transpose for a (V, D) layout), slab by slab: no second array of the size of the weights."""
    vocab, features = total.shape[axis], total.shape[1 - axis]

    def step(start, size, total):
        slab = lax.dynamic_slice_in_dim(total, start, size, axis)
        for x, g in pairs:
            g = lax.dynamic_slice_in_dim(g, start, size, 1)
            left, right = (x, g) if axis == 1 else (g, x)
            slab = slab + lax.dot_general(left, right, (((0,), (0,)), ((), ())))
        return lax.dynamic_update_slice_in_dim(total, slab, start, axis)

    return over_slabs(vocab, slab_size(features, vocab), step, total)


def over_slabs(vocab: int, size: int, step: Callable, carry):
    """step(start, size, carry) over whole slabs, then over what is left."""
    whole = vocab // size
    if whole == 1 and vocab == size:
        return step(0, size, carry)
    carry = lax.fori_loop(0, whole, lambda j, carry: step(j * size, size, carry), carry)
    return step(whole * size, vocab - whole * size, carry) if vocab % size else carry
