"""What a backend wants written otherwise: the plain line, and beside it the form that one backend gains by.

The plain lines are what XLA makes one kernel of on a GPU, up to about 16,000 classes: reductions that keep their axis,
broadcasts, arithmetic and choices. Numbers per slice that come of different reductions meet at the classes only, and an
array is computed in one way for all its uses, or the kernel ends. XLA's CPU backend ends a kernel at a choice instead,
keeps an array that two sums share, and its minimum and maximum drop NaN. Which form a program gets is decided when it
is lowered for a machine; tests/test_forms.py holds the two together.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import dtypes


def per_slice(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` without the axes of length 1 of its arguments, numbers per slice: with them XLA's CPU backend is slow."""

    @functools.wraps(f)
    def flat(*numbers: Array, **options) -> Any:
        ones = tuple(i for i, n in enumerate(numbers[0].shape) if n == 1)
        result = f(*(lax.squeeze(x, ones) for x in numbers), **options)
        return jax.tree.map(lambda x: lax.expand_dims(x, ones), result)

    return flat


def on_gpu(form: Callable, plain: Callable, *args: Array) -> Any:
    """form(*args) there, plain(*args) elsewhere."""
    return lax.platform_dependent(*args, cuda=form, rocm=form, default=plain)


def on_tpu(form: Callable, plain: Callable, *args: Array) -> Any:
    """form(*args) there, plain(*args) elsewhere."""
    return lax.platform_dependent(*args, tpu=form, default=plain)


def product_apart(x: Array) -> Array:
    """A product of matrices that XLA's TPU compiler does not make one kernel of with sums over its rows.

    Attention's gradient of a tangent took 1.16 (causal) and 1.46 (window) of the time, and did not compile at all
    without a mask: "ran out of memory in memory space vmem".
    """
    return on_tpu(lax.optimization_barrier, lambda x: x, x)


def maximum(z: Array, axes: tuple[int, ...]) -> Array:
    """max z over the axes, which stay with length 1, in at least float32."""
    plain = lambda z: _max(dtypes.widen(z)[0], axes)
    narrow = lambda z: dtypes.widen(_max(z, axes))[0]  # else a wide copy is kept
    return plain(z) if jnp.finfo(z.dtype).bits >= 32 else lax.platform_dependent(z, cpu=narrow, default=plain)


def _max(z, axes):
    return jnp.max(z, axes, keepdims=True, initial=-jnp.inf)


def below(z: Array, m: Array) -> Array:
    """z - m for the maximum m of z, in the dtype of m; 0 where both are inf, and NaN where both are -inf."""
    return lax.platform_dependent(z, m, cpu=_below_on_cpu, default=_below)


def _below(z, m):
    z = z.astype(m.dtype)
    return jnp.where(z == jnp.inf, 0.0, z - m)


def _below_on_cpu(z, m):
    four = per_slice(lambda m: 1 + 3 * jnp.minimum(m - below_inf(m), 1))  # where m = inf, else 1
    return shift_on_cpu(z, m) * four(m)


def shift(z: Array, m: Array) -> Array:
    """As `below`, for exponentials: beside +inf everything finite may be just very small."""
    return lax.platform_dependent(z, m, cpu=shift_on_cpu, default=_below)


def shift_on_cpu(z, m):
    return -(per_slice(below_inf)(m) - below_inf(z.astype(m.dtype)))  # z - m takes XLA five times as long in short rows


def below_inf(x):
    return jnp.minimum(x, dtypes.largest(x.dtype))


def leave_top_out(z: Array, m: Array, axis: int) -> Array:
    """Σ exp(z - m) - 1 without cancellation: the sum over every class but one that attains the maximum m."""
    return lax.platform_dependent(
        z, m, cpu=lambda z, m: _leave_top_out_on_cpu(z, m, axis), default=lambda z, m: _leave_top_out(z, m, axis)
    )


def _leave_top_out(z, m, axis):
    e = jnp.exp(shift(z, m))
    tops = jnp.floor(e)
    return jnp.sum(e - tops, axis, keepdims=True) + (jnp.sum(tops, axis, keepdims=True) - 1)


