"""Attention of a block of queries to whole rows of keys, and its first derivatives in closed form.

    o = P v,    ȯ = P∘(ż - c) (v - o) + P v̇,    dz = P∘(g (v - o)ᵀ),    dv = Pᵀ g,    P = softmax(z),

for any c per row. What is small beside a 1 is measured from the key with the row's largest logit, its top: c = ż_top,
and o = v_top + gap, where the gap Σ p (v - v_top) has no term of the top.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoftmax._core.class_axis import class_index
from jaxsoftmax._core.dtypes import compute_dtype
from jaxsoftmax.attention.products import Products
from jaxsoftmax.losses.softcap import capped
from jaxsoftmax.maps.softmax import probabilities

Arrays = dict[str, Array]
HINTS = ("lse", "top", "gap")  # what the value tells its derivatives of each query; lse is inf where it sees no key


class Block(NamedTuple):
    """A block of queries.

    Attributes:
      constants: what is not differentiated: masks, lengths, segments; hints, where they are known.
      query: position of the first query.
      key: position of the first key that the block looks at.
    """

    constants: Arrays
    query: Array | int
    key: Array | int


class Body:
    """What is done with a block: a function of arrays by name, and its derivatives.

    A subclass has `plain`, which JAX differentiates, and may say the value and the derivatives in better words.

    """

    @property
    def level(self) -> int:
        """How many derivatives it is of another body."""
        return 0

    def telling(self) -> "Body":
        """The body whose value tells the HINTS that its derivatives need."""
        return self

    def value(self, block: Block, args: Arrays) -> Arrays:
        return self.plain(block, args)

    def plain(self, block: Block, args: Arrays) -> Arrays:
        raise NotImplementedError

    def push(self, block: Block, args: Arrays, tangents: Arrays) -> Arrays:
        """The derivatives of the results along the tangents."""
        return _along(lambda args: self.plain(block, args), args, tangents)[1]

    def pull(self, block: Block, args: Arrays, names: tuple[str, ...], cotangents: Arrays) -> Arrays:
        """The cotangents of the named arguments, in at least float32."""
        moving = {name: args[name].astype(compute_dtype(args[name].dtype)) for name in names}
        out, back = jax.vjp(lambda moving: self.plain(block, {**args, **moving}), moving)
        return back({name: c.astype(out[name].dtype) for name, c in cotangents.items()})[0]


@dataclasses.dataclass(frozen=True)
class Attention(Body):
    """softmax(scale q kᵀ + bias) v under masks.

    Args:
      dtype: of query, key and value.
      scale: of the logits.
      softcap: c where scaled logits are c tanh(logits / c), else None.
      causal: whether no query sees a key behind its own position.
      window: how many keys before and behind its own position a query sees, or None.
      queries: how many queries there are, where a block may have more, else None.
      masked: whether anything is masked.
      empties: whether a query may see no key; where none does, XLA knows the softmax as one kernel on GPU.
      hints: whether the value tells the HINTS.
    """

    dtype: jnp.dtype
    scale: float
    softcap: float | None
    causal: bool
    window: tuple[int, int] | None
    queries: int | None
    masked: bool
    empties: bool
    hints: bool = False

    def telling(self) -> "Attention":
        return dataclasses.replace(self, hints=True)

    @property
    def narrow(self) -> jnp.dtype:
        """The dtype of P and what it is multiplied with: that of the operands, but for float16 with its short range."""
        return compute_dtype(self.dtype) if self.dtype == jnp.float16 else self.dtype

    @property
    def products(self) -> Products:
        return Products(self.dtype, finite=self.masked)

    def value(self, block: Block, args: Arrays) -> Arrays:
        z, value = self._logits(block, args), args["value"]
        m = jnp.max(z, -1, keepdims=True)
        shifted = jnp.exp(z - (jnp.where(m == -jnp.inf, 0.0, m) if self.empties else m))
        if not self.hints:
            total = jnp.sum(shifted, -1, keepdims=True)
            p = shifted / (jnp.where(total == 0, 1.0, total) if self.empties else total)
            return {"out": self.products.rows(p, value).astype(self.dtype)}
        m, top = m[..., 0], jnp.argmax(z, -1).astype(jnp.int32)
        others = jnp.where(class_index(z, 4) == top[..., None], 0.0, shifted)
        rest = jnp.sum(others, -1)
        v_top = self._at(top, value)
        gap = (self.products.rows(others, value) - _row(rest) * v_top) / _row(1 + rest)
        return {
            "out": jnp.where(_row(m) == -jnp.inf, 0.0, v_top + gap).astype(self.dtype),
            "lse": jnp.where(m == -jnp.inf, jnp.inf, m + jnp.log1p(rest)),
            "top": top + block.key,
            "gap": gap.astype(self.dtype),
        }

    def plain(self, block: Block, args: Arrays) -> Arrays:
        lse = block.constants["lse"][..., None]
        p = probabilities(self._logits(block, args), lse, jnp.ones_like(lse), 4)
        return {"out": self.products.rows(p, args["value"]).astype(self.dtype)}

    def push(self, block: Block, args: Arrays, tangents: Arrays) -> Arrays:
        z, dz = _along(lambda args: self._logits(block, args), args, tangents)
        p, value, out = self._probabilities(block, z), args["value"], jnp.zeros((), z.dtype)
        empty = block.constants["lse"] == jnp.inf
        if dz is not None:
            c = jnp.where(empty, 0.0, _along(lambda args: self._logit_at_top(block, args), args, tangents)[1])
            y = p * _unless_top((dz - c[..., None]).astype(self.narrow), p)
            o = jnp.where(_row(empty), 0.0, self._at(self._top(block), value) + block.constants["gap"].astype(z.dtype))
            out = self.products.rows(y, value) - _row(jnp.sum(y, -1, dtype=z.dtype)) * o
        if "value" in tangents:
            out = out + self.products.rows(p, tangents["value"])
        return {"out": out.astype(self.dtype)}

    def pull(self, block: Block, args: Arrays, names: tuple[str, ...], cotangents: Arrays) -> Arrays:
        query, key, value, g = args["query"], args["key"], args["value"], cotangents["out"]
        bias = {name: args[name] for name in ("bias",) if name in args}
        raw = self.products.logits(query, key)
        z, back = jax.vjp(lambda raw, bias: self._logits_of(block, raw, args, bias), raw, bias)
        p, wide, out = self._probabilities(block, z), g.astype(z.dtype), {}
        if {"query", "key", "bias"} & {*names}:
            of_gap, of_top = (
                jnp.einsum("btkgh,btkgh->bkgt", wide, x)[..., None]
                for x in (block.constants["gap"].astype(z.dtype), self._at(self._top(block), value))
            )
            y = _unless_top((self.products.logits(g, value) - of_top).astype(self.narrow), p)
            draw, dbias = back((p * (y - of_gap.astype(self.narrow))).astype(z.dtype))
            pulled = {
                "query": lambda: self.products.rows(draw, key),
                "key": lambda: self.products.keys(draw, query),
                "bias": lambda: dbias["bias"],
            }
            out = {name: pulled[name]() for name in names if name in pulled}
        if "value" in names:
            if self.masked:  # what is not finite in g is missing in the product
                p = jnp.where(z == -jnp.inf, jnp.zeros((), p.dtype), p + _nan_of(wide).astype(p.dtype)[..., None])
            out["value"] = self.products.keys(p, g)
        return out

    def _logits(self, block: Block, args: Arrays) -> Array:
        return self._logits_of(block, self.products.logits(args["query"], args["key"]), args, args)

    def _logits_of(self, block: Block, raw: Array, args: Arrays, bias: Arrays) -> Array:
        """Logits, of products, that are -inf where a key is not seen, and NaN where it is and is not finite."""
        z = self._finished(raw, bias.get("bias"))
        if not self.masked:
            return z
        of_key = sum(_nan_of(args[name].astype(z.dtype)) for name in ("key", "value"))
        z = z + _nan_of(args["query"].astype(z.dtype))[..., None] + jnp.moveaxis(of_key, 1, -1)[:, :, None, None]
        return jnp.where(self._seen(block, *z.shape[-2:]), z, -jnp.inf)

    def _finished(self, raw: Array, bias: Array | None) -> Array:
        z = raw * self.scale
        z = z if self.softcap is None else capped(z, self.softcap)
        return z if bias is None else z + bias.astype(z.dtype)

    def _logit_at_top(self, block: Block, args: Arrays) -> Array:
        top = self._top(block)
        raw = jnp.einsum("btkgh,btkgh->bkgt", self._wide(args["query"]), self._at(top, args["key"]))
        bias = args.get("bias")
        if bias is not None and bias.shape[-1] > 1:
            bias = jnp.take_along_axis(bias, top[..., None], -1, mode="clip")
        return self._finished(raw, None if bias is None else bias[..., 0])

    def _probabilities(self, block: Block, z: Array) -> Array:
        return jnp.exp(z - block.constants["lse"][..., None]).astype(self.narrow)

    def _top(self, block: Block) -> Array:
        return block.constants["top"] - block.key

    def _at(self, top: Array, x: Array) -> Array:
        """Of key-like x, each query's row: (B, T, K, G, H)."""
        index = jnp.moveaxis(top, -1, 1)[..., None]
        return self._wide(jnp.take_along_axis(x[:, :, :, None], index, 1, mode="clip"))

    def _wide(self, x: Array) -> Array:
        return self.products.operand(x).astype(compute_dtype(self.dtype))

    def _seen(self, block: Block, queries: int, keys: int) -> Array:
        """Which keys each query sees, broadcasting to the logits."""
        given = block.constants
        t = block.query + jnp.arange(queries, dtype=jnp.int32)[:, None]
        s = block.key + jnp.arange(keys, dtype=jnp.int32)[None, :]
        seen = [given[name] for name in ("mask",) if name in given]
        if self.queries is not None:
            seen.append(_of_batch(t < self.queries))
        t = t + given["first"] if "first" in given else t
        if self.causal:
            seen.append(_of_batch(s <= t))
        if self.window is not None:
            seen.append(_of_batch((s >= t - self.window[0]) & (s <= t + self.window[1])))
        for name, position in (("query_lengths", t), ("key_lengths", s)):
            if name in given:
                seen.append(_of_batch(position[None] < given[name][:, None, None]))
        if "query_segments" in given:
            seen.append(_of_batch(given["query_segments"][:, :, None] == given["key_segments"][:, None, :]))
        return _all(seen)


