"""What one pass over the logits tells about each token, beside its loss."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxsoftmax._core import class_axis as num
from jaxsoftmax._core import dtypes
from jaxsoftmax.linear_head.types import Head
from jaxsoftmax.losses import softcap


class TokenStatistics(NamedTuple):
    """What one pass over the logits tells about each token, beside its loss; 0 for tokens that do not count.

    Attributes:
      logsumexp: log Σ exp(z), float.
      prediction: the most probable token, int32.
      probability: its probability, float.
      correct: whether it is the label, boolean.
      entropy: -Σ p log p in nats, float.

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


def capped(z: Array, options) -> Array:
    return softcap.capped(z, options["logit_softcap"]) if "logit_softcap" in options else z


def token_statistics(head: Head, z: Array, constants, options) -> TokenStatistics:
    axis, u = head.class_axis, capped(z, options)
    m = num.class_max(u, axis)
    prediction = num.class_argmax(u, m, axis)
    below = num.shift(u, m)
    others = jnp.exp(below) * num.other_classes(u, prediction, axis)  # the entropy of a sure model is theirs
    rest = num.class_sum(others, axis)
    total = rest + jnp.exp(num.shift(m, m))
    entropy = jnp.log1p(rest) - num.class_sum(others * jnp.maximum(below, -dtypes.largest(u.dtype)), axis) / total
    correct = prediction[:, 0] == constants[0]
    return TokenStatistics((m + jnp.log(total))[:, 0], prediction[:, 0], (1 / total)[:, 0], correct, entropy[:, 0])
