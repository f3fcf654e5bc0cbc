"""The dtype that is computed in: float32 for half precision, the widest of those given otherwise."""

import jax.numpy as jnp
from jax import Array


def common_dtype(*arrays: Array) -> jnp.dtype:
    """The one dtype of floating arrays that differ, also where JAX's implicit promotion is switched off."""
    dtypes = {x.dtype for x in arrays}
    return dtypes.pop() if len(dtypes) == 1 else max(map(compute_dtype, dtypes), key=lambda d: jnp.finfo(d).bits)


def compute_dtype(dtype) -> jnp.dtype:
    """float32 for half precision, the dtype itself otherwise."""
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def widen(*arrays: Array) -> list[Array]:
    """The arrays in their common computation dtype."""
    dtype = compute_dtype(common_dtype(*arrays))
    return [x.astype(dtype) for x in arrays]


def widen_labels(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Logits and labels in their common computation dtype, but logits in half precision as they are.

    The rules widen those themselves: the maximum is taken in half precision, and no wide copy is kept.
    """
    dtype = compute_dtype(common_dtype(logits, labels))
    narrow = compute_dtype(logits.dtype) == dtype
    return logits if narrow else logits.astype(dtype), labels.astype(dtype)


def largest(dtype) -> float:
    return float(jnp.finfo(dtype).max)
