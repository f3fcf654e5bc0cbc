"""Operators add, subtract, scale and divide as their matrices do; a batch of them is indexed; they print in a line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
from jaxsoftmax.operators import DiagonalPlusLowRank, SoftmaxJacobian
from tests.helpers import assert_close

Z = np.random.default_rng(0).normal(size=(5, 4))
OPERATORS = {
    "jacobian": lambda z: SoftmaxJacobian.from_logits(z),
    "focal": lambda z: js.logits_hessian(js.focal_loss_with_integer_labels, z, jnp.arange(5) % 4),
    "diagonal": lambda z: DiagonalPlusLowRank(jnp.exp(z)),
    "capped": lambda z: js.logits_hessian(js.softmax_cross_entropy, z, jnp.full((5, 4), 0.25), logit_softcap=3.0),
}


@pytest.fixture(params=OPERATORS)
def operator(request, x64):
    return OPERATORS[request.param](jnp.asarray(Z))


@pytest.mark.parametrize("other", OPERATORS)
def test_sums_and_differences(operator, other):
    other = OPERATORS[other](jnp.asarray(Z))
    a, b, v = np.asarray(operator), np.asarray(other), jnp.asarray(Z)
    for got, want in ((operator + other, a + b), (operator - other, a - b), (operator + 0.1 * other, a + 0.1 * b)):
        found = np.asarray(got), got.mv(v), got.quadratic_form(v), got.trace()
        einsums = np.einsum("bij,bj->bi", want, Z), np.einsum("bij,bi,bj->b", want, Z, Z), np.einsum("bii->b", want)
        assert_close(found, (want, *einsums), scale=1.0)


def test_factors_from_both_sides(operator):
    a, each = np.asarray(operator), np.arange(5.0)
    for got, want in (
        (2 * operator, 2 * a),
        (operator * np.float64(-2), -2 * a),
        (operator / 4, a / 4),
        (jnp.asarray(each) * operator, each[:, None, None] * a),
        (each * operator, each[:, None, None] * a),
        (-operator, -a),
    ):
        assert_close(np.asarray(got), want)
        assert_close(got.frobenius_norm(), np.linalg.norm(want, axis=(1, 2)))
        assert_close(got.logdet(9.0), np.linalg.slogdet(want + 9 * np.eye(4))[1])


def test_a_damping_is_a_diagonal_that_is_added(x64):
    J, damping = SoftmaxJacobian.from_logits(Z), DiagonalPlusLowRank(jnp.ones((5, 4)))
    assert_close((J + 0.1 * damping).solve(Z, 0.0), J.solve(Z, 0.1))
    assert_close((0.1 * damping + J).logdet(0.0), J.logdet(0.1))


def test_index_of_a_batch(operator):
    a = np.asarray(operator)
    for index in (3, -1, slice(1, 3), Ellipsis, np.array([0, 4]), np.arange(5) % 2 == 0):
        np.testing.assert_array_equal(operator[index], a[index])
    assert len(list(operator)) == 5
    for index in (5, -6, np.int64(5), jnp.array([0, 5]), (0, 0)):
        with pytest.raises(IndexError):
            operator[index]
    with pytest.raises(IndexError, match="batch axes"):
        operator[0][0]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda J, H: J @ J, TypeError, "apply them in turn"),
        (lambda J, H: J + 0.1, TypeError, "unsupported operand"),
        (lambda J, H: J * H, TypeError, "unsupported operand"),
        (lambda J, H: J + J[0], ValueError, "one shape"),
        (lambda J, H: (J + H).solve(Z, 0.1), TypeError, "scipy.sparse.linalg.cg"),
        (lambda J, H: (J + H).factor_mv(Z), TypeError, "scipy.sparse.linalg.cg"),
    ],
)
def test_what_has_no_closed_form_says_so(call, error, message):
    J, H = (OPERATORS[name](jnp.asarray(Z, jnp.float32)) for name in ("jacobian", "focal"))
    with pytest.raises(error, match=message):
        call(J, H)


def test_repr_names_shapes_and_dtypes():
    J = SoftmaxJacobian.from_logits(jnp.asarray(Z, jnp.float32))
    assert repr(J) == "SoftmaxJacobian(probs=float32[5, 4], scale=float32[5, 1], logits=float32[5, 4])"
    assert repr(jax.jit(lambda J: -J)(J)) == "DiagonalPlusLowRank(weights=float32[5, 4], centre=float32[5, 4])"


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_temperature(alpha, x64):
    f = lambda x: (js.softmax if alpha == 1 else js.entmax15)(x / 2.5)
    J = SoftmaxJacobian.from_logits(Z, alpha=alpha, temperature=2.5)
    assert_close(np.asarray(J), jax.vmap(jax.jacfwd(f))(jnp.asarray(Z)))
    with pytest.raises(ValueError, match="temperature must be"):
        SoftmaxJacobian.from_logits(Z, temperature=0.0)
