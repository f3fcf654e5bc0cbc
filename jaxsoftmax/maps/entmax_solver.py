"""The value of α-entmax, by Newton's method on one unknown.

All p_i follow from one of them, the pivot: that of the top class for α ≤ 2, of the smallest class of the support for
α > 2. Σp is then a convex, increasing function of the pivot's p, and Newton's method from above decreases to the
solution, without a bracket.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import classes, dtypes

# What is known of α before it runs: that it is 1.5 or 2, whose powers are cheap, or that it is no larger than 2.
Exact = float | Literal["at most 2"] | None

Solver = Callable[[Callable[[Array], Array], Array], Array]  # (newton, start) -> solution
ROUNDS = 8


def solve(z: Array, alpha: Array, exact: Exact, axis: classes.ClassAxis) -> Array:
    """The α-entmax of z to rounding. Never differentiated.

    On a GPU XLA makes one kernel of it, if rows are not too long and the rounds are written out. They are enough for
    most logits; where they are not, p is NaN, and a loop follows. (A loop alone goes over z once a round.)
    """
    loop = functools.partial(_solution, _until_settled, exact=exact, axis=axis)

    def in_one_kernel(z, alpha):
        p = _solution(_written_out, z, alpha, exact=exact, axis=axis)
        once = lambda state: (~state[0], loop(z, alpha))  # a branch would copy p
        return lax.while_loop(lambda state: state[0], once, (jnp.any(jnp.isnan(p)), p))[1]

    if exact is None or not classes.in_one_kernel(z, axis):
        return loop(z, alpha)
    return classes.on_gpu(in_one_kernel, loop, z, alpha)


def _solution(solver: Solver, z: Array, alpha: Array, exact: Exact, axis: classes.ClassAxis) -> Array:
    m = classes.max(z, axis)  # has no other use, or a GPU's kernel ends
    gap = jnp.where(z == jnp.inf, 0.0, z - m)
    # Two infinities have no limit, nor has nothing but -inf, where the gap is NaN.
    wrong = classes.sum(jnp.where(jnp.isnan(gap), 2.0, jnp.where(z == jnp.inf, 1.0, 0.0)).astype(z.dtype), axis)
    d, start = bounded(gap), jnp.ones_like(m)
    p = _from_top(solver, d, start, jnp.minimum(alpha, 2.0) - 1, exact, axis)
    if exact is None:
        above = alpha > 2
        p = lax.cond(
            jnp.any(above),
            lambda: jnp.where(above, _from_bottom(d, start, jnp.maximum(alpha, 2.0) - 1, axis), p),
            lambda: p,
        )
        p = classes.undefined(~((alpha >= 1) & (alpha < jnp.inf)), p)
    return classes.undefined(wrong >= 2, p)


def _from_top(solver: Solver, d: Array, start: Array, beta: Array, exact: Exact, axis: classes.Axis) -> Array:
    """p = u (1 + y)^(1/β), y = βd/u^β, for β ≤ 1, d = z - max z ≤ 0 and u ≤ `start` the top class's p."""

    def newton(u):
        e, slope, y = _powers(u, d, beta, exact)
        # u - (Σp - 1) / (d/du Σp), written with positive terms: du Σp = Σp + pull.
        total, pull = u * classes.sum(e, axis), u * classes.sum(-y * slope, axis)
        return u * ((1 + pull) / (total + pull))

    u = solver(newton, start)
    e, slope, _ = _powers(u, d, beta, exact)
    p = u * e
    # The rounding of u is common to all classes. What it leaves over goes where a shift of z would put it.
    excess = (classes.sum(p, axis) - 1) / classes.sum(slope, axis)
    return jnp.maximum(p - slope * excess, 0.0)


