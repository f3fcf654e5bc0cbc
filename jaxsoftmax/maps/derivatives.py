"""The derivatives of softmax in its output p: first, second and third, as products and as dense arrays.

    J = diag(p) - ppᵀ,    Jv = p∘ṽ,    ṽ = v - <p,v>.

J is symmetric, so its products with a tangent and with a cotangent are one function. `SoftmaxJacobian` is J as an
object.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes, dtypes
from jaxsoftmax._core.centring import about_centred, centred, complement, jacobian_product, rounded_one
from jaxsoftmax._core.mesh import in_auto_mode, split_axes_of
from jaxsoftmax._core.tracing import compiled
from jaxsoftmax._linear_map import linear_map
from jaxsoftmax.autodiff import custom_vjp
from jaxsoftmax.maps.softmax import AxisName, softmax


def softmax_jvp(t: ArrayLike, p: ArrayLike, axis: int = -1, *, axis_name: AxisName = None) -> Array:
    """Pushforward of softmax from its output: J t = p∘(t - <p,t>); O(K).

    Args:
      t: tangent of the logits, of the shape of `p`.
      p: probabilities, the output of softmax. Floating; that they sum to 1 is taken for granted, not checked: off the
        simplex, and for derivatives in `p` across it, the result is defined up to multiples of p.
      axis: the class axis.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Tangent of the probabilities, of the shape of `p` and the common dtype, to a few eps of |J||t|. Differentiable
      in both arguments, to any order.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> p = jaxsoftmax.softmax(jnp.array([2.0, 1.0, 0.5]))
      >>> print(jaxsoftmax.softmax_jvp(jnp.array([0.1, -0.3, 0.2]), p).round(4))
      [ 0.0493 -0.0743  0.025 ]

    Reference: docs/mathematics.md, sections 2 and 5.
    """
    return _product(p, {"t": t}, axis, axis_name)


def softmax_vjp(g: ArrayLike, p: ArrayLike, axis: int = -1, *, axis_name: AxisName = None) -> Array:
    """Pullback of softmax from its output: Jᵀg = p∘(g - <p,g>), the same product as the pushforward; O(K).

    Args:
      g: cotangent of the probabilities, of the shape of `p`.
      p: probabilities, the output of softmax, as in `softmax_jvp`.
      axis: the class axis.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Cotangent of the logits, as in `softmax_jvp`.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> p = jaxsoftmax.softmax(jnp.array([30.0, 0.0]))  # 1 - p_0 = 9e-14 is lost in p_0, but not in the product
      >>> print(jaxsoftmax.softmax_vjp(jnp.array([1.0, 0.0]), p))
      [ 9.357623e-14 -9.357623e-14]

    Reference: docs/mathematics.md, sections 2 and 5.
    """
    return _product(p, {"g": g}, axis, axis_name)


def softmax_jacobian(x: ArrayLike, *, axis_name: AxisName = None) -> Array:
    """The Jacobian of softmax over the last axis as a dense matrix: J = diag(p) - ppᵀ; O(K²), the size of the result.

    Args:
      x: real logits (..., K). Integers are promoted as in `jax.nn`.
      axis_name: None. Of classes split over a mesh there are products, by `SoftmaxJacobian`, not the matrix.

    Returns:
      J (..., K, K), output class before input class (it is symmetric), in the floating dtype of `x`. Its diagonal
      p(1 - p) is accurate also where p is near 1. Differentiable, to any order.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> for row in jaxsoftmax.softmax_jacobian(jnp.array([2.0, 1.0, 0.5])).tolist():
      ...     print([round(entry, 4) for entry in row])
      [0.2335, -0.1453, -0.0881]
      [-0.1453, 0.1778, -0.0324]
      [-0.0881, -0.0324, 0.1206]

    Reference: docs/mathematics.md, section 2; `SoftmaxJacobian` does without the matrix.
    """
    checks.all_classes("softmax_jacobian", checks.split_over(axis_name))
    return _dense_jacobian(_logits(x))


def softmax_hessian(x: ArrayLike, *, axis_name: AxisName = None) -> Array:
    """The second derivative of softmax over the last axis: T_ijk = ∂²p_i/∂x_j∂x_k; O(K³), the size of the result.

    T_iii = p_i (1 - p_i)(1 - 2p_i), T_iik = -p_i p_k (1 - 2p_i) and 2 p_i p_j p_k where all differ: the third cumulant
    of the one-hot class, symmetric in all indices.

    Args:
      x: real logits (..., K). Integers are promoted as in `jax.nn`.
      axis_name: None. Of classes split over a mesh there are products, by `softmax_second_derivative`, not the tensor.

    Returns:
      T (..., K, K, K) in the floating dtype of `x`. Differentiable, to any order.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> for matrix in jaxsoftmax.softmax_hessian(jnp.array([jnp.log(3.0), 0.0])).tolist():
      ...     print([[round(entry, 5) for entry in row] for row in matrix])
      [[-0.09375, 0.09375], [0.09375, -0.09375]]
      [[0.09375, -0.09375], [-0.09375, 0.09375]]

    Reference: docs/mathematics.md, section 2; `softmax_second_derivative` does without the tensor.
    """
    checks.all_classes("softmax_hessian", checks.split_over(axis_name))
    return _dense_hessian(_logits(x))


def softmax_second_derivative(
    u: ArrayLike, v: ArrayLike, p: ArrayLike, axis: int = -1, *, axis_name: AxisName = None
) -> Array:
    """D²σ[u, v] = p∘(ũṽ - E[ũṽ]) with ũ = u - <p,u>: the Hessian of softmax between two tangents; O(K).

    Args:
      u: tangent of the logits, of the shape of `p`.
      v: another one.
      p: probabilities, the output of softmax, as in `softmax_jvp`.
      axis: the class axis.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      The second directional derivative of the probabilities, of the shape of `p` and the common dtype.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> p, u = jnp.array([0.75, 0.25]), jnp.array([1.0, 0.0])
      >>> print(jaxsoftmax.softmax_second_derivative(u, u, p))
      [-0.09375  0.09375]

    Reference: docs/mathematics.md, section 2.
    """
    return _higher(p, {"u": u, "v": v}, axis, axis_name)


def softmax_third_derivative(
    u: ArrayLike, v: ArrayLike, w: ArrayLike, p: ArrayLike, axis: int = -1, *, axis_name: AxisName = None
) -> Array:
    """D³σ[u, v, w] = p∘(ũṽw̃ - E[ũṽw̃] - ũE[ṽw̃] - ṽE[ũw̃] - w̃E[ũṽ]) with ũ = u - <p,u>; O(K).

    Args:
      u: tangent of the logits, of the shape of `p`.
      v: another one.
      w: and a third.
      p: probabilities, the output of softmax, as in `softmax_jvp`.
      axis: the class axis.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      The third directional derivative of the probabilities, of the shape of `p` and the common dtype.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> p, u = jnp.array([0.75, 0.25]), jnp.array([1.0, 0.0])
      >>> print(jaxsoftmax.softmax_third_derivative(u, u, u, p))
      [-0.0234375  0.0234375]

    Reference: docs/mathematics.md, section 2.
    """
    return _higher(p, {"u": u, "v": v, "w": w}, axis, axis_name)


def _probs_and(p: ArrayLike, tangents: dict[str, ArrayLike], axis: int, axis_name: AxisName) -> tuple:
    """Checked arguments of a product, and the axis counted from the front."""
    p = checks.as_loss_float("p", p)
    arrays = [checks.as_float(name, v) for name, v in tangents.items()]
    for name, v in zip(tangents, arrays):
        checks.same_shape(name, v, "p", p.shape)
    return classes.ClassAxis((checks.axis_index(axis, p.ndim),), checks.split_over(axis_name, "p", p)), p, *arrays


def _product(*arguments) -> Array:
    return _jacobian_product(*_probs_and(*arguments))


def _higher(*arguments) -> Array:
    return _derivative(*_probs_and(*arguments))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _jacobian_product(axis: classes.ClassAxis, p: Array, v: Array) -> Array:
    wide_v, wide_p = dtypes.widen(v, p)
    return _product_at(wide_p, wide_v, axis).astype(dtypes.common_dtype(v, p))


@custom_vjp(nondiff_argnums=(2,))
def _product_at(p: Array, v: Array, axis: classes.ClassAxis) -> Array:
    """p∘(v - <p,v>). Its rule finds the sums again: JAX's would end a GPU's kernel at the value's."""
    return jacobian_product(v, p, axis, rounded_one(p, axis))


