"""Matrix differential calculus: the Frobenius product, layouts of derivatives, differentials, a table of identities."""

from jaxsoftmax.matrix_calculus.identities import IDENTITIES, Identity
from jaxsoftmax.matrix_calculus.layouts import denominator_layout, differential, frobenius, numerator_layout

__all__ = ["IDENTITIES", "Identity", "denominator_layout", "differential", "frobenius", "numerator_layout"]