def _powers(u: Array, d: Array, beta: Array, exact: Exact) -> tuple[Array, Array, Array]:
    """((1 + y)^(1/β), (1 + y)^(1/β - 1), y), y = βd/u^β but at least -1; all smooth at β = 0."""
    if exact == 2.0:
        y = jnp.maximum(d / u, -1.0)
        return 1 + y, jnp.ceil(1 + y), y
    if exact == 1.5:
        y = jnp.maximum(d / (2 * jnp.sqrt(u)), -1.0)
        return (1 + y) ** 2, 1 + y, y
    x = d * jnp.exp(-beta * jnp.log(u))
    y = jnp.maximum(beta * x, -1.0)
    e = jnp.exp(log_deformed_exp(x, beta))
    return e, e / jnp.maximum(1 + y, jnp.finfo(d.dtype).tiny), y


def _from_bottom(z: Array, start: Array, beta: Array, axis: classes.Axis) -> Array:
    """p = (v^β + a^β)^(1/β), a^β = β(z - e), for β ≥ 1, e the smallest z of the support and v ≤ `start` its p."""
    m = classes.max(z, axis)

    def offsets(e):
        return jnp.maximum(beta * (z - e), 0.0) ** (1 / beta)

    def undecided(bracket):
        low, high = bracket
        return jnp.any(classes.any((z > low) & (z < high), axis))

    def halve(bracket):
        # A class at e is in the support if those above it have Σp < 1 when its own p is 0.
        low, high = bracket
        middle = low + (high - low) / 2
        fits = classes.sum(offsets(middle), axis) < 1
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    _, high = lax.while_loop(undecided, halve, (m - 1 / beta, m))
    inside = z >= high
    e = -classes.max(jnp.where(inside, -z, -jnp.inf), axis)
    a, size = offsets(e), classes.sum(inside.astype(z.dtype), axis)

    def probabilities(v):
        top = jnp.maximum(jnp.maximum(v, a), jnp.finfo(z.dtype).tiny)
        ratio = jnp.minimum(v, a) / top
        return jnp.where(inside, top * jnp.exp(jnp.log1p(ratio**beta) / beta), 0.0)

    def newton(v):
        p = probabilities(v)
        slope = classes.sum(jnp.where(inside, (v / jnp.where(inside, p, 1.0)) ** (beta - 1), 0.0), axis)
        return jnp.clip(v - (classes.sum(p, axis) - 1) / slope, 0.0, v)

    return probabilities(_until_settled(newton, start / size))


def _until_settled(newton: Callable[[Array], Array], start: Array) -> Array:
    """Newton's method from `start`, above the solution, until no iterate decreases any more."""

    def step(state):
        return newton(state[0]), state[0]

    return lax.while_loop(lambda state: jnp.any(_decreases(*state)), step, (start, 2 * start))[0]


def _written_out(newton: Callable[[Array], Array], start: Array) -> Array:
    """The same by so many rounds; NaN where the last one still decreases."""
    before = x = start
    for _ in range(ROUNDS):
        before, x = x, newton(x)
    return classes.undefined(_decreases(x, before), x)


def _decreases(x: Array, before: Array) -> Array:
    return x < (1 - 4 * float(jnp.finfo(x.dtype).eps)) * before


def bounded(x: Array) -> Array:
    """x ≤ 0 with a finite number for -inf, so that 0·x is 0; as good as infinite, its square does not overflow."""
    return jnp.maximum(x, -math.sqrt(dtypes.largest(x.dtype)))


def log_deformed_exp(x: Array, beta: Array) -> Array:
    """log (1 + βx)^(1/β), the log p of x = ln_β(p) ≤ 0; -inf below x = -1/β. Never differentiated."""
    x = bounded(x)
    y = jnp.clip(beta * x, -1.0, -jnp.finfo(x.dtype).tiny)
    return x * (log1p(y) / y)


def log1p(y: Array) -> Array:
    """log(1 + y). Around y = -0.4 older XLA's float64 log1p is off by 100 eps, and there 1 + y loses nothing."""
    return jnp.where(y < -0.25, jnp.log(1 + y), jnp.log1p(y))
