"""The fallback where a chunk of few tokens already has too many logits: the vocabulary streamed, four matrix products.

A row's loss is a function of few sums r over the vocabulary, l = l(r), which add up over blocks B of it:

    pass 1: r = Σ_B r_B(z_B),    then σ = a ∂l/∂r,    pass 2, with the logits recomputed: G_B = σ ∂r_B/∂z_B.

The exponentials in r are scaled by the running maximum m of the row. The loss does not depend on m, so m is a constant
to differentiation. All of it is arithmetic, so forward mode of it gives every higher derivative.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import class_axis as num
from jaxsoftmax._core.plumbing import tied
from jaxsoftmax._core.scalar_functions import sigmoid, softplus, weigh
from jaxsoftmax.linear_head.budget import equal_blocks
from jaxsoftmax.linear_head.slabs import over_slabs
from jaxsoftmax.linear_head.statistics import TokenStatistics, capped
from jaxsoftmax.linear_head.types import Block, Head


class RowSums(NamedTuple):
    """Sums over the classes, (C, 1) each; the last three run over logits above -inf and are used by label smoothing."""

    others: Array  # Σ exp(u_k - m) over all but the label
    label: Array  # u_label
    count: Array  # Σ 1
    weight: Array  # Σ w_k
    weighted: Array  # Σ w_k u_k


def row_sums(u: Array, m: Array, start, constants, options) -> RowSums:
    """What the classes start, start + 1, … with capped logits u (C, B) contribute."""
    size = u.shape[1]
    place = constants[0][:, None] - start
    inside = (place >= 0) & (place < size)
    index = jnp.arange(u.shape[0]), jnp.where(inside, place, size)[:, 0]  # outside the block: dropped
    others = num.class_sum(jnp.exp(num.shift(u, m)).at[index].set(0.0, mode="drop"), 1)
    label = jnp.where(inside, jnp.take_along_axis(u, jnp.clip(place, 0, size - 1), 1), 0.0)
    if "label_smoothing" not in options:
        return RowSums(others, label, *3 * [jnp.zeros_like(m)])
    exists = (lax.stop_gradient(u) > -jnp.inf).astype(u.dtype)
    weights = exists
    if "class_weights" in options:
        weights = exists * lax.dynamic_slice_in_dim(options["class_weights"], start, size)[None, :]
    finite = jnp.where(exists > 0, u, 0.0)
    return RowSums(others, label, *(num.class_sum(x, 1) for x in (exists, weights, weights * finite)))


def losses_from_sums(m: Array, sums: RowSums, constants, options) -> Array:
    """Losses (C,): (1 - ε) w_c nll + (ε / K) Σ_k w_k (logsumexp - u_k) + ζ logsumexp²."""
    labels = constants[0][:, None]
    gap = jnp.where(sums.label == jnp.inf, 0.0, sums.label - m)
    gap = jnp.where(labels < 0, jnp.nan, gap)
    total = num.one_infinity(sums.others + jnp.exp(gap), m, 1)
    others = jnp.where(jnp.isnan(total), total, sums.others)
    near = jnp.log1p(others / jnp.exp(jnp.maximum(gap, -1.0)))  # nothing cancels when the label is sure
    losses = jnp.where(gap > -1, near, jnp.log(total) - gap)
    logsumexp = m + jnp.log(total)
    if "class_weights" in options:
        losses = losses * options["class_weights"][jnp.maximum(labels, 0)]
    if "label_smoothing" in options:
        spread = (sums.weight * logsumexp - sums.weighted) / jnp.maximum(sums.count, 1)
        losses = (1 - options["label_smoothing"]) * losses + options["label_smoothing"] * spread
    if "z_loss" in options:
        losses = losses + options["z_loss"] * logsumexp**2
    return losses[:, 0]


def merged_statistics(one: TokenStatistics, other: TokenStatistics, labels: Array) -> TokenStatistics:
    """Statistics of two blocks as one, with probabilities π = σ(∓ gap); the entropy is Σ_b π_b (H_b - log π_b)."""
    equal = one.logsumexp == other.logsumexp  # -inf, perhaps
    gap = jnp.where(equal, 0.0, other.logsumexp - one.logsumexp)
    blocks = (one, gap), (other, -gap)
    peaks = [weigh(sigmoid(-against), block.probability) for block, against in blocks]
    entropies = [weigh(sigmoid(-against), block.entropy + softplus(against)) for block, against in blocks]
    prediction = jnp.where(peaks[1] > peaks[0], other.prediction, one.prediction)
    logsumexp = jnp.logaddexp(one.logsumexp, other.logsumexp)
    return TokenStatistics(
        logsumexp, prediction, jnp.maximum(*peaks), prediction == labels, entropies[0] + entropies[1]
    )


def chunk_by_blocks(head: Head, rows: tuple[str, ...], theta, moving, is_gradient: bool, block: Block, out, index):
    """Losses of one chunk of tokens, `out` with its contribution added, and its statistics; or all that along `moving`.

    Only what is local to a pass or a block is differentiated, never the loop that adds up the gradient of the weights.
    """
    theta, moving = {**theta, **block.values}, {**moving, **block.moving}
    axis, constants, here = head.vocab_axis, block.constants, {n: theta[n] for n in moving}
    axes = {n: i for n, i in (("weights", axis), ("bias", 0)) if n in theta}
    vocab, wide, everything = theta["weights"].shape[axis], theta["x"].dtype, (theta, moving, constants)
    if not is_gradient:  # a tangent may vary over a mesh where its primal does not
        here, moving = tied((here, moving), everything)
    size_of_block = head.block if is_gradient else equal_blocks(vocab, head.block // 3)  # more arrays of a block exist

    def push(f, primals, tangents) -> tuple[Any, Any]:
        """f and, along a direction, its derivative."""
        return (f(*primals), None) if is_gradient else jax.jvp(f, primals, tangents)

    def read(theta, start, size):
        """What the logits of a block depend on."""
        slabs = {n: lax.dynamic_slice_in_dim(theta[n], start, size, axes[n]).astype(wide) for n in axes}
        return {n: v for n, v in theta.items() if n != "token_weights"} | slabs

    def raw_logits(args):
        z = lax.dot_general(args["x"], args["weights"], (((1,), (1 - axis,)), ((), ())))
        return z + args["bias"][None, :] if "bias" in args else z

    def first_pass(here):
        def step(start, size, carry):
            m, sums, statistics = carry
            start = tied(jnp.asarray(start, jnp.int32), everything)
            args = read({**theta, **here}, start, size)
            z = raw_logits(args)
            u = capped(z, args)
            larger = jnp.maximum(m, lax.stop_gradient(num.class_max(u, 1)))
            sums = sums._replace(others=sums.others * jnp.exp(num.shift(m, larger)))
            sums = jax.tree.map(jnp.add, sums, row_sums(u, larger, start, constants, args))
            if head.statistics is not None:
                part = head.statistics(z, constants, args)
                part = part._replace(prediction=part.prediction + jnp.asarray(start, jnp.int32))
                statistics = merged_statistics(statistics, part, constants[0])
            return larger, sums, statistics

        zero = jnp.zeros((theta["x"].shape[0], 1), wide)
        start = zero - jnp.inf, RowSums(*5 * [zero]), _no_statistics(head, theta["x"])
        return over_slabs(vocab, size_of_block, step, tied(start, everything))

    def between(here, sums):
        """The losses, and the cotangents of the row sums and of the options."""
        args = {**theta, **here}
        sought = tied({n: args[n] for n in rows if n not in ("x", "token_weights", *axes)}, everything)
        of = lambda sums, sought: losses_from_sums(m, sums, constants, {**args, **sought})
        losses, pull = jax.vjp(of, sums, sought)
        return losses, *pull(args["token_weights"])

    def of_block(here, of_sums, start, size):
        start = tied(jnp.asarray(start, jnp.int32), everything)
        args = read({**theta, **here}, start, size)
        sums = lambda args: tied(row_sums(capped(raw_logits(args), args), m, start, constants, args), everything)
        sought = tied({n: args[n] for n in rows if n in args}, everything)
        return jax.vjp(lambda sought: sums(args | sought), sought)[1](of_sums)[0]

    kind = 0 if is_gradient else 1
    both = push(first_pass, (here,), (moving,))
    m, sums, statistics = both[0]
    results = push(between, (here, sums), (moving, both[1] and both[1][1]))
    losses, _, of_options = results[kind]
    if set(rows) <= {"token_weights"}:
        return losses, out, statistics
    of_sums = [result and result[1] for result in results]

    def second_pass(start, size, carry):
        f = lambda here, of_sums: of_block(here, of_sums, start, size)
        found = push(f, (here, of_sums[0]), (moving, of_sums[1]))[kind]
        return {n: _add(carry[n], found[n], start, axes.get(n)) for n in found}

    total = {n: jnp.zeros_like(theta["x"]) if n == "x" else out[n] for n in rows if n != "token_weights"}
    total |= {n: total[n] + of_options[n] for n in of_options}
    total = over_slabs(vocab, size_of_block, second_pass, tied(total, everything))
    if "x" in rows:
        total["x"] = out["x"].at[index].set(total["x"], mode="drop")
    return losses, {**out, **total}, statistics


def _add(whole: Array, part: Array, start, axis: int | None) -> Array:
    """whole + part; along `axis`, where there is one, the part begins at `start`."""
    if axis is None:
        return whole + part
    here = lax.dynamic_slice_in_dim(whole, start, part.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(whole, here + part, start, axis)


def _no_statistics(head: Head, x: Array) -> TokenStatistics | None:
    """Statistics of no class."""
    if head.statistics is None:
        return None
    zero, index = jnp.zeros(x.shape[0], x.dtype), jnp.zeros(x.shape[0], jnp.int32)
    return TokenStatistics(zero - jnp.inf, index, zero, index > 0, zero)
