"""Feedforward networks, and their gradient by hand.

The seed's notation: z_n = W_n a_{n-1} + b_n, a_n = σ(z_n), a_0 = x, and no activation after the last layer, so that
l = f(z_N) for a loss head f. Vectors are the rows of arrays: the leading axes of x, if any, are the batch.
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxsoftmax import _checks as checks
from jaxsoftmax._backprop import (
    Activation,
    Layer,
    Loss,
    Params,
    activated,
    affine,
    checked,
    example_signals,
    output,
    signals,
)
from jaxsoftmax._gradient_flow import GradientFlow, gradient_flow
from jaxsoftmax.matrix_calculus import numerator_layout

__all__ = [
    "Derivatives",
    "GradientFlow",
    "Layer",
    "backprop",
    "derivatives",
    "forward",
    "gradient_flow",
    "init",
    "jacobians",
    "per_example_gradient_norms",
    "per_example_gradients",
]

Layout = Literal["denominator", "numerator"]


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

    Raises:
      TypeError: if a size is not an integer or dtype is not floating-point.
      ValueError: if there are fewer than two sizes or one is less than 1.

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


def forward(params: Params, x: ArrayLike, activation: Activation = jnp.tanh) -> Array:
    """The network's output z_N.

    z_n = W_n a_{n-1} + b_n, a_n = σ(z_n), a_0 = x.

    Args:
      params: the layers, as from `init`.
      x: inputs, (..., d_0).
      activation: σ, any differentiable function (..., d) -> (..., d) that treats leading axes as a batch; element-wise
        or not: `jnp.tanh`, `jax.nn.relu`, `jaxsoftmax.softmax`.

    Returns:
      z_N, (..., d_N).

    Raises:
      TypeError: if params is not a sequence of `Layer`s.
      ValueError: if the widths of x and of the layers do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import network
      >>> params = network.init(jax.random.key(0), (64, 32, 10))
      >>> network.forward(params, jnp.ones((5, 64)), jax.nn.relu).shape
      (5, 10)

    Reference: seed 002.
    """
    return output(params, checked(params, x, activation=activation), activation)


def backprop(
    params: Params,
    x: ArrayLike,
    targets: ArrayLike,
    loss: Loss,
    activation: Activation = jnp.tanh,
    layout: Layout = "denominator",
) -> Params:
    """Gradient of the mean loss over the batch, written out layer by layer.

    From the loss head ∂l/∂z_N, then for n = N, …, 1, in the seed's numerator layout,

        ∂l/∂W_n = a_{n-1} ∂l/∂z_n,   ∂l/∂b_n = ∂l/∂z_n,   ∂l/∂z_{n-1} = ∂l/∂z_n W_n ∂a_{n-1}/∂z_{n-1}.

    Args:
      params: the layers, as from `init`.
      x: inputs, (..., d_0).
      targets: what `loss` compares the outputs with, for instance integer labels (...) or vectors (..., d_N).
      loss: (z_N, targets) -> (...): one value per example.
      activation: σ, as in `forward`.
      layout: "denominator", as everywhere in JAX: ∂l/∂W_n has the shape of W_n; "numerator", as in the seed: of W_nᵀ.

    Returns:
      The gradients, with the structure of params and, in denominator layout, its shapes; of the mean of the loss over
      all leading axes: what `jax.grad` of `mean(loss(forward(params, x, activation), targets))` gives.

    Raises:
      TypeError: if params is not a sequence of `Layer`s.
      ValueError: if the widths of x and of the layers do not fit, the loss is not one value per example, or the layout
        is unknown.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import network, softmax_cross_entropy_with_integer_labels
      >>> params = network.init(jax.random.key(0), (64, 32, 10))
      >>> x, labels = jnp.ones((5, 64)), jnp.arange(5)
      >>> grads = network.backprop(params, x, labels, softmax_cross_entropy_with_integer_labels)
      >>> jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
      True

    Reference: seed 002; MATHEMATICS.md section 1.
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
    activation: Activation = jnp.tanh,
    layout: Layout = "denominator",
) -> Derivatives:
    """Every quantity of backpropagation: ∂l/∂z_n, ∂l/∂a_n, ∂l/∂W_n and ∂l/∂b_n, for l the mean loss over the batch.

    ∂l/∂a_n = ∂l/∂z_{n+1} W_{n+1},   ∂l/∂z_n = ∂l/∂a_n ∂a_n/∂z_n,   ∂l/∂W_n = a_{n-1} ∂l/∂z_n  (numerator layout).

    Args:
      params, x, targets, loss, activation, layout: as in `backprop`. The layout concerns ∂l/∂W_n alone: one example's
        derivative by a vector is an array (d,), the row of the text.

    Returns:
      `Derivatives`.

    Raises:
      TypeError: if params is not a sequence of `Layer`s.
      ValueError: if the widths of x and of the layers do not fit, the loss is not one value per example, or the layout
        is unknown.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import network, sum_squared_error
      >>> params = network.init(jax.random.key(0), (4, 3, 2))
      >>> found = network.derivatives(params, jnp.ones(4), jnp.zeros(2), sum_squared_error, layout="numerator")
      >>> [row.shape for row in found.z], [row.shape for row in found.a], [layer.W.shape for layer in found.layers]
      ([(3,), (2,)], [(3,)], [(4, 3), (3, 2)])

    Reference: seed 002; MATHEMATICS.md section 1.
    """
    if layout not in ("denominator", "numerator"):
        raise ValueError(f"layout must be 'denominator' or 'numerator', got {layout!r}")
    found = signals(params, checked(params, x, activation=activation, loss=loss), targets, loss, activation)
    layers = list(map(_layer_derivative, params, found.inputs, found.z))
    return Derivatives(found.z, found.a, layers if layout == "denominator" else numerator_layout(layers))


