"""The linear layer and its loss, fused: the softmax cross-entropy of xW + b without the logits in memory.

    F = Σ_i a_i l(z_i),    z = xW + b,    ∂F/∂x = G Wᵀ,    ∂F/∂W = xᵀG,    ∂F/∂b = Σ G,    ∂F/∂a = l,    G = a ∂l/∂z.

Value and gradient come from one pass over chunks of tokens (`stream`), three matrix products in all; the
cotangent of a sum or a mean only scales them. Losses per token are the row ∂F/∂a, so their derivatives are rows and
columns of the Hessian of F. Every higher derivative of F is a symmetric form: the transpose of a derivative is a
derivative again, so both modes and all orders stream.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes
from jaxsoftmax.linear_head.call import Call, called, evaluate, options
from jaxsoftmax.linear_head.plan import MeshAxes, Precision, Reduction, Tokens
from jaxsoftmax.linear_head.rows import of_labels


class TokenStatistics(NamedTuple):
    """What one pass over the logits tells about each token; 0 for tokens that do not count.

    Attributes:
      logsumexp: log Σ exp(z), float.
      prediction: the most probable token, int32.
      probability: its probability, float.
      correct: whether it is the label, boolean.
      entropy: -Σ p log p in nats, float.
      log_prob: log p of the label, float.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> x, weights = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
      >>> _, statistics = jaxsoftmax.linear_softmax_cross_entropy_with_statistics(x, jnp.array([2]), weights)
      >>> print(statistics.prediction, statistics.correct)
      [1] [False]

    Reference: docs/mathematics.md, section 6.
    """

    logsumexp: Array
    prediction: Array
    probability: Array
    correct: Array
    entropy: Array
    log_prob: Array


def linear_softmax_cross_entropy_loss(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    reduction: Reduction = "sum",
    token_weights: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    chunk_size: int | None = None,
    precision: Precision = None,
    vocab_axis: int = -1,
    axis_name: MeshAxes = None,
    token_axes: MeshAxes | PartitionSpec = None,
    class_axes: MeshAxes = None,
) -> Array:
    """Softmax cross-entropy of the logits xW + b, which never exist as a whole: Σ_i a_i l(softcap(x_i W + b), label_i).

    l is `softmax_cross_entropy_with_integer_labels`, softcap(z) = c tanh(z / c). Value with gradient takes three
    matrix products, the value alone one. Differentiable in every floating argument, in both modes and to any order.
    On a mesh the work is divided. Where its axes are of type Explicit, types tell how; where they are of type Auto,
    `token_axes` and `class_axes` do (with neither, XLA divides tokens and classes, but gradients travel in the loss's
    dtype, that of x chunk by chunk, and ignored tokens are passed over too). Gradients come back split as their
    arguments.

    Args:
      x: hidden states (..., D).
      labels: integer classes (...). A label outside [0, V), -1 included, makes its token's loss and gradient NaN.
      weights: (D, V), or (V, D) with `vocab_axis=0` (tied embeddings).
      bias: (V,).
      reduction: "none", "sum", or "mean", which divides by the sum of what was counted: token weights times the
        labels' class weights.
      token_weights: a, broadcast to (...). Tokens of weight 0 cost nothing while a is not differentiated.
      label_smoothing: one number in [0, 1], else as in the plain head.
      class_weights: (V,), as in the plain head.
      ignore_index: label of tokens to leave out; loss 0, gradient 0.
      z_loss: factor of logsumexp², one number.
      logit_softcap: c > 0; None for no cap.
      chunk_size: tokens whose logits exist at once, on one device; half as many in derivatives of the gradient; None
        chooses by `default_chunk_size`.
      precision: of the matrix products, as in `jnp.dot`. By default their operands are x and `weights` as they are, and
        the gradient in the logits rounded once to the same dtype; sums are in the loss's dtype. With "high" or
        "highest", operands are in the loss's dtype, and so is what devices tell each other.
      vocab_axis: the axis of `weights` that counts the classes.
      axis_name: inside `jax.shard_map`, the axis of the mesh, or several, over which the classes are split in equal
        consecutive blocks; `weights`, `bias` and `class_weights` are then those of one device, labels count over all.
        Tokens may be split as well: the result is that of the device's own tokens.
      token_axes: outside it, axes of the mesh that split the first axis of x, or a `PartitionSpec` of its axes.
      class_axes: axes of the mesh that split the classes.

    Returns:
      The reduced loss, or the losses (...), in float32 for half-precision x and weights, else in their common dtype.
      Gradients have the dtypes of their arguments; they are accumulated in the loss's dtype, and rounded before
      devices add up their parts.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> x, weights, labels = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), jnp.array([1])
      >>> print(jax.grad(jaxsoftmax.linear_softmax_cross_entropy_loss)(x, labels, weights).round(4))
      [[ 0.2447 -0.3348]]

    Reference: docs/mathematics.md, section 6; Wijmans et al. 2024, https://arxiv.org/abs/2411.09009.
    """
    call = called(
        x, weights, bias, token_weights, reduction, chunk_size, precision, vocab_axis, axis_name, token_axes, class_axes
    )
    return _of_labels(
        call, 1, labels, label_smoothing=label_smoothing, class_weights=class_weights, ignore_index=ignore_index,
        z_loss=z_loss, logit_softcap=logit_softcap,
    )[0]  # fmt: skip


def linear_softmax_cross_entropy_with_statistics(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    reduction: Reduction = "sum",
    token_weights: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    chunk_size: int | None = None,
    precision: Precision = None,
    vocab_axis: int = -1,
    axis_name: MeshAxes = None,
    token_axes: MeshAxes | PartitionSpec = None,
    class_axes: MeshAxes = None,
) -> tuple[Array, TokenStatistics]:
    """The loss of `linear_softmax_cross_entropy_loss`, and statistics of the same logits at no further matrix product.

    Args:
      x, labels, weights, bias, reduction, token_weights, label_smoothing, class_weights, ignore_index, z_loss,
        logit_softcap, chunk_size, precision, vocab_axis, axis_name, token_axes, class_axes: as there.

    Returns:
      The loss and `TokenStatistics`, each field of shape (...), of the capped logits. Floats are differentiable, in
      both modes and to any order. Fields of ignored tokens are 0; tokens of weight 0 are not skipped.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> x, weights = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
      >>> loss, statistics = jaxsoftmax.linear_softmax_cross_entropy_with_statistics(x, jnp.array([1]), weights)
      >>> print(loss.round(4), statistics.probability.round(4))
      0.4076 [0.6652]

    Reference: docs/mathematics.md, section 6.
    """
    call = called(
        x, weights, bias, token_weights, reduction, chunk_size, precision, vocab_axis, axis_name, token_axes, class_axes
    )
    return _of_labels(
        call, 5, labels, label_smoothing=label_smoothing, class_weights=class_weights, ignore_index=ignore_index,
        z_loss=z_loss, logit_softcap=logit_softcap,
    )  # fmt: skip


def linear_softmax_log_probs(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    logit_softcap: ArrayLike | None = None,
    ignore_index: int | None = None,
    chunk_size: int | None = None,
    precision: Precision = None,
    vocab_axis: int = -1,
    axis_name: MeshAxes = None,
    token_axes: MeshAxes | PartitionSpec = None,
    class_axes: MeshAxes = None,
) -> TokenStatistics:
    """Per token, log p of its label, logsumexp, entropy and the top class, from hidden states: no logits in memory.

    p = softmax(softcap(xW + b) / temperature): what policy gradients and preference losses read. The value takes one
    matrix product, and reverse mode three more, since the cotangent of a token comes after its logits.

    Args:
      x: hidden states (..., D).
      labels: integer classes (...), such as the sampled tokens.
      weights: (D, V), or (V, D) with `vocab_axis=0`.
      bias: (V,).
      temperature: T > 0, of the sampler.
      logit_softcap: c > 0; None for no cap.
      ignore_index: label of tokens to leave out; all fields 0.
      chunk_size, precision, vocab_axis, axis_name, token_axes, class_axes: as in `linear_softmax_cross_entropy_loss`.

    Returns:
      `TokenStatistics`, each field of shape (...); floats are differentiable in all floating arguments, in both modes
      and to any order.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> x, weights = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
      >>> found = jaxsoftmax.linear_softmax_log_probs(x, jnp.array([1]), weights, temperature=2.0)
      >>> print(found.log_prob.round(4), found.entropy.round(4))
      [-0.6803] [1.0202]

    Reference: docs/mathematics.md, section 6.
    """
    call = called(x, weights, bias, None, "none", chunk_size, precision, vocab_axis, axis_name, token_axes, class_axes)
    return _of_labels(call, 5, labels, ignore_index=ignore_index, logit_softcap=logit_softcap, temperature=temperature)[
        1
    ]


def _of_labels(
    call: Call, columns: int, labels, *, ignore_index=None, class_weights=None, **given
) -> tuple[Array, Any]:
    """The reduced loss; with the columns of statistics these too, 0 for tokens that do not count."""
    labels = checks.as_labels("labels", labels, "; one-hot labels go as jnp.argmax(labels, -1), others to full logits")
    checks.same_shape("labels", labels, "x without its feature axis", call.theta["x"].shape[:-1])
    found = options(call.dtype, **given)
    if class_weights is not None:
        found["class_weights"] = checks.class_weights(class_weights, call.vocab).astype(call.dtype)
    known, valid = classes.labels(labels, call.num_classes), None
    if ignore_index is not None:
        valid = ~classes.labels_equal(labels, checks.integer("ignore_index", ignore_index))
        known = jnp.where(valid, known, 0)
    loss, facts = evaluate(call, of_labels, Tokens(known, valid), found, columns)
    if facts is None:
        return loss, None
    numbers, prediction = facts
    log_prob, lse, entropy, log_top = (numbers[..., i] for i in range(1, 5))
    correct, probability = prediction == known, jnp.exp(log_top)
    if valid is not None:
        correct, probability = correct & valid, jnp.where(valid, probability, 0.0)
    return loss, TokenStatistics(lse, prediction, probability, correct, entropy, log_prob)
