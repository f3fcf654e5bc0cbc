"""Eigenvalues and eigenvectors of diag(p) - ppᵀ against mpmath, from spread out to one-hot."""

import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import jaxsoftmax as js

pytestmark = pytest.mark.optimized

GAPS = (0, 5, 12, 20, 40, 60)


def exact_eigenvalues(p: np.ndarray) -> list:
    """Ascending, at p scaled to sum to 1, with 60 digits."""
    with mpmath.workdps(60):
        q = [mpmath.mpf(float(x)) for x in p]
        q = [x / sum(q) for x in q]
        matrix = mpmath.diag(q) - mpmath.matrix(q) * mpmath.matrix(q).T
        return sorted(mpmath.eigsy(matrix, eigvals_only=True))


@pytest.mark.parametrize("gap", GAPS)
def test_eigenvalues_to_a_few_eps_and_orthogonal_vectors(gap):
    z = np.random.default_rng(gap).normal(size=8).astype(np.float32)
    z[2] += gap
    J = js.SoftmaxJacobian.from_logits(z)
    values, vectors = (np.asarray(x, np.float64) for x in J.eigh())
    want = exact_eigenvalues(np.asarray(J.probs))
    eps = float(jnp.finfo(jnp.float32).eps)
    assert values[0] == 0
    assert max(abs(float((got - exact) / exact)) for got, exact in zip(values[1:], want[1:])) <= 8 * eps
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gap", GAPS)
def test_orthogonal_vectors_in_float64(gap, x64):
    z = np.random.default_rng(gap).normal(size=8)
    z[2] += gap
    vectors = np.asarray(js.SoftmaxJacobian.from_logits(z).eigh()[1])
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(8), rtol=0, atol=1e-14)
