"""The linear head with its vocabulary streamed: digits, rounding, number of matrix products, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax.linear_head import (
    budget,
    linear_softmax_cross_entropy_loss,
    predict_temp_bytes,
)
from tests.linear_head.test_cross_entropy import (
    arguments,
    assert_close,
    full,
)
from tests.linear_head.test_cross_entropy_optimized import products, temp
from tests.linear_head.test_stream import SLOW


@pytest.mark.parametrize("vocab_axis", [0, pytest.param(1, marks=SLOW)])
def test_float32_in_both_layouts(vocab_axis, streamed):
    (x, weights, *rest), labels, _ = arguments(jnp.float32, 4.0)
    value, (dx, dw, *others) = jax.jit(jax.value_and_grad(functools.partial(full, labels), (0, 1, 2, 3)))(
        x, weights, *rest
    )
    turn = (lambda w: w.T) if vocab_axis == 0 else (lambda w: w)
    grad = jax.jit(jax.value_and_grad(functools.partial(streamed, labels, vocab_axis=vocab_axis), (0, 1, 2, 3)))
    assert_close(grad(x, turn(weights), *rest), (value, (dx, turn(dw), *others)), ulps=16)


def test_digits_of_a_sure_model(monkeypatch):
    """The label leads by 20 over a class of another block: loss and gradient at the label are about 2e-9, not 0."""
    monkeypatch.setattr(budget, "default_chunk", lambda *_: (1, 1))
    x, weights, labels = jnp.ones((1, 1)), jnp.array([[20.0, 0.0]]), jnp.array([0])
    value, gradient = jax.value_and_grad(linear_softmax_cross_entropy_loss, 2)(x, labels, weights)
    exact = np.log1p(np.exp(-20.0))
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-exact, exact]], rtol=1e-6)


def test_bfloat16_is_rounded_once(streamed):
    (x, weights, bias, a), labels, _ = arguments(jnp.bfloat16)
    f32 = [v.astype(jnp.float32) for v in (x, weights, bias, a)]
    wanted = jax.jit(jax.grad(functools.partial(full, labels), (0, 1)))(*f32)
    got = jax.jit(jax.grad(functools.partial(streamed, labels), (0, 1)))(x, weights, bias, a)
    for ours, exact in zip(got, wanted):
        assert ours.dtype == jnp.bfloat16
        half_ulp = 0.501 * jnp.finfo(jnp.bfloat16).eps
        np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=half_ulp, atol=1e-6)


def test_number_of_products(monkeypatch):
    """One in the loop of the first pass, three in that of the second; none for what is not differentiated."""
    monkeypatch.setattr(budget, "default_chunk", lambda *_: (8, 4))
    (x, weights, _, _), labels, _ = arguments(jnp.float32)
    weights = weights[:, :8]
    f = lambda x, w: linear_softmax_cross_entropy_loss(x, labels, w)
    assert products(f, x, weights) == 1
    assert products(jax.value_and_grad(f), x, weights) == 3
    assert products(jax.value_and_grad(f, 1), x, weights) == 3
    assert products(jax.value_and_grad(f, (0, 1)), x, weights) == 4


def test_memory_is_as_predicted(monkeypatch):
    n, d, vocab, budget = 512, 16, 30001, 4 << 20
    monkeypatch.setitem(budget.BUDGET, "cpu", budget)
    assert budget.default_chunk(n, d, vocab)[1] is not None
    x, weights, labels = jnp.zeros((n, d)), jnp.zeros((d, vocab)), jnp.zeros(n, jnp.int32)
    f = lambda x, w: linear_softmax_cross_entropy_loss(x, labels, w)
    used = temp(jax.value_and_grad(lambda *a: 3 * f(*a), (0, 1)), x, weights)
    assert 0.75 <= predict_temp_bytes(n, d, vocab) / used <= 1.25
    assert used <= budget
    assert temp(lambda *a: jax.jvp(jax.grad(f, (0, 1)), a, a)[1], x, weights) <= budget
