"""Softmax cross-entropy, for integer and for soft labels: value, rule and Hessian.

    L(z, c) = log Σ exp(z_k) - z_c,            ∂L/∂z = p - e_c,         ∂²L/∂z² = J = diag(p) - ppᵀ,
    L(z, y) = Σ y_k (log Σ exp(z_j) - z_k),    ∂L/∂z = (Σy) p - y,      ∂²L/∂z² = (Σy) J.

With m = max z, e = exp(z - m) and R = Σ_{k≠c} e_k (the label left out of the sum) nothing of size 1 is subtracted:
L = log1p(R / e_c) and ∂L/∂z_c = -R / (R + e_c) keep their digits when the model is right and sure of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes, dtypes
from jaxsoftmax._core.centring import gradient_product, jacobian_product, less
from jaxsoftmax._core.mesh import sharded_like
from jaxsoftmax._core.tracing import traced_once
from jaxsoftmax.autodiff import custom_vjp
from jaxsoftmax.losses.head import checked_labels, checked_logits, option_of_examples
from jaxsoftmax.losses.hessian import Curvature, only_examples, operators_of
from jaxsoftmax.losses.likelihood import Likelihood
from jaxsoftmax.losses.smoothing import checked_options, weighed, weights_beside
from jaxsoftmax.maps.softmax import (
    AxisLike,
    AxisName,
    jacobian_at,
    log_softmax_of,
    logsumexp_of,
    mean_of,
    moments,
    probabilities,
    softmax_of,
)
from jaxsoftmax.operators.diagonal_low_rank import DiagonalPlusLowRank
from jaxsoftmax.operators.softmax_jacobian import SoftmaxJacobian


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    z_loss: ArrayLike = 0.0,
    axis_name: AxisName = None,
) -> Array:
    """Cross-entropy with class indices: L = log Σ exp(logits_k) - logits_label.

    With the options, for K classes, smoothing ε, class weights w and z-loss factor ζ:
    L = (1 - ε) w_label nll_label + (ε / K) Σ_k w_k nll_k + ζ logsumexp(logits)², with nll_k = -log p_k.

    Args:
      logits: floating-point logits; `axis` counts the classes.
      labels: integers, of the shape of `logits` without `axis`. A label outside [0, K), -1 included, makes loss and
        gradient of its own example NaN.
      axis: class axis, or a tuple of axes flattened into one, in the given order.
      where: boolean mask of the shape of `labels` (False: the example is absent), else one that broadcasts to
        `logits` (False: the class is absent). An absent example has loss 0 and gradient 0; a label on an absent class
        has loss +inf.
      label_smoothing: ε in [0, 1], spread evenly over the classes that are present; one number, or one per example.
      class_weights: weights of shape (K,), as in torch.nn.functional.cross_entropy.
      ignore_index: label of examples to leave out; loss 0, gradient 0.
      z_loss: ζ, a penalty that keeps the logits' normaliser near 0; one number, or one per example.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Loss per example, of the shape of `labels`; float32 for half-precision logits, else the logits' dtype.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> logits, label = jnp.array([20.0, 0.0]), jnp.array(0)
      >>> loss, gradient = jax.value_and_grad(jaxsoftmax.softmax_cross_entropy_with_integer_labels)(logits, label)
      >>> print(loss, gradient)
      2.0611537e-09 [-2.0611537e-09  2.0611537e-09]

    Reference: docs/mathematics.md, sections 4 and 5; `optax.softmax_cross_entropy_with_integer_labels`.
    """
    options = label_smoothing, class_weights, ignore_index, z_loss
    return integer_loss(*integer_arguments(logits, labels, axis, where, *options, axis_name))


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: AxisLike = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Array:
    """Cross-entropy with a distribution as label: L = -Σ_k labels_k log p_k, p = softmax(logits).

    With smoothing ε and class weights w, the label is w_k ((1 - ε) labels_k + ε / K), for K classes.

    Args:
      logits: floating-point logits; `axis` counts the classes.
      labels: real weights of the classes, of a shape that broadcasts to that of `logits`; they need not sum to 1. A
        label of 0 contributes 0, whatever the logit.
      axis: class axis, a tuple of axes, or None for all.
      where: boolean mask of the shape of the result (False: the example is absent, with loss 0 and gradient 0), else
        one that broadcasts to `logits` (False: the class is absent, its label too).
      label_smoothing, class_weights: as in `softmax_cross_entropy_with_integer_labels`.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Loss per example, of the shape of `logits` without `axis`; float32 for half-precision logits, else of the common
      dtype of logits and labels. Differentiable in both.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> logits, labels = jnp.array([2.0, 1.0, 0.5]), jnp.array([0.5, 0.5, 0.0])
      >>> print(jax.grad(jaxsoftmax.softmax_cross_entropy)(logits, labels).round(4))
      [ 0.1285 -0.2688  0.1402]

    Reference: docs/mathematics.md, sections 4 and 5; `optax.softmax_cross_entropy`.
    """
    return _soft_loss(
        *_soft_arguments(logits, labels, axis, where, label_smoothing, class_weights, axis_name=axis_name)
    )


def safe_softmax_cross_entropy(logits: ArrayLike, labels: ArrayLike, *, axis_name: AxisName = None) -> Array:
    """Cross-entropy that ignores logits of -inf under a label of 0, as `softmax_cross_entropy` always does.

    Args:
      logits: floating-point logits (..., K).
      labels: real weights of the classes, of a shape that broadcasts to (..., K).
      axis_name: as in `softmax_cross_entropy`.

    Returns:
      Loss per example (...).

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.safe_softmax_cross_entropy(jnp.array([0.0, -jnp.inf]), jnp.array([1.0, 0.0])))
      0.0

    Reference: `optax.safe_softmax_cross_entropy`.
    """
    return softmax_cross_entropy(logits, labels, axis_name=axis_name)


def integer_arguments(
    logits, labels, axis, where, label_smoothing, class_weights, ignore_index, z_loss, axis_name
) -> tuple:
    """The arguments, checked; options that are off are None."""
    logits, labels, mask, axes = checked_labels(logits, labels, axis, where, ignore_index, axis_name)
    penalty = None if checks.is_known_as(0, z_loss) else option_of_examples("z_loss", z_loss, logits, axes)
    return logits, labels, mask, *checked_options(label_smoothing, class_weights, logits, axes), penalty, axes


def _soft_arguments(
    logits, labels, axis: Any = -1, where=None, label_smoothing: Any = 0.0, class_weights=None, *, axis_name
) -> tuple:
    logits, mask, axes = checked_logits(logits, axis, axis_name, where)
    labels = checks.class_probabilities(labels, logits, axes.positions)
    return logits, labels, mask, *checked_options(label_smoothing, class_weights, logits, axes), axes


@functools.partial(jax.jit, static_argnames=("axes",), inline=True)
def integer_loss(logits, labels, mask, class_weights, smooth, penalty, axes) -> Array:
    """The integer-label loss per example; options that are None are off."""
    (logits, mask), axis = classes.one_axis(axes, logits, mask)
    axis = axis if penalty is None else classes.beside_others(axis)
    z = classes.present(logits, mask, axis)
    labels = jnp.expand_dims(classes.labels(labels, classes.number(z, axis)), axis.positions)
    (wide,) = dtypes.widen(z)
    if smooth is not None:
        y = weighed(wide, classes.one_hot(wide, labels, axis), class_weights, smooth, axis)
        loss = soft_label_loss(wide, y, axis)
    else:
        # With a term more, the gradients of both are added before the one rounding.
        loss, weights = label_loss(z if penalty is None else wide, labels, axis), weights_beside(z, class_weights, axis)
        loss = loss if weights is None else loss * classes.take(weights, labels, axis)
    if penalty is not None:
        # Where a weight may be 0, it has digits of its own.
        lse = _log_total(wide, labels, axis) if class_weights is None else logsumexp_of(wide, axis)
        penalty = sharded_like(loss, jnp.expand_dims(penalty.astype(loss.dtype), axis.positions))
        loss = loss + penalty * lse**2
    return classes.absent_examples(loss, mask, axis)


@functools.partial(jax.jit, static_argnames=("axes",), inline=True)
def _soft_loss(logits, labels, mask, class_weights, smooth, axes) -> Array:
    (logits, labels, mask), axis = classes.one_axis(axes, *dtypes.widen_labels(logits, labels), mask)
    z = classes.present(logits, mask, axis)
    y = weighed(z, classes.zero_absent(labels, mask), class_weights, smooth, axis)
    return classes.absent_examples(soft_label_loss(z, y, axis), mask, axis)


# Rules. z keeps its dtype, so that the residual of half-precision logits is no larger than they are; the class axis
# of labels and losses has length 1.


@traced_once
def label_sums(z: Array, label: Array, axis: classes.Axis) -> tuple[Array, Array, Array, Array]:
    """(gap, m, R, S): z_label - m of the maximum m, Σ exp(z - m) without the label's class, and with it.

    All are NaN but m for a label that is no class. Never differentiated.
    """
    z, m = lax.stop_gradient(z), classes.top(z, axis)
    gap = classes.below(classes.take(z, label, axis), m)
    e = jnp.exp(classes.shift(z, m))
    rest = classes.sum(e * classes.others(z, label, axis), axis)
    total = classes.undefined(label < 0, classes.total(e, rest + jnp.exp(gap), axis))
    return gap, m, rest + (total - total), total  # NaN where the total is


@custom_vjp(nondiff_argnums=(2,))
def label_loss(z: Array, label: Array, axis: classes.Axis) -> Array:
    """-log softmax(z)_label, with the class axis kept."""
    gap, _, rest, total = label_sums(z, label, axis)
    return jnp.where(gap > -1, jnp.log1p(rest / jnp.exp(gap)), jnp.log(total) - gap)


def _label_loss_fwd(z, label, axis):
    return label_loss(z, label, axis), (z, label, *label_sums(z, label, axis)[1:])


def _label_loss_bwd(axis, residuals, ct):
    return gradient_product(ct, label_gradient, _label_loss_along, axis, *residuals), None


def _label_loss_along(z, label, m, rest, total, t, axis):
    at_label, e = classes.index(z, axis) == label, jnp.exp(classes.shift(z, m))
    others = classes.sum(jnp.where(at_label, 0.0, e * t), axis)
    return (others - rest * classes.sum(jnp.where(at_label, t, 0.0), axis)) / total


label_loss.defvjp(_label_loss_fwd, _label_loss_bwd)


@custom_vjp(nondiff_argnums=(2,))
def _log_total(z: Array, label: Array, axis: classes.Axis) -> Array:
    """log Σ exp(z) by the sums of `label_loss`, to the digits that count beside it."""
    gap, m, rest, _ = label_sums(z, label, axis)
    return m + jnp.log1p(rest + jnp.expm1(gap))


def _log_total_fwd(z, label, axis):
    _, m, _, total = label_sums(z, label, axis)
    return _log_total(z, label, axis), (z, m, total)


def _log_total_bwd(axis, residuals, ct):
    return gradient_product(ct, probabilities, mean_of, axis, *residuals), None


_log_total.defvjp(_log_total_fwd, _log_total_bwd)


@custom_vjp(nondiff_argnums=(5,))
def label_gradient(z: Array, label: Array, m: Array, rest: Array, total: Array, axis: classes.Axis) -> Array:
    """p - e_label from the known sums; differentiable in z, which fixes them."""
    return jnp.where(classes.index(z, axis) == label, -rest, jnp.exp(classes.shift(z, m))) / total


def _label_gradient_bwd(axis, residuals, g):
    z, _, m, _, total = residuals
    return jacobian_at(g, z, m, total, axis), None, None, None, None


label_gradient.defvjp(None, _label_gradient_bwd)


@custom_vjp(nondiff_argnums=(2,))
def soft_label_loss(z: Array, y: Array, axis: classes.Axis) -> Array:
    """Σ_k y_k (-log softmax(z)_k), with the class axis kept; a class with y_k = 0 contributes 0."""
    m, s = moments(z, axis)
    # Σ where(y = 0, 0, y (log1p(s) - below)). On a CPU a choice at each class would end XLA's kernel; y is multiplied
    # by numbers below the limit, twice at -inf.
    limit = dtypes.largest(m.dtype)
    below = jnp.minimum(-classes.below(z, m), 0.9999 * limit)
    return classes.sum(y * (jnp.log1p(s) + below) * jnp.maximum(below - 0.9998 * limit, 1), axis)


def _soft_label_loss_fwd(z, y, axis):
    return soft_label_loss(z, y, axis), (z, y, *moments(z, axis))


def _soft_label_loss_bwd(axis, residuals, ct):
    ct, (z, y, m, s) = classes.shared_cotangent(ct, axis), residuals
    (m, s), z = classes.afresh(moments, (m, s), axis, z)
    (z,) = dtypes.widen(z)  # used twice: the next derivative adds up before it rounds
    surprise = -log_softmax_of(z, axis)
    return ct * soft_label_gradient(z, y, m, s, axis), ct * jnp.where((y == 0) & (z == -jnp.inf), 0.0, surprise)


soft_label_loss.defvjp(_soft_label_loss_fwd, _soft_label_loss_bwd)


@custom_vjp(nondiff_argnums=(4,))
def soft_label_gradient(z: Array, y: Array, m: Array, s: Array, axis: classes.Axis) -> Array:
    """(Σy) p - y; where p > 1/2, Σ_{others} y - (Σy)(1 - p), with 1 - p = s / (1 + s)."""
    p = probabilities(z, m, 1 + s, axis)
    mass = classes.sum(y, axis)
    return less(y, p, s / (1 + s), mass)


def _soft_label_gradient_bwd(axis, residuals, g):
    z, y, m, s = residuals
    p = probabilities(z, m, 1 + s, axis)
    return classes.sum(y, axis) * jacobian_product(g, p, axis), classes.sum(p * g, axis) - g, None, None


soft_label_gradient.defvjp(None, _soft_label_gradient_bwd)


# Hessian: (Σy + 2ζ lse) J + 2ζ ppᵀ, with the weights y that the loss gives to the classes.


@operators_of(softmax_cross_entropy_with_integer_labels, integer_arguments, "axis")
def _integer_operators(logits, labels, mask, class_weights, smooth, penalty, axis) -> Curvature:
    z = classes.present(*dtypes.widen(logits), mask, axis)
    label = classes.labels(labels, classes.number(z, axis))[..., None]
    weight = classes.sum(weighed(z, classes.one_hot(z, label, axis), class_weights, smooth, axis), axis)
    return categorical(z, only_examples(mask, weight, axis), draw_labels, _label_score, axis, penalty, mask)


@operators_of(softmax_cross_entropy, _soft_arguments, "axis")
@operators_of(safe_softmax_cross_entropy, _soft_arguments, "axis")
def _soft_operators(logits, labels, mask, class_weights, smooth, axis) -> Curvature:
    logits, y = dtypes.widen(logits, labels)
    z = classes.present(logits, mask, axis)
    weight = classes.sum(weighed(z, classes.zero_absent(y, mask), class_weights, smooth, axis), axis)
    return categorical(z, only_examples(mask, weight, axis), draw_one_hot, soft_label_score, axis)


def categorical(
    z: Array,
    weight: Array,
    draw: Callable,
    score: Callable,
    axis: classes.ClassAxis,
    penalty: Any = None,
    mask: Array | None = None,
) -> Curvature:
    """The operators of weight · (lse(z) - …) + ζ lse(z)², whose second term is no part of the likelihood."""
    p = softmax_of(z, axis)
    likelihood = SoftmaxJacobian(p, weight, axis=axis, logits=z)
    fisher = SoftmaxJacobian(p, weight, Likelihood(z, weight, draw, score), axis, z)
    if penalty is None:
        return Curvature(likelihood, likelihood, fisher)
    slope = only_examples(mask, 2 * sharded_like(weight, penalty.astype(z.dtype)[..., None]), axis)
    hessian = DiagonalPlusLowRank((weight + slope * logsumexp_of(z, axis)) * p, p, slope, axis=axis)
    return Curvature(hessian, DiagonalPlusLowRank(weight * p, p, slope, axis=axis), fisher)


def draw_labels(key: Array, z: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.categorical(key, z, shape=shape + z.shape[:-1])


def draw_one_hot(key: Array, z: Array, shape: tuple[int, ...]) -> Array:
    return jax.nn.one_hot(draw_labels(key, z, shape), z.shape[-1], dtype=z.dtype)


def _label_score(z: Array, labels: Array) -> Array:
    label = classes.labels(labels, z.shape[-1])[..., None]
    return jax.grad(lambda z: jnp.sum(label_loss(z, label, z.ndim - 1)))(z)


def soft_label_score(z: Array, y: Array) -> Array:
    return jax.grad(lambda z: jnp.sum(soft_label_loss(z, y, z.ndim - 1)))(z)
