"""Attention of a block of queries to whole rows of keys, and its derivatives.

With P = softmax(z) the rows' probabilities, o = P v, and g the cotangent of o,

    ȯ = P∘(ż - c) (v - o) + P v̇,    ∂<g, o>/∂z = P∘(g (v - o)ᵀ),    ∂<g, o>/∂v = Pᵀ g,

for any c per row, v - o row by row. What is small beside a 1 is measured from the row's largest logit, its top:
c = ż_top, and o = v_top + gap, where the gap Σ p (v - v_top) has no term of the top. Their derivatives are forward mode
of a softmax and its Jacobian, P∘(x - <p, x>) measured in the same way; reverse mode needs no others (`blocks`).

Query-like arrays are (B, T, K, G, H), key-like ones (B, S, K, H), logits (B, K, G, T, S): G heads of the queries for
each of the K heads of the keys. Operands of products are rounded to their dtype, sums are at least float32.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxsoftmax._core import classes, forms
from jaxsoftmax._core.dtypes import compute_dtype
from jaxsoftmax.losses.softcap import cap_derivatives, capped

Arrays = dict[str, Array]
Wanted = tuple[str, tuple[int, ...]]  # the gradient of <g, o> in the argument of this name, "out" for o itself, along …
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


@dataclasses.dataclass(frozen=True)
class Attention:
    """softmax(scale q kᵀ + bias) v under masks.

    Args:
      dtype: of query, key and value.
      scale: of the logits.
      softcap: c where scaled logits are c tanh(logits / c), else None.
      causal: whether no query sees a key behind its own position.
      window: how many keys before and behind its own position a query sees, or None.
      masked: whether anything is masked.
      empties: whether a query may see no key; where none does, XLA knows the softmax as one kernel on GPU.
    """

    dtype: jnp.dtype
    scale: float
    softcap: float | None
    causal: bool
    window: tuple[int, int] | None
    masked: bool
    empties: bool

    def results(self, block: Block, wanted: Sequence[Wanted], args: Arrays, along: Sequence[Arrays]) -> list[Array]:
        """What is wanted of <g, o>, g the argument "out": gradients, o, hints, or their derivatives along some."""
        found = {}
        for of in dict.fromkeys(of for _, of in wanted):
            names = tuple(name for name, other in wanted if other == of)
            here = self._along(block, names, args, [along[i] for i in of])
            found |= {(name, of): x for name, x in here.items()}
        return [found[key] for key in wanted]

    def _along(self, block: Block, names: tuple[str, ...], args: Arrays, directions: list[Arrays]) -> Arrays:
        told = tuple(name for name in names if name in ("out", *HINTS))
        pulled = tuple(name for name in names if name not in told)
        if not directions:
            return {
                **(self.value(block, args, told) if told else {}),
                **(self.pull(block, args, pulled) if pulled else {}),
            }
        if len(directions) == 1 and not pulled:
            return self.push(block, args, directions[0])
        f = lambda args: self.plain(block, names, args)
        for direction in directions:
            f = functools.partial(_derivative, f, direction)
        return f(args)

    def value(self, block: Block, args: Arrays, names: tuple[str, ...]) -> Arrays:
        z, value = self._masked(block, self._logits(args)), args["value"]
        if names == ("out",):
            return {"out": self._rows(_softmax(self.empties, z), value).astype(self.dtype)}
        m, top = _largest(z)
        shifted = jnp.exp(z - (jnp.where(m == -jnp.inf, 0.0, m) if self.empties else m)[..., None])
        others = jnp.where(classes.index(z, 4) == top[..., None], 0.0, shifted)
        rest = jnp.sum(others, -1)
        v_top = self._at(top, value)
        gap = (self._rows(others, value) - _row(rest) * v_top) / _row(1 + rest)
        return {
            "out": jnp.where(_row(m) == -jnp.inf, 0.0, v_top + gap).astype(self.dtype),
            "lse": jnp.where(m == -jnp.inf, jnp.inf, m + jnp.log1p(rest)),
            "top": top + block.key,
            "gap": gap.astype(self.dtype),
        }

    def push(self, block: Block, args: Arrays, direction: Arrays) -> Arrays:
        wide = compute_dtype(self.dtype)
        p, value, out = self._probabilities(block, self._logits(args)), args["value"], jnp.zeros((), wide)
        moving = {name: x for name, x in direction.items() if name in ("query", "key", "bias")}
        if moving:
            empty = block.constants["lse"] == jnp.inf
            c = jnp.where(empty, 0.0, _derivative(lambda args: self._logit_at_top(block, args), moving, args))
            dz = _derivative(self._logits, moving, args) - c[..., None]
            y = self._seen_of(block, p * _unless_top(dz.astype(p.dtype), p))
            o = jnp.where(_row(empty), 0.0, self._at(self._top(block), value) + block.constants["gap"].astype(wide))
            out = self._rows(y, value) - _row(jnp.sum(y, -1, dtype=wide)) * o
        if "value" in direction:
            out = out + self._rows(p, direction["value"])
        return {"out": out.astype(self.dtype)}

    def pull(self, block: Block, args: Arrays, names: tuple[str, ...]) -> Arrays:
        raw = self._product(args["query"], args["key"])
        p, value, g, out = self._probabilities(block, self._capped(raw, args)), args["value"], args["out"], {}
        if {"query", "key", "bias"} & {*names}:
            of_gap, of_top = (
                jnp.einsum("btkgh,btkgh->bkgt", g.astype(raw.dtype), x.astype(raw.dtype))[..., None]
                for x in (block.constants["gap"], self._at(self._top(block), value))
            )
            y = _unless_top((self._product(g, value) - of_top).astype(p.dtype), p)
            dz = self._seen_of(block, p * (y - of_gap.astype(p.dtype)))
            out = self._through(raw, dz.astype(raw.dtype), args, names)
        if "value" in names:
            out["value"] = self._keys(p, g)
        return out

    def plain(self, block: Block, names: tuple[str, ...], args: Arrays) -> Arrays:
        """What is wanted without hints, for forward mode: a softmax and its Jacobian."""
        raw, value, out = self._product(args["query"], args["key"]), args["value"], {}
        z = self._masked(block, self._capped(raw, args))
        p = self._seen_of(block, _softmax(self.empties, z))
        if "out" in names:
            out["out"] = self._rows(p, value).astype(self.dtype)
        if {"query", "key", "bias"} & {*names}:
            x = forms.product_apart(self._product(args["out"], value))
            dz = p * _centred(p, x, jnp.argmax(z, -1))
            out |= self._through(raw, self._seen_of(block, dz), args, names)
        if "value" in names:
            out["value"] = self._keys(p, args["out"])
        return out

    def _through(self, raw: Array, dz: Array, args: Arrays, names: tuple[str, ...]) -> Arrays:
        """The cotangents of query, key and bias from that of the logits."""
        draw = dz * self.scale
        if self.softcap is not None:
            draw = draw * cap_derivatives(raw * self.scale, self.softcap)[0]
        pulled = {
            "query": lambda: self._rows(draw, args["key"]),
            "key": lambda: self._keys(draw, args["query"]),
            "bias": lambda: _summed_to(dz, args["bias"].shape),
        }
        return {name: pulled[name]() for name in names if name in pulled}

    def _logits(self, args: Arrays) -> Array:
        return self._capped(self._product(args["query"], args["key"]), args)

    def _capped(self, raw: Array, args: Arrays) -> Array:
        """Logits, of products."""
        z, bias = raw * self.scale, args.get("bias")
        z = z if self.softcap is None else capped(z, self.softcap)
        return z if bias is None else z + bias.astype(z.dtype)

    def _masked(self, block: Block, z: Array) -> Array:
        """Logits: -inf where a key is not seen, NaN where it is and something there is not finite."""
        return self._seen_of(block, z, -jnp.inf)

    def _logit_at_top(self, block: Block, args: Arrays) -> Array:
        top, wide, bias = self._top(block), compute_dtype(self.dtype), args.get("bias")
        raw = jnp.einsum("btkgh,btkgh->bkgt", args["query"].astype(wide), self._at(top, args["key"]))
        if bias is None:
            return self._capped(raw, {})
        bias = jnp.take_along_axis(bias, top[..., None], -1, mode="clip") if bias.shape[-1] > 1 else bias
        return self._capped(raw, {"bias": bias[..., 0]})

    def _probabilities(self, block: Block, z: Array) -> Array:
        """In the operands' dtype, but for float16 with its short range."""
        p = jnp.exp(z - block.constants["lse"][..., None])
        p = p.astype(compute_dtype(self.dtype) if self.dtype == jnp.float16 else self.dtype)
        return self._seen_of(block, p)  # last, so that a GPU makes p with the product, and does not write z

    def _product(self, a: Array, b: Array) -> Array:
        """a bᵀ."""
        return _product(a.astype(self.dtype), b.astype(self.dtype))

    def _rows(self, z: Array, b: Array) -> Array:
        """z b."""
        return jnp.moveaxis(self._einsum("bkgts,bskh->bkgth", z, b), 3, 1)

    def _keys(self, z: Array, a: Array) -> Array:
        """zᵀ a."""
        return self._einsum("bkgts,bkgth->bskh", z, jnp.moveaxis(a, 1, 3))

    def _einsum(self, how: str, z: Array, x: Array) -> Array:
        z, x = z.astype(self.dtype), x.astype(self.dtype)
        return jnp.einsum(how, z, x, preferred_element_type=compute_dtype(self.dtype))

    def _top(self, block: Block) -> Array:
        return block.constants["top"] - block.key

    def _at(self, top: Array, x: Array) -> Array:
        """Of key-like x, each query's row: (B, T, K, G, H)."""
        index = jnp.moveaxis(top, -1, 1)[..., None]
        return jnp.take_along_axis(x[:, :, :, None], index, 1, mode="clip").astype(compute_dtype(self.dtype))

    def _seen_of(self, block: Block, x: Array, otherwise: float = 0.0) -> Array:
        """x where the query sees the key, NaN where something there is not finite."""
        if not self.masked:
            return x
        bad = jnp.moveaxis(block.constants["bad_query"], 1, -1)[..., None]
        bad = bad | jnp.moveaxis(block.constants["bad_key"], 1, -1)[:, :, None, None]
        x = jnp.where(bad, jnp.asarray(jnp.nan, x.dtype), x)
        return jnp.where(self._seen(block, *x.shape[-2:]), x, jnp.asarray(otherwise, x.dtype))

    def _seen(self, block: Block, queries: int, keys: int) -> Array:
        """Which keys each query sees, broadcasting to the logits."""
        given = block.constants
        t = block.query + given.get("first", 0) + jnp.arange(queries, dtype=jnp.int32)[:, None]
        s = block.key + jnp.arange(keys, dtype=jnp.int32)[None, :]
        seen = [given[name] for name in ("mask",) if name in given]
        if self.causal:
            seen.append(_of_batch(s <= t))
        if self.window is not None:
            seen.append(_of_batch((s >= t - self.window[0]) & (s <= t + self.window[1])))
        for name, position in (("query_lengths", t), ("key_lengths", s)):
            if name in given:
                seen.append(_of_batch(position[None] < given[name][:, None, None]))
        if "query_segments" in given:
            seen.append(_of_batch(given["query_segments"][:, :, None] == given["key_segments"][:, None, :]))
        return functools.reduce(jnp.logical_and, seen)


