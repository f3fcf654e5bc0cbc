"""The strict session every test runs in: eight CPU devices, no implicit dtype or rank promotion, no window for plots.

The environment variables come before `import jax`, which reads them when it starts.
"""

import contextlib
import os

DEVICES = "--xla_force_host_platform_device_count=8"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a property test compiles, so no deadline fits; derandomized, so that two runs test the same.
hypothesis.settings.register_profile("jaxsoftmax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jaxsoftmax")


@contextlib.contextmanager
def enable_x64():
    """float64 inside the `with` block; outside it the session keeps JAX's default, float32."""
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        yield


@pytest.fixture
def x64():
    """float64 for one whole test."""
    with enable_x64():
        yield


@pytest.fixture
def key():
    """A PRNG key, the same in every run."""
    return jax.random.key(0)
