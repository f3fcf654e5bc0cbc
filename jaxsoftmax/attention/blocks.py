"""A function of rows, a block of queries at a time, that is never held whole, in no mode and at no order.

Over blocks i, with arrays that have a row per query (x) and arrays that all queries share (w):

    y_i = f(x_i, w),    ẏ_i = ∂f(x_i, w)[ẋ_i, ẇ],    x̄_i = ∂fᵀ[ȳ_i],    w̄ = Σ_i ∂fᵀ[ȳ_i].

Each derivative is again a function of rows with results per query and sums, so that one loop does for all of them. It
is only ever evaluated, and never transposed: a derivative differentiates the body, inside a block.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxsoftmax._core.dtypes import compute_dtype
from jaxsoftmax._core.plumbing import mesh_axes, varying, zeros_like
from jaxsoftmax._linear_map import linear_map
from jaxsoftmax.attention.rows import HINTS, Arrays, Block, Body

# The axes of an array along the queries and along the keys, by its name up to "@"; None where it has none.
AXES = {
    "query": (1, None),
    "out": (1, None),
    "gap": (1, None),
    "lse": (3, None),
    "top": (3, None),
    "query_segments": (1, None),
    "key": (None, 1),
    "value": (None, 1),
    "key_segments": (None, 1),
    "bias": (3, 4),
    "mask": (3, 4),
}
BUDGET = 456 << 20  # bytes of one float32 array of a block's logits
LEAST = 128  # queries of a block, whatever the budget says
EXTENTS = 10  # how many numbers of keys the blocks of a causal call may have, each a loop to compile
HIGHER = 2  # derivatives of derivatives hold so many times as many arrays of logits


class Group(NamedTuple):
    """Blocks that look at equally many keys: from the first of them on, so many, and so many keys each."""

    first: int
    count: int
    keys: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is divided.

    Args:
      queries, keys: how many there are.
      per_query: bytes of a float32 array of the logits of one query, of all heads and examples, to all keys.
      causal: whether no query sees a key behind its own position.
      window: how many keys before and behind its own position a query sees, or None.
    """

    queries: int
    keys: int
    per_query: int
    causal: bool
    window: tuple[int, int] | None

    def rows(self, level: int) -> int:
        """Queries of a block."""
        most = max(LEAST, BUDGET // max(1, self.per_query)) // (1 if level < 2 else HIGHER)
        if self.window is not None:
            most = min(most, max(LEAST, sum(self.window)))
        if most >= self.queries:
            return self.queries
        blocks = -(-self.queries // max(8, most))
        return -(-self.queries // (8 * blocks)) * 8

    @property
    def is_uneven(self) -> bool:
        """Whether the last block has fewer queries than others."""
        return any(self.queries % self.rows(level) for level in (0, 1, 2))

    def groups(self, rows: int) -> list[Group]:
        blocks = -(-self.queries // rows)
        if self.window is not None:
            return [Group(0, blocks, min(self.keys, rows + sum(self.window)))]
        if not self.causal:
            return [Group(0, blocks, self.keys)]
        each = -(-blocks // EXTENTS)
        starts = range(0, blocks, each)
        return [Group(i, min(each, blocks - i), min(self.keys, (i + each) * rows)) for i in starts]

    def first_key(self, query, keys: int, constants: Arrays):
        """Position of the first key that the block with this first query looks at."""
        if keys == self.keys or self.window is None:
            return 0
        return jnp.clip(constants.get("first", 0) + query - self.window[0], 0, self.keys - keys)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def by_blocks(body: Body, plan: Plan, args: Arrays, constants: Arrays) -> Arrays:
    """The body's value for all queries: results per query by name, or sums where the name has no axis of queries."""
    return _evaluate(body, plan, args, constants)


@functools.partial(by_blocks.defjvp, symbolic_zeros=True)
def _by_blocks_jvp(body: Body, plan: Plan, primals, tangents):
    args, constants = primals
    moving = {name: t for name, t in tangents[0].items() if not isinstance(t, SymbolicZero)}
    asked, body, level = body, body.telling(), body.level + 1
    out = by_blocks(body, plan, args, constants)
    known = {name: lax.stop_gradient(x) for name, x in out.items() if name in HINTS}
    results = {name: jax.typeof(x) for name, x in out.items() if name not in HINTS}

    def forth(given, tangents):
        args, constants = given
        return _told(level, by_blocks(Push(body), plan, {**args, **_tagged(level, tangents)}, constants))

    def back(given, cotangents):
        args, constants = given
        cotangents = {n: _zeros(results[n], args) if c is None else c for n, c in cotangents.items()}
        pull = Pull(body, tuple(moving))
        return _told(level, by_blocks(pull, plan, {**args, **_tagged(level, cotangents)}, constants))

    pushed = linear_map(forth, back, (args, {**constants, **known}), moving, results)
    told = known if asked == body else {}
    return {name: out[name] for name in (*results, *told)}, {**pushed, **jax.tree.map(_zero_tangent, told)}


@dataclasses.dataclass(frozen=True)
class _Derivative(Body):
    of: Body

    @property
    def level(self) -> int:
        return self.of.level + 1


@dataclasses.dataclass(frozen=True)
class Push(_Derivative):
    """The derivatives of a body's results along the arguments that are tagged with the level."""

    def value(self, block: Block, args: Arrays) -> Arrays:
        return _tagged(self.level, self.of.push(block, *_split(self.level, args)))

    def plain(self, block: Block, args: Arrays) -> Arrays:
        return _tagged(self.level, Body.push(self.of, block, *_split(self.level, args)))


@dataclasses.dataclass(frozen=True)
class Pull(_Derivative):
    """The cotangents of a body's named arguments, from those of its results, which are tagged with the level."""

    names: tuple[str, ...]

    def value(self, block: Block, args: Arrays) -> Arrays:
        args, cotangents = _split(self.level, args)
        return _tagged(self.level, self.of.pull(block, args, self.names, cotangents))

    def plain(self, block: Block, args: Arrays) -> Arrays:
        args, cotangents = _split(self.level, args)
        return _tagged(self.level, Body.pull(self.of, block, args, self.names, cotangents))


def _tagged(level: int, arrays: Arrays) -> Arrays:
    return {f"{name}@{level}": x for name, x in arrays.items()}


def _told(level: int, arrays: Arrays) -> Arrays:
    return {name.removesuffix(f"@{level}"): x for name, x in arrays.items()}


def _split(level: int, args: Arrays) -> tuple[Arrays, Arrays]:
    """The arguments without the tag, and with it."""
    tagged = {name: x for name, x in args.items() if name.endswith(f"@{level}")}
    return {name: x for name, x in args.items() if name not in tagged}, _told(level, tagged)


def _evaluate(body: Body, plan: Plan, args: Arrays, constants: Arrays) -> Arrays:
    rows = plan.rows(body.level)
    blocks = -(-plan.queries // rows)
    if blocks == 1:
        out = body.value(Block(constants, 0, 0), args)
        return {name: x.astype(_total(name, args, x.dtype).dtype) for name, x in out.items()}
    more = blocks * rows - plan.queries
    args, constants = (
        {name: _padded(x, _axes(name, x)[0], more) for name, x in arrays.items()} for arrays in (args, constants)
    )

    def results(group: Group, i, args: Arrays) -> tuple[Arrays, tuple]:
        query = i * rows
        key = plan.first_key(query, group.keys, constants)
        at = query, rows, key, group.keys
        taken = ({name: _take(name, x, at) for name, x in arrays.items()} for arrays in (args, constants))
        args_here, constants_here = taken
        return body.value(Block(constants_here, query, key), args_here), at

    groups = plan.groups(rows)
    types = jax.eval_shape(lambda: results(groups[0], 0, args)[0])
    total = {name: _total(name, args, kind.dtype) for name, kind in types.items()}
    sums = {name: x.astype(compute_dtype(x.dtype)) for name, x in total.items() if _axes(name, x)[0] is None}
    out = {**total, **sums}
    for group in groups:

        def step(i, out, args=args, group=group):
            found, at = results(group, i, args)
            return {name: _put(name, out[name], x, at) for name, x in found.items()}

        out = (
            step(group.first, out)
            if group.count == 1
            else lax.fori_loop(group.first, group.first + group.count, step, out)
        )
    return {name: _cut(x, _axes(name, x)[0], plan.queries).astype(total[name].dtype) for name, x in out.items()}


def _total(name: str, args: Arrays, dtype) -> Array:
    """Zeros for a result, that lie on a mesh as the argument of this name does, or as the queries do."""
    query, base = args["query"], name.split("@")[0]
    if base in ("lse", "top"):
        like = jnp.moveaxis(query[..., 0], 1, -1)
    else:
        like, dtype = (query if base in ("out", "gap") else args[base]), None
    zeros = zeros_like(like) if dtype is None else zeros_like(like).astype(dtype)
    return varying(zeros, frozenset().union(*map(mesh_axes, args.values())))


def _axes(name: str, x: Array) -> tuple:
    """The axes of x along the queries and along the keys, None where it has none or is the same along it."""
    axes = AXES.get(name.split("@")[0], (None, None))
    return tuple(axis if axis is None or x.shape[axis] > 1 else None for axis in axes)


def _take(name: str, x: Array, at: tuple) -> Array:
    query, rows, key, keys = at
    for axis, start, size in zip(_axes(name, x), (query, key), (rows, keys)):
        if axis is not None and x.shape[axis] != size:
            x = lax.dynamic_slice_in_dim(x, start, size, axis)
    return x


def _put(name: str, out: Array, x: Array, at: tuple) -> Array:
    """The result of all blocks with that of one block in its place, or added."""
    query, rows, key, keys = at
    of_query, of_key = _axes(name, out)
    starts = [0] * out.ndim
    if of_query is not None:
        starts[of_query] = query
    if of_key is not None:
        starts[of_key] = key
    if of_query is None:
        x = x.astype(out.dtype)
        x = x + (out if x.shape == out.shape else lax.dynamic_slice(out, starts, x.shape))
    return x if x.shape == out.shape else lax.dynamic_update_slice(out, x.astype(out.dtype), starts)


def _padded(x: Array, axis: int | None, more: int) -> Array:
    if axis is None or more == 0:
        return x
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])


def _cut(x: Array, axis: int | None, size: int) -> Array:
    return x if axis is None or x.shape[axis] == size else lax.slice_in_dim(x, 0, size, axis=axis)


def _zeros(kind, args: Arrays) -> Array:
    """A cotangent of a result of this type."""
    return varying(jnp.zeros(kind.shape, kind.dtype), frozenset().union(*map(mesh_axes, args.values())))


def _zero_tangent(x: Array):
    return zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else np.zeros(x.shape, jax.dtypes.float0)