@jax.custom_jvp
def _product(a: Array, b: Array) -> Array:
    # With the queries' axes in the order of the logits', which XLA would otherwise transpose.
    a = jnp.moveaxis(a, 1, 3)
    return jnp.einsum("bkgth,bskh->bkgts", a, b, preferred_element_type=compute_dtype(a.dtype))


@functools.partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(primals, tangents):
    (a, b), (da, db) = primals, tangents
    if isinstance(da, SymbolicZero):
        return _product(a, b), _product(a, db)
    if isinstance(db, SymbolicZero):
        return _product(a, b), _product(da, b)
    # One product of twice the depth: no second array of logits.
    return _product(a, b), _product(jnp.concatenate([da, a], -1), jnp.concatenate([b, db], -1))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _softmax(empties: bool, z: Array) -> Array:
    """Rows of probabilities; with `empties`, 0 in one without a key."""
    m = jnp.max(z, -1, keepdims=True)
    shifted = jnp.exp(z - (jnp.where(m == -jnp.inf, 0.0, m) if empties else m))
    total = jnp.sum(shifted, -1, keepdims=True)
    return shifted / (jnp.where(total == 0, 1.0, total) if empties else total)


@_softmax.defjvp
def _softmax_jvp(empties: bool, primals, tangents):
    (z,), (dz,), p = primals, tangents, _softmax(empties, *primals)
    return p, p * _centred(p, dz, jnp.argmax(z, -1))


