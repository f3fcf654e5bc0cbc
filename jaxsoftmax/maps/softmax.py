"""logsumexp, log_softmax and softmax, each with its rule beneath it.

    lse(z) = log Σ exp z_k,    log p = z - lse(z),    p = exp(z - lse(z)),
    ∇lse = p,    J = ∂p/∂z = diag(p) - ppᵀ.

Masks are applied once on the way in (an absent class gets the logit -inf) and once on the way out, so that the rules
see plain logits and no value behind a mask reaches a derivative. The rules widen half precision to float32, and their
results are rounded once on the way out.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes, dtypes
from jaxsoftmax._core.centring import (
    about_centred,
    centred_transpose,
    gradient_product,
    jacobian_product,
    product_beside,
)
from jaxsoftmax._core.tracing import traced_once
from jaxsoftmax._linear_map import linear_map
from jaxsoftmax.autodiff import custom_vjp

AxisLike = int | tuple[int, ...] | None
AxisName = str | tuple[str, ...] | None


def softmax(x: ArrayLike, axis: AxisLike = -1, where: ArrayLike | None = None, *, axis_name: AxisName = None) -> Array:
    """Softmax: p_i = exp(x_i) / Σ_k exp(x_k), the sum over the class axis.

    Args:
      x: real logits of any shape. Integers are promoted as in `jax.nn`.
      axis: the class axis; a tuple, or None for all axes, makes one distribution over several.
      where: boolean mask that broadcasts to `x`; where it is False the class is absent: p = 0, derivative 0.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Probabilities, of the shape and (floating) dtype of `x`. All zero where every class is masked.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> z = jnp.array([2.0, 1.0, 0.5])
      >>> [round(p, 4) for p in jaxsoftmax.softmax(z).tolist()]
      [0.6285, 0.2312, 0.1402]
      >>> [round(d, 4) for d in jax.jacfwd(jaxsoftmax.softmax)(z)[0].tolist()]
      [0.2335, -0.1453, -0.0881]

    Reference: docs/mathematics.md, sections 1 and 5; `jax.nn.softmax`.
    """
    x = checks.as_float("x", x)
    return _map(softmax_of, 0.0, x, checks.as_mask("where", where, x.shape), classes.axis_of(axis, x, axis_name, "x"))


def log_softmax(
    x: ArrayLike, axis: AxisLike = -1, where: ArrayLike | None = None, *, axis_name: AxisName = None
) -> Array:
    """Log-probabilities: log p_i = x_i - logsumexp(x), accurate also where p is near 1.

    Args:
      x: real logits of any shape. Integers are promoted as in `jax.nn`.
      axis: the class axis; a tuple, or None for all axes, makes one distribution over several.
      where: boolean mask that broadcasts to `x`; where it is False the class is absent: log p = -inf, derivative 0.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Log-probabilities, of the shape and (floating) dtype of `x`.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.log_softmax(jnp.array([20.0, 0.0])))
      [-2.0611537e-09 -2.0000000e+01]

    Reference: docs/mathematics.md, section 5; `jax.nn.log_softmax`, which returns 0 for the first of these two.
    """
    x = checks.as_float("x", x)
    axes = classes.axis_of(axis, x, axis_name, "x")
    return _map(log_softmax_of, -jnp.inf, x, checks.as_mask("where", where, x.shape), axes)


@overload
def logsumexp(
    a: ArrayLike,
    axis: AxisLike = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: Literal[False] = False,
    where: ArrayLike | None = None,
    *,
    axis_name: AxisName = None,
) -> Array: ...
@overload
def logsumexp(
    a: ArrayLike,
    axis: AxisLike = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    *,
    return_sign: Literal[True],
    where: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> tuple[Array, Array]: ...
@overload
def logsumexp(
    a: ArrayLike,
    axis: AxisLike = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: ArrayLike | None = None,
    *,
    axis_name: AxisName = None,
) -> Array | tuple[Array, Array]: ...
def logsumexp(
    a: ArrayLike,
    axis: AxisLike = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: ArrayLike | None = None,
    *,
    axis_name: AxisName = None,
) -> Array | tuple[Array, Array]:
    """log |Σ_k b_k exp(a_k)|, with b = 1 where it is not given.

    Args:
      a: array of any shape, real or complex. Integers are promoted as in `jax.nn`.
      axis: axis or axes summed over; None for all.
      b: factors that broadcast against `a`, of any sign, real or complex. A factor 0 takes its term out.
      keepdims: keep the summed axes with length 1.
      return_sign: also return the sign of the sum. Without it, the logarithm of a negative sum is NaN.
      where: boolean mask that broadcasts to `a`; where it is False the term is absent.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      The logarithm, of the shape of `a` without `axis`, in the common floating dtype of `a` and `b`; -inf over no
      term. With `return_sign`, a pair of it and the sign (-1, 0 or 1) in the same dtype. If `a` or `b` is complex, the
      principal value of log Σ; with `return_sign`, its real part, and the phase of the sum as the sign.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.logsumexp(jnp.array([0.0, -20.0])))
      2.0611537e-09

    Reference: docs/mathematics.md, section 5; `jax.scipy.special.logsumexp`.
    """
    a = checks.as_inexact("a", a)
    if b is not None:
        b = checks.as_inexact("b", b)
        shape = checks.common_shape("a", a, "b", b)
        a, b = jnp.broadcast_to(a, shape), jnp.broadcast_to(b, shape)
    mask = checks.as_mask("where", where, a.shape)
    axes = classes.axis_of(axis, a, axis_name, "a", *([] if b is None else [b]))
    if jnp.iscomplexobj(a) or jnp.iscomplexobj(b):
        if axes.mesh_axes:
            raise TypeError("a and b must be real where axis_name splits the terms over a mesh")
        return _complex_logsumexp(a, b, mask, axes, keepdims, return_sign)
    out, sign = _reduce(a, b, mask, axes, keepdims)
    if return_sign:
        return out, sign
    return out if b is None else classes.undefined(sign < 0, out)


@functools.partial(jax.jit, static_argnames=("rule", "absent", "axes"), inline=True)
def _map(rule, absent: float, x: Array, mask: Array | None, axes: classes.ClassAxis) -> Array:
    """`rule(z, axis)` over the given axes: mask, apply, round and mask."""
    (z,), axis = classes.one_axis(axes, classes.present(x, mask, axes))
    out = rule(z, axis).astype(x.dtype)
    out = out if len(axes.positions) == 1 else classes.unmerge_axes(out, x.shape, axes.positions)
    return out if mask is None else jnp.where(mask, out, absent)


@functools.partial(jax.jit, static_argnames=("axes", "keepdims"), inline=True)
def _reduce(a: Array, b: Array | None, mask: Array | None, axes: classes.ClassAxis, keepdims: bool):
    """logsumexp and its sign over the given axes."""
    dtype = a.dtype if b is None else dtypes.common_dtype(a, b)
    z = classes.present(a if b is None else a.astype(dtypes.compute_dtype(dtype)), mask, axes)
    b = b if b is None or mask is None else jnp.where(mask, b, 1.0)
    (z, b), axis = classes.one_axis(axes, z, b)
    if b is None:
        out = logsumexp_of(z, axis)
        sign = jnp.where(jnp.isnan(out), out, jnp.where(out == -jnp.inf, 0.0, 1.0))
    else:
        z = jnp.where((b == 0) & jnp.isnan(z), -jnp.inf, z)
        out, sign = _signed_logsumexp(z, b.astype(z.dtype), axis)
    out, sign = (jnp.squeeze(r, axis.positions) for r in (out, sign))
    if mask is not None:
        some = jnp.squeeze(classes.any(mask, axes), axes.positions)
        out, sign = jnp.where(some, out, -jnp.inf), jnp.where(some, sign, 0.0)
    if keepdims:
        out, sign = (jnp.expand_dims(r, axes.positions) for r in (out, sign))
    return out.astype(dtype), sign.astype(dtype)


@functools.partial(jax.jit, static_argnames=("axes", "keepdims", "return_sign"), inline=True)
def _complex_logsumexp(a: Array, b: Array | None, mask: Array | None, axes, keepdims: bool, return_sign: bool):
    """JAX's own, with nothing from behind the mask in value or derivative."""
    positions = axes.positions
    a, b = classes.present(a, mask, axes), b if b is None or mask is None else jnp.where(mask, b, 1)
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.logsumexp(a, positions, b=b, keepdims=keepdims, return_sign=return_sign)
    if mask is None:
        return out
    some = jnp.any(mask, positions, keepdims=keepdims)
    absent = (-jnp.inf, 0.0) if return_sign else -jnp.inf
    return jax.tree.map(lambda x, y: jnp.where(some, x, y), out, absent)


