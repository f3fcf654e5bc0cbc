"""The curvature operators of every head against the formulas of the registry, and what they promise beyond them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mpf

from jaxsoftmax import losses
from jaxsoftmax.losses.hessian import Curvature, curvature_of, logits_fisher, logits_ggn, logits_hessian
from jaxsoftmax.losses.natural_gradient import natural_gradient_norm
from jaxsoftmax.operators.softmax_jacobian import SoftmaxJacobian
from tests.helpers import assert_close, one_in
from tests.registry import HEADS
from tests.registry import formulas as exact
from tests.registry.samples import LABELS, MASK, B, K

WITH_HESSIAN = [h for h in HEADS if h.hessian]
over_heads = pytest.mark.parametrize("head", WITH_HESSIAN, ids=lambda head: head.name)
CE = losses.softmax_cross_entropy_with_integer_labels
CONCAVE = losses.softmax_entropy
_rng = np.random.default_rng(5)
Z, X, V = _rng.normal(size=(3, B, K)) * 1.5
Y = _rng.dirichlet(np.ones(K), size=B)
TRANSFORMS = ({}, {"logit_softcap": 2.0, "logit_temperature": 1.5})


def arrays(*args) -> tuple:
    return tuple(jnp.asarray(a) for a in args)


def options_of(head) -> dict:
    options = dict(head.options[-1])
    return {**options, "where": jnp.asarray(MASK)} if head.has_where else options


def dense(head, logit_softcap=None, logit_temperature=1.0):
    """The Hessian of each example by the textbook's formula, (B, K, K), 0 at the masked classes."""

    def formula(z, n, *args, **options):
        capped = z if logit_softcap is None else [exact.softcap([x], n, logit_softcap) for x in z]
        return head.formula([x / mpf(logit_temperature) for x in capped], n, *args, **options)

    mask = MASK if head.has_where else np.ones((B, K), bool)
    through = dataclasses.replace(head, formula=formula)
    found = through.expected_of_rest(Z, mask, *head.args, order=2, **head.options[-1])[2].astype(float)
    return found[..., None] * np.eye(K) if head.elementwise else found


@pytest.mark.parametrize("head", one_in(3, WITH_HESSIAN), ids=lambda head: head.name)
@pytest.mark.parametrize("transform", one_in(2, TRANSFORMS, 1), ids=lambda t: "+".join(t) or "plain")
def test_every_method_against_the_dense_hessian(head, transform, x64):
    (z, v, *args), options = arrays(Z, V, *head.args), options_of(head)
    want = dense(head, **transform)

    @jax.jit
    def methods(z, v):
        h = logits_hessian(head.loss, z, *args, **options, **transform)
        assert h.shape == (B, K, K)
        products = h.as_matrix(), h.mv(v), h @ v[0], h.diagonal(), h.trace(), h.quadratic_form(v)
        return h.is_psd(), *products, h.solve(v, 20.0), h.logdet(20.0)

    damped = want + 20.0 * np.eye(K)
    expected = (
        want,
        np.einsum("bij,bj->bi", want, V),
        want @ V[0],
        np.einsum("bii->bi", want),
        np.einsum("bii->b", want),
        np.einsum("bi,bij,bj->b", V, want, V),
        np.linalg.solve(damped, V[..., None])[..., 0],
        np.linalg.slogdet(damped)[1],
    )
    is_psd, *found = methods(z, v)
    for got, right in zip(found, expected, strict=True):
        assert_close(got, right)
    np.testing.assert_array_equal(is_psd, np.linalg.eigvalsh(want).min(-1) > -1e-13)


@pytest.mark.parametrize("head", one_in(3, WITH_HESSIAN, 1), ids=lambda head: head.name)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: "+".join(t) or "plain")
def test_gauss_newton_is_a_square(head, transform, x64):
    """L Lᵀ = G, L and Lᵀ transposes of each other; G is the Hessian where that is convex and nothing caps it."""
    (z, v, *args), options = arrays(Z, V, *head.args), options_of(head)

    @jax.jit
    def methods(z, v):
        g = logits_ggn(head.loss, z, *args, **options, **transform)
        whole = g.as_matrix(), g.mv(v), g.is_psd()
        if head.loss is CONCAVE:
            return whole, ()
        columns = g.factor_rmv(v)
        u = jnp.cos(jnp.arange(columns.size, dtype=z.dtype)).reshape(columns.shape)
        transposed = jnp.sum(g.factor_mv(u) * v, -1), jnp.sum(u * columns, -1)
        return whole, (g.factor_mv(columns), *transposed, logits_hessian(head.loss, z, *args, **options).as_matrix())

    (matrix, product, is_psd), of_factor = methods(z, v)
    assert_close(product, np.einsum("bij,bj->bi", matrix, V))
    if head.loss is CONCAVE:
        assert not np.any(is_psd)
        return
    assert np.all(is_psd) and np.all(np.linalg.eigvalsh(matrix) > -1e-14)
    square, one, other, hessian = of_factor
    assert_close(square, product)
    assert_close(one, other)
    if not transform and head.loss not in NOT_CONVEX:
        assert_close(matrix, hessian)


