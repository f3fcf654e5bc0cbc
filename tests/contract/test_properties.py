"""Properties that hold for every shape, axis, mask and dtype, over arguments drawn by hypothesis."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
from tests.helpers import VALUE_RTOL, assert_close, enable_x64, one_in

few = hypothesis.settings(max_examples=15)
ce = js.softmax_cross_entropy_with_integer_labels
JUNK = [0.0, np.nan, np.inf, -np.inf]
SHAPES = ((4,), (3, 4), (2, 3, 2))
MAPS = {"softmax": js.softmax, "log_softmax": js.log_softmax, "sparsemax": js.sparsemax, "entmax15": js.entmax15}


@st.composite
def logits(draw, shape=(3, 4), scale=8.0):
    seed = draw(st.integers(0, 2**32 - 1))
    size = draw(st.sampled_from([scale, 0.1, 0.0]))
    return size * np.random.default_rng(seed).normal(size=shape)


@st.composite
def calls(draw):
    """(logits, axis, mask): the axes negative or not, a tuple, or None; the mask of any shape that broadcasts."""
    shape = draw(st.sampled_from(SHAPES))
    z = draw(logits(shape))
    some = [axes for n in range(1, len(shape) + 1) for axes in itertools.permutations(range(-len(shape), 0), n)]
    axis = draw(st.sampled_from([None, *range(-len(shape), len(shape)), *some]))
    lengths = [draw(st.sampled_from([n, 1])) for n in shape]
    mask_shape = tuple(lengths[draw(st.integers(0, len(shape) - 1)) :])
    mask = np.random.default_rng(draw(st.integers(0, 99))).random(mask_shape) < 0.7
    return z, axis, draw(st.sampled_from([None, mask]))


def plain_softmax(z, axis, mask):
    """Softmax in float64 numpy over the axes, absent classes left out."""
    axes = tuple(range(z.ndim)) if axis is None else (axis if isinstance(axis, tuple) else (axis,))
    kept = np.broadcast_to(True if mask is None else mask, z.shape)
    e = np.where(kept, np.exp(z), 0)
    total = e.sum(axes, keepdims=True)
    return e / np.where(total == 0, 1, total), np.log(np.where(total == 0, 1, total)), total > 0, axes


@hypothesis.settings(few, max_examples=15)
@hypothesis.given(calls())
@hypothesis.example((np.cos(np.arange(12.0)).reshape(2, 3, 2), (-1, 0), None))  # a cycle of three axes
@hypothesis.example((np.cos(np.arange(4.0)).reshape(2, 2), 1, np.array([[False], [True]])))  # a slice without a class
def test_shapes_axes_and_masks(call):
    z, axis, mask = call
    p, lse, some, axes = plain_softmax(z, axis, mask)
    with enable_x64():
        got, logp = js.softmax(z, axis, mask), js.log_softmax(z, axis, mask)
        total = js.logsumexp(z, axis, keepdims=True, where=mask)
        entropy = js.softmax_entropy(z, axis, mask)
        uniform = js.softmax_cross_entropy(z, 1.0, axis, mask)
    np.testing.assert_allclose(got, p, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(np.exp(logp), p, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(total, np.where(some, lse, -np.inf), rtol=1e-12, atol=1e-13)
    surprise = -np.log(np.where(p == 0, 1, p))
    assert_close(entropy, (p * surprise).sum(axes))
    assert_close(uniform, surprise.sum(axes))


HEADS = {
    **MAPS,
    "logsumexp": lambda z: js.logsumexp(z, -1),
    "entropy": js.softmax_entropy,
    "integer": lambda z: ce(z, jnp.full(z.shape[:-1], 2)),
    "soft": lambda z: js.softmax_cross_entropy(z, jnp.array([0.5, 0.25, 0.25, 0.0], z.dtype)),
    "focal": lambda z: js.focal_loss_with_integer_labels(z, jnp.full(z.shape[:-1], 2)),
    "poly": lambda z: js.poly_loss_cross_entropy(z, jnp.array([0.5, 0.25, 0.25, 0.0], z.dtype)),
    "kl": lambda z: js.softmax_kl_divergence(z, jnp.array([0.0, 1.0, -1.0, 3.0], z.dtype)),
    "brier": lambda z: js.brier_loss(z, jnp.array([0.0, 0.0, 1.0, 0.0], z.dtype)),
}


@functools.cache
def compiled(name: str):
    """The value, and the value of shifted logits."""
    return jax.jit(lambda z, shift: (HEADS[name](z), HEADS[name](z + shift)))


@few
@hypothesis.given(z=logits(), shift=st.integers(-1000, 1000))
@pytest.mark.parametrize("name", HEADS)
def test_a_shift_changes_nothing(name, z, shift):
    with enable_x64():
        value, shifted = map(np.asarray, compiled(name)(jnp.asarray(z), jnp.asarray(float(shift))))
        eager = HEADS[name](jnp.asarray(z))
    assert_close(eager, value, VALUE_RTOL["float64"])
    moved = shifted - shift if name == "logsumexp" else shifted
    np.testing.assert_allclose(moved, value, rtol=1e-11, atol=1e-11)  # z + shift is rounded by 1e-13


@few
@hypothesis.given(z=logits((4,)), order=st.permutations(range(4)))
@pytest.mark.parametrize("name", [*MAPS, "logsumexp", "entropy"])
def test_permutations_of_the_classes(name, z, order):
    order = np.array(order)
    with enable_x64():
        value, moved = (np.asarray(HEADS[name](jnp.asarray(x))) for x in (z, z[order]))
    assert_close(moved, value[order] if value.ndim else value)


# Logits, which classes there are (None: those that are not -inf), weights of the classes.
MASKED = {
    **{name: lambda z, w, y, f=f: f(z, where=w) for name, f in MAPS.items() if name != "log_softmax"},
    "log_softmax": lambda z, w, y: jnp.where(z > -jnp.inf if w is None else w, js.log_softmax(z, where=w), 0.0),
    "logsumexp": lambda z, w, y: js.logsumexp(z, where=w),
    "entmax(3)": lambda z, w, y: js.entmax(z, jnp.asarray(3.0), where=w),
    "soft": lambda z, w, y: js.softmax_cross_entropy(z, y, where=w),
    "smoothed": lambda z, w, y: ce(z, jnp.nanargmax(y), where=w, label_smoothing=0.2),
    "entmax of soft labels": lambda z, w, y: js.entmax_loss(z, y, where=w),
}


@functools.cache
def derivatives(name: str):
    """Value, gradient, and its derivative, by the modes of each order."""

    def of(z, v, w, y):
        f = lambda z: MASKED[name](z, w, y)
        scalar = lambda z: jnp.sum(f(z) * v if f(z).ndim else f(z))
        gradient = jax.grad(scalar)
        pushed = jax.jacfwd(scalar)(z)
        return f(z), gradient(z), pushed, jax.jvp(gradient, (z,), (v,))[1], jax.grad(lambda z: gradient(z) @ v)(z)

    return jax.jit(of)


@few
@hypothesis.given(z=logits((4,)), kept=st.lists(st.integers(0, 3), min_size=1, unique=True), junk=st.sampled_from(JUNK))
@pytest.mark.parametrize("name", one_in(3, MASKED))
def test_a_masked_problem_is_the_compressed_one(name, z, kept, junk):
    """At every order, whatever stands behind the mask; a logit of -inf is as good as a mask."""
    kept, v = np.sort(np.array(kept)), np.array([0.5, -1.0, 2.0, 0.25])
    mask = np.isin(np.arange(4), kept)
    y = np.where(mask, [0.1, 0.2, 0.3, 0.4], 0)
    of = derivatives(name)
    with enable_x64():
        want = of(z[kept], v[kept], None, y[kept])
        with jax.debug_nans(True):
            found = [of(np.where(mask, z, junk), v, mask, np.where(mask, y, np.nan))]
        if name != "smoothed":  # which counts the classes
            found.append(of(np.where(mask, z, -np.inf), v, None, y))
    for got in found:
        for x, right in zip(map(np.asarray, got), want):
            assert_close(x[kept] if x.ndim else x, right)
            assert not x.ndim or np.all(x[~mask] == 0)


NUMBERS = np.array([[1.0, -2.0, 0.5], [3.0, 0.0, 0.25]])  # exact in every dtype
DTYPES = ("float16", "bfloat16", "float32", "float64")
wide = {"float16": "float32", "bfloat16": "float32"}


@few
@hypothesis.given(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans())
def test_dtypes_mixed(first, second, x64):
    """Maps return the dtype of their argument, losses the common one, float32 at least; the numbers are the same."""
    with enable_x64() if x64 else jax.disable_jit(False):
        if not x64 and "float64" in (first, second):
            return
        want = js.softmax_cross_entropy(jnp.asarray(NUMBERS, "float32"), jnp.asarray(NUMBERS**2, "float32"))
        assert (
            js.softmax(jnp.asarray(NUMBERS, first)).dtype == js.softmax(NUMBERS.astype(jnp.dtype(first))).dtype == first
        )
        for z, y in itertools.product((np.asarray, jnp.asarray), repeat=2):
            z, y = z(NUMBERS.astype(jnp.dtype(first))), y((NUMBERS**2).astype(jnp.dtype(second)))
            loss = js.softmax_cross_entropy(z, y)
            dtypes = {wide.get(first, first), wide.get(second, second)}
            assert loss.dtype == max(dtypes)
            np.testing.assert_allclose(loss, want, rtol=1e-6)


def test_lists_scalars_and_weak_types():
    want = np.asarray(js.softmax(jnp.asarray(NUMBERS, "float32")))
    for z in (
        NUMBERS.astype(np.float32),
        NUMBERS.tolist(),
        [[jnp.asarray(x) for x in row] for row in NUMBERS.tolist()],
    ):
        assert_close(js.softmax(z), want)
    loss = ce(jnp.asarray(NUMBERS, "float32"), [0, 2])
    for label in (np.array([0, 2], np.uint8), jnp.array([0, 2], "int8"), (0, 2)):
        np.testing.assert_array_equal(ce(jnp.asarray(NUMBERS, "float32"), label), loss)
    one = ce(NUMBERS[0].astype(np.float32), np.int64(0))
    assert one == ce(NUMBERS[0].astype(np.float32), 0) == loss[0]
    for number in (0.5, np.float64(0.5), np.float32(0.5), jnp.asarray(0.5), jnp.asarray(0.5, "bfloat16")):
        z = jnp.asarray(NUMBERS, "bfloat16")
        assert js.softmax_kl_divergence(z, z * 2, temperature=number).dtype == jnp.float32
        assert js.sigmoid_binary_cross_entropy(z, 1, pos_weight=number).dtype == jnp.float32
        assert js.sigmoid_focal_loss(z, True, gamma=number).dtype == jnp.float32
        assert js.entmax(z, 1 + number).dtype == jnp.bfloat16
        smoothed = ce(z, [0, 2], label_smoothing=number, z_loss=number)
        assert smoothed.dtype == jnp.float32