# Rules. Below, z is a floating array, `axis` counts from the front, and results are at least float32.


@traced_once
def moments(z: Array, axis: classes.Axis) -> tuple[Array, Array]:
    """(m, s): the maximum, and Σ exp(z_k - m) over every class but the top one. Never differentiated."""
    m = classes.top(z, axis)
    return m, classes.leave_top_out(lax.stop_gradient(z), m, axis)


@custom_vjp(nondiff_argnums=(3, 4))
def probabilities(z: Array, m: Array, total: Array, axis: classes.Axis, kept: bool = False) -> Array:
    """softmax(z) when its maximum m and total = Σ exp(z - m) are known; differentiable in z, which fixes the two.

    `kept`: beside what is as wide as they are and stays in memory, for which a quotient is the cheaper form.
    """
    e = jnp.exp(classes.shift(z, m))
    return e / total if kept else classes.over_total(e, total, axis)


def _probabilities_fwd(z, m, total, axis, kept):
    p = probabilities(z, m, total, axis, kept)
    return p, ((p,) if classes.alone(axis) else (z, m, total))


def _probabilities_bwd(axis, kept, residuals, g):
    product = jacobian_product if classes.alone(axis) else jacobian_at
    return product(g, *residuals, axis), None, None


probabilities.defvjp(_probabilities_fwd, _probabilities_bwd)


