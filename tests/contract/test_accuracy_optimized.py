"""The goals of accuracy, for every public function, on the small regimes of tests/accuracy/.

2 eps (1 + κ) for values and gradients of float32, 20 eps |J||v| for products, 100 at gaps beyond 80; the value of a
loss of half-precision logits is as good as of float32, and what is half precision is within a unit of its last place.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp, mpf

import jaxsoftmax as js
from tests.accuracy import linear_head as linear
from tests.accuracy.measure import errors, linear_errors
from tests.helpers import one_in, only
from tests.registry import FUNCTIONS, HEADS
from tests.registry import formulas as exact
from tests.registry.samples import MASK, Z

pytestmark = pytest.mark.optimized

LABEL = "softmax_cross_entropy_with_integer_labels"
GOAL = {"value": 2, "vjp": 2, "jvp": 20, "hvp": 20}
HALF = ("bfloat16", "float16")

# (function, quantity), or with the dtype as well -> the goal that is reached, where it is another, and why.
OTHERS = {
    # p_c^γ: its exponent is γ times as large, and so is the error that the rounding of the gap leaves.
    ("focal_loss_with_integer_labels", "hvp"): 60,
    # The rounding of u counts γ = 2 times, beside that of L.
    ("sigmoid_focal_loss", "value"): 2.5,
    # Its two terms may cancel.
    ("sigmoid_focal_loss", "vjp"): 4,
    # p is a fourth power, 1/(α - 1), and has four times the error of its root.
    ("entmax(1.25)", "jvp"): 40,
    ("entmax(1.25)", "vjp"): 40,
    # A second derivative of 1e-290: of size exp(-2z/c), with z/c = 333, where the quotient is rounded.
    ("softcap_logits", "hvp", "float64"): 150,
    # x - z is that of four numbers, each of which was rounded when the logits were shifted.
    ("softmax_kl_divergence", "vjp"): 4,
    # tanh is good to 2 eps only, and loses half of its digits' worth of two more to log cosh.
    ("jensen_shannon_divergence", "value"): 4,
    # (z - max z)/T is rounded, and of the size of 24 in a tail, in float64 of 280; T = 2.5 is no power of 2.
    ("softmax_kl_divergence(options)", "hvp"): 40,
    ("softmax_entropy(options)", "hvp"): 40,
    ("softmax_kl_divergence(options)", "hvp", "float64"): 400,
    ("jensen_shannon_divergence(options)", "hvp"): 60,
    ("jensen_shannon_divergence(options)", "hvp", "float64"): 400,
    ("jensen_shannon_divergence(options)", "value"): 4,
    ("softmax_kl_divergence(options)", "vjp"): 4,
}


def goal(name: str, quantity: str, regime: str, dtype: str) -> float:
    function = FUNCTIONS[name]
    if regime == "gap to 100":
        return 100
    rounded = quantity == "vjp" or not function.loss and not name.startswith("J.")  # operators compute in float32
    if dtype in HALF and rounded:
        return 1
    # The derivatives of a map, and what a method of the operator returns, are products.
    product = function.product or not function.loss and quantity == "vjp" or function.order == 0
    usual = 20 if product else GOAL[quantity]
    return OTHERS.get((name, quantity, dtype), OTHERS.get((name, quantity), usual))


def missed(name: str, **run) -> dict:
    found = errors(name, quick=True, **run)
    assert found and all(np.isfinite(units) for units in found.values())
    return {k: u for k, u in found.items() if u > goal(name, *k, run.get("dtype", "float32"))}


@pytest.mark.parametrize("name", only({*[*FUNCTIONS][::2], "log_softmax", LABEL}, FUNCTIONS))
def test_float32(name):
    assert not missed(name, num_classes=5)


@pytest.mark.parametrize(
    "name",
    one_in(
        2, ["softmax", "focal_loss_with_integer_labels", LABEL, "jensen_shannon_divergence", "softmax_kl_divergence"]
    ),
)
def test_two_classes(name):
    assert not missed(name, num_classes=2)


@pytest.mark.parametrize(
    "name",
    one_in(
        2,
        [
            "log_softmax",
            "softmax_cross_entropy",
            "J.mv",
            "softmax_kl_divergence",
            "softcap_logits",
            "sigmoid_focal_loss",
        ],
    ),
)
def test_float64(name):
    assert not missed(name, num_classes=5, dtype="float64")


@pytest.mark.parametrize("name", one_in(8, [n for n, f in FUNCTIONS.items() if not (f.product or "options" in n)]))
def test_bfloat16(name):
    assert not missed(name, num_classes=5, dtype="bfloat16")


@pytest.mark.parametrize(
    "name",
    one_in(2, ["softmax", "sigmoid_focal_loss", f"{LABEL}(options)", "poly_loss_cross_entropy", "log_softmax"]),
)
def test_float16(name):
    assert not missed(name, num_classes=5, dtype="float16")


def test_the_harness_sees_what_others_lose(monkeypatch):
    """The plain formula of cross-entropy returns 0 at a gap of 20: an error of 1/eps."""
    found = errors(LABEL, num_classes=5, peer="optax", quick=True)
    assert found["value", "gap to 60"] > 1e5 and found["vjp", "gap to 60"] > 1e5
    logp = lambda args: jax.nn.log_softmax(args[0] @ args[1] + args[2][None, :])
    plain = lambda args, c, *_: {"value": -jnp.take_along_axis(logp(args), c[:, None], 1)[:, 0]}
    monkeypatch.setitem(linear.HEADS, "linear_cross_entropy", (linear.of_loss, plain))
    assert linear_errors("linear_cross_entropy", jit=False)["value", "gap to 60"] > 1e4


@jax.jit
def focal_and_derivatives(x, y):
    f = js.sigmoid_focal_loss
    return f(x, y), jax.grad(f)(x, y), jax.grad(jax.grad(f))(x, y)


@pytest.mark.parametrize("x", [-40.0, -20.0])
@pytest.mark.parametrize("y", [1e-9, 1e-30])
def test_label_so_small_that_1_less_it_is_1(x, y):
    """Value, gradient and second derivative of the focal loss, which has σ(-x) y / u in it."""
    x, y = np.float32(x), np.float32(y)
    found = focal_and_derivatives(x, y)
    formula = lambda z: exact.sigmoid_focal(z, [1], [mpf(float(y))])
    with mp.workdps(exact.digits([mpf(-80), mpf(0)])):
        want = [float(d.ravel()[0]) for d in exact.derivatives(formula, [mpf(float(x))])]
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-37)


# Linear heads: one goal for what a token has, one for gradients; sums over 1000 classes of a divergence are less exact.

LINEAR_GOAL = {"x": 2, "weights": 2, "bias": 2}
LINEAR_MANY = {"linear_kl": {"x": 5, "weights": 3}}


def linear_missed(name: str, goals: dict, **run) -> dict:
    found = linear_errors(name, **run)
    assert {regime for _, regime in found} == {"normal", "gap to 60", "gap to 100"}
    return {k: u for k, u in found.items() if not u <= goals.get(k[0], 1)}


over_heads = pytest.mark.parametrize("name", linear.HEADS)


@over_heads
@pytest.mark.parametrize("dtype", one_in(2, ["float32", "float64"]))
def test_linear_heads(name, dtype):
    assert not linear_missed(name, LINEAR_GOAL, dtype=dtype)


@pytest.mark.parametrize("name", one_in(3, linear.HEADS))
def test_linear_heads_of_many_classes(name):
    assert not linear_missed(name, LINEAR_GOAL | LINEAR_MANY.get(name, {}), num_classes=1000)


@pytest.mark.parametrize("name", one_in(3, linear.HEADS, 1))
def test_linear_heads_in_half_precision(name):
    assert not linear_missed(name, {}, dtype="bfloat16")


# What holds exactly.


@pytest.mark.parametrize("gap", [1.0, 20.0, 90.0])
def test_tangents_along_the_ones_vanish(gap):
    """J1 = 0 where one p is above 1/2; elsewhere to the rounding of Σp."""
    z = jnp.array([[gap, 0.0, -0.3, 0.1]])
    ones, p = jnp.ones_like(z), js.softmax(z)
    pulled, J = jax.vjp(js.softmax, z)[1](ones)[0], js.SoftmaxJacobian.from_logits(z)
    for product in (js.softmax_jvp(ones, p), js.softmax_vjp(ones, p), J.mv(ones), pulled):
        assert np.all(np.asarray(product) == 0) if gap > 1 else np.all(abs(np.asarray(product)) <= 1e-7)


@pytest.mark.parametrize("shift", [1.0, -64.0, 1024.0])
def test_shift_by_a_representable_constant_changes_nothing(shift):
    z = jnp.round(jnp.asarray(Z, jnp.float32) * 64) / 64
    x = jnp.round(jnp.asarray(Z[::-1], jnp.float32) * 64) / 64
    labels, y = jnp.array([1, 3, 0]), jnp.full(z.shape, 0.25)
    every = jax.jit(
        lambda z: [
            js.softmax(z),
            js.log_softmax(z),
            js.softmax_cross_entropy_with_integer_labels(z, labels),
            js.softmax_cross_entropy(z, y),
            js.softmax_kl_divergence(z, x),
            js.brier_loss(z, y),
            js.softmax_entropy(z),
            js.entmax15(z),
        ]
    )
    for unshifted, shifted in zip(every(z), every(z + shift)):
        np.testing.assert_array_equal(unshifted, shifted)


def test_divergences_and_losses_are_not_negative():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2000, 5)) * 10.0 ** rng.uniform(-4, 2, (2000, 1)), jnp.float32)
    near = x * (1 + jnp.asarray(rng.normal(size=x.shape) * 1e-6, jnp.float32)) + 3
    labels = jnp.argmax(x, -1)
    for loss in (
        js.softmax_kl_divergence(x, near),
        js.softmax_kl_divergence(near, x),
        js.jensen_shannon_divergence(x, near),
        js.softmax_cross_entropy_with_integer_labels(x, labels),
        js.softmax_cross_entropy(x, jax.nn.one_hot(labels, 5)),
        js.softmax_entropy(x),
        js.focal_loss_with_integer_labels(x, labels),
        js.brier_loss(x, jax.nn.one_hot(labels, 5)),
        js.log_cosh(x, near),
    ):
        assert np.all(np.asarray(loss) >= 0)
    assert np.all(np.asarray(js.softmax_kl_divergence(x, x)) == 0)


def test_gradient_of_a_masked_class_is_0():
    mask, z = jnp.asarray(MASK), jnp.asarray(Z, jnp.float32)
    labels, y = jnp.array([1, 3, 0]), jnp.where(mask, 0.3, 0.0)
    functions = (
        lambda z: js.softmax_cross_entropy_with_integer_labels(z, labels, where=mask),
        lambda z: js.softmax_cross_entropy(z, y, where=mask),
        lambda z: js.softmax(z, where=mask) ** 2,
        lambda z: js.logsumexp(z, -1, where=mask),
        lambda z: js.brier_loss(z, y, where=mask),
        lambda z: js.softmax_kl_divergence(z, -z, where=mask),
    )
    for gradient in jax.jit(lambda z: [jax.grad(lambda z: jnp.sum(f(z)))(z) for f in functions])(z):
        assert np.all(np.asarray(gradient)[~MASK] == 0)


NOT_HEADS = {
    "Curvature",
    "curvature_of",
    "logits_hessian",
    "logits_fisher",
    "logits_ggn",
    "softcap_logits",
    "weighted_mean",
}


def test_every_public_head_is_registered():
    heads = {getattr(js.losses, name) for name in js.losses.__all__ if name not in NOT_HEADS}
    assert not heads - {head.loss for head in HEADS}
