"""Curvature of a network's loss: products with vectors, and what is built on them.

All but `gauss_newton`, which needs optax, is JAX alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxsoftmax.curvature.estimators import (
    Estimate,
    SpectralDensity,
    hutchinson_diagonal,
    hutchinson_trace,
    hutchpp_trace,
    spectral_density,
    top_eigenpairs,
)
from jaxsoftmax.curvature.laplace import LastLayerLaplace, last_layer_laplace
from jaxsoftmax.curvature.products import dense, empirical_fisher_vp, fisher_vp, ggn_vp, hvp, linearized
from jaxsoftmax.curvature.solve import Solution, damped_solve

if TYPE_CHECKING:
    from jaxsoftmax.curvature.optimizer import GaussNewtonState, gauss_newton

__all__ = [
    "Estimate",
    "GaussNewtonState",
    "LastLayerLaplace",
    "Solution",
    "SpectralDensity",
    "damped_solve",
    "dense",
    "empirical_fisher_vp",
    "fisher_vp",
    "gauss_newton",
    "ggn_vp",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "hutchpp_trace",
    "hvp",
    "last_layer_laplace",
    "linearized",
    "spectral_density",
    "top_eigenpairs",
]


def __getattr__(name: str) -> Any:
    if name not in ("GaussNewtonState", "gauss_newton"):  # these import optax
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("jaxsoftmax.curvature.optimizer"), name)
