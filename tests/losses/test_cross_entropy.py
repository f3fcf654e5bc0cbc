"""Softmax cross-entropy: accuracy, labels and masks, options against plain float64, residuals, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js

INF, NAN = np.inf, np.nan
ce = js.softmax_cross_entropy_with_integer_labels


def plain(logits, labels, *, label_smoothing=0.0, class_weights=None, ignore_index=None, z_loss=0.0, where=None):
    """The definition, example by example, in float64 numpy."""
    out = []
    for i, (z, c) in enumerate(zip(np.asarray(logits, np.float64), labels)):
        here = np.ones(len(z), bool) if where is None else where[i]
        w = np.ones(len(z)) if class_weights is None else np.asarray(class_weights, np.float64)
        lse = np.log(np.exp(z[here] - z[here].max()).sum()) + z[here].max()
        nll = lse - z
        loss = (1 - label_smoothing) * w[c] * nll[c] + label_smoothing / here.sum() * (w * nll)[here].sum()
        out.append(0.0 if c == ignore_index else loss + z_loss * lse**2)
    return np.array(out)


@jax.jit
def values_and_jacobian(z, labels):
    """Loss, gradient of the second example's loss, Jacobian."""
    f = lambda z: ce(z, labels)
    return f(z), jax.grad(lambda z: f(z)[1])(z), jax.jacfwd(f)(z)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
@pytest.mark.parametrize("label", [-1, 4, -100, 255, 2**31 - 1, -(2**31)])
def test_label_outside_the_range(label, dtype):
    info = np.iinfo(dtype)
    if not info.min <= label <= info.max:
        pytest.skip("not a number of this dtype")
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
    labels = jnp.asarray(np.array([label, 1], dtype))
    loss, gradient, jacobian = map(np.asarray, values_and_jacobian(z, labels))
    for value in (loss, np.asarray(ce(z, labels))):
        assert np.isnan(value[0]) and np.isfinite(value[1])
    assert np.all(np.isnan(jacobian[0, 0])) and np.all(np.isfinite(jacobian[1, 1]))
    np.testing.assert_allclose(gradient[1], jax.nn.softmax(z[1]) - np.eye(4)[1], rtol=1e-5, atol=1e-7)


def test_special_logits():
    losses = lambda z, labels, y: (ce(z, labels), js.softmax_cross_entropy(z, y))
    every = jax.jit(lambda *args: (losses(*args), jax.jacrev(losses)(*args), jax.jacfwd(losses)(*args)))
    for logits, label, loss, gradient in [
        ([-INF, 0.0, 1.0], 0, INF, [-1.0, 0.26894143, 0.7310586]),
        ([-INF, 0.0, 1.0], 2, 0.3132617, [0.0, 0.26894143, -0.26894143]),
        ([INF, 0.0, -INF], 0, 0.0, [0.0, 0.0, 0.0]),
        ([INF, 0.0, -INF], 1, INF, [1.0, -1.0, 0.0]),
        ([INF, INF, 0.0], 0, np.log(2.0), [-0.5, 0.5, 0.0]),
        ([-INF] * 3, 0, NAN, [NAN] * 3),
        ([NAN, 0.0, 0.0], 1, NAN, [NAN] * 3),
    ]:
        labels = np.array([label, 0])
        values, *jacobians = every(np.float32([logits, [0.0] * 3]), labels, np.eye(3, dtype=np.float32)[labels])
        for value in values:
            np.testing.assert_allclose(value, [loss, np.log(3.0)], rtol=1e-6)
        for jacobian in map(np.asarray, jax.tree.leaves(jacobians)):
            np.testing.assert_allclose(jacobian[0, 0], gradient, rtol=1e-6)
            np.testing.assert_allclose(jacobian[1, 1], [-2 / 3, 1 / 3, 1 / 3], rtol=1e-6)


def test_soft_label_of_zero_on_an_excluded_class():
    z, y = jnp.array([0.0, -INF, 1.0]), jnp.array([0.5, 0.0, 0.5])
    loss = js.softmax_cross_entropy(z, y)
    np.testing.assert_allclose(loss, js.softmax_cross_entropy(z[::2], y[::2]), rtol=1e-6)
    dz, dy = jax.grad(js.softmax_cross_entropy, (0, 1))(z, y)
    assert dz[1] == 0 and dy[1] == 0 and np.all(np.isfinite(dy))
    assert js.softmax_cross_entropy(z, jnp.array([0.5, 0.1, 0.4])) == INF
    assert js.safe_softmax_cross_entropy(z, y) == loss


DERIVATIVES = jax.jacfwd, jax.jacrev, jax.hessian


