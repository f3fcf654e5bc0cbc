"""One family of operators: one set of methods, and digits at any damping."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import jaxsoftmax as js
from jaxsoftmax import losses
from jaxsoftmax.losses import logits_fisher, logits_ggn, logits_hessian
from jaxsoftmax.operators import DiagonalPlusLowRank, SoftmaxJacobian
from tests.helpers import assert_close, enable_x64, one_in

Z = np.array([[1.0, 0.3, -0.5, 2.0, 0.1, -1.2], [12.0, 0.3, -0.5, 2.0, 0.1, -1.2]], "float32")
Y = np.array([[0.1, 0.2, 0.3, 0.2, 0.1, 0.1], [0.9, 0.0, 0.05, 0.05, 0.0, 0.0]], "float32")
CE = losses.softmax_cross_entropy_with_integer_labels
LABELS = np.array([3, 0])
OPERATORS = {
    "jacobian": lambda z: SoftmaxJacobian.from_logits(z),
    "entmax": lambda z: SoftmaxJacobian.from_logits(z, alpha=1.5),
    "cross-entropy": lambda z: logits_hessian(CE, z, jnp.asarray(LABELS)),
    "fisher": lambda z: logits_fisher(CE, z, jnp.asarray(LABELS), class_weights=jnp.arange(1.0, 7.0, dtype=z.dtype)),
    "kl": lambda z: logits_hessian(losses.softmax_kl_divergence, z, jnp.asarray(Y, z.dtype), temperature=2.0),
    "focal": lambda z: logits_hessian(losses.focal_loss_with_integer_labels, z, jnp.asarray(LABELS), gamma=0.5),
    "poly": lambda z: logits_ggn(losses.poly_loss_cross_entropy, z, jnp.asarray(Y, z.dtype)),
    "brier": lambda z: logits_ggn(losses.brier_loss, z, jnp.asarray(Y, z.dtype)),
    "z-loss": lambda z: logits_ggn(CE, z, jnp.asarray(LABELS), z_loss=0.1),
    "capped": lambda z: logits_ggn(CE, z, jnp.asarray(LABELS), logit_softcap=5.0),
    "capped focal": lambda z: logits_hessian(
        losses.focal_loss_with_integer_labels, z, jnp.asarray(LABELS), gamma=0.5, logit_softcap=5.0
    ),
    "logistic": lambda z: logits_hessian(losses.sigmoid_binary_cross_entropy, z, jnp.asarray(Y, z.dtype)),
}


def exact(operator, i: int) -> mpmath.matrix:
    """The dense matrix that the operator's own arrays stand for, in exact arithmetic."""
    number = lambda x: mpmath.mpf(float(x))
    if isinstance(operator, SoftmaxJacobian):
        d, p = operator.scale[i] * np.ones(6), [number(x) for x in operator.probs[i]]
        d, kappa = [number(x) * q for x, q in zip(d, p)], 0
        t, e = [1] * 6, [0] * 6
    else:
        d = [number(x) for x in operator.weights[i]]
        p = None if operator.centre is None else [number(x) for x in operator.centre[i]]
        kappa = 0 if operator.mean_weight is None else number(operator.mean_weight[i, 0])
        t = [1] * 6 if operator.slope is None else [number(x) for x in operator.slope[i]]
        e = [0] * 6 if operator.extra is None else [number(x) for x in operator.extra[i]]
    if p is None:
        a = mpmath.diag(d)
    else:
        p = [q / mpmath.fsum(p) for q in p]  # rounding keeps Σp from being 1; the operator takes it as 1
        P = mpmath.eye(6) - mpmath.ones(6, 1) * mpmath.matrix(p).T
        a = P.T * mpmath.diag(d) * P + kappa * mpmath.matrix(p) * mpmath.matrix(p).T
    return mpmath.diag(t) * a * mpmath.diag(t) + mpmath.diag(e)


V = np.array([[1.0, -1.0, 0.0, 0.0, 0.0, 0.0], [0.5, 0.25, -0.75, 1.0, -0.5, -0.5]], "float32")  # each sums to 0


DAMPINGS = 20.0, 1e-3, 1e-8, 1e-20


@pytest.mark.parametrize("name", one_in(2, OPERATORS, 1))
def test_solve_and_logdet_keep_their_digits_at_any_damping(name):
    """A v that sums to 0 over the classes has a solution of size 1 at every damping, and every digit of it."""
    operator = jax.jit(OPERATORS[name])(jnp.asarray(Z))
    eps = float(jnp.finfo(operator.dtype).eps)
    for damping in DAMPINGS:
        x, logdet = np.asarray(operator.solve(V, damping)), np.asarray(operator.logdet(damping))
        for i in range(2):
            with mpmath.workdps(80):
                a = exact(operator, i) + mpmath.mpf(float(np.float32(damping))) * mpmath.eye(6)
                want = np.array(mpmath.lu_solve(a, mpmath.matrix(V[i].tolist())).tolist(), float)[:, 0]
                right = float(mpmath.log(mpmath.det(a)))
            assert np.linalg.norm(x[i] - want) < 12 * eps * np.linalg.norm(want), (damping, i)
            assert abs(logdet[i] - right) < 4 * eps * max(1.0, abs(right)), (damping, i)