def _product_at_fwd(p, v, axis):
    return _product_at(p, v, axis), (p, v, rounded_one(p, axis))


def _product_at_bwd(axis, residuals, g):
    p, v, total = residuals
    total, p = classes.afresh(rounded_one, total, axis, p)
    by_p = linear_map(*_pull_and_push(axis), (p, v, total), g, jax.typeof(p))
    return by_p, jacobian_product(g, p, axis, total)


def _pull_and_push(axis):
    """g ↦ Pv∘Pg and ṗ ↦ ṗ∘Pv - p <ṗ, Pv>, which transpose each other."""

    def pull(residuals, g):
        p, v, total = residuals
        return about_centred(v, p, axis, total) * about_centred(g, p, axis, total)

    def push(residuals, dp):
        p, v, total = residuals
        w = about_centred(v, p, axis, total)
        return dp * w - p * (classes.sum(dp * w, axis) / total)

    return pull, push


_product_at.defvjp(_product_at_fwd, _product_at_bwd)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _derivative(axis: classes.ClassAxis, p: Array, *tangents: Array) -> Array:
    """The second or third derivative, p∘(y - <p,y>) with y the product of the centred tangents, less what is shared."""
    dtype = dtypes.common_dtype(p, *tangents)
    p, *vectors = dtypes.widen(p, *tangents)
    total = rounded_one(p, axis)
    u, v, *rest = (centred(t, p, axis, total) for t in vectors)
    if not rest:
        return jacobian_product(u * v, p, axis, total).astype(dtype)
    (w,) = rest
    shared = sum(a * classes.sum(p * b * c, axis) for a, b, c in ((u, v, w), (v, u, w), (w, u, v)))
    return (jacobian_product(u * v * w, p, axis, total) - p * shared).astype(dtype)


