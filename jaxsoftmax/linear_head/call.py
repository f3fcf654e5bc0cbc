"""From the arguments of a call to a pass over the tokens of each device, and from what it finds to the result."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import checks
from jaxsoftmax._core.plumbing import mesh_axes, varying
from jaxsoftmax.linear_head import mesh
from jaxsoftmax.linear_head.derivatives import value_and_gradient, weighted_sum
from jaxsoftmax.linear_head.plan import Axes, Head, MeshAxes, Reduction, Tokens, wide_dtype
from jaxsoftmax.linear_head.stream import total

PRECISIONS = "default", "fastest", "bfloat16", "high", "tensorfloat32", "highest", "float32"


def layer(x, weights, bias, token_weights, vocab_axis) -> tuple[dict[str, Array], int]:
    """The checked arguments of the layer by name, and the vocabulary's axis."""
    x, weights = (_as_array(name, x) for name, x in (("x", x), ("weights", weights)))
    if x.ndim == 0:
        raise ValueError("x must have a feature axis, (..., D), got a scalar")
    if weights.ndim != 2:
        raise ValueError(f"weights must have shape (D, V), or (V, D) with vocab_axis=0, got {weights.shape}")
    if not all(isinstance(n, int) for n in weights.shape):
        sizes = f"weights must have known sizes, got {weights.shape}"
        raise TypeError(f"{sizes}: only the number of tokens may be symbolic")
    axis = checks.axis_index(vocab_axis, 2, "vocab_axis")
    if weights.shape[1 - axis] != x.shape[-1]:
        raise ValueError(
            f"x has {x.shape[-1]} features, weights of shape {weights.shape} has {weights.shape[1 - axis]} with "
            f"vocab_axis={vocab_axis}: need the same; a (V, D) array goes with vocab_axis=0"
        )
    theta = {"x": x, "weights": weights}
    if bias is not None:
        theta["bias"] = checks.as_loss_float("bias", bias)
        checks.same_shape("bias", theta["bias"], "the classes", (weights.shape[axis],))
    wide = wide_dtype(theta)
    if token_weights is None:
        token_weights = jnp.ones_like(jnp.sum(x, -1), wide)  # typed as x is on a mesh
    token_weights = checks.as_real("token_weights", token_weights, wide).astype(wide)
    theta["token_weights"] = checks.broadcast("token_weights", token_weights, x.shape[:-1])
    return theta, axis


def _as_array(name: str, x) -> Array:
    """An argument to differentiate in: floating point, with a 0 and negative numbers."""
    x = checks.as_loss_float(name, x)
    if x.dtype.name == "float8_e8m0fnu":
        raise TypeError(
            f"{name} must have a dtype that holds 0 and negative numbers, got {x.dtype}: scale and convert it"
        )
    return x


def checked(reduction: str, chunk_size: int | None, precision) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(map(repr, get_args(Reduction)))}, got {reduction!r}")
    if chunk_size is not None:
        checks.at_least("chunk_size", chunk_size, 1)
    if not (precision is None or isinstance(precision, lax.Precision) or precision in PRECISIONS):
        names = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"precision must be None, a jax.lax.Precision or one of {names}, got {precision!r}")


def split_by(axis_name: MeshAxes, weights: Array, *beside: Array) -> Axes:
    """The axes of the shard_map around that split the classes, of the weights or what is beside them."""
    names = checks.mesh_axes(axis_name, "weights", weights, *beside)
    return Axes(classes=names, copies=bool(names))


def evaluate(head: Head, reduction: str, theta, tokens: Tokens, token_axes, class_axes):
    """The reduced loss, and the numbers per token with their indices, on whatever mesh the arrays lie."""
    x, weights = theta["x"], theta["weights"]
    if head.axes.classes:
        if token_axes is not None or class_axes is not None:
            raise ValueError("axis_name is for use inside shard_map, token_axes and class_axes outside of it: give one")
    else:
        layout = mesh.layout_of(x, weights, head.vocab_axis, token_axes, class_axes)
        head = head._replace(layout=layout, spread=1 if layout else mesh.divided_by_xla(x, weights))
    return _evaluate(head, reduction, theta, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _evaluate(head: Head, reduction: str, theta, tokens: Tokens):
    if head.layout is not None:
        theta, tokens = mesh.placed(head, theta, tokens)
    a, valid = theta["token_weights"], tokens.valid
    theta = _of_device(head, {**theta, "token_weights": a[..., None]}, tokens)
    if reduction == "none":
        ones = {**theta, "token_weights": jnp.ones_like(theta["token_weights"])}
        _, rows, facts = value_and_gradient(head, ("token_weights",), ones, tokens)
        losses = total(rows["token_weights"], head.axes.classes)[..., 0] * a
        return losses if valid is None else jnp.where(valid, losses, 0.0), facts
    out, facts = weighted_sum(head, theta, tokens)
    if reduction == "sum":
        return out, facts
    if "class_weights" in theta:
        a = a * mesh.label_weights(head, theta["class_weights"], tokens.rows)
    counted = jnp.sum(a if valid is None else jnp.where(valid, a, 0.0))
    return jnp.where(counted == 0, 0.0, out / jnp.where(counted == 0, 1.0, counted)), facts


def _of_device(head: Head, theta: dict[str, Array], tokens: Tokens) -> dict[str, Array]:
    """Inside a shard_map, all arguments as the device's own, to differentiate in.

    The devices of the classes compute one sum together. Over other axes the caller has split the tokens, say: then each
    device computes a sum of its own. Parts of a gradient are rounded, then added up.
    """
    around = frozenset().union(head.axes.classes, *map(mesh_axes, jax.tree.leaves((theta, tokens))))
    return {name: varying(v, around) for name, v in theta.items()}
