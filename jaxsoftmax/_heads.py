"""What stands between Jᵀ and J in a curvature product: symmetric matrices in the logits, one for each example.

Every function here maps (…, z, labels, u) to M u: z and u of shape (..., K), at least float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoftmax.losses.binary import sigmoid_binary_cross_entropy
from jaxsoftmax.losses.cross_entropy import (
    safe_softmax_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)
from jaxsoftmax.losses.elementary import sigmoid
from jaxsoftmax.losses.hessian import logits_hessian
from jaxsoftmax.losses.regression import l2_loss, squared_error, sum_squared_error
from jaxsoftmax.softmax import jacobian_product, softmax_of

Loss = Callable[[Array, Any], Array]


def hessian_product(loss: Loss, z: Array, labels: Any, u: Array) -> Array:
    """H u for the loss's Hessian H in the logits, in closed form."""
    return logits_hessian(loss, z, labels).mv(u)


def gradient_product(loss: Loss, z: Array, labels: Any, u: Array) -> Array:
    """g <g,u> for the gradient g of each loss value."""
    losses, pullback = jax.vjp(lambda z: loss(z, labels), z)
    return _rank_one_product(pullback(jnp.ones_like(losses))[0], u, losses.ndim < z.ndim)


def _rank_one_product(g: Array, u: Array, joint: bool) -> Array:
    return g * jnp.sum(g * u, -1, keepdims=True) if joint else g * g * u


class Likelihood(NamedTuple):
    """A distribution p(y|z), with g = ∂/∂z of -log p(y|z).

    Args:
      fisher: (z, u) -> E[ggᵀ] u.
      scores: (key, z, num_samples) -> g for draws of y, (num_samples, *z.shape).
      joint: whether the logits of an example belong to one y; otherwise each is an example of its own.
    """

    fisher: Callable[[Array, Array], Array]
    scores: Callable[[Array, Array, int], Array]
    joint: bool


def fisher_product(likelihood: Likelihood, z: Array, labels: Any, u: Array) -> Array:
    """E[ggᵀ] u, in closed form."""
    return likelihood.fisher(z, u)


def sampled_fisher_product(likelihood: Likelihood, num_samples: int, z: Array, keys: Array, u: Array) -> Array:
    """The mean of g <g,u> over draws, with one key for each example, so that batches do not change what is drawn."""

    def of_example(key, z, u):
        g = likelihood.scores(key, z, num_samples)
        return jnp.mean(_rank_one_product(g, jnp.broadcast_to(u, g.shape), likelihood.joint), 0)

    return jax.vmap(of_example)(keys, z, u)


def _categorical_scores(key: Array, z: Array, num_samples: int) -> Array:
    drawn = jax.random.categorical(key, z, shape=(num_samples, *z.shape[:-1]))
    return softmax_of(z, z.ndim - 1)[None] - jax.nn.one_hot(drawn, z.shape[-1], dtype=z.dtype)


def _bernoulli_scores(key: Array, z: Array, num_samples: int) -> Array:
    p = sigmoid(z)[None]
    return p - jax.random.bernoulli(key, p, (num_samples, *z.shape)).astype(z.dtype)


def _gaussian_scores(precision: float, key: Array, z: Array, num_samples: int) -> Array:
    return math.sqrt(precision) * jax.random.normal(key, (num_samples, *z.shape), z.dtype)


def _gaussian(precision: float, joint: bool) -> Likelihood:
    """N(z, 1/precision): g = precision (z - y)."""
    return Likelihood(lambda z, u: precision * u, functools.partial(_gaussian_scores, precision), joint)


_CATEGORICAL = Likelihood(
    lambda z, u: jacobian_product(u, softmax_of(z, z.ndim - 1), z.ndim - 1), _categorical_scores, joint=True
)
_LIKELIHOODS: dict[Loss, Likelihood] = {
    softmax_cross_entropy_with_integer_labels: _CATEGORICAL,
    softmax_cross_entropy: _CATEGORICAL,
    safe_softmax_cross_entropy: _CATEGORICAL,
    sigmoid_binary_cross_entropy: Likelihood(lambda z, u: sigmoid(z) * sigmoid(-z) * u, _bernoulli_scores, joint=False),
    l2_loss: _gaussian(1.0, joint=False),
    squared_error: _gaussian(2.0, joint=False),
    sum_squared_error: _gaussian(2.0, joint=True),
}


def likelihood(loss: Loss) -> Likelihood:
    """The distribution behind a head."""
    if loss not in _LIKELIHOODS:
        known = ", ".join(head.__name__ for head in _LIKELIHOODS)
        got = getattr(loss, "__name__", loss)
        raise TypeError(f"loss must be the -log p of a distribution, one of {known}; got {got}")
    return _LIKELIHOODS[loss]
