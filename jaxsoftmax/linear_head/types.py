"""What the files of the linear head hand to each other."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxsoftmax._core import dtypes

Arrays = Mapping[str, Array]


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


class Block(NamedTuple):
    """One chunk's rows: the values and the direction of x and token_weights, and the constants."""

    values: dict[str, Array]
    moving: dict[str, Array]
    constants: Any


def wide_dtype(theta: Arrays) -> jnp.dtype:
    return dtypes.compute_dtype(dtypes.common_dtype(*(theta[n] for n in ("x", "weights", "bias") if n in theta)))
