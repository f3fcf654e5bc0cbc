"""Products with the weights, a slab of the vocabulary at a time.

A slab of the weights stays in the cache between its two products, and nothing else has the size of the weights: XLA
would hold a whole xᵀG beside the sum that it is added to.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core.plumbing import tied
from jaxsoftmax.linear_head import budget
from jaxsoftmax.linear_head.types import Arrays, Cotangents, Head

INTEGERS = {4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16}


def times(head: Head, x: Array, weights: Array) -> Array:
    """xW (C, V), in x's dtype; narrower weights widen by slabs."""
    axis = head.vocab_axis

    def product(w):
        return lax.dot_general(x, w, (((1,), (1 - axis,)), ((), ())))

    if weights.dtype == x.dtype:
        return product(weights)

    def step(start, size, z):
        part = product(_slab(weights, start, size, axis, x.dtype))
        return lax.dynamic_update_slice_in_dim(z, part, start, 1)

    z = tied(jnp.zeros((x.shape[0], weights.shape[axis]), x.dtype), (x, weights))
    return over_slabs(*_sizes(head, weights, 1), step, z)


def add_products(head: Head, total: Arrays, cotangents: Cotangents, weights, xs, devices: int) -> dict[str, Array]:
    """`total` plus Σ g wᵀ for x, Σ xᵀg for the weights and the first Σ g for the bias, slab by slab.

    Args:
      head: the static part.
      total: what is added to, by name.
      cotangents: G, or Ġ and G.
      weights: their partners, or None, in the products for x: W, or W and Ẇ.
      xs: their partners, or None, in the products for the weights: x, or x and ẋ.
      devices: how many do the like beside this one.
    """
    contract = lambda a, b, i, j: lax.dot_general(a, b, (((i,), (j,)), ((), ())))
    axis, (arrays, make, scale) = head.vocab_axis, cotangents
    scaled = lambda x: x if scale is None else scale[:, None] * x
    xs = [None if x is None else scaled(x) for x in xs]

    def add(total, name, start, part, axis):
        here = lax.dynamic_slice_in_dim(total[name], start, part.shape[axis], axis)
        total[name] = lax.dynamic_update_slice_in_dim(total[name], here + part, start, axis)

    def step(start, size, total):
        total = dict(total)
        made = make(tuple(lax.dynamic_slice_in_dim(a, start, size, 1) for a in arrays), start)
        if "x" in total:
            pairs = [(g, w) for g, w in zip(made, weights) if w is not None]
            parts = [contract(g, _slab(w, start, size, axis, g.dtype), 1, axis) for g, w in pairs]
            total["x"] = sum(parts, total["x"])
        if "weights" in total:
            pairs = [(x, g) if axis == 1 else (g, x) for g, x in zip(made, xs) if x is not None]
            products = [contract(a, b, 0, 0) for a, b in pairs]
            add(total, "weights", start, sum(products[1:], products[0]), axis)
        if "bias" in total:
            add(total, "bias", start, jnp.sum(made[0], 0) if scale is None else contract(scale, made[0], 0, 0), 0)
        return total

    done = dict(over_slabs(*_sizes(head, weights[0], devices), step, dict(total)))
    return {**done, "x": scaled(done["x"])} if "x" in done else done


def _sizes(head: Head, weights: Array, devices: int) -> tuple[int, int]:
    """Of the vocabulary and of a slab: all of it where XLA divides the work, which gathers a split one to cut slabs."""
    vocab, features = weights.shape[head.vocab_axis], weights.shape[1 - head.vocab_axis]
    return vocab, vocab if head.spread else budget.slab_size(features, vocab, devices)


def _slab(weights: Array, start, size: int, axis: int, dtype) -> Array:
    """A slice of the weights, in `dtype`; taken as integers if narrow: all floats are widened first by XLA on CPU."""
    if weights.dtype == dtype:
        return lax.dynamic_slice_in_dim(weights, start, size, axis)
    integers = lax.bitcast_convert_type(weights, INTEGERS[jnp.finfo(weights.dtype).bits])
    bits = lax.dynamic_slice_in_dim(integers, start, size, axis)
    return lax.bitcast_convert_type(bits, weights.dtype).astype(dtype)


def over_slabs(vocab: int, size: int, step: Callable, carry):
    """step(start, size, carry) over whole slabs, then over what is left."""
    if vocab == size:
        return step(0, size, carry)
    whole = vocab // size
    carry = lax.fori_loop(0, whole, lambda j, carry: step(j * size, size, carry), carry)
    return step(whole * size, vocab - whole * size, carry) if vocab % size else carry
