"""The Frobenius product's rules, the two layouts, differentials, and every identity of the table from four sides."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxsoftmax import network
from jaxsoftmax.matrix_calculus import IDENTITIES, denominator_layout, differential, frobenius, numerator_layout
from jaxsoftmax.matrix_calculus import __main__ as table
from tests.helpers import assert_close, enable_x64, one_in

EPS = float(np.finfo(np.float64).eps)
sizes = st.integers(1, 6)
seeds = st.integers(0, 2**31 - 1)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def assert_sum_equal(x, y, terms):
    """Two ways to add the same products agree to a few eps of Σ|terms|."""
    np.testing.assert_array_less(np.abs(np.asarray(x) - np.asarray(y)), 16 * EPS * terms)


@settings(max_examples=8)
@given(sizes, sizes, st.lists(st.integers(1, 3), max_size=2), seeds)
def test_frobenius_is_the_trace_in_all_its_forms(m, n, batch, seed):
    """A:B = tr(AᵀB) = B:A = Bᵀ:Aᵀ, against NumPy's sum, batched."""
    A, B = normal(seed, 2, *batch, m, n)
    terms = np.abs(A * B).sum((-2, -1))
    with enable_x64():
        product = frobenius(A, B)
        assert product.shape == tuple(batch)
        assert_sum_equal(product, np.einsum("...ij,...ij->...", A, B), terms)
        assert_sum_equal(product, np.trace(np.swapaxes(A, -1, -2) @ B, axis1=-2, axis2=-1), terms)
        assert_sum_equal(product, frobenius(B, A), terms)
        assert_sum_equal(product, frobenius(np.swapaxes(B, -1, -2), np.swapaxes(A, -1, -2)), terms)


@settings(max_examples=8)
@given(sizes, sizes, sizes, seeds)
def test_frobenius_moves_factors(m, n, p, seed):
    """AB:C = A:CBᵀ = B:AᵀC."""
    A, B, C = normal(seed, m, n), normal(seed + 1, n, p), normal(seed + 2, m, p)
    terms = np.sum(np.abs(A) @ np.abs(B) * np.abs(C))
    with enable_x64():
        assert_sum_equal(frobenius(A @ B, C), frobenius(A, C @ B.T), terms)
        assert_sum_equal(frobenius(A @ B, C), frobenius(B, A.T @ C), terms)


def test_frobenius_of_vectors_scalars_and_broadcast_matrices():
    assert frobenius([1.0, 2.0], [3.0, 4.0]) == 11.0
    assert frobenius(2.0, 3.0) == 6.0
    A = jnp.arange(12.0).reshape(2, 2, 3)
    np.testing.assert_array_equal(frobenius(A, jnp.ones((2, 3))), [15.0, 51.0])
    np.testing.assert_array_equal(frobenius(A[:, None], A), [[55.0, 145.0], [145.0, 451.0]])


def test_frobenius_dtypes():
    assert frobenius(jnp.ones((2, 2), int), jnp.ones((2, 2))).dtype == jnp.float32
    half = jnp.full((64, 64), 1.0, jnp.bfloat16)
    assert frobenius(half, half).dtype == jnp.bfloat16
    assert frobenius(half, half) == 4096  # 256 + 1 = 256 in bfloat16: the sum is float32
    assert frobenius(half, half.astype(jnp.float32)).dtype == jnp.float32


def test_frobenius_gradient_is_the_other_factor(x64):
    A, B = normal(0, 2, 3, 4)
    np.testing.assert_array_equal(jax.grad(frobenius)(A, B), B)
    np.testing.assert_array_equal(jax.grad(frobenius, 1)(A, B), A)


@pytest.mark.parametrize(
    "A, B", [((2, 3), (3, 2)), ((3,), (2,)), ((3,), (2, 3)), ((), (3,)), ((2, 2, 3), (3, 2, 3)), ((1, 3), (2, 3))]
)
def test_frobenius_refuses(A, B):
    with pytest.raises(ValueError, match="A"):
        frobenius(jnp.ones(A), jnp.ones(B))


# Layouts


def test_layouts_of_gradients():
    """∂l/∂W has the shape of Wᵀ in numerator layout, and there and back is where JAX began."""
    params = network.init(jax.random.key(0), (5, 4, 3))
    grads = jax.jit(jax.grad(lambda p: jnp.sum(network.forward(p, jnp.arange(5.0)) ** 2)))(params)
    rows = numerator_layout(grads)
    for layer, row in zip(grads, rows):
        np.testing.assert_array_equal(row.W, layer.W.T)
        np.testing.assert_array_equal(row.b, layer.b)
    assert jax.tree.structure(rows) == jax.tree.structure(grads)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, denominator_layout(rows), grads))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, numerator_layout(rows), grads))


def test_numerator_layout_is_the_one_in_which_the_text_multiplies(x64):
    """dl = tr(∂l/∂W dW), and ∂l/∂W_n = a_{n-1} ∂l/∂z_n for l = f(Wa)."""
    W, a, dW = normal(0, 3, 4), normal(1, 4), normal(2, 3, 4)
    loss = lambda W: jnp.sum(jnp.tanh(W @ a))
    gradient = numerator_layout(jax.grad(loss)(W))
    np.testing.assert_allclose(jnp.trace(gradient @ dW), differential(loss)(W, dW), rtol=16 * EPS)
    dz = jax.grad(lambda z: jnp.sum(jnp.tanh(z)))(W @ a)
    np.testing.assert_allclose(gradient, np.outer(a, dz), rtol=16 * EPS)


