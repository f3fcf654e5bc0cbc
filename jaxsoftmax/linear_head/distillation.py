"""Distillation with two linear heads: the divergence of a student from a teacher, with neither's logits in memory.

KL(q ‖ p),    q = softmax(z̃ / T),    p = softmax(z / T),    ∂/∂z = (p - q) / T.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxsoftmax._core import checks
from jaxsoftmax._core import class_axis as num
from jaxsoftmax._core.scalar_functions import exp_remainder
from jaxsoftmax.linear_head.call import checked, evaluate, layer, split_by
from jaxsoftmax.linear_head.slabs import times
from jaxsoftmax.linear_head.types import Head, MeshAxes, Tokens, wide_dtype
from jaxsoftmax.maps.softmax import log_softmax_of, logsumexp_of

FAR = 30.0


def linear_softmax_kl_divergence(
    x: ArrayLike,
    target_x: ArrayLike,
    weights: ArrayLike,
    target_weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    target_bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: str = "sum",
    token_weights: ArrayLike | None = None,
    chunk_size: int | None = None,
    vocab_axis: int = -1,
    axis_name: MeshAxes = None,
    token_axes: MeshAxes | PartitionSpec = None,
    class_axes: MeshAxes = None,
) -> Array:
    """Distillation, KL(softmax(z̃ / T) ‖ softmax(z / T)) with teacher z̃ = x̃W̃ + b̃ and student z = xW + b, both streamed.

    Multiply by T² for gradients that do not shrink with the temperature.

    Args:
      x: hidden states of the student (..., D).
      target_x: hidden states of the teacher (..., D̃).
      weights: of the student, (D, V), or (V, D) with `vocab_axis=0`.
      target_weights: of the teacher, (D̃, V), or (V, D̃) with `vocab_axis=0`.
      bias: (V,).
      target_bias: (V,).
      temperature: T > 0, a constant.
      reduction: "none", "sum", or "mean", which divides by the sum of the token weights.
      token_weights: broadcast to (...). Tokens of weight 0 cost nothing while they are not differentiated.
      chunk_size: tokens whose logits exist at once; None chooses by `default_chunk_size`.
      vocab_axis: the axis of both weights that counts the classes.
      axis_name, token_axes, class_axes: how the call lies on a mesh, as in `linear_softmax_cross_entropy_loss`; the
        teacher's arrays are split as the student's.

    Returns:
      The reduced divergence, or the divergences (...). Differentiable in x, weights, bias and token_weights; the
      teacher is held constant.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax.linear_head import linear_softmax_kl_divergence
      >>> x, weights = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
      >>> print(linear_softmax_kl_divergence(x, 2 * x, weights, weights).round(4))
      0.1156

    Reference: Hinton et al. 2015, https://arxiv.org/abs/1503.02531; docs/mathematics.md, sections 5 and 6.
    """
    theta, axis = layer(x, weights, bias, token_weights, vocab_axis)
    shape, vocab, wide = theta["x"].shape[:-1], theta["weights"].shape[axis], wide_dtype(theta)
    checks.positive("temperature", temperature)
    target_x = checks.as_loss_float("target_x", target_x)
    target_weights = checks.as_loss_float("target_weights", target_weights)
    if target_x.shape[:-1] != shape:
        raise ValueError(f"target_x must have shape {shape} and a feature axis, as x, got {target_x.shape}")
    features = target_x.shape[-1]
    needed = (features, vocab) if axis == 1 else (vocab, features)
    checks.same_shape("target_weights", target_weights, "target_x's features and weights' classes", needed)
    shared = {"weights": target_weights, "temperature": jnp.asarray(temperature, wide)}
    if target_bias is not None:
        shared["bias"] = checks.as_loss_float("target_bias", target_bias)
        checks.same_shape("target_bias", shared["bias"], "the classes", (vocab,))
    tokens = jax.tree.map(lax.stop_gradient, Tokens(target_x, None, shared))
    checked(reduction, chunk_size)
    head = Head(_token_divergences, None, None, axis, 2, chunk_size, axes=split_by(axis_name))
    return evaluate(head, reduction, theta, tokens, token_axes, class_axes)[0]


def _token_divergences(head: Head, z: Array, constants, options) -> Array:
    """KL(q ‖ p) = log1p(E_q[expm1(d̃) - d̃]), d = (z - z̃) / T, d̃ = d - E_q d: never negative, nothing cancels."""
    (target_x, teacher), axis = constants, head.class_axis
    target = times(head, target_x.astype(z.dtype), teacher["weights"])
    if "bias" in teacher:
        target = target + teacher["bias"].astype(z.dtype)[None, :]
    logq = log_softmax_of(target / teacher["temperature"], axis)
    q = jnp.exp(logq)
    d = (z - target) / teacher["temperature"]
    centred = d - num.class_sum(q * d, axis)
    near = jnp.log1p(num.class_sum(q * exp_remainder(jnp.clip(centred, -FAR, FAR)), axis))
    far = logsumexp_of(logq + centred, axis)  # the same, without overflow
    return jnp.where(num.class_max(lax.stop_gradient(jnp.abs(centred)), axis) < FAR, near, far)[:, 0]