def _centred(p: Array, x: Array, top: Array) -> Array:
    """x - <p, x> of each row, measured from its top, where that is small beside x."""
    x = x - jnp.take_along_axis(x, top[..., None], -1, mode="clip")
    return x - jnp.sum(p * x, -1, keepdims=True)


def _largest(z: Array) -> tuple[Array, Array]:
    """The largest number of each row and where it stands, of one reading of the rows."""

    def larger(a, b):
        first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return jnp.where(first, a[0], b[0]), jnp.where(first, a[1], b[1])

    return lax.reduce((z, classes.index(z, 4)), (jnp.array(-jnp.inf, z.dtype), jnp.int32(0)), larger, (4,))


def _derivative(f, direction: Arrays, args: Arrays):
    """The derivative of f(args) along those arrays of the direction that are arguments."""
    moving = {name: args[name] for name in direction if name in args}
    tangents = {name: direction[name].astype(x.dtype) for name, x in moving.items()}
    return jax.jvp(lambda moving: f({**args, **moving}), (moving,), (tangents,))[1]


def _unless_top(y: Array, p: Array) -> Array:
    """y, and 0 where p > 3/4: in minima and maxima, which take less memory traffic on GPU than a choice does."""
    bound = jnp.maximum(jnp.asarray(0.75, p.dtype) - p, jnp.zeros((), p.dtype)) * jnp.finfo(p.dtype).max
    return jnp.maximum(jnp.minimum(y, bound), -bound)


def _summed_to(x: Array, shape: tuple[int, ...]) -> Array:
    """x, summed over the axes along which an array of this shape is broadcast to it."""
    return jnp.sum(x, [i for i, (n, m) in enumerate(zip(x.shape, shape)) if n != m], keepdims=True)


def _row(x: Array) -> Array:
    """(B, K, G, T) -> (B, T, K, G, 1)."""
    return jnp.moveaxis(x, -1, 1)[..., None]


def _of_batch(seen: Array) -> Array:
    """(T, S) or (B, T, S) -> (B, 1, 1, T, S)."""
    return jnp.expand_dims(seen, (1, 2) if seen.ndim == 3 else (0, 1, 2))
