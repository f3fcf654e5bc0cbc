"""Backpropagation by hand is jax.grad, to a few ulp."""

import jax
import pytest

import jaxsoftmax
from jaxsoftmax import network
from tests.network.test_backpropagation import ACTIVATIONS, assert_close, backprop, sample

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("batch", "bias"),
    [*(pytest.param(*case, marks=pytest.mark.slow) for case in (((), True), ((5,), False))), ((2, 3), True)],
)
def test_backprop_is_grad(activation, batch, bias):
    """To a few ulp: the two sum in the same order."""
    loss, activation = jaxsoftmax.softmax_cross_entropy_with_integer_labels, ACTIVATIONS[activation]
    params, x, labels = sample(batch, bias=bias)
    wanted = jax.jit(jax.grad(lambda params: loss(network.forward(params, x, activation), labels).mean()))(params)
    assert_close(backprop(params, x, labels, loss, activation), wanted, ulps=4)