@pytest.mark.parametrize("loss", [losses.softmax_entropy, losses.brier_loss])
def test_solve_where_a_weight_cancels_the_damping(loss):
    """A class that is not the top one is then no pivot, though the matrix is far from singular."""
    z = jnp.array([[0.6, 0.2, -np.inf, -np.inf, -6.0, -9.0]])
    labels = () if loss is losses.softmax_entropy else (jnp.eye(6)[1:2],)
    operator = logits_hessian(loss, z, *labels)
    damping = -float(operator.weights[0, 1]) * (1 + 2e-6)
    with mpmath.workdps(80):
        a = exact(operator, 0) + mpmath.mpf(float(np.float32(damping))) * mpmath.eye(6)
        want = np.array(mpmath.lu_solve(a, mpmath.matrix(V[0].tolist())).tolist(), float)[:, 0]
    assert np.linalg.cond(np.array(a.tolist(), float)) < 10
    error = np.linalg.norm(operator.solve(V[:1], damping)[0] - want)
    assert error < 30 * np.finfo(np.float32).eps * np.linalg.norm(want)


@pytest.mark.parametrize("name", one_in(12, OPERATORS, 1))
def test_logdet_has_a_gradient_at_any_damping(name):
    """Also where the square of the damping is 0 in float32, and a class has probability 0."""
    gradient = jax.jit(jax.grad(lambda z, damping: jnp.sum(OPERATORS[name](z).logdet(damping))))
    for damping in (*DAMPINGS, 1e-30):
        assert np.all(np.isfinite(gradient(jnp.asarray(Z), damping)))


@pytest.mark.parametrize("name", one_in(12, OPERATORS, 1))
def test_logdet_has_second_derivatives_at_any_damping(name):
    """In every composition, to the rounding of the largest entry: those of the logarithm divide by no square."""
    f = lambda z, damping: jnp.sum(OPERATORS[name](z).logdet(damping))
    modes = jax.jacrev, jax.jacfwd
    hessians = jax.jit(lambda z, damping: [outer(inner(f))(z, damping) for outer in modes for inner in modes])
    for damping in (*DAMPINGS, 1e-30):
        with enable_x64():
            want = np.asarray(jax.jit(jax.hessian(f))(np.float64(Z), float(np.float32(damping))))
        for got in hessians(jnp.asarray(Z), damping):
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.max(abs(want)))


@pytest.mark.parametrize("name", one_in(3, OPERATORS))
def test_every_method_is_there_or_says_why(name, x64):
    operator = OPERATORS[name](jnp.asarray(Z, "float64"))
    dense, v = np.asarray(operator.as_matrix()), np.asarray(V, "float64")
    assert_close(operator.frobenius_norm(), np.linalg.norm(dense, axis=(-1, -2)))
    assert_close(operator.scaled(3.0).as_matrix(), 3 * dense)
    assert_close(operator.scaled(3.0).mv(v), 3 * operator.mv(v))
    slope = jnp.asarray(np.linspace(0.5, 2.0, 6) * np.ones((2, 1)))
    seen = np.asarray(slope)[:, :, None] * dense * np.asarray(slope)[:, None, :]
    assert_close(operator.transformed(slope).as_matrix(), seen)
    np.testing.assert_allclose(
        operator.transformed(slope).mv(v), np.einsum("bij,bj->bi", seen, v), rtol=1e-11, atol=1e-14
    )
    twice = operator.transformed(slope, slope).transformed(slope, 2 * slope).as_matrix()
    want = np.asarray(slope) ** 3 + 2 * np.asarray(slope)
    want = np.asarray(slope)[:, :, None] * seen * np.asarray(slope)[:, None, :] + want[:, :, None] * np.eye(6)
    assert_close(twice, want)
    assert_close(v @ operator, np.einsum("ni,bij->bnj", v, dense))
    assert isinstance(np.ones(6) @ operator, jax.Array)
    np.testing.assert_array_equal(operator.is_psd(), np.linalg.eigvalsh(dense).min(-1) > -1e-14)
    if name == "capped focal":
        for call in (
            lambda: operator.sample(jax.random.key(0)),
            lambda: operator.factor_mv(v),
            lambda: operator.factor_rmv(v),
        ):
            with pytest.raises(TypeError, match="no factor in closed form"):
                call()
    elif bool(jnp.all(operator.is_psd())):
        columns = operator.factor_rmv(np.eye(6)[:, None, :])  # Lᵀ e_i
        assert_close(jnp.einsum("ibn,jbn->bij", columns, columns), dense, rtol=1e-10)
        draws = np.asarray(operator.sample(jax.random.key(1), (20000,)))
        covariance = np.einsum("nbi,nbj->bij", draws, draws) / 20000
        error = np.sqrt((dense**2 + np.einsum("bii,bjj->bij", dense, dense)) / 20000)
        assert np.all(abs(covariance - dense) < 5.5 * error + 1e-12)
    if name != "fisher":
        with pytest.raises(TypeError, match="see logits_fisher"):
            operator.sample_targets(jax.random.key(0))


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_a_weight_of_zero_is_the_zero_matrix(weight, x64):
    J = SoftmaxJacobian.from_logits(jnp.asarray(Z, "float64")).scaled(weight)
    dense, v = np.asarray(J.as_matrix()), np.asarray(V, "float64")
    damped = dense + 0.5 * np.eye(6)
    assert_close(J.solve(v, 0.5), np.linalg.solve(damped, v[..., None])[..., 0])
    assert_close(J.logdet(0.5), np.linalg.slogdet(damped)[1])
    np.testing.assert_allclose(J.pinv_mv(v), np.einsum("bij,bj->bi", np.linalg.pinv(dense), v), atol=1e-9)
    np.testing.assert_array_equal(J.rank(), np.linalg.matrix_rank(dense))
    eigenvalues = np.linalg.eigvalsh(dense)
    assert_close(J.pseudo_logdet(), np.log(np.where(eigenvalues > 1e-12, eigenvalues, 1)).sum(-1))
    null = np.asarray(J.null_space().as_matrix())
    assert_close(null @ null, null)
    assert_close(np.trace(null, axis1=1, axis2=2), 6 - J.rank())
    gradient = jax.grad(lambda s: J.scaled(s).solve(v, 0.5).sum() + J.scaled(s).logdet(0.5).sum())(weight)
    assert np.isfinite(gradient)


