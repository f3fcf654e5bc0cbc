"""The engine under `network`: one affine layer, the shapes that must fit, and the pass forward and back."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax import _checks as checks

Activation = Callable[[Array], Array]
Loss = Callable[[Array, Any], Array]


class Layer(NamedTuple):
    """One affine layer: z = W a + b.

    Args:
      W: weights, (d_n, d_{n-1}).
      b: bias, (d_n,), or None for a layer without one.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax.network import Layer
      >>> Layer(jnp.ones((2, 3))).W.shape
      (2, 3)
    """

    W: Array
    b: Array | None = None


Params = Sequence[Layer]


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
    for layer, pullback in zip(params[:0:-1], pullbacks[::-1]):
        das.append(jnp.matmul(dzs[-1], layer.W))
        dzs.append(pullback(das[-1])[0])
    return Signals(inputs, dzs[::-1], das[::-1])


def affine(layer: Layer, a: Array) -> Array:
    z = jnp.matmul(a, layer.W.T)  # row by row: zᵀ = aᵀ Wᵀ
    return z if layer.b is None else z + jnp.broadcast_to(layer.b, z.shape)


def output(params: Params, a: Array, activation: Activation) -> Array:
    """z_N from a_0."""
    for layer in params[:-1]:
        a = activated(activation, affine(layer, a))
    return affine(params[-1], a)


def activated(activation: Activation, z: Array) -> Array:
    """σ(z), of the shape of z."""
    a = checks.as_float("the value of activation", activation(z))
    checks.same_shape("the value of activation", a, "its argument", z.shape)
    return a


def _loss_derivative(loss: Loss, z: Array, targets: ArrayLike) -> Array:
    """∂l/∂z_N of the mean loss."""
    losses, pullback = jax.vjp(lambda z: loss(z, targets), z)
    if losses.shape != z.shape[:-1]:
        raise ValueError(f"loss must return one value per example, shape {z.shape[:-1]}, got {losses.shape}")
    return pullback(jnp.ones_like(losses) / losses.size)[0]


def checked(params: Params, x: ArrayLike, **functions: Callable) -> Array:
    """x as an array, after a look at every shape, and at the functions by name."""
    x = checks.as_float("x", x)
    for name, function in functions.items():
        checks.function(name, function)
    if not isinstance(params, Sequence) or not params or not all(isinstance(layer, Layer) for layer in params):
        raise TypeError(f"params must be a non-empty sequence of network.Layer, got {type(params).__name__}: see init")
    checks.float_tree("params", list(params))
    if x.ndim == 0:
        raise ValueError("x must have shape (..., d_0), got a scalar")
    given, width = f"x has shape {x.shape}", x.shape[-1]
    for n, (W, b) in enumerate(params, 1):
        if jnp.ndim(W) != 2 or jnp.shape(W)[1] != width:
            raise ValueError(f"{given}, so params' W_{n} must have shape (d_{n}, {width}), got {jnp.shape(W)}")
        given, width = f"params' W_{n} has shape {jnp.shape(W)}", jnp.shape(W)[0]
        if b is not None and jnp.shape(b) != (width,):
            raise ValueError(f"{given}, so b_{n} must have shape ({width},), got {jnp.shape(b)}")
    return x


def example_signals(params: Params, x: ArrayLike, targets: ArrayLike, loss: Loss, activation: Activation) -> Signals:
    """`signals` of each example's own loss, not of the mean."""
    found = signals(params, checked(params, x, activation=activation, loss=loss), targets, loss, activation)
    count = found.z[-1][..., 0].size
    return found._replace(z=[dz * count for dz in found.z], a=[da * count for da in found.a])
