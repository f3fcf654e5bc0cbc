"""Products with the Jacobian of softmax, its dense form, its higher derivatives, and the operator."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.scipy.sparse.linalg import cg
from jax.test_util import check_grads

from jaxsoftmax.maps.derivatives import (
    softmax_hessian,
    softmax_jacobian,
    softmax_jvp,
    softmax_second_derivative,
    softmax_third_derivative,
    softmax_vjp,
)
from jaxsoftmax.maps.entmax import entmax
from jaxsoftmax.maps.softmax import softmax
from jaxsoftmax.operators.softmax_jacobian import SoftmaxJacobian
from tests.helpers import assert_close, one_in


def logits(shape, seed=0, gap=0.0):
    z = np.random.default_rng(seed).normal(size=shape)
    z[..., 0] += gap
    return z


# Agreement with autodiff of the maps.

CASES = {
    "plain": (logits((4,)), None, 1.0),
    "batch": (logits((2, 3, 4), gap=6.0), None, 1.0),
    "masked": (logits((3, 4)), np.array([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool), 1.0),
    "ties": (np.array([[1.0, 0, 1, 0], [0, 0, 0, 0]]), None, 1.0),
    "one class": (logits((3, 1)), None, 1.0),
    "two classes": (logits((3, 2)), None, 1.0),
    "one-hot": (np.array([1e4, 0, 0]), None, 1.0),
    "excluded": (np.array([1.0, -np.inf, 0.5]), None, 1.0),
    "entmax 1.3": (logits((3, 5)), None, 1.3),
    "entmax 1.5": (logits((3, 5)), None, 1.5),
    "sparsemax": (2 * logits((3, 5)), None, 2.0),
    "alphas": (logits((3, 5)), None, np.array([1.0, 1.5, 2.5])),
    "entmax masked": (logits((2, 4)), np.array([[1, 1, 0, 1], [0, 0, 0, 0]], bool), 1.5),
}


def over(cases: list):
    return pytest.mark.parametrize("case", cases, ids=CASES.keys())


@functools.partial(jax.jit, static_argnums=2)
def jacobian_of_slice(z, mask, alpha):
    f = (lambda x: softmax(x, where=mask)) if alpha == 1 else (lambda x: entmax(x, alpha, where=mask))
    return jax.jacfwd(f)(z)


def operator_and_matrix(case):
    """The operator, and the Jacobian that autodiff finds, slice by slice."""
    z, where, alpha = case
    operator = SoftmaxJacobian.from_logits(z, where, alpha)
    masks = np.ones(z.shape, bool) if where is None else where
    alphas = np.broadcast_to(alpha, z.shape[:-1])
    dense = np.empty((*z.shape, z.shape[-1]))
    for i in np.ndindex(*z.shape[:-1]):
        dense[i] = jacobian_of_slice(z[i], masks[i], float(alphas[i]))
    return operator, dense


RESULTS = {
    "as_matrix": lambda a: (a.got.as_matrix(), a.dense),
    "as an array": lambda a: (jnp.asarray(np.asarray(a.got)), a.dense),
    "mv": lambda a: (a.got.mv(a.v), a.product(a.v)),
    "call": lambda a: (a.got(a.v), a.product(a.v)),
    "mv of many": lambda a: (a.got.mv(a.many), a.product(a.many)),
    "mv of one": lambda a: (a.got.mv(a.one), a.product(a.one)),
    "matmul": lambda a: (a.got @ a.x, a.dense @ a.x),
    "rmatmul": lambda a: (jnp.asarray(a.x.swapaxes(-1, -2)) @ a.got, a.x.swapaxes(-1, -2) @ a.dense),
    "diagonal": lambda a: (a.got.diagonal(), a.diagonal),
    "trace": lambda a: (a.got.trace(), a.diagonal.sum(-1)),
    "frobenius_norm": lambda a: (a.got.frobenius_norm(), np.linalg.norm(a.dense, axis=(-2, -1))),
    "scaled": lambda a: (a.got.scaled(3.0).mv(a.v), 3 * a.product(a.v)),
    "quadratic_form": lambda a: (a.got.quadratic_form(a.many), np.sum(a.many * a.product(a.many), -1)),
    "solve": lambda a: (a.got.solve(a.many, 0.3), a.times(np.linalg.inv(a.damped(0.3)), a.many)),
    "solve with many": lambda a: (a.got.solve(a.v, a.dampings), a.times(np.linalg.inv(a.damped(a.dampings)), a.v)),
    "logdet": lambda a: (a.got.logdet(0.3), np.linalg.slogdet(a.damped(0.3))[1]),
    "logdet with many": lambda a: (a.got.logdet(a.dampings), np.linalg.slogdet(a.damped(a.dampings))[1]),
    "factor_mv": lambda a: (a.got.factor_mv(a.got.factor_rmv(a.v)), a.product(a.v)),  # L Lᵀ = J
    "factor_rmv": lambda a: (jnp.sum(a.got.factor_rmv(a.v) ** 2, -1), np.sum(a.v * a.product(a.v), -1)),
}


@dataclasses.dataclass
class Compared:
    """An operator beside its dense matrix, and vectors for both."""

    got: SoftmaxJacobian
    dense: np.ndarray

    def __post_init__(self):
        batch, k = self.dense.shape[:-2], self.dense.shape[-1]
        self.v, self.x, self.many = (
            logits(s, seed=i) for i, s in enumerate([(*batch, k), (*batch, k, 3), (5, *batch, k)], 2)
        )
        self.one, self.diagonal = self.v[(0,) * len(batch)], np.diagonal(self.dense, axis1=-2, axis2=-1)
        self.dampings = np.linspace(0.1, 2, max(1, int(np.prod(batch)))).reshape(batch)

    def times(self, a, v):
        return np.einsum("...ij,...j->...i", a, v)

    def product(self, v):
        return self.times(self.dense, v)

    def damped(self, damping):
        return self.dense + np.asarray(damping)[..., None, None] * np.eye(self.dense.shape[-1])


compared = functools.cache(lambda name: Compared(*operator_and_matrix(CASES[name])))


@pytest.mark.parametrize("method", RESULTS)
@pytest.mark.parametrize("case", one_in(3, CASES))
def test_operator_is_the_jacobian(case, method, x64):
    got, want = RESULTS[method](compared(case))
    assert isinstance(got, jax.Array)
    assert_close(got, want, rtol=1e-12, scale=max(1.0, np.max(np.abs(want), initial=0.0)))


@pytest.mark.parametrize("case", one_in(3, CASES, 1))
def test_operator_tells_its_matrix(case, x64):
    operator, dense = compared(case).got, compared(case).dense
    assert operator.shape == dense.shape and operator.dtype == dense.dtype and operator.T is operator


@over(one_in(3, CASES.values(), 2))
def test_spectrum_rank_and_inverse(case, x64):
    operator, dense = operator_and_matrix(case)
    k, v = dense.shape[-1], logits(dense.shape[:-1], seed=2)
    values, vectors = (np.asarray(x) for x in operator.eigh())
    want = np.linalg.eigvalsh(dense)
    assert_close(values, want, rtol=1e-14, scale=1.0)
    assert_close(operator.eigvalsh(), values, rtol=0.0)
    assert_close(operator.spectral_norm(), want[..., -1], rtol=1e-14, scale=1.0)
    assert_close(np.swapaxes(vectors, -1, -2) @ vectors, np.broadcast_to(np.eye(k), dense.shape), rtol=1e-14, scale=1.0)
    assert_close((vectors * values[..., None, :]) @ np.swapaxes(vectors, -1, -2), dense, rtol=1e-14, scale=1.0)
    nonzero = want > 1e-8
    assert_close(operator.rank(), nonzero.sum(-1), rtol=0.0)
    inverse = np.linalg.pinv(dense, rcond=1e-8, hermitian=True)
    assert_close(
        operator.pinv_mv(v), np.einsum("...ij,...j->...i", inverse, v), rtol=1e-9, scale=1 + np.abs(inverse).max()
    )
    logs = np.log(want, where=nonzero, out=np.zeros_like(want))
    assert_close(operator.pseudo_logdet(), logs.sum(-1), rtol=1e-10, scale=10.0)
    assert_close(operator.null_space().as_matrix(), np.eye(k) - inverse @ dense, rtol=1e-9, scale=1.0)
    assert not np.asarray(operator.mv(np.ones(k))).any()  # exactly: the class axis sees no constant


@over(one_in(2, CASES.values()))
def test_from_probs_is_from_logits(case):
    z, where, alpha = case
    z = z.astype(np.float32)
    p = softmax(z, where=where) if np.all(alpha == 1) else entmax(z, np.asarray(alpha, np.float32), where=where)
    one, other = SoftmaxJacobian.from_probs(p, alpha), SoftmaxJacobian.from_logits(z, where, alpha)
    assert_close((one.probs, one.scale), (other.probs, other.scale), rtol=0.0)


@pytest.mark.parametrize("z", one_in(3, [logits((4,)), logits((2, 3), gap=6.0), logits((3, 1))], 1), ids=np.shape)
def test_dense_derivatives_are_autodiffs(z, x64):
    z = jnp.asarray(z)
    batch = (lambda f: jax.jit(jax.vmap(f))) if z.ndim > 1 else jax.jit
    second = batch(jax.jacfwd(jax.jacrev(jax.nn.softmax)))(z)
    third = batch(jax.jacfwd(jax.jacfwd(jax.jacrev(jax.nn.softmax))))(z)
    assert_close(softmax_jacobian(z), batch(jax.jacrev(jax.nn.softmax))(z), rtol=1e-15, scale=1.0)
    assert_close(softmax_hessian(z), second, rtol=1e-15, scale=1.0)
    assert_close(batch(jax.jacfwd(softmax_jacobian))(z), second, rtol=1e-15, scale=1.0)
    assert_close(batch(jax.jacrev(softmax_jacobian))(z), second, rtol=1e-15, scale=1.0)
    assert_close(batch(jax.jacrev(jax.jacfwd(softmax_jacobian)))(z), third, rtol=3e-15, scale=1.0)
    assert_close(batch(jax.jacrev(softmax_hessian))(z), third, rtol=3e-15, scale=1.0)
    p = jax.nn.softmax(z)
    u, v, w = (logits(z.shape, seed=s) for s in (1, 2, 3))
    products = (
        jnp.einsum("...ijk,...j,...k->...i", second, u, v),
        jnp.einsum("...ijkl,...j,...k,...l->...i", third, u, v, w),
    )
    got = softmax_second_derivative(u, v, p), softmax_third_derivative(u, v, w, p)
    assert_close(got, products, rtol=1e-14, scale=1.0)


@pytest.mark.parametrize("axis", [0, 1, -1, -3])
def test_products_along_any_axis(axis, x64):
    u, v, w = (logits((2, 3, 4), seed=s) for s in (1, 2, 3))
    back = lambda x: jnp.moveaxis(x, axis, -1)

    @jax.jit
    def pairs(z):
        p, pullback = jax.vjp(lambda z: jax.nn.softmax(z, axis), z)
        return (
            (back(softmax_jvp(u, p, axis)), softmax_jvp(back(u), back(p))),
            (softmax_vjp(u, p, axis=axis), pullback(u)[0]),
            (back(softmax_third_derivative(u, v, w, p, axis)), softmax_third_derivative(*map(back, (u, v, w, p)))),
        )

    for got, want in pairs(logits((2, 3, 4))):
        assert_close(got, want, rtol=1e-14)


# Transformations.

METHODS = {
    "mv": lambda j, v: j.mv(v),
    "matmul": lambda j, v: j @ jnp.stack([v, v**2], -1),
    "quadratic_form": lambda j, v: j.quadratic_form(v),
    "diagonal": lambda j, v: j.diagonal(),
    "trace": lambda j, v: j.trace(),
    "frobenius_norm": lambda j, v: j.frobenius_norm(),
    "as_matrix": lambda j, v: j.as_matrix(),
    "pinv_mv": lambda j, v: j.pinv_mv(v),
    "solve": lambda j, v: j.solve(v, jnp.sum(v**2)),
    "logdet": lambda j, v: j.logdet(jnp.sum(v**2)),
    "pseudo_logdet": lambda j, v: j.pseudo_logdet(),
    "factor_mv": lambda j, v: j.factor_mv(v),
    "factor_rmv": lambda j, v: j.factor_rmv(v),
    "sample": lambda j, v: j.sample(jax.random.key(0), (2,)),
    "sample_pinv": lambda j, v: j.sample_pinv(jax.random.key(0), (2,)),
    "sample_inverse": lambda j, v: j.sample_inverse(jax.random.key(0), jnp.sum(v**2), (2,)),
    "spectral_norm": lambda j, v: j.spectral_norm(),
    "eigvalsh": lambda j, v: j.eigvalsh(),
    "eigh": lambda j, v: (lambda w, q: (q * jnp.exp(w)[None]) @ q.T @ v)(*j.eigh()),
}


@pytest.mark.parametrize("method", one_in(4, METHODS.values()), ids=METHODS.keys())
@pytest.mark.parametrize(
    "alpha, order", [(1.5, 1), *(pytest.param(alpha, 2, marks=pytest.mark.slow) for alpha in (1.0, 1.5))]
)
def test_methods_in_both_modes(method, alpha, order, x64):
    z, v = jnp.asarray(logits((4,), gap=1.0)), jnp.asarray(logits((4,), seed=2))
    f = jax.jit(lambda z, v: method(SoftmaxJacobian.from_logits(z, alpha=alpha), v))
    check_grads(f, (z, v), order=order, modes=("fwd", "rev"), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("method", one_in(3, METHODS.values(), 1), ids=METHODS.keys())
def test_methods_under_vmap_and_beside_a_mask(method, x64):
    z, v = jnp.asarray(logits((3, 4))), jnp.asarray(logits((3, 4), seed=2))
    mask = np.array([[True, True, False, True], [True] * 4, [False, True, True, False]])
    f = lambda z, mask, v: method(SoftmaxJacobian.from_logits(jnp.where(mask, z, jnp.nan), mask), v)
    one_by_one = [jax.jit(f)(*row) for row in zip(z, mask, v)]
    assert_close(jax.jit(jax.vmap(f))(z, mask, v), jax.tree.map(lambda *x: jnp.stack(x), *one_by_one), rtol=1e-13)
    slope = jax.jit(jax.vmap(jax.grad(lambda z, *rest: jnp.sum(jnp.sin(f(z, *rest))))))(z, mask, v)
    assert np.isfinite(slope).all() and not np.asarray(slope)[~mask].any()


def test_a_pytree_through_scan_and_grad():
    z = jnp.asarray(logits((3, 4)), jnp.float32)
    operator = SoftmaxJacobian.from_logits(z)
    rows = [SoftmaxJacobian.from_logits(x).trace() for x in z]
    assert_close(jax.lax.scan(lambda c, j: (c, j.trace()), None, operator)[1], jnp.stack(rows), rtol=0.0)
    assert_close(jax.lax.fori_loop(0, 3, lambda _, j: j.scaled(2.0), operator).trace(), 8 * jnp.stack(rows), rtol=0.0)
    gradient = jax.grad(lambda j: j.trace().sum())(operator)
    assert isinstance(gradient, SoftmaxJacobian) and gradient.probs.shape == z.shape


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
def test_the_derivative_in_the_order_of_entmax(order, x64):
    z, v = jnp.asarray(logits((4,))), jnp.asarray(logits((4,), seed=2))
    f = jax.jit(lambda alpha: SoftmaxJacobian.from_logits(z, alpha=alpha).solve(v, 0.1))
    check_grads(f, (jnp.asarray(1.4),), order=order, modes=("fwd", "rev"))
    p = entmax(z, 1.4)
    g = lambda p, alpha: SoftmaxJacobian.from_probs(p, alpha).mv(v)
    check_grads(jax.jit(g), (p, jnp.asarray(1.4)), order=order, modes=("fwd", "rev"))


# Company: samples, iterative solvers, memory.


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_samples_have_their_covariance(alpha):
    z = jnp.array([[0.3, 0.1, -0.1, -1.5], [3.0, 0.0, 0.0, 0.0]])
    operator = SoftmaxJacobian.from_logits(z, alpha=alpha)
    dense, draws = np.asarray(operator.as_matrix(), np.float64), 40_000
    damped = np.linalg.inv(dense + 0.2 * np.eye(4))
    kinds = (
        (operator.sample(jax.random.key(1), (draws,)), dense),
        (operator.sample_pinv(jax.random.key(2), (draws,)), np.linalg.pinv(dense, rcond=1e-5, hermitian=True)),
        (operator.sample_inverse(jax.random.key(3), 0.2, (draws,)), damped),
    )
    for got, covariance in kinds:
        got = np.asarray(got, np.float64)
        assert got.shape == (draws, *z.shape)
        found = np.einsum("nbi,nbj->bij", got, got) / draws
        spread = np.sqrt(np.einsum("bii,bjj->bij", covariance, covariance) + covariance**2)
        assert np.all(np.abs(found - covariance) <= 5 * spread / np.sqrt(draws) + 1e-7)
    assert operator.sample(jax.random.key(0)).shape == z.shape


def test_inside_jax_cg():
    z, b = logits((6,)).astype(np.float32), jnp.asarray(logits((6,), seed=2), jnp.float32)
    operator = SoftmaxJacobian.from_logits(z)
    consistent = b - b.mean()
    x, _ = cg(operator, consistent, tol=1e-6)
    assert_close(x - x.mean(), operator.pinv_mv(b), rtol=1e-4)
    x, _ = cg(lambda v: operator @ v + 0.1 * v, b, tol=1e-6)
    assert_close(x, operator.solve(b, 0.1), rtol=1e-5)


def test_inside_lineax():
    z, b = logits((6,)).astype(np.float32), jnp.asarray(logits((6,), seed=2), jnp.float32)
    operator = SoftmaxJacobian.from_logits(z)
    structure = jax.ShapeDtypeStruct(b.shape, b.dtype)
    j = lx.FunctionLinearOperator(operator.mv, structure, lx.positive_semidefinite_tag)
    assert_close(j.as_matrix(), operator.as_matrix(), rtol=2e-7)
    damped = lx.FunctionLinearOperator(lambda v: operator.mv(v) + 0.1 * v, structure, lx.positive_semidefinite_tag)
    solution = lx.linear_solve(damped, b, lx.CG(rtol=1e-6, atol=1e-6))
    assert_close(solution.value, operator.solve(b, 0.1), rtol=1e-5)


# Errors.

P = np.array([0.7, 0.2, 0.1], np.float32)
J = SoftmaxJacobian(jnp.asarray(P), jnp.ones(1, jnp.float32))


def test_values_are_checked_where_they_are_known():
    bad = jnp.array([0.7, 0.2])
    assert jax.jit(lambda p: SoftmaxJacobian.from_probs(p).trace())(bad).shape == ()
    assert np.isnan(jax.jit(J.logdet)(-0.3))
    half = jnp.asarray([0.7, 0.2, 0.1], jnp.bfloat16)  # sums to 1 within its rounding
    assert SoftmaxJacobian.from_probs(half).dtype == jnp.float32
    nothing = SoftmaxJacobian.from_probs(jnp.zeros(3))
    assert nothing.rank() == 0 and nothing.trace() == 0 and nothing.spectral_norm() == 0
