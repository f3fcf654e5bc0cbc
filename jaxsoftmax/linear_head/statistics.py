"""What one pass over the logits tells about each token, beside its loss."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxsoftmax._core import class_axis as num
from jaxsoftmax._core import dtypes
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


def token_statistics(z: Array, constants, options) -> TokenStatistics:
    u = capped(z, options)
    m = num.class_max(u, 1)
    prediction = jnp.argmax(u, 1).astype(jnp.int32)
    below = num.shift(u, m)
    others = jnp.exp(below) * num.other_classes(u, prediction[:, None], 1)  # the entropy of a sure model is theirs
    rest = num.class_sum(others, 1)
    total = rest + jnp.exp(num.shift(m, m))
    entropy = jnp.log1p(rest) - num.class_sum(others * jnp.maximum(below, -dtypes.largest(u.dtype)), 1) / total
    return TokenStatistics(
        (m + jnp.log(total))[:, 0], prediction, (1 / total)[:, 0], prediction == constants[0], entropy[:, 0]
    )
