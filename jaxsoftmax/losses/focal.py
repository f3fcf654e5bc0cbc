"""Focal and poly loss: cross-entropy with the examples that are already right turned down or up.

The focal loss is a function of the margin s = z_c - log Σ_{k≠c} exp(z_k) alone: p_c = σ(s), L = softplus(-s),

    F(s) = (1 - p_c)^γ L,    ∇s = e_c - q,    ∂²s/∂z² = qqᵀ - diag(q),    q = softmax over the classes k ≠ c,

so its Hessian F″ ∇s ∇sᵀ - F′ (diag(q) - qqᵀ) is positive semidefinite where F″ ≥ 0. In the cross-entropy L it is
f(L) = u^γ L with u = 1 - p_c, of Hessian f′J + f″ggᵀ. The poly loss adds ε Σ_k y_k (1 - p_k) to the cross-entropy.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes, dtypes
from jaxsoftmax._core.centring import centred, gradient_product, jacobian_product, product_beside
from jaxsoftmax._core.mesh import sharded_like, typed_like
from jaxsoftmax._core.scalar_functions import finite, infinite_at, sigmoid, softplus
from jaxsoftmax.autodiff import custom_vjp
from jaxsoftmax.losses.cross_entropy import label_sums, soft_label_loss
from jaxsoftmax.losses.head import checked_labels, checked_logits, option_of_examples
from jaxsoftmax.losses.hessian import Curvature, only_examples, operators_of
from jaxsoftmax.maps.softmax import AxisLike, AxisName, moments, probabilities, softmax_of
from jaxsoftmax.operators.diagonal_low_rank import DiagonalPlusLowRank
from jaxsoftmax.operators.function_of_loss import FunctionOfLoss
from jaxsoftmax.operators.log_derivatives import quotient
from jaxsoftmax.operators.softmax_jacobian import SoftmaxJacobian


def focal_loss_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    gamma: ArrayLike = 2.0,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
    axis_name: AxisName = None,
) -> Array:
    """Focal loss with class indices: (1 - p_label)^γ · (-log p_label), p = softmax(logits).

    Args:
      logits: floating-point logits; `axis` counts the classes.
      labels: integers, of the shape of `logits` without `axis`. A label outside [0, K), -1 included, makes loss and
        gradient of its own example NaN.
      gamma: exponent γ ≥ 0, whole or not, or one per example, of a shape that broadcasts to that of `labels`; 0 gives
        the cross-entropy.
      axis: class axis, or a tuple of axes flattened into one, in the given order.
      where: boolean mask of the shape of `labels` (False: the example is absent), else one that broadcasts to
        `logits` (False: the class is absent). An absent example has loss 0 and gradient 0; a label on an absent class
        has loss +inf.
      ignore_index: label of examples to leave out; loss 0, gradient 0.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Loss per example, of the shape of `labels`; float32 for half-precision logits, else the logits' dtype.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> logits = jnp.array([2.0, 1.0, 0.5])
      >>> for gamma in (0.0, 0.5, 2.0):
      ...     print(jaxsoftmax.focal_loss_with_integer_labels(logits, jnp.array(0), gamma).round(4))
      0.4644
      0.2830
      0.0641

    Reference: Lin et al. 2017, https://arxiv.org/abs/1708.02002; docs/mathematics.md, section 4.
    """
    return _focal_loss(*_focal_arguments(logits, labels, gamma, axis, where, ignore_index, axis_name))


def poly_loss_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    epsilon: ArrayLike = 2.0,
    axis: AxisLike = -1,
    where: ArrayLike | None = None,
    *,
    axis_name: AxisName = None,
) -> Array:
    """Poly-1 loss: Σ_k labels_k (-log p_k + ε (1 - p_k)), p = softmax(logits).

    Args:
      logits: floating-point logits; `axis` counts the classes.
      labels: real weights of the classes, of a shape that broadcasts to that of `logits`.
      epsilon: coefficient ε of the first power of 1 - p; 0 gives the cross-entropy. One number, or one per example.
      axis: class axis, a tuple of axes, or None for all.
      where: boolean mask of the shape of the result (False: the example is absent, with loss 0 and gradient 0), else
        one that broadcasts to `logits` (False: the class is absent, its label too).
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Loss per example, of the shape of `logits` without `axis`; float32 for half-precision logits, else of the common
      dtype of logits and labels.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.poly_loss_cross_entropy(jnp.array([4.0, 2.0, 1.0]), jnp.array([1.0, 0.0, 0.0])).round(4))
      0.4823

    Reference: Leng et al. 2022, https://arxiv.org/abs/2204.12511; `optax.poly_loss_cross_entropy`.
    """
    return _poly_loss(*_poly_arguments(logits, labels, epsilon, axis, where, axis_name))


def _focal_arguments(logits, labels, gamma, axis, where, ignore_index, axis_name) -> tuple:
    logits, labels, mask, axes = checked_labels(logits, labels, axis, where, ignore_index, axis_name)
    return logits, labels, option_of_examples("gamma", gamma, logits, axes, 0.0), mask, axes


def _poly_arguments(logits, labels, epsilon, axis, where, axis_name) -> tuple:
    logits, mask, axes = checked_logits(logits, axis, axis_name, where)
    labels = checks.class_probabilities(labels, logits, axes.positions)
    return logits, labels, option_of_examples("epsilon", epsilon, logits, axes), mask, axes


@functools.partial(jax.jit, static_argnames=("axes",), inline=True)
def _focal_loss(logits, labels, gamma, mask, axes) -> Array:
    (logits, mask), axis = classes.one_axis(classes.beside_others(axes), logits, mask)
    z = classes.present(logits, mask, axis)
    labels = jnp.expand_dims(classes.labels(labels, classes.number(z, axis)), axis.positions)
    s = margin(z, labels, axis)
    gamma = typed_like(s, jnp.expand_dims(gamma.astype(s.dtype), axis.positions))
    loss = focal(finite(s), gamma)
    return classes.absent_examples(infinite_at(s == -jnp.inf, loss), mask, axis)


@functools.partial(jax.jit, static_argnames=("axes",), inline=True)
def _poly_loss(logits, labels, epsilon, mask, axes) -> Array:
    (logits, y, mask), axis = classes.one_axis(axes, *dtypes.widen(logits, labels), mask)
    z, y = classes.present(logits, mask, axis), classes.zero_absent(y, mask)
    loss = soft_label_loss(z, y, axis)
    epsilon = sharded_like(loss, jnp.expand_dims(epsilon.astype(loss.dtype), axis.positions))
    loss = loss + epsilon * missed(z, y, axis)
    return classes.absent_examples(loss, mask, axis)


# Rules.


def focal(s: Array, gamma: Array) -> Array:
    """(1 - σ(s))^γ · (-log σ(s)); the power as exp(-γ softplus(s)), whose derivatives have no power of 0."""
    near = jnp.maximum(s, -1e4)  # below it the power is 1, and a product of its slope, 0, would overflow
    return jnp.where(s <= -1e4, -s, jnp.exp(-gamma * softplus(near)) * softplus(-near))


@custom_vjp(nondiff_argnums=(2,))
def margin(z: Array, label: Array, axis: classes.Axis) -> Array:
    """z_label - log Σ_{k≠label} exp(z_k), with the class axis kept; +inf where no other class is left."""
    gap, _, rest, _ = label_sums(z, label, axis)
    return gap - jnp.log(rest)


def _margin_fwd(z, label, axis):
    _, m, rest, _ = label_sums(z, label, axis)
    return margin(z, label, axis), (z, label, m, rest)


def _margin_bwd(axis, residuals, ct):
    return gradient_product(ct, margin_gradient, _margin_along, axis, *residuals), None


def _margin_along(z, label, m, rest, t, axis):
    at_label, e = classes.index(z, axis) == label, jnp.exp(classes.shift(z, m))
    of_label, of_others = (classes.sum(jnp.where(at_label, *pair), axis) for pair in ((t, 0.0), (0.0, e * t)))
    return (1 + 0 * rest) * of_label - of_others / _left(rest)


margin.defvjp(_margin_fwd, _margin_bwd)


def margin_gradient(z: Array, label: Array, m: Array, rest: Array, axis: classes.Axis) -> Array:
    """e_label - q from the known sums."""
    at_label = 1 + 0 * rest  # NaN for a label that is no class
    return jnp.where(classes.index(z, axis) == label, at_label, -softmax_of_others(z, label, m, rest, axis))


@custom_vjp(nondiff_argnums=(4,))
def softmax_of_others(z: Array, label: Array, m: Array, rest: Array, axis: classes.Axis) -> Array:
    """q: softmax over the classes other than the label, and 0 there; all 0 where nothing is left of them."""
    return classes.others(z, label, axis) * jnp.exp(classes.shift(z, m)) / _left(rest)


def _left(rest: Array) -> Array:
    return jnp.maximum(rest, jnp.finfo(rest.dtype).tiny)


def _of_others_fwd(z, label, m, rest, axis):
    return softmax_of_others(z, label, m, rest, axis), (z, label, m, rest)


def _of_others_bwd(axis, residuals, g):
    z, label, m, rest = residuals
    plain = lambda known, g: jacobian_product(g, softmax_of_others(known[0], known[3], known[1], known[2], axis), axis)
    return product_beside(g, plain, axis, z, m, _left(rest), label), None, None, None


softmax_of_others.defvjp(_of_others_fwd, _of_others_bwd)


@custom_vjp(nondiff_argnums=(2,))
def missed(z: Array, y: Array, axis: classes.Axis) -> Array:
    """Σ_k y_k (1 - p_k), with the class axis kept."""
    return classes.sum(y * one_minus_p(z, *moments(z, axis), axis), axis)


def _missed_fwd(z, y, axis):
    return missed(z, y, axis), (z, y, *moments(z, axis))


def _missed_bwd(axis, residuals, ct):
    ct, (z, y, m, s) = classes.shared_cotangent(ct, axis), residuals
    (m, s), z = classes.afresh(moments, (m, s), axis, z, second=True)
    return -ct * jacobian_product(y, probabilities(z, m, 1 + s, axis), axis), ct * one_minus_p(z, m, s, axis)


missed.defvjp(_missed_fwd, _missed_bwd)


@custom_vjp(nondiff_argnums=(3,))
def one_minus_p(z: Array, m: Array, s: Array, axis: classes.Axis) -> Array:
    """1 - p, where p > 1/2 as the sum of the others: s / (1 + s)."""
    p = probabilities(z, m, 1 + s, axis)
    return jnp.where(p > 0.5, s / (1 + s), 1 - p)


def _one_minus_p_fwd(z, m, s, axis):
    return one_minus_p(z, m, s, axis), probabilities(z, m, 1 + s, axis)


def _one_minus_p_bwd(axis, p, g):
    return -jacobian_product(g, p, axis), None, None


one_minus_p.defvjp(_one_minus_p_fwd, _one_minus_p_bwd)


# Hessians.


@custom_vjp
def missed_power(s: Array, exponent: Array) -> Array:
    """σ(-s)^exponent, whose derivatives have no other power: they would leave float32 before it does."""
    return sigmoid(-s) ** exponent


def _missed_power_bwd(residuals, ct):
    s, exponent = residuals
    power = ct * missed_power(s, exponent)
    return -power * exponent * sigmoid(s), -power * softplus(s)


missed_power.defvjp(None, _missed_power_bwd)


@operators_of(focal_loss_with_integer_labels, _focal_arguments, "axis")
def _focal_operators(logits, labels, gamma, mask, axis) -> Curvature:
    # f(L) = u^γ L with u = 1 - p_c.
    z = classes.present(*dtypes.widen(logits), mask, axis)
    label = classes.labels(labels, classes.number(z, axis))[..., None]
    _, m, _, total = label_sums(z, label, axis)
    p = probabilities(z, m, total, axis)
    # u ≥ tiny^0.9, so that u^(γ-1) is finite for γ ≥ 0 and the last tenth is left to its factors; s as in `finite`.
    s = jnp.clip(margin(z, label, axis), -1e9, -0.9 * jnp.log(jnp.finfo(z.dtype).tiny))
    gamma = typed_like(s, gamma.astype(s.dtype)[..., None])
    u, pc, loss = sigmoid(-s), sigmoid(s), softplus(-s)
    ratio = quotient(loss, u)
    slope = only_examples(mask, missed_power(s, gamma) * (1 + gamma * pc * ratio), axis)
    bend = gamma * missed_power(s, gamma - 1) * pc * (2 + (gamma - 1) * pc * ratio - loss)
    bend = only_examples(mask, bend, axis)
    weights = slope * p + bend * (1 - classes.others(z, label, axis))
    hessian = FunctionOfLoss(weights, p, axis=axis, first=slope, second=bend, label=label, missed=u)
    return Curvature(hessian, SoftmaxJacobian(p, slope, axis=axis, logits=z))


@operators_of(poly_loss_cross_entropy, _poly_arguments, "axis")
def _poly_operators(logits, labels, epsilon, mask, axis) -> Curvature:
    logits, y = dtypes.widen(logits, labels)
    z, y = classes.present(logits, mask, axis), classes.zero_absent(y, mask)
    p, mass = softmax_of(z, axis), classes.sum(y, axis)
    weights = p * (mass - sharded_like(mass, epsilon.astype(z.dtype)[..., None]) * centred(y, p, axis))
    outer = SoftmaxJacobian(p, only_examples(mask, mass, axis), axis=axis, logits=z)
    return Curvature(DiagonalPlusLowRank(only_examples(mask, weights, axis), p, axis=axis), outer)
