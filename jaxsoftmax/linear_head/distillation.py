"""Distillation with two linear heads: the divergence of a student from a teacher, with neither's logits in memory.

KL(q ‖ p),    q = softmax(z̃ / T),    p = softmax(z / T),    ∂/∂z = (p - q) / T,

its reverse KL(p ‖ q), and what lies between them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxsoftmax._core import checks
from jaxsoftmax.linear_head.cross_entropy import checked, layer, split_by
from jaxsoftmax.linear_head.derivatives import evaluate
from jaxsoftmax.linear_head.plan import Head, MeshAxes, Precision, Reduction, Tokens, wide_dtype
from jaxsoftmax.linear_head.rows import of_divergence
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
      bias: (V,).
      target_bias: (V,).
      temperature: T > 0.
      beta: β in [0, 1], a number.
      logit_softcap: c > 0 of the student's logits, c tanh(z / c); None for no cap.
      target_softcap: the same of the teacher's.
      reduction: "none", "sum", or "mean", which divides by the sum of the token weights.
      token_weights: broadcast to (...). Tokens of weight 0 cost nothing while they are not differentiated.
      chunk_size: tokens whose logits exist at once; None chooses by `default_chunk_size`.
      vocab_axis: the axis of both weights that counts the classes.
      precision: of the matrix products, as in `linear_softmax_cross_entropy_loss`.
      axis_name, token_axes, class_axes: how the call lies on a mesh, as in `linear_softmax_cross_entropy_loss`; the
        teacher's arrays are split as the student's.

    Returns:
      The reduced divergence, or the divergences (...). Differentiable in x, weights, bias, token_weights,
      temperature and logit_softcap; the teacher is held constant.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes do not fit, or an option is out of its range.

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
    theta["temperature"] = jnp.asarray(checks.positive("temperature", temperature), wide)
    if logit_softcap is not None:
        theta["logit_softcap"] = jnp.asarray(checks.positive("logit_softcap", logit_softcap), wide)
    beta = float(checks.number("beta", beta, 0.0, 1.0))
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
    rule = _rule(beta)
    axes = split_by(axis_name, theta["weights"], target_weights)
    head = Head(rule, 1, axis, chunk_size, precision, token_weights is None, axes=axes)
    return evaluate(head, reduction, theta, tokens, token_axes, class_axes)[0]


@functools.cache
def _rule(beta: float):
    """One function for each β: what is compiled is found again by it."""
    return functools.partial(of_divergence, beta, _teacher_logits)


def _teacher_logits(head: Head, constants: Any) -> Array:
    target_x, teacher = constants
    arrays = {"x": target_x, "weights": teacher["weights"]}
    x, weights = (array.astype(head.operand_dtype(arrays)) for array in arrays.values())
    return logits(head, x, weights, teacher.get("bias"))
