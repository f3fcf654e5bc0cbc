"""Derivatives of attention, a block of queries at a time, that are never held whole, in no mode and at no order.

All that is wanted are derivatives of one scalar, F = <g, o(x)>, in its arguments x (query, key, value, bias) and g:

    o = ∂F/∂g,    ȯ = ∂/∂g DF[ẋ],    x̄ = ∂F/∂x,    the gradient of a tangent  ∂/∂x DF[ẋ],    …

A pass over the blocks finds gradients of F, or of its derivatives along directions; forward mode of it has a direction
more, and reverse mode as well: <c, ∂F/∂x> = DF[c], whose gradient is wanted. So one loop does for every mode and order.
It is only ever evaluated, and never transposed: what it does within a block is forward mode.
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
from jaxsoftmax._core.mesh import varies_over, varying, zeros_like
from jaxsoftmax._linear_map import linear_map
from jaxsoftmax.attention.rows import HINTS, Arrays, Attention, Block, Wanted

# The axes of an array along the queries and along the keys, by its name; None where it has none.
AXES = {
    **dict.fromkeys(("query", "out", "gap", "query_segments", "bad_query"), (1, None)),
    **dict.fromkeys(("key", "value", "key_segments", "bad_key"), (None, 1)),
    **dict.fromkeys(("lse", "top"), (3, None)),
    **dict.fromkeys(("bias", "mask"), (3, 4)),
}
BUDGET = 684 << 20  # bytes of a block's logits in float32 and of its probabilities
LEAST = 128  # queries of a block, whatever the budget says
EXTENTS = 5  # how many numbers of keys the blocks of a causal call may have, each a loop to compile
EXAMPLES = 8  # what a symbolic number of examples counts for in the budget
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
      per_logit: bytes of logits in float32 and of probabilities of one query and key, of all heads and examples.
      causal: whether no query sees a key behind its own position.
      window: how many keys before and behind its own position a query sees, or None.
    """

    queries: int
    keys: int
    per_logit: int
    causal: bool
    window: tuple[int, int] | None

    def rows(self, order: int) -> int:
        """Queries of a block, in derivatives of this order."""
        seen = self.keys if self.window is None else min(self.keys, 2 * max(LEAST, sum(self.window)))
        most = max(LEAST, BUDGET // max(1, self.per_logit * seen)) // (1 if order < 2 else HIGHER)
        if self.window is not None:
            most = min(most, max(LEAST, sum(self.window) // 2))
        if self.causal and self.queries >= 4 * LEAST:  # two blocks of as many keys: XLA would undo a loop of one
            most = min(most, max(LEAST, -(-self.queries // (16 * EXTENTS)) * 8))
        if most >= self.queries:
            return self.queries
        blocks = -(-self.queries // max(8, most))
        return -(-self.queries // (8 * blocks)) * 8

    @property
    def is_uneven(self) -> bool:
        """Whether the last block has fewer queries than others."""
        return any(self.queries % self.rows(order) for order in (1, 2))

    def groups(self, rows: int) -> list[Group]:
        blocks = -(-self.queries // rows)
        if self.window is not None:
            return [Group(0, blocks, min(self.keys, rows + sum(self.window)))]
        if not self.causal:
            return [Group(0, blocks, self.keys)]
        each = max(2, -(-blocks // EXTENTS))
        starts = range(0, blocks, each)
        return [Group(i, min(each, blocks - i), min(self.keys, (i + each) * rows)) for i in starts]

    def first_key(self, query, keys: int, constants: Arrays):
        """Position of the first key that the block with this first query looks at."""
        if keys == self.keys or self.window is None:
            return 0
        return jnp.clip(constants.get("first", 0) + query - self.window[0], 0, self.keys - keys)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def by_blocks(
    body: Attention, plan: Plan, wanted: tuple[Wanted, ...], args: Arrays, along: tuple[Arrays, ...], constants: Arrays
) -> list[Array]:
    """What is wanted of F: for ("key", (0, 1)) the gradient in the key of F's derivative along two of the directions.

    Args:
      body: the function.
      plan: how it is divided.
      wanted: what is to come back: "out" for the gradient in g, hints.
      args: the arguments by name, g being "out", where a gradient in another is wanted.
      along: directions, whose missing names are zero.
      constants: what is not differentiated.
    """
    return _evaluate(body, plan, wanted, args, along, constants)


@functools.partial(by_blocks.defjvp, symbolic_zeros=True)
def _by_blocks_jvp(body: Attention, plan: Plan, wanted, primals, tangents):
    args, along, constants = primals
    moving = [{n: t for n, t in of.items() if not isinstance(t, SymbolicZero)} for of in (tangents[0], *tangents[1])]
    hints = tuple((name, ()) for name in HINTS if name not in constants)
    told = dict.fromkeys((*wanted, *hints))
    out = dict(zip(told, by_blocks(body, plan, tuple(told), args, along, constants)))
    known = {name: lax.stop_gradient(x) for (name, _), x in out.items() if name in HINTS}
    results = [key for key in wanted if key[0] not in HINTS]

    def forth(given, moving):
        args, along, constants = given
        new, total = len(along), [jnp.zeros(out[key].shape, out[key].dtype) for key in results]
        for i, direction in enumerate(moving):  # a direction more, of the arguments, or another in the place of one
            asked = {
                j: (name, (*of, new) if i == 0 else tuple(new if k == i - 1 else k for k in of))
                for j, (name, of) in enumerate(results)
                if i == 0 or i - 1 in of
            }
            if direction and asked:
                found = by_blocks(body, plan, tuple(asked.values()), args, (*along, direction), constants)
                for j, x in zip(asked, found):
                    total[j] = total[j] + x
        return total

    def back(given, cotangents):
        args, along, constants = given
        total = jax.tree.map(lambda _: None, moving)
        for of in dict.fromkeys(of for _, of in results):
            c = {name: c for (name, other), c in zip(results, cotangents) if other == of and c is not None}
            if not c:
                continue
            if "out" in args:  # <c, ∂F/∂x> is a derivative of F; without g, <c, ∂F/∂g> is F
                over, directions, of_c = args, (*along, c), (*of, len(along))
            else:
                over, directions, of_c = {**args, **c}, along, of
            places = {(0, name): (name, of_c) for name in moving[0]}
            for i in of:
                places |= {(i + 1, name): (name, tuple(k for k in of_c if k != i)) for name in moving[i + 1]}
            asked = tuple(dict.fromkeys(places.values()))
            found = dict(zip(asked, by_blocks(body, plan, asked, over, directions, constants)))
            for (i, name), key in places.items():
                total[i][name] = found[key] if total[i][name] is None else total[i][name] + found[key]
        return [{n: zeros_like(moving[i][n]) if x is None else x for n, x in of.items()} for i, of in enumerate(total)]

    types = [jax.typeof(out[key]) for key in results]
    pushed = linear_map(forth, back, (args, along, {**constants, **known}), moving, types)
    moved = dict(zip(results, pushed))
    return [out[key] for key in wanted], [moved[key] if key in moved else _zero_tangent(out[key]) for key in wanted]


def _evaluate(body: Attention, plan: Plan, wanted, args: Arrays, along: tuple[Arrays, ...], constants: Arrays):
    if body.masked:
        args, along, constants = _finite(args, along, constants)
    rows = plan.rows(max(len(of) + (name not in ("out", *HINTS)) for name, of in wanted))
    blocks = -(-plan.queries // rows)
    if blocks == 1:
        out = body.results(Block(constants, 0, 0), wanted, args, along)
        return [x.astype(_total(name, args, x.dtype).dtype) for (name, _), x in zip(wanted, out)]
    more = blocks * rows - plan.queries
    given = [{name: _padded(x, _axes(name, x)[0], more) for name, x in a.items()} for a in (constants, args, *along)]

    def results(group: Group, given, i) -> tuple[list[Array], tuple]:
        query = i * rows
        at = query, rows, plan.first_key(query, group.keys, constants), group.keys
        constants_here, args_here, *along_here = [{name: _take(name, x, at) for name, x in a.items()} for a in given]
        return body.results(Block(constants_here, query, at[2]), wanted, args_here, along_here), at

    groups = plan.groups(rows)
    types = jax.eval_shape(lambda: results(groups[0], given, 0)[0])
    total = [_total(name, given[1], kind.dtype) for (name, _), kind in zip(wanted, types)]
    names = [name for name, _ in wanted]
    out = [x if _axes(n, x)[0] else x.astype(compute_dtype(x.dtype)) for n, x in zip(names, total)]
    behind = [[] for _ in names]  # sums of keys that no further block sees
    for group in reversed(groups):
        near = given
        if len(groups) > 1:
            near = [{name: _first_keys(name, x, group.keys) for name, x in a.items()} for a in given]
            for i, name in enumerate(names):
                if _axes(name, out[i]) == (None, 1):
                    behind[i].append(out[i][:, group.keys :])
                    out[i] = out[i][:, : group.keys]

        def step(i, out, near=near, group=group):
            found, at = results(group, near, i)
            return [_put(name, whole, x, at) for name, whole, x in zip(names, out, found)]

        out = lax.fori_loop(group.first, group.first + group.count, step, out)
    out = [jnp.concatenate([x, *reversed(more)], 1) if more else x for x, more in zip(out, behind)]
    return [_cut(x, _axes(n, x)[0], plan.queries).astype(whole.dtype) for n, x, whole in zip(names, out, total)]


def _finite(args: Arrays, along: tuple[Arrays, ...], constants: Arrays) -> tuple[Arrays, tuple[Arrays, ...], Arrays]:
    """The arrays with 0 for what is not finite, since 0 times it is to be 0, and which queries and keys had such."""
    bad = {}
    for of in (args, *along):
        for name, x in of.items():
            if name != "bias":
                kind, here = "bad_query" if name in ("query", "out") else "bad_key", ~jnp.isfinite(x).all(-1)
                bad[kind] = bad[kind] | here if kind in bad else here
    finite = lambda name, x: x if name == "bias" else jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))
    args, *rest = ({name: finite(name, x) for name, x in of.items()} for of in (args, *along))
    return args, tuple(rest), {**constants, **bad}


def _total(name: str, args: Arrays, dtype) -> Array:
    """Zeros for a result, that lie on a mesh as the argument of this name does, or as the queries do."""
    query = args["query"]
    if name in ("lse", "top"):
        like = jnp.moveaxis(query[..., 0], 1, -1)
    else:
        like, dtype = (query if name in ("out", "gap") else args[name]), None
    zeros = zeros_like(like) if dtype is None else zeros_like(like).astype(dtype)
    return varying(zeros, frozenset().union(*map(varies_over, args.values())))


def _axes(name: str, x: Array) -> tuple:
    """The axes of x along the queries and along the keys, None where it has none or is the same along it."""
    return tuple(axis if axis is None or x.shape[axis] > 1 else None for axis in AXES.get(name, (None, None)))


def _take(name: str, x: Array, at: tuple) -> Array:
    query, rows, key, keys = at
    for axis, start, size in zip(_axes(name, x), (query, key), (rows, keys)):
        if axis is not None and x.shape[axis] != size:
            x = lax.dynamic_slice_in_dim(x, start, size, axis)
    return x


def _put(name: str, out: Array, x: Array, at: tuple) -> Array:
    """The result of all blocks with that of one block in its place, or added."""
    query, _, key, _ = at
    starts = [0] * out.ndim
    for axis, start in zip(_axes(name, out), (query, key)):
        if axis is not None:
            starts[axis] = start
    x = x.astype(out.dtype)
    x = x if _axes(name, out)[0] else x + lax.dynamic_slice(out, starts, x.shape)
    return lax.dynamic_update_slice(out, x, starts)


def _first_keys(name: str, x: Array, keys: int) -> Array:
    """x, cut once for all blocks where it is the same for all of them."""
    of_query, of_key = _axes(name, x)
    return x if of_query else _cut(x, of_key, keys)


def _padded(x: Array, axis: int | None, more: int) -> Array:
    if axis is None or more == 0:
        return x
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])


def _cut(x: Array, axis: int | None, size: int) -> Array:
    return x if axis is None or x.shape[axis] == size else lax.slice_in_dim(x, 0, size, axis=axis)


def _zero_tangent(x: Array):
    return zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else np.zeros(x.shape, jax.dtypes.float0)
