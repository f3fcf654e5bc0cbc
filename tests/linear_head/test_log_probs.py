"""Token log-probabilities and what is built on them, against the same on full logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax import linear_softmax_cross_entropy_with_statistics, linear_softmax_log_probs
from tests.linear_head.test_cross_entropy import CHUNK, arguments, assert_close

ACTIONS = jnp.array([1, 0, 4, 2, 10, 4, 7])


def fused(x, weights, bias, temperature):
    found = linear_softmax_log_probs(x, ACTIONS, weights, bias=bias, temperature=temperature, chunk_size=CHUNK)
    return found.log_prob, found.logsumexp, found.entropy, found.probability


def full(x, weights, bias, temperature):
    z = (x @ weights + bias[None]) / temperature
    logp = jax.nn.log_softmax(z)
    entropy = -jnp.sum(jnp.exp(logp) * logp, -1)
    return logp[jnp.arange(len(x)), ACTIONS], jax.nn.logsumexp(z, -1), entropy, jnp.exp(logp.max(-1))


def same(f, g, args):
    """Value and gradient, both modes of the next order."""

    every = tuple(range(len(args)))

    def derivatives(f, args, t):
        gradient = jax.grad(f, every)
        along = jax.grad(lambda *args: jax.jvp(f, args, t)[1], every)
        return f(*args), gradient(*args), jax.jvp(gradient, args, t)[1], along(*args)

    tangents = jax.tree.map(jnp.cos, args)
    assert_close(*(jax.jit(functools.partial(derivatives, h))(args, tangents) for h in (f, g)))


def test_equals_full_logits(x64):
    (x, weights, bias, _), _, _ = arguments()
    scalar = lambda f: lambda *args: sum(jnp.sum(jnp.sin((0.5 + i) * out)) for i, out in enumerate(f(*args)))
    same(scalar(fused), scalar(full), (x, weights, bias, jnp.array(1.7)))


def test_statistics_have_derivatives(x64):
    """A loss made of the value and of the entropy and logsumexp that come beside it."""
    (x, weights, bias, a), labels, _ = arguments()

    def ours(x, weights):
        loss, found = linear_softmax_cross_entropy_with_statistics(
            x, labels, weights, bias=bias, token_weights=a, reduction="mean", ignore_index=4, chunk_size=CHUNK
        )
        return loss + jnp.sum(found.entropy**2) + 0.1 * jnp.sum(found.logsumexp**2)

    def plain(x, weights):
        z = x @ weights + bias[None]
        logp, counts = jax.nn.log_softmax(z), labels != 4
        entropy, lse = -jnp.sum(jnp.exp(logp) * logp, -1), jax.nn.logsumexp(z, -1)
        loss = -jnp.sum(jnp.where(counts, a * logp[jnp.arange(len(x)), labels], 0)) / jnp.sum(jnp.where(counts, a, 0))
        return loss + jnp.sum(jnp.where(counts, entropy**2 + 0.1 * lse**2, 0))

    same(ours, plain, (x, weights))


def log_probs(x, weights, bias):
    return fused(x, weights, bias, 1.0)[0]


def full_log_probs(x, weights, bias):
    return full(x, weights, bias, 1.0)[0]


def policy_loss(log_prob, old, reference, advantages, clip=0.2, beta=0.05):
    """GRPO: the clipped ratio, and the estimate r - 1 - log r of KL(policy ‖ reference)."""
    ratio = jnp.exp(log_prob - old)
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)
    return jnp.mean(beta * (jnp.expm1(reference - log_prob) - (reference - log_prob)) - gain)


def preference_loss(log_prob, reference, answers, beta=0.1):
    """DPO: tokens of answer 0 are preferred to those of answer 1."""
    gain = jax.ops.segment_sum(log_prob - reference, answers, 2)
    return -jax.nn.log_sigmoid(beta * (gain[0] - gain[1]))


@pytest.mark.parametrize("name", ["policy", "preference", "packed"])
def test_what_is_built_on_them(name, x64):
    (x, weights, bias, _), _, _ = arguments()
    old, reference = full_log_probs(x, 0.9 * weights, bias), full_log_probs(x[::-1], weights, bias)
    advantages, sequences = jnp.linspace(-1.0, 1.0, len(x)), jnp.array([0, 0, 0, 1, 1, 1, 1])
    loss = {
        "policy": lambda log_prob: policy_loss(log_prob, old, reference, advantages),
        "preference": lambda log_prob: preference_loss(log_prob, reference, sequences),
        "packed": lambda log_prob: -jnp.mean(jax.ops.segment_sum(log_prob, sequences, 2) / jnp.array([3.0, 4.0])),
    }[name]
    ours, plain = (functools.partial(lambda f, *args: loss(f(*args)), f) for f in (log_probs, full_log_probs))
    same(ours, plain, (x, weights, bias))


def test_ignored_tokens_are_zero_and_a_sure_token_keeps_its_digits():
    x, weights = jnp.array([[1.0], [0.0]]), jnp.array([[20.0, 0.0]])
    found = linear_softmax_log_probs(x, jnp.array([0, -1]), weights, ignore_index=-1)
    exact = np.log1p(np.exp(-20.0))
    np.testing.assert_allclose(found.log_prob, [-exact, 0.0], rtol=1e-6)
    np.testing.assert_allclose(found.entropy[0], exact + 20 * np.exp(-20.0) / (1 + np.exp(-20.0)), rtol=1e-6)
    assert not found.correct[1] and found.probability[1] == 0
    gradient = jax.grad(lambda x: linear_softmax_log_probs(x, jnp.array([0, 1]), weights).log_prob.sum())(x)
    np.testing.assert_allclose(gradient[0, 0], 20 * np.exp(-20.0) / (1 + np.exp(-20.0)), rtol=1e-6)