def test_layouts_of_jacobians():
    """∂Y/∂X: Y.shape + X.shape in JAX, Y.shape + X.shape[::-1] and X.shape + Y.shape[::-1] in the two layouts."""
    f = lambda W, x: jnp.tanh(W @ x)
    W, x = normal(0, 3, 4).astype("float32"), normal(1, 4).astype("float32")
    by_W, by_x = jax.jit(jax.jacrev(f, (0, 1)))(W, x)
    np.testing.assert_array_equal(numerator_layout(by_x, 1), by_x)
    np.testing.assert_array_equal(denominator_layout(by_x), by_x.T)
    np.testing.assert_array_equal(numerator_layout(by_W, 1), np.einsum("kij->kji", by_W))
    np.testing.assert_array_equal(denominator_layout(numerator_layout(by_W, 1)), np.einsum("kij->ijk", by_W))


# Differentials


def test_differential_of_a_tree_with_mixed_dtypes():
    X = {"half": jnp.ones(2, jnp.bfloat16), "count": jnp.array([1, 2])}
    f = lambda X: {"sum": X["half"].astype(jnp.float32) + X["count"] ** 2}
    change = differential(f)(X, {"half": jnp.array([1.0, 2.0]), "count": np.array([1, 1])})
    np.testing.assert_array_equal(change["sum"], [3.0, 6.0])


def test_second_differential_is_the_quadratic_form_of_the_hessian(x64):
    x, dx = normal(0, 2, 4)
    f = lambda x: jnp.sum(jnp.tanh(x) * x[::-1])
    second = differential(lambda x: differential(f)(x, dx))
    assert_close(jax.jit(second)(x, dx), dx @ jax.jit(jax.hessian(f))(x) @ dx)


# The table


ASKED_FOR = """product, Hadamard product, Kronecker product, trace, transpose, inverse, determinant, log-determinant,
    norm, quadratic form, bilinear form, element-wise function, softmax, vec"""


def test_the_table_has_what_the_text_needs():
    for name in (name.strip() for name in ASKED_FOR.split(",")):
        assert any(known.startswith(name) for known in IDENTITIES), name
    assert all(name == identity.name and identity.formula.startswith("d") for name, identity in IDENTITIES.items())


def central_difference(f, X, dX, h=1e-3):
    """(f(X + t dX) - f(X - t dX)) / 2t, extrapolated from t = h and t = h/2 to an error of order h⁴."""

    def quotient(t):
        ends = [f(*(x + s * t * dx for x, dx in zip(X, dX))) for s in (1, -1)]
        return (ends[0] - ends[1]) / (2 * t)

    return (4 * quotient(h / 2) - quotient(h)) / 3


@pytest.mark.parametrize("name", one_in(4, IDENTITIES))
def test_identity(name, x64):
    """Both sides against each other, against reverse mode, and against difference quotients."""
    identity, sample = IDENTITIES[name], jax.jit(IDENTITIES[name].sample)

    @jax.jit
    def sides(X, dX):
        difference = central_difference(identity.f, X, dX)
        return identity.left(X, dX), identity.right(*X, *dX), difference, identity.f(*X)

    @jax.jit
    def reverse(X, ct):
        return jax.vjp(identity.f, *X)[1](ct)

    for seed in range(3):
        X, dX = sample(jax.random.key(seed))
        left, right, difference, value = sides(X, dX)
        assert left.shape == right.shape == value.shape
        scale = sum(np.max(np.abs(x)) for x in (left, *X, *dX))  # the sizes that enter the sums
        np.testing.assert_allclose(left, right, rtol=0, atol=64 * EPS * scale)
        np.testing.assert_allclose(right, difference, rtol=0, atol=1e-9 * scale)
        ct = normal(seed, *right.shape)
        pulled = reverse(X, ct)
        products = [np.vdot(ct, right), *(np.vdot(g, dx) for g, dx in zip(pulled, dX))]
        scale = sum(np.sum(np.abs(g * dx)) for g, dx in zip((ct, *pulled), (right, *dX)))
        np.testing.assert_allclose(products[0], sum(products[1:]), rtol=0, atol=64 * EPS * scale)


def test_a_wrong_identity_shows(x64):
    """The measured error tells a slip in a formula from rounding."""
    wrong = IDENTITIES["inverse"]._replace(right=lambda X, dX: -jnp.linalg.inv(X) @ jnp.linalg.inv(X) @ dX)
    assert wrong.error(jax.random.key(0)) > 0.01
    assert IDENTITIES["inverse"].error(jax.random.key(0)) < 100 * EPS


def test_samples_lie_in_their_domain(x64):
    X, dX = IDENTITIES["Cholesky factor"].sample(jax.random.key(0))
    assert jnp.linalg.eigvalsh(X[0]).min() >= 1 - 16 * EPS
    np.testing.assert_array_equal(dX[0], dX[0].T)
    signs = {float(jnp.sign(jnp.linalg.det(IDENTITIES["inverse"].sample(jax.random.key(i))[0][0]))) for i in range(8)}
    assert signs == {-1.0, 1.0}


def test_the_command_prints_every_identity(capsys, monkeypatch, x64):
    some = {name: IDENTITIES[name] for name in ("product", "vec", "inverse")}
    monkeypatch.setattr(table, "IDENTITIES", some)
    table.print_table()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(some)
    for line, identity in zip(lines[1:], some.values()):
        assert line.startswith(identity.name) and line.endswith(identity.reference)
        error = line.removesuffix(identity.reference).split(identity.formula)[1]
        assert float(error) < 100 * EPS
