"""sparsemax, 1.5-entmax and α-entmax: the maps onto the simplex that can give a class probability exactly 0.

With β = α - 1 and ln_β(p) = (p^β - 1)/β, the deformed logarithm (log p at β = 0, which is softmax),

    ln_β(p_i) = z_i - ψ on the support, Σp = 1    =>    dp = J (dz - κ dα),
    J = diag(q) - qqᵀ/Σq = Σq (diag(π) - ππᵀ),    q = p^(2-α) on the support,    π = q/Σq,    κ = ∂_β ln_β(p).

J is the Jacobian of softmax at π, up to a factor, so one rule serves every α, also for the derivative in α.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes, dtypes
from jaxsoftmax._core.centring import about_centred, centred_transpose, jacobian_product, rounded_one
from jaxsoftmax._core.mesh import typed_like
from jaxsoftmax.autodiff import custom_vjp
from jaxsoftmax.maps.entmax_solver import Exact, solve
from jaxsoftmax.maps.softmax import AxisLike, AxisName


def sparsemax(
    x: ArrayLike, axis: AxisLike = -1, where: ArrayLike | None = None, *, axis_name: AxisName = None
) -> Array:
    """Sparsemax: the point of the simplex nearest to x, p_i = max(x_i - τ, 0) with τ such that Σp = 1.

    Args:
      x: real logits of any shape. Integers are promoted as in `jax.nn`.
      axis: the class axis; a tuple, or None for all axes, makes one distribution over several.
      where: boolean mask that broadcasts to `x`; where it is False the class is absent: p = 0, derivative 0.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Probabilities, of the shape and (floating) dtype of `x`; exactly 0 off the support. All zero where every class
      is masked.

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


def entmax15(x: ArrayLike, axis: AxisLike = -1, where: ArrayLike | None = None, *, axis_name: AxisName = None) -> Array:
    """1.5-entmax: p_i = max(x_i/2 - τ, 0)² with τ such that Σp = 1; sparse like sparsemax, smoother.

    Args:
      x: real logits of any shape. Integers are promoted as in `jax.nn`.
      axis: the class axis; a tuple, or None for all axes, makes one distribution over several.
      where: boolean mask that broadcasts to `x`; where it is False the class is absent: p = 0, derivative 0.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Probabilities, of the shape and (floating) dtype of `x`; exactly 0 off the support. All zero where every class
      is masked.

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
    axis: AxisLike = -1,
    where: ArrayLike | None = None,
    *,
    axis_name: AxisName = None,
) -> Array:
    """α-entmax: p_i = max((α-1) x_i - τ, 0)^(1/(α-1)) with τ such that Σp = 1.

    Softmax at α = 1, sparsemax at α = 2. Differentiable in `alpha` too, continuously through both.

    Args:
      x: real logits of any shape. Integers are promoted as in `jax.nn`.
      alpha: α ≥ 1, a number or an array that broadcasts to the shape of `x` without `axis`. A traced alpha below 1
        gives NaN.
      axis: the class axis; a tuple, or None for all axes, makes one distribution over several.
      where: boolean mask that broadcasts to `x`; where it is False the class is absent: p = 0, derivative 0.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Probabilities, of the shape and (floating) dtype of `x`; exactly 0 off the support. All zero where every class
      is masked.

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


def _simplex_map(x: ArrayLike, alpha: ArrayLike, axis: AxisLike, axis_name: AxisName, where: ArrayLike | None) -> Array:
    x = checks.as_float("x", x)
    axes = classes.axis_of(axis, x, axis_name, "x")
    alphas, exact = as_order(alpha, x.shape, axes)
    return _map(x, alphas, checks.as_mask("where", where, x.shape), exact, axes)


def as_order(alpha: ArrayLike, shape: tuple[int, ...], axes: classes.ClassAxis) -> tuple[Array, Exact]:
    """α as an array of `shape` without the class axis, and what is known of it."""
    values = checks.to_examples("alpha", checks.as_float("alpha", alpha), shape, axes.positions)
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
def _map(x: Array, alpha: Array, mask: Array | None, exact: Exact, axes: classes.ClassAxis) -> Array:
    """α-entmax over the given axes: mask and widen, apply, round and mask."""
    (z,), axis = classes.one_axis(axes, classes.present(dtypes.widen(x)[0], mask, axes))
    out = entmax_of(z, order_of(z, alpha, exact, axis), exact, axis)
    out = out if len(axes.positions) == 1 else classes.unmerge_axes(out, x.shape, axes.positions)
    out = out.astype(x.dtype)
    return out if mask is None else jnp.where(mask, out, 0.0)


def order_of(z: Array, alpha: Array, exact: Exact, axis: classes.Axis) -> Array:
    """α in the dtype of z, with the class axis of length 1."""
    alpha = jnp.full_like(alpha, exact) if isinstance(exact, float) else alpha
    return typed_like(
        classes.max(lax.stop_gradient(z), axis), jnp.expand_dims(alpha.astype(z.dtype), classes.positions(axis))
    )


