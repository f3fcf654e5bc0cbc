"""The Fisher matrix of a likelihood in its logits, with the model that it belongs to."""

import dataclasses
import functools
from typing import Any

import jax
from jax import Array

from jaxsoftmax._core import checks
from jaxsoftmax.operators.diagonal_low_rank import DiagonalPlusLowRank


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "factors", "core", "centre", "logits"],
    meta_fields=["proportional", "draw"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Fisher(DiagonalPlusLowRank):
    """Fisher matrix of a likelihood in its logits, with the model that it belongs to.

    Args:
      logits: of the model, (..., K).
      draw: (key, logits, shape) -> targets from the model, as the loss takes them, `shape` in front of their shape.
    """

    logits: Any = None
    draw: Any = None

    def sample_targets(self, key: Array, shape: tuple[int, ...] = ()) -> Array:
        """Targets drawn from the model, as the loss takes them, with `shape` in front of their shape."""
        return self.draw(checks.key("key", key), self.logits, checks.sizes("shape", shape))
