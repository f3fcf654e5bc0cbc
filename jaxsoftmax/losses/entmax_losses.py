"""Fenchel-Young losses of α-entmax: sparse predictions with a convex, smooth loss and a margin.

    L(z, y) = Ω*(z) + Ω(y) - <z, y>,    Ω(y) = Σ (y^α - y) / (α(α-1)),    ∂L/∂z = p - y,    ∂²L/∂z² = J,

with p and J those of α-entmax. The three terms cancel near the solution. With z_k - ψ = ln_β(p_k) on the support
(`jaxsoftmax.entmax`), L is a sum over the classes of terms that are never negative, Bregman divergences and slack
(docs/mathematics.md, section 4.3):

    L = Σ ω(y_k) - ω(p_k) - ω'(p_k) (y_k - p_k) + y_k max(ψ - z_k - 1/β, 0),    ω(t) = (t^α - t) / (α(α-1)).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes, dtypes
from jaxsoftmax._core.centring import below_half, less
from jaxsoftmax._core.mesh import aligned, typed_like
from jaxsoftmax.autodiff import custom_vjp
from jaxsoftmax.losses.head import checked_logits, without_ignored
from jaxsoftmax.losses.hessian import Curvature, only_examples, operators_of
from jaxsoftmax.maps.entmax import (
    as_order,
    deformed_log,
    entmax_of,
    escort,
    escort_of,
    log_support,
    order_of,
)
from jaxsoftmax.maps.entmax_solver import bounded, log1p, log_deformed_exp
from jaxsoftmax.maps.softmax import AxisName
from jaxsoftmax.operators.diagonal_low_rank import DiagonalPlusLowRank
from jaxsoftmax.operators.softmax_jacobian import SoftmaxJacobian


def entmax_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    alpha: ArrayLike = 1.5,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
    axis_name: AxisName = None,
) -> Array:
    """Fenchel-Young loss of α-entmax: L = max_p (<p, z> + H_α(p)) - <y, z> - H_α(y), with gradient p - y.

    H_α is the Tsallis entropy Σ (p - p^α) / (α(α-1)). L ≥ 0, and L = 0 exactly where p = y: for a class index and
    α > 1, where its logit leads by 1/(α-1). α = 1 is softmax cross-entropy (minus the entropy of a soft label).

    Args:
      logits: floating-point logits z; `axis` counts the classes.
      labels: integers (class indices) of the shape of `logits` without `axis`, or, if floating point, distributions y
        over the classes (y ≥ 0, Σy = 1) of the shape of `logits`; either may broadcast to it. An index outside [0, K),
        -1 included, or a negative entry of y makes loss and gradient of its own example NaN.
      alpha: α ≥ 1, a number or an array that broadcasts to the shape of the result.
      axis: class axis, or a tuple of axes flattened into one, in the given order.
      where: boolean mask of the shape of the result (False: the example is absent), else one that broadcasts to
        `logits` (False: the class is absent). An absent example has loss 0 and gradient 0; a label on an absent class
        has loss +inf.
      ignore_index: class index of examples to leave out; loss 0, gradient 0.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Loss per example, of the shape of `logits` without `axis`; float32 for half-precision logits. Differentiable in
      logits, soft labels (the slope at a label of 0 is that at the smallest positive number) and alpha.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> logits = jnp.array([1.0, 0.5, -1.5])
      >>> loss, gradient = jax.value_and_grad(jaxsoftmax.entmax_loss)(logits, jnp.array(1))
      >>> print(loss.round(4), gradient.round(4))
      0.6844 [ 0.674 -0.674  0.   ]

    Reference: Blondel, Martins and Niculae 2020, https://arxiv.org/abs/1901.02324; docs/mathematics.md, section 3.
    """
    return _loss(*_arguments(logits, labels, alpha, axis, where, ignore_index, axis_name))


def multiclass_sparsemax_loss(
    scores: ArrayLike, labels: ArrayLike, *, ignore_index: int | None = None, axis_name: AxisName = None
) -> Array:
    """Fenchel-Young loss of sparsemax with class indices, the case α = 2 of `entmax_loss`; gradient p - e_label.

    L = ½ Σ_{k≠label} p_k² + ½ (1 - p_label)² where p_label > 0.

    Args:
      scores: floating-point logits (..., K).
      labels: integers (...). One outside [0, K) makes loss and gradient of its own example NaN.
      ignore_index: label of examples to leave out; loss 0, gradient 0.
      axis_name: as in `entmax_loss`.

    Returns:
      Loss per example (...); float32 for half-precision scores.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> scores, labels = jnp.array([[1.0, 0.5, -1.0], [2.0, 0.5, -1.0]]), jnp.array([1, 0])
      >>> print(jaxsoftmax.multiclass_sparsemax_loss(scores, labels))
      [0.5625 0.    ]

    Reference: Martins and Astudillo 2016, https://arxiv.org/abs/1602.02068; `optax.multiclass_sparsemax_loss`.
    """
    return _loss(*_sparsemax_arguments(scores, labels, ignore_index, axis_name))


def sparsemax_loss(logits: ArrayLike, labels: ArrayLike) -> Array:
    """Binary sparsemax loss: L = (s - y)² + |s - y| max(|z| - 1, 0), with the sparse sigmoid s = clip((z + 1)/2, 0, 1).

    The gradient is s - y, and L = 0 exactly where s = y: for a label 0 or 1, beyond a margin of 1.

    Args:
      logits: floating-point logits z of any shape, one per binary decision.
      labels: 0 or 1 (integer, boolean), or floating-point probabilities y in [0, 1]; broadcast against `logits`.
        A label outside makes its own loss and gradient NaN.

    Returns:
      Loss per decision; float32 for half-precision logits.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> logits, labels = jnp.array([-2.0, 0.0, 1.0]), jnp.array([1, 1, 1])
      >>> print(jaxsoftmax.sparsemax_loss(logits, labels))
      [2.   0.25 0.  ]

    Reference: Blondel, Martins and Niculae 2020, https://arxiv.org/abs/1901.02324; `optax.sparsemax_loss`.
    """
    return _binary_loss(*_binary_arguments(logits, labels))


def _binary_arguments(logits, labels) -> tuple:
    logits = checks.as_loss_float("logits", logits)
    labels = checks.as_array("labels", labels)
    if jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == jnp.bool_:
        labels = labels.astype(dtypes.compute_dtype(logits.dtype))
    labels = checks.as_float("labels", labels)
    shape = checks.common_shape("logits", logits, "labels", labels)
    return aligned(jnp.broadcast_to(logits, shape), jnp.broadcast_to(labels, shape))


def _arguments(logits, labels, alpha, axis, where, ignore_index, axis_name) -> tuple:
    logits, mask, axes = checked_logits(logits, axis, axis_name, where)
    labels = checks.as_array("labels", labels)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        labels = checks.class_indices(labels, logits, axes.positions)
        labels, mask = without_ignored(labels, mask, ignore_index, logits, axes)
    elif jnp.issubdtype(labels.dtype, jnp.floating):
        labels = checks.class_probabilities(labels, logits, axes.positions)
        if ignore_index is not None:
            raise TypeError(f"ignore_index={ignore_index} needs class indices, got labels of {labels.dtype}; use where")
    else:
        raise TypeError(f"labels must have an integer (indices) or floating (distributions) dtype, got {labels.dtype}")
    alphas, exact = as_order(alpha, logits.shape, axes)
    return logits, labels, alphas, mask, exact, axes


def _sparsemax_arguments(scores, labels, ignore_index, axis_name) -> tuple:
    scores = checks.as_loss_float("scores", scores)
    axes = classes.axis_of(-1, scores, axis_name, "scores")
    labels, mask = checks.class_indices(labels, scores, axes.positions), None
    labels, mask = without_ignored(labels, mask, ignore_index, scores, axes)
    alphas, exact = as_order(2.0, scores.shape, axes)
    return scores, labels, alphas, mask, exact, axes


@functools.partial(jax.jit, static_argnames=("exact", "axes"), inline=True)
def _loss(logits, labels, alpha, mask, exact, axes) -> Array:
    """The loss per example for class indices or distributions."""
    indices = jnp.issubdtype(labels.dtype, jnp.integer)
    if indices:
        (z, mask), axis = classes.one_axis(axes, dtypes.widen(logits)[0], mask)
        y = one_hot(z, labels, axis)
    else:
        (z, y, mask), axis = classes.one_axis(axes, *dtypes.widen(logits, labels), mask)
        y = classes.undefined(y < 0, y)
    z = classes.present(z, mask, axis)
    alpha = order_of(z, alpha, exact, axis)
    p = entmax_of(z, alpha, exact, axis)
    on_absent = 0.0
    if mask is not None:
        on_absent = jnp.where(classes.any(~mask & (y > 0), axis), jnp.inf, 0.0)
        y = jnp.where(mask, y, 0.0)
    loss = fenchel_young(z, typed_like(z, y), alpha, p, axis, indices) + on_absent
    if indices:
        loss = loss * (1 + 0 * classes.max(y, axis))  # NaN at every order for a label that is no class
    return classes.absent_examples(loss, mask, axis)


def one_hot(z: Array, labels: Array, axis: classes.Axis) -> Array:
    """e_label along the class axis; NaN throughout for a label that is no class."""
    return classes.one_hot(
        z, jnp.expand_dims(classes.labels(labels, classes.number(z, axis)), classes.positions(axis)), axis
    )


# Rules. z, y, p and α are floating arrays of at least float32; the class axis of α and of the loss has length 1.


@custom_vjp(nondiff_argnums=(4, 5))
def fenchel_young(z: Array, y: Array, alpha: Array, p: Array, axis: classes.Axis, sums_to_one: bool) -> Array:
    """L(z, y) from p, the α-entmax of z, with the class axis kept. p maximises, so it has no part in the gradient.

    As the sum of Bregman divergences L is defined for every y ≥ 0, which makes its slope in y well defined. Letters are
    those of docs/mathematics.md, section 4.3.
    """
    beta = alpha - 1
    x = dual(z, alpha, p, axis)
    # A term is y^α (w - n) for y = p exp(h) ≥ p, and p^α (n - exp(-a) w) for y < p, with a = |h|.
    h = log_support(y) - log_deformed_exp(x, beta)
    a = -bounded(-jnp.abs(h))
    w, n = -deformed_log(-a, beta), -deformed_log(-a, alpha)
    larger = jnp.where(h > 0, y, p) ** alpha
    bregman = larger * jnp.maximum(jnp.where(h > 0, w - n, n - jnp.exp(-a) * w), 0.0)
    slack = jnp.where(x == -jnp.inf, jnp.inf, jnp.maximum(-x - 1 / beta, 0.0))
    absent = y < jnp.finfo(y.dtype).tiny
    terms = jnp.where(absent, p**alpha / alpha, bregman + y * jnp.where(absent, 0.0, slack))
    return classes.sum(terms, axis)


def _fenchel_young_bwd(axis, sums_to_one, residuals, ct):
    z, y, alpha, p = residuals
    beta, finfo = alpha - 1, jnp.finfo(z.dtype)
    slope = less(y, p, classes.sum(below_half(p), axis))
    label_slope = deformed_log(jnp.log(jnp.maximum(y, finfo.tiny)), beta) - bounded(dual(z, alpha, p, axis))
    alpha_slope = classes.sum(_entropy_slope(p, alpha) - _entropy_slope(y, alpha), axis)
    if not sums_to_one:
        excess, (pi, _) = classes.sum(y, axis) - 1, escort(p, alpha, axis)
        kappa = deformed_log(log_support(p), beta, 1)
        slope += excess * pi
        alpha_slope += excess * (1 / alpha**2 - classes.sum(pi * kappa, axis))
    shared = classes.shared_cotangent(ct, axis)
    return shared * slope, shared * label_slope, ct * alpha_slope, None


fenchel_young.defvjp(None, _fenchel_young_bwd)


def _entropy_slope(p: Array, alpha: Array) -> Array:
    """∂/∂α of (p - p^α)/(α(α-1)) = -p ln_β(p)/α."""
    logp, beta = log_support(p), alpha - 1
    return p / alpha * (deformed_log(logp, beta) / alpha - deformed_log(logp, beta, 1))


@custom_vjp(nondiff_argnums=(3,))
def dual(z: Array, alpha: Array, p: Array, axis: classes.Axis) -> Array:
    """z - ψ: ln_β(p) on the support, at most -1/β off it. Differentiable in z and α, which fix p."""
    m, u = classes.max(z, axis), classes.max(p, axis)
    rest = jnp.where(u > 0.5, classes.sum(below_half(p), axis), 0.0)
    top = deformed_log(jnp.where(u > 0.5, log1p(-rest), log_support(u)), alpha - 1)
    return top + classes.below(z, m)


def _dual_fwd(z, alpha, p, axis):
    return dual(z, alpha, p, axis), (alpha, p)


def _dual_bwd(axis, residuals, g):
    # From dp = q∘(dz - dψ - κ dα) and Σdp = 0: dψ = <π, dz - κ dα>.
    alpha, p = residuals
    (pi, _), total = escort(p, alpha, axis), classes.sum(g, axis)
    return g - pi * total, total * classes.local_sum(pi * deformed_log(log_support(p), alpha - 1, 1), axis), None


dual.defvjp(_dual_fwd, _dual_bwd)


@functools.partial(jax.jit, inline=True)
def _binary_loss(logits: Array, labels: Array) -> Array:
    return _binary(*_widened(logits, labels))


def _widened(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Both in the computation dtype; a label outside [0, 1] is NaN."""
    z, y = dtypes.widen(logits, labels)
    return z, typed_like(z, classes.undefined((y < 0) | (y > 1), y))


