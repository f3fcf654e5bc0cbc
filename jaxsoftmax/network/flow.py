"""What becomes of gradients on their way down a network: norms, singular values, saturation."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxsoftmax._core import checks
from jaxsoftmax._core.mesh import in_auto_mode, split_axes_of
from jaxsoftmax.curvature.krylov import extreme_singular_values
from jaxsoftmax.network.backpropagation import example_signals
from jaxsoftmax.network.layers import Activation, Loss, Params, affine, checked_input, output


class GradientFlow(NamedTuple):
    """How gradients fare on their way down; arrays over layers and examples.

    Args:
      gradient_norms: ‖∂l_i/∂z_n‖ for n ≤ N, (N, ...).
      layer_singular_values: largest and smallest singular value of ∂z_n/∂z_{n-1}, with z_0 = x, (N, ..., 2).
      output_singular_values: the same of the products ∂z_N/∂z_n for n < N, (N - 1, ..., 2).
      saturation: fraction of units with |∂a_n/∂z_n|, on its diagonal, below 0.1, for n < N, (N - 1, ...).

    Example:
      >>> from jaxsoftmax.network import GradientFlow
      >>> GradientFlow._fields
      ('gradient_norms', 'layer_singular_values', 'output_singular_values', 'saturation')
    """

    gradient_norms: Array
    layer_singular_values: Array
    output_singular_values: Array
    saturation: Array


def gradient_flow(
    params: Params,
    x: ArrayLike,
    targets: ArrayLike,
    loss: Loss,
    activation: Activation = jax.lax.tanh,
    *,
    num_steps: int | None = None,
) -> GradientFlow:
    """Where gradients vanish or explode: their norms, what each layer can do to them, and how many units are stuck.

    ‖∂l/∂z_n‖ lies between the smallest and the largest singular value of ∂z_N/∂z_n (if d_N ≤ d_n), times ‖∂l/∂z_N‖.

    Args:
      params, x, targets, loss, activation: as in `backprop`. Use a few hundred examples, not all of the data.
      num_steps: products with each Jacobian and its transpose; None for as many as make the singular values exact.
        With fewer, the largest is a lower and the smallest an upper bound.

    Returns:
      `GradientFlow`. No Jacobian is formed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import network, sum_squared_error
      >>> params = network.init(jax.random.key(0), (4, 3, 3, 2))
      >>> flow = network.gradient_flow(params, jnp.ones((5, 4)), jnp.zeros((5, 2)), sum_squared_error)
      >>> flow.gradient_norms.shape, flow.layer_singular_values.shape, flow.saturation.shape
      ((3, 5), (3, 5, 2), (2, 5))

    Reference: Glorot and Bengio (2010); Saxe, McClelland and Ganguli, arXiv:1312.6120.
    """
    if num_steps is not None:
        checks.at_least("num_steps", num_steps, 1)
    x = checked_input(params, x, activation=activation, loss=loss)
    return _gradient_flow(params, x, targets, loss, activation, num_steps)


@functools.partial(jax.jit, static_argnames=("loss", "activation", "num_steps"))
def _gradient_flow(params, x, targets, loss, activation, num_steps) -> GradientFlow:
    work = functools.partial(_flow, loss, activation, num_steps)
    return in_auto_mode(work, (params, x, targets), (None, *split_axes_of(x)[:-1]))


def _flow(loss, activation, num_steps, arguments) -> GradientFlow:
    params, x, targets = arguments
    found = example_signals(params, x, targets, loss, activation)
    z = [affine(layer, a) for layer, a in zip(params, found.inputs)]
    maps = [functools.partial(affine, params[0])]
    maps += [lambda z, layer=layer: affine(layer, activation(z)) for layer in params[1:]]
    ends = [lambda z, n=n: output(params[n:], activation(z), activation) for n in range(1, len(params))]
    batch = z[0].shape[:-1]

    def extremes(function, at):
        both = lambda at: jnp.stack(extreme_singular_values(function, at, jax.random.key(0), num_steps))
        return jnp.reshape(jax.vmap(both)(at.reshape(-1, at.shape[-1])), (*at.shape[:-1], 2))

    def each(measure, *lists, entries=()):
        values = [measure(*items)[None] for items in zip(*lists)]
        return jnp.concatenate([jnp.zeros((0, *batch, *entries), z[0].dtype), *values])

    return GradientFlow(
        gradient_norms=each(lambda dz: jnp.linalg.norm(dz, axis=-1), found.z),
        layer_singular_values=each(extremes, maps, [found.inputs[0], *z[:-1]], entries=(2,)),
        output_singular_values=each(extremes, ends, z[:-1], entries=(2,)),
        saturation=each(lambda z: jnp.mean(jnp.abs(_diagonal(activation, z)) < 0.1, -1, dtype=z.dtype), z[:-1]),
    )


def _diagonal(activation: Activation, z: Array) -> Array:
    """The diagonal of ∂a/∂z, one unit at a time; no activation is taken for element-wise."""

    def entry(i):
        unit = jnp.zeros_like(z).at[..., i].set(1)
        return jax.jvp(activation, (z,), (unit,))[1][..., i]

    return jnp.moveaxis(lax.map(entry, jnp.arange(z.shape[-1])), 0, -1)
