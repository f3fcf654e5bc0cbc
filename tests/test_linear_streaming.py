"""The linear head with its vocabulary streamed in blocks: the same as on full logits, in little memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax.linear_head import (
    budget,
    default_chunk_size,
    linear_softmax_cross_entropy_loss,
    linear_softmax_cross_entropy_with_statistics,
    predict_temp_bytes,
)
from tests.test_linear_head import (
    V,
    arguments,
    assert_close,
    assert_equal_to_full_logits,
    first_orders,
    full,
    fused,
    orders,
    products,
    temp,
)

SLOW = pytest.mark.slow


@pytest.fixture
def streamed(monkeypatch):
    """Chunks of 3 tokens, blocks of 4 classes: ragged in both. The head without a chunk size then streams."""
    monkeypatch.setattr(budget, "default_chunk", lambda *_: (3, 4))
    return functools.partial(fused, chunk_size=None)


@SLOW
@pytest.mark.parametrize(
    "options,reduction", [("plain", "none"), ("weighted", "mean"), ("everything", "none"), ("everything", "mean")]
)
def test_equals_full_logits_in_every_order(options, reduction, streamed, x64):
    assert_equal_to_full_logits(orders, streamed, options, reduction)


@pytest.mark.parametrize("options,reduction", [pytest.param("plain", "mean", marks=SLOW), ("everything", "none")])
def test_equals_full_logits(options, reduction, streamed, x64):
    assert_equal_to_full_logits(first_orders, streamed, options, reduction)


@pytest.mark.parametrize(
    "name",
    ["class_weights", pytest.param("label_smoothing", marks=SLOW), pytest.param("z_loss", marks=SLOW), "logit_softcap"],
)
def test_differentiable_in_options(name, streamed, x64):
    args, labels, class_weights = arguments()
    options = {"class_weights": class_weights, "label_smoothing": 0.1, "z_loss": 0.1, "logit_softcap": 3.0}
    grad = lambda head: jax.jit(jax.grad(lambda v: head(labels, *args, **{**options, name: v})))(options[name])
    assert_close(grad(streamed), grad(full))


@pytest.mark.parametrize("vocab_axis", [0, pytest.param(1, marks=SLOW)])
def test_float32_in_both_layouts(vocab_axis, streamed):
    (x, weights, *rest), labels, _ = arguments(jnp.float32, 4.0)
    value, (dx, dw, *others) = jax.jit(jax.value_and_grad(functools.partial(full, labels), (0, 1, 2, 3)))(
        x, weights, *rest
    )
    turn = (lambda w: w.T) if vocab_axis == 0 else (lambda w: w)
    grad = jax.jit(jax.value_and_grad(functools.partial(streamed, labels, vocab_axis=vocab_axis), (0, 1, 2, 3)))
    assert_close(grad(x, turn(weights), *rest), (value, (dx, turn(dw), *others)), ulps=16)


def test_ensemble(streamed, x64):
    """vmap over weights, of the gradient and of a Hessian-vector product."""
    (x, weights, *rest), labels, _ = arguments()
    ensemble = jnp.stack([weights, -weights])

    def both(head):
        grad = jax.grad(lambda w: head(labels, x, w, *rest))
        return jax.jit(jax.vmap(lambda w: jax.jvp(grad, (w,), (weights,))))(ensemble)

    assert_close(both(streamed), both(full))


def test_statistics(streamed, x64):
    (x, weights, bias, _), labels, _ = arguments()
    bias = bias.at[4:8].set(-jnp.inf)  # a whole block without probability
    labels = jnp.argmax(x @ weights + bias[None], 1).at[1:].set(0)
    call = lambda **options: linear_softmax_cross_entropy_with_statistics(x, labels, weights, bias=bias, **options)
    (value, facts), (wanted_value, wanted) = call(), call(chunk_size=100)
    assert_close(value, wanted_value)
    for name in ("logsumexp", "probability", "entropy"):
        assert_close(getattr(facts, name), getattr(wanted, name))
    np.testing.assert_array_equal(facts.prediction, wanted.prediction)
    np.testing.assert_array_equal(facts.correct, wanted.correct)
    assert facts.correct[0] and not facts.correct.all()


def test_absent_classes_are_not_smoothed(streamed, x64):
    """A bias of -inf takes its class away; the smoothing is spread over the others, as in the plain head."""
    (x, weights, bias, a), labels, _ = arguments()
    bias, labels = bias.at[5].set(-jnp.inf), jnp.where(labels == 5, 6, labels)
    f = lambda head: jax.jit(
        jax.value_and_grad(lambda x, w: head(labels, x, w, bias, a, label_smoothing=0.2), argnums=(0, 1))
    )(x, weights)
    got = f(streamed)
    assert_close(got, f(full))
    assert np.isfinite(got[0]) and not got[1][1][:, 5].any()


def test_digits_of_a_sure_model(monkeypatch):
    """The label leads by 20 over a class of another block: loss and gradient at the label are about 2e-9, not 0."""
    monkeypatch.setattr(budget, "default_chunk", lambda *_: (1, 1))
    x, weights, labels = jnp.ones((1, 1)), jnp.array([[20.0, 0.0]]), jnp.array([0])
    value, gradient = jax.value_and_grad(linear_softmax_cross_entropy_loss, 2)(x, labels, weights)
    exact = np.log1p(np.exp(-20.0))
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-exact, exact]], rtol=1e-6)


def test_labels_out_of_range_and_skipped_tokens(streamed, x64):
    (x, weights, bias, _), _, _ = arguments()
    labels, a = jnp.array([0, -1, V, 3, 4, 5, 6]), jnp.array([1.0, 1, 0, 1, 1, 1, 1])
    losses, gradient = jax.jit(
        lambda x: (
            streamed(labels, x, weights, bias, jnp.ones(7), "none"),
            jax.grad(lambda x: streamed(labels, x, weights, bias, a))(x),
        )
    )(x)
    assert np.isnan(losses).tolist() == [False, True, True, False, False, False, False]
    assert np.isnan(gradient).any(1).tolist() == [False, True, False, False, False, False, False]
    value, gradient = jax.jit(jax.value_and_grad(lambda w: streamed(labels, x, w, bias, jnp.zeros(7))))(
        weights * jnp.nan
    )
    assert value == 0 and not gradient.any()


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


def test_when_the_vocabulary_streams(monkeypatch):
    """Where the budget holds few tokens' logits; a chunk size of the user's own, and a budget for all, prevent it."""
    monkeypatch.setitem(budget.BUDGET, "cpu", 1 << 20)
    monkeypatch.setattr(budget, "SLAB_BYTES", 1 << 17)  # 2048 columns of 16 features
    # (2^18 numbers - 1000·16) / (1000 + 3·16 + 16) = 231 tokens at most: 19 chunks, of 216 tokens.
    assert budget.default_chunk(4096, 16, 1000) == (216, None)
    assert budget.default_chunk(4096, 16, 20000) == (512, 148)  # 135 equal blocks of at most 149
    assert budget.default_chunk(4, 16, 20000) == (4, None)
    assert budget.default_chunk(4096, 16, 20000, whole=True) == (7, None)
    assert budget.default_chunk(4096, 16, 10**7, whole=True) == (1, None)
    # Derivatives: 3·20000 + 5·16 + 16 numbers per token, in the room of two arrays like the weights.
    assert budget.default_chunk(4096, 16, 20000, arrays=3, whole=True) == (8, None)
    assert default_chunk_size(4096, 16, 20000) == 512


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