FUSED = 4096  # XLA's CPU backend makes one kernel of sums over classes and what is done to this many of them


def _leave_top_out_on_cpu(z, m, axis):
    """Both sums as one, over an axis of length 2 before that of the classes, so that e is not kept for a second one.

    Slower: e kept or m apart (logsumexp 4 to 7 times jax.nn's), one reduction of a pair (4), `lax.cond` (2).
    """
    if not isinstance(m.size, int) or m.size >= FUSED:  # a symbolic size may be as large
        return _leave_top_out(z, m, axis)
    e = jnp.exp(shift_on_cpu(z, m))
    e, tops = jnp.expand_dims(e, axis), jnp.expand_dims(jnp.floor(e), axis)
    without = lax.broadcasted_iota(m.dtype, [2 if i == axis else 1 for i in range(e.ndim)], axis)
    both = jnp.sum(e - without * tops, axis + 1, keepdims=True)
    total, rest = (lax.index_in_dim(both, i, axis, keepdims=False) for i in range(2))
    return jnp.where(total < 2, rest, total - 1)  # below 2 there is one top


def total(e: Array, known: Array, axes: tuple[int, ...]) -> Array:
    """Σe, by what is `known` of it on a CPU, where each sum costs time; on a GPU no kernel waits for that.

    For integer labels it is Σ_{others} e + e_label: on an H100 their VJP and HVP took 1.1 and 1.5 of optax's, and 0.4
    with a sum of its own.
    """
    return lax.platform_dependent(
        e, known, cpu=lambda _, known: known, default=lambda e, _: jnp.sum(e, axes, keepdims=True)
    )


ROWS = 16384  # XLA's GPU compiler makes one kernel of rows up to so many classes


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def afresh(find: Callable, second: bool, known: Any, *arrays: Array) -> tuple:
    """`known` = find(*arrays) and the arrays, for a derivative beside the value.

    A GPU's kernel ends at what the two share. There it is found again, from arrays plus a 0 that XLA does not know,
    -0 for the `second` of two derivatives that are added (poly's gradient in half precision took 18 passes for 3).
    Tried, passes over (8192, 4096): the arrays behind a barrier, which keeps a copy of half-precision logits widened
    (soft labels' gradient 6 for 3); z == z ? z : -z, which two kernels come to share (entropy's tangent 8 for 3).
    """

    def again(_, *arrays):
        arrays = _plus_zero(second, *arrays)
        return find(*arrays), *arrays

    return on_gpu(again, lambda *same: same, known, *arrays)


def _plus_zero(second: bool, *arrays: Array) -> list[Array]:
    return [x + lax.optimization_barrier(jnp.asarray(-0.0 if second else 0.0, x.dtype)) for x in arrays]


def reread(second: bool, *arrays: Array) -> list[Array]:
    """The arrays; on a GPU plus a 0 that XLA does not know."""
    return on_gpu(functools.partial(_plus_zero, second), lambda *same: list(same), *arrays)


def over_total(e: Array, total: Array) -> Array:
    """e / total. A GPU finds a product again in each pass over a row, but keeps a quotient, as wide as it is.

    In half precision J's quadratic form took 13 passes over (8192, 32768) for 8, its norm 8 for 5.
    """
    return on_gpu(lambda e, total: e * (1 / total), lambda e, total: e / total, e, total)


@functools.partial(afresh.defjvp, symbolic_zeros=True)
def _afresh_jvp(find, second, primals, tangents):
    return afresh(find, second, *primals), tangents


def settled(*numbers: Array) -> list[Array]:
    """The numbers, one per slice, cut off on a CPU from the sums they are: what is done with them slows those there."""
    return lax.platform_dependent(*numbers, cpu=_settled_on_cpu, default=lambda *numbers: list(numbers))


@per_slice
def _settled_on_cpu(*numbers):
    # XLA before JAX 0.11 fuses beyond its barriers, but not a choice.
    return lax.optimization_barrier([jnp.where(x > -jnp.inf, x, 2 * x) for x in numbers])
