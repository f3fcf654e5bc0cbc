"""Feedforward networks, and their gradient by hand.

As in docs/mathematics.md, section 7: z_n = W_n a_{n-1} + b_n, a_n = σ(z_n), a_0 = x, and no activation after the last
layer, so that l = f(z_N) for a loss head f. Vectors are the rows of arrays: the leading axes of x, if any, are the
batch.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core.mesh import in_auto_mode, sharded_like, split_axes_of, tensordot
from jaxsoftmax.matrix_calculus.layouts import numerator_layout
from jaxsoftmax.network.layers import Activation, Layer, Loss, Params, activated, affine, checked_input

Layout = Literal["denominator", "numerator"]


def backprop(
    params: Params,
    x: ArrayLike,
    targets: ArrayLike,
    loss: Loss,
    activation: Activation = jax.lax.tanh,
    layout: Layout = "denominator",
) -> Params:
    """Gradient of the mean loss over the batch, written out layer by layer.

    From the loss head ∂l/∂z_N, then for n = N, …, 1, in numerator layout,

        ∂l/∂W_n = a_{n-1} ∂l/∂z_n,   ∂l/∂b_n = ∂l/∂z_n,   ∂l/∂z_{n-1} = ∂l/∂z_n W_n ∂a_{n-1}/∂z_{n-1}.

    Args:
      params: the layers, as from `init`.
      x: inputs, (..., d_0).
      targets: what `loss` compares the outputs with, for instance integer labels (...) or vectors (..., d_N).
      loss: (z_N, targets) -> (...): one value per example.
      activation: σ, as in `forward`.
      layout: "denominator", as everywhere in JAX: ∂l/∂W_n has the shape of W_n; "numerator", as in the texts: of W_nᵀ.

    Returns:
      The gradients, with the structure of params and, in denominator layout, its shapes; of the mean of the loss over
      all leading axes: what `jax.grad` of `mean(loss(forward(params, x, activation), targets))` gives.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import network, softmax_cross_entropy_with_integer_labels
      >>> params = network.init(jax.random.key(0), (64, 32, 10))
      >>> x, labels = jnp.ones((5, 64)), jnp.arange(5)
      >>> grads = network.backprop(params, x, labels, softmax_cross_entropy_with_integer_labels)
      >>> jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
      True

    Reference: London 2024, Matrix differential calculus (for deep learning); docs/mathematics.md, section 7.
    """
    layers = derivatives(params, x, targets, loss, activation, layout).layers
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(layers))


class Derivatives(NamedTuple):
    """Every derivative of the mean loss l; lists over the layers n = 1, …, N.

    Args:
      z: ∂l/∂z_n, (..., d_n).
      a: ∂l/∂a_n, (..., d_n), for n < N.
      layers: ∂l/∂W_n and ∂l/∂b_n, as a `Layer`.

    Example:
      >>> from jaxsoftmax.network import Derivatives
      >>> Derivatives._fields
      ('z', 'a', 'layers')
    """

    z: list[Array]
    a: list[Array]
    layers: list[Layer]


def derivatives(
    params: Params,
    x: ArrayLike,
    targets: ArrayLike,
    loss: Loss,
    activation: Activation = jax.lax.tanh,
    layout: Layout = "denominator",
) -> Derivatives:
    """Every quantity of backpropagation: ∂l/∂z_n, ∂l/∂a_n, ∂l/∂W_n and ∂l/∂b_n, for l the mean loss over the batch.

    ∂l/∂a_n = ∂l/∂z_{n+1} W_{n+1},   ∂l/∂z_n = ∂l/∂a_n ∂a_n/∂z_n,   ∂l/∂W_n = a_{n-1} ∂l/∂z_n  (numerator layout).

    Args:
      params, x, targets, loss, activation, layout: as in `backprop`. The layout concerns ∂l/∂W_n alone: one example's
        derivative by a vector is an array (d,), the row of the text.

    Returns:
      `Derivatives`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import network, sum_squared_error
      >>> params = network.init(jax.random.key(0), (4, 3, 2))
      >>> found = network.derivatives(params, jnp.ones(4), jnp.zeros(2), sum_squared_error, layout="numerator")
      >>> [row.shape for row in found.z], [row.shape for row in found.a], [layer.W.shape for layer in found.layers]
      ([(3,), (2,)], [(3,)], [(4, 3), (3, 2)])

    Reference: London 2024, Matrix differential calculus (for deep learning); docs/mathematics.md, section 7.
    """
    if layout not in ("denominator", "numerator"):
        raise ValueError(f"layout must be 'denominator' or 'numerator', got {layout!r}")
    found = signals(params, checked_input(params, x, activation=activation, loss=loss), targets, loss, activation)
    layers = list(map(_layer_derivative, params, found.inputs, found.z))
    return Derivatives(found.z, found.a, layers if layout == "denominator" else numerator_layout(layers))


def jacobians(params: Params, x: ArrayLike, activation: Activation = jax.lax.tanh) -> tuple[list[Array], list[Array]]:
    """Dense Jacobians of the layers, and of the output in each layer, by the chain rule J_h = J_g J_f.

    ∂z_N/∂z_N = I,    ∂z_N/∂z_n = ∂z_N/∂z_{n+1} W_{n+1} ∂a_n/∂z_n.

    Args:
      params: the layers, as from `init`.
      x: inputs, (..., d_0).
      activation: σ, as in `forward`.

    Returns:
      ([∂a_n/∂z_n for n < N], [∂z_N/∂z_n for n ≤ N]): arrays (..., d_n, d_n) and (..., d_N, d_n), numerator layout, as
      from `jax.jacobian`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import network, softmax
      >>> params = network.init(jax.random.key(0), (4, 3, 2))
      >>> layers, outputs = network.jacobians(params, jnp.ones((5, 4)), softmax)
      >>> [J.shape for J in layers], [J.shape for J in outputs]
      ([(5, 3, 3)], [(5, 2, 3), (5, 2, 2)])

    Reference: docs/mathematics.md, sections 1 and 7.
    """
    x = checked_input(params, x, activation=activation)
    return in_auto_mode(functools.partial(_jacobians, activation), (params, x), split_axes_of(x)[:-1])


def _jacobians(activation: Activation, arguments: tuple[Params, Array]) -> tuple[list[Array], list[Array]]:
    (params, a), layers = arguments, []
    for layer in params[:-1]:
        z = affine(layer, a)
        jacobian = jax.jacobian(activation)
        for _ in range(z.ndim - 1):
            jacobian = jax.vmap(jacobian)
        a = activated(activation, z)
        layers.append(jacobian(z))
    last = params[-1].W
    outputs = [jnp.broadcast_to(jnp.eye(len(last), dtype=a.dtype), (*a.shape[:-1], len(last), len(last)))]
    for layer, J in zip(params[:0:-1], layers[::-1]):
        outputs.append(jnp.matmul(jnp.matmul(outputs[-1], layer.W), J))
    return layers, outputs[::-1]


def _layer_derivative(layer: Layer, a: Array, dz: Array) -> Layer:
    """∂l/∂W = Σ dz aᵀ, shaped like W, and ∂l/∂b = Σ dz, over the examples."""
    examples = tuple(range(a.ndim - 1))
    W = tensordot(dz, a, (examples, examples), like=layer.W).astype(layer.W.dtype)
    return Layer(W, None if layer.b is None else sharded_like(layer.b, jnp.sum(dz, examples)).astype(layer.b.dtype))


class Signals(NamedTuple):
    """What one pass forward and back leaves at every layer n = 1, …, N, for l the mean loss."""

    inputs: list[Array]  # a_{n-1}, (..., d_{n-1})
    z: list[Array]  # ∂l/∂z_n, (..., d_n)
    a: list[Array]  # ∂l/∂a_n, (..., d_n), for n < N


def signals(params: Params, x: Array, targets: ArrayLike, loss: Loss, activation: Activation) -> Signals:
    inputs, pullbacks = [x], []  # a_{n-1}, and the transpose of ∂a_n/∂z_n
    for layer in params[:-1]:
        a, pullback = jax.vjp(lambda z: activated(activation, z), affine(layer, inputs[-1]))
        inputs.append(a)
        pullbacks.append(pullback)
    dzs, das = [_loss_derivative(loss, affine(params[-1], inputs[-1]), targets)], []
    for layer, a, pullback in zip(params[:0:-1], inputs[:0:-1], pullbacks[::-1]):
        das.append(tensordot(dzs[-1], layer.W, (-1, 0), like=a))
        dzs.append(pullback(das[-1])[0])
    return Signals(inputs, dzs[::-1], das[::-1])


def _loss_derivative(loss: Loss, z: Array, targets: ArrayLike) -> Array:
    """∂l/∂z_N of the mean loss."""
    losses, pullback = jax.vjp(lambda z: loss(z, targets), z)
    if losses.shape != z.shape[:-1]:
        raise ValueError(f"loss must return one value per example, shape {z.shape[:-1]}, got {losses.shape}")
    return pullback(jnp.ones_like(losses) / losses.size)[0]


def example_signals(params: Params, x: ArrayLike, targets: ArrayLike, loss: Loss, activation: Activation) -> Signals:
    """`signals` of each example's own loss, not of the mean."""
    found = signals(params, checked_input(params, x, activation=activation, loss=loss), targets, loss, activation)
    count = math.prod(found.z[-1].shape[:-1])
    return found._replace(z=[dz * count for dz in found.z], a=[da * count for da in found.a])
