"""A feedforward network: its layers, their shapes, and the pass forward.

z_n = W_n a_{n-1} + b_n, a_n = σ(z_n), a_0 = x, and no activation after the last layer. Vectors are the rows of arrays:
the leading axes of x, if any, are the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxsoftmax._core import checks
from jaxsoftmax._core.mesh import tensordot

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


def init(key: Array, sizes: Sequence[int], *, bias: bool = True, dtype: DTypeLike = float) -> tuple[Layer, ...]:
    """Random parameters of a feedforward network.

    W_n ~ N(0, 1/d_{n-1}) independently, b_n = 0: a layer keeps the variance of what it receives.

    Args:
      key: a PRNG key.
      sizes: the widths (d_0, d_1, …, d_N), at least two, each at least 1.
      bias: whether the layers have biases.
      dtype: floating-point dtype of the parameters; `float` is JAX's default, float32 or float64.

    Returns:
      A tuple of N `Layer`s, the n-th with W of shape (d_n, d_{n-1}) and b of shape (d_n,) or None.

    Example:
      >>> import jax
      >>> from jaxsoftmax import network
      >>> params = network.init(jax.random.key(0), (64, 32, 10))
      >>> [layer.W.shape for layer in params]
      [(32, 64), (10, 32)]

    Reference: LeCun et al., Efficient BackProp (1998), section 4.6.
    """
    checks.key("key", key)
    widths = checks.sizes("sizes", sizes, 1)
    if len(widths) < 2:
        raise ValueError(f"sizes must hold at least an input and an output width, got {widths}")
    checks.float_dtype("dtype", dtype)

    def layer(key, d_in, d_out):
        W = jax.random.normal(key, (d_out, d_in), dtype) / d_in**0.5
        return Layer(W, jnp.zeros(d_out, dtype) if bias else None)

    return tuple(map(layer, jax.random.split(key, len(widths) - 1), widths[:-1], widths[1:]))


def forward(params: Params, x: ArrayLike, activation: Activation = jax.lax.tanh) -> Array:
    """The network's output z_N.

    z_n = W_n a_{n-1} + b_n, a_n = σ(z_n), a_0 = x.

    Args:
      params: the layers, as from `init`.
      x: inputs, (..., d_0).
      activation: σ, any differentiable function (..., d) -> (..., d) that treats leading axes as a batch; element-wise
        or not: `jnp.tanh`, `jax.nn.relu`, `jaxsoftmax.softmax`.

    Returns:
      z_N, (..., d_N).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import network
      >>> params = network.init(jax.random.key(0), (64, 32, 10))
      >>> network.forward(params, jnp.ones((5, 64)), jax.nn.relu).shape
      (5, 10)

    Reference: London 2024, Matrix differential calculus (for deep learning); docs/mathematics.md, section 7.
    """
    return output(params, checked_input(params, x, activation=activation), activation)


def affine(layer: Layer, a: Array) -> Array:
    z = tensordot(a, layer.W, (-1, 1))  # row by row: zᵀ = aᵀ Wᵀ
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


def checked_input(params: Params, x: ArrayLike, **functions: Callable) -> Array:
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
