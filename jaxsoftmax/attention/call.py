"""`dot_product_attention`: the arguments of a call, checked, and one pass over its blocks."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxsoftmax._core import checks, dtypes
from jaxsoftmax._core.mesh import varies_over, varying
from jaxsoftmax.attention.blocks import EXAMPLES, Plan, by_blocks
from jaxsoftmax.attention.rows import Arrays, Attention

__all__ = ["dot_product_attention"]


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: Literal[False] = False,
    logit_softcap: float | None = None,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array: ...
@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: Literal[True],
    logit_softcap: float | None = None,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Array, Array]: ...
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    logit_softcap: float | None = None,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Array | tuple[Array, Array]:
    """softmax(scale Q Kᵀ + bias) V per head, as `jax.nn.dot_product_attention`, in both modes and at every order.

    It takes a block of queries at a time, with whole rows of logits: nothing of size T × S is held, in no mode and no
    order up to two. Between the passes of reverse mode stay the arguments, one row of H numbers per query, its
    logsumexp and the index of its largest logit. Blocks of keys that a causal mask or a window hides are not computed.

    Args:
      query: (B, T, N, H) or (T, N, H), floating.
      key: (B, S, K, H) or (S, K, H) of the same dtype, N a multiple of K: each of its heads serves N / K of the query.
      value: of the shape and dtype of `key`.
      bias: added to the scaled logits; broadcasts to (B, N, T, S). -inf excludes a key.
      mask: boolean, broadcasts to (B, N, T, S); where it is False, the query does not see the key.
      scale: of the logits; None for 1 / √H.
      is_causal: query t sees keys s ≤ t.
      query_seq_lengths: (B,) integers; queries from there on see no key.
      key_value_seq_lengths: (B,) integers; keys from there on are not seen.
      local_window_size: (left, right) or one number for both: query t sees keys t - left ≤ s ≤ t + right.
      return_residual: also return the logsumexp of each row of logits.
      logit_softcap: c > 0, for logits c tanh(scale Q Kᵀ / c) before the bias.
      segment_ids: integers (B, T) or (T,), or a pair of them, of queries and of keys: a query sees its own segment's.
      axis_name: inside `jax.shard_map`, the mesh axis (or a tuple of them) over which queries and keys are split in
        equal consecutive blocks: the arguments and the result are this device's block; mask and bias have all keys.
        Keys and values are gathered, and their cotangents scattered: as many bytes as sending them round.

    Returns:
      (B, T, N, H) or (T, N, H), of the dtype of `query`: 0, with derivative 0, for a query that sees no key. With
      `return_residual`, the pair of it and the logsumexp (B, T, N) or (T, N) in the same dtype, of no derivative. What
      a query does not see does not reach it, NaN included; under a mask, one that sees a key or value that is not
      finite is NaN.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> x = jnp.eye(3)[:, None]  # three tokens, one head
      >>> out, moved = jax.jvp(lambda q: jaxsoftmax.dot_product_attention(q, x, x, is_causal=True), (x,), (-x,))
      >>> print(out[:, 0].round(3))
      [[1.    0.    0.   ]
       [0.36  0.64  0.   ]
       [0.264 0.264 0.471]]

    Reference: docs/attention.md; Vaswani et al. 2017, https://arxiv.org/abs/1706.03762.
    """
    names, window = checks.split_over(axis_name), _window(local_window_size)
    q, k, v = _heads("query", query), _heads("key", key), _heads("value", value)
    _fit(q, k, v)
    (batch, queries, heads, width), groups, examples = q.shape, k.shape[2], jnp.ndim(query) == 4
    if scale is None:
        scale = 1 / math.sqrt(width)
    elif not isinstance(scale, (int, float)):
        q, scale = _scaled(q, checks.as_real("scale", checks.number("scale", scale), q.dtype)), 1.0
    softcap = None if logit_softcap is None else checks.known_positive("logit_softcap", logit_softcap)
    constants = _lengths(batch, query_seq_lengths, key_value_seq_lengths)
    constants |= _segments(segment_ids, batch, queries, k.shape[1])
    if names:
        constants["first"] = lax.axis_index(names) * queries
        gathered: Any = functools.partial(lax.all_gather, axis_name=names, axis=1, tiled=True)
        k, v = gathered(k), gathered(v)
        if segment_ids is not None:
            constants["key_segments"] = gathered(constants["key_segments"])
    logits = (batch, heads, queries, k.shape[1])
    args = {"query": q.reshape(batch, queries, groups, -1, width), "key": k, "value": v}
    if bias is not None:
        args["bias"] = _of_logits("bias", checks.as_real("bias", bias, q.dtype), logits, groups)
    if mask is not None:
        constants["mask"] = _of_logits("mask", _as_mask(mask), logits, groups)
    by_arrays = not constants.keys() <= {"first"}  # masks, lengths, segments
    masked = is_causal or window is not None or by_arrays
    if window is not None and is_causal:
        window = window[0], 0
    per_logit = (4 + q.dtype.itemsize) * heads * (batch if isinstance(batch, int) else EXAMPLES)
    plan = Plan(*logits[2:], per_logit, is_causal and not names, window)
    short = window is not None and (plan.is_uneven or queries > logits[3] + window[0])  # of keys
    empties = bias is not None or by_arrays or short
    body = Attention(q.dtype, float(scale), softcap, is_causal, window, masked, empties)
    out, *told = _evaluate(body, plan, ("out", "lse") if return_residual else ("out",), args, constants)
    result, lse = out.reshape(batch, queries, heads, width), None
    if told:
        lse = jnp.moveaxis(lax.stop_gradient(told[0]), -1, 1).reshape(batch, queries, heads).astype(q.dtype)
        lse = jnp.where(lse == jnp.inf, -jnp.inf, lse)
    result = result if examples else result[0]
    return result if lse is None else (result, lse if examples else lse[0])


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _evaluate(body: Attention, plan: Plan, names: tuple[str, ...], args: Arrays, constants: Arrays) -> list[Array]:
    around = frozenset().union(*map(varies_over, jax.tree.leaves((args, constants))))
    args = {name: varying(x, around) for name, x in args.items()}
    return by_blocks(body, plan, tuple((name, ()) for name in names), args, (), constants)


def _heads(name: str, x: ArrayLike) -> Array:
    """query, key or value with an axis of examples."""
    x = checks.as_loss_float(name, x)
    if x.ndim not in (3, 4):
        raise ValueError(f"{name} must have shape (B, T, N, H) or (T, N, H), got {x.shape}")
    if not all(isinstance(n, int) for n in x.shape[-3:]):
        raise TypeError(f"{name} must have known sizes, got {x.shape}: only the number of examples may be symbolic")
    return x if x.ndim == 4 else x[None]


def _fit(query: Array, key: Array, value: Array) -> None:
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}")
    checks.same_shape("value", value, "key", key.shape)
    if key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ValueError(f"key must have the examples and the width of query, {query.shape}, got {key.shape}")
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ValueError(f"query has {query.shape[2]} heads: need a multiple of the {key.shape[2]} heads of key")


def _scaled(query: Array, scale: Array) -> Array:
    wide = dtypes.compute_dtype(query.dtype)
    return (query.astype(wide) * scale.astype(wide)).astype(query.dtype)


def _window(size) -> tuple[int, int] | None:
    if size is None:
        return None
    left, right = size if isinstance(size, (tuple, list)) and len(size) == 2 else (size, size)
    return checks.at_least("local_window_size", left, 0), checks.at_least("local_window_size", right, 0)


def _lengths(batch: int, of_query: ArrayLike | None, of_key: ArrayLike | None) -> Arrays:
    out = {}
    for name, own, x in (("query", "query_seq_lengths", of_query), ("key", "key_value_seq_lengths", of_key)):
        if x is not None:
            out[f"{name}_lengths"] = checks.as_labels(own, x).astype(jnp.int32)
            checks.same_shape(own, out[f"{name}_lengths"], "the examples", (batch,))
    return out


def _segments(ids: Any, batch: int, queries: int, keys: int) -> Arrays:
    if ids is None:
        return {}
    pair: Any = ids if isinstance(ids, (tuple, list)) and len(ids) == 2 else (ids, ids)
    of_query, of_key = (
        checks.broadcast("segment_ids", checks.as_labels("segment_ids", x), (batch, size))
        for x, size in zip(pair, (queries, keys))
    )
    return {"query_segments": of_query, "key_segments": of_key}


def _as_mask(mask: ArrayLike) -> Array:
    mask = checks.as_array("mask", mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be boolean, got dtype {mask.dtype}; an additive mask is a bias")
    return mask


def _of_logits(name: str, x: Array, logits: tuple[int, ...], groups: int) -> Array:
    """An array that broadcasts to the logits (B, N, T, S), as one that broadcasts to (B, K, G, T, S)."""
    if x.ndim > 4 or any(n not in (1, m) for n, m in zip(reversed(x.shape), reversed(logits))):
        raise ValueError(f"{name} has shape {x.shape}, which does not broadcast to (B, N, T, S) = {logits}")
    b, n, t, s = (1,) * (4 - x.ndim) + x.shape
    return x.reshape((b, 1, 1, t, s) if n == 1 else (b, groups, n // groups, t, s))
