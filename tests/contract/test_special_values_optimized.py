"""Special values among many slices: XLA's CPU backend makes other kernels there, whose minimum and maximum drop NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
from tests.contract.test_special_values import check
from tests.helpers import one_in

pytestmark = pytest.mark.optimized

FUNCTIONS = ["log_softmax", "logsumexp", "softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"]


@pytest.mark.parametrize("name", one_in(2, [*FUNCTIONS, "softmax_entropy", "softmax_kl_divergence", "brier_loss"]))
def test_table_in_a_large_batch(name):
    check(name, zeros=5000)


MAPS = js.sparsemax, js.entmax15, lambda z: js.entmax(z, 1.3), lambda z: js.entmax(z, 3.0)


@pytest.mark.parametrize("function", MAPS)
def test_sparse_maps_keep_a_nan_in_its_slice_of_a_large_batch(function):
    z = np.zeros((5000, 3), "float32")
    z[7, 1], z[9, :2], z[11] = np.nan, np.inf, -np.inf
    p = np.asarray(jax.jit(function)(jnp.asarray(z)))
    wrong = np.isin(np.arange(5000), (7, 9, 11))
    assert np.all(np.isnan(p[wrong])) and not np.any(np.isnan(p[~wrong]))
    labels = jnp.zeros(5000, int)
    losses = np.asarray(jax.jit(js.multiclass_sparsemax_loss)(jnp.asarray(z), labels))
    np.testing.assert_array_equal(np.isnan(losses), wrong)
