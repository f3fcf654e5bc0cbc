"""sparsemax, 1.5-entmax and α-entmax: the maps onto the simplex that can give a class probability exactly 0.

With β = α - 1 and ln_β(p) = (p^β - 1)/β, the deformed logarithm (log p at β = 0, which is softmax),

    ln_β(p_i) = z_i - ψ on the support, Σp = 1    =>    dp = J (dz - κ dα),
    J = diag(q) - qqᵀ/Σq = Σq (diag(π) - ππᵀ),    q = p^(2-α) on the support,    π = q/Σq,    κ = ∂_β ln_β(p).

J is the Jacobian of softmax at π, up to a factor, so one rule serves every α, also for the derivative in α.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, dtypes
from jaxsoftmax._core import class_axis as num
from jaxsoftmax._core.centring import jacobian_product
from jaxsoftmax._core.plumbing import typed_like
from jaxsoftmax.autodiff import custom_vjp
from jaxsoftmax.maps.softmax import Axis, AxisName


def sparsemax(x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, axis_name: AxisName = None) -> Array:
    """Sparsemax: the point of the simplex nearest to x, p_i = max(x_i - τ, 0) with τ such that Σp = 1.

    Args:
      x: real logits of any shape. Integers are promoted to the default float dtype.
      axis: the class axis; a tuple, or None for all axes, makes one distribution over several.
      where: boolean mask that broadcasts to `x`; where it is False the class is absent: p = 0, derivative 0.
      axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them) over which the class axis is split in equal
        consecutive blocks; `x` and the result are this device's block.

    Returns:
      Probabilities, of the shape and (floating) dtype of `x`; exactly 0 off the support. All zero where every class
      is masked.

    Raises:
      TypeError: if `x` is complex, `where` is not boolean or `axis` is not made of integers.
      ValueError: if `axis` is out of range or `where` does not broadcast to `x`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> z = jnp.array([1.0, 0.5, -1.0])
      >>> print(jaxsoftmax.sparsemax(z))
      [0.75 0.25 0.  ]
      >>> print(jax.jacfwd(jaxsoftmax.sparsemax)(z)[:2])
      [[ 0.5 -0.5  0. ]
       [-0.5  0.5  0. ]]

    Reference: Martins and Astudillo 2016, https://arxiv.org/abs/1602.02068; docs/mathematics.md, section 3.
    """
    return _simplex_map(x, 2.0, axis, axis_name, where)


def entmax15(x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, axis_name: AxisName = None) -> Array:
    """1.5-entmax: p_i = max(x_i/2 - τ, 0)² with τ such that Σp = 1; sparse like sparsemax, smoother.

    Args:
      x: real logits of any shape. Integers are promoted to the default float dtype.
      axis: the class axis; a tuple, or None for all axes, makes one distribution over several.
      where: boolean mask that broadcasts to `x`; where it is False the class is absent: p = 0, derivative 0.
      axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them) over which the class axis is split in equal
        consecutive blocks; `x` and the result are this device's block.

    Returns:
      Probabilities, of the shape and (floating) dtype of `x`; exactly 0 off the support. All zero where every class
      is masked.

    Raises:
      TypeError: if `x` is complex, `where` is not boolean or `axis` is not made of integers.
      ValueError: if `axis` is out of range or `where` does not broadcast to `x`.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.entmax15(jnp.array([1.0, 0.5, -1.5])).round(4))
      [0.6740 0.3260 0.    ]

    Reference: Peters, Niculae and Martins 2019, https://arxiv.org/abs/1905.05702; docs/mathematics.md, section 3.
    """
    return _simplex_map(x, 1.5, axis, axis_name, where)


def entmax(
    x: ArrayLike,
    alpha: ArrayLike = 1.5,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    axis_name: AxisName = None,
) -> Array:
    """α-entmax: p_i = max((α-1) x_i - τ, 0)^(1/(α-1)) with τ such that Σp = 1.

    Softmax at α = 1, sparsemax at α = 2. Differentiable in `alpha` too, continuously through both.

    Args:
      x: real logits of any shape. Integers are promoted to the default float dtype.
      alpha: α ≥ 1, a number or an array that broadcasts to the shape of `x` without `axis`. A traced alpha below 1
        gives NaN.
      axis: the class axis; a tuple, or None for all axes, makes one distribution over several.
      where: boolean mask that broadcasts to `x`; where it is False the class is absent: p = 0, derivative 0.
      axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them) over which the class axis is split in equal
        consecutive blocks; `x` and the result are this device's block.

    Returns:
      Probabilities, of the shape and (floating) dtype of `x`; exactly 0 off the support. All zero where every class
      is masked.

    Raises:
      TypeError: if `x` or `alpha` is complex, `where` is not boolean or `axis` is not made of integers.
      ValueError: if `alpha` is below 1 or not finite, `axis` is out of range, or a shape does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> z = jnp.array([1.0, 0.5, -1.5])
      >>> print(jaxsoftmax.entmax(z, 1.0).round(4), jaxsoftmax.entmax(z, 2.0).round(4))
      [0.5922 0.3592 0.0486] [0.75 0.25 0.  ]
      >>> print(jax.jacfwd(jaxsoftmax.entmax, 1)(z, 1.0).round(4))
      [ 0.21   -0.0116 -0.1983]

    Reference: Peters, Niculae and Martins 2019, https://arxiv.org/abs/1905.05702; Correia, Niculae and Martins 2019,
    https://arxiv.org/abs/1909.00015, for the derivative in α; docs/mathematics.md, section 3.
    """
    return _simplex_map(x, alpha, axis, axis_name, where)


def _simplex_map(x: ArrayLike, alpha: ArrayLike, axis: Axis, axis_name: AxisName, where: ArrayLike | None) -> Array:
    x = checks.as_float("x", x)
    axes = num.class_axis(axis, x, axis_name, "x")
    alphas, exact = as_order(alpha, x.shape, axes)
    return _map(x, alphas, checks.as_mask("where", where, x.shape), exact, axes)


# What is known of α before it runs: that it is 1.5 or 2, whose powers are cheap, or that it is no larger than 2.
Exact = float | Literal["at most 2"] | None


def as_order(alpha: ArrayLike, shape: tuple[int, ...], axes: num.ClassAxis) -> tuple[Array, Exact]:
    """α as an array of `shape` without the class axis, and what is known of it."""
    values = checks.broadcast("alpha", checks.as_float("alpha", alpha), axes.without(shape))
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(alpha)):
        known = np.asarray(alpha)
        if not np.all((known >= 1) & (known < np.inf)):
            raise ValueError(f"alpha must be finite and at least 1 (1 is softmax, 2 is sparsemax), got {alpha}")
        if not isinstance(alpha, Array) and known.ndim == 0 and known in (1.5, 2.0):
            return values, float(known)
        if np.all(known <= 2):
            return values, "at most 2"
    return values, None


@functools.partial(jax.jit, static_argnames=("exact", "axes"), inline=True)
def _map(x: Array, alpha: Array, mask: Array | None, exact: Exact, axes: num.ClassAxis) -> Array:
    """α-entmax over the given axes: mask and widen, apply, round and mask."""
    (z,), axis = num.one_axis(axes, num.present(dtypes.widen(x)[0], mask, axes))
    out = entmax_of(z, order_of(z, alpha, exact, axis), exact, axis)
    out = out if len(axes.positions) == 1 else num.split_axes(out, x.shape, axes.positions)
    out = out.astype(x.dtype)
    return out if mask is None else jnp.where(mask, out, 0.0)


def order_of(z: Array, alpha: Array, exact: Exact, axis: num.Axis) -> Array:
    """α in the dtype of z, with the class axis of length 1."""
    alpha = jnp.full_like(alpha, exact) if isinstance(exact, float) else alpha
    return typed_like(
        num.class_max(lax.stop_gradient(z), axis), jnp.expand_dims(alpha.astype(z.dtype), num.positions(axis))
    )


# Rule. Below, z is a floating array of at least float32, `axis` counts from the front, and α has length 1 there.


def entmax_of(z: Array, alpha: Array, exact: Exact, axis: num.ClassAxis) -> Array:
    return _with_jacobian(z, alpha, _solve(lax.stop_gradient(z), lax.stop_gradient(alpha), exact, axis), axis)


@custom_vjp(nondiff_argnums=(3,))
def _with_jacobian(z: Array, alpha: Array, p: Array, axis: num.Axis) -> Array:
    """p, the α-entmax of z; differentiable in z and α, which fix it."""
    return p


def _with_jacobian_fwd(z, alpha, p, axis):
    p = _with_jacobian(z, alpha, p, axis)
    return p, (alpha, p)


def _with_jacobian_bwd(axis, residuals, g):
    alpha, p = residuals
    jg = entmax_jacobian_product(g, p, alpha, axis)
    return jg, -num.local_sum(deformed_log(log_support(p), alpha - 1, 1) * jg, axis), None


_with_jacobian.defvjp(_with_jacobian_fwd, _with_jacobian_bwd)


def entmax_jacobian_product(v: Array, p: Array, alpha: Array, axis: num.Axis) -> Array:
    """Jv = Σq (π∘(v - <π,v>)), to a few eps of |J||v|."""
    pi, total = escort(p, alpha, axis)
    return total * jacobian_product(v, pi, axis)


def escort(p: Array, alpha: Array, axis: num.Axis) -> tuple[Array, Array]:
    """(π, Σq): the escort distribution π = q/Σq of p, q = p^(2-α) on its support."""
    q = support_power(p, 2 - alpha)
    total = num.class_sum(q, axis)
    return q / total, total


def _on_support(p: Array) -> Array:
    """p, with 1 off the support. What lies below the smallest normal number is off it: 1/p must be finite."""
    return jnp.where(p < jnp.finfo(p.dtype).tiny, 1.0, p)


def support_power(p: Array, exponent: Array) -> Array:
    """p^exponent on the support, 0 off it, also for a negative exponent."""
    return jnp.where(p >= jnp.finfo(p.dtype).tiny, _on_support(p) ** exponent, 0.0 * p)  # NaN stays NaN


def log_support(p: Array) -> Array:
    """log p on the support, 0 off it."""
    return jnp.log(_on_support(p))


def deformed_log(logp: Array, beta: Array, order: int = 0) -> Array:
    """∂_β^order ln_β(p) from log p: ∫_0^{log p} sⁿ exp(βs) ds = logⁿ⁺¹p ∫_0^1 sⁿ exp(sβ log p) ds, with n = order.

    ln_β(p) = (p^β - 1)/β, and log p at β = 0; smooth there. For log p ≤ 0, or slightly above, and β ≥ 0.
    """
    return _deformed_log(logp, jnp.broadcast_to(beta, logp.shape), order)


@custom_vjp(nondiff_argnums=(2,))
def _deformed_log(logp: Array, beta: Array, order: int) -> Array:
    return logp ** (order + 1) * _exponential_moment(beta * logp, order)


def _deformed_log_fwd(logp, beta, order):
    return _deformed_log(logp, beta, order), (logp, beta)


def _deformed_log_bwd(order, residuals, g):
    logp, beta = residuals
    slope = jnp.exp(beta * logp) if order == 0 else logp**order * jnp.exp(beta * logp)
    return g * slope, g * _deformed_log(logp, beta, order + 1)


_deformed_log.defvjp(_deformed_log_fwd, _deformed_log_bwd)


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


def _exponential_moment(y: Array, order: int) -> Array:
    """∫_0^1 sⁿ exp(sy) ds for y ≤ 0: a series of positive terms up to -y = n + 2, the incomplete gamma beyond."""
    if order == 0:
        return jnp.where(y == 0, 1.0, jnp.expm1(y) / jnp.where(y == 0, 1.0, y))
    n, t = order, jnp.minimum(-y, order + 2)
    series = jnp.ones_like(t)
    for j in reversed(range(1, 2 * n + 26)):
        series = 1 + series * t / (n + 1 + j)
    far = jnp.maximum(-y, n + 2)
    partial = sum(far**j / math.factorial(j) for j in range(n + 1))
    tail = math.factorial(n) / far ** (n + 1) * (1 - jnp.exp(-far) * partial)
    return jnp.where(-y <= n + 2, jnp.exp(-t) * series / (n + 1), tail)


# Solvers. All p_i follow from one of them, the pivot: that of the top class for α ≤ 2, of the smallest class of the
# support for α > 2. Σp is then a convex, increasing function of the pivot's p, and Newton's method from above
# decreases to the solution, without a bracket.


Solver = Callable[[Callable[[Array], Array], Array], Array]  # (newton, start) -> solution
ROUNDS, FUSED = 8, 16384


def _solve(z: Array, alpha: Array, exact: Exact, axis: num.ClassAxis) -> Array:
    """The α-entmax of z to rounding. Never differentiated.

    On a GPU XLA makes one kernel of it, if rows are not too long and the rounds are written out. They are enough for
    most logits; where they are not, p is NaN, and a loop follows. (A loop alone goes over z once a round.)
    """
    loop = functools.partial(_solution, _until_settled, exact=exact, axis=axis)

    def in_one_kernel(z, alpha):
        p = _solution(_written_out, z, alpha, exact=exact, axis=axis)
        once = lambda state: (~state[0], loop(z, alpha))  # a branch would copy p
        return lax.while_loop(lambda state: state[0], once, (jnp.any(jnp.isnan(p)), p))[1]

    num_classes = z.shape[axis.positions[0]]
    if exact is None or axis.mesh_axes or not isinstance(num_classes, int) or num_classes > FUSED:
        return loop(z, alpha)
    return num.on_gpu(in_one_kernel, loop, z, alpha)


def _solution(solver: Solver, z: Array, alpha: Array, exact: Exact, axis: num.ClassAxis) -> Array:
    m = num.class_max(z, axis)  # has no other use, or a GPU's kernel ends
    gap = jnp.where(z == jnp.inf, 0.0, z - m)
    # Two infinities have no limit, nor has nothing but -inf, where the gap is NaN.
    wrong = num.class_sum(jnp.where(jnp.isnan(gap), 2.0, jnp.where(z == jnp.inf, 1.0, 0.0)).astype(z.dtype), axis)
    d, start = bounded(gap), jnp.ones_like(m)
    if exact is None:
        start = num.undefined(~((alpha >= 1) & (alpha < jnp.inf)), start)
    p = _from_top(solver, d, start, jnp.minimum(alpha, 2.0) - 1, exact, axis)
    if exact is None:
        above = alpha > 2
        p = lax.cond(
            jnp.any(above),
            lambda: jnp.where(above, _from_bottom(d, start, jnp.maximum(alpha, 2.0) - 1, axis), p),
            lambda: p,
        )
    return num.undefined(wrong >= 2, p)


def _from_top(solver: Solver, d: Array, start: Array, beta: Array, exact: Exact, axis: num.Axis) -> Array:
    """p = u (1 + y)^(1/β), y = βd/u^β, for β ≤ 1, d = z - max z ≤ 0 and u ≤ `start` the top class's p."""

    def newton(u):
        e, slope, y = _powers(u, d, beta, exact)
        # u - (Σp - 1) / (d/du Σp), written with positive terms: du Σp = Σp + pull.
        total, pull = u * num.class_sum(e, axis), u * num.class_sum(-y * slope, axis)
        return u * ((1 + pull) / (total + pull))

    u = solver(newton, start)
    e, slope, _ = _powers(u, d, beta, exact)
    p = u * e
    # The rounding of u is common to all classes. What it leaves over goes where a shift of z would put it.
    excess = (num.class_sum(p, axis) - 1) / num.class_sum(slope, axis)
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