@custom_vjp
def _binary(z: Array, y: Array) -> Array:
    gap = jnp.abs(_binary_residual(z, y))
    return jnp.where(gap == 0, 0.0, gap * (gap + jnp.maximum(jnp.abs(z) - 1, 0.0)))


def _binary_bwd(residuals, ct):
    z, y = residuals
    return ct * _binary_residual(z, y), ct * ((2 * y - 1) - z)


_binary.defvjp(None, _binary_bwd)


def _binary_residual(z: Array, y: Array) -> Array:
    """s - y, without rounding (z + 1)/2."""
    return jnp.where(jnp.abs(z) >= 1, (z > 0).astype(z.dtype) - y, (z - (2 * y - 1)) / 2)


# Hessians: J of the map, Pᵀ diag(q) P centred at the escort distribution π = q/Σq.


@operators_of(entmax_loss, _arguments, "exact", "axis")
@operators_of(multiclass_sparsemax_loss, _sparsemax_arguments, "exact", "axis")
def _entmax_operators(logits, labels, alpha, mask, exact, axis) -> Curvature:
    z = classes.present(*dtypes.widen(logits), mask, axis)
    alpha = order_of(z, alpha, exact, axis)
    pi, total = escort_of(z, alpha, exact, axis)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        total = total + 0.0 * classes.sum(one_hot(z, labels, axis), axis)  # NaN for a label that is no class
    hessian = SoftmaxJacobian(pi, only_examples(mask, total, axis), axis=axis)
    return Curvature(hessian, hessian)


@operators_of(sparsemax_loss, _binary_arguments)
def _binary_operators(logits, labels) -> Curvature:
    z, y = _widened(logits, labels)
    hessian = DiagonalPlusLowRank(classes.undefined(jnp.isnan(z + y), jnp.where(jnp.abs(z) < 1, 0.5, 0.0)))
    return Curvature(hessian, hessian)