# Rule. Below, z is a floating array of at least float32, `axis` counts from the front, and α has length 1 there.


def entmax_of(z: Array, alpha: Array, exact: Exact, axis: classes.ClassAxis) -> Array:
    return _with_jacobian(z, alpha, solve(lax.stop_gradient(z), lax.stop_gradient(alpha), exact, axis), axis)


@custom_vjp(nondiff_argnums=(3,))
def _with_jacobian(z: Array, alpha: Array, p: Array, axis: classes.Axis) -> Array:
    """p, the α-entmax of z; differentiable in z and α, which fix it."""
    return p


def _with_jacobian_fwd(z, alpha, p, axis):
    p = _with_jacobian(z, alpha, p, axis)
    return p, (alpha, p)


def _with_jacobian_bwd(axis, residuals, g):
    alpha, p = residuals
    jg = entmax_jacobian_product(g, p, alpha, axis)
    return jg, -classes.local_sum(deformed_log(log_support(p), alpha - 1, 1) * jg, axis), None


_with_jacobian.defvjp(_with_jacobian_fwd, _with_jacobian_bwd)


def entmax_jacobian_product(v: Array, p: Array, alpha: Array, axis: classes.Axis) -> Array:
    """Jv = Σq (π∘(v - <π,v>)), to a few eps of |J||v|."""
    pi, total = escort(p, alpha, axis)
    return total * jacobian_product(v, pi, classes.beside_others(axis))


def escort(p: Array, alpha: Array, axis: classes.Axis) -> tuple[Array, Array]:
    """(π, Σq): the escort distribution π = q/Σq of p, q = p^(2-α) on its support."""
    return _shares(support_power(p, 2 - alpha), axis)


def escort_of(z: Array, alpha: Array, exact: Exact, axis: classes.ClassAxis) -> tuple[Array, Array]:
    """`escort` of the α-entmax of z, with derivatives in z: those in p grow with every order by a factor 1/p."""
    p = entmax_of(z, alpha, exact, axis)
    return _shares(_power(z, alpha, 2 - alpha, p, axis), axis)


@functools.partial(jax.jit, static_argnames=("exact", "axis"), inline=True)
def escort_map(z: Array, alpha: Array, mask: Array | None, exact: Exact, axis: classes.ClassAxis):
    """`escort_of` at the classes of the mask: (0, 1) where it leaves none."""
    z = classes.present(z, mask, axis)
    pi, total = escort_of(z, order_of(z, alpha, exact, axis), exact, axis)
    if mask is not None:
        total = jnp.where(classes.any(mask, axis), total, 1.0)
    return classes.zero_absent(pi, mask), total


def _shares(q: Array, axis: classes.Axis) -> tuple[Array, Array]:
    total = rounded_one(q, axis)
    return q / total, total


@custom_vjp(nondiff_argnums=(4,))
def _power(z: Array, alpha: Array, exponent: Array, p: Array, axis: classes.Axis) -> Array:
    """p^k on the support, 0 off it, for the α-entmax p of z: d(p^k) = k p^(k+1-α) (dz - dψ - κ dα) + p^k log p dk."""
    return jnp.minimum(support_power(p, exponent), jnp.finfo(p.dtype).max)  # k = 0 times an infinite one is NaN


def _power_bwd(axis, residuals, ct):
    slope, by_exponent, pi, kappa = _power_slopes(*residuals, axis)
    of_z = centred_transpose(slope * ct, pi, axis)
    return of_z, -classes.local_sum(kappa * of_z, axis), classes.local_sum(by_exponent * ct, axis), None


def _power_jvp(axis, primals, tangents):
    slope, by_exponent, pi, kappa = _power_slopes(*primals, axis)
    dz, dalpha, dk, _ = tangents
    return _power(*primals, axis), slope * about_centred(dz - kappa * dalpha, pi, axis) + by_exponent * dk


def _power_slopes(z, alpha, exponent, p, axis) -> tuple[Array, Array, Array, Array]:
    pi, _ = _shares(_power(z, alpha, 2 - alpha, p, axis), axis)
    slope = exponent * _power(z, alpha, exponent + 1 - alpha, p, axis)
    logp = log_support(p)
    return slope, _power(z, alpha, exponent, p, axis) * logp, pi, deformed_log(logp, alpha - 1, 1)


_power.defvjp(None, _power_bwd, jvp=_power_jvp)


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


def _deformed_log_bwd(order, residuals, g):
    logp, beta = residuals
    slope = jnp.exp(beta * logp) if order == 0 else logp**order * jnp.exp(beta * logp)
    return g * slope, g * _deformed_log(logp, beta, order + 1)


_deformed_log.defvjp(None, _deformed_log_bwd)


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
