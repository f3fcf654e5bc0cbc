"""One pass over the tokens, chunk by chunk: prepare, loop, collect. And its derivatives, which are such passes.

The one quantity is F = Σ_iq a_iq l_q(z_i), z = xW + b, with a weight per token and number: its gradient in a is the
array of numbers (docs/mathematics.md, section 6). Of a chunk,

    z = x W + b,    G = Σ_q a_q ∂l_q/∂z,    dx = G Wᵀ,    dW += xᵀ G,    db += Σ G,    da = l,

with products of x's and W's own dtype, to which G is rounded, and sums in the loss's dtype. A derivative along a
direction is forward mode of a chunk, as often as wanted; no loop is ever differentiated, and none transposed:

    tangent of F: <grad F, t>,    tangent of grad F: (D grad F)[t],    its transpose: the same symmetric form.

So a sum's gradient is formed with its value and only scaled by the cotangent; losses per token are the row ∂F/∂a, and
what reverse mode asks of them is a column of the Hessian, grad F with the cotangents for token weights.

Where devices split the classes, they exchange within the loop what their blocks tell of a token. F is one sum of them
all: of the gradient in what a device has of its own it finds a part or its block, and of what all have copies of, F
depends on the mean.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxsoftmax._core import dtypes
from jaxsoftmax._core.mesh import varying, zero_of, zeros_like
from jaxsoftmax._linear_map import linear_map
from jaxsoftmax.linear_head.plan import Arrays, Head, Plan, Tokens, plan

LINEAR = ("x", "weights", "token_weights", "bias")  # what is no option
LOCAL = ("x", "token_weights")  # one row per token
SPLIT = ("x", "weights", "bias", "class_weights")  # of whose gradient each device of the classes finds another part


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def value_and_gradient(head: Head, rows: tuple[str, ...], theta: Arrays, tokens: Tokens):
    """F, the rows of its gradient by name, and where a head has several numbers per token, indices.

    The tangent of F is <grad F, t>, so that reverse mode only scales grad F.

    Args:
      head: the static part.
      rows: names of the arguments whose rows of the gradient are wanted.
      theta: the arguments by name: x (N, D), weights, token_weights (N, Q), and where given bias (V,) and options.
      tokens: what is not differentiated.
    """
    return stream(head, rows, theta, (), tokens)


@functools.partial(value_and_gradient.defjvp, symbolic_zeros=True)
def _value_and_gradient_jvp(head, rows, primals, tangents):
    theta, tokens = primals
    direction = _moving(tangents[0])
    value, gradient, index = value_and_gradient(head, tuple(dict.fromkeys((*rows, *direction))), theta, tokens)
    wide = lambda x: x.astype(value.dtype)
    inner = sum((jnp.sum(wide(gradient[n]) * wide(t)) for n, t in direction.items()), jnp.zeros_like(value))
    moved = gradient_along(head, rows, theta, (direction,), tokens) if rows and direction else _zeros(theta, rows)
    still = None if index is None else np.zeros(index.shape, jax.dtypes.float0)
    return (value, {name: gradient[name] for name in rows}, index), (total(inner, head.classes), moved, still)


def gradient_along(head: Head, rows: tuple[str, ...], theta, directions, tokens: Tokens) -> dict[str, Array]:
    """Rows of (D^k grad F)[t_1, …, t_k], k ≥ 1: linear in the last direction, and transposable there.

    With M that linear map, <c, M t> = <t, Mᵀ c> is the same form with other rows, since F's derivatives are symmetric.
    """
    *fixed, last = directions
    last = {n: t.astype(theta[n].dtype) for n, t in last.items()}

    def forth(given, t):
        theta, fixed, tokens = given
        return _along(head, rows, theta, (*fixed, t), tokens)

    def back(given, c):
        theta, fixed, tokens = given
        return _along(head, tuple(last), theta, (*fixed, {n: v for n, v in c.items() if v is not None}), tokens)

    return linear_map(forth, back, (theta, tuple(fixed), tokens), last, {n: jax.typeof(theta[n]) for n in rows})


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _along(head: Head, rows: tuple[str, ...], theta, directions, tokens: Tokens) -> dict[str, Array]:
    """What `gradient_along` computes; its derivatives are made of `gradient_along`, so that they transpose."""
    return _rows_along(head, rows, theta, directions, tokens)


@functools.partial(_along.defjvp, symbolic_zeros=True)
def _along_jvp(head, rows, primals, tangents):
    theta, directions, tokens = primals
    terms = [(_moving(tangents[0]), directions)]
    terms += [(_moving(t), (*directions[:i], *directions[i + 1 :])) for i, t in enumerate(tangents[1])]
    found = [gradient_along(head, rows, theta, (*rest, t), tokens) for t, rest in terms if t]
    moved = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *found) if found else _zeros(theta, rows)
    return _along(head, rows, theta, directions, tokens), moved


@functools.partial(jax.jit, static_argnames=("head", "rows"))
def _rows_along(head, rows, theta, directions, tokens) -> dict[str, Array]:
    """Rows of (D^k grad F)[t_1, …, t_k]. F is linear in the token weights: a direction in them alone replaces them."""
    if any("token_weights" in t for t in directions):
        head = head._replace(every=False, weighed=head.columns)
    weightings = [t for t in directions if tuple(t) == ("token_weights",)]
    if len(weightings) > 1:
        return _zeros(theta, rows)
    if weightings:
        directions = tuple(t for t in directions if tuple(t) != ("token_weights",))
        theta = {**theta, **weightings[0]}
        found = tuple(name for name in rows if name != "token_weights")
        return {**_zeros(theta, rows), **(_rows_along(head, found, theta, directions, tokens) if found else {})}
    return stream(head, rows, theta, directions, tokens)[1]


def _moving(tangents) -> dict[str, Array]:
    return {name: t for name, t in tangents.items() if not isinstance(t, SymbolicZero)}


def _zeros(theta, rows) -> dict[str, Array]:
    return {name: zeros_like(theta[name]) for name in rows}


# The pass.


def stream(head: Head, rows, theta: Arrays, directions: tuple[Arrays, ...], tokens: Tokens):
    """F, rows of its gradient, and indices; with directions the rows' derivative along them, a missing name means 0."""
    skips = head.spread == 1 and not (head.every and tokens.valid is None)
    plans = {platform: _plan(head, theta, platform, len(directions) + 1, skips) for platform in ("cpu", "other")}
    run = {name: functools.partial(_run, head, rows, found) for name, found in plans.items()}
    if plans["cpu"] == plans["other"]:
        return run["other"](theta, directions, tokens)
    return lax.platform_dependent(theta, directions, tokens, cpu=run["cpu"], default=run["other"])


