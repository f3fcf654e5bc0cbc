"""The linear head with its vocabulary streamed in blocks: the same as on full logits, in little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax.linear_head import (
    budget,
    default_chunk_size,
    linear_softmax_cross_entropy_with_statistics,
)
from tests.linear_head.test_cross_entropy import (
    V,
    arguments,
    assert_close,
    assert_equal_to_full_logits,
    first_orders,
    full,
    orders,
)

SLOW = pytest.mark.slow


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
