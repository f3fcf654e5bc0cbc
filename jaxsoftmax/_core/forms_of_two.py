"""Forms that two rows of logits are compared by: the plain line, and beside it that of a CPU, as in `forms`.

On a CPU KL's value by the plain lines takes 1.8 times as long at (4096, 1024). Tried there and dropped, over the form
kept: sums of expm1 with arrays kept 1.6 to 2.2, barriers but one limit for all kernels 1.6 to 2.7.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import dtypes
from jaxsoftmax._core.forms import below, per_slice, settled
from jaxsoftmax._core.scalar_functions import exp_remainder

Numbers = tuple[Array, ...]


def apart(x: Array, z: Array, top_x: Array, top_z: Array) -> Numbers:
    """x - max x, z - max z, and the difference δ of the two; 0 where both exclude a class, huge where one does."""
    on_cpu = functools.partial(_apart_on_cpu, kernel=4)
    return lax.platform_dependent(x, z, top_x, top_z, cpu=on_cpu, default=apart_plainly)


def apart_plainly(x: Array, z: Array, top_x: Array, top_z: Array) -> Numbers:
    """The plain line: δ is infinite where one of the two excludes a class."""
    below_x, below_z = below(x, top_x), below(z, top_z)
    return below_x, below_z, jnp.where(below_x == below_z, 0.0, below_x - below_z)


def _apart_on_cpu(x, z, top_x, top_z, kernel):
    """Each kernel has a limit of its own for infinite logits: XLA keeps an array of a constant that two share."""
    limit = dtypes.largest(x.dtype) * (1 - kernel / 1024)
    top_x, top_z = settled(*per_slice(lambda *tops: tuple(jnp.minimum(m, limit) for m in tops))(top_x, top_z))
    x, z = jnp.minimum(x, limit), jnp.minimum(z, limit)
    gap = jnp.maximum(x - top_x, -limit) - jnp.maximum(z - top_z, -limit)
    return -(top_x - x), -(top_z - z), gap


def is_near(change: Array, mean: Array) -> Array:
    """Whether KL is small, so that δ̄ + excess is the logarithm of Σ q exp δ."""
    return change - mean < 1


def log_ratio(gap: Array, change: Array, mean: Array, excess: Array) -> Array:
    """log p - log q = δ - log Σ q exp δ, whose logarithm is δ̄ + excess where KL is small."""
    return lax.platform_dependent(gap, change, mean, excess, cpu=_log_ratio_on_cpu, default=_log_ratio)


def _log_ratio(gap, change, mean, excess):
    return jnp.where(is_near(change, mean), (gap - mean) - excess, gap - change)


def _log_ratio_on_cpu(gap, *numbers):
    known = lambda change, mean, excess: jnp.where(is_near(change, mean), mean + excess, change)
    return gap - per_slice(known)(*numbers)


def divergence_terms(q: Array, d: Array, grown: Array) -> Array:
    """q (exp(d) - 1 - d), where q exp(d) is known far from 0."""
    near = q * exp_remainder(jnp.clip(d, -1, 1))
    return jnp.where(jnp.abs(d) < 1, near, grown - q - jnp.where(q > 0, q * d, 0.0))


def sums_on_cpu(x: Array, z: Array, axis: int, top: Callable) -> Numbers:
    """max x, Σ exp(x - max x), both of z, δ̄ and log Σ q exp(δ - δ̄): kernels apart, so that none keeps an array."""
    limit, total = dtypes.largest(x.dtype), functools.partial(jnp.sum, axis=axis, keepdims=True)
    tops = settled(top(x), top(z))
    total_x = total(jnp.exp(_apart_on_cpu(x, z, *tops, kernel=0)[0]))
    total_z = total(jnp.exp(_apart_on_cpu(x, z, *tops, kernel=1)[1]))
    _, below_z, gap = _apart_on_cpu(x, z, *tops, kernel=2)
    # Over K, about, so that no sum of gaps near the limit is infinite; but -inf where x alone excludes a class, whose
    # gap of -limit is multiplied by another large number.
    part = 2.0 ** -x.shape[axis].bit_length() if isinstance(x.shape[axis], int) else 1.0
    moment = total(jnp.exp(below_z) * gap * -jnp.minimum(gap + 0.99 * limit, -part))
    total_x, total_z, mean, factor = _numbers(*settled(total_x, total_z, moment), part=part)
    below_x, below_z, gap = _apart_on_cpu(x, z, *tops, kernel=3)
    q, d = jnp.exp(below_z) / total_z, gap - mean
    excess = per_slice(jnp.log1p)(total(divergence_terms(q, d, jnp.exp(below_x) * factor)))
    return tops[0], total_x, tops[1], total_z, mean, excess


@per_slice
def _numbers(total_x, total_z, moment, part):
    """The totals, NaN where a NaN among the logits was dropped; δ̄; and exp(-δ̄) / total_z."""
    total_x, total_z = total_x + 0 * total_x, total_z + 0 * total_z
    mean = moment / total_z / part
    return total_x, total_z, mean, jnp.exp(jnp.minimum(-mean, 80)) / total_z