def test_inverse_of_a_matrix_of_tiny_weight():
    """Of the focal Gauss-Newton matrix, whose factor 1e-14 has no cube in float32."""
    z = np.float32([17.0, 0.5, -1.0])

    def f(z):
        G = logits_ggn(losses.focal_loss_with_integer_labels, z, jnp.int32(0), gamma=2.0)
        return jnp.stack([1e-24 * G.pinv_mv(jnp.asarray([1.0, 0.5, -2.0], z.dtype))[1], G.pseudo_logdet()])

    modes = jax.jacrev, jax.jacfwd
    hessians = jax.jit(lambda z: [outer(inner(f))(z) for outer in modes for inner in modes])
    with enable_x64():
        want = np.asarray(hessians(np.float64(z))[0])
    for got in hessians(z):
        assert np.all(abs(got - want) < 1e-4 * abs(want).max((-2, -1), keepdims=True))


def test_hessian_of_a_categorical_head_is_the_jacobian():
    """One implementation: what SoftmaxJacobian keeps, logits_hessian keeps."""
    z, labels = jnp.asarray(Z), jnp.asarray(LABELS)
    for head in (CE, functools.partial(CE, label_smoothing=0.1), js.safe_softmax_cross_entropy):
        assert isinstance(
            logits_hessian(head, z, labels if head is not js.safe_softmax_cross_entropy else Y), SoftmaxJacobian
        )
    assert isinstance(logits_hessian(CE, z, labels, z_loss=0.1), DiagonalPlusLowRank)


def test_an_excluded_class_stays_excluded_under_a_soft_cap():
    """One soft cap for the plain head, its curvature and the linear head: tanh would let -inf back in as -cap."""
    z, label = jnp.array([[0.3, -jnp.inf, 0.1]]), jnp.array([0])
    kept = 2 * np.tanh(np.array([0.3, 0.1]) / 2)
    want = np.log(np.exp(kept).sum()) - kept[0]
    assert_close(CE(losses.softcap_logits(z, 2.0), label)[0], want)
    linear = functools.partial(js.linear_softmax_cross_entropy_loss, logit_softcap=2.0, bias=z[0])
    assert_close(linear(jnp.zeros((1, 2)), label, jnp.zeros((2, 3))), want)
    hessian = np.asarray(logits_hessian(CE, z, label, logit_softcap=2.0).as_matrix())[0]
    assert np.all(hessian[1] == 0) and np.all(hessian[:, 1] == 0) and np.all(hessian[0, [0, 2]] != 0)


@pytest.mark.parametrize("name", one_in(9, OPERATORS, 1))
def test_no_nan_arises_on_the_way(name):
    """Op by op under jax.debug_nans, as compiled: a NaN is where there is no number, and nowhere else."""
    with jax.debug_nans(True), jax.disable_jit():
        operator = OPERATORS[name](jnp.asarray(Z))
        for result in (operator.mv(V), operator.solve(V, 0.5), operator.logdet(0.5), operator.frobenius_norm()):
            assert np.all(np.isfinite(result))
