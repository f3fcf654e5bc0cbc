"""Reports that print as tables and assert in tests: derivatives compared, properties of the Jacobian measured."""

from jaxsoftmax.verify.compare import Comparison, DerivativeReport, compare_derivatives, logit_regimes
from jaxsoftmax.verify.properties import (
    JacobianReport,
    Property,
    largest_eigenvalue_bound,
    verify_jacobian_properties,
)

__all__ = [
    "Comparison",
    "DerivativeReport",
    "JacobianReport",
    "Property",
    "compare_derivatives",
    "largest_eigenvalue_bound",
    "logit_regimes",
    "verify_jacobian_properties",
]
