"""The fused linear head: digits, rounding, number of matrix products, memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxsoftmax.linear_head import (
    default_chunk_size,
    linear_softmax_cross_entropy_loss,
    predict_temp_bytes,
)
from tests.linear_head.test_cross_entropy import SLOW, N, arguments, assert_close, full, fused

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize(
    "chunk_size,std", [(4, 4.0), pytest.param(1, 1.0, marks=SLOW), pytest.param(100, 4.0, marks=SLOW)]
)
def test_float32_any_chunk_and_layout(chunk_size, std):
    args, labels, _ = arguments(jnp.float32, std)
    grad = lambda f: jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))
    value, wanted = grad(functools.partial(full, labels))(*args)
    got = grad(functools.partial(fused, labels, chunk_size=chunk_size))(*args)
    assert_close(got, (value, wanted), ulps=16)
    x, weights, *rest = args
    tied = functools.partial(fused, labels, chunk_size=chunk_size, vocab_axis=0)
    value, (dx, dw, *others) = grad(tied)(x, weights.T, *rest)
    assert_close((value, (dx, dw.T, *others)), got, ulps=16)


def test_digits_of_a_sure_model():
    """The label leads by 20: loss and gradient at the label are about 2e-9, not 0."""
    x, weights, labels = jnp.ones((1, 1)), jnp.array([[20.0, 0.0]]), jnp.array([0])
    value, gradient = jax.value_and_grad(linear_softmax_cross_entropy_loss, 2)(x, labels, weights)
    exact = np.log1p(np.exp(-20.0))
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-exact, exact]], rtol=1e-6)


@pytest.mark.parametrize("precision,bound", [(None, 1.5), ("highest", 1.001)])
@pytest.mark.parametrize("std", [1.0, 4.0])
def test_bfloat16(std, precision, bound):
    """Sums in float32, rounded once: with float32 products as good as the exact gradient, rounded to bfloat16.

    By default the gradient in the logits is rounded as well, an error of the same size again: √2 of it in all.
    """
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (64, 32)).astype(jnp.bfloat16)
    weights = (std * jax.random.normal(keys[1], (32, 301)) / 32**0.5).astype(jnp.bfloat16)
    labels = jax.random.randint(keys[2], (64,), 0, 301)
    loss = functools.partial(linear_softmax_cross_entropy_loss, chunk_size=24, precision=precision)
    value, (dx, dw) = jax.jit(jax.value_and_grad(lambda x, w: loss(x, labels, w), (0, 1)))(x, weights)
    assert value.dtype == jnp.float32 and dx.dtype == dw.dtype == jnp.bfloat16
    f64 = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
    z = f64(x) @ f64(weights)
    p = np.exp(z - z.max(1, keepdims=True))
    g = p / p.sum(1, keepdims=True) - np.eye(301)[np.asarray(labels)]
    for got, wanted in ((dx, g @ f64(weights).T), (dw, f64(x).T @ g)):
        rounded = f64(jnp.asarray(wanted, jnp.float32).astype(jnp.bfloat16))
        assert np.linalg.norm(f64(got) - wanted) <= bound * np.linalg.norm(rounded - wanted)


def products(f, *args):
    """Matrix products that the compiled program holds, those of its loops once each."""
    text = jax.jit(f).lower(*args).compile().as_text()
    return text.count(" dot(")


def test_number_of_products():
    (x, weights, _, _), labels, _ = arguments(jnp.float32)
    f = lambda x, w: linear_softmax_cross_entropy_loss(x, labels, w, chunk_size=N)
    assert products(f, x, weights) == 1
    assert products(jax.value_and_grad(f), x, weights) == 2
    assert products(jax.value_and_grad(f, 1), x, weights) == 2
    assert products(jax.value_and_grad(f, (0, 1)), x, weights) == 3
    assert products(lambda *a: jax.jvp(f, a, a), x, weights) == 3
    none = lambda x, w: jnp.sum(linear_softmax_cross_entropy_loss(x, labels, w, chunk_size=N, reduction="none") ** 2)
    assert products(jax.grad(none, (0, 1)), x, weights) == 4
    hvp = lambda *a: jax.jvp(jax.grad(f, (0, 1)), a, (x + 1, weights - 1))[1]
    assert products(hvp, x, weights) == 7


def temp(f, *args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


RELEASE = tuple(int(part) for part in jax.__version__.split(".")[:2])

REUSES_BUFFERS = pytest.mark.skipif(RELEASE < (0, 10), reason="XLA keeps a second array of a chunk's logits")


@REUSES_BUFFERS
@pytest.mark.parametrize("vocab,chunk", [(4001, 32), (9000, 16)])
def test_memory_is_as_predicted(vocab, chunk):
    n, d = 512, 16
    x, weights, labels = jnp.zeros((n, d)), jnp.zeros((d, vocab)), jnp.zeros(n, jnp.int32)
    f = lambda x, w: 3 * linear_softmax_cross_entropy_loss(x, labels, w, chunk_size=chunk)
    used = temp(jax.value_and_grad(f, (0, 1)), x, weights)
    assert 0.75 <= predict_temp_bytes(n, d, vocab, chunk, platform="cpu") / used <= 1.25
    logits = 4 * n * vocab
    assert temp(lambda *a: jax.jvp(jax.grad(f, (0, 1)), a, a)[1], x, weights) <= logits / 4
    assert default_chunk_size(2048, 512, 32768, platform="cpu") * 32768 * 4 <= 64 << 20


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="JAX 0.6 leaves the other platforms' chunks in the text")
@pytest.mark.parametrize("options", [{"ignore_index": -1}, {"token_weights": jnp.ones(8192)}, {}], ids=str)
def test_chunks_on_an_accelerator_are_shorter_where_tokens_may_be_skipped(options):
    """A third less: with a third of the tokens left out, at most 0.7 of them are computed."""
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in [((8192, 8), "float32"), ((8, 16), "float32")]]
    loss = lambda x, w: linear_softmax_cross_entropy_loss(x, jnp.zeros(8192, jnp.int32), w, **options)
    text = export.export(jax.jit(loss), platforms=["cuda"])(*args).mlir_module()
    (chunk,) = {int(n) for n in re.findall(r"tensor<(\d+)x16xf32>", text)} - {8}
    assert chunk == (1368 if options else 2048)
    assert not options or -(-8192 * 2 // 3 // chunk) * chunk <= 0.7 * 8192


@REUSES_BUFFERS
@pytest.mark.parametrize("vocab_axis", [1, 0])
def test_memory_of_a_large_vocabulary(vocab_axis):
    """The chunk that the budget gives, in both layouts."""
    n, d, vocab = 2048, 16, 100_000
    x, weights = jnp.zeros((n, d)), jnp.zeros((d, vocab) if vocab_axis else (vocab, d))
    f = lambda x, w: linear_softmax_cross_entropy_loss(x, jnp.zeros(n, jnp.int32), w, vocab_axis=vocab_axis)
    used = temp(jax.value_and_grad(f, (0, 1)), x, weights)
    assert used <= 64 << 20
    assert 0.75 <= predict_temp_bytes(n, d, vocab, platform="cpu") / used <= 1.25


@pytest.mark.parametrize("size", [(4096, 16, 1000), (4, 16, 20_000), (4096, 16, 10**7), (0, 16, 100), (7, 0, 0)])
def test_chunks(size):
    """Nearly equal, no fewer than 32 tokens, and no more than saturate."""
    chunk = default_chunk_size(*size, platform="cpu")
    assert min(32, max(1, size[0])) <= max(chunk, 1) <= 512
    chunks = -(-max(1, size[0]) // chunk)
    assert chunk <= max(1, size[0]) and chunks * chunk - size[0] < 8 * chunks  # rounded up to whole vectors