def _plan(head: Head, theta: Arrays, platform: str, order: int, skips: bool) -> Plan:
    num_tokens, features = theta["x"].shape
    vocab, itemsize = theta["weights"].shape[head.vocab_axis], theta["token_weights"].dtype.itemsize
    devices = head.spread * head.devices
    found = plan(platform, -(-num_tokens // head.spread), features, vocab, itemsize, order, devices, skips)
    chunk = found.chunk * head.spread
    if head.chunk_size is not None:
        chunk = max(1, head.chunk_size // (1 if order < 2 else 2))
    return Plan(chunk, vocab if head.spread > 1 else found.slab)  # to cut slabs, XLA would gather a split one


def _run(head: Head, rows, plan: Plan, theta, directions, tokens: Tokens):
    """Prepare, loop, collect."""
    theta, *directions = (_as_one(head, arrays) for arrays in (theta, *directions))
    (num_tokens, _), counts = theta["token_weights"].shape, tokens.valid
    if num_tokens == 0 or theta["weights"].shape[head.vocab_axis] == 0:
        return _of_nothing(head, rows, theta, bool(directions))
    if not (head.every or any("token_weights" in names for names in (rows, *directions))):
        nonzero = jnp.any(theta["token_weights"] != 0, 1)
        counts = nonzero if counts is None else counts & nonzero
    chunks = in_a_row(plan.chunk, num_tokens, counts)
    if head.spread > 1 and isinstance(num_tokens, int):
        chunks = every_nth(plan.chunk, num_tokens, head.spread)
        fit = lambda row: chunks.padded(_only(counts, row))
        of = lambda arrays: {n: fit(v) if n in LOCAL else v for n, v in arrays.items()}
        theta, directions = of(theta), list(map(of, directions))
        tokens = tokens._replace(rows=jax.tree.map(fit, tokens.rows))
    # What the loop carries varies over the mesh from the start. Numbers are the same on all devices of the classes.
    zero, shared = zero_of((theta, directions, tokens)), zero_of(theta["token_weights"])
    like = lambda name, x: x + (zero if name in SPLIT else shared).astype(x.dtype)
    theta, *directions = ({n: v if n in LINEAR else like(n, v) for n, v in a.items()} for a in (theta, *directions))
    wide = theta["token_weights"].dtype
    dtype = lambda name: theta["x"].dtype if name == "x" else wide
    out = {n: like(n, jnp.zeros(theta[n].shape, dtype(n))) for n in rows if n != "token_weights"}
    numbers = like("", jnp.zeros(theta["token_weights"].shape, wide))
    indices = like("", jnp.zeros(len(numbers), jnp.int32)) if head.columns > 1 and not directions else None

    def step(carry):
        j, numbers, out, indices = carry
        take = lambda arrays: {n: chunks.take(v, j) if n in LOCAL else v for n, v in arrays.items()}
        constants = jax.tree.map(lambda row: chunks.take(row, j), tokens.rows), tokens.shared
        work = _chunk_along(functools.partial(_chunk, head, rows, plan.slab, constants), list(map(take, directions)))
        found, sums, index = work(take(theta), {n: v for n, v in out.items() if n != "x"})
        put = lambda whole, part: chunks.put(whole, j, part.astype(whole.dtype))
        out = {n: put(out[n], sums[n]) if n == "x" else sums[n] for n in out}
        return j + 1, put(numbers, found), out, None if indices is None else put(indices, index)

    start = jnp.int32(0), numbers, out, indices
    _, numbers, out, indices = lax.while_loop(lambda carry: carry[0] < jnp.asarray(chunks.steps), step, start)
    if chunks.order is None:
        cut = lambda row: _only(counts, row[:num_tokens])
        numbers, indices = jax.tree.map(cut, (numbers, indices))
        theta, out = ({n: v[:num_tokens] if n in LOCAL else v for n, v in a.items()} for a in (theta, out))
    value = jnp.sum(theta["token_weights"] * numbers)
    out["token_weights"] = numbers
    return value, {n: _part(head, n, out[n].astype(theta[n].dtype)) for n in rows}, indices


def _as_one(head: Head, arrays: Arrays) -> Arrays:
    """The arrays by name, with what each device of the classes has a copy of as their mean."""
    if not head.classes:
        return arrays
    mean = lambda x: lax.pmean(varying(x, frozenset(head.classes)), head.classes)
    return {n: v if n in SPLIT else mean(v) for n, v in arrays.items()}


def _part(head: Head, name: str, row: Array) -> Array:
    """The device's part of a row of the gradient, which adds up over the devices of the classes."""
    if not head.classes or name in SPLIT:
        return row
    return varying(row / head.devices, frozenset(head.classes))


def _of_nothing(head: Head, rows, theta, along: bool):
    """The result where there is no token, or no class, so that no label is one."""
    out = {name: jnp.zeros_like(theta[name]) for name in ("token_weights", *rows)}
    if not along:
        out["token_weights"] = jnp.full_like(out["token_weights"], jnp.nan)
    indices = jnp.zeros(len(theta["x"]), jnp.int32) if head.columns > 1 and not along else None
    return jnp.sum(out["token_weights"]), {name: out[name] for name in rows}, indices


def _only(counts: Array | None, rows: Array) -> Array:
    """The rows of tokens that count, 0 for the others."""
    if counts is None:
        return rows
    return jnp.where(counts.reshape(-1, *[1] * (rows.ndim - 1)), rows, jnp.zeros((), rows.dtype))


def total(x, axes: tuple[str, ...]):
    """Σ over the devices of the mesh axes."""
    return lax.psum(x, axes) if axes else x


# One chunk.


def _chunk(head: Head, rows, slab: int, constants, theta: Arrays, sums: Arrays):
    """Numbers of the tokens, what is known of F's gradient with this chunk, and indices."""
    x, weights, a = theta["x"], theta["weights"], theta["token_weights"][:, : head.weighed]
    options = {name: value for name, value in theta.items() if name not in LINEAR}
    z = logits(head, x, weights, theta.get("bias"))
    facts, out = head.rule(head, z, constants, options), dict(sums)
    g = _weighed(a[..., None], facts.gradients)
    narrow = g.astype(x.dtype)
    if "x" in rows:
        rounded = x.dtype if head.spread > 1 else None  # before XLA adds it up over the devices of the classes
        out["x"] = _product(head.precision, narrow, weights, 1, head.vocab_axis, rounded)
    if "weights" in rows:
        operands = (x, narrow) if head.vocab_axis == 1 else (narrow, x)
        out["weights"] = _plus_product(head.precision, head.vocab_axis, slab, sums["weights"], *operands)
    if "bias" in rows:
        out["bias"] = sums["bias"] + jnp.sum(g, 0)
    for name in set(rows) & set(options):
        out[name] = sums[name] + _of_option(head, name, z, constants, options, a, facts)
    return jnp.stack(facts.numbers, 1), out, facts.index


def _of_option(head: Head, name: str, z, constants, options, a, facts) -> Array:
    """Σ a ∂l/∂option. The class weights come with the rule; the others are scalars, along which a derivative is one."""
    if name == "class_weights":
        return jnp.sum(a[:, :1] * facts.by_class, 0)
    of = lambda value: head.rule(head, z, constants, {**options, name: value}).numbers
    moved = jax.jvp(of, (options[name],), (jnp.ones_like(options[name]),))[1]
    return jnp.sum(_weighed(a, moved))


def _weighed(a: Array, found: tuple[Array, ...]) -> Array:
    """Σ_q a_q found_q over the numbers that have a weight."""
    return functools.reduce(jnp.add, (a[:, q] * found[q] for q in range(a.shape[1])))


def _chunk_along(work, directions):
    """The derivative of a chunk along the directions, the last of which carries the sums."""
    for direction in directions:
        work = functools.partial(_one_along, work, direction)
    return work


def _one_along(work, direction: Arrays, theta: Arrays, sums: Arrays):
    of = lambda moving, sums: work({**theta, **moving}, sums)[:2]
    start = {name: theta[name] for name in direction}, jax.tree.map(jnp.zeros_like, sums)
    numbers, moved = jax.jvp(of, start, (dict(direction), dict(sums)))[1]
    return numbers, moved, None


def logits(head: Head, x: Array, weights: Array, bias: Array | None) -> Array:
    z = _product(head.precision, x, weights, 1, 1 - head.vocab_axis)
    return z if bias is None else z + bias.astype(z.dtype)[None, :]


def _product(precision, a: Array, b: Array, i: int, j: int, dtype=None) -> Array:
    """Σ over the axis i of a and j of b, summed in at least float32, then of the given dtype."""
    dtype = dtypes.compute_dtype(a.dtype) if dtype is None else dtype
    dimensions = (((i,), (j,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _plus_product(precision, axis: int, slab: int, total: Array, a: Array, b: Array) -> Array:
    """total + aᵀb; a slab of the classes at a time where XLA would hold a whole aᵀb beside the sum, on a CPU."""
    vocab = total.shape[axis]
    if slab >= vocab:
        return total + _product(precision, a, b, 0, 0)

    def add(start, size, total):
        part = [lax.dynamic_slice_in_dim(x, start, size, 1) if i == axis else x for i, x in enumerate((a, b))]
        here = lax.dynamic_slice_in_dim(total, start, size, axis) + _product(precision, *part, 0, 0)
        return lax.dynamic_update_slice_in_dim(total, here, start, axis)

    whole = vocab // slab
    total = lax.fori_loop(0, whole, lambda j, total: add(j * slab, slab, total), total)
    return add(whole * slab, vocab - whole * slab, total) if vocab % slab else total


@_plus_product.defjvp
def _plus_product_jvp(precision, axis, slab, primals, tangents):
    """total + ȧᵀb + aᵀḃ; as one product of copies where these are less than a product that XLA holds beside the sum."""
    (total, a, b), (moved, along_a, along_b) = primals, tangents
    add = functools.partial(_plus_product, precision, axis, slab)
    if slab >= total.shape[axis] and 2 * (a.nbytes + b.nbytes) < total.nbytes:
        return add(total, a, b), add(moved, jnp.concatenate([along_a, a]), jnp.concatenate([b, along_b]))
    return add(total, a, b), add(add(moved, along_a, b), a, along_b)


# Which tokens make a chunk.


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

    def padded(self, x: Array) -> Array:
        """x with rows of 0 after it, for all chunks."""
        return jnp.pad(x, [(0, self.size * self.steps - len(x)), *[(0, 0)] * (x.ndim - 1)])

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


def every_nth(size: int, num_tokens: int, devices: int) -> Chunks:
    """Chunks of nearly equal size, the same for each device; the last ones are `padded`."""
    chunks = -(-num_tokens // size)
    size = -(-num_tokens // (chunks * devices)) * devices
    return Chunks(size, -(-num_tokens // size), None)