def _along(f, args: Arrays, tangents: Arrays):
    """f(args) and its derivative along the tangents."""
    moving = {name: args[name] for name in tangents}
    tangents = {name: t.astype(args[name].dtype) for name, t in tangents.items()}
    return jax.jvp(lambda moving: f({**args, **moving}), (moving,), (tangents,))


def _unless_top(y: Array, p: Array) -> Array:
    """y, and 0 where p > 3/4: in minima and maxima, which take less memory traffic on GPU than a choice does."""
    bound = jnp.maximum(jnp.asarray(0.75, p.dtype) - p, jnp.zeros((), p.dtype)) * jnp.finfo(p.dtype).max
    return jnp.maximum(jnp.minimum(y, bound), -bound)


def _nan_of(x: Array) -> Array:
    """NaN for each row of x that is not finite, else 0: (B, S, K) of key-like x, (B, K, G, T) of query-like x."""
    nan = jnp.sum(0.0 * x, -1)
    return nan if x.ndim == 4 else jnp.moveaxis(nan, 1, -1)


def _row(x: Array) -> Array:
    """(B, K, G, T) -> (B, T, K, G, 1)."""
    return jnp.moveaxis(x, -1, 1)[..., None]


def _of_batch(seen: Array) -> Array:
    """(T, S) or (B, T, S) -> (B, 1, 1, T, S)."""
    return jnp.expand_dims(seen, (1, 2) if seen.ndim == 3 else (0, 1, 2))


def _all(conditions: list[Array]) -> Array:
    out = conditions[0]
    for condition in conditions[1:]:
        out = out & condition
    return out
