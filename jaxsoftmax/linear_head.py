"""The linear layer and its loss, fused: the softmax cross-entropy of xW + b without the logits in memory.

    F = Σ_i a_i l(z_i),    z = xW + b,    ∂F/∂x = G Wᵀ,    ∂F/∂W = xᵀG,    ∂F/∂b = Σ G,    ∂F/∂a = l,    G = a ∂l/∂z.

Value and gradient come from one pass over chunks of tokens (`_linear_chunks`), three matrix products in all; the
cotangent of a sum or a mean only scales them. Losses per token are the row ∂F/∂a, so their derivatives are rows and
columns of the Hessian of F. Every higher derivative of F is a symmetric form: the transpose of a derivative is a
derivative again, so both modes and all orders stream.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxsoftmax import _linear_chunks as chunks
from jaxsoftmax._core import checks
from jaxsoftmax._core import class_axis as num
from jaxsoftmax._linear_chunks import Head, Tokens
from jaxsoftmax._linear_derivatives import value_and_gradient, weighted_sum
from jaxsoftmax._linear_losses import TokenStatistics, label_rule, label_rule_along, token_losses, token_statistics
from jaxsoftmax._linear_vocabulary import chunk_by_blocks

REDUCTIONS = ("none", "sum", "mean")


def linear_softmax_cross_entropy_loss(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    reduction: str = "sum",
    token_weights: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    chunk_size: int | None = None,
    vocab_axis: int = -1,
) -> Array:
    """Softmax cross-entropy of the logits xW + b, which never exist as a whole: Σ_i a_i l(softcap(x_i W + b), label_i).

    l is `softmax_cross_entropy_with_integer_labels`, softcap(z) = c tanh(z / c). Value with gradient takes three
    matrix products, the value alone one. Differentiable in every floating argument, in both modes and to any order.
    Over a mesh, call it inside `jax.shard_map` on the tokens of each device, with whole weights, and add up.

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
      chunk_size: tokens whose logits exist at once (but for the first D, see `default_chunk_size`), fewer where options
        or derivatives need more arrays of them; None chooses by `default_chunk_size`.
      vocab_axis: the axis of `weights` that counts the classes.

    Returns:
      The reduced loss, or the losses (...), in float32 for half-precision x and weights, else in their common dtype.
      Gradients have the dtypes of their arguments; they are accumulated in the loss's dtype.

    Raises:
      TypeError: if x, weights or an option is not floating point, or labels are not integers.
      ValueError: if shapes do not fit, or an option is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> x, weights, labels = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), jnp.array([1])
      >>> print(jax.grad(jaxsoftmax.linear_softmax_cross_entropy_loss)(x, labels, weights).round(4))
      [[ 0.2447 -0.3348]]

    Reference: MATHEMATICS.md section 6; Wijmans et al. 2024, https://arxiv.org/abs/2411.09009.
    """
    call = _prepare(
        x, labels, weights, bias, reduction, token_weights, label_smoothing, class_weights, ignore_index, z_loss,
        logit_softcap, chunk_size, vocab_axis, statistics=False,
    )  # fmt: skip
    return reduced(*call)[0]


def linear_softmax_cross_entropy_with_statistics(
    x: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    reduction: str = "sum",
    token_weights: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    z_loss: ArrayLike = 0.0,
    logit_softcap: ArrayLike | None = None,
    chunk_size: int | None = None,
    vocab_axis: int = -1,
) -> tuple[Array, TokenStatistics]:
    """The loss of `linear_softmax_cross_entropy_loss`, and statistics of the same logits at no further matrix product.

    Args:
      x: hidden states (..., D); all other arguments too are those of `linear_softmax_cross_entropy_loss`.
      labels: integer classes (...).
      weights: (D, V), or (V, D) with `vocab_axis=0`.
      bias, reduction, token_weights, label_smoothing, class_weights, ignore_index, z_loss, logit_softcap, chunk_size,
        vocab_axis: see there.

    Returns:
      The loss and `TokenStatistics`, each field of shape (...), of the capped logits. Not differentiable. Fields of
      ignored tokens, and under "sum" and "mean" of tokens of weight 0, are 0 where they were skipped.

    Raises:
      TypeError, ValueError: as `linear_softmax_cross_entropy_loss`.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> x, weights = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
      >>> loss, statistics = jaxsoftmax.linear_softmax_cross_entropy_with_statistics(x, jnp.array([1]), weights)
      >>> print(loss.round(4), statistics.probability.round(4))
      0.4076 [0.6652]

    Reference: MATHEMATICS.md section 6.
    """
    call = _prepare(
        x, labels, weights, bias, reduction, token_weights, label_smoothing, class_weights, ignore_index, z_loss,
        logit_softcap, chunk_size, vocab_axis, statistics=True,
    )  # fmt: skip
    return reduced(*call)


def default_chunk_size(num_tokens: int, features: int, vocab: int, itemsize: int = 4) -> int:
    """Tokens per chunk that `chunk_size=None` takes: min(budget / (itemsize (V + 3 D)), saturation, N), N tokens.

    Less for what a slab of the weight gradient takes, and so that chunks are of nearly equal size. Options and
    derivatives of the gradient need 2 to 6 arrays of the logits in place of one, and take as many times fewer tokens;
    for derivatives the budget grows to twice the weights where that is more, but at most to a quarter of all logits.

    The first D tokens are a chunk of their own where 2 D is at least a chunk and the gradient of the weights is wanted
    (without softcap, smoothing, z-loss and statistics): their logits lie in the gradient's memory, which takes their
    place slab by slab. So no token needs memory for its logits where there are no more tokens than features.

    The budget of temporary memory is 64 MiB on CPU and 2 GiB elsewhere. A chunk of C tokens takes the time of its
    6 C D V operations plus that of passing once over the (D, V) accumulator, 6 N D V / F (1 + κ F / (6 BW C)) in all,
    so beyond a saturation (512 tokens on CPU, 8192 elsewhere) a larger chunk gains nothing. Where the budget holds the
    logits of only a few tokens, the number saturates all the same and the vocabulary is streamed in blocks that fit:
    the same result in every mode and order, for a fourth matrix product.

    Args:
      num_tokens: N.
      features: D.
      vocab: V.
      itemsize: bytes of one logit.

    Returns:
      The number of tokens, at least 1.

    Example:
      >>> from jaxsoftmax import linear_head
      >>> linear_head.default_chunk_size(num_tokens=5, features=16, vocab=100)
      5

    Reference: MATHEMATICS.md section 6.
    """
    _check_sizes(num_tokens, features, vocab, itemsize)
    return chunks.default_chunk(num_tokens, features, vocab, itemsize)[0]


def predict_temp_bytes(
    num_tokens: int, features: int, vocab: int, chunk_size: int | None = None, itemsize: int = 4
) -> int:
    """Peak temporary bytes of value and gradient, beside arguments and gradients: one array of a chunk's logits.

    itemsize (C V + (S + R) (C + D) + S D + 3 C D), with slabs of S < V columns of the weights and R = V mod S, for x
    and weights of one dtype of at least 32 bits, without softcap, smoothing and z-loss; with C = D and no C V for a
    first chunk of D tokens (see `default_chunk_size`); itemsize (B (3 C + 1.5 D) + 3 C D) where the vocabulary is
    streamed in blocks of B classes. XLA before JAX 0.10 may keep a second array of a chunk's logits.

    Args:
      num_tokens: N.
      features: D.
      vocab: V.
      chunk_size: C; None for `default_chunk_size`.
      itemsize: bytes of one logit.

    Returns:
      The number of bytes, within 25 % of the compiled program's `memory_analysis()` where the logits of a chunk, or
      the slabs, are the most of it.

    Example:
      >>> from jaxsoftmax import linear_head
      >>> linear_head.predict_temp_bytes(2048, 512, 32768, chunk_size=128) >> 20
      25

    Reference: MATHEMATICS.md section 6.
    """
    _check_sizes(num_tokens, features, vocab, itemsize)
    if chunk_size is not None:
        checks.at_least("chunk_size", chunk_size, 1)
    chunk, block = (chunk_size, None) if chunk_size else chunks.default_chunk(num_tokens, features, vocab, itemsize)
    chunk, slab = min(chunk, num_tokens), chunks.slab_size(features, vocab)
    if block is not None:
        return itemsize * (block * (6 * chunk + 3 * features) // 2 + 3 * chunk * features)
    fixed, per_token = chunks.temp_of_chunk(features, vocab, slab)
    first = chunks.first_chunk(chunk, num_tokens, features)
    return itemsize * (fixed + max(first * (per_token - vocab), chunk * per_token if num_tokens > first else 0))


def _check_sizes(num_tokens, features, vocab, itemsize) -> None:
    for name, size in {"num_tokens": num_tokens, "features": features, "vocab": vocab}.items():
        checks.at_least(name, size, 0)
    checks.at_least("itemsize", itemsize, 1)


# From arguments to (head, theta, tokens, reduction, shape, counted weight per token).


def layer(x, weights, bias, token_weights, vocab_axis) -> tuple[dict[str, Array], tuple[int, ...], int]:
    """The checked arguments of the layer by name, tokens flattened; the tokens' shape; the vocabulary's axis."""
    x, weights = checks.as_loss_float("x", x), checks.as_loss_float("weights", weights)
    if x.ndim == 0:
        raise ValueError("x must have a feature axis, (..., D), got a scalar")
    if weights.ndim != 2:
        raise ValueError(f"weights must have shape (D, V), or (V, D) with vocab_axis=0, got {weights.shape}")
    axis = checks.one_axis(vocab_axis, 2, "vocab_axis")
    if weights.shape[1 - axis] != x.shape[-1]:
        raise ValueError(
            f"x has {x.shape[-1]} features, weights of shape {weights.shape} has {weights.shape[1 - axis]} with "
            f"vocab_axis={vocab_axis}: need the same; a (V, D) array goes with vocab_axis=0"
        )
    shape = x.shape[:-1]
    theta = {"x": x.reshape(-1, x.shape[-1]), "weights": weights}
    if bias is not None:
        theta["bias"] = checks.as_loss_float("bias", bias)
        checks.same_shape("bias", theta["bias"], "the classes", (weights.shape[axis],))
    wide = chunks.wide_dtype(theta)
    if token_weights is None:
        theta["token_weights"] = jnp.ones(theta["x"].shape[0], wide)
    else:
        token_weights = checks.as_real("token_weights", token_weights, wide).astype(wide)
        theta["token_weights"] = checks.broadcast("token_weights", token_weights, shape).reshape(-1)
    return theta, shape, axis


def chosen_chunks(
    chunk_size: int | None, theta: dict[str, Array], axis: int, arrays: int, whole: bool = False
) -> tuple[int, int, int | None]:
    """Tokens whose logits exist at once, in the gradient and in its derivatives, and classes if not all.

    Args:
      chunk_size: tokens, where the caller chose.
      theta: the arguments by name.
      axis: the vocabulary's.
      arrays: how many arrays of a chunk's logits the gradient takes; its derivatives take three times as many.
      whole: whether all classes of a token must be there.
    """
    if chunk_size is not None:
        chunk_size = checks.at_least("chunk_size", chunk_size, 1)
        return max(1, chunk_size // arrays), max(1, chunk_size // (3 * arrays)), None
    num_tokens, features = theta["x"].shape
    size = num_tokens, features, theta["weights"].shape[axis], chunks.wide_dtype(theta).itemsize
    chunk, block = chunks.default_chunk(*size, 1, whole)
    if block is not None:
        return chunk, chunk, block
    gradient = chunk if arrays == 1 else chunks.default_chunk(*size, arrays, True)[0]
    return gradient, chunks.default_chunk(*size, 3 * arrays, True)[0], None


def checked_reduction(reduction: str) -> str:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    return reduction


def _prepare(
    x, labels, weights, bias, reduction, token_weights, label_smoothing, class_weights, ignore_index, z_loss,
    logit_softcap, chunk_size, vocab_axis, statistics,
):  # fmt: skip
    theta, shape, axis = layer(x, weights, bias, token_weights, vocab_axis)
    vocab, wide = theta["weights"].shape[axis], chunks.wide_dtype(theta)
    labels = checks.as_labels("labels", labels)
    checks.same_shape("labels", labels, "x without its feature axis", shape)
    labels = labels.reshape(-1)
    checks.number("label_smoothing", label_smoothing, 0.0, 1.0)
    checks.number("z_loss", z_loss)
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    theta |= {name: jnp.asarray(value, wide) for name, value in options.items() if not _is_zero(value)}
    if logit_softcap is not None:
        checks.number("logit_softcap", logit_softcap, 0.0)
        if _is_zero(logit_softcap):
            raise ValueError("logit_softcap must be positive, or None for no cap, got 0")
        theta["logit_softcap"] = jnp.asarray(logit_softcap, wide)
    counted = theta["token_weights"]
    known = num.class_labels(labels, vocab)
    if class_weights is not None:
        class_weights = checks.as_loss_float("class_weights", class_weights)
        checks.same_shape("class_weights", class_weights, "the classes", (vocab,))
        theta["class_weights"] = class_weights.astype(wide)
        counted = counted * jnp.where(known < 0, jnp.nan, theta["class_weights"][jnp.maximum(known, 0)])
    valid = None
    if ignore_index is not None:
        valid = labels != jnp.asarray(checks.integer("ignore_index", ignore_index), labels.dtype)
        known, counted = jnp.where(valid, known, 0), jnp.where(valid, counted, 0.0)
    plain = theta.keys() <= {"x", "weights", "bias", "token_weights", "class_weights"}
    rules = (label_rule, label_rule_along) if plain else (None, None)
    *sizes, block = chosen_chunks(chunk_size, theta, axis, 1 if plain and not statistics else 2)
    head = Head(token_losses, *rules, axis, *sizes, token_statistics if statistics else None, token_weights is None)
    if block is not None:
        head = head._replace(block=block, by_blocks=chunk_by_blocks)
    return head, theta, Tokens(known, valid), checked_reduction(reduction), shape, counted


def _is_zero(option: Any) -> bool:
    return not isinstance(option, Tracer) and option == 0


@functools.partial(jax.jit, static_argnames=("head", "reduction", "shape"), inline=True)
def reduced(head: Head, theta, tokens: Tokens, reduction: str, shape: tuple[int, ...], counted: Array):
    """The reduced loss, and the statistics of shape `shape`."""
    if reduction == "none":
        ones = {**theta, "token_weights": jnp.ones_like(theta["token_weights"])}
        _, rows, statistics = value_and_gradient(head, ("token_weights",), ones, tokens)
        losses = rows["token_weights"] * theta["token_weights"]
        out = losses.reshape(shape) if tokens.valid is None else jnp.where(tokens.valid, losses, 0.0).reshape(shape)
    else:
        out, statistics = weighted_sum(head, theta, tokens)
        if reduction == "mean":
            total = jnp.sum(counted)
            out = jnp.where(total == 0, 0.0, out / jnp.where(total == 0, 1.0, total))
    return out, jax.tree.map(lambda s: s.reshape(shape), statistics)
