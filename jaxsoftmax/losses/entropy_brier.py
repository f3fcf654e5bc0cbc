"""Scores of one distribution, sums over its classes of a function of p: entropy, and Brier's quadratic score.

    H = -Σ p log p,       ∂H/∂z = -J log p = -J z,
    B = ½ Σ (p - y)²,     ∂B/∂z = J (p - y),

and for any f = Σ φ_k(p_k), with g = ∂f/∂z = J φ′(p), b = φ″ p² and P = I - 1pᵀ,

    ∂²f/∂z² = Pᵀ diag(b + g) P,    of which Pᵀ diag(b) P = J diag(φ″) J is the Gauss-Newton part.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes, dtypes
from jaxsoftmax._core.centring import (
    about_centred,
    below_half,
    centred_transpose,
    jacobian_product,
    less,
    own_transpose,
)
from jaxsoftmax.autodiff import custom_vjp
from jaxsoftmax.losses.head import checked_logits
from jaxsoftmax.losses.hessian import Curvature, only_examples, operators_of
from jaxsoftmax.losses.temperature import as_temperature, in_logits, tempered
from jaxsoftmax.maps.softmax import AxisLike, AxisName, moments, probabilities, softmax_of
from jaxsoftmax.operators.diagonal_low_rank import DiagonalPlusLowRank

NEVER = -1e4  # a logarithm whose exponential is 0 in every dtype


def softmax_entropy(
    logits: ArrayLike,
    axis: AxisLike = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    *,
    axis_name: AxisName = None,
) -> Array:
    """Entropy of the prediction: H = -Σ_k p_k log p_k, p = softmax(logits / T), in nats.

    Args:
      logits: floating-point logits; `axis` counts the classes.
      axis: class axis, a tuple of axes, or None for all.
      where: boolean mask of the shape of the result (False: the example is absent, with entropy 0 and gradient 0),
        else one that broadcasts to `logits` (False: the class is absent).
      temperature: T > 0; one number, or one per example.
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Entropy per example, of the shape of `logits` without `axis`; float32 for half-precision logits. Differentiable
      in logits and temperature.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.softmax_entropy(jnp.array([[0.0, 0.0], [20.0, 0.0], [jnp.inf, 0.0]])))
      [6.9314718e-01 4.32842e-08 0.0000000e+00]

    Reference: docs/mathematics.md, sections 4 and 5.
    """
    return _softmax_entropy(*_entropy_arguments(logits, axis, where, temperature, axis_name))


def brier_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: AxisLike = -1,
    where: ArrayLike | None = None,
    *,
    axis_name: AxisName = None,
) -> Array:
    """Half the squared distance of prediction and label: ½ Σ_k (p_k - labels_k)², p = softmax(logits).

    Brier's score is twice this. Bounded, so that no example, however wrong, outweighs the rest; not convex.

    Args:
      logits: floating-point logits; `axis` counts the classes.
      labels: distributions over the classes, of a shape that broadcasts to that of `logits`; one-hot for a class.
      axis: class axis, a tuple of axes, or None for all.
      where: boolean mask of the shape of the result (False: the example is absent, with loss 0 and gradient 0), else
        one that broadcasts to `logits` (False: the class is absent, its label too).
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Loss per example, of the shape of `logits` without `axis`; float32 for half-precision logits, else of the common
      dtype of logits and labels. Differentiable in both.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> logits, labels = jnp.array([2.0, 1.0, 0.5]), jnp.array([1.0, 0.0, 0.0])
      >>> loss, gradient = jax.value_and_grad(jaxsoftmax.brier_loss)(logits, labels)
      >>> print(loss.round(4), gradient.round(4))
      0.1056 [-0.1327  0.0905  0.0422]

    Reference: Brier 1950; docs/mathematics.md, section 4. `sklearn.metrics.brier_score_loss` averages Brier's own.
    """
    return _brier_loss(*_brier_arguments(logits, labels, axis, where, axis_name))


def _entropy_arguments(logits, axis, where, temperature, axis_name) -> tuple:
    logits, mask, axes = checked_logits(logits, axis, axis_name, where)
    return logits, mask, as_temperature(temperature, logits, axes), axes


def _brier_arguments(logits, labels, axis, where, axis_name) -> tuple:
    logits, mask, axes = checked_logits(logits, axis, axis_name, where)
    return logits, checks.class_probabilities(labels, logits, axes.positions), mask, axes


@functools.partial(jax.jit, static_argnames=("axes",), inline=True)
def _softmax_entropy(logits, mask, temperature, axes) -> Array:
    (z, mask), axis = classes.one_axis(axes, logits, mask)
    z = z if temperature is None else dtypes.widen(z)[0]
    (z,), axis = tempered(temperature, axis, classes.present(z, mask, axis))
    return classes.absent_examples(entropy(z, axis), mask, axis)


@functools.partial(jax.jit, static_argnames=("axes",), inline=True)
def _brier_loss(logits, labels, mask, axes) -> Array:
    (z, y, mask), axis = classes.one_axis(axes, *dtypes.widen_labels(logits, labels), mask)
    loss = brier(classes.present(z, mask, axis), classes.zero_absent(y, mask), axis)
    return classes.absent_examples(loss, mask, axis)


# Rules. z and y are floating arrays, y of at least float32.


@custom_vjp(nondiff_argnums=(1,))
def entropy(z: Array, axis: classes.Axis) -> Array:
    """-Σ p log p, with the class axis kept; no term is negative."""
    m, s = moments(z, axis)
    surprise = jnp.log1p(s) - classes.shift(z, m)
    return classes.sum(jnp.exp(-surprise) * jnp.minimum(surprise, -NEVER), axis)


def _entropy_fwd(z, axis):
    return entropy(z, axis), (z, *moments(z, axis))


def _entropy_bwd(axis, residuals, ct):
    z, m, s = residuals
    (m, s), z = classes.afresh(moments, (m, s), axis, z)
    (z,) = dtypes.widen(z)  # as in Brier's
    return (entropy_gradient(classes.shared_cotangent(ct, axis), z, m, s, axis),)


entropy.defvjp(_entropy_fwd, _entropy_bwd)


@custom_vjp(nondiff_argnums=(4,))
def entropy_gradient(ct: Array, z: Array, m: Array, s: Array, axis: classes.Axis) -> Array:
    """-ct J log p from the known sums; differentiable in ct and in z, which fixes them."""
    return -ct * jacobian_product(_log_p(z, m), probabilities(z, m, 1 + s, axis), axis)


def _entropy_gradient_bwd(axis, residuals, g):
    ct, z, m, s = residuals
    (z,) = dtypes.widen(z)  # used twice, as in Brier's
    p = probabilities(z, m, 1 + s, axis)
    gradient = entropy_gradient(jnp.ones_like(ct), z, m, s, axis)
    return classes.local_sum(g * gradient, axis), ct * _hessian_product(g, p, gradient - p, axis), None, None


entropy_gradient.defvjp(None, _entropy_gradient_bwd)


def _log_p(z: Array, m: Array) -> Array:
    """z - m, which is log p but for a constant that J takes to 0; finite."""
    return jnp.maximum(classes.shift(z, m), NEVER)


def _hessian_product(v: Array, p: Array, weights: Array, axis: classes.Axis, kept: bool = False) -> Array:
    """Pᵀ diag(weights) P v, which is its own transpose."""

    def product(residuals, v):
        p, weights = residuals
        # By another threshold than the J of the gradient, so that the two share no array.
        return centred_transpose(weights * about_centred(v, p, axis, above=0.5625), p, axis, kept=kept)

    return own_transpose(product, (p, weights), v, p)


@custom_vjp(nondiff_argnums=(2,))
def brier(z: Array, y: Array, axis: classes.Axis) -> Array:
    """½ Σ (p - y)², with the class axis kept."""
    return classes.sum(error(z, y, *moments(z, axis), axis) ** 2, axis) / 2


def _brier_fwd(z, y, axis):
    return brier(z, y, axis), (z, y, *moments(z, axis))


def _brier_bwd(axis, residuals, ct):
    ct, (z, y, m, s) = classes.shared_cotangent(ct, axis), residuals
    (m, s), z = classes.afresh(moments, (m, s), axis, z)
    (z,) = dtypes.widen(*classes.reread(axis, z))  # used twice: the next derivative adds up before it rounds
    return brier_gradient(ct, z, y, m, s, axis), -ct * error(z, y, m, s, axis)


brier.defvjp(_brier_fwd, _brier_bwd)


@custom_vjp(nondiff_argnums=(5,))
def brier_gradient(ct: Array, z: Array, y: Array, m: Array, s: Array, axis: classes.Axis) -> Array:
    """ct J (p - y) from the known sums; differentiable in ct, in y, and in z, which fixes them."""
    return ct * jacobian_product(error(z, y, m, s, axis), probabilities(z, m, 1 + s, axis, True), axis)


def _brier_gradient_bwd(axis, residuals, g):
    ct, z, y, m, s = residuals
    p = probabilities(z, m, 1 + s, axis, True)
    gradient = brier_gradient(jnp.ones_like(ct), z, y, m, s, axis)
    by_z = ct * _hessian_product(g, p, gradient + p * p, axis, kept=True)
    return classes.local_sum(g * gradient, axis), by_z, -ct * jacobian_product(g, p, axis), None, None


brier_gradient.defvjp(None, _brier_gradient_bwd)


@custom_vjp(nondiff_argnums=(4,))
def error(z: Array, y: Array, m: Array, s: Array, axis: classes.Axis) -> Array:
    """p - y; where p > 1/2, (1 - y) - (1 - p), with 1 - p = s / (1 + s)."""
    p = probabilities(z, m, 1 + s, axis, True)
    return less(y, p, s / (1 + s))


def _error_fwd(z, y, m, s, axis):
    return error(z, y, m, s, axis), probabilities(z, m, 1 + s, axis, True)


def _error_bwd(axis, p, g):
    return jacobian_product(g, p, axis), -g, None, None


error.defvjp(_error_fwd, _error_bwd)


# Hessians.


@operators_of(softmax_entropy, _entropy_arguments, "axis")
def _entropy_operators(logits, mask, temperature, axis) -> Curvature:
    (z,), _ = tempered(temperature, axis, classes.present(*dtypes.widen(logits), mask, axis))
    p = softmax_of(z, axis)
    gradient = -jacobian_product(_log_p(z, classes.top(z, axis)), p, axis)
    return in_logits(of_probabilities(p, -p, gradient, mask, axis), temperature)


@operators_of(brier_loss, _brier_arguments, "axis")
def _brier_operators(logits, labels, mask, axis) -> Curvature:
    logits, y = dtypes.widen(logits, labels)
    z, y = classes.present(logits, mask, axis), classes.zero_absent(y, mask)
    p = softmax_of(z, axis)
    off = less(y, p, classes.sum(below_half(p), axis))
    return of_probabilities(p, p * p, jacobian_product(off, p, axis), mask, axis)


def of_probabilities(p: Array, b: Array, gradient: Array, mask: Array | None, axis: classes.ClassAxis) -> Curvature:
    """The operators of Σ φ(p_k), from b = φ″ p² and the gradient in the logits."""
    parts = (only_examples(mask, weights, axis) for weights in (b + gradient, b))
    return Curvature(*(DiagonalPlusLowRank(weights, p, axis=axis) for weights in parts))
