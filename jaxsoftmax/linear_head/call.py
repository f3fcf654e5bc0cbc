"""From the arguments of a call to those of the pass over the tokens, and from what it finds to the result."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxsoftmax._core import checks
from jaxsoftmax.linear_head.derivatives import value_and_gradient, weighted_sum
from jaxsoftmax.linear_head.types import Head, Tokens, wide_dtype

REDUCTIONS = ("none", "sum", "mean")


def layer(x, weights, bias, token_weights, vocab_axis) -> tuple[dict[str, Array], tuple[int, ...], int]:
    """The checked arguments of the layer by name, tokens flattened; the tokens' shape; the vocabulary's axis."""
    x, weights = checks.as_loss_float("x", x), checks.as_loss_float("weights", weights)
    if x.ndim == 0:
        raise ValueError("x must have a feature axis, (..., D), got a scalar")
    if weights.ndim != 2:
        raise ValueError(f"weights must have shape (D, V), or (V, D) with vocab_axis=0, got {weights.shape}")
    axis = checks.axis_index(vocab_axis, 2, "vocab_axis")
    if weights.shape[1 - axis] != x.shape[-1]:
        raise ValueError(
            f"x has {x.shape[-1]} features, weights of shape {weights.shape} has {weights.shape[1 - axis]} with "
            f"vocab_axis={vocab_axis}: need the same; a (V, D) array goes with vocab_axis=0"
        )
    shape = x.shape[:-1]
    theta = {"x": x.reshape(-1, x.shape[-1]), "weights": weights}
    if bias is not None:
        theta["bias"] = checks.as_loss_float("bias", bias)
        checks.same_shape("bias", theta["bias"], "the classes", (weights.shape[axis],))
    wide = wide_dtype(theta)
    if token_weights is None:
        theta["token_weights"] = jnp.ones(theta["x"].shape[0], wide)
    else:
        token_weights = checks.as_real("token_weights", token_weights, wide).astype(wide)
        theta["token_weights"] = checks.broadcast("token_weights", token_weights, shape).reshape(-1)
    return theta, shape, axis


def checked_reduction(reduction: str) -> str:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    return reduction


@functools.partial(jax.jit, static_argnames=("head", "reduction", "shape"), inline=True)
def reduced(head: Head, theta, tokens: Tokens, reduction: str, shape: tuple[int, ...], counted: Array):
    """The reduced loss, and the statistics of shape `shape`."""
    if reduction == "none":
        ones = {**theta, "token_weights": jnp.ones_like(theta["token_weights"])}
        _, rows, statistics = value_and_gradient(head, ("token_weights",), ones, tokens)
        losses = rows["token_weights"] * theta["token_weights"]
        out = losses.reshape(shape) if tokens.valid is None else jnp.where(tokens.valid, losses, 0.0).reshape(shape)
    else:
        out, statistics = weighted_sum(head, theta, tokens)
        if reduction == "mean":
            total = jnp.sum(counted)
            out = jnp.where(total == 0, 0.0, out / jnp.where(total == 0, 1.0, total))
    return out, jax.tree.map(lambda s: s.reshape(shape), statistics)
