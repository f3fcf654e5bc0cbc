"""The Hessian of a function of cross-entropy, f(L): the focal loss.

f(L)″ = f′J + f″ggᵀ,    g = p - e_c.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxsoftmax._core import classes
from jaxsoftmax._core.centring import below_half, is_top
from jaxsoftmax.operators.diagonal_low_rank import DiagonalPlusLowRank


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *(f.name for f in dataclasses.fields(DiagonalPlusLowRank) if f.name != "axis"),
        *("first", "second", "label", "missed"),
    ],
    meta_fields=["axis"],
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FunctionOfLoss(DiagonalPlusLowRank):
    """f′J + f″ggᵀ, the Hessian of f(L) for L of gradient g = p - e_c = -Pᵀe_c and Hessian J.

    Its weights d = f′p + f″e_c serve every method but products, where the two terms take fewer sums
    (`python -m benchmarks hvp` prints the time beside jvp of grad).

    Args:
      first: f′, shape (..., 1).
      second: f″, shape (..., 1).
      label: c, shape (..., 1).
      missed: 1 - p_c, shape (..., 1).
    """

    first: Any = None
    second: Any = None
    label: Any = None
    missed: Any = None

    def scaled(self, weight: ArrayLike) -> Self:
        weight = self._weight(weight)
        scaled = super().scaled(weight[..., 0])
        return dataclasses.replace(scaled, first=weight * self.first, second=weight * self.second)

    def _centred_mv(self, u: Array) -> Array:
        # J and g see no constant: w = u - u_top, Ju = p∘(w - <p,w>) and <g,u> = <p,w> - w_c.
        p = self.centre
        assert p is not None
        axis = self.axis
        top = classes.sum(is_top(p) * u, axis)
        w = u - top
        mean = classes.sum(below_half(p) * w, axis)
        along = mean - (classes.take(u, self.label, axis) - top)
        gradient = jnp.where(classes.index(p, axis) == self.label, -self.missed, p)
        return self.first * (below_half(p) * w - p * mean) + self.second * along * gradient
