"""The linear layer and its loss, fused: the softmax cross-entropy of xW + b without the logits in memory.

    F = Σ_i a_i l(z_i),    z = xW + b,    ∂F/∂x = G Wᵀ,    ∂F/∂W = xᵀG,    ∂F/∂b = Σ G,    ∂F/∂a = l,    G = a ∂l/∂z.

Value and gradient come from one pass over chunks of tokens (`stream`), three matrix products in all; the
cotangent of a sum or a mean only scales them. Losses per token are the row ∂F/∂a, so their derivatives are rows and
columns of the Hessian of F. Every higher derivative of F is a symmetric form: the transpose of a derivative is a
derivative again, so both modes and all orders stream.
"""

from typing import NamedTuple, get_args

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, classes
from jaxsoftmax.linear_head import rows
from jaxsoftmax.linear_head.derivatives import evaluate
from jaxsoftmax.linear_head.plan import Axes, Head, MeshAxes, Precision, Reduction, Tokens, wide_dtype

PRECISIONS = "default", "fastest", "bfloat16", "high", "tensorfloat32", "highest", "float32"


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
      label_smoothing: in [0, 1], as in the plain head.
      class_weights: (V,), as in the plain head.
      ignore_index: label of tokens to leave out; loss 0, gradient 0.
      z_loss: factor of logsumexp², as in the plain head.
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
    theta, head, tokens = _prepared(
        x, labels, weights, bias, token_weights, label_smoothing, class_weights, ignore_index, z_loss, logit_softcap,
        None, reduction, chunk_size, precision, vocab_axis, axis_name,
    )  # fmt: skip
    return evaluate(head, reduction, theta, tokens, token_axes, class_axes)[0]


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
      x: hidden states (..., D); all other arguments too are those of `linear_softmax_cross_entropy_loss`.
      labels: integer classes (...).
      weights: (D, V), or (V, D) with `vocab_axis=0`.
      bias, reduction, token_weights, label_smoothing, class_weights, ignore_index, z_loss, logit_softcap, chunk_size,
        precision, vocab_axis, axis_name, token_axes, class_axes: see there.

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
    theta, head, tokens = _prepared(
        x, labels, weights, bias, token_weights, label_smoothing, class_weights, ignore_index, z_loss, logit_softcap,
        None, reduction, chunk_size, precision, vocab_axis, axis_name,
    )  # fmt: skip
    loss, facts = evaluate(head._replace(columns=5), reduction, theta, tokens, token_axes, class_axes)
    return loss, _statistics(facts, tokens)


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
    checks.positive("temperature", temperature)
    theta, head, tokens = _prepared(
        x, labels, weights, bias, None, 0.0, None, ignore_index, 0.0, logit_softcap,
        temperature, "none", chunk_size, precision, vocab_axis, axis_name,
    )  # fmt: skip
    return _statistics(evaluate(head._replace(columns=5), "none", theta, tokens, token_axes, class_axes)[1], tokens)


# From arguments to what is differentiated, what is static, and the tokens' constants.


def _prepared(
    x, labels, weights, bias, token_weights, label_smoothing, class_weights, ignore_index, z_loss, logit_softcap,
    temperature, reduction, chunk_size, precision, vocab_axis, axis_name,
):  # fmt: skip
    theta, axis = layer(x, weights, bias, token_weights, vocab_axis)
    vocab, wide = theta["weights"].shape[axis], wide_dtype(theta)
    labels = checks.as_labels("labels", labels)
    checks.same_shape("labels", labels, "x without its feature axis", theta["x"].shape[:-1])
    options = {
        "label_smoothing": checks.number("label_smoothing", label_smoothing, 0.0, 1.0),
        "z_loss": checks.number("z_loss", z_loss),
    }
    theta |= {name: jnp.asarray(value, wide) for name, value in options.items() if not checks.is_known_as(0, value)}
    if logit_softcap is not None:
        theta["logit_softcap"] = jnp.asarray(checks.positive("logit_softcap", logit_softcap), wide)
    if temperature is not None and not checks.is_known_as(1, temperature):
        theta["temperature"] = jnp.asarray(checks.positive("temperature", temperature), wide)
    if class_weights is not None:
        theta["class_weights"] = checks.class_weights(class_weights, vocab).astype(wide)
    axes = split_by(axis_name, theta["weights"])
    known, valid = classes.labels(labels, vocab * lax.psum(1, axes.classes)), None
    if ignore_index is not None:
        valid = ~classes.labels_equal(labels, checks.integer("ignore_index", ignore_index))
        known = jnp.where(valid, known, 0)
    checked(reduction, chunk_size, precision)
    head = Head(rows.of_labels, 1, axis, chunk_size, precision, token_weights is None, axes=axes)
    return theta, head, Tokens(known, valid)


