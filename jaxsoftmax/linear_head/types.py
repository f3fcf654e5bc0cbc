"""What the files of the linear head hand to each other."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import class_axis as num
from jaxsoftmax._core import dtypes

Arrays = Mapping[str, Array]
MeshAxes = str | Sequence[str] | None


class Cotangents(NamedTuple):
    """∂F/∂z of a chunk, made a slab of the vocabulary at a time.

    Attributes:
      arrays: what it is made of, (C, V) each.
      make: make(parts, start), given a slab (C, B) of each array that begins at the class `start`, returns G for it,
        or along a direction Ġ and G.
      scale: (C,), factors of all that `make` returns, left to the rows of x: arrays of logits have more of them.
    """

    arrays: tuple[Array, ...]
    make: Callable[[tuple[Array, ...], Any], tuple[Array, ...]] = lambda parts, _: parts
    scale: Array | None = None


class Axes(NamedTuple):
    """Axes of the mesh, inside a `shard_map`, over whose devices F is one sum.

    Attributes:
      tokens: each device has its own tokens.
      classes: each device has its block of the classes, and the same tokens.
      gathered: those of `tokens` that split the features of the weights as well.
      copies: whether every argument is one of its own on each device of `classes`, x and the options too: F then
        depends on the mean of the token weights and options, and the gradients stay in parts.
    """

    tokens: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    copies: bool = False

    def summed(self, name: str) -> tuple[str, ...]:
        """Axes over which what the devices find for the gradient in the argument `name` is to be added up."""
        if name == "x":
            return () if self.copies else self.classes
        return () if name == "token_weights" else self.tokens


class Head(NamedTuple):
    """What is static in a linear head: how logits become losses, and how the work is divided.

    Attributes:
      losses: losses(head, z, constants, options) of the logits of a chunk.
      rule: losses and `Cotangents`, where they are known in closed form.
      rule_along: their derivatives along a direction.
      vocab_axis: the classes' axis in the weights.
      arrays: how many arrays of a chunk's logits the gradient takes.
      chunk_size: what the caller chose, or None.
      statistics: what else is wanted of the logits.
      every: whether the token weights are 1: how many tokens count is then known beforehand.
      spread: whether XLA is to divide the tokens of each chunk, and the classes.
      layout: how the arguments lie on a mesh, outside of a `shard_map`.
      axes: inside of one.
    """

    losses: Callable[[Any, Array, Any, Arrays], Array]
    rule: Callable[[Any, Array, Any, Arrays, Array], tuple[Array, Cotangents]] | None
    rule_along: Callable[..., tuple[Array, Cotangents]] | None
    vocab_axis: int
    arrays: int
    chunk_size: int | None
    statistics: Callable[[Any, Array, Any, Arrays], Any] | None = None
    every: bool = False
    spread: bool = False
    layout: Any = None
    axes: Axes = Axes()

    @property
    def class_axis(self) -> Any:
        """Of arrays (C, V)."""
        return num.ClassAxis((1,), self.axes.classes) if self.axes.classes else 1


class Tokens(NamedTuple):
    """The tokens' constants: arrays with one row per token, which of the tokens count, and what they share."""

    rows: Any
    valid: Array | None
    shared: Any = None


def wide_dtype(theta: Arrays) -> jnp.dtype:
    return dtypes.compute_dtype(dtypes.common_dtype(*(theta[n] for n in ("x", "weights", "bias") if n in theta)))


def total(x: Array, axes: tuple[str, ...]) -> Array:
    """Σ over the devices of the mesh axes."""
    return lax.psum(x, axes) if axes else x
