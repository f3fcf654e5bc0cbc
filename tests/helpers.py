"""The one tolerance table, and what every test may need."""

import contextlib
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if hasattr(jax, "shard_map"):
    shard_map = jax.shard_map
else:  # JAX 0.6.0
    from jax.experimental.shard_map import shard_map as shard_map

# Relative tolerance per dtype: of a value, and of a derivative (one more rounding, one more sum).
VALUE_RTOL = {"float64": 1e-13, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
DERIVATIVE_RTOL = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3.2e-2}


def assert_close(got, want, rtol: float | None = None, scale=None) -> None:
    """|got - want| ≤ rtol · max|want| per leaf, by default of a derivative; shapes equal, NaN nowhere."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        tolerance = DERIVATIVE_RTOL[np.asarray(a).dtype.name] if rtol is None else rtol
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        bound = tolerance * max(np.max(np.abs(b), initial=0.0) if scale is None else scale, np.finfo(np.float64).tiny)
        assert np.all(np.abs(a - b) <= bound), f"off by {np.max(np.abs(a - b))}, allowed {bound}"


def one_in(n: int, cases: Iterable, start: int = 0) -> list:
    """The cases of a test; from `start` on one in n runs by default, the others with -m slow."""
    return [case if i % n == start else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(cases)]


def only(default: Iterable, cases: Iterable) -> list:
    """The cases of a test, those of them that are not in `default` with -m slow."""
    return [case if case in default else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@contextlib.contextmanager
def enable_x64():
    """float64 inside the `with` block; outside it the session keeps JAX's default, float32."""
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        yield


def ulp(x: float, dtype) -> float:
    """Distance from |x| to the next number of that dtype."""
    info = jnp.finfo(dtype)
    return max(2.0 ** math.floor(math.log2(abs(x) or float(info.tiny))), float(info.tiny)) * float(info.eps)