NOT_CONVEX = (
    CE,  # z-loss, whose curvature lse J is left out
    losses.focal_loss_with_integer_labels,
    losses.poly_loss_cross_entropy,
    losses.brier_loss,
    losses.jensen_shannon_divergence,
    losses.sigmoid_focal_loss,
)


def test_gauss_newton_in_closed_form(x64):
    """(Σy) J for poly, f′J for focal, J² for Brier, J diag(φ″) J for Jensen-Shannon, (s) J + 2ζ ppᵀ for z-loss."""
    z, x, y, labels = arrays(Z, X, Y, LABELS)
    p, q = jax.nn.softmax(z), jax.nn.softmax(x)
    J = jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(p)
    pc = np.asarray(p)[np.arange(B), LABELS]
    slope = (1 - pc) ** 0.5 - 0.5 * (1 - pc) ** -0.5 * pc * np.log(pc)
    second = jax.vmap(jnp.diag)(0.5 / p - 0.5 / (p + q))
    spread = jax.vmap(jnp.diag)(jax.nn.sigmoid(z) * jax.nn.sigmoid(-z))
    outer = np.einsum("bi,bj->bij", p, p)
    for operator, want in (
        (logits_ggn(losses.poly_loss_cross_entropy, z, 2 * y), 2 * J),
        (logits_ggn(losses.focal_loss_with_integer_labels, z, labels, gamma=0.5), slope[:, None, None] * J),
        (logits_ggn(losses.brier_loss, z, y), J @ J),
        (logits_ggn(losses.jensen_shannon_divergence, z, x), J @ second @ J),
        (logits_ggn(losses.sigmoid_focal_loss, z, y, gamma=0.0), spread),
        (logits_ggn(CE, z, labels, z_loss=0.3), J + 0.6 * outer),
        (
            logits_fisher(CE, z, labels, z_loss=0.3, class_weights=jnp.arange(1.0, 5.0)),
            (LABELS + 1.0)[:, None, None] * J,
        ),
        (logits_ggn(CE, z, labels, logit_softcap=2.0), capped(z, 2.0)),
    ):
        assert_close(operator.as_matrix(), want)


def capped(z, cap):
    p, t = jax.nn.softmax(cap * jnp.tanh(z / cap)), 1 / jnp.cosh(z / cap) ** 2
    return jax.vmap(lambda p, t: jnp.diag(t * p * t) - jnp.outer(t * p, t * p))(p, t)


LIKELIHOODS = {
    "categorical": (CE, (LABELS,), {}),
    "one-hot": (losses.softmax_cross_entropy, (Y,), {}),
    "distillation": (losses.softmax_kl_divergence, (X,), {"temperature": 1.5}),
    "logistic": (losses.sigmoid_binary_cross_entropy, (Y,), {}),
    "normal": (losses.l2_loss, (X,), {}),
    "narrow normal": (losses.sum_squared_error, (X,), {}),
    "capped": (CE, (LABELS,), {"logit_softcap": 2.0}),
}


@pytest.mark.parametrize("case", LIKELIHOODS)
def test_fisher_is_the_covariance_of_the_gradient_at_sampled_targets(case, key, x64):
    loss, args, options = LIKELIHOODS[case]
    cap = options.get("logit_softcap")
    arguments = {name: value for name, value in options.items() if name != "logit_softcap"}
    z, count = jnp.asarray(Z), 20000
    fisher = logits_fisher(loss, z, *arrays(*args), **options)
    targets = fisher.sample_targets(key, (count,))
    assert targets.shape == (count, *args[0].shape) or targets.shape == (count, B, K)

    def gradient(t):
        x = (lambda z: z) if cap is None else lambda z: losses.softcap_logits(z, cap)
        return jax.grad(lambda z: jnp.sum(loss(x(z), t, **arguments)))(z)

    g = np.asarray(jax.jit(jax.vmap(gradient))(targets))
    products = g[:, :, :, None] * g[:, :, None, :]
    error = products.std(0) / np.sqrt(count)
    want = np.asarray(fisher.as_matrix())
    if case in ("logistic", "normal", "narrow normal"):  # targets of the elements are independent
        want = want + np.einsum("bi,bj->bij", g.mean(0), g.mean(0)) * (1 - np.eye(K))
    assert np.all(abs(products.mean(0) - want) <= 5 * error + 1e-12)
    assert np.all(abs(g.mean(0)) <= 5 * g.std(0) / np.sqrt(count) + 1e-12)


