"""Products with the weights, a slab of the vocabulary at a time."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core.plumbing import tied
from jaxsoftmax.linear_head import budget
from jaxsoftmax.linear_head.types import Cotangents


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
    return over_slabs(vocab, budget.slab_size(features, vocab), step, tied(z, (x, weights)))


def _slab(weights: Array, start, size: int, axis: int, dtype) -> Array:
    """A slice of the weights, in `dtype`; taken as integers if narrow: all floats are widened first by XLA on CPU."""
    if weights.dtype == dtype:
        return lax.dynamic_slice_in_dim(weights, start, size, axis)
    bits = lax.dynamic_slice_in_dim(lax.bitcast_convert_type(weights, jnp.uint16), start, size, axis)
    return lax.bitcast_convert_type(bits, weights.dtype).astype(dtype)


def add_products(total, cotangents: Cotangents, weights, xs, axis: int, in_place: bool) -> dict[str, Array]:
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
    total = dict(over_slabs(vocab, budget.slab_size(features, vocab), step, total))
    if to_x:
        total["x"] = scaled(total["x"])
    return total


def over_slabs(vocab: int, size: int, step: Callable, carry):
    """step(start, size, carry) over whole slabs, then over what is left."""
    whole = vocab // size
    if whole == 1 and vocab == size:
        return step(0, size, carry)
    carry = lax.fori_loop(0, whole, lambda j, carry: step(j * size, size, carry), carry)
    return step(whole * size, vocab - whole * size, carry) if vocab % size else carry
