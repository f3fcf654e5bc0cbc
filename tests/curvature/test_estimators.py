"""Estimators against the exact value, each within its own standard error; Lanczos against eigh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxsoftmax.curvature import (
    SpectralDensity,
    hutchinson_diagonal,
    hutchinson_trace,
    hutchpp_trace,
    spectral_density,
    top_eigenpairs,
)
from tests.helpers import assert_close

N = 24
LIKE = {"a": np.zeros((4, 5)), "b": [np.zeros(4)]}


def symmetric(eigenvalues, seed=0):
    n = len(eigenvalues)
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return (Q * np.asarray(eigenvalues)) @ Q.T


def tree_product(A):
    """v -> A v over trees like LIKE."""
    _, unravel = ravel_pytree(LIKE)
    return lambda v: unravel(A @ ravel_pytree(v)[0])


def of_tree(method):
    """The method of (A, key, …), compiled, with A a matrix over trees like LIKE."""
    return jax.jit(lambda A, key, *counts: method(tree_product(A), LIKE, key, *counts), static_argnums=(2, 3))


trace, diagonal, plusplus, eigenpairs, density_of = map(
    of_tree, (hutchinson_trace, hutchinson_diagonal, hutchpp_trace, top_eigenpairs, spectral_density)
)


def assert_within(estimate, exact, errors=4.0):
    assert jnp.all(jnp.abs(estimate.mean - exact) <= errors * estimate.standard_error)


def test_hutchinson_trace_and_its_standard_error(key, x64):
    """Each probe has variance 2 Σ_{i≠j} A_ij²: the reported error is that, to 10 %, and covers the truth."""
    A = symmetric(np.linspace(-1, 3, N))
    estimate = trace(A, key, 2000)
    variance = 2 * (np.sum(A**2) - np.sum(np.diag(A) ** 2))
    np.testing.assert_allclose(estimate.standard_error, np.sqrt(variance / 2000), rtol=0.1)
    assert_within(estimate, np.trace(A))


def test_hutchinson_diagonal_and_its_standard_error(key, x64):
    A = symmetric(np.linspace(-1, 3, N))
    estimate = diagonal(A, key, 4000)
    assert jax.tree.map(jnp.shape, estimate.mean) == jax.tree.map(jnp.shape, LIKE)
    flat = type(estimate)(*(ravel_pytree(part)[0] for part in estimate))
    assert_within(flat, np.diag(A), 5.0)
    variances = np.sum(A**2, 1) - np.diag(A) ** 2
    np.testing.assert_allclose(flat.standard_error, np.sqrt(variances / 4000), rtol=0.15)


def test_the_standard_error_of_few_probes(key):
    """1 and 3: ±1; one probe claims nothing."""
    rules = SpectralDensity(jnp.array([[1.0], [3.0]]), jnp.ones((2, 1)))
    assert rules.mean_of(lambda x: x) == (2.0, 1.0)
    assert hutchinson_trace(lambda v: v, jnp.zeros(3), key, 1).standard_error == jnp.inf


def test_hutchpp_is_exact_on_low_rank_and_better_on_decay(key, x64):
    low = symmetric([5.0, 3.0, 1.0] + [0.0] * (N - 3))
    assert_close(plusplus(low, key, 30).mean, 9.0)
    full = symmetric(np.linspace(-1, 3, N))
    assert_close(plusplus(full, key, 3 * N).mean, np.trace(full))
    decay = symmetric(0.5 ** np.arange(N))
    plain, better = trace(decay, key, 30), plusplus(decay, key, 30)
    assert better.standard_error < plain.standard_error / 20
    assert_within(better, np.trace(decay))


@pytest.mark.parametrize(
    "eigenvalues",
    [np.linspace(-2, 3, N), np.repeat([4.0, 1.0, -2.0], N // 3), np.geomspace(1, 1e-12, N), np.zeros(N)],
    ids=["distinct", "multiple", "decaying", "zero"],
)
def test_lanczos_to_the_end_finds_every_eigenvalue(eigenvalues, key, x64):
    """As many steps as dimensions: the whole spectrum with multiplicities, and an orthonormal eigenbasis."""
    A = symmetric(eigenvalues)
    found, vectors, residuals = eigenpairs(A, key, N, N)
    scale = max(np.abs(eigenvalues).max(), 1e-300)
    np.testing.assert_allclose(np.sort(found), np.sort(eigenvalues), atol=1e-13 * scale)
    V = np.concatenate([np.reshape(leaf, (N, -1)) for leaf in jax.tree.leaves(vectors)], 1)
    assert_close(V @ V.T, np.eye(N))
    np.testing.assert_allclose(A @ V.T, V.T * np.asarray(found), atol=1e-12 * scale)
    assert jnp.all(residuals <= 1e-12 * scale)
    assert jnp.all(jnp.diff(jnp.abs(found)) <= 1e-15)


def test_top_eigenpairs_of_a_large_matrix_and_their_bounds(key, x64):
    """A few steps: every eigenvalue within its residual of a true one, the reported residual being the real one."""
    eigenvalues = np.concatenate([np.linspace(-1, 1, 396), [8.0, 7.0, -6.0, 5.0]])
    A = symmetric(eigenvalues)
    pairs = jax.jit(lambda A, key, *counts: top_eigenpairs(lambda v: A @ v, A[0], key, *counts), static_argnums=(2, 3))
    np.testing.assert_allclose(pairs(A, key, 4, 30)[0], [8.0, 7.0, -6.0, 5.0], rtol=1e-10)
    few, vectors, residuals = map(np.asarray, pairs(A, key, 3, 6))
    assert_close(np.linalg.norm(A @ vectors.T - vectors.T * few, axis=0), residuals)
    nearest = np.abs(few[:, None] - eigenvalues).min(1)
    assert np.all(nearest <= residuals) and residuals[0] > 1e-6


def test_spectral_density_is_exact_where_the_theory_says(key, x64):
    """Per probe: weights sum to 1, and m steps integrate vᵀA^k v exactly up to k = 2m - 1; with m = n, everything."""
    A = symmetric(np.linspace(0.5, 3, N))
    density = density_of(A, key, 5, 300)
    assert_close(jnp.sum(density.weights, 1), np.ones(300))
    assert density.nodes.shape == (300, 5) and jnp.all(density.weights >= 0)
    for power in (1, 3, 9):
        moment = density.mean_of(lambda x, k=power: x**k)
        assert_within(moment, np.mean(np.linspace(0.5, 3, N) ** power))
    probe = jax.random.rademacher(jax.random.split(jax.random.split(key, 300)[0])[0], (N,), float)
    moments = [probe @ np.linalg.matrix_power(A, k) @ probe / N for k in range(10)]
    weights, nodes = np.asarray(density.weights[0]), np.asarray(density.nodes[0])
    quadrature = [np.sum(weights * nodes**k) for k in range(10)]
    assert_close(np.array(quadrature), np.array(moments))
    whole = density_of(A, key, N, 2000)
    assert_within(whole.mean_of(jnp.log), np.linalg.slogdet(A)[1] / N)


def test_density_integrates_to_one_and_peaks_at_the_eigenvalues(key):
    d, grid = jnp.array([0.0] * 3 + [2.0]), np.linspace(-1, 3, 4001, dtype=np.float32)
    values = jax.jit(lambda d: spectral_density(lambda v: d * v, d, key, num_probes=8).density(grid, 0.1))(d)
    np.testing.assert_allclose(jnp.sum(values) * 1e-3, 1.0, rtol=1e-3)
    height = 1 / (0.1 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(np.asarray(values)[[1000, 3000]], [0.75 * height, 0.25 * height], rtol=1e-4)


def test_mixed_dtypes_are_computed_in_the_wider():
    like = {"half": jnp.zeros(2, jnp.bfloat16), "single": jnp.zeros(2)}
    product = lambda v: {"half": 2 * v["half"], "single": 3 * v["single"]}
    estimate = jax.jit(lambda key: hutchinson_diagonal(product, like, key, 2))(jax.random.key(0))
    assert jax.tree.map(lambda leaf: str(leaf.dtype), estimate.mean) == {"half": "bfloat16", "single": "float32"}
    assert jax.jit(lambda key: hutchinson_trace(product, like, key, 2))(jax.random.key(0)).mean == 10.0