@compiled
def _dense_jacobian(x: Array) -> Array:
    (z,) = dtypes.widen(x)
    p = softmax(z)
    return in_auto_mode(dense_jacobian, p, (*split_axes_of(p), None)).astype(x.dtype)


@custom_vjp
def dense_jacobian(p: Array) -> Array:
    """diag(p) - ppᵀ, differentiable in p along the simplex."""
    diagonal = jnp.broadcast_to((p * complement(p))[..., None], (*p.shape, p.shape[-1]))
    return jnp.where(_same(diagonal, -2, -1), diagonal, -(p[..., None] * p[..., None, :]))


def _dense_jacobian_bwd(residuals, g):
    (p,) = residuals
    # d(diag(p) - ppᵀ) = diag(dp) - dp pᵀ - p dpᵀ
    rows = jnp.sum(g * p[..., None, :], -1) + jnp.sum(g * p[..., None], -2)
    return (jnp.diagonal(g, axis1=-2, axis2=-1) - rows,)


dense_jacobian.defvjp(None, _dense_jacobian_bwd)


@compiled
def _dense_hessian(x: Array) -> Array:
    (z,) = dtypes.widen(x)
    p = softmax(z)
    return in_auto_mode(_hessian_of, p, (*split_axes_of(p), None, None)).astype(x.dtype)


def _hessian_of(p: Array) -> Array:
    a, b, c = p[..., :, None, None], p[..., None, :, None], p[..., None, None, :]
    twice = 2 * a * b * c
    ij, jk, ik = (_same(twice, *pair) for pair in ((-3, -2), (-2, -1), (-3, -1)))
    one_pair = jnp.where(ij | ik, -a * jnp.where(ij, c, b) * (1 - 2 * a), -a * b * (1 - 2 * b))
    all_same = a * complement(p)[..., :, None, None] * (1 - 2 * a)
    return jnp.where(ij & jk, all_same, jnp.where(ij | jk | ik, one_pair, twice))


def _same(like: Array, first: int, second: int) -> Array:
    """Where the indices along two axes are equal."""
    return classes.index(like, first) == classes.index(like, second)


def _logits(x: ArrayLike) -> Array:
    x = checks.as_float("x", x)
    checks.axis_index(-1, x.ndim)
    return x
