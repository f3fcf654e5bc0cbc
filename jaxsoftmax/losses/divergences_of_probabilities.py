"""Divergences of probabilities that are given as such, or as logarithms: Σ over the classes of a term in each.

    KL(t‖q) = Σ t (log t - log q),    ∂/∂(log q) = -t,
    generalized (no sum needs to be 1): Σ t (log t - log q) - t + q,    ∂/∂(log q) = q - t.

A class with target 0 contributes t log t = 0 whatever its prediction; its slope in t is that at the smallest number.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes, dtypes
from jaxsoftmax._core.scalar_functions import exp_remainder
from jaxsoftmax.autodiff import custom_vjp
from jaxsoftmax.losses.hessian import Curvature, operators_of
from jaxsoftmax.maps.softmax import AxisLike, AxisName
from jaxsoftmax.operators.diagonal_low_rank import DiagonalPlusLowRank


def kl_divergence(
    log_predictions: ArrayLike,
    targets: ArrayLike,
    axis: AxisLike = -1,
    where: ArrayLike | None = None,
    *,
    axis_name: AxisName = None,
) -> Array:
    """Kullback-Leibler divergence of predictions from targets: Σ_k t_k (log t_k - log q_k).

    Args:
      log_predictions: log-probabilities log q, floating point; `axis` counts the classes.
      targets: probabilities t, of a shape that broadcasts to that of `log_predictions`.
      axis: class axis, a tuple of axes, or None for all.
      where: boolean mask that broadcasts to `log_predictions` (False: the class is absent), else to the result
        (False: the example is absent).
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Divergences, of the shape of `log_predictions` without `axis`; float32 for half precision, else of the common
      dtype of both.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> log_predictions, targets = jnp.log(jnp.array([0.5, 0.5, 0.0])), jnp.array([0.25, 0.75, 0.0])
      >>> print(jaxsoftmax.kl_divergence(log_predictions, targets).round(4))
      0.1308

    Reference: `optax.losses.kl_divergence`. From logits, `softmax_kl_divergence` keeps more digits.
    """
    return _sum_of_terms(_kl_term, *_arguments(log_predictions, axis, where, axis_name, targets=targets))


def kl_divergence_with_log_targets(
    log_predictions: ArrayLike,
    log_targets: ArrayLike,
    axis: AxisLike = -1,
    where: ArrayLike | None = None,
    *,
    axis_name: AxisName = None,
) -> Array:
    """Kullback-Leibler divergence with both sides as logarithms: Σ_k t_k (log t_k - log q_k).

    Args:
      log_predictions: log-probabilities log q, floating point; `axis` counts the classes.
      log_targets: log-probabilities log t, of a shape that broadcasts to that of `log_predictions`.
      axis: class axis, a tuple of axes, or None for all.
      where: boolean mask that broadcasts to `log_predictions` (False: the class is absent), else to the result
        (False: the example is absent).
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Divergences, of the shape of `log_predictions` without `axis`; float32 for half precision, else of the common
      dtype of both.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> p, t = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.25, 0.75, 0.0])
      >>> print(jaxsoftmax.kl_divergence_with_log_targets(jnp.log(p), jnp.log(t)).round(4))
      0.1308

    Reference: `optax.losses.kl_divergence_with_log_targets`.
    """
    return _sum_of_terms(_log_kl_term, *_arguments(log_predictions, axis, where, axis_name, log_targets=log_targets))


def generalized_kl_divergence(
    log_predictions: ArrayLike,
    targets: ArrayLike,
    axis: AxisLike = -1,
    where: ArrayLike | None = None,
    *,
    axis_name: AxisName = None,
) -> Array:
    """Kullback-Leibler divergence of measures: Σ_k t_k (log t_k - log q_k) - t_k + q_k, no term of it negative.

    `convex_kl_divergence` is another name of it.

    Args:
      log_predictions: logarithms log q, floating point; `axis` counts the classes.
      targets: numbers t ≥ 0, of a shape that broadcasts to that of `log_predictions`.
      axis: class axis, a tuple of axes, or None for all.
      where: boolean mask that broadcasts to `log_predictions` (False: the class is absent), else to the result
        (False: the example is absent).
      axis_name: the mesh axis that splits the classes inside `jax.shard_map`; see docs/conventions.md.

    Returns:
      Divergences, of the shape of `log_predictions` without `axis`; float32 for half precision, else of the common
      dtype of both.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> log_predictions, targets = jnp.log(jnp.array([1.0, 2.0])), jnp.array([1.0, 4.0])
      >>> print(jaxsoftmax.generalized_kl_divergence(log_predictions, targets).round(4))
      0.7726

    Reference: `optax.losses.generalized_kl_divergence`, once `convex_kl_divergence` there.
    """
    return _sum_of_terms(_generalized_kl_term, *_arguments(log_predictions, axis, where, axis_name, targets=targets))


convex_kl_divergence = generalized_kl_divergence


def _arguments(log_predictions, axis, where, axis_name, **targets) -> tuple:
    """The arguments, checked; the targets under their own name."""
    ((name, values),) = targets.items()
    log_predictions = checks.as_loss_float("log_predictions", log_predictions)
    axes = classes.axis_of(axis, log_predictions, axis_name, "log_predictions")
    values = checks.class_probabilities(values, log_predictions, axes.positions, name)
    mask = checks.as_loss_mask("where", where, log_predictions.shape, axes.positions, of_classes=True)
    return log_predictions, values, mask, axes


@functools.partial(jax.jit, static_argnames=("term", "axes"), inline=True)
def _sum_of_terms(term, log_predictions, targets, mask, axes) -> Array:
    (logq, t, mask), axis = classes.one_axis(axes, *dtypes.widen(log_predictions, targets), mask)
    terms = term(classes.zero_absent(logq, mask), classes.zero_absent(t, mask))
    return jnp.squeeze(classes.sum(classes.zero_absent(terms, mask), axis), axis.positions)


# Rules, element by element.


@custom_vjp
def _kl_term(logq: Array, t: Array) -> Array:
    """t (log t - log q)."""
    return jnp.where(t == 0, 0.0, t * _log_ratio(logq, t))


def _log_ratio(logq, t):
    """log t - log q, finite where t = 0."""
    absent = (t == 0) & (logq == -jnp.inf)
    return jnp.log(jnp.where(t == 0, jnp.finfo(t.dtype).tiny, t)) - jnp.where(absent, 0.0, logq)


def _kl_bwd(residuals, ct):
    logq, t = residuals
    return -ct * t, ct * (_log_ratio(logq, t) + 1)


_kl_term.defvjp(None, _kl_bwd)


@custom_vjp
def _log_kl_term(logq: Array, logt: Array) -> Array:
    """t (log t - log q) from log t; 0 where t = 0, and inf where q alone is 0."""
    # Arithmetic fuses into the sum over the classes, a comparison does not.
    limit, t = dtypes.largest(logt.dtype) / 4, jnp.exp(logt)
    excluded = jnp.minimum(jnp.maximum(-logq - limit, 0), jnp.sign(t) * limit)
    return t * (jnp.maximum(logt, -limit) - jnp.maximum(logq, -limit)) + 8 * excluded


def _log_kl_bwd(residuals, ct):
    logq, logt = residuals
    t = jnp.exp(logt)
    ratio = jnp.where(logt == -jnp.inf, 0.0, logt) - jnp.where(logt == -jnp.inf, 0.0, logq)
    return -ct * t, ct * t * (ratio + 1)


_log_kl_term.defvjp(None, _log_kl_bwd)


@custom_vjp
def _generalized_kl_term(logq: Array, t: Array) -> Array:
    """t (exp(d) - 1 - d) with d = log q - log t."""
    d = -_log_ratio(logq, t)
    return jnp.where((jnp.abs(d) < 1) & (t != 0), t * exp_remainder(d), jnp.exp(logq) - t * (1 + d))


def _generalized_kl_bwd(residuals, ct):
    logq, t = residuals
    return ct * _excess(logq, t), ct * _log_ratio(logq, t)


_generalized_kl_term.defvjp(None, _generalized_kl_bwd)


@custom_vjp
def _excess(logq: Array, t: Array) -> Array:
    """q - t from log q: as (q - 1) + (1 - t) for q near 1, where q itself would round more than log q did."""
    return jnp.where(jnp.abs(logq) < 0.5, jnp.expm1(logq) + (1 - t), jnp.exp(logq) - t)


_excess.defvjp(lambda logq, t: (_excess(logq, t), logq), lambda logq, ct: (ct * jnp.exp(logq), -ct))


# Hessians in the log-predictions.


@operators_of(kl_divergence, _arguments, "axis")
@operators_of(kl_divergence_with_log_targets, _arguments, "axis")
def _no_curvature(log_predictions, targets, mask, axis) -> Curvature:
    zero = DiagonalPlusLowRank(jnp.zeros_like(*dtypes.widen(log_predictions)), axis=axis)
    return Curvature(zero, zero)


@operators_of(generalized_kl_divergence, _arguments, "axis")
def _generalized_kl_operators(log_predictions, targets, mask, axis) -> Curvature:
    hessian = DiagonalPlusLowRank(classes.zero_absent(jnp.exp(*dtypes.widen(log_predictions)), mask), axis=axis)
    return Curvature(hessian, hessian)
