"""Distillation with two linear heads: the divergence of a student from a teacher, with neither's logits in memory.

KL(q ‖ p),    q = softmax(z̃ / T),    p = softmax(z / T),    ∂/∂z = (p - q) / T,

its reverse KL(p ‖ q), and what lies between them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes
from jaxsoftmax.linear_head.cross_entropy import checked, layer, split_by
from jaxsoftmax.linear_head.derivatives import evaluate
from jaxsoftmax.linear_head.plan import Head, MeshAxes, Precision, Reduction, Tokens, wide_dtype
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
    theta, axis = layer(x, weights, bias, token_weights, vocab_axis)
    shape, vocab, wide = theta["x"].shape[:-1], theta["weights"].shape[axis], wide_dtype(theta)
    _add_options(theta, temperature, logit_softcap)
    rule = _rule(of_divergence, float(checks.number("beta", beta, 0.0, 1.0)), _teacher_logits)
    target_x = checks.as_loss_float("target_x", target_x)
    target_weights = checks.as_loss_float("target_weights", target_weights)
    if target_x.shape[:-1] != shape:
        raise ValueError(f"target_x must have shape {shape} and a feature axis, as x, got {target_x.shape}")
    features = target_x.shape[-1]
    needed = (features, vocab) if axis == 1 else (vocab, features)
    checks.same_shape("target_weights", target_weights, "target_x's features and weights' classes", needed)
    shared = {"weights": target_weights}
    if target_bias is not None:
        shared["bias"] = checks.as_loss_float("target_bias", target_bias)
        checks.same_shape("target_bias", shared["bias"], "the classes", (vocab,))
    if target_softcap is not None:
        shared["target_softcap"] = jnp.asarray(checks.positive("target_softcap", target_softcap), wide)
    tokens = jax.tree.map(lax.stop_gradient, Tokens(target_x, None, shared))
    checked(reduction, chunk_size, precision)
    axes = split_by(axis_name, theta["weights"], target_weights)
    head = Head(rule, 1, axis, chunk_size, precision, token_weights is None, axes=axes)
    return evaluate(head, reduction, theta, tokens, token_axes, class_axes)[0]


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
    theta, axis = layer(x, weights, bias, token_weights, vocab_axis)
    shape, vocab, wide = theta["x"].shape[:-1], theta["weights"].shape[axis], wide_dtype(theta)
    _add_options(theta, temperature, logit_softcap)
    indices = checks.as_labels("target_indices", target_indices)
    log_probs = checks.as_loss_float("target_log_probs", target_log_probs).astype(wide)
    if indices.ndim == 0 or indices.shape[:-1] != shape:
        raise ValueError(f"target_indices must have shape {shape} and an axis of classes, got {indices.shape}")
    checks.same_shape("target_log_probs", log_probs, "target_indices", indices.shape)
    checked(reduction, chunk_size, precision)
    axes = split_by(axis_name, theta["weights"])
    known = classes.labels(indices, vocab * lax.psum(1, axes.classes))
    log_sum = jnp.minimum(jax.nn.logsumexp(log_probs, -1, keepdims=True), 0.0)
    tail = jnp.where(log_sum > -0.5, jnp.log(-jnp.expm1(log_sum)), jnp.log1p(-jnp.exp(log_sum)))
    tokens = Tokens((known, lax.stop_gradient(jnp.concatenate([log_probs, tail], -1))), None)
    rule = _rule(of_top_k, float(checks.number("beta", beta, 0.0, 1.0)))
    head = Head(rule, 1, axis, chunk_size, precision, token_weights is None, axes=axes)
    return evaluate(head, reduction, theta, tokens, token_axes, class_axes)[0]


def _add_options(theta: dict[str, Array], temperature, logit_softcap) -> None:
    wide = wide_dtype(theta)
    theta["temperature"] = jnp.asarray(checks.positive("temperature", temperature), wide)
    if logit_softcap is not None:
        theta["logit_softcap"] = jnp.asarray(checks.positive("logit_softcap", logit_softcap), wide)


@functools.cache
def _rule(rule: Callable, beta: float, *more: Callable):
    """One function for each β: what is compiled is found again by it."""
    return functools.partial(rule, beta, *more)


def _teacher_logits(head: Head, constants: Any) -> Array:
    target_x, teacher = constants
    arrays = {"x": target_x, "weights": teacher["weights"]}
    x, weights = (array.astype(head.operand_dtype(arrays)) for array in arrays.values())
    return logits(head, x, weights, teacher.get("bias"))
