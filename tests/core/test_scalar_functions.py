"""The scalar functions beneath the heads against extended precision: value, slope and bend, in both modes."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from mpmath import mp, mpf

from jaxsoftmax._core import scalar_functions
from tests.helpers import enable_x64

POINTS = np.float32([sign * x for x in (1e-6, 1e-3, 0.5, 0.7, 1.1, 1.9, 7, 80) for sign in (1, -1)])
sigmoid = lambda x: 1 / (1 + mpmath.exp(-x))
entropy = lambda p: -p * mpmath.log(p) - (1 - p) * mpmath.log(1 - p)
EXACT = {
    "sigmoid": sigmoid,
    "softplus": lambda x: mpmath.log(1 + mpmath.exp(x)),
    "tanh": mpmath.tanh,
    "sech_squared": lambda x: 1 / mpmath.cosh(x) ** 2,
    "log_cosh": lambda x: mpmath.log(mpmath.cosh(x)),
    "exp_remainder": lambda x: mpmath.exp(x) - 1 - x,
    "log_double_sigmoid": lambda x: mpmath.log(2 * sigmoid(x)),
    "missing_bits": lambda x: mpmath.log(2) - entropy(sigmoid(x)),
}


@pytest.mark.parametrize("name", EXACT)
def test_digits_at_every_order(name):
    """Within a few eps of what rounding x alone must cost."""
    f = getattr(scalar_functions, name)
    modes = {f: 0, jax.grad(f): 1, jax.jacfwd(f): 1, jax.jacfwd(jax.grad(f)): 2, jax.jacrev(jax.jacfwd(f)): 2}
    at_all = jax.jit(lambda x: [(jax.vmap(g)(x), n) for g, n in modes.items()])
    with mp.workdps(100):
        exact = [[mp.diff(EXACT[name], mpf(float(x)), n) for n in range(4)] for x in POINTS]
    for dtype in ("float32", "float64"):
        with enable_x64():
            x, info = jnp.asarray(POINTS, dtype), jnp.finfo(dtype)
            found = at_all(x)
        for got, n in found:
            for x, value, wanted in zip(POINTS, np.asarray(got, float), exact):
                unit = float(info.eps) * (abs(wanted[n]) + abs(float(x) * wanted[n + 1])) + float(info.tiny)
                assert abs(value - wanted[n]) <= 8 * unit, (dtype, int(n), x, value, float(wanted[n]))
