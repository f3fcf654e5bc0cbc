"""The model that a head is the negative log-likelihood of, as far as its Fisher matrix needs it."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax import Array

from jaxsoftmax.operators.base import names_and_types


@functools.partial(jax.tree_util.register_dataclass, data_fields=["logits", "weight"], meta_fields=["draw", "score"])
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Likelihood:
    """A model whose targets can be drawn: its Fisher matrix is the mean of weight · g gᵀ over them.

    Args:
      logits: of the model, (..., K).
      weight: how many observations the example counts for, (..., 1), or (..., K) where each logit has its own target.
      draw: (key, logits, shape) -> targets from the model, as the loss takes them, `shape` in front of their shape.
      score: (logits, targets) -> g, the gradient of -log p(target) in the logits.
    """

    logits: Array
    weight: Array
    draw: Callable[[Array, Array, tuple[int, ...]], Array]
    score: Callable[[Array, Array], Array]

    def scaled(self, factor: Array) -> "Likelihood":
        """With `factor` as many observations."""
        return dataclasses.replace(self, weight=factor * self.weight)

    def __repr__(self) -> str:
        return names_and_types(self)