def test_mask_is_respected_by_sampled_targets(key):
    fisher = logits_fisher(CE, jnp.asarray(Z), jnp.asarray(LABELS), where=jnp.asarray(MASK))
    drawn = np.asarray(fisher.sample_targets(key, (2000,)))
    for i, mask in enumerate(MASK):
        assert set(np.unique(drawn[:, i])) == set(np.flatnonzero(mask))


def test_psd_exactly_where_the_formula_sheet_says(x64):
    """f′J + f″ggᵀ is positive semidefinite iff f′ + f″(1 - p_c)/p_c ≥ 0, across the border."""
    gaps = jnp.linspace(-6, 6, 101)
    z = jnp.stack([gaps, jnp.zeros(101), jnp.full(101, -0.7)], -1)
    labels = jnp.zeros(101, int)
    pc = np.asarray(jax.nn.softmax(z)[:, 0])
    u, L = 1 - pc, -np.log(pc)
    for gamma in (0.5, 2.0, 5.0):
        first = u**gamma + gamma * u ** (gamma - 1) * pc * L
        second = 2 * gamma * u ** (gamma - 1) * pc + gamma * (gamma - 1) * u ** (gamma - 2) * pc**2 * L
        second -= gamma * u ** (gamma - 1) * pc * L
        want = first + second * u / pc >= 0
        assert want.any() and not want.all()
        operator = logits_hessian(losses.focal_loss_with_integer_labels, z, labels, gamma=gamma)
        np.testing.assert_array_equal(operator.is_psd(), want)
        v = jnp.asarray(np.random.default_rng(0).normal(size=z.shape))
        square = np.asarray(operator.factor_mv(operator.factor_rmv(v)))
        assert_close(square[want], np.asarray(operator.mv(v))[want], rtol=1e-9)
        assert np.all(np.isnan(square[~want]))


def test_natural_gradient_norm(x64):
    z, labels = arrays(Z, LABELS)
    g = np.asarray(jax.nn.softmax(z)) - np.eye(K)[LABELS]
    J = np.asarray(logits_fisher(CE, z, labels).as_matrix())
    want = np.einsum("bi,bij,bj->b", g, np.linalg.pinv(J), g)
    assert_close(natural_gradient_norm(z, labels), want)
    assert_close(natural_gradient_norm(z, labels), np.expm1(CE(z, labels)))


def test_operators_pass_through_transformations(x64):
    z, labels, v = arrays(Z, LABELS, V)

    def product(z, label, v):
        return logits_hessian(losses.focal_loss_with_integer_labels, z, label).mv(v)

    batched = product(z, labels, v)
    assert_close(jax.vmap(product)(z, labels, v), batched)
    assert_close(jax.jit(product)(z, labels, v), batched)
    loss = functools.partial(losses.focal_loss_with_integer_labels, labels=labels)
    along = lambda f: lambda z: jax.jvp(f, (z,), (v,))[1]
    twice = along(jax.grad(lambda z: jnp.sum(loss(z))))
    assert_close(jax.jit(twice)(z), batched)
    assert_close(jax.jit(along(lambda z: product(z, labels, v)))(z), jax.jit(along(twice))(z), rtol=1e-10)
    operator = jax.jit(lambda z: logits_fisher(CE, z, labels))(z)
    assert jax.tree.structure(operator) == jax.tree.structure(logits_fisher(CE, z, labels))


def test_partial_carries_options(x64):
    z, labels = arrays(Z, LABELS)
    smooth = functools.partial(CE, z_loss=0.5)
    want = logits_hessian(CE, z, labels, z_loss=0.5).as_matrix()
    np.testing.assert_array_equal(logits_hessian(smooth, z, labels).as_matrix(), want)


def test_defaults_stand_in_the_loss_alone(monkeypatch):
    """The operator's rule is given every argument, defaults of the loss included."""
    monkeypatch.setattr("jaxsoftmax.losses.hessian._CURVATURE", {})
    given = {}

    def loss(logits, labels, gamma=3.5, *, axis_name=None):
        return logits

    @curvature_of(loss)
    def rule(**arguments):
        given.update(arguments)
        return Curvature(*2 * [SoftmaxJacobian.from_logits(arguments["logits"])])

    logits_hessian(loss, jnp.zeros(3), 1)
    assert given["gamma"] == 3.5 and given["labels"] == 1 and given["axis_name"] is None
    logits_hessian(functools.partial(loss, gamma=1.0), jnp.zeros(3), labels=2)
    assert given["gamma"] == 1.0 and given["labels"] == 2


