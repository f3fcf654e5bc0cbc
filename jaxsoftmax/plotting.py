"""Pictures: the Jacobian and its spectrum. Each function returns a matplotlib Figure and shows nothing itself."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from jaxsoftmax._core import checks
from jaxsoftmax.maps.entmax import entmax
from jaxsoftmax.operators.softmax_jacobian import SoftmaxJacobian
from jaxsoftmax.verify import largest_eigenvalue_bound

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxsoftmax.network.picture import visualize_gradient_flow

FEW = 60  # eigenvalues that get a bar each

__all__ = ["visualize_gradient_flow", "visualize_jacobian", "visualize_spectrum"]


def __getattr__(name: str) -> Any:
    if name != "visualize_gradient_flow":  # it needs a chapter that is imported when first asked for
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("jaxsoftmax.network.picture").visualize_gradient_flow


def visualize_jacobian(x: ArrayLike, *, alpha: float = 1.0, class_names: Sequence[str] | None = None) -> Figure:
    """Draw J = ∂p/∂x: a heat map symmetric about 0, its diagonal p(1-p), and the probabilities p.

    Args:
      x: real logits (K,).
      alpha: 1 for softmax, more for α-entmax.
      class_names: K names for the axes; the class indices if not given.

    Returns:
      A matplotlib Figure with three panels.

    Raises:
      ImportError: if matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> figure = jaxsoftmax.visualize_jacobian(jnp.array([2.0, 1.0, 0.5, -0.5, 0.0]))
      >>> [axes.get_title() for axes in figure.axes[:3]]
      ['Jacobian ∂p_i / ∂x_j', 'Diagonal', 'Probabilities']

    Reference: docs/mathematics.md, section 1.
    """
    p, operator, names = _prepare(x, alpha, class_names)
    matrix = np.asarray(operator.as_matrix(), np.float64)
    figure = new_figure((13.0, 4.0))
    heat, diagonal, bars = figure.subplots(1, 3)
    limit = float(np.abs(matrix).max()) or 1.0
    image = heat.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit)
    figure.colorbar(image, ax=heat)
    heat.set(title="Jacobian ∂p_i / ∂x_j", xlabel="input logit j", ylabel="output probability i")
    diagonal.bar(range(len(p)), np.diagonal(matrix), color="steelblue")
    diagonal.axhline(0.25 * _mass(p, alpha), color="grey", linestyle="--", linewidth=1, label="its bound")
    diagonal.set(title="Diagonal", xlabel="class i", ylabel="∂p_i / ∂x_i")
    diagonal.legend()
    bars.bar(range(len(p)), p, color="coral")
    bars.set(title="Probabilities", xlabel="class i", ylabel="p_i", ylim=(0, 1))
    _name_classes(heat.xaxis, names)
    _name_classes(heat.yaxis, names)
    _name_classes(diagonal.xaxis, names)
    _name_classes(bars.xaxis, names)
    return figure


def visualize_spectrum(x: ArrayLike, *, where: ArrayLike | None = None, alpha: float = 1.0) -> Figure:
    """Draw the eigenvalues of J with the intervals that interlace them, q₍ᵢ₎ ≥ λᵢ ≥ q₍ᵢ₊₁₎, and the bounds of λ₁.

    The eigenvalues 0 are counted in the title. The axis is logarithmic where the others are many, or of unlike size.

    Args:
      x: real logits (K,).
      where: boolean mask (K,); False marks an absent class.
      alpha: 1 for softmax (q = p), more for α-entmax (q = p^(2-α)).

    Returns:
      A matplotlib Figure with one panel, and its legend below.

    Raises:
      ImportError: if matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> figure = jaxsoftmax.visualize_spectrum(jnp.array([2.0, 1.0, 0.5, -0.5]))
      >>> figure.axes[0].get_ylabel()
      'eigenvalue'

    Reference: docs/mathematics.md, section 2.
    """
    p, operator, _ = _prepare(x, alpha, None, where)
    rank, mass = int(operator.rank()), _mass(p, alpha)
    poles = np.sort(np.where(p > 0, np.where(p > 0, p, 1.0) ** (2 - alpha), 0.0))[::-1][: rank + 1]
    values = np.sort(np.asarray(operator.eigvalsh(), np.float64))[::-1][:rank]
    figure = new_figure((8.0, 5.5))
    axes, index = figure.subplots(), np.arange(1, rank + 1)
    between, dots = "interval q₍ᵢ₊₁₎ to q₍ᵢ₎", {"color": "firebrick", "linestyle": "none", "label": "eigenvalue λᵢ"}
    if rank > FEW:
        axes.fill_between(index, poles[1:], poles[:-1], step="mid", color="lightsteelblue", label=between)
        axes.plot(index, values, marker=".", markersize=2, **dots)
    else:
        axes.bar(index, poles[:-1] - poles[1:], bottom=poles[1:], color="lightsteelblue", label=between)
        axes.plot(index, values, marker="o", markersize=6 if rank < 20 else 3, **dots)
    largest = float(np.max(poles * (1 - poles / mass), initial=0.0))
    axes.axhspan(largest, 2 * largest, color="orange", alpha=0.15, label="max q(1-q/Σq) ≤ λ₁ ≤ twice that")
    bound = largest_eigenvalue_bound(alpha, len(p))
    if np.isfinite(bound):
        axes.axhline(bound, color="black", linestyle="--", linewidth=1, label=f"sharp bound {bound:.3g}")
    axes.axhline(0.25 * mass, color="grey", linestyle=":", linewidth=1, label="bound of the diagonal, no bound of λ₁")
    if rank > FEW or rank and values[-1] < values[0] / 100:
        axes.set(yscale="log", ylim=(values[-1] / 2, None))
    else:
        axes.set_ylim(bottom=0)
    zeros = "one eigenvalue 0" if len(p) - rank == 1 else f"{len(p) - rank} eigenvalues 0"
    axes.set(title=f"Spectrum of the Jacobian (and {zeros})", xlabel="i", ylabel="eigenvalue")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(fontsize="small", loc="outside lower center", ncols=2, frameon=False)
    return figure


def new_figure(size: tuple[float, float]) -> Any:
    """An empty Figure outside pyplot's state, so that it needs no display and leaves none behind."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "jaxsoftmax[plot]"') from error
    return Figure(figsize=size, layout="constrained")


def _prepare(x, alpha, class_names, where=None) -> tuple[np.ndarray, SoftmaxJacobian, Sequence[str] | None]:
    x = checks.as_float("x", x)
    if x.ndim != 1 or x.shape[0] == 0:
        raise ValueError(f"x must be a vector of logits (K,), got shape {x.shape}")
    if class_names is not None and not hasattr(class_names, "__len__"):
        raise TypeError(f"class_names must be a sequence of names, got {type(class_names).__name__}")
    if class_names is not None and len(class_names) != x.shape[0]:
        raise ValueError(f"class_names must hold {x.shape[0]} names, one per class, got {len(class_names)}")
    p = entmax(x, alpha, where=where)
    return np.asarray(p, np.float64), SoftmaxJacobian.from_probs(p, alpha=alpha), class_names


def _mass(p: np.ndarray, alpha: float) -> float:
    return float(np.sum(np.where(p > 0, np.where(p > 0, p, 1.0) ** (2 - alpha), 0.0)))


def _name_classes(axis: Any, names: Sequence[str] | None) -> None:
    if names is not None:
        axis.set_ticks(range(len(names)), labels=list(names))
    else:
        axis.get_major_locator().set_params(integer=True)