def jacobian_at(v: Array, z: Array, m: Array, total: Array, axis: classes.Axis) -> Array:
    """Jv at p = exp(z - m) / total, for the known m and total."""
    plain = lambda residuals, v: jacobian_product(v, probabilities(*residuals, axis), axis)
    return product_beside(v, plain, axis, z, m, total)


@custom_vjp(nondiff_argnums=(1,))
def softmax_of(z: Array, axis: classes.Axis) -> Array:
    e = jnp.exp(classes.shift(z, classes.top(z, axis)))
    return classes.over_total(e, classes.sum(e, axis), axis)


def _softmax_fwd(z, axis):
    p = softmax_of(z, axis)
    return p, classes.afresh(softmax_of, p, axis, z)[0]


def _softmax_bwd(axis, p, g):
    return (jacobian_product(g, p, axis),)


softmax_of.defvjp(_softmax_fwd, _softmax_bwd)


@custom_vjp(nondiff_argnums=(1,))
def log_softmax_of(z: Array, axis: classes.Axis) -> Array:
    m, s = moments(z, axis)
    return classes.below(z, m) - jnp.log1p(s)


def _log_softmax_fwd(z, axis):
    logp = log_softmax_of(z, axis)
    return logp, classes.afresh(log_softmax_of, logp, axis, z)[0]


def _log_softmax_bwd(axis, logp, g):
    return (linear_map(*_pull_and_push(axis), logp, g, jax.typeof(g)),)


log_softmax_of.defvjp(_log_softmax_fwd, _log_softmax_bwd)


def _pull_and_push(axis):
    """(log p, g) ↦ (I - p1ᵀ)ᵀ g and (log p, t) ↦ (I - 1pᵀ) t, which transpose each other."""
    return lambda logp, g: _less_sum(logp, g, axis), lambda logp, t: about_centred(t, jnp.exp(logp), axis)


@custom_vjp(nondiff_argnums=(2,))
def _less_sum(logp: Array, g: Array, axis: classes.Axis) -> Array:
    """Pᵀg = g - p Σg. By p > 3/4: rounding of p would make two tops of a tie at 1/2."""
    return centred_transpose(g, jnp.exp(logp), axis, above=0.75)


def _less_sum_bwd(axis, residuals, ct):
    logp, g = residuals
    pull, push = _pull_and_push(axis)
    dlogp = -classes.sum(g, axis) * (jnp.exp(logp) * ct)
    return dlogp, linear_map(push, pull, logp, ct, jax.typeof(ct))


_less_sum.defvjp(None, _less_sum_bwd)


@custom_vjp(nondiff_argnums=(1,))
def logsumexp_of(z: Array, axis: classes.Axis) -> Array:
    m, s = moments(z, axis)
    (s,) = classes.settled(s)
    return jnp.where(m == -jnp.inf, m, m + jnp.log1p(s))


def _logsumexp_fwd(z, axis):
    return logsumexp_of(z, axis), (z, *moments(z, axis))


def _logsumexp_bwd(axis, residuals, g):
    z, m, s = residuals
    return (gradient_product(g, probabilities, mean_of, axis, z, m, 1 + s),)


def mean_of(z, m, total, t, axis):
    return classes.sum(jnp.exp(classes.shift(z, m)) * t, axis) / total


logsumexp_of.defvjp(_logsumexp_fwd, _logsumexp_bwd)


@custom_vjp(nondiff_argnums=(2,))
def _signed_logsumexp(a: Array, b: Array, axis: classes.Axis) -> tuple[Array, Array]:
    a = jnp.where(b == 0, -jnp.inf, a)
    m = classes.max(a, axis)
    total = classes.sum(b * jnp.exp(classes.shift(a, _or_zero(m))), axis)
    return m + jnp.log(jnp.abs(total)), jnp.sign(total)


def _or_zero(m: Array) -> Array:
    """m, and 0 over no term, where m = -inf."""
    return jnp.where(m == -jnp.inf, 0.0, m)


def _signed_logsumexp_fwd(a, b, axis):
    out, sign = _signed_logsumexp(a, b, axis)
    return (out, sign), (a, b, out, lax.stop_gradient(sign))


def _signed_logsumexp_bwd(axis, residuals, cotangents):
    a, b, out, sign = residuals
    # ∂/∂b_k = exp(a_k) / Σ_j b_j exp(a_j), finite so that the product with b_k = 0 is 0.
    ratio = jnp.exp(jnp.minimum(classes.shift(a, _or_zero(out)), 0.99 * math.log(dtypes.largest(a.dtype))))
    weight = classes.shared_cotangent(cotangents[0], axis) * sign * ratio
    return weight * b, weight


_signed_logsumexp.defvjp(_signed_logsumexp_fwd, _signed_logsumexp_bwd)
