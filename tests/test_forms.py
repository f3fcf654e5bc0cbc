"""The form of a CPU is the plain line: value and derivatives, infinities, ties, half precision, masks."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxsoftmax as js
from jaxsoftmax._core import centring, forms, forms_of_two
from tests.helpers import enable_x64

INF = np.inf
Z = np.array(
    [[1.0, 2.0, 3.0], [20.0, 0.0, -1.0], [2.0, 2.0, -90.0], [INF, 0.0, -INF], [INF, INF, 0.0], [-INF, 0.0, 5.0]]
)
X = Z[[1, 0, 3, 2, 0, 5]]
LABELS = np.array([2, 0, 1, 0, 1, 2])
MASK = np.array([[True, True, False]] * len(Z))


@pytest.fixture
def as_elsewhere(monkeypatch):
    """Programs lowered for this CPU get the lines that another platform gets."""
    chosen = jax.lax.platform_dependent

    def switch(platform: str | None):
        plain = lambda *args, default, **forms: forms.get(platform, default)(*args)
        jax.clear_caches()  # rules are traced once
        monkeypatch.setattr(jax.lax, "platform_dependent", plain if platform else chosen)

    yield switch
    monkeypatch.undo()
    jax.clear_caches()


def everything(dtype):
    z, x = jnp.asarray(Z, dtype), jnp.asarray(X, dtype)
    y, g = jnp.asarray(np.abs(np.cos(Z.size + np.arange(Z.size))).reshape(Z.shape), dtype), jnp.ones(Z.shape, dtype) / 3
    losses = {
        "logsumexp": lambda z: js.logsumexp(z, -1),
        "integer": lambda z: js.softmax_cross_entropy_with_integer_labels(z, LABELS),
        "z_loss": lambda z: js.softmax_cross_entropy_with_integer_labels(z, LABELS, z_loss=0.25),
        "natural_gradient_norm": lambda z: js.natural_gradient_norm(z, LABELS),
        "soft": lambda z: js.softmax_cross_entropy(z, y),
        "entropy": js.softmax_entropy,
        "focal": lambda z: js.focal_loss_with_integer_labels(z, LABELS),
        "poly": lambda z: js.poly_loss_cross_entropy(z, y),
        "brier": lambda z: js.brier_loss(z, y),
        "kl": lambda z: js.softmax_kl_divergence(z, x),
        "jensen_shannon": lambda z: js.jensen_shannon_divergence(z, x),
        "masked": lambda z: js.softmax_entropy(z, where=MASK),
        "softmax": lambda z: jnp.sum(js.softmax(z) * y, -1),
        "log_softmax": lambda z: jnp.sum(jnp.where(z > -10, js.log_softmax(z), 0) * y, -1),
    }

    def of(loss, z):
        gradient = jax.grad(lambda z: jnp.sum(loss(z)))
        return loss(z), gradient(z), jax.jvp(loss, (z,), (g,))[1], jax.jvp(gradient, (z,), (g,))[1]

    return jax.jit(lambda z: {name: of(loss, z) for name, loss in losses.items()})(z)


@pytest.mark.skipif(
    not hasattr(jax, "shard_map"), reason="XLA's CPU backend of JAX 0.6 drops a NaN of the others' lines"
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("platform, rows", [("cuda", forms.ROWS), ("cuda", 2), ("tpu", forms.ROWS)])
def test_forms_agree(as_elsewhere, monkeypatch, platform, rows, dtype):
    """To the roundings of a few sums, entry by entry; NaN and infinities in the same places. At 2 rows are long."""
    as_elsewhere(None)
    here = everything(dtype)
    monkeypatch.setattr(forms, "ROWS", rows)
    as_elsewhere(platform)
    there = everything(dtype)
    eps = 1e-6 if dtype == "float32" else 1e-2
    for name in here:
        for got, want in zip(here[name], there[name], strict=True):
            got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
            far = np.abs(want) > 1e30  # a divergence that is infinite: its derivatives are huge numbers
            got, want = (np.where(far, np.sign(a), a) for a in (got, want))
            np.testing.assert_allclose(got, want, rtol=20 * eps, atol=eps, err_msg=name)


@pytest.mark.parametrize("platform", [None, "cuda", "tpu"])
def test_near_logits(as_elsewhere, platform):
    """Jensen-Shannon where the logits differ by millionths, as in float64: there two logarithms leave ρ no digits."""
    rng = np.random.default_rng(0)
    z = rng.integers(-16, 16, (50, 20)) / 4
    x = z + rng.integers(-8, 9, z.shape) * 2.0**-20  # exact in float32, and so are the differences from the maximum
    as_elsewhere(platform)

    def found(dtype):
        with enable_x64() if dtype == "float64" else contextlib.nullcontext():
            loss = lambda x: jnp.sum(js.jensen_shannon_divergence(x, jnp.asarray(z, dtype)))
            return [np.asarray(a, np.float64) for a in jax.value_and_grad(loss)(jnp.asarray(x, dtype))]

    for got, want in zip(found("float32"), found("float64")):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.max(np.abs(want)))


def arguments(*arrays):
    z = [jnp.asarray(a, jnp.float32) for a in arrays]
    return [*z, *(jnp.max(a, -1, keepdims=True) for a in z)]


PAIRS = {
    "below": (forms.below, arguments(Z)),
    "shift": (lambda z, m: jnp.exp(forms.shift(z, m)), arguments(Z)),
    "leave_top_out": (functools.partial(forms.leave_top_out, axis=1), arguments(Z)),
    "maximum": (functools.partial(forms.maximum, axes=(1,)), [jnp.asarray(Z, jnp.bfloat16)]),
    "apart": (lambda *a: jnp.clip(forms_of_two.apart(*a)[2], -1e30, 1e30), arguments(Z, X)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_each_pair(as_elsewhere, name):
    form, args = PAIRS[name]
    found = []
    for platform in (None, "cuda"):
        as_elsewhere(platform)
        found.append(np.asarray(jax.jit(lambda *a: form(*a))(*args), np.float64))
    np.testing.assert_allclose(*found, rtol=1e-6)


@pytest.mark.parametrize("form", [centring._in_one_kernel, centring._in_one_pass, centring._in_two_passes])
def test_each_form_of_a_vector_measured_from_its_mean(form):
    """v - r, 0 at the top class, and its mean under p."""
    p = np.array([[0.25, 0.5, 0.25], [1 - 1e-6, 1e-6, 0.0], [0.0, 1.0, 0.0]], np.float32)
    v = np.array([[1.0, -2.0, 3.0], [3.0, 4.0, 5.0], [7.0, 1e20, 8.0]], np.float32)
    w, mean = form(jnp.asarray(v), jnp.asarray(p), axis=1, above=0.5)
    top = p > 0.5
    expected = np.where(top, 0.0, v - np.sum(v, -1, where=top, keepdims=True))
    np.testing.assert_allclose(w, expected, rtol=1e-6)
    np.testing.assert_allclose(mean, np.sum(p * expected, -1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("form", [centring._transpose, centring._transpose_on_cpu, centring._transpose_in_passes])
def test_each_form_of_the_transpose(form):
    """y - p Σy, at the top class without the cancellation of y and py."""
    p = np.array([[0.25, 0.5, 0.25], [1 - 1e-6, 1e-6, 0.0], [0.0, 1.0, 0.0]], np.float32)
    y = np.array([[1.0, -2.0, 3.0], [3.0, 4.0, 5.0], [7.0, 1e20, 8.0]], np.float32)
    top, wide = p > 0.5, y.astype(np.float64)
    rest, others = (np.sum(x, -1, where=~top, keepdims=True, dtype=np.float64) for x in (p, y))
    expected = np.where(top, wide * rest - p * others, wide - p * wide.sum(-1, keepdims=True))
    np.testing.assert_allclose(form(jnp.asarray(y), jnp.asarray(p), axis=1, above=0.5), expected, rtol=1e-6)


@pytest.mark.parametrize("labels", [None, [0, 1, 2, 0, 1, 2]])
def test_a_product_beside_the_sums_keeps_its_digits(as_elsewhere, labels):
    """Jv for the softmax, with and without a class left out, as in float64; where one p is near 1 and at a tie."""
    as_elsewhere("cuda")
    z = np.array([[40.0, 1, -3], [2, 2, -80], [0, 18, 2], [0.5, 0, 1], [-2, 30, 0], [1, -1, 60]], np.float32)
    v = np.array([[1e3, -2, 3], [5, 1, 2], [1, 1e4, 2], [1, 2, 3], [7, -1e3, 1], [1, 2, -1e4]], np.float32)
    kept = np.ones(z.shape, bool) if labels is None else np.arange(3) != np.array(labels)[:, None]
    e = np.where(kept, np.exp(z - z.max(-1, keepdims=True).astype(float)), 0)
    p = e / e.sum(-1, keepdims=True)
    J = np.array([[[-a * b * (i != k) for k, b in enumerate(q)] for i, a in enumerate(q)] for q in p])
    J -= np.eye(3) * J.sum(-1, keepdims=True)  # p(1 - p) as the sum of the others
    m, label = jnp.max(z, -1, keepdims=True), None if labels is None else jnp.array(labels)[:, None]
    total = jnp.sum(jnp.asarray(e, jnp.float32), -1, keepdims=True)
    got = centring.product_beside(jnp.asarray(v), None, 1, jnp.asarray(z), m, total, label)
    allowed = 8 * np.finfo(np.float32).eps * np.einsum("nij,nj->ni", abs(J), abs(v))
    assert np.all(abs(got - np.einsum("nij,nj->ni", J, v)) <= allowed)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_forms_of_the_linear_head_agree(as_elsewhere, platform):
    """Value to third derivative, where the model is sure, right and wrong, at ties and for a class that is left out."""
    x = jnp.asarray(np.c_[Z[:3], [5.0, 2.0, 1.0]], jnp.float32)
    theta, t = (x, jnp.eye(4)), (jnp.cos(x), jnp.sin(jnp.arange(16.0)).reshape(4, 4))
    bias = jnp.array([0.0, 0.0, 0.0, -INF])
    loss = lambda x, weights: js.linear_softmax_cross_entropy_loss(x, jnp.array([2, 1, 0]), weights, bias=bias)
    along = lambda f: lambda *theta: jax.jvp(f, theta, t)[1]
    found = []
    for chosen in (None, platform):
        as_elsewhere(chosen)
        of = lambda *theta: (loss(*theta), gradient(*theta), along(gradient)(*theta), along(along(gradient))(*theta))
        gradient = jax.grad(loss, (0, 1))
        found.append(jax.jit(of)(*theta))
    for here, there in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(here, there, rtol=2e-6, atol=1e-6 * np.max(np.abs(here)))


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="JAX 0.6 leaves a choice by a constant, which XLA takes out")
def test_a_program_is_lowered_with_the_form_of_its_machine():
    """Exported for a GPU, a program has none of the CPU's barriers."""
    lse = jax.jit(lambda z: js.logsumexp(z, -1))
    text = {
        machine: str(export.export(lse, platforms=[machine])(jnp.ones((4, 5))).mlir_module())
        for machine in ("cpu", "cuda")
    }
    assert "optimization_barrier" in text["cpu"] and "optimization_barrier" not in text["cuda"]
