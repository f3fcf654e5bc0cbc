"""Special values among many slices: XLA's CPU backend makes other kernels there, whose minimum and maximum drop NaN."""

import pytest

from tests.contract.test_special_values import check

FUNCTIONS = ["log_softmax", "logsumexp", "softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"]


@pytest.mark.parametrize("name", [*FUNCTIONS, "softmax_entropy", "softmax_kl_divergence", "brier_loss"])
def test_table_in_a_large_batch(name):
    check(name, zeros=5000)
