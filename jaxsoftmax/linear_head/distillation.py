"""Distillation with two linear heads: the divergence of a student from a teacher, with neither's logits in memory.

KL(q ‖ p),    q = softmax(z̃ / T),    p = softmax(z / T),    ∂/∂z = (p - q) / T,

its reverse KL(p ‖ q), and what lies between them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes
from jaxsoftmax.linear_head.call import called, evaluate, options
from jaxsoftmax.linear_head.plan import Head, MeshAxes, Precision, Reduction, Tokens, operand_dtype
from jaxsoftmax.linear_head.rows import of_divergence, of_top_k
from jaxsoftmax.linear_head.stream import logits


def linear_softmax_kl_divergence(
    x: ArrayLike,
    target_x: ArrayLike,
    weights: ArrayLike,
    target_weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    target_bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    beta: float = 0.0,
    logit_softcap: ArrayLike | None = None,
    target_softcap: ArrayLike | None = None,
    reduction: Reduction = "sum",
    token_weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    precision: Precision = None,
    vocab_axis: int = -1,
    axis_name: MeshAxes = None,
    token_axes: MeshAxes | PartitionSpec = None,
    class_axes: MeshAxes = None,
) -> Array:
    """Distillation, KL(softmax(z̃ / T) ‖ softmax(z / T)) with teacher z̃ = x̃W̃ + b̃ and student z = xW + b, both streamed.

    With β = 1 it is the reverse, KL(p ‖ q), and with β between 0 and 1 the generalised Jensen-Shannon divergence
    β KL(q ‖ M) + (1 - β) KL(p ‖ M), M = β q + (1 - β) p, of the teacher q and the student p. A class that is excluded
    in the teacher (a bias of -inf) has q = 0; one that is excluded in the student alone makes KL(q ‖ p) infinite.
    Multiply by T² for gradients that do not shrink with the temperature.

    Args:
      x: hidden states of the student (..., D).
      target_x: hidden states of the teacher (..., D̃).
      weights: of the student, (D, V), or (V, D) with `vocab_axis=0`.
      target_weights: of the teacher, (D̃, V), or (V, D̃) with `vocab_axis=0`.
      bias, target_bias: (V,).
      temperature: T > 0.
      beta: β in [0, 1], a number.
      logit_softcap, target_softcap: c > 0 of the student's and the teacher's logits, c tanh(z / c); None for no cap.
      reduction, token_weights, chunk_size, vocab_axis, precision, axis_name, token_axes, class_axes: as in
        `linear_softmax_cross_entropy_loss`; the teacher's arrays lie as the student's.

    Returns:
      The reduced divergence, or the divergences (...). Differentiable in x, weights, bias, token_weights,
      temperature and logit_softcap; the teacher is held constant.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> x, weights = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
      >>> print(jaxsoftmax.linear_softmax_kl_divergence(x, 2 * x, weights, weights).round(4))
      0.1156

    Reference: Hinton et al. 2015, https://arxiv.org/abs/1503.02531; Agarwal et al. 2023,
    https://arxiv.org/abs/2306.13649; docs/mathematics.md, sections 5 and 6.
    """
    target_x = checks.as_loss_float("target_x", target_x)
    target_weights = checks.as_loss_float("target_weights", target_weights)
    call = called(
        x, weights, bias, token_weights, reduction, chunk_size, precision, vocab_axis, axis_name, token_axes,
        class_axes, target_weights,
    )  # fmt: skip
    shape, vocab = call.theta["x"].shape[:-1], call.vocab
    if target_x.shape[:-1] != shape:
        raise ValueError(f"target_x must have shape {shape} and a feature axis, as x, got {target_x.shape}")
    needed = (target_x.shape[-1], vocab)[:: 1 if call.head.vocab_axis == 1 else -1]
    checks.same_shape("target_weights", target_weights, "target_x's features and weights' classes", needed)
    shared = {"weights": target_weights, **options(call.dtype, target_softcap=target_softcap)}
    if target_bias is not None:
        shared["bias"] = checks.as_loss_float("target_bias", target_bias)
        checks.same_shape("target_bias", shared["bias"], "the classes", (vocab,))
    tokens = jax.tree.map(lax.stop_gradient, Tokens(target_x, None, shared))
    found = options(call.dtype, temperature=temperature, logit_softcap=logit_softcap)
    return evaluate(call, _rule(of_divergence, beta, _teacher_logits), tokens, found)[0]


def linear_softmax_top_k_kl_divergence(
    x: ArrayLike,
    target_indices: ArrayLike,
    target_log_probs: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    beta: float = 0.0,
    logit_softcap: ArrayLike | None = None,
    reduction: Reduction = "sum",
    token_weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    precision: Precision = None,
    vocab_axis: int = -1,
    axis_name: MeshAxes = None,
    token_axes: MeshAxes | PartitionSpec = None,
    class_axes: MeshAxes = None,
) -> Array:
    """Distillation from a teacher of which log q of k classes per token is known; all others are one class, the tail.

        Σ_j q_j log(q_j / p_j) + q_tail log(q_tail / p_tail),    q_tail = 1 - Σ_j q_j,    p_tail = 1 - Σ_j p_j:

    a lower bound of the whole divergence, by the log-sum inequality, with its minimum at the same q_j. `beta` as in
    `linear_softmax_kl_divergence`, of the k + 1 classes.

    Args:
      x: hidden states of the student (..., D).
      target_indices: integer classes (..., k), distinct for each token. One outside [0, V) makes its token NaN.
      target_log_probs: log q of them (..., k), at the same temperature; -inf for a class to leave to nobody. What sums
        to more than 1 by rounding is divided by its sum.
      weights: of the student, (D, V), or (V, D) with `vocab_axis=0`.
      bias, temperature, beta, logit_softcap, reduction, token_weights, chunk_size, precision, vocab_axis, axis_name,
        token_axes, class_axes: as in `linear_softmax_kl_divergence`.

    Returns:
      The reduced divergence, or the divergences (...). Differentiable as there; the teacher is held constant.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> x, weights = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
      >>> words, log_probs = jnp.array([[2, 0]]), jnp.log(jnp.array([[0.5, 0.2]]))
      >>> print(jaxsoftmax.linear_softmax_top_k_kl_divergence(x, words, log_probs, weights).round(4))
      0.278

    Reference: docs/mathematics.md, sections 5 and 6.
    """
    call = called(
        x, weights, bias, token_weights, reduction, chunk_size, precision, vocab_axis, axis_name, token_axes, class_axes
    )
    shape = call.theta["x"].shape[:-1]
    indices = checks.as_labels("target_indices", target_indices)
    log_probs = checks.as_loss_float("target_log_probs", target_log_probs).astype(call.dtype)
    if indices.ndim == 0 or indices.shape[:-1] != shape:
        raise ValueError(f"target_indices must have shape {shape} and an axis of classes, got {indices.shape}")
    checks.same_shape("target_log_probs", log_probs, "target_indices", indices.shape)
    known = classes.labels(indices, call.num_classes)
    log_sum = jnp.minimum(jax.nn.logsumexp(log_probs, -1, keepdims=True), 0.0)
    tail = jnp.where(log_sum > -0.5, jnp.log(-jnp.expm1(log_sum)), jnp.log1p(-jnp.exp(log_sum)))
    tokens = Tokens((known, lax.stop_gradient(jnp.concatenate([log_probs, tail], -1))))
    found = options(call.dtype, temperature=temperature, logit_softcap=logit_softcap)
    return evaluate(call, _rule(of_top_k, beta), tokens, found)[0]


def _rule(rule: Callable, beta: float, *more: Callable) -> Callable:
    return _of_beta(rule, float(checks.number("beta", beta, 0.0, 1.0)), *more)


@functools.cache
def _of_beta(rule: Callable, beta: float, *more: Callable) -> Callable:
    """One function for each β: what is compiled is found again by it."""
    return functools.partial(rule, beta, *more)


def _teacher_logits(head: Head, constants: Any) -> Array:
    target_x, teacher = constants
    dtype = operand_dtype(head.precision, {"x": target_x, "weights": teacher["weights"]})
    return logits(head, target_x.astype(dtype), teacher["weights"].astype(dtype), teacher.get("bias"))