def test_a_jitted_head_is_the_head():
    logits, label = jnp.array([2.0, 1.0, 0.5]), jnp.array(0)
    head = functools.partial(losses.focal_loss_with_integer_labels, gamma=0.5)
    want = logits_hessian(head, logits, label).as_matrix()
    np.testing.assert_array_equal(logits_hessian(jax.jit(head), logits, label).as_matrix(), want)
    with pytest.raises(TypeError, match="got focal_loss_with_integer_labels"):
        logits_hessian(jax.grad(losses.focal_loss_with_integer_labels), logits, label)


def test_gamma_may_be_one_per_example():
    """In value, gradient and Hessian; one traced out of its range gives NaN, in its own example."""
    logits, labels, gamma = jnp.asarray(Z, jnp.float32), jnp.asarray(LABELS), jnp.array([0.0, 0.5, 2.0])
    head = losses.focal_loss_with_integer_labels

    def all_of(z, label, gamma):
        H = logits_hessian(head, z, label, gamma=gamma).as_matrix()
        return head(z, label, gamma), jax.grad(lambda z: head(z, label, gamma).sum())(z), H

    got = all_of(logits, labels, gamma)
    for i, one in enumerate(gamma.tolist()):
        for x, want in zip(got, all_of(logits[i : i + 1], labels[i : i + 1], one)):
            assert_close(x[i], want[0])
    assert np.isnan(jax.jit(head)(logits, labels, jnp.array([0.0, -1.0, 2.0]))).tolist() == [False, True, False]


@pytest.mark.optimized
def test_digits_where_the_model_is_sure():
    """At a logit gap of 30 the float32 operators keep the digits that dense float32 algebra loses."""
    z = np.array([[30.0, 0.5, -1.0, 0.0]], "float32")
    labels, v = jnp.array([0]), np.array([[1.0, -0.5, 2.0, 0.3]], "float32")
    for loss, options in ((CE, {}), (losses.focal_loss_with_integer_labels, {"gamma": 0.5})):
        got = np.asarray(logits_hessian(loss, jnp.asarray(z), labels, **options).mv(jnp.asarray(v)))
        e = np.exp(z[0].astype(np.longdouble) - 30)
        u, q, w = e[1:].sum() / e.sum(), e[1:] / e[1:].sum(), v[0].astype(np.longdouble)
        # With s the margin: H v = F″ ∇s <∇s, v> - F′ (q∘(v - <q,v>)), by the softplus series at u = 1 - p_c → 0.
        gamma, L = options.get("gamma", 0.0), -np.log1p(-u)
        first = -(u**gamma) * (gamma * (1 - u) * L + u)
        second = u**gamma * (1 - u) * (gamma**2 * (1 - u) * L - gamma * u * L + (2 * gamma + 1) * u)
        grad = np.concatenate([[1], -q])
        want = second * grad * (grad @ w)
        want[1:] -= first * q * (w[1:] - q @ w[1:])
        np.testing.assert_allclose(got[0], want.astype("float64"), rtol=2e-5)


@pytest.mark.optimized
def test_no_dense_matrix_is_built():
    """K = 200 000, where K² numbers are 160 GB: products and solves take a few vectors."""
    z = jax.ShapeDtypeStruct((200_000,), jnp.float32)

    def work(z, v):
        h = logits_hessian(losses.brier_loss, z, v)
        return h.mv(v), h.solve(v, 0.5), h.logdet(0.5), h.trace()

    memory = jax.jit(work).lower(z, z).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 20 * 4 * 200_000


def test_a_head_of_ones_own_is_known_jitted_or_not():
    @jax.jit
    def doubled(logits, labels, factor=2.0):
        return factor * losses.softmax_cross_entropy_with_integer_labels(logits, labels)

    @curvature_of(doubled)
    def _(logits, labels, factor):
        H = factor * logits_hessian(losses.softmax_cross_entropy_with_integer_labels, logits, labels)
        return Curvature(H, H)

    z, label = jnp.array([2.0, 1.0, 0.5]), jnp.array(1)
    for head in (doubled, doubled.__wrapped__):
        got = logits_hessian(head, z, label, factor=3.0).as_matrix()
        np.testing.assert_allclose(got, jax.hessian(doubled)(z, label, 3.0), rtol=1e-5, atol=1e-7)
    with pytest.raises(TypeError, match="each of losses must be a function, got str"):
        curvature_of("doubled")