def _from_bottom(z: Array, start: Array, beta: Array, axis: num.Axis) -> Array:
    """p = (v^β + a^β)^(1/β), a^β = β(z - e), for β ≥ 1, e the smallest z of the support and v ≤ `start` its p."""
    m = num.class_max(z, axis)

    def offsets(e):
        return jnp.maximum(beta * (z - e), 0.0) ** (1 / beta)

    def undecided(bracket):
        low, high = bracket
        return jnp.any(num.class_any((z > low) & (z < high), axis))

    def halve(bracket):
        # A class at e is in the support if those above it have Σp < 1 when its own p is 0.
        low, high = bracket
        middle = low + (high - low) / 2
        fits = num.class_sum(offsets(middle), axis) < 1
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    _, high = lax.while_loop(undecided, halve, (m - 1 / beta, m))
    inside = z >= high
    e = -num.class_max(jnp.where(inside, -z, -jnp.inf), axis)
    a, size = offsets(e), num.class_sum(inside.astype(z.dtype), axis)

    def probabilities(v):
        top = jnp.maximum(jnp.maximum(v, a), jnp.finfo(z.dtype).tiny)
        ratio = jnp.minimum(v, a) / top
        return jnp.where(inside, top * jnp.exp(jnp.log1p(ratio**beta) / beta), 0.0)

    def newton(v):
        p = probabilities(v)
        slope = num.class_sum(jnp.where(inside, (v / jnp.where(inside, p, 1.0)) ** (beta - 1), 0.0), axis)
        return jnp.clip(v - (num.class_sum(p, axis) - 1) / slope, 0.0, v)

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
    return num.undefined(_decreases(x, before), x)


def _decreases(x: Array, before: Array) -> Array:
    return x < (1 - 4 * float(jnp.finfo(x.dtype).eps)) * before
