"""The three products of attention: logits q kᵀ, rows z k and keys zᵀ q. Each one's derivatives are the other two.

Query-like arrays are (B, T, K, G, H), key-like ones (B, S, K, H), logits (B, K, G, T, S): G heads of the queries for
each of the K heads of the keys. Operands are rounded to one dtype, sums are at least float32.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jaxsoftmax._core.dtypes import compute_dtype
from jaxsoftmax._linear_map import linear_map

# With the queries' axes in the order of the logits', which XLA would otherwise transpose.
EINSUM = {"logits": "bkgth,bskh->bkgts", "rows": "bkgts,bskh->bkgth", "keys": "bkgts,bkgth->bskh"}


@dataclasses.dataclass(frozen=True)
class Products:
    """Products of operands rounded to `dtype`.

    Args:
      dtype: of the operands.
      finite: whether what is not finite in a query-like or key-like operand counts as 0, so that 0 times it is 0.
    """

    dtype: jnp.dtype
    finite: bool

    def logits(self, q: Array, k: Array) -> Array:
        """q kᵀ."""
        return _product(self, "logits", q, k)

    def rows(self, z: Array, k: Array) -> Array:
        """z k."""
        return _product(self, "rows", z, k)

    def keys(self, z: Array, q: Array) -> Array:
        """zᵀ q."""
        return _product(self, "keys", z, q)

    def operand(self, x: Array) -> Array:
        """x as the products see it."""
        x = x.astype(self.dtype)
        return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype)) if self.finite else x


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _product(of: Products, kind: str, a: Array, b: Array) -> Array:
    a, b = of.operand(a) if kind == "logits" else a.astype(of.dtype), of.operand(b)
    a, b = jnp.moveaxis(a, 1, 3) if kind == "logits" else a, jnp.moveaxis(b, 1, 3) if kind == "keys" else b
    out = jnp.einsum(EINSUM[kind], a, b, preferred_element_type=compute_dtype(of.dtype))
    return jnp.moveaxis(out, 3, 1) if kind == "rows" else out


@functools.partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(of: Products, kind: str, primals, tangents):
    out = _product(of, kind, *primals)
    moving = {i: t for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)}

    def forth(operands, moving):
        if kind == "logits" and len(moving) == 2:  # one product of twice the depth: no second array of logits
            (a, b), (da, db) = ([x.astype(of.dtype) for x in pair] for pair in (operands, moving.values()))
            return _product(of, kind, jnp.concatenate([da, a], -1), jnp.concatenate([b, db], -1))
        terms = [_product(of, kind, *(t if i == j else x for j, x in enumerate(operands))) for i, t in moving.items()]
        return functools.reduce(operator.add, terms)

    def back(operands, c):
        a, b = operands
        pull = {
            "logits": (lambda: of.rows(c, b), lambda: of.keys(c, a)),
            "rows": (lambda: of.logits(c, b), lambda: of.keys(a, c)),
            "keys": (lambda: of.logits(b, c), lambda: of.rows(a, c)),
        }[kind]
        return {i: pull[i]().astype(t.dtype) for i, t in moving.items()}

    return out, linear_map(forth, back, tuple(primals), moving, jax.typeof(out))
