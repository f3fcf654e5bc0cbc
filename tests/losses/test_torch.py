"""Cross-entropy against torch.nn.functional.cross_entropy, over every option where torch is right."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax.losses import (
    sigmoid_binary_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    weighted_mean,
)

torch = pytest.importorskip("torch")

N, K, IGNORED = 12, 5, -100
_rng = np.random.default_rng(0)
LOGITS, LABELS = 3 * _rng.normal(size=(N, K)), _rng.integers(0, K, N)
LABELS[[2, 7]] = IGNORED
WEIGHTS = _rng.uniform(0.2, 2, K)
OPTIONS = list(itertools.product((None, WEIGHTS), (0.0, 0.1), (False, True)))


def theirs(weight, smoothing, ignore, reduction):
    """Loss, and gradient of its sum."""
    logits = torch.tensor(LOGITS, requires_grad=True)
    labels = torch.tensor(LABELS if ignore else np.where(LABELS < 0, 0, LABELS))
    weight = None if weight is None else torch.tensor(weight)
    loss = torch.nn.functional.cross_entropy(
        logits, labels, weight, ignore_index=IGNORED, label_smoothing=smoothing, reduction=reduction
    )
    loss.sum().backward()
    return loss.detach().numpy(), logits.grad.numpy()


def ours(weight, smoothing, ignore, reduction):
    labels = jnp.asarray(LABELS if ignore else np.where(LABELS < 0, 0, LABELS))

    def loss(logits):
        losses = softmax_cross_entropy_with_integer_labels(
            logits,
            labels,
            label_smoothing=smoothing,
            class_weights=None if weight is None else jnp.asarray(weight),
            ignore_index=IGNORED if ignore else None,
        )
        if reduction != "mean":
            return losses if reduction == "none" else jnp.sum(losses)
        kept = labels != IGNORED
        counts = kept.astype(float) if weight is None else jnp.where(kept, jnp.asarray(weight)[labels], 0)
        return weighted_mean(losses, kept, normalizer=counts)

    return loss(jnp.asarray(LOGITS)), jax.grad(lambda z: jnp.sum(loss(z)))(jnp.asarray(LOGITS))


@pytest.mark.parametrize("weight, smoothing, ignore", OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_cross_entropy(weight, smoothing, ignore, reduction, x64):
    for got, want in zip(ours(weight, smoothing, ignore, reduction), theirs(weight, smoothing, ignore, reduction)):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


def test_nothing_counted_is_0_here_and_nan_there(x64):
    labels = np.full(N, IGNORED)
    there = torch.nn.functional.cross_entropy(torch.tensor(LOGITS), torch.tensor(labels), ignore_index=IGNORED)
    losses = softmax_cross_entropy_with_integer_labels(jnp.asarray(LOGITS), jnp.asarray(labels), ignore_index=IGNORED)
    assert np.isnan(there.numpy()) and weighted_mean(losses, labels != IGNORED) == 0


def test_soft_labels_and_positive_weight(x64):
    y = _rng.dirichlet(np.ones(K), N)
    want = torch.nn.functional.cross_entropy(torch.tensor(LOGITS), torch.tensor(y), reduction="none").numpy()
    np.testing.assert_allclose(softmax_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(y)), want, rtol=1e-12)
    want = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(LOGITS), torch.tensor(y), pos_weight=torch.tensor(WEIGHTS), reduction="none"
    ).numpy()
    got = sigmoid_binary_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(y), pos_weight=jnp.asarray(WEIGHTS))
    np.testing.assert_allclose(got, want, rtol=1e-12)
