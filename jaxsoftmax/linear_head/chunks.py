"""Which tokens make a chunk, and how the rows of a chunk are read and written."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Chunks(NamedTuple):
    """The tokens that count, in chunks of `size`.

    With an `order`, N indices of tokens followed by N for at least a chunk, a chunk takes `size` of them in a row.
    Without one, the j-th of n chunks takes the tokens j, j + n, j + 2 n, …: so each device of a mesh over which XLA
    divides the tokens finds its share of every chunk at home, where a run of tokens would be one device's.
    """

    size: int
    steps: int | Array
    order: Array | None

    def take(self, x: Array, j: Array) -> Array:
        """The rows of the j-th chunk, 0 where there is no further token."""
        if self.order is None:
            return lax.dynamic_index_in_dim(self._split(x), j, 1, keepdims=False)
        return x.at[self._in_a_row(self.order, j)].get(mode="fill", fill_value=0)

    def put(self, x: Array, j: Array, rows: Array) -> Array:
        """x with the rows of the j-th chunk replaced."""
        if self.order is None:
            return lax.dynamic_update_index_in_dim(self._split(x), rows, j, 1).reshape(x.shape)
        return x.at[self._in_a_row(self.order, j)].set(rows, mode="drop")

    def _in_a_row(self, order: Array, j: Array) -> Array:
        return lax.dynamic_slice_in_dim(order, j * self.size, self.size)

    def _split(self, x: Array) -> Array:
        return x.reshape(self.size, self.steps, *x.shape[1:])


def in_a_row(size: int, num_tokens: int, counts: Array | None) -> Chunks:
    """Chunks of the tokens that count, all of them without a mask; how many chunks is then known beforehand."""
    none = jnp.asarray(num_tokens, jnp.int32)
    order = jnp.minimum(jnp.arange(num_tokens + size, dtype=jnp.int32), none)
    if counts is None:
        return Chunks(size, -(-num_tokens // size), order)
    count = jnp.sum(counts, dtype=jnp.int32)
    place = jnp.where(counts, jnp.cumsum(counts, dtype=jnp.int32) - 1, none + size)
    chosen = jnp.full_like(order, none).at[place].set(order[:num_tokens], mode="drop")
    return Chunks(size, -(-count // size), chosen)


def every_nth(size: int, num_tokens: int) -> Chunks:
    """Chunks of the largest size up to `size` that divides the number of tokens."""
    size = next(c for c in range(max(1, min(size, num_tokens)), 0, -1) if num_tokens % c == 0)
    return Chunks(size, num_tokens // size, None)
