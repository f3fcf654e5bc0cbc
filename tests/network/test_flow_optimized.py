"""Norms of per-example gradients form no gradients."""

import jax
import pytest

from jaxsoftmax import network
from tests.network.test_flow import LOSS, sample

pytestmark = pytest.mark.optimized


def test_norms_form_no_gradients():
    """The compiled norms need no array of the size of the per-example gradients."""
    params, x, labels = sample((64,), (32, 128, 10))
    norms = jax.jit(lambda params, x, labels: network.per_example_gradient_norms(params, x, labels, LOSS))
    temporaries = norms.lower(params, x, labels).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 64 * 128 * 32 * 4 / 2