def _statistics(facts, tokens: Tokens) -> TokenStatistics:
    """What stands in the columns beside the loss, 0 for tokens that do not count."""
    numbers, prediction = facts
    log_prob, lse, entropy, log_top = (numbers[..., i] for i in range(1, 5))
    correct, probability = prediction == tokens.rows, jnp.exp(log_top)
    if tokens.valid is not None:
        correct, probability = correct & tokens.valid, jnp.where(tokens.valid, probability, 0.0)
    return TokenStatistics(lse, prediction, probability, correct, entropy, log_prob)


def layer(x, weights, bias, token_weights, vocab_axis) -> tuple[dict[str, Array], int]:
    """The checked arguments of the layer by name, and the vocabulary's axis."""
    x, weights = (_as_array(name, x) for name, x in (("x", x), ("weights", weights)))
    if x.ndim == 0:
        raise ValueError("x must have a feature axis, (..., D), got a scalar")
    if weights.ndim != 2:
        raise ValueError(f"weights must have shape (D, V), or (V, D) with vocab_axis=0, got {weights.shape}")
    if not all(isinstance(n, int) for n in weights.shape):
        sizes = f"weights must have known sizes, got {weights.shape}"
        raise TypeError(f"{sizes}: only the number of tokens may be symbolic")
    axis = checks.axis_index(vocab_axis, 2, "vocab_axis")
    if weights.shape[1 - axis] != x.shape[-1]:
        raise ValueError(
            f"x has {x.shape[-1]} features, weights of shape {weights.shape} has {weights.shape[1 - axis]} with "
            f"vocab_axis={vocab_axis}: need the same; a (V, D) array goes with vocab_axis=0"
        )
    theta = {"x": x, "weights": weights}
    if bias is not None:
        theta["bias"] = checks.as_loss_float("bias", bias)
        checks.same_shape("bias", theta["bias"], "the classes", (weights.shape[axis],))
    wide = wide_dtype(theta)
    if token_weights is None:
        token_weights = jnp.ones_like(jnp.sum(x, -1), wide)  # typed as x is on a mesh
    token_weights = checks.as_real("token_weights", token_weights, wide).astype(wide)
    theta["token_weights"] = checks.broadcast("token_weights", token_weights, x.shape[:-1])
    return theta, axis


def _as_array(name: str, x) -> Array:
    """An argument to differentiate in: floating point, with a 0 and negative numbers."""
    x = checks.as_loss_float(name, x)
    if x.dtype.name == "float8_e8m0fnu":
        raise TypeError(
            f"{name} must have a dtype that holds 0 and negative numbers, got {x.dtype}: scale and convert it"
        )
    return x


def checked(reduction: str, chunk_size: int | None, precision) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(map(repr, get_args(Reduction)))}, got {reduction!r}")
    if chunk_size is not None:
        checks.at_least("chunk_size", chunk_size, 1)
    if not (precision is None or isinstance(precision, lax.Precision) or precision in PRECISIONS):
        names = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"precision must be None, a jax.lax.Precision or one of {names}, got {precision!r}")


def split_by(axis_name: MeshAxes, weights: Array, *beside: Array) -> Axes:
    """The axes of the shard_map around that split the classes, of the weights or what is beside them."""
    names = checks.split_over(axis_name, "weights", weights, *beside)
    return Axes(classes=names, copies=bool(names))
