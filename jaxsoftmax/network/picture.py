"""A picture of how gradients fare on their way down a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxsoftmax.network.flow import gradient_flow
from jaxsoftmax.network.layers import Activation, Loss, Params
from jaxsoftmax.plotting import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def visualize_gradient_flow(
    params: Params,
    x: ArrayLike,
    targets: ArrayLike,
    loss: Loss,
    activation: Activation = jax.lax.tanh,
) -> Figure:
    """Draw how gradients fare on their way down a network: norms, singular values, saturated units, layer by layer.

    Args:
      params, x, targets, loss, activation: as in `jaxsoftmax.network.gradient_flow`; x of shape (batch, d_0).

    Returns:
      A matplotlib Figure with three panels; lines are medians over the examples, bands run from the 10th to the 90th
      percentile.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import network, plotting, sum_squared_error
      >>> params = network.init(jax.random.key(0), (4, 3, 3, 2))
      >>> figure = plotting.visualize_gradient_flow(params, jnp.ones((5, 4)), jnp.zeros((5, 2)), sum_squared_error)
      >>> len(figure.axes)
      3

    Reference: Glorot and Bengio (2010).
    """
    flow = gradient_flow(params, x, targets, loss, activation)
    figure = new_figure((13.0, 4.0))
    norms, values, stuck = figure.subplots(1, 3)
    layers = np.arange(1, len(params) + 1)
    _band(norms, layers, flow.gradient_norms, "steelblue", "‖∂l/∂z_n‖")
    norms.set(title="Gradient norms", ylabel="norm", yscale="log")
    for pairs, at, color, what in (
        (flow.layer_singular_values, layers, "firebrick", "∂z_n/∂z_{n-1}"),
        (flow.output_singular_values, layers[:-1], "seagreen", "∂z_N/∂z_n"),
    ):
        _band(values, at, pairs[..., 0], color, f"{what}, largest")
        _band(values, at, pairs[..., 1], color, f"{what}, smallest", linestyle="--")
    values.set(title="Singular values", ylabel="singular value", yscale="log")
    _band(stuck, layers[:-1], flow.saturation, "darkorange", "units with slope below 0.1")
    stuck.set(title="Saturation", ylabel="fraction of units", ylim=(0, 1))
    for axes in (norms, values, stuck):
        axes.set_xlabel("layer n")
        axes.set_xticks(layers)
        if axes.lines:
            axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.08), frameon=False, ncols=2)
    return figure


def _band(axes: Any, at: np.ndarray, samples: ArrayLike, color: str, label: str, linestyle: str = "-") -> None:
    """Median over the examples, with the band that holds four in five."""
    if len(at):  # a single layer has none below another
        samples = np.asarray(samples, np.float64).reshape(len(at), -1)
        low, middle, high = np.percentile(samples, [10, 50, 90], axis=1)
        axes.plot(at, middle, "o", color=color, label=label, linestyle=linestyle)
        axes.fill_between(at, low, high, color=color, alpha=0.15)
