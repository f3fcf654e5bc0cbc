"""Gradients of each example's own loss, and their norms, from one pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core.mesh import in_auto_mode, split_axes_of
from jaxsoftmax.network.backpropagation import example_signals
from jaxsoftmax.network.layers import Activation, Layer, Loss, Params


def per_example_gradients(
    params: Params, x: ArrayLike, targets: ArrayLike, loss: Loss, activation: Activation = jax.lax.tanh
) -> Params:
    """Gradient of each example's own loss, from one pass: ∂l_i/∂W_n = ∂l_i/∂z_n ⊗ a_{n-1}.

    Args:
      params, x, targets, loss, activation: as in `backprop`.

    Returns:
      The gradients, with the structure of params; each array has the batch axes of x in front. Their mean over the
      batch is what `backprop` returns.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import network, sum_squared_error
      >>> params = network.init(jax.random.key(0), (4, 3, 2))
      >>> grads = network.per_example_gradients(params, jnp.ones((5, 4)), jnp.zeros((5, 2)), sum_squared_error)
      >>> [layer.W.shape for layer in grads]
      [(5, 3, 4), (5, 2, 3)]

    Reference: Goodfellow, Efficient per-example gradient computations, arXiv:1510.01799.
    """
    found = example_signals(params, x, targets, loss, activation)
    layers = [
        Layer(_outer(dz, a).astype(layer.W.dtype), layer.b if layer.b is None else dz)
        for layer, a, dz in zip(params, found.inputs, found.z)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(layers))


def _outer(dz: Array, a: Array) -> Array:
    work = lambda both: both[0][..., :, None] * both[1][..., None, :]
    return in_auto_mode(work, (dz, a), split_axes_of(dz))


def per_example_gradient_norms(
    params: Params, x: ArrayLike, targets: ArrayLike, loss: Loss, activation: Activation = jax.lax.tanh
) -> Array:
    """Norm of the gradient of each example's own loss, without the gradients: ‖∂l_i/∂W_n‖ = ‖∂l_i/∂z_n‖ ‖a_{n-1}‖.

    Args:
      params, x, targets, loss, activation: as in `backprop`.

    Returns:
      The norms over all parameters, of the shape of the batch.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import network, sum_squared_error
      >>> params = network.init(jax.random.key(0), (4, 3, 2))
      >>> network.per_example_gradient_norms(params, jnp.ones((5, 4)), jnp.zeros((5, 2)), sum_squared_error).shape
      (5,)

    Reference: Goodfellow, Efficient per-example gradient computations, arXiv:1510.01799.
    """
    found = example_signals(params, x, targets, loss, activation)
    squares = [
        jnp.sum(dz * dz, -1) * (jnp.sum(a * a, -1) + (0 if layer.b is None else 1))
        for layer, a, dz in zip(params, found.inputs, found.z)
    ]
    return jnp.sqrt(functools.reduce(jnp.add, squares))
