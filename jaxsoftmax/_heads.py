"""What stands between Jᵀ and J in a curvature product: symmetric matrices in the logits, one for each example.

Every function here maps (…, z, labels, u) to M u: z and u of shape (..., K), at least float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoftmax.losses.hessian import logits_hessian, loss_fisher

Loss = Callable[[Array, Any], Array]


def hessian_product(loss: Loss, z: Array, labels: Any, u: Array) -> Array:
    """H u for the loss's Hessian H in the logits, in closed form."""
    return logits_hessian(loss, z, labels).mv(u)


def gradient_product(loss: Loss, z: Array, labels: Any, u: Array) -> Array:
    """g <g,u> for the gradient g of each loss value; where every logit has its own, g² u."""
    losses, pullback = jax.vjp(lambda z: loss(z, labels), z)
    (g,) = pullback(jnp.ones_like(losses))
    return g * jnp.sum(g * u, -1, keepdims=True) if losses.ndim < z.ndim else g * g * u


def fisher_product(loss: Loss, z: Array, labels: Any, u: Array) -> Array:
    """E[ggᵀ] u over targets that the model draws, in closed form."""
    return loss_fisher(loss, z, labels).mv(u)


def sampled_fisher_product(loss: Loss, num_samples: int, z: Array, data: Any, u: Array) -> Array:
    """The mean of g <g,u> over draws, with one key for each example, so that batches do not change what is drawn."""
    keys, labels = data

    def of_example(key, z, label, u):
        targets = loss_fisher(loss, z, label).sample_targets(key, (num_samples,))
        return jnp.mean(jax.vmap(lambda target: gradient_product(loss, z, target, u))(targets), 0)

    return jax.vmap(of_example)(keys, z, labels, u)
