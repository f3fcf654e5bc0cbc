"""What stands between Jᵀ and J in a curvature product: symmetric matrices in the logits, one for each example.

Every function maps (loss, z, labels, options, u) to M u: z and u of shape (..., K), at least float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoftmax._core.mesh import placement, split_axes_of
from jaxsoftmax.losses.hessian import logits_fisher


def hessian_product(loss: Callable, z: Array, labels: Any, options: dict, u: Array) -> Array:
    """H u for the loss's Hessian H in the logits: forward over reverse, in closed form where the loss has rules."""
    return jax.jvp(jax.grad(lambda z: jnp.sum(loss(z, labels, **options))), (z,), (u,))[1]


def squared_gradient_product(loss: Callable, z: Array, labels: Any, options: dict, u: Array) -> Array:
    """g <g,u> for the gradient g of each loss value; where every logit has its own, g² u."""
    losses, pullback = jax.vjp(lambda z: loss(z, labels, **options), z)
    (g,) = pullback(jnp.ones_like(losses))
    return g * jnp.sum(g * u, -1, keepdims=True) if losses.ndim < z.ndim else g * g * u


def fisher_product(loss: Callable, z: Array, labels: Any, options: dict, u: Array) -> Array:
    """E[ggᵀ] u over targets that the model draws, in closed form."""
    return logits_fisher(loss, z, labels, **options).mv(u)


def sampled_fisher_product(
    loss: Callable, z: Array, data: Any, options: dict, u: Array, *, impl: Any, num_samples: int
) -> Array:
    """The mean of c g <g,u> over draws, with one key for each example, so that batches do not change what is drawn."""
    keys, labels = data
    model: Any = logits_fisher(loss, z, labels, **options).likelihood

    def draw(logits, key):
        targets = model.draw(jax.random.wrap_key_data(key, impl=impl), logits, (num_samples,))
        return model.score(jnp.broadcast_to(logits, (num_samples, *logits.shape)), targets)

    g, u = jax.vmap(draw, out_axes=1)(model.logits, _beside(keys, z)), u[None]
    by_logit = jax.eval_shape(loss, z, labels, **options).ndim == z.ndim
    return model.weight * jnp.mean(g * (g * u if by_logit else jnp.sum(g * u, -1, keepdims=True)), 0)


def _beside(keys: Array, z: Array) -> Array:
    """The keys on the devices of z's examples, as `vmap` needs them on a mesh of Explicit axes."""
    axes, *_ = split_axes_of(z)
    return keys if axes is None else jax.sharding.reshard(keys, placement(z, axes))