def jacobians(params: Params, x: ArrayLike, activation: Activation = jnp.tanh) -> tuple[list[Array], list[Array]]:
    """Dense Jacobians of the layers, and of the output in each layer, by the chain rule J_h = J_g J_f.

    ∂z_N/∂z_N = I,    ∂z_N/∂z_n = ∂z_N/∂z_{n+1} W_{n+1} ∂a_n/∂z_n.

    Args:
      params: the layers, as from `init`.
      x: inputs, (..., d_0).
      activation: σ, as in `forward`.

    Returns:
      ([∂a_n/∂z_n for n < N], [∂z_N/∂z_n for n ≤ N]): arrays (..., d_n, d_n) and (..., d_N, d_n), numerator layout, as
      from `jax.jacobian`.

    Raises:
      TypeError: if params is not a sequence of `Layer`s.
      ValueError: if the widths of x and of the layers do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import network, softmax
      >>> params = network.init(jax.random.key(0), (4, 3, 2))
      >>> layers, outputs = network.jacobians(params, jnp.ones((5, 4)), softmax)
      >>> [J.shape for J in layers], [J.shape for J in outputs]
      ([(5, 3, 3)], [(5, 2, 3), (5, 2, 2)])

    Reference: seeds 001 and 002.
    """
    a, layers = checked(params, x, activation=activation), []
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


def per_example_gradients(
    params: Params, x: ArrayLike, targets: ArrayLike, loss: Loss, activation: Activation = jnp.tanh
) -> Params:
    """Gradient of each example's own loss, from one pass: ∂l_i/∂W_n = ∂l_i/∂z_n ⊗ a_{n-1}.

    Args:
      params, x, targets, loss, activation: as in `backprop`.

    Returns:
      The gradients, with the structure of params; each array has the batch axes of x in front. Their mean over the
      batch is what `backprop` returns.

    Raises:
      TypeError: if params is not a sequence of `Layer`s.
      ValueError: if the widths of x and of the layers do not fit, or the loss is not one value per example.

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
        Layer((dz[..., :, None] * a[..., None, :]).astype(layer.W.dtype), layer.b if layer.b is None else dz)
        for layer, a, dz in zip(params, found.inputs, found.z)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(layers))


def per_example_gradient_norms(
    params: Params, x: ArrayLike, targets: ArrayLike, loss: Loss, activation: Activation = jnp.tanh
) -> Array:
    """Norm of the gradient of each example's own loss, without the gradients: ‖∂l_i/∂W_n‖ = ‖∂l_i/∂z_n‖ ‖a_{n-1}‖.

    Args:
      params, x, targets, loss, activation: as in `backprop`.

    Returns:
      The norms over all parameters, of the shape of the batch.

    Raises:
      TypeError: if params is not a sequence of `Layer`s.
      ValueError: if the widths of x and of the layers do not fit, or the loss is not one value per example.

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


def _layer_derivative(layer: Layer, a: Array, dz: Array) -> Layer:
    """∂l/∂W = Σ dz aᵀ, shaped like W, and ∂l/∂b = Σ dz, over the examples."""
    a, dz = a.reshape(-1, a.shape[-1]), dz.reshape(-1, dz.shape[-1])
    W = jnp.matmul(dz.T, a).astype(layer.W.dtype)
    return Layer(W, None if layer.b is None else jnp.sum(dz, 0).astype(layer.b.dtype))