def test_masks():
    z = jnp.array([[1.0, 2.0, NAN], [5.0, INF, -INF], [0.0, 1.0, 2.0]])
    classes = np.array([[True, True, False], [False] * 3, [True] * 3])
    examples = np.array([True, False, True])
    labels, soft = jnp.array([0, 1, 2]), jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    want = [np.log1p(np.e), 0.0, ce(z[2], 2)]
    with jax.debug_nans(True):
        for f in (lambda z: ce(z, labels, where=classes), lambda z: js.softmax_cross_entropy(z, soft, where=classes)):
            np.testing.assert_allclose(f(z), want, rtol=1e-6)
            op_by_op = jax.grad(lambda z, f=f: f(z).sum())(z)
            assert np.all(np.asarray(op_by_op)[~classes] == 0)
            for derivative in map(np.asarray, jax.jit(lambda z: [d(f)(z) for d in DERIVATIVES])(z)):
                assert np.all(derivative[1] == 0) and np.all(derivative[0, ..., 0, 2] == 0)
        of_examples = lambda z: ce(z, labels, where=examples)
        loss, jacobian = jax.jit(lambda z: (of_examples(z), jax.jacrev(of_examples)(z)))(z.at[0, 2].set(0.0))
        np.testing.assert_allclose(loss[1:], want[1:], rtol=1e-6)
        assert np.all(np.asarray(jacobian)[1] == 0)
    assert ce(z[0], 2, where=classes[0]) == INF  # a label on a masked class


def test_ignored_example_may_hold_anything():
    z, labels = jnp.array([[NAN, INF, 0.0], [0.0, 1.0, 2.0]]), jnp.array([-100, 1])
    loss, gradient = jax.value_and_grad(lambda z: ce(z, labels, ignore_index=-100).sum())(z)
    np.testing.assert_allclose(loss, ce(z[1], 1), rtol=1e-6)
    assert np.all(np.asarray(gradient[0]) == 0)


def test_axes(x64):
    rng = np.random.default_rng(0)
    z, labels = rng.normal(size=(3, 4, 5)), rng.integers(0, 4, (3, 5))
    want = plain(np.moveaxis(z, 1, 2).reshape(-1, 4), labels.ravel()).reshape(3, 5)
    np.testing.assert_allclose(ce(z, labels, axis=1), want, rtol=1e-13)
    np.testing.assert_allclose(ce(z, labels, axis=-2), want, rtol=1e-13)
    both = rng.integers(0, 20, 3)
    np.testing.assert_allclose(ce(z, both, axis=(1, 2)), plain(z.reshape(3, 20), both), rtol=1e-13)
    flipped = plain(np.moveaxis(z, 2, 1).reshape(3, 20), both)
    np.testing.assert_allclose(ce(z, both, axis=(2, 1)), flipped, rtol=1e-13)
    y = rng.uniform(size=z.shape)
    np.testing.assert_allclose(js.softmax_cross_entropy(z, y, axis=None), -(y * jax.nn.log_softmax(z, None)).sum())


def test_class_weights_alone():
    """Loss and gradient of an example are those without weights, times its label's."""
    z, labels = jnp.asarray(np.random.default_rng(5).normal(size=(4, 3)), jnp.float32), jnp.array([0, 2, 1, 2])
    weights = jnp.array([0.5, 2.0, 3.0])
    head = js.softmax_cross_entropy_with_integer_labels
    np.testing.assert_allclose(head(z, labels, class_weights=weights), weights[labels] * head(z, labels), rtol=1e-6)
    got = jax.grad(lambda z: jnp.sum(head(z, labels, class_weights=weights)))(z)
    plain = jax.grad(lambda z: jnp.sum(head(z, labels)))(z)
    np.testing.assert_allclose(got, weights[labels, None] * plain, rtol=1e-6)


def test_label_smoothing_may_be_one_per_example(x64):
    rng = np.random.default_rng(6)
    z, labels, smooth = rng.normal(size=(3, 4)), np.array([0, 2, 3]), np.array([0.0, 0.25, 1.0])
    want = [plain(z[i : i + 1], labels[i : i + 1], label_smoothing=smooth[i])[0] for i in range(3)]
    loss = lambda z, smooth: ce(z, labels, label_smoothing=smooth)
    np.testing.assert_allclose(loss(z, smooth), want, rtol=1e-13)
    soft = lambda z, smooth: js.softmax_cross_entropy(z, np.eye(4)[labels], label_smoothing=smooth)
    np.testing.assert_allclose(jax.jit(soft)(z, smooth), want, rtol=1e-13)
    for head in (loss, soft):  # linear in it
        by_smoothing = jax.jacrev(head, 1)(z, smooth)
        np.testing.assert_allclose(by_smoothing, np.diag(head(z, np.ones(3)) - head(z, np.zeros(3))), rtol=1e-12)
    H = js.logits_hessian(ce, jnp.asarray(z), labels, label_smoothing=smooth)
    np.testing.assert_allclose(H.as_matrix(), jax.vmap(jax.hessian(ce))(z, labels), rtol=1e-12, atol=1e-14)


def test_soft_labels_are_smoothed_as_in_torch(x64):
    """Over the classes that are there, and weighted afterwards."""
    rng = np.random.default_rng(7)
    z, y, w = rng.normal(size=(2, 4)), rng.uniform(size=(2, 4)), rng.uniform(size=4)
    here = np.array([[True, False, True, True], [True, True, True, True]])
    got = js.softmax_cross_entropy(z, y, where=here, label_smoothing=0.25, class_weights=w)
    for i, kept in enumerate(here):
        smooth = w[kept] * (0.75 * y[i, kept] + 0.25 / kept.sum())
        np.testing.assert_allclose(got[i], -smooth @ jax.nn.log_softmax(z[i, kept]), rtol=1e-13)
