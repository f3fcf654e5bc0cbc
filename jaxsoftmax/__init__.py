"""Softmax, its Jacobian and the losses built on it, with every derivative in closed form."""

import importlib
from typing import TYPE_CHECKING

from jaxsoftmax import losses
from jaxsoftmax.attention import dot_product_attention
from jaxsoftmax.linear_head import (
    TokenStatistics,
    linear_softmax_cross_entropy_loss,
    linear_softmax_cross_entropy_with_statistics,
    linear_softmax_kl_divergence,
    linear_softmax_log_probs,
    linear_softmax_top_k_kl_divergence,
)
from jaxsoftmax.losses import *  # noqa: F403  (all names of the heads, each written once, in their room)
from jaxsoftmax.maps.derivatives import (
    softmax_hessian,
    softmax_jacobian,
    softmax_jvp,
    softmax_second_derivative,
    softmax_third_derivative,
    softmax_vjp,
)
from jaxsoftmax.maps.entmax import entmax, entmax15, sparsemax
from jaxsoftmax.maps.softmax import log_softmax, logsumexp, softmax
from jaxsoftmax.operators.softmax_jacobian import SoftmaxJacobian
from jaxsoftmax.plotting import visualize_jacobian, visualize_spectrum
from jaxsoftmax.verify import verify_jacobian_properties

__version__ = "0.1.0"

__all__ = [
    "SoftmaxJacobian",
    "TokenStatistics",
    "dot_product_attention",
    "entmax",
    "entmax15",
    "linear_softmax_cross_entropy_loss",
    "linear_softmax_cross_entropy_with_statistics",
    "linear_softmax_kl_divergence",
    "linear_softmax_log_probs",
    "linear_softmax_top_k_kl_divergence",
    "log_softmax",
    "logsumexp",
    "softmax",
    "softmax_hessian",
    "softmax_jacobian",
    "softmax_jvp",
    "softmax_second_derivative",
    "softmax_third_derivative",
    "softmax_vjp",
    "sparsemax",
    "verify_jacobian_properties",
    "visualize_jacobian",
    "visualize_spectrum",
]
__all__ += losses.__all__

# Chapters that are not needed for the names above: attributes of the package, imported when first asked for.
_CHAPTERS = {
    "curvature": "curvature",
    "estimators": "curvature.estimators",
    "laplace": "curvature.laplace",
    "matrix_calculus": "matrix_calculus",
    "network": "network",
    "second_order": "curvature.optimizer",
    "training": "training",
}

if TYPE_CHECKING:  # in place of __getattr__, which would let a type checker take any name for a module
    from jaxsoftmax import curvature as curvature
    from jaxsoftmax import matrix_calculus as matrix_calculus
    from jaxsoftmax import network as network
    from jaxsoftmax import training as training
    from jaxsoftmax.curvature import estimators as estimators
    from jaxsoftmax.curvature import laplace as laplace
    from jaxsoftmax.curvature import optimizer

    second_order = optimizer
else:

    def __getattr__(name):
        if name not in _CHAPTERS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.{_CHAPTERS[name]}")


def __dir__() -> list[str]:
    """The names of `__all__` and the documented modules; the shorter names of some stay attributes all the same."""
    modules = "autodiff curvature linear_head losses maps matrix_calculus network operators plotting training verify"
    return sorted([*__all__, *modules.split(), "__version__"])
